"""Signals that ask vmrt to end, noticed where they can be acted on."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class Interrupted(BaseException):
    """A signal asked vmrt to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class Signals:
    """Remembers SIGINT, SIGTERM and SIGHUP until the next `check`, which raises; until `hold` at least.

    Nothing is raised by the handler itself: it may run anywhere, in the middle of an undo as well as of a library.
    """

    def __init__(self) -> None:
        self._pending = 0
        self._held = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise `Interrupted` for a signal that has come since the last time; never after `hold`."""
        if self._pending and not self._held:
            signum, self._pending = self._pending, 0
            raise Interrupted(signum)

    def hold(self) -> None:
        """Let no signal end what comes now: it is the cleaning up."""
        self._held = True

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self._pending = signum
