"""The event loop's thread ahead of the machine's load: lists are answered while thirty guests boot on two processors.

The loop works for fractions of a millisecond and then sleeps, but on a busy machine it stands in the line of those who
compute for seconds each time that it wakes. With SCHED_RR (sched(7)) it does not. Nor do the threads that do its short
blocking work: one that stood in that line with the interpreter's lock in its hand would have the loop stand there, too.
Threads and processes that they make are ordinary ones (SCHED_RESET_ON_FORK): QEMU, converters of images and plugins
never have this priority. A loop that ran wild would be held to the 95 % of kernel.sched_rt_runtime_us;
`vmrt.loop_monitor` watches for less than that.

One exception: a child shares the parent's memory until it executes its program (vfork(2)), and the parent waits. In
`hurried` the child inherits the priority, so that this takes no turn in the line; `ORDINARY` gives it up again, and it
has to be put before the child's command.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_POLICY = os.SCHED_RR
_PARAMETER = os.sched_param(1)
# chrt(1), of the essential package util-linux.
_CHRT = shutil.which("chrt")
ORDINARY: tuple[str, ...] = () if _CHRT is None else (_CHRT, "--other", "0")

WORKER = "vmrt-work"
_POLLER = "_poll_wrapper"
_NATIVE = ("event_engine", "grpc_")

# Native ids of the threads that have the priority.
_threads: set[int] = set()


def enter() -> str:
    """Give the calling thread, grpc's and the workers the priority; return why not, "" when it was given.

    To be called in the loop's thread when the server is open. Converters of images, busy for seconds, stay ordinary.
    """
    if not ORDINARY:
        return "chrt (util-linux) is not installed"
    try:
        for thread in (threading.get_native_id(), *servers(), *_workers()):
            with contextlib.suppress(ProcessLookupError):
                _give(thread)
                _threads.add(thread)
    except OSError as e:
        leave()
        return e.strerror or str(e)
    return ""


def _give(thread: int = 0) -> None:
    os.sched_setscheduler(thread, _POLICY | os.SCHED_RESET_ON_FORK, _PARAMETER)


def servers() -> list[int]:
    """Return the native ids of the threads that carry requests to the loop: grpc's own, and grpc.aio's poller."""
    found = [t.native_id for t in threading.enumerate() if _POLLER in t.name and t.native_id is not None]
    for entry in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            if (entry / "comm").read_text().startswith(_NATIVE):
                found.append(int(entry.name))
    return found


def executor(name: str, threads: int | None = None) -> ThreadPoolExecutor:
    """Return an executor for short blocking work, whose threads have the priority while the loop has it."""
    return ThreadPoolExecutor(threads, f"{WORKER}-{name}", initializer=_join)


def _workers() -> list[int]:
    return [t.native_id for t in threading.enumerate() if t.name.startswith(WORKER) and t.native_id is not None]


def in_own_thread(name: str, work: Callable[[], T]) -> T:
    """Do short work in a thread that ends with it, as does what the work makes of its thread: another namespace, say.

    It has the priority while the loop has it.
    """
    outcome: Future[T] = Future()

    def body() -> None:
        _adopt()
        try:
            outcome.set_result(work())
        except BaseException as e:
            outcome.set_exception(e)

    thread = threading.Thread(target=body, name=name)
    thread.start()
    thread.join()
    return outcome.result()


def _join() -> None:
    if _adopt():
        _threads.add(threading.get_native_id())


def _adopt() -> bool:
    """Give the calling thread the priority if the loop has it; say if it got it."""
    if not _threads:
        return False
    try:
        _give()
    except OSError:
        return False
    return True


def leave() -> None:
    """Take the priority back."""
    while _threads:
        with contextlib.suppress(OSError):
            os.sched_setscheduler(_threads.pop(), os.SCHED_OTHER, os.sched_param(0))


@contextlib.contextmanager
def hurried() -> Iterator[tuple[str, ...]]:
    """Let a child that is made here inherit the priority; yields what to put before its command."""
    if threading.get_native_id() not in _threads:
        yield ()
        return
    try:
        os.sched_setscheduler(0, _POLICY, _PARAMETER)
    except OSError:
        # Taking SCHED_RESET_ON_FORK off needs CAP_SYS_NICE: without it the child takes its turn.
        yield ()
        return
    try:
        yield ORDINARY
    finally:
        _give()
