"""Whom the host kills for memory first, and whether it did.

`weigh` sets oom_score_adj (proc_pid_oom_score_adj(5)). Lower than it ever was it gets by CAP_SYS_RESOURCE only.

The kernel's log is the one place that says it for every kind of OOM kill. Source: mm/oom_kill.c prints "Killed process
<pid> (<comm>)" after "Out of memory" or "Memory cgroup out of memory"; Documentation/ABI/testing/dev-kmsg describes the
records ("priority,sequence,microseconds,flags;text"). Where it may not be read, the counters of a VM's own memory
cgroup say that somebody in it was killed (vmrt.hypervisor.cgroup).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path

from vmrt.hypervisor.cgroup import family
from vmrt.spawn import ProcessId, alive

log = logging.getLogger(__name__)

_KMSG = "/dev/kmsg"
_RECORD_LIMIT_BYTES = 8192
_KILLED = re.compile(r"^\d+,\d+,(?P<us>\d+),[^;]*;.*\bout of memory: Killed process (?P<pid>\d+) ", re.IGNORECASE)
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def weigh(processes: Iterable[ProcessId], oom_score_adj: int) -> None:
    """Have the OOM killer take these processes, and theirs, more (up to 1000) or less (down to -1000) readily.

    One that has ended is no error. A value that is lower than the host allows becomes the lowest that it does, 0 as a
    rule; this is said once.
    """
    for pid in [pid for process in processes if alive(process) for pid in family(process.pid)]:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            try:
                _set(pid, oom_score_adj)
            except PermissionError:
                _say_once()
                with contextlib.suppress(PermissionError):
                    _set(pid, max(0, oom_score_adj))


def disinherit(processes: Iterable[ProcessId]) -> None:
    """Give processes an ordinary value where ours, which they have from us, is another one."""
    if _own() != 0:
        weigh(processes, 0)


def _own() -> int:
    try:
        return int(Path("/proc/self/oom_score_adj").read_text())
    except (OSError, ValueError):
        return 0


def _set(pid: int, oom_score_adj: int) -> None:
    Path(f"/proc/{pid}/oom_score_adj").write_text(str(oom_score_adj))


@functools.cache
def _say_once() -> None:
    log.warning(
        "a pod cannot be protected from the host's OOM killer (negative oom_score_adj) without CAP_SYS_RESOURCE"
    )


def killed_in(records: Iterable[str], process: ProcessId) -> bool:
    """Say whether a record tells of this process: its pid, and not from before it was started."""
    started_us = process.start_ticks * 1_000_000 // _TICKS_PER_S
    for record in records:
        match = _KILLED.match(record)
        if match and int(match["pid"]) == process.pid and int(match["us"]) >= started_us:
            return True
    return False


def killed(process: ProcessId) -> bool:
    """Ask the kernel's log; False where it may not be read."""
    return killed_in(_records(), process)


def _records() -> Iterable[str]:
    try:
        fd = os.open(_KMSG, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return
    try:
        while True:
            # EPIPE: the record was overwritten before we read it; the next read goes on behind it.
            with contextlib.suppress(BrokenPipeError):
                try:
                    yield os.read(fd, _RECORD_LIMIT_BYTES).decode(errors="replace")
                except BlockingIOError:
                    return
    finally:
        os.close(fd)
