"""A container's mounts: each bound from where its volume lives, the pod's share or the guest's memory."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from vmrt.agent import agent_pb2 as pb
from vmrt.errors import ExhaustedError, VmrtError
from vmrt.model import Mount
from vmrt.pods import guest_volumes, volumes
from vmrt.pods.cancellation import uncancelled
from vmrt.pods.guest_volumes import Memory, Mirrored
from vmrt.pods.oci import BoundMount
from vmrt.pods.table import LiveSandbox, PodTable

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the container's OCI specification and the agent need to know of its mounts, in the order asked for."""

    bound: tuple[BoundMount, ...] = ()
    storages: tuple[pb.Storage, ...] = ()


async def prepare(table: PodTable, sandbox: LiveSandbox, container_id: str, mounts: Sequence[Mount]) -> Prepared:
    """Bring a container's volumes, but for images, to where it can bind them.

    The caller undoes the share's part with `volumes.unbind`, also after a failure; volumes in memory live as long as
    the VM.
    """
    if not mounts:
        return Prepared()
    plan = await asyncio.to_thread(guest_volumes.plan, mounts, table.config.volumes)
    made: dict[int, BoundMount] = {}
    storages: list[pb.Storage] = []
    agent = sandbox.need_agent()
    for index, (mount, where) in enumerate(zip(mounts, plan, strict=True)):
        match where:
            case Memory():
                await agent.make_volume(where.request())
                place = guest_volumes.source(where.name)
                if where.sub_path:
                    storage = where.storage(index, readonly=mount.readonly)
                    storages.append(storage)
                    place = guest_volumes.storage_source(container_id, storage)
                made[index] = BoundMount(mount, place)
            case Mirrored():
                if name := await _mirror(table, sandbox, where.path):
                    made[index] = BoundMount(mount, guest_volumes.source(name))
    # Not to be cancelled half-way: the undo would run beside it.
    shared = iter(
        await uncancelled(
            asyncio.to_thread(
                volumes.bind, table.config.root, sandbox.record.vm_id, container_id, mounts, elsewhere=made.keys()
            )
        )
    )
    bound = tuple(
        made[index] if index in made else next(shared) for index, mount in enumerate(mounts) if not mount.image
    )
    return Prepared(bound, tuple(storages))


async def follow_again(table: PodTable, sandbox: LiveSandbox, mounts: Sequence[Mount]) -> None:
    """After a restart: bring a container's mirrored volumes up to date and follow them as before."""
    for where in await asyncio.to_thread(guest_volumes.plan, mounts, table.config.volumes):
        if isinstance(where, Mirrored):
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
