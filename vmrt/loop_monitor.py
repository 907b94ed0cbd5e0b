"""Watches that nothing blocks the event loop: kubelet's every-second List waits behind whatever does.

A thread of its own asks the loop for a sign of life a hundred times a second. When none comes within the limit it notes
where the loop's thread is, and reports how long it was away once it is back. The time that the thread was ready to run
and got no processor (`vmrt.schedstat`) is taken off, and so is the longest such time of our other threads, since one of
them may have held the interpreter's lock: a busy machine is nobody's fault here. On with `log.level = "debug"`.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
import traceback

from vmrt import schedstat

log = logging.getLogger(__name__)

LIMIT_S = 0.02
_PERIOD_S = 0.01
_FRAMES = 12


class LoopMonitor:
    """Watches the loop that it is started in."""

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._stopped = threading.Event()
        self._alive = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to watch the running loop; to be called in it."""
        loop = asyncio.get_running_loop()
        target, native = threading.get_ident(), threading.get_native_id()
        self._thread = threading.Thread(
            target=self._watch, args=(loop, target, native), name="vmrt-loop-monitor", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """End; the loop must not be closed before."""
        self._stopped.set()
        self._alive.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self, loop: asyncio.AbstractEventLoop, target: int, native: int) -> None:
        while not self._stopped.wait(_PERIOD_S):
            self._alive.clear()
            # `stop` says that it is the end before it says that the loop is alive: one of the two is seen here.
            if self._stopped.is_set():
                return
            asked, waited = time.monotonic(), schedstat.waited_s(native)
            loop.call_soon_threadsafe(self._alive.set)
            if self._alive.wait(self._limit_s):
                continue
            frame = sys._current_frames().get(target)
            where = "" if frame is None else "".join(traceback.format_stack(frame)[-_FRAMES:])
            del frame
            others = schedstat.all_waited_s()
            self._alive.wait()
            if self._stopped.is_set():
                return
            away_s = time.monotonic() - asked - (schedstat.waited_s(native) - waited)
            lost_s = [delay - others.get(t, delay) for t, delay in schedstat.all_waited_s().items() if t != native]
            away_s -= max(lost_s, default=0.0)
            if away_s > self._limit_s:
                log.warning("the loop was blocked for %.0f ms; after %.0f it was at:\n%s",
                            away_s * 1000, self._limit_s * 1000, where)  # fmt: skip
