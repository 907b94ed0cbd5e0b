"""The URLs' tokens: each names one request, once, for a minute. Knowing it is the permission to use it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

from vmrt.errors import ExhaustedError
from vmrt.streaming.targets import Request

TTL_S = 60.0
MAX_WAITING = 1000
_TOKEN_OCTETS = 24  # 192 bits


class Tokens:
    """Requests that wait for their client."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting: dict[str, tuple[float, Request]] = {}  # in the order of their ends

    def add(self, request: Request) -> str:
        """Return a new token for a request. Raises `ExhaustedError` when too many wait."""
        self._expire()
        if len(self._waiting) >= MAX_WAITING:
            raise ExhaustedError(
                f"{MAX_WAITING} streaming requests wait for their clients",
                phase="stream",
                hint=f"each waits for at most {TTL_S:g} s",
            )
        token = secrets.token_urlsafe(_TOKEN_OCTETS)
        self._waiting[token] = (self._clock() + TTL_S, request)
        return token

    def take(self, token: str) -> Request | None:
        """Return the token's request and forget it; None for one that is unknown, used or too old."""
        self._expire()
        return self._waiting.pop(token, (0.0, None))[1]

    def peek(self, token: str) -> Request | None:
        """Return the token's request and keep it."""
        self._expire()
        return self._waiting.get(token, (0.0, None))[1]

    def _expire(self) -> None:
        now = self._clock()
        while self._waiting:
            token = next(iter(self._waiting))
            if self._waiting[token][0] > now:
                return
            del self._waiting[token]
