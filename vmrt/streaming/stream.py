"""A session's byte streams, whatever carries them, and the connection below.

Rules: a stream buffers at most `INBOX_BYTES` that its consumer has not taken, and all streams of a session together at
most `SESSION_BYTES`; then the connection is not read any more, and the kernel's flow control holds the client back.
What is written waits for the socket in the same way. A connection that is not read does not show that its client has
gone: `Transport.hung_up` does.
"""

from __future__ import annotations

import asyncio
import select
from collections import deque
from typing import Protocol

INBOX_BYTES = 256 * 1024
SESSION_BYTES = 4 * 1024 * 1024
# What a client has sent before it hung up is taken for this long.
HANG_UP_GRACE_S = 5.0
_READ = 65536
_CLOSE_TIMEOUT_S = 1.0


class PeerGoneError(Exception):
    """The client's connection, or this stream of it, has ended."""


class HangsUp(Protocol):
    """What has another end that may go."""

    async def hung_up(self) -> None:
        """Wait until the client has closed its end, read or not."""
        ...


class Transport(HangsUp, Protocol):
    """An ordered byte stream to the client: a socket, or a WebSocket that carries SPDY."""

    async def read(self) -> bytes:
        """Return the next octets, nothing at the end. Never raises but for cancellation."""
        ...

    async def write(self, data: bytes) -> None:
        """Send all octets. Raises `PeerGoneError`."""
        ...

    async def close(self) -> None:
        """Close it, waiting for nothing that depends on the client for long."""
        ...


class SocketTransport:
    """A TCP or TLS connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._first = b""
        self._closed = False

    def give_back(self, data: bytes) -> None:
        """Have the next `read` return these octets, which were read too far."""
        self._first = data

    async def read(self) -> bytes:
        """Return the next octets."""
        if self._first:
            data, self._first = self._first, b""
            return data
        try:
            return await self._reader.read(_READ)
        except OSError:
            return b""

    async def write(self, data: bytes) -> None:
        """Send all octets."""
        if self._writer.is_closing():
            raise PeerGoneError("the connection is closed")
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as e:
            raise PeerGoneError(str(e)) from e

    async def close(self) -> None:
        """Close the connection; what a client does not take in time is dropped."""
        if self._closed:
            return
        self._closed = True
        self._writer.close()
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await self._writer.wait_closed()
        except TimeoutError:
            self._writer.transport.abort()
        except OSError:
            pass

    async def hung_up(self) -> None:
        """Wait until the client has closed its end, read or not."""
        socket = self._writer.get_extra_info("socket")
        if socket is None or socket.fileno() < 0:
            return
        # The loop does not watch a connection that is not read; the kernel tells the end apart from data (epoll(7)).
        with select.epoll() as poll:
            poll.register(socket.fileno(), select.EPOLLRDHUP | select.EPOLLONESHOT)
            loop, ended = asyncio.get_running_loop(), asyncio.Event()
            loop.add_reader(poll.fileno(), ended.set)
            try:
                await ended.wait()
            finally:
                loop.remove_reader(poll.fileno())


async def watch(transport: HangsUp, gone: asyncio.Event) -> None:
    """Set `gone` when the client has hung up, and its octets have had the time to be read."""
    await transport.hung_up()
    await asyncio.sleep(HANG_UP_GRACE_S)
    gone.set()


class Budget:
    """What all inboxes of one session hold together."""

    def __init__(self) -> None:
        self._used = 0
        self._room = asyncio.Event()

    def add(self, octets: int) -> None:
        """Count octets in, or out when negative."""
        self._used += octets
        if self._used < SESSION_BYTES:
            self._room.set()
        else:
            self._room.clear()

    async def wait(self) -> None:
        """Wait until there is room."""
        if self._used >= SESSION_BYTES:
            await self._room.wait()


class Inbox:
    """Octets on their way from the connection's reader to the stream's consumer."""

    def __init__(self, budget: Budget | None = None) -> None:
        self._budget = budget or Budget()
        self._pieces: deque[bytes] = deque()
        self._size = 0
        self._ended = False
        self._reset = False
        self._discarding = False
        self._changed = asyncio.Condition()

    async def put(self, data: bytes, *, fin: bool = False) -> None:
        """Add octets, waiting while too many are there."""
        await self._budget.wait()
        async with self._changed:
            await self._changed.wait_for(lambda: self._size < INBOX_BYTES or self._discarding)
            if data and not self._discarding and not self._ended:
                self._pieces.append(data)
                self._size += len(data)
                self._budget.add(len(data))
            self._ended = self._ended or fin
            self._changed.notify_all()

    async def get(self) -> bytes:
        """Return the next octets, nothing at the end. Raises `PeerGoneError` when the stream was reset."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._pieces or self._ended or self._reset)
            if self._reset:
                raise PeerGoneError("the stream was reset")
            if not self._pieces:
                return b""
            data = self._pieces.popleft()
            self._size -= len(data)
            self._budget.add(-len(data))
            self._changed.notify_all()
            return data

    async def end(self, *, reset: bool = False) -> None:
        """Tell the consumer that no more comes; a reset before the end of file takes away even what is here."""
        async with self._changed:
            self._reset = self._reset or (reset and not self._ended)
            if self._reset:
                self._clear()
            self._ended = True
            self._changed.notify_all()

    async def discard(self) -> None:
        """Throw away what is here and what comes: nobody will take it."""
        async with self._changed:
            self._discarding = True
            self._clear()
            self._changed.notify_all()

    def _clear(self) -> None:
        self._pieces.clear()
        self._budget.add(-self._size)
        self._size = 0


class Stream(Protocol):
    """One stream of a session, both ways."""

    async def read(self) -> bytes:
        """Return the next octets, nothing at the client's end of file. Raises `PeerGoneError` when reset or lost."""
        ...

    async def write(self, data: bytes) -> None:
        """Send octets, waiting while the client takes none. Raises `PeerGoneError`."""
        ...

    async def close(self) -> None:
        """Say that no more is sent. Harmless when the stream or the connection has gone."""
        ...

    async def reset(self) -> None:
        """End both directions at once. Harmless when the stream or the connection has gone."""
        ...
