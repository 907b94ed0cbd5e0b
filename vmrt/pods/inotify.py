"""inotify(7) for an asyncio loop: which of some directories have changed their names."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import struct
from collections.abc import Callable

from vmrt.libc import check, libc

_EVENT = struct.Struct("iIII")
_IN_MOVED_FROM, _IN_MOVED_TO, _IN_CREATE, _IN_DELETE = 0x40, 0x80, 0x100, 0x200
_IN_Q_OVERFLOW, _IN_IGNORED, _IN_ONLYDIR = 0x4000, 0x8000, 0x01000000
_NAMES = _IN_MOVED_FROM | _IN_MOVED_TO | _IN_CREATE | _IN_DELETE | _IN_ONLYDIR
_READ_BYTES = 65536


class Inotify:
    """One inotify instance; `on_change` is called in the loop with the watch of a directory whose names changed.

    After an overflow every watch is told. A watch whose directory has gone is not told any more.
    """

    def __init__(self, on_change: Callable[[int], None]) -> None:
        self._on_change = on_change
        self._fd = -1
        self._watches: set[int] = set()

    def watch(self, path: str) -> int:
        """Watch a directory and return the watch's number; the same one while it is watched. Raises `OSError`.

        It holds no file system busy: when that is unmounted, the watch ends.
        """
        if self._fd < 0:
            self._fd = check(libc().inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC), "inotify")
            asyncio.get_running_loop().add_reader(self._fd, self._read)
        number = check(libc().inotify_add_watch(self._fd, os.fsencode(path), ctypes.c_uint32(_NAMES)), path)
        self._watches.add(number)
        return number

    def forget(self, number: int) -> None:
        """End a watch; one that has ended is no error."""
        if number in self._watches:
            self._watches.discard(number)
            libc().inotify_rm_watch(self._fd, number)

    def close(self) -> None:
        """End all watches."""
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
        self._watches.clear()

    def _read(self) -> None:
        changed: dict[int, None] = {}
        with contextlib.suppress(BlockingIOError):
            for number, mask in parse(os.read(self._fd, _READ_BYTES)):
                if mask & _IN_Q_OVERFLOW:
                    changed.update(dict.fromkeys(self._watches))
                elif mask & _IN_IGNORED:
                    self._watches.discard(number)
                else:
                    changed[number] = None
        for number in changed:
            self._on_change(number)


def parse(data: bytes) -> list[tuple[int, int]]:
    """Return (watch, mask) of each event in what was read."""
    events = []
    at = 0
    while at < len(data):
        number, mask, _, length = _EVENT.unpack_from(data, at)
        events.append((number, mask))
        at += _EVENT.size + length
    return events
