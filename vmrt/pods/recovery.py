"""After a restart, and on a timer: bring records and reality together.

Live VMs of ready sandboxes are adopted, half-made things are undone, finished ones forgotten. What carries our tag and
has no record is destroyed; nothing else is ever touched. No single sandbox, however broken, keeps the daemon from
starting: what cannot be settled now is tried again by the sweep.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Sequence
from dataclasses import replace

from vmrt.agent import agent_pb2 as pb
from vmrt.errors import VmGoneError, VmrtError
from vmrt.pods import container_create, container_mounts, cpusets, oom_scores, pod_vm, scratch, volumes
from vmrt.pods.container_events import exited, finish, watch
from vmrt.pods.records import ContainerRecord, ContainerState, SandboxRecord, SandboxState
from vmrt.pods.release import release, remove_state
from vmrt.pods.sandbox_run import connect
from vmrt.pods.table import LiveContainer, LiveSandbox, PodTable

log = logging.getLogger(__name__)

SWEEP_INTERVAL_S = 60.0
_ADOPT_TIMEOUT_S = 15.0
_SETTLE_S = 20.0
_ADOPT_PAUSE_S = 5.0
# What a container reports whose end nobody saw (CRI implementations agree on it).
UNSEEN_CODE = 255


async def recover(table: PodTable) -> None:
    """Load the records and settle each; called once, before the first request is served."""
    for record in table.store.load("sandbox", SandboxRecord):
        table.add_sandbox(record, recorded=True)
    for container in table.store.load("container", ContainerRecord):
        if container.sandbox_id not in table.sandboxes:
            table.store.delete("container", container.id)
            continue
        table.add_container(container, recorded=True)
        for image_id in {container.image_id, *container.volume_image_ids} - {""}:
            try:
                table.images.retain(image_id, container.id)
            except VmrtError as e:
                # Somebody removed the store's files. A running container has its layers open and goes on.
                log.warning("container %s: its image cannot be held: %s", container.id[:13], e)
    scratch.remove_parts(table.config.root)
    settling = [
        table.background(_try(_settle(table, live)), f"settle {live.id[:13]}")
        for live in list(table.sandboxes.values())
    ]
    if settling:
        # What takes longer goes on while requests are served.
        await asyncio.wait(settling, timeout=_SETTLE_S)
    await _try(table.pool.adopt())
    await sweep(table)


async def _settle(table: PodTable, live: LiveSandbox) -> None:
    if live.record.state is SandboxState.READY:
        await _adopt(table, live)
        return
    async with live.lock:
        await _finish(table, live)


async def _finish(table: PodTable, live: LiveSandbox) -> None:
    match live.record.state:
        case SandboxState.CREATING:
            await _forget(table, live)
        case SandboxState.NOT_READY:
            await _close_containers(table, live)
            if not live.record.released and live.record.vm_id in table.hypervisor.list():
                # Killed in the middle of StopPodSandbox: it would have gone on.
                await release(table, live.record)
                table.save_sandbox(live, replace(live.record, released=True))
        case SandboxState.REMOVING:
            await _forget(table, live)


async def _forget(table: PodTable, live: LiveSandbox) -> None:
    await release(table, live.record)
    for container in table.containers_of(live.id):
        await container_create.undo_create(table, None, container)
    remove_state(table, live.id)
    table.forget_sandbox(live)


async def _close_containers(table: PodTable, live: LiveSandbox) -> None:
    """Settle the containers of a sandbox without a VM."""
    for container in table.containers_of(live.id):
        if container.record.state in (ContainerState.CREATING, ContainerState.REMOVING):
            await container_create.undo_create(table, None, container)
        elif container.record.state in (ContainerState.CREATED, ContainerState.RUNNING):
            finish(table, container, UNSEEN_CODE, "Unknown", live.record.reason)


# --- a VM that runs on ------------------------------------------------------------------------------------------------


async def _adopt(table: PodTable, live: LiveSandbox) -> None:
    if live.record.vm_id not in table.hypervisor.list():
        await _lost(table, live, "its virtual machine ended while the daemon was down")
        return
    containers = table.containers_of(live.id)
    try:
        async with asyncio.timeout(_ADOPT_TIMEOUT_S):
            await _take_over(table, live, containers)
    except Exception as e:
        # The guest may be hung or very slow; that is for the operator to see, not a reason to kill it.
        log.error("sandbox %s: not adopted after the restart, will be tried again: %r", live.id[:13], e)
        table.background(_keep_adopting(table, live, containers), f"adopt {live.id[:13]}")


async def _keep_adopting(table: PodTable, live: LiveSandbox, containers: Sequence[LiveContainer]) -> None:
    while live.record.state is SandboxState.READY:
        await asyncio.sleep(_ADOPT_PAUSE_S)
        try:
            async with asyncio.timeout(_ADOPT_TIMEOUT_S):
                await _take_over(table, live, containers)
        except VmGoneError:
            return
        except Exception as e:
            log.debug("sandbox %s: its agent still does not answer: %r", live.id[:13], e)
            continue
        log.info("sandbox %s: its agent answers again", live.id[:13])
        return


async def _take_over(table: PodTable, live: LiveSandbox, containers: Sequence[LiveContainer]) -> None:
    """Compare what the agent has with the records that were found; may be repeated, also while requests are served."""
    if live.agent is None:
        await connect(table, live)
    else:
        await live.agent.check()
    agent = live.need_agent()
    inside = {info.container_id: info for info in (await agent.list_containers()).containers}
    for container in containers:
        info = inside.get(container.id)
        if table.containers.get(container.id) is not container:
            continue
        try:
            await _take_container(table, live, container, info)
        except VmGoneError:
            raise
        except VmrtError as e:
            log.error("container %s: not settled after the restart: %s", container.id[:13], e)
    for unknown in inside.keys() - table.containers.keys():
        log.warning("sandbox %s: removing container %s, which has no record", live.id[:13], unknown[:13])
        await agent.remove_container(unknown)
    await cpusets.settle_again(table, live)
    await oom_scores.settle(table, live)
    if live.events is None and live.record.state is SandboxState.READY:
        live.events = table.background(watch(table, live), f"events {live.id[:13]}")


async def _take_container(
    table: PodTable, live: LiveSandbox, container: LiveContainer, info: pb.ContainerInfo | None
) -> None:
    if container.record.state in (ContainerState.CREATING, ContainerState.REMOVING):
        async with container.lock:
            if table.containers.get(container.id) is container:
                await container_create.undo_create(table, live, container)
        return
    if container.record.state not in (ContainerState.CREATED, ContainerState.RUNNING):
        return
    if info is None:
        finish(table, container, UNSEEN_CODE, "Unknown", "the guest does not know this container any more")
        return
    if container.record.state is ContainerState.CREATED and info.state != pb.ContainerInfo.CREATED:
        # Killed between the agent's start and our note of it. When that was nobody knows.
        age_ns = min(info.exit.age_us, 86_400_000_000) * 1000 if info.state == pb.ContainerInfo.EXITED else 0
        started_ns = max(time.time_ns() - age_ns, container.record.created_ns)
        table.save_container(container, container.record.moved(ContainerState.RUNNING, started_ns=started_ns))
    if container.record.state is ContainerState.RUNNING:
        try:
            container_create.start_pump(table, live, container)
        except VmrtError as e:
            log.error("container %s: its log cannot be written: %s", container.id[:13], e)
    exited_meanwhile = info.state == pb.ContainerInfo.EXITED
    await container_mounts.follow_again(table, live, container, runs=not exited_meanwhile)
    if exited_meanwhile:
        table.background(exited(table, container, info.exit), f"exit {container.id[:13]}")


async def _lost(table: PodTable, live: LiveSandbox, reason: str) -> None:
    log.warning("sandbox %s: %s", live.id[:13], reason)
    table.save_sandbox(live, live.record.moved(SandboxState.NOT_READY, reason=reason))
    await _close_containers(table, live)


# --- the sweep --------------------------------------------------------------------------------------------------------


async def sweep(table: PodTable) -> None:
    """Remove what carries our tag and belongs to no record, and take up what could not be finished.

    A sandbox is in the table before anything of it exists and until nothing of it is left. So what is found first and
    has no sandbox *then* is nobody's; each is looked up only when its turn comes, as starts go on meanwhile.
    """
    for vm_id in table.hypervisor.list():
        if table.sandbox_of_vm(vm_id) is None and vm_id not in table.pool.vm_ids():
            log.warning("removing VM %s, which belongs to no sandbox", vm_id)
            await _try(_unmake(table, vm_id))
    for vm_id in scratch.vm_ids(table.config.root):
        if table.sandbox_of_vm(vm_id) is None and vm_id not in {*table.pool.vm_ids(), *table.hypervisor.list()}:
            await _try(_unmake(table, vm_id))
    for sandbox_id in table.network.list():
        if sandbox_id not in table.sandboxes:
            log.warning("removing the network of sandbox %s, which has no record", sandbox_id[:13])
            await _try(table.network.teardown(sandbox_id))
    for vm_id in volumes.vm_ids(table.config.root):
        if table.sandbox_of_vm(vm_id) is None and vm_id not in {*table.pool.vm_ids(), *table.hypervisor.list()}:
            log.warning("removing the share of VM %s, which belongs to no sandbox", vm_id)
            await _try(asyncio.to_thread(volumes.remove, table.config.root, vm_id))
    for directory in (table.config.root / "pods").glob("*"):
        if directory.name not in table.sandboxes:
            remove_state(table, directory.name)
    for live in list(table.sandboxes.values()):
        await _try(_again(table, live))


async def _unmake(table: PodTable, vm_id: str) -> None:
    # The tap too: it is made after the scratch disk and, until the pod's netns has it, nothing else would take it away.
    await pod_vm.unmake(table.config.root, table.hypervisor, table.network, vm_id, pod_vm.tap_of(vm_id))


async def _again(table: PodTable, live: LiveSandbox) -> None:
    """Take up a start whose undo failed, a removal that did, and a VM's end that could not be recorded."""
    if live.lock.locked():
        return
    state = live.record.state
    if live.undo_failed or state is SandboxState.REMOVING:
        async with live.lock:
            if table.sandboxes.get(live.id) is live:
                await _forget(table, live)
        return
    if state is SandboxState.READY and live.record.vm_id not in table.hypervisor.list():
        await _lost(table, live, "its virtual machine is gone")
    for container in table.containers_of(live.id):
        if (container.undo_failed or container.record.state is ContainerState.REMOVING) and not container.lock.locked():
            async with container.lock:
                if table.containers.get(container.id) is container:
                    await container_create.undo_create(table, live, container)


async def _try(work: Awaitable[None]) -> None:
    try:
        await work
    except VmrtError as e:
        log.error("not settled yet, will be tried again: %s", e)
    except Exception:
        log.exception("not settled yet, will be tried again")


async def sweep_forever(table: PodTable) -> None:
    """Sweep on a timer."""
    while True:
        await asyncio.sleep(SWEEP_INTERVAL_S)
        await _try(sweep(table))
