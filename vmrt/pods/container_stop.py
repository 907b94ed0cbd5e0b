"""StopContainer and RemoveContainer. Both may be called any number of times and succeed when the VM is dead."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal

from vmrt.errors import DeadlineError, NotFoundError, VmGoneError, VmrtError
from vmrt.pods.container_create import again, undo_create
from vmrt.pods.container_events import finish
from vmrt.pods.records import ContainerState
from vmrt.pods.table import LiveContainer, PodTable

log = logging.getLogger(__name__)

KILL_TIMEOUT_S = 30.0


async def stop_container(table: PodTable, live: LiveContainer, timeout_s: float) -> None:
    """Send the stop signal, wait up to `timeout_s`, then SIGKILL. 0 kills at once.

    Concurrent calls do not wait for each other, so the shortest deadline counts; a cancelled call kills nothing.
    """
    if live.record.state is ContainerState.CREATED:
        # Never ran: its prepared process is what has to go.
        await _kill(table, live)
        finish(table, live, 137, "Error", "stopped before it was started")
        return
    if live.record.state is not ContainerState.RUNNING:
        return
    if timeout_s > 0:
        try:
            await _signal(table, live, signal_number(live.record.stop_signal), everyone=False)
            async with asyncio.timeout(timeout_s):
                await live.exited.wait()
            return
        except VmGoneError:
            pass  # the VM's end is on its way as an event
        except TimeoutError:
            log.info("container %s did not end within %g s, it is killed", live.id[:13], timeout_s)
    await _kill(table, live)


async def _kill(table: PodTable, live: LiveContainer) -> None:
    with contextlib.suppress(VmGoneError):
        await _signal(table, live, signal.SIGKILL, everyone=True)
    if live.record.state is not ContainerState.RUNNING:
        return
    try:
        async with asyncio.timeout(KILL_TIMEOUT_S):
            await live.exited.wait()
    except TimeoutError as e:
        raise DeadlineError(
            f"the container was killed but did not end within {KILL_TIMEOUT_S:g} s",
            phase="stop",
            resource=f"container {live.id}",
            hint="its processes may be stuck in the guest's kernel; stopping the sandbox ends them",
        ) from e


async def _signal(table: PodTable, live: LiveContainer, number: int, *, everyone: bool) -> None:
    sandbox = table.sandboxes[live.record.sandbox_id]
    with contextlib.suppress(NotFoundError):
        await again(lambda: sandbox.need_agent().signal_container(live.id, number, everyone))


def signal_number(name: str) -> int:
    """Return a signal's number from "SIGTERM", "TERM", "15" or "SIGRTMIN+3"; SIGTERM for one unknown."""
    if name.isdigit():
        return int(name) if 0 < int(name) <= signal.SIGRTMAX else signal.SIGTERM
    full = name.upper() if name.upper().startswith("SIG") else "SIG" + name.upper()
    for base in ("SIGRTMIN", "SIGRTMAX"):
        offset = full.removeprefix(base)
        if offset != full and offset[:1] in ("+", "-") and offset[1:].isdigit():
            return min(max(int(signal.Signals[base]) + int(offset), int(signal.SIGRTMIN)), int(signal.SIGRTMAX))
    try:
        return int(signal.Signals[full])
    except KeyError:
        return int(signal.SIGTERM)


async def remove_container(table: PodTable, live: LiveContainer) -> None:
    """Remove a container in any state; a running one is killed. Its log file stays: it is the client's."""
    async with live.lock:
        if table.containers.get(live.id) is not live:
            return
        if live.record.state in (ContainerState.CREATED, ContainerState.RUNNING):
            try:
                await stop_container(table, live, 0)
            except VmrtError as e:
                log.warning("container %s: %s; removing it all the same", live.id[:13], e)
        # One still CREATING is here because its undo failed: this is the next attempt.
        if live.record.state not in (ContainerState.CREATING, ContainerState.REMOVING):
            table.save_container(live, live.record.moved(ContainerState.REMOVING))
        await undo_create(table, table.sandboxes.get(live.record.sandbox_id), live)
