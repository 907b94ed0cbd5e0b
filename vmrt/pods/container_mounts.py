"""A container's mounts: each bound from where its volume lives, the pod's share or the guest's memory."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from vmrt.agent import agent_pb2 as pb
from vmrt.errors import ExhaustedError, VmrtError
from vmrt.model import Mount
from vmrt.pods import block_devices, guest_volumes, volumes
from vmrt.pods.block_device import BlockDevice
from vmrt.pods.cancellation import uncancelled
from vmrt.pods.direct_volumes import Direct
from vmrt.pods.empty_dir_disks import EmptyDirDisk
from vmrt.pods.guest_volumes import Memory, Mirrored, Place
from vmrt.pods.oci import BoundMount
from vmrt.pods.table import LiveContainer, LiveSandbox, PodTable

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the container's OCI specification and the agent need to know of its mounts, in the order asked for."""

    bound: tuple[BoundMount, ...] = ()
    storages: tuple[pb.Storage, ...] = ()


def blocks_of(plan: Sequence[Place]) -> tuple[BlockDevice, ...]:
    """Return the block devices that planned mounts need in the VM."""
    return tuple(where.device for where in plan if isinstance(where, Direct | EmptyDirDisk))


async def prepare(
    table: PodTable, sandbox: LiveSandbox, container_id: str, mounts: Sequence[Mount], plan: Sequence[Place]
) -> Prepared:
    """Bring a container's volumes, but for images, to where it can bind them; `plan` says where they live.

    Block devices are in the VM already. The caller undoes the share's part with `volumes.unbind`, also after a failure;
    volumes in memory live as long as the VM, those on disks as long as the disks.
    """
    if not mounts:
        return Prepared()
    made: dict[int, BoundMount] = {}
    storages: list[pb.Storage] = []
    agent = sandbox.need_agent()
    for index, (mount, where) in enumerate(zip(mounts, plan, strict=True)):
        match where:
            case Memory() | EmptyDirDisk():
                await agent.make_volume(where.request())
                place = guest_volumes.source(where.name)
                if where.sub_path:
                    storage = guest_volumes.storage(where, index, readonly=mount.readonly)
                    storages.append(storage)
                    place = guest_volumes.storage_source(container_id, storage)
                made[index] = BoundMount(mount, place)
            case Direct():
                await agent.make_volume(where.request())
                made[index] = BoundMount(mount, guest_volumes.source(where.name))
            case Mirrored():
                if name := await _mirror(table, sandbox, where.path):
                    made[index] = BoundMount(mount, guest_volumes.source(name))
    vm_id = sandbox.record.vm_id
    share, elsewhere = table.hypervisor.share_process(vm_id), made.keys()
    # Not to be cancelled half-way: the undo would run beside it.
    shared = iter(
        await uncancelled(
            asyncio.to_thread(volumes.bind, table.config.root, vm_id, container_id, mounts, share, elsewhere=elsewhere)
        )
    )
    bound = tuple(
        made[index] if index in made else next(shared) for index, mount in enumerate(mounts) if not mount.image
    )
    return Prepared(bound, tuple(storages))


async def follow_again(table: PodTable, sandbox: LiveSandbox, container: LiveContainer, *, runs: bool) -> None:
    """After a restart: know a container's block devices, and follow its mirrored volumes as before if it `runs`."""
    spec = container.record.spec
    try:
        blocks = await asyncio.to_thread(block_devices.plan, spec.devices)
        plan = await asyncio.to_thread(guest_volumes.plan, spec.mounts, table.config.volumes)
    except VmrtError as e:
        log.error("container %s: its volumes changed while the daemon was down: %s", container.id[:13], e)
        return
    block_devices.remember(sandbox, container, [*blocks, *blocks_of(plan)])
    for where in plan:
        if runs and isinstance(where, Mirrored):
            try:
                await _mirror(table, sandbox, where.path)
            except VmrtError as e:
                log.error("sandbox %s: %s is not followed: %s", sandbox.id[:13], where.path, e)


async def _mirror(table: PodTable, sandbox: LiveSandbox, path: str) -> str:
    """Return the guest's name of a mirrored volume, "" for one that the share has to serve."""
    try:
        return await table.mirrors.follow(sandbox.id, path, sandbox.need_agent)
    except ExhaustedError as e:
        log.warning("%s is on the share, where containers get no inotify events: %s", path, e.message)
        return ""
