"""A process's streams over SPDY/3.1, for streaming servers that do not speak WebSocket v5: those of other runtimes.

The messages are those of a v5 WebSocket, so that a session need not know what carries it: one octet, the channel, and
its octets; 255 and a channel for its end. The protocol is v4.channel.k8s.io: a stream for each channel, named by the
header "streamtype"; the status comes on the error stream as JSON.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping

from vmrt.streaming.spdy_session import SpdySession, SpdyStream
from vmrt.streaming.stream import PeerGoneError
from vmrt.streaming.websocket import ERROR, RESIZE, STDERR, STDIN, STDOUT

V4 = "v4.channel.k8s.io"
_NAMES: Mapping[int, str] = {STDIN: "stdin", STDOUT: "stdout", STDERR: "stderr", ERROR: "error", RESIZE: "resize"}
_CLOSE = 255
_WAITING = 16


class SpdyProcess:
    """An open session; `streams` by channel."""

    def __init__(self, streams: Mapping[int, SpdyStream]) -> None:
        self._streams = dict(streams)

    async def messages(self) -> AsyncIterator[tuple[bytes | str, bool]]:
        """Yield (channel and octets, True) until all that the process says has come, the status last."""
        waiting: asyncio.Queue[bytes | None] = asyncio.Queue(_WAITING)
        outputs = [channel for channel in (STDOUT, STDERR) if channel in self._streams]

        async def read(channel: int) -> None:
            try:
                while data := await self._streams[channel].read():
                    await waiting.put(bytes([channel]) + data)
            except PeerGoneError:
                pass  # reset, or the connection is gone: there is no more
            await waiting.put(None)

        readers = [asyncio.create_task(read(channel)) for channel in outputs]
        try:
            open_ends = len(readers)
            while open_ends:
                message = await waiting.get()
                if message is None:
                    open_ends -= 1
                else:
                    yield message, True
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)
        try:
            while data := await self._streams[ERROR].read():
                yield bytes([ERROR]) + data, True
        except PeerGoneError:
            return

    async def send(self, data: bytes | str) -> None:
        """Send what a v5 WebSocket would; what is for a stream that the session lacks is nobody's. `PeerGoneError`."""
        message = data.encode() if isinstance(data, str) else data
        if message[0] == _CLOSE:
            if (stream := self._streams.get(message[1])) is not None:
                await stream.close()
        elif (stream := self._streams.get(message[0])) is not None:
            await stream.write(message[1:])

    async def close(self, code: int = 0, reason: str = "") -> None:
        """Leave: the connection goes with the session, and with it all streams."""


async def opened(session: SpdySession, *, stdin: bool, stdout: bool, stderr: bool, tty: bool) -> SpdyProcess:
    """Make the streams that an ExecRequest or AttachRequest with these fields has. Raises `PeerGoneError`."""
    wanted = {ERROR: True, STDIN: stdin, STDOUT: stdout, STDERR: stderr, RESIZE: tty}
    channels = [channel for channel, is_there in wanted.items() if is_there]
    return SpdyProcess(
        {channel: await session.open([("streamtype", _NAMES[channel])], lasting=True) for channel in channels}
    )
