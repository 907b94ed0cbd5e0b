"""The guest's serial console: bounded in memory and on disk, whatever the guest writes.

QEMU is the client of a Unix socket that we bind before it starts, so not an octet of the boot is missed; it reconnects
every second while nobody listens, so a restarted daemon gets the console back (what was written in between is dropped
by QEMU, and the guest never blocks on it). A serial port written to a plain file would let the guest fill the disk.

The last `limit_bytes` are kept in memory. On disk `console` and `console.1` hold at most `limit_bytes` each, for the
next daemon and for a person; the newest connection wins.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from pathlib import Path

_READ_BYTES = 64 * 1024
# A guest that floods its console is read at 64 KiB every 20 ms: the socket fills and the emulated UART slows it down.
_READ_PAUSE_S = 0.02
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(octets: bytes) -> str:
    """Return console output as text that is safe to print: undecodable octets and control codes become U+FFFD."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", octets.decode(errors="replace").replace("\r\n", "\n"))


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


class ConsoleRing:
    """The last `limit_bytes` of a console, mirrored into two files that together hold at most twice that."""

    def __init__(self, path: Path, limit_bytes: int) -> None:
        self._path = path
        self._limit = limit_bytes
        self._kept = bytearray()
        self._file_bytes = 0

    def load(self) -> None:
        """Take over what an earlier daemon wrote."""
        for path in (self._older, self._path):
            with contextlib.suppress(OSError), path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - self._limit))
                self._kept += file.read(self._limit)
        del self._kept[: -self._limit]
        with contextlib.suppress(OSError):
            self._file_bytes = self._path.stat().st_size

    def append(self, octets: bytes) -> None:
        """Keep these octets; the oldest ones go."""
        octets = octets[-self._limit :]
        self._kept += octets
        if len(self._kept) > self._limit:
            del self._kept[: -self._limit]
        # The mirror is a convenience: a full disk must not cost the console in memory.
        with contextlib.suppress(OSError):
            if self._file_bytes + len(octets) > self._limit:
                self._path.replace(self._older)
                self._file_bytes = 0
            # What a guest prints is for root only.
            with open(self._path, "ab", opener=_private) as file:
                file.write(octets)
            self._file_bytes += len(octets)

    def tail(self, limit_bytes: int) -> str:
        """Return the end as printable text."""
        return printable(bytes(self._kept[-limit_bytes:])) if limit_bytes > 0 else ""

    @property
    def _older(self) -> Path:
        return self._path.with_name(f"{self._path.name}.1")


class Console:
    """Listens for one VM's QEMU and feeds the ring."""

    def __init__(self, socket_path: Path, ring: ConsoleRing) -> None:
        self._socket_path = socket_path
        self._ring = ring
        self._server: asyncio.Server | None = None
        self._reader_task: asyncio.Task[None] | None = None

    async def listen(self, owner: tuple[int, int]) -> None:
        """Bind the socket, which only `owner` (uid, gid) and root may connect to."""
        self._socket_path.unlink(missing_ok=True)
        # Not served at once: a cancellation in start_unix_server would lose the bound socket.
        self._server = await asyncio.start_unix_server(self._accept, self._socket_path, backlog=1, start_serving=False)
        self._socket_path.chmod(0o600)
        os.chown(self._socket_path, *owner)
        await self._server.start_serving()

    async def close(self) -> None:
        """Stop listening. QEMU goes on and drops what the guest writes."""
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._reader_task is not None:
            self._reader_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader_task
        self._socket_path.unlink(missing_ok=True)

    def tail(self, limit_bytes: int) -> str:
        """Return the end of the console."""
        return self._ring.tail(limit_bytes)

    async def drain(self, timeout_s: float) -> None:
        """After QEMU's end: wait until what it had written is read."""
        if self._reader_task is not None:
            await asyncio.wait([self._reader_task], timeout=timeout_s)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._reader_task is not None:
            self._reader_task.cancel()
        self._reader_task = asyncio.current_task()
        try:
            while octets := await reader.read(_READ_BYTES):
                self._ring.append(octets)
                await asyncio.sleep(_READ_PAUSE_S)
        except (ConnectionError, asyncio.CancelledError):
            # Cancelled by a newer connection or by close(): both mean only that this one is over.
            pass
        finally:
            writer.close()
