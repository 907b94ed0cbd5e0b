"""How long a VM may take to boot, on a machine that is busy, too.

A guest that hangs is to be told within `hypervisor.boot_timeout_s`; one that the host has no processor for does not
hang. So the time for which QEMU's busiest thread stood in line does not count. There is an end to it: a host that is
that short of processors is better told of than waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from vmrt import schedstat

# The whole wait is at most so many times the limit.
MOST = 5
# Looked at so long before it ends, at most; a fraction of the limit when that is short.
_AHEAD_S = 0.5


class BootLimit:
    """A time-out that a busy host prolongs. `qemu` returns QEMU's pid once it runs; `waited_s` was not counted."""

    def __init__(self, limit_s: float, qemu: Callable[[], int | None]) -> None:
        self.waited_s = 0.0
        self._limit_s = limit_s
        self._qemu = qemu

    @contextlib.asynccontextmanager
    async def __call__(self) -> AsyncIterator[None]:
        """Raise `TimeoutError` when the block takes too long."""
        loop = asyncio.get_running_loop()
        began, ahead_s = loop.time(), min(_AHEAD_S, self._limit_s / 4)
        timer: asyncio.TimerHandle | None = None

        def look() -> None:
            nonlocal timer
            self.waited_s = min(self._waited_s(), (MOST - 1) * self._limit_s)
            when, known = began + self._limit_s + self.waited_s, timeout.when()
            # Less than that more is not worth another look.
            if known is not None and when > known + ahead_s:
                timeout.reschedule(when)
                timer = loop.call_at(when - ahead_s, look)

        async with asyncio.timeout_at(began + self._limit_s) as timeout:
            timer = loop.call_at(began + self._limit_s - ahead_s, look)
            try:
                yield
            finally:
                timer.cancel()

    def _waited_s(self) -> float:
        pid = self._qemu()
        return 0.0 if pid is None else max(schedstat.all_waited_s(pid).values(), default=0.0)

    def __str__(self) -> str:
        besides = f" besides {self.waited_s:.0f} s without a processor" if self.waited_s >= 1 else ""
        return f"{self._limit_s:g} s{besides}"
