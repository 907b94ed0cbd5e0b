"""After a restart, and on a timer: bring records and reality together.

Live VMs of ready sandboxes are adopted, half-made things are undone, finished ones forgotten. What carries our tag and
has no record is destroyed; nothing else is ever touched.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable

from vmrt.agent import agent_pb2 as pb
from vmrt.errors import VmrtError
from vmrt.pods import container_create, scratch
from vmrt.pods.container_events import exited, finish, watch
from vmrt.pods.records import ContainerRecord, ContainerState, SandboxRecord, SandboxState
from vmrt.pods.release import release, remove_state
from vmrt.pods.sandbox_run import connect
from vmrt.pods.table import LiveSandbox, PodTable

log = logging.getLogger(__name__)

SWEEP_INTERVAL_S = 60.0
_ADOPT_TIMEOUT_S = 15.0
# What a container reports whose end nobody saw (CRI implementations agree on it).
UNSEEN_CODE = 255


async def recover(table: PodTable) -> None:
    """Load the records and settle each; called once, before the first request is served."""
    for record in table.store.load("sandbox", SandboxRecord):
        table.add_sandbox(record, recorded=True)
    for container in table.store.load("container", ContainerRecord):
        if container.sandbox_id in table.sandboxes:
            live = table.add_container(container, recorded=True)
            table.images.retain(container.image_id, container.id)
            if container.state in (ContainerState.EXITED, ContainerState.UNKNOWN):
                live.exited.set()
        else:
            table.store.delete("container", container.id)
    await asyncio.gather(*(_settle(table, live) for live in list(table.sandboxes.values())))
    await sweep(table)


async def _settle(table: PodTable, live: LiveSandbox) -> None:
    try:
        match live.record.state:
            case SandboxState.CREATING:
                await release(table, live.record)
                remove_state(table, live.id)
                table.forget_sandbox(live)
            case SandboxState.READY:
                await _adopt(table, live)
            case SandboxState.NOT_READY | SandboxState.REMOVING:
                await _finish_removals(table, live)
    except VmrtError as e:
        log.error("sandbox %s: not settled yet, will be tried again: %s", live.id[:13], e)


async def _adopt(table: PodTable, live: LiveSandbox) -> None:
    if live.record.vm_id not in table.hypervisor.list():
        _lost(table, live, "its virtual machine ended while the daemon was down")
        return
    try:
        async with asyncio.timeout(_ADOPT_TIMEOUT_S):
            agent = await connect(table, live)
            known = await agent.list_containers()
    except (VmrtError, TimeoutError) as e:
        # The guest may be hung; that is for the operator to see, not a reason to kill it.
        log.error("sandbox %s: its agent does not answer after the restart: %s", live.id[:13], e)
        live.events = table.background(watch(table, live), f"events {live.id[:13]}")
        return
    inside = {info.container_id: info for info in known.containers}
    for container in table.containers_of(live.id):
        info = inside.pop(container.id, None)
        state = container.record.state
        if state in (ContainerState.CREATING, ContainerState.REMOVING):
            await container_create.undo_create(table, live, container)
        elif state in (ContainerState.CREATED, ContainerState.RUNNING):
            if info is None:
                finish(table, container, UNSEEN_CODE, "Unknown", "the guest does not know this container any more")
                continue
            if state is ContainerState.CREATED and info.state != pb.ContainerInfo.CREATED:
                # Killed between the agent's start and our note of it.
                running = container.record.moved(ContainerState.RUNNING, started_ns=time.time_ns())
                table.save_container(container, running)
            if container.record.state is ContainerState.RUNNING:
                container_create.start_pump(table, live, container)
            if info.state == pb.ContainerInfo.EXITED:
                table.background(exited(table, container, info.exit), f"exit {container.id[:13]}")
    for unknown in inside:
        log.warning("sandbox %s: removing container %s, which has no record", live.id[:13], unknown[:13])
        await agent.remove_container(unknown)
    live.events = table.background(watch(table, live), f"events {live.id[:13]}")


def _lost(table: PodTable, live: LiveSandbox, reason: str) -> None:
    log.warning("sandbox %s: %s", live.id[:13], reason)
    table.save_sandbox(live, live.record.moved(SandboxState.NOT_READY, reason=reason))
    for container in table.containers_of(live.id):
        match container.record.state:
            case ContainerState.CREATING | ContainerState.REMOVING:
                table.images.release(container.id)
                table.forget_container(container)
            case ContainerState.CREATED | ContainerState.RUNNING:
                finish(table, container, UNSEEN_CODE, "Unknown", reason)


async def _finish_removals(table: PodTable, live: LiveSandbox) -> None:
    for container in table.containers_of(live.id):
        if container.record.state in (ContainerState.CREATING, ContainerState.REMOVING):
            await container_create.undo_create(table, None, container)
        elif container.record.state in (ContainerState.CREATED, ContainerState.RUNNING):
            finish(table, container, UNSEEN_CODE, "Unknown", live.record.reason)
    if live.record.state is SandboxState.REMOVING:
        await release(table, live.record)
        for container in table.containers_of(live.id):
            await container_create.undo_create(table, None, container)
        remove_state(table, live.id)
        table.forget_sandbox(live)


async def sweep(table: PodTable) -> None:
    """Remove what carries our tag and belongs to no record."""
    vms = {s.record.vm_id for s in table.sandboxes.values()}
    for vm_id in table.hypervisor.list():
        if vm_id not in vms:
            log.warning("removing VM %s, which belongs to no sandbox", vm_id)
            await _try(table.hypervisor.destroy(vm_id))
    for vm_id in scratch.vm_ids(table.config.root):
        if vm_id not in vms and vm_id not in table.hypervisor.list():
            scratch.remove(table.config.root, vm_id)
    for sandbox_id in table.network.list():
        if sandbox_id not in table.sandboxes:
            log.warning("removing the network of sandbox %s, which has no record", sandbox_id[:13])
            await _try(table.network.teardown(sandbox_id))
    for live in list(table.sandboxes.values()):
        # A start whose undo failed, or a removal that did: nobody else will come back for them.
        if live.record.state is SandboxState.CREATING and live.undo_failed:
            await _settle(table, live)


async def _try(work: Awaitable[None]) -> None:
    try:
        await work
    except VmrtError as e:
        log.error("sweep: %s", e)


async def sweep_forever(table: PodTable) -> None:
    """Sweep on a timer."""
    while True:
        await asyncio.sleep(SWEEP_INTERVAL_S)
        await sweep(table)
