"""How long threads have stood in line for a processor.

Source: kernel Documentation/scheduler/sched-stats.rst, /proc/PID/task/TID/schedstat: nanoseconds on a processor,
nanoseconds waiting for one, time slices.
"""

from __future__ import annotations

import contextlib
from pathlib import Path


def waited_s(thread: int, pid: int | str = "self") -> float:
    """Return how long a thread of a process has waited; 0 where the kernel does not count it or the thread is gone."""
    try:
        return int(Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


def all_waited_s(pid: int | str = "self") -> dict[int, float]:
    """Return the same of each thread of a process; nothing of one that is gone."""
    threads: list[int] = []
    with contextlib.suppress(OSError):
        threads = [int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir()]
    return {thread: waited_s(thread, pid) for thread in threads}
