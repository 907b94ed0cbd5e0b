"""The command line's end of the streaming server: sessions over WebSocket v5, port-forward over SPDY/3.1.

Rules: stdin is read by a thread, for files, pipes and terminals alike, and waits while the daemon takes nothing; the
terminal is put back however a session ends; Ctrl-C in raw mode belongs to the program in the container.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import ssl
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import h11
import wsproto
from wsproto import events
from wsproto.utilities import RemoteProtocolError

from vmrt.errors import UnavailableError, VmrtError
from vmrt.streaming import spdy
from vmrt.streaming.spdy_session import SpdySession
from vmrt.streaming.stream import PeerGoneError, SocketTransport
from vmrt.streaming.websocket import ERROR, RESIZE, STDERR, STDIN, STDOUT, V5, WebSocket

_READ = 32768
_CONNECT_TIMEOUT_S = 30.0


class Detached(Exception):
    """The person has typed the detach keys."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What of our own stdio takes part. `detach_keys` "" means there are none."""

    stdin: bool
    tty: bool
    detach_keys: bytes = b""


async def _connected(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    parts = urlsplit(url)
    tls = ssl.create_default_context() if parts.scheme == "https" else None
    try:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            return await asyncio.open_connection(parts.hostname, parts.port, ssl=tls)
    except (OSError, TimeoutError) as e:
        raise UnavailableError(
            f"cannot connect: {e}", phase="stream", resource=f"{parts.scheme}://{parts.netloc}",
            hint="this has to run on the daemon's machine, and to trust its certificate where it has one",
        ) from e  # fmt: skip


def _refused(status: int, body: bytes = b"") -> UnavailableError:
    return UnavailableError(
        f"the daemon's streaming server answered {status}: {body.decode(errors='replace').strip()}", phase="stream"
    )


@contextlib.asynccontextmanager
async def websocket(url: str) -> AsyncIterator[WebSocket]:
    """Open a v5 session. Raises `VmrtError`."""
    reader, writer = await _connected(url)
    transport = SocketTransport(reader, writer)
    connection = wsproto.WSConnection(wsproto.ConnectionType.CLIENT)
    parts = urlsplit(url)
    try:
        await transport.write(connection.send(events.Request(host=parts.netloc, target=parts.path, subprotocols=[V5])))
        while (answer := next(iter(connection.events()), None)) is None:
            if not (data := await transport.read()):
                raise UnavailableError("the daemon closed the connection", phase="stream")
            connection.receive_data(data)
        if isinstance(answer, events.RejectConnection):
            raise _refused(answer.status_code)
        yield WebSocket(transport, connection)
    except (PeerGoneError, RemoteProtocolError) as e:
        raise UnavailableError(f"the connection ended: {e}", phase="stream") from e
    finally:
        await transport.close()


@contextlib.asynccontextmanager
async def spdy_session(url: str, protocol: str) -> AsyncIterator[SpdySession]:
    """Open a SPDY/3.1 session as a client. Raises `VmrtError`."""
    reader, writer = await _connected(url)
    transport = SocketTransport(reader, writer)
    parts = urlsplit(url)
    http = h11.Connection(h11.CLIENT)
    headers = [("Host", parts.netloc), ("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1")]
    request = h11.Request(method="POST", target=parts.path, headers=[*headers, ("X-Stream-Protocol-Version", protocol)])
    reading = None
    try:
        await transport.write((http.send(request) or b"") + (http.send(h11.EndOfMessage()) or b""))
        while (answer := http.next_event()) is h11.NEED_DATA:
            http.receive_data(await transport.read())
        if not isinstance(answer, h11.InformationalResponse) or answer.status_code != 101:
            raise _refused(getattr(answer, "status_code", 0))
        transport.give_back(http.trailing_data[0])
        session = SpdySession(transport, spdy.Connection(client=True))
        reading = asyncio.create_task(session.run())
        yield session
    except (PeerGoneError, h11.ProtocolError) as e:
        raise UnavailableError(f"the connection ended: {e}", phase="stream") from e
    finally:
        if reading is not None:
            reading.cancel()
            await asyncio.wait([reading])
        await transport.close()


# --- exec and attach --------------------------------------------------------------------------------------------------


def process(url: str, wanted: Wanted) -> int:
    """Join a session's streams to ours; return the exit code. Raises `VmrtError` and `Detached`."""
    with _raw_terminal() if wanted.tty and wanted.stdin else contextlib.nullcontext():
        return asyncio.run(_process(url, wanted))


async def _process(url: str, wanted: Wanted) -> int:
    loop = asyncio.get_running_loop()
    async with websocket(url) as socket:
        work = asyncio.create_task(_output(socket))
        detached = asyncio.Event()
        if wanted.stdin:
            threading.Thread(target=_read_stdin, args=(loop, socket, wanted, detached), daemon=True).start()
        if wanted.tty:
            resized = asyncio.Event()
            resized.set()
            loop.add_signal_handler(signal.SIGWINCH, resized.set)
            sizes = asyncio.create_task(_sizes(socket, resized))
        leaving = asyncio.create_task(detached.wait())
        try:
            await asyncio.wait([work, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise Detached
            return exit_code(work.result())
        finally:
            for task in [work, leaving, *([sizes] if wanted.tty else [])]:
                task.cancel()
            await socket.close()


async def _output(socket: WebSocket) -> bytes:
    """Write what comes to our stdout and stderr; return the status at the end."""
    loop = asyncio.get_running_loop()
    status = bytearray()
    channel: int | None = None
    async for piece, last in socket.messages():
        data = piece if isinstance(piece, bytes) else piece.encode()
        if channel is None and data:
            channel, data = data[0], data[1:]
        if channel == ERROR:
            status += data
        elif data and channel in (STDOUT, STDERR):
            await loop.run_in_executor(None, _write_all, 1 if channel == STDOUT else 2, data)
        if last:
            channel = None
    return bytes(status)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


async def _sizes(socket: WebSocket, resized: asyncio.Event) -> None:
    with contextlib.suppress(PeerGoneError):
        while True:
            await resized.wait()
            resized.clear()
            with contextlib.suppress(OSError):
                size = os.get_terminal_size(sys.stdout.fileno())
                text = json.dumps({"Width": size.columns, "Height": size.lines})
                await socket.send(bytes([RESIZE]) + text.encode())


def _read_stdin(loop: asyncio.AbstractEventLoop, socket: WebSocket, wanted: Wanted, detached: asyncio.Event) -> None:
    keys = DetachKeys(wanted.detach_keys)
    try:
        while not keys.typed:
            data = os.read(0, _READ)
            message = bytes([STDIN]) + keys.feed(data) if data else bytes([255, STDIN])
            if len(message) > 1:
                asyncio.run_coroutine_threadsafe(socket.send(message), loop).result()
            if not data:
                return
        loop.call_soon_threadsafe(detached.set)
    except (OSError, RuntimeError, PeerGoneError):
        pass  # the session has ended first
    except BaseException as e:
        if not isinstance(e, asyncio.CancelledError) and type(e).__name__ != "CancelledError":
            raise


class DetachKeys:
    """Finds a key sequence in what is typed; it is held back while it may be one, and handed on when it is not."""

    def __init__(self, sequence: bytes) -> None:
        self._sequence = sequence
        self._held = b""
        self.typed = False

    def feed(self, data: bytes) -> bytes:
        """Return what is to be sent."""
        if not self._sequence:
            return data
        data = self._held + data
        at = data.find(self._sequence)
        if at >= 0:
            self.typed = True
            return data[:at]
        keep = next(n for n in range(len(self._sequence) - 1, -1, -1) if data.endswith(self._sequence[:n]))
        self._held = data[len(data) - keep :]
        return data[: len(data) - keep]


def detach_sequence(text: str) -> bytes:
    """Return the octets of "ctrl-p,ctrl-q" or "ctrl-],x"; "" is none. Raises `ValueError`."""
    octets = bytearray()
    for key in text.split(",") if text else []:
        if len(key) == 1 and " " <= key <= "~":
            octets += key.encode()
        elif key.startswith("ctrl-") and len(key) == 6 and "@" <= key[5].upper() <= "_":
            octets.append(ord(key[5].upper()) - 64)
        else:
            raise ValueError(key)
    return bytes(octets)


def exit_code(status: bytes) -> int:
    """Return the exit code that a metav1.Status tells. Raises `VmrtError` for any other failure."""
    try:
        parsed: dict[str, Any] = json.loads(status)
        if parsed.get("status") == "Success":
            return 0
        causes: Sequence[dict[str, str]] = parsed.get("details", {}).get("causes", [])
        for cause in causes:
            if cause.get("reason") == "ExitCode":
                return int(cause["message"])
        text = causes[0]["message"] if causes else parsed.get("message", "")
    except (ValueError, AttributeError, KeyError, TypeError, IndexError) as e:
        raise UnavailableError("the session ended without a status", phase="stream") from e
    raise VmrtError(text)


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    import termios
    import tty

    before = termios.tcgetattr(0)
    tty.setraw(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


# --- port-forward -----------------------------------------------------------------------------------------------------


async def forward_ports(url: str, address: str, ports: Sequence[tuple[int, int]], told: Any) -> None:
    """Listen on (local, remote) pairs of ports, local 0 for any, until the daemon's end. Raises `VmrtError`.

    `told` is called with a line for each port and for each connection that fails.
    """
    async with contextlib.AsyncExitStack() as stack:
        session = await stack.enter_async_context(spdy_session(url, "portforward.k8s.io"))
        numbers = iter(range(1 << 62))

        def serve(remote: int) -> Any:
            async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                transport = SocketTransport(reader, writer)
                try:
                    if text := await _forward(session, remote, next(numbers), transport, writer):
                        told(text)
                except PeerGoneError:
                    pass
                finally:
                    await transport.close()

            return connected

        for local, remote in ports:
            try:
                server = await asyncio.start_server(serve(remote), address, local)
            except OSError as e:
                raise UnavailableError(
                    f"cannot listen: {e.strerror or e}", phase="port-forward", resource=f"{address} port {local}"
                ) from e
            stack.callback(server.close)
            told(f"{address}:{server.sockets[0].getsockname()[1]} -> {remote}")
        await session.gone.wait()
    raise UnavailableError("the daemon has ended the connection", phase="port-forward")


async def _forward(
    session: SpdySession, port: int, number: int, transport: SocketTransport, writer: asyncio.StreamWriter
) -> str:
    headers = [("port", str(port)), ("requestid", str(number))]
    error = await session.open([("streamtype", "error"), *headers])
    await error.close()
    data = await session.open([("streamtype", "data"), *headers])

    async def outward() -> None:
        while octets := await transport.read():
            await data.write(octets)
        await data.close()

    sending = asyncio.create_task(outward())
    try:
        with contextlib.suppress(PeerGoneError):
            while octets := await data.read():
                await transport.write(octets)
            if writer.can_write_eof():
                writer.write_eof()
            await asyncio.wait([sending])
        text = b""
        with contextlib.suppress(PeerGoneError):
            while piece := await error.read():
                text += piece
        return text.decode(errors="replace")
    finally:
        sending.cancel()
        await asyncio.wait([sending])
        await data.reset()
        session.forget(data, error)
