"""One VM as the driver holds it in memory: its state, its end, its processes, its console and vsock."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
import functools
import os
from collections.abc import Callable
from pathlib import Path

from vmrt import spawn
from vmrt.agent.layout import PROTOCOL_VERSION
from vmrt.errors import IllegalTransitionError, VmError
from vmrt.hypervisor import cgroup, oom
from vmrt.hypervisor.access import QemuUser
from vmrt.hypervisor.console import Console
from vmrt.hypervisor.record import Helper, VmPaths, VmRecord, write
from vmrt.hypervisor.vsock import Vsock
from vmrt.model import Confinement, VmEvent, VmEventKind
from vmrt.spawn import ProcessId

# How long QEMU's end waits for libvirt's word on it, and a helper's for QEMU's.
_QEMU_GRACE_S = 0.1
_HELPER_GRACE_S = 0.3


class VmState(enum.Enum):
    """A VM's life.

    BOOTING -> RUNNING -> ENDED
       |          |         |
       +----------+---------+--> DESTROYED
    """

    BOOTING = "booting"
    RUNNING = "running"
    ENDED = "ended"
    DESTROYED = "destroyed"


_MOVES: dict[VmState, frozenset[VmState]] = {
    VmState.BOOTING: frozenset((VmState.RUNNING, VmState.DESTROYED)),
    VmState.RUNNING: frozenset((VmState.ENDED, VmState.DESTROYED)),
    VmState.ENDED: frozenset((VmState.DESTROYED,)),
    VmState.DESTROYED: frozenset(),
}


OnEnd = Callable[["Vm", VmEventKind, str], None]
"""Called with the VM that has ended, how, and in words; the first call for a VM is the one that counts."""


class Vm:
    """One VM. `end` is set once, by whoever sees it first: libvirt, a helper's death, or our own destroy."""

    def __init__(
        self, record: VmRecord, paths: VmPaths, console: Console, vsock: Vsock, domain: str, user: QemuUser
    ) -> None:
        self.record = record
        self.user = user
        self.paths = paths
        self.console = console
        self.vsock = vsock
        self.domain = domain
        self.state = VmState.BOOTING
        self.end: VmEvent | None = None
        self.ended = asyncio.Event()
        self.shutting_down = False  # QEMU said that it ends
        self.stopped = asyncio.Event()  # libvirt has told of the domain's end
        self.forgotten = asyncio.Event()  # and its name is free
        self.disks: dict[str, int] = {}
        self.disks_lock = asyncio.Lock()
        self.size_lock = asyncio.Lock()
        self.confinement = Confinement()
        self.confine_lock = asyncio.Lock()
        self.nics_lock = asyncio.Lock()
        self.teardown: asyncio.Task[None] | None = None
        self.watches: list[ProcessWatch] = []

    @property
    def vm_id(self) -> str:
        """The VM's id."""
        return self.record.vm_id

    def move(self, state: VmState) -> None:
        """Change the state; `IllegalTransitionError` for a move the table does not have."""
        if state not in _MOVES[self.state]:
            raise IllegalTransitionError(
                f"cannot go from {self.state.value} to {state.value}", resource=f"vm {self.vm_id}"
            )
        self.state = state

    def set_end(self, kind: VmEventKind, detail: str) -> bool:
        """Keep how the VM ended; False when that is known already."""
        if self.end is not None:
            return False
        self.end = VmEvent(self.vm_id, kind, detail)
        self.ended.set()
        return True

    def note(self, **changes: object) -> None:
        """Change the record and write it."""
        self.record = dataclasses.replace(self.record, **changes)  # type: ignore[arg-type]
        write(self.paths, self.record)

    def note_helper(self, helper: Helper, process: ProcessId) -> None:
        """Record a helper."""
        self.note(helpers={**self.record.helpers, helper: process})

    def watch(self, on_end: OnEnd) -> None:
        """Watch QEMU and its helpers: without its vsock device or file share a VM is of no use.

        libvirt tells of QEMU's end as well, but only when the host's init has reaped it. Whose end is seen first is
        chance (a helper goes when QEMU goes), so each waits for better knowledge before it speaks.
        """
        later = asyncio.get_running_loop().call_later
        if self.record.qemu is not None:
            self.watches.append(
                ProcessWatch(self.record.qemu, lambda: later(_QEMU_GRACE_S, lambda: on_end(self, *self.verdict())))
            )
        for helper, process in self.record.helpers.items():
            lost = functools.partial(self._helper_lost, helper, process, on_end)
            self.watches.append(ProcessWatch(process, functools.partial(later, _HELPER_GRACE_S, lost)))

    def verdict(self) -> tuple[VmEventKind, str]:
        """Say how QEMU, which has ended, ended."""
        if self.shutting_down:
            return VmEventKind.STOPPED, "the guest shut down, rebooted or panicked"
        if self.record.qemu is not None and self._oom_killed(self.record.qemu):
            return VmEventKind.OOM_KILLED, "the host killed QEMU for memory"
        return VmEventKind.CRASHED, "QEMU was killed or failed"

    def _helper_lost(self, helper: Helper, process: ProcessId, on_end: OnEnd) -> None:
        kind = VmEventKind.OOM_KILLED if self._oom_killed(process) else VmEventKind.CRASHED
        on_end(self, kind, f"{helper.value} (pid {process.pid}) ended")

    def _oom_killed(self, process: ProcessId) -> bool:
        """Ask the kernel's log, and the counters of the VM's own cgroups where it may not be read."""
        return oom.killed(process) or cgroup.oom_kills(Path(path) for path in self.record.cgroups) > 0

    def processes(self) -> list[ProcessId]:
        """Return QEMU and its helpers."""
        return [process for process in (self.record.qemu, *self.record.helpers.values()) if process is not None]

    def processes_alive(self) -> bool:
        """Say whether QEMU and all helpers run."""
        known = (self.record.qemu, *self.record.helpers.values())
        return all(process is not None and spawn.alive(process) for process in known)

    def kill_processes(self) -> None:
        """Kill QEMU and its helpers: exactly those that were recorded, whatever runs under their pids now."""
        if self.record.qemu is not None:
            spawn.terminate(self.record.qemu)
        for process in self.record.helpers.values():
            if spawn.alive(process):
                # virtiofsd forks into its PID namespace; the group is its own, made by spawn.detached.
                spawn.kill_group(process.pid)

    def unwatch(self) -> None:
        """Stop watching processes."""
        for watch in self.watches:
            watch.close()
        self.watches.clear()


async def until_ready(vm: Vm) -> None:
    """Wait for the notice or for the VM's end, whichever is first."""
    ready = asyncio.create_task(vm.vsock.ready())
    ended = asyncio.create_task(vm.ended.wait())
    try:
        await asyncio.wait((ready, ended), return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            detail = vm.end.detail if vm.end is not None else "QEMU ended"
            raise VmError(f"the VM ended before its agent reported: {detail}")
        notice = ready.result()
    finally:
        for task in (ready, ended):
            task.cancel()
        await asyncio.gather(ready, ended, return_exceptions=True)
    if notice.protocol != PROTOCOL_VERSION:
        raise VmError(
            f"the guest's agent speaks protocol {notice.protocol}, this daemon {PROTOCOL_VERSION}",
            hint="build the guest image again: `vmrt guest build`",
        )


class ProcessWatch:
    """Tells when a process, child or not, has ended: pidfd_open(2), readable from then on."""

    def __init__(self, process: ProcessId, on_gone: Callable[[], object]) -> None:
        self._process = process
        self._on_gone = on_gone
        self._fd: int | None = None
        with contextlib.suppress(ProcessLookupError):
            self._fd = os.pidfd_open(process.pid)
        # Opened first, compared after: between the two the pid cannot pass to another process unseen. A zombie is still
        # itself here: its first thread may have ended before the others, and only the pidfd tells when all have.
        loop = asyncio.get_running_loop()
        if self._fd is None or _start_ticks(process.pid) != process.start_ticks:
            loop.call_soon(self._ended)
        else:
            loop.add_reader(self._fd, self._ended)

    def close(self) -> None:
        """Stop watching."""
        if self._fd is not None:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._fd = None

    def _ended(self) -> None:
        self.close()
        spawn.identify(self._process.pid)  # reaps it when it is our child
        self._on_gone()


def _start_ticks(pid: int) -> int | None:
    """Return field 22 of proc_pid_stat(5), of a zombie too."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat[stat.rindex(")") + 2 :].split()[19])


async def wait_gone(process: ProcessId, timeout_s: float) -> bool:
    """Wait for a process's end; False when it still runs after `timeout_s`."""
    gone = asyncio.Event()
    watch = ProcessWatch(process, gone.set)
    try:
        async with asyncio.timeout(timeout_s):
            await gone.wait()
    except TimeoutError:
        return False
    finally:
        watch.close()
    return True
