"""StopPodSandbox and RemovePodSandbox. Both may be called any number of times and succeed when the VM is dead."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import replace

from vmrt.errors import VmrtError
from vmrt.pods import container_stop
from vmrt.pods.container_events import mark_not_ready
from vmrt.pods.records import ContainerState, SandboxState
from vmrt.pods.release import release, remove_state
from vmrt.pods.sandbox_run import close_agent
from vmrt.pods.table import LiveSandbox, PodTable

log = logging.getLogger(__name__)

# How long the guest gets to kill its containers and write back; it is killed afterwards in any case.
SHUTDOWN_S = 3.0
# With block devices of the host in the VM: what its containers wrote and did not flush has to reach them.
FLUSH_S = 60.0
_DRAIN_S = 1.0


async def stop_sandbox(table: PodTable, live: LiveSandbox) -> None:
    """Publish NOT_READY, kill the containers, give back VM, network and disk before returning."""
    async with live.lock:
        await _stop(table, live)


async def _stop(table: PodTable, live: LiveSandbox) -> None:
    if live.record.state is SandboxState.READY:
        table.save_sandbox(live, live.record.moved(SandboxState.NOT_READY, reason="stopped"))
    if live.record.released:
        await _let_go(table, live)
        return
    await release(table, live.record, before_vm=lambda: _let_go(table, live))
    table.save_sandbox(live, replace(live.record, released=True))


async def _let_go(table: PodTable, live: LiveSandbox) -> None:
    """End the containers and what this daemon runs for the VM; the network goes meanwhile."""
    await _shut_down(table, live)
    mark_not_ready(table, live, live.record.reason)
    if live.events is not None:
        live.events.cancel()
        live.events = None
    await close_agent(live)


async def _shut_down(table: PodTable, live: LiveSandbox) -> None:
    """Have the guest kill the containers, for their true exit codes; without running ones the VM is just killed."""
    running = any(c.record.state is ContainerState.RUNNING for c in table.containers_of(live.id))
    # A disk's file system is written back by its unmount, whether its containers run or not.
    if live.agent is None or not (running or live.blocks):
        return
    try:
        await live.agent.shutdown(timeout_s=FLUSH_S if live.blocks else SHUTDOWN_S)
    except VmrtError as e:
        log.info("sandbox %s: the guest did not shut down by itself, it is killed: %s", live.id[:13], e)
        return
    # The exits arrive as events and carry the true codes; what does not arrive in time counts as killed.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DRAIN_S):
            for container in table.containers_of(live.id):
                if container.record.state is ContainerState.RUNNING:
                    await container.exited.wait()


async def remove_sandbox(table: PodTable, live: LiveSandbox) -> None:
    """Stop, remove the containers, forget the sandbox."""
    async with live.lock:
        if table.sandboxes.get(live.id) is not live:
            return
        if live.record.state is not SandboxState.REMOVING:
            await _stop(table, live)
            table.save_sandbox(live, live.record.moved(SandboxState.REMOVING))
        for container in table.containers_of(live.id):
            await container_stop.remove_container(table, container)
        remove_state(table, live.id)
        table.forget_sandbox(live)
