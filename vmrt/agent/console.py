"""The agent's log: short lines on the console, which the host keeps a bounded tail of.

At most `BURST` lines at once and `RATE` a second after that; what is dropped is counted and told with the next line.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time

BURST = 200
RATE = 20.0
MAX_LINE = 800

_lock = threading.Lock()
_tokens = float(BURST)
_refilled = time.monotonic()
_dropped = 0


def log(text: str) -> None:
    """Write one line; control characters are replaced, so that nobody else's text can forge lines or escape codes."""
    global _tokens, _refilled, _dropped
    with _lock:
        now = time.monotonic()
        _tokens = min(float(BURST), _tokens + (now - _refilled) * RATE)
        _refilled = now
        if _tokens < 1:
            _dropped += 1
            return
        _tokens -= 1
        lost = f" ({_dropped} lines dropped)" if _dropped else ""
        _dropped = 0
        _write(f"vmrt-agent: {_printable(text)[:MAX_LINE]}{lost}\n")


def panic(text: str) -> None:
    """Write a text of several lines whatever the rate."""
    for line in text.splitlines()[-60:]:
        _write(f"vmrt-agent: {_printable(line)[:MAX_LINE]}\n")


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def _write(text: str) -> None:
    # A console that cannot be written to has no one to tell.
    with contextlib.suppress(OSError):
        os.write(2, text.encode(errors="replace"))
