"""The scheduling priority of a VM that nobody waits for yet.

Linux keeps a nice value per thread, and setpriority(2) with PRIO_PROCESS sets one thread's (its NOTES): a process is
slowed by going through its threads, which hand the value on to those that they make.

Where the kernel schedules by autogroups (sched(7)), a nice value counts within a session only, and a session is weighed
against the others by a value of its own. QEMU has a session to itself.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from pathlib import Path

from vmrt.spawn import ProcessId, alive

BACKGROUND = 10
NORMAL = 0


@functools.cache
def can_restore() -> bool:
    """Say whether we may raise a priority again (CAP_SYS_NICE), tried on a thread of our own."""
    allowed: list[bool] = []

    def attempt() -> None:
        with contextlib.suppress(OSError):
            nice = os.getpriority(os.PRIO_PROCESS, 0)
            os.setpriority(os.PRIO_PROCESS, 0, nice + 1)
            os.setpriority(os.PRIO_PROCESS, 0, nice)
            allowed.append(True)

    thread = threading.Thread(target=attempt, name="vmrt-nice")
    thread.start()
    thread.join()
    return bool(allowed)


def set_nice(process: ProcessId, nice: int) -> None:
    """Give every thread of a process a nice value; a no-op where it could not be taken back."""
    if not can_restore() or not alive(process):
        return
    done: set[int] = set()
    # Twice, for the threads that one not yet seen has made meanwhile.
    for _ in range(2):
        with contextlib.suppress(OSError):
            for entry in Path(f"/proc/{process.pid}/task").iterdir():
                thread = int(entry.name)
                if thread not in done:
                    done.add(thread)
                    with contextlib.suppress(ProcessLookupError):
                        os.setpriority(os.PRIO_PROCESS, thread, nice)
    _set_autogroup(process.pid, nice)


def _set_autogroup(pid: int, nice: int) -> None:
    """Weigh a process's session, unless it is ours, or the kernel has no autogroups."""
    group = Path(f"/proc/{pid}/autogroup")
    with contextlib.suppress(OSError):
        # "/autogroup-12 nice 0"
        if group.read_text().split()[:1] != Path("/proc/self/autogroup").read_text().split()[:1]:
            group.write_text(f"{nice}\n")
