"""The C library's system calls that Python has no function for, and their errors as `OSError`."""

from __future__ import annotations

import ctypes
import functools
import os


@functools.cache
def libc() -> ctypes.CDLL:
    """Return the process's C library; a call's result goes through `check`."""
    return ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> int:
    """Return a call's result. Raises `OSError` with this thread's errno where it is negative; `what` names the call."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result
