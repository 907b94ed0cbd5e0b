"""What containers and VMs do on their own: exits, OOM kills, the death of a VM. Told by events, never polled."""

from __future__ import annotations

import asyncio
import logging
import time

from vmrt.agent import agent_pb2 as pb
from vmrt.errors import NotFoundError, VmGoneError, VmrtError
from vmrt.model import VmEvent, VmEventKind
from vmrt.pods import cpusets, oom_scores
from vmrt.pods.records import ContainerState, SandboxState
from vmrt.pods.table import LiveContainer, LiveSandbox, PodTable

log = logging.getLogger(__name__)

_RETRY_S = 0.5
# A process that inherited the container's output may hold it open after the main process has ended.
_DRAIN_S = 10.0

_LIVE = (ContainerState.CREATED, ContainerState.RUNNING)


async def watch(table: PodTable, live: LiveSandbox) -> None:
    """Follow the agent's events until the VM is gone. A replayed event changes nothing."""
    after = 0
    while live.record.state is SandboxState.READY and live.agent is not None:
        try:
            async for event in live.agent.events(after):
                after = event.sequence
                if event.HasField("exit"):
                    container = table.containers.get(event.exit.container_id)
                    if container is not None and container.record.sandbox_id == live.id:
                        # Not awaited: draining one container's log must not delay another's exit.
                        table.background(exited(table, container, event.exit.exit), f"exit {container.id[:13]}")
                elif event.HasField("oom"):
                    log.info("container %s: a process was killed for memory", event.oom.container_id[:13])
        except (VmGoneError, NotFoundError):
            return
        except (VmrtError, OSError) as e:
            log.debug("sandbox %s: event stream broke, trying again: %s", live.id[:13], e)
        except Exception:
            # Whatever it was, a sandbox whose events nobody follows would be worse.
            log.exception("sandbox %s: event stream broke, trying again", live.id[:13])
        await asyncio.sleep(_RETRY_S)


async def exited(table: PodTable, live: LiveContainer, exit_frame: pb.ExitFrame) -> None:
    """Record a container's exit: first its whole log, then the state that clients wait for."""
    finished_ns = time.time_ns() - min(exit_frame.age_us, 86_400_000_000) * 1000
    code = exit_frame.code & 0xFF
    reason = "OOMKilled" if exit_frame.oom_killed else "Completed" if code == 0 else "Error"
    live.ended = code, reason, finished_ns
    if live.pump is not None:
        await live.pump.drained(_DRAIN_S)
    finish(table, live, code, reason, finished_ns=finished_ns)


def finish(
    table: PodTable, live: LiveContainer, exit_code: int, reason: str, message: str = "", *, finished_ns: int = 0
) -> None:
    """Move a container to EXITED; one that has ended already stays as it is."""
    record = live.record
    if record.state not in (*_LIVE, ContainerState.UNKNOWN):
        return
    # A short command's exit is told before the answer to its start.
    started_ns = record.started_ns or live.starting_ns
    changes = {
        "exit_code": exit_code,
        "reason": reason,
        "message": message,
        "started_ns": started_ns,
        "finished_ns": max(finished_ns or time.time_ns(), started_ns),
    }
    table.save_container(live, record.moved(ContainerState.EXITED, **changes))
    cpusets.settle_later(table, record.sandbox_id)
    oom_scores.settle_later(table, record.sandbox_id)
    log.info("container %s exited with %d (%s)", live.id[:13], exit_code, reason)


async def follow_vms(table: PodTable) -> None:
    """Follow the hypervisor's events for as long as the daemon runs."""
    async for event in table.hypervisor.events():
        live = table.sandbox_of_vm(event.vm_id)
        if live is None:
            table.pool.vm_ended(event.vm_id)
            continue
        try:
            await vm_ended(table, live, event)
        except Exception:
            # One that cannot be recorded (a full disk) must not make us deaf to the next; the sweep looks again.
            log.exception("sandbox %s: the end of its VM could not be recorded", live.id[:13])


async def vm_ended(table: PodTable, live: LiveSandbox, event: VmEvent) -> None:
    """Record that a sandbox's VM ended by itself: NOT_READY, and every container exited."""
    if live.record.state is not SandboxState.READY:
        return
    why = {
        VmEventKind.STOPPED: "the virtual machine shut down",
        VmEventKind.CRASHED: "the virtual machine died",
        VmEventKind.OOM_KILLED: "the host killed the virtual machine for memory",
    }[event.kind]
    reason = f"{why}: {event.detail}" if event.detail else why
    log.warning("sandbox %s: %s", live.id[:13], reason)
    mark_not_ready(table, live, reason, oom=event.kind is VmEventKind.OOM_KILLED)
    if live.agent is not None:
        await live.agent.close()


def mark_not_ready(table: PodTable, live: LiveSandbox, reason: str, *, oom: bool = False) -> None:
    """Publish a sandbox's end before any slow teardown: the sandbox first, then its containers as killed (137)."""
    table.mirrors.forget(live.id)
    if live.record.state is SandboxState.READY:
        table.save_sandbox(live, live.record.moved(SandboxState.NOT_READY, reason=reason))
    for container in table.containers_of(live.id):
        if container.record.state in _LIVE and container.ended is not None:
            # It ended by itself before; only its log was not whole yet.
            code, why, finished_ns = container.ended
            finish(table, container, code, why, finished_ns=finished_ns)
        elif container.record.state in _LIVE:
            finish(table, container, 137, "OOMKilled" if oom else "Error", reason)
