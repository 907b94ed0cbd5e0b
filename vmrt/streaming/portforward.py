"""Port-forward: pairs of streams, each pair one TCP connection to the pod's loopback.

Over SPDY the client makes an error and a data stream for each connection, with headers `streamtype`, `port` and
`requestid`; many pairs share the session. Over the older WebSocket protocol there is one pair for each port asked for.

The data stream's FIN is TCP's half-close, both ways. What fails is said as text on the error stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass, field

from vmrt.errors import VmrtError
from vmrt.streaming.spdy_session import SpdySession, SpdyStream
from vmrt.streaming.stream import PeerGoneError, Stream
from vmrt.streaming.targets import Dialled, Targets

log = logging.getLogger(__name__)

PAIR_TIMEOUT_S = 30.0


async def forward(targets: Targets, sandbox_id: str, port: int, data: Stream, error: Stream) -> None:
    """Serve one pair to its end."""
    opened = False
    try:
        async with targets.dial(sandbox_id, port) as connection:
            opened = True
            await _pump(connection, data)
    except VmrtError as e:
        if opened:
            # Reset by the other side, as TCP connections may be. Clients take any text on an error stream as a reason
            # to end all the forwarding: only a connection that could not be made has one.
            log.debug("port-forward to port %d: %s", port, e)
            await data.reset()
            await error.close()
            return
        log.info("port-forward to port %d: %s", port, e)
        with contextlib.suppress(PeerGoneError):
            await error.write(f"forwarding port {port}: {e}".encode())
        await error.close()
        await data.reset()
        return
    except PeerGoneError:
        await data.reset()
    await data.close()
    await error.close()


async def _pump(connection: Dialled, data: Stream) -> None:
    async def inward() -> None:
        while octets := await data.read():
            await connection.write(octets)
        await connection.write_eof()

    async def outward() -> None:
        while octets := await connection.read():
            await data.write(octets)
        await data.close()

    tasks = [asyncio.create_task(work()) for work in (inward, outward)]
    try:
        # The first failure ends both; an end of file ends its own direction only.
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


@dataclass(slots=True)
class _Pair:
    """A connection whose streams come one by one."""

    port: int
    streams: dict[str, SpdyStream] = field(default_factory=dict)
    timer: asyncio.TimerHandle | None = None


class SpdyPortForward:
    """The pairs of one SPDY session."""

    def __init__(self, targets: Targets, sandbox_id: str, session: SpdySession) -> None:
        self._targets = targets
        self._sandbox_id = sandbox_id
        self._session = session
        self._pairs: dict[str, _Pair] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, stopping: asyncio.Event) -> None:
        """Serve until the client or the daemon ends. Never raises but for cancellation."""
        accepting = asyncio.create_task(self._accept())
        ends = [asyncio.create_task(event.wait()) for event in (self._session.gone, stopping)]
        try:
            await asyncio.wait([accepting, *ends], return_when=asyncio.FIRST_COMPLETED)
        finally:
            tasks = [accepting, *ends, *self._tasks]
            for pair in self._pairs.values():
                if pair.timer is not None:
                    pair.timer.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _accept(self) -> None:
        with contextlib.suppress(PeerGoneError):
            while True:
                await self._pair(await self._session.accept())

    async def _pair(self, stream: SpdyStream) -> None:
        kind = stream.headers.get("streamtype", "")
        port = _port(stream.headers.get("port", ""))
        if port is None or kind not in ("data", "error"):
            log.info("port-forward: a stream of type %.20r for port %.20r", kind, stream.headers.get("port", ""))
            await stream.reset()
            return
        # Very old clients send no request id; their error stream is the one made just before the data stream.
        key = stream.headers.get("requestid") or f"#{stream.id if kind == 'error' else stream.id - 2}"
        pair = self._pairs.get(key)
        if pair is not None and (kind in pair.streams or pair.port != port):
            await stream.reset()
            return
        if pair is None:
            pair = self._pairs[key] = _Pair(port)
            pair.timer = asyncio.get_running_loop().call_later(PAIR_TIMEOUT_S, self._expired, key, pair)
        pair.streams[kind] = stream
        await self._session.reply(stream)
        if len(pair.streams) == 2:
            if pair.timer is not None:
                pair.timer.cancel()
            self._start(self._forward(key, pair))

    async def _forward(self, key: str, pair: _Pair) -> None:
        data, error = pair.streams["data"], pair.streams["error"]
        try:
            await forward(self._targets, self._sandbox_id, pair.port, data, error)
        finally:
            self._pairs.pop(key, None)
            await error.inbox.discard()
            await data.inbox.discard()
            self._session.forget(data, error)

    def _expired(self, key: str, pair: _Pair) -> None:
        self._pairs.pop(key, None)
        self._start(self._give_up(pair))

    async def _give_up(self, pair: _Pair) -> None:
        if (error := pair.streams.get("error")) is not None:
            with contextlib.suppress(PeerGoneError):
                await error.write(f"the data stream of this request did not come within {PAIR_TIMEOUT_S:g} s".encode())
            await error.close()
        for stream in pair.streams.values():
            await stream.reset()

    def _start(self, work: asyncio._CoroutineLike[None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _port(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 5 and 0 < int(text) < 65536 else None
