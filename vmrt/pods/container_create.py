"""CreateContainer and StartContainer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from vmrt.agent import agent_pb2 as pb
from vmrt.errors import (
    FailedPreconditionError,
    IllegalTransitionError,
    NotFoundError,
    UnavailableError,
    VmGoneError,
    VmrtError,
)
from vmrt.model import (
    ContainerSpec,
    Image,
    NamespaceMode,
    ProfileType,
    SupplementalGroupsPolicy,
)
from vmrt.pods import (
    apparmor,
    block_devices,
    cdi,
    container_mounts,
    cpusets,
    devices,
    guest_volumes,
    image_volumes,
    oci,
    oom_scores,
    pod_vm,
    resize,
    seccomp,
    volumes,
)
from vmrt.pods.block_device import BlockDevice
from vmrt.pods.cancellation import uncancelled
from vmrt.pods.container_events import finish
from vmrt.pods.layer_disks import attach_layers, serial
from vmrt.pods.log_pump import LogPump
from vmrt.pods.records import ContainerRecord, ContainerState, SandboxState
from vmrt.pods.release import position_file
from vmrt.pods.sandbox_run import hostname_of
from vmrt.pods.table import LiveContainer, LiveSandbox, PodTable

log = logging.getLogger(__name__)

CREATE_TIMEOUT_S = 60.0
START_TIMEOUT_S = 30.0
# CRI: what a container that could not be started reports (containerd's convention, known to kubelet).
START_ERROR_CODE = 128


async def create_container(table: PodTable, sandbox: LiveSandbox, spec: ContainerSpec) -> str:
    """Make a container in a READY sandbox and return its id. On any failure nothing is left."""
    if sandbox.record.state is not SandboxState.READY:
        raise FailedPreconditionError(
            f"the sandbox is {sandbox.record.state.value}, a container needs a ready one",
            resource=f"sandbox {sandbox.id}",
            hint=sandbox.record.reason,
        )
    cpusets.require_present(spec.resources, "config.linux.resources")
    image = table.images.get(spec.image)
    if image is None:
        raise NotFoundError(f"the image {spec.image!r} is not on this node", hint="pull or load it first")
    volume_images = image_volumes.find(table.images, spec.mounts)
    # With what its CDI devices add; the record, and so the status, has what was asked for.
    full = await asyncio.to_thread(cdi.applied, spec) if spec.cdi_devices else spec
    policy = await apparmor.policy(spec.security)
    devices_ = await asyncio.to_thread(block_devices.plan, full.devices)
    plan = await asyncio.to_thread(guest_volumes.plan, full.mounts, table.config.volumes)
    blocks = (*devices_, *container_mounts.blocks_of(plan))
    container_id = secrets.token_hex(32)
    live = table.add_container(
        ContainerRecord(
            id=container_id,
            sandbox_id=sandbox.id,
            spec=spec,
            state=ContainerState.CREATING,
            created_ns=time.time_ns(),
            image_id=image.id,
            image_ref=image.id,
            log_path=_log_path(sandbox.record.spec.log_directory, spec.log_path),
            stop_signal=spec.stop_signal or image.config.stop_signal or "SIGTERM",
            layer_serials=tuple(serial(layer) for layer in image.layers),
            volume_image_ids=image_volumes.ids(volume_images, len(spec.mounts)),
            block_serials=tuple(dict.fromkeys(block.serial for block in blocks)),
        )
    )
    # Held to the end of the undo, too: a removal of the sandbox waits until this container is settled.
    async with live.lock:
        try:
            for image_id in {image.id, *(volume.id for volume in volume_images.values())}:
                table.images.retain(image_id, container_id)
            await cpusets.settle(table, sandbox)
            await oom_scores.settle(table, sandbox)
            await resize.make_room(table, sandbox, spec.resources)
            await block_devices.attach(table, sandbox, blocks)
            prepared = await container_mounts.prepare(table, sandbox, container_id, full.mounts, plan)
            prepared = container_mounts.Prepared(
                prepared.bound + image_volumes.bound(volume_images, spec.mounts, container_id),
                (*prepared.storages, *image_volumes.storages(volume_images, spec.mounts)),
            )
            request = _request(table, sandbox, live.record, full, image, prepared, devices_, policy)
            agent = sandbox.need_agent()
            layers = [layer for each in (image, *volume_images.values()) for layer in each.layers]
            await attach_layers(table, sandbox, layers)
            # A cancelled call goes on in the guest: were its end not awaited, the undo could overtake it.
            made = await uncancelled(agent.create_container(request, timeout_s=CREATE_TIMEOUT_S))
            sandbox.need_agent()  # the sandbox may have been stopped meanwhile
            table.save_container(
                live,
                live.record.moved(
                    ContainerState.CREATED,
                    uid=made.uid,
                    gid=made.gid,
                    supplemental_groups=tuple(made.supplemental_groups),
                ),
            )
        except BaseException as e:
            await uncancelled(_undo(table, sandbox, live))
            if isinstance(e, VmrtError) and not e.resource:
                e.resource = f"container {spec.name} of sandbox {sandbox.id}"
            raise
    return container_id


async def _undo(table: PodTable, sandbox: LiveSandbox, live: LiveContainer) -> None:
    try:
        await undo_create(table, sandbox, live)
    except Exception as e:
        # The record stays, hidden: the sweep tries again until nothing is left.
        log.error("container %s: could not undo its creation yet: %s", live.id[:13], e)
        live.undo_failed = True


async def undo_create(table: PodTable, sandbox: LiveSandbox | None, live: LiveContainer) -> None:
    """Undo a creation from the record alone, however far it came; on failure the record stays, for another attempt."""
    if sandbox is not None and sandbox.agent is not None and sandbox.record.state is SandboxState.READY:
        agent = sandbox.agent
        with contextlib.suppress(VmGoneError):  # and the container with it
            await again(lambda: agent.remove_container(live.id))
        await block_devices.detach(table, sandbox, live)
    if live.pump is not None:
        await live.pump.stop()
    owner = table.sandboxes.get(live.record.sandbox_id)
    if owner is not None:
        vm_id = owner.record.vm_id
        share = pod_vm.share_of(table.hypervisor, vm_id)
        await asyncio.to_thread(volumes.unbind, table.config.root, vm_id, live.id, share)
    position_file(table, live.record).unlink(missing_ok=True)
    table.images.release(live.id)
    table.forget_container(live)
    cpusets.settle_later(table, live.record.sandbox_id)
    oom_scores.settle_later(table, live.record.sandbox_id)
    resize.give_back_later(table, live)


async def again(call: Callable[[], Awaitable[None]]) -> None:
    """Make a call that may be repeated; once more when its connection broke.

    A VM that is dying breaks its connections before its end is known: the second attempt is told (`VmGoneError`).
    """
    try:
        await call()
    except VmGoneError:
        raise
    except UnavailableError:
        await call()


def _log_path(directory: str, path: str) -> str:
    return str(Path(directory) / path) if directory and path else ""


def _request(
    table: PodTable,
    sandbox: LiveSandbox,
    record: ContainerRecord,
    spec: ContainerSpec,
    image: Image,
    prepared: container_mounts.Prepared,
    blocks: tuple[BlockDevice, ...],
    policy: apparmor.Policy | None,
) -> pb.CreateContainerRequest:
    security = spec.security
    profile = None
    if security.seccomp is not None and security.seccomp.type is not ProfileType.UNCONFINED and not security.privileged:
        release = table.guest(table.handler(sandbox.record.spec.runtime_handler)[0]).kernel_release
        profile = seccomp.resolve(seccomp.read(security.seccomp), oci.capabilities(spec), release)
    config = oci.build(
        sandbox.record.spec,
        spec,
        image.config,
        hostname=hostname_of(sandbox.record.spec),
        mounts=prepared.bound,
        seccomp=profile,
        apparmor=policy.name if policy is not None else "",
    )
    user = pb.User(
        username=security.run_as_username,
        supplemental_groups=security.supplemental_groups,
        strict_groups=security.supplemental_groups_policy is SupplementalGroupsPolicy.STRICT,
        image_user=image.config.user,
    )
    if security.run_as_user is not None:
        user.uid = security.run_as_user
    if security.run_as_group is not None:
        user.gid = security.run_as_group
    target = security.namespaces
    return pb.CreateContainerRequest(
        container_id=record.id,
        layer_serials=record.layer_serials,
        oci_spec=json.dumps(config).encode(),
        storages=prepared.storages,
        user=user,
        stdin=spec.stdin,
        stdin_once=spec.stdin_once,
        create_working_dir=True,
        discard_output=not record.log_path,
        join_pid_namespace_of=target.target_id if target.pid is NamespaceMode.TARGET else "",
        devices=devices.nodes(spec.devices, {block.index: block.serial for block in blocks}),
        all_devices=security.privileged,
        apparmor=pb.AppArmorPolicy(profile=policy.name, policy=policy.binary) if policy is not None else None,
    )


async def start_container(table: PodTable, live: LiveContainer) -> None:
    """Start a CREATED container. A failed start ends it: EXITED, 128, StartError."""
    async with live.lock:
        record = live.record
        if table.containers.get(record.id) is not live:
            raise NotFoundError(f"no container with id {record.id!r}: it was removed meanwhile")
        if record.state is not ContainerState.CREATED:
            raise IllegalTransitionError(
                f"a container that is {record.state.value} cannot be started", resource=f"container {record.id}"
            )
        sandbox = table.sandboxes[record.sandbox_id]
        agent = sandbox.need_agent()
        live.starting_ns = time.time_ns()
        try:
            start_pump(table, sandbox, live)
            await agent.start_container(record.id, timeout_s=START_TIMEOUT_S)
        except Exception as e:
            # It may run all the same (a time-out): what is recorded as ended must have ended.
            with contextlib.suppress(VmrtError):
                await agent.signal_container(record.id, signal.SIGKILL, True)
            live.starting_ns = 0
            finish(table, live, START_ERROR_CODE, "StartError", str(e))
            raise
        if live.record.state is ContainerState.CREATED:
            table.save_container(live, live.record.moved(ContainerState.RUNNING, started_ns=live.starting_ns))


def start_pump(table: PodTable, sandbox: LiveSandbox, live: LiveContainer) -> None:
    """Begin to write the container's log, if it has one."""
    if live.record.log_path and live.pump is None:
        position = position_file(table, live.record)
        limit = table.config.max_container_log_line_bytes
        try:
            position.parent.mkdir(parents=True, exist_ok=True)
            live.pump = LogPump(sandbox.need_agent(), live.id, Path(live.record.log_path), position, limit)
        except OSError as e:
            raise VmrtError(f"cannot keep the log's position: {e}", phase="log", resource=str(position)) from e
