"""SPDY sessions: framing, a transport, and streams between them."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from vmrt.streaming import spdy
from vmrt.streaming.stream import Budget, Inbox, PeerGoneError, Transport, watch

log = logging.getLogger(__name__)

_OPENED_BOUND = 256


class SpdyStream:
    """One stream; `headers` are those that it was made with, names in lower case.

    What has come of a `lasting` one stays readable when the peer resets it: Go's servers end whole sessions so.
    """

    def __init__(self, session: SpdySession, stream_id: int, headers: spdy.Headers, *, lasting: bool = False) -> None:
        self.id = stream_id
        self.headers = dict(headers)
        self.inbox = Inbox(session.budget)
        self.lasting = lasting
        self._session = session

    async def read(self) -> bytes:
        """Return the next octets."""
        return await self.inbox.get()

    async def write(self, data: bytes) -> None:
        """Send octets."""
        if data:
            await self._session.send(self.id, data)

    async def close(self) -> None:
        """Send FIN."""
        with contextlib.suppress(PeerGoneError):
            await self._session.send(self.id, b"", fin=True)

    async def reset(self) -> None:
        """Send RST_STREAM."""
        await self.inbox.discard()
        with contextlib.suppress(PeerGoneError):
            await self._session.reset(self.id)


class SpdySession:
    """One connection. `run` reads it to its end; `gone` is set then."""

    def __init__(self, transport: Transport, connection: spdy.Connection | None = None) -> None:
        self._transport = transport
        self._connection = connection or spdy.Connection()
        self._streams: dict[int, SpdyStream] = {}
        self._opened: asyncio.Queue[SpdyStream] = asyncio.Queue(_OPENED_BOUND)
        self.gone = asyncio.Event()
        self.budget = Budget()

    async def run(self) -> None:
        """Serve what the client sends until its end. Never raises but for cancellation."""
        watching = asyncio.create_task(watch(self._transport, self.gone))
        try:
            while data := await self._transport.read():
                for event in self._connection.receive(data):
                    await self._flush()
                    await self._handle(event)
                await self._flush()
        except PeerGoneError:
            pass
        except spdy.ProtocolError as e:
            log.info("SPDY: the client broke the protocol: %s", e)
            self._connection.go_away(1)
            with contextlib.suppress(PeerGoneError):
                await self._flush()
        finally:
            watching.cancel()
            self.gone.set()
            for stream in self._streams.values():
                await stream.inbox.end(reset=not stream.lasting)

    async def _handle(self, event: spdy.Event) -> None:
        if isinstance(event, spdy.StreamOpened):
            if self._opened.full():
                # Nobody accepts them; waiting would keep the client's end from being seen.
                self._connection.reset(event.stream_id, spdy.Reset.REFUSED_STREAM)
                return
            stream = SpdyStream(self, event.stream_id, event.headers)
            self._streams[stream.id] = stream
            if event.fin:
                await stream.inbox.end()
            self._opened.put_nowait(stream)
        elif isinstance(event, spdy.DataReceived | spdy.StreamReplied):
            if (found := self._streams.get(event.stream_id)) is not None:
                data = event.data if isinstance(event, spdy.DataReceived) else b""
                await found.inbox.put(data, fin=event.fin)
        elif isinstance(event, spdy.StreamReset) and (found := self._streams.pop(event.stream_id, None)) is not None:
            await found.inbox.end(reset=not found.lasting)

    async def accept(self) -> SpdyStream:
        """Wait for a stream that the client makes; it is to be answered by `reply` or `reset`."""
        return await self._opened.get()

    async def reply(self, stream: SpdyStream) -> None:
        """Accept a stream. Raises `PeerGoneError`."""
        self._connection.reply(stream.id)
        await self._flush()

    async def open(self, headers: spdy.Headers, *, lasting: bool = False) -> SpdyStream:
        """Make a stream, as a client. Raises `PeerGoneError`."""
        stream = SpdyStream(self, self._connection.open(headers), headers, lasting=lasting)
        self._streams[stream.id] = stream
        await self._flush()
        return stream

    async def send(self, stream_id: int, data: bytes, *, fin: bool = False) -> None:
        """Send data on a stream. Raises `PeerGoneError`."""
        if self.gone.is_set() or not self._connection.send(stream_id, data, fin=fin):
            raise PeerGoneError("the stream is closed")
        await self._flush()

    async def reset(self, stream_id: int) -> None:
        """Reset a stream. Raises `PeerGoneError`."""
        self._streams.pop(stream_id, None)
        self._connection.reset(stream_id)
        await self._flush()

    def forget(self, *streams: SpdyStream) -> None:
        """Drop streams that are done on both sides."""
        for stream in streams:
            self._streams.pop(stream.id, None)

    async def finish(self, linger_s: float) -> None:
        """End the session: what is sent has arrived when the client closes, which it is given `linger_s` for.

        Closing first, with data of the client's unread, would make the kernel reset the connection and throw away
        what the client has not read yet.
        """
        for stream in list(self._streams.values()):
            await stream.inbox.discard()
        with contextlib.suppress(PeerGoneError):
            for stream in list(self._streams.values()):
                # A reset behind our FIN could make a client throw away what it has not read.
                if self._connection.sending(stream.id):
                    self._connection.reset(stream.id)
            self._connection.go_away()
            await self._flush()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(linger_s):
                await self.gone.wait()

    async def _flush(self) -> None:
        if data := self._connection.take():
            await self._transport.write(data)
