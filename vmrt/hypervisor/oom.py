"""Did the host kill a process for memory? The kernel's log is the one place that says it for every kind of OOM kill.

Source: mm/oom_kill.c prints "Killed process <pid> (<comm>)" after "Out of memory" or "Memory cgroup out of memory";
Documentation/ABI/testing/dev-kmsg describes the records ("priority,sequence,microseconds,flags;text"). Where it may not
be read, the counters of a VM's own memory cgroup say that somebody in it was killed (vmrt.hypervisor.cgroup).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable

from vmrt.spawn import ProcessId

_KMSG = "/dev/kmsg"
_RECORD_LIMIT_BYTES = 8192
_KILLED = re.compile(r"^\d+,\d+,(?P<us>\d+),[^;]*;.*\bout of memory: Killed process (?P<pid>\d+) ", re.IGNORECASE)
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


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
