"""The command line's end of the streaming server: processes over WebSocket v5, else SPDY/3.1; port-forward over SPDY.

Rules: stdin is read by a thread, for files, pipes and terminals alike, and waits while the daemon takes nothing; the
terminal is put back however a session ends, by a signal, too; Ctrl-C in raw mode belongs to the container's program.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from vmrt.cli import spdy_process
from vmrt.cli.connections import NotSpokenError, Tls, spdy_session, websocket
from vmrt.errors import UnavailableError, VmrtError
from vmrt.streaming.spdy_session import SpdySession
from vmrt.streaming.stream import PeerGoneError, SocketTransport
from vmrt.streaming.websocket import DETACHED, ERROR, RESIZE, STDERR, STDIN, STDOUT

_READ = 32768
_DETACH_TIMEOUT_S = 10.0
_CHECKPOINT_INTERVAL_S = 0.1
_COLLECTED_BYTES = 64 * 1024


class Detached(Exception):
    """The person has typed the detach keys."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What of our own stdio takes part, by descriptor. `detach_keys` b"" means there are none.

    Where `collected` is given, stderr goes there, cut at 64 KiB.
    """

    stdin: bool
    tty: bool
    detach_keys: bytes = b""
    stdin_fd: int = 0
    stdout_fd: int = 1
    stderr_fd: int = 2
    collected: bytearray | None = None


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Hooks:
    """What a session calls while it runs.

    `opened`, on a thread of its own, once the process's streams are there; `checkpoint` ten times a second. What one of
    them raises ends the session.
    """

    opened: Callable[[], None] = _nothing
    checkpoint: Callable[[], None] = _nothing


# --- exec and attach --------------------------------------------------------------------------------------------------


class Channels(Protocol):
    """What carries a session: a v5 WebSocket, or what speaks like one."""

    def messages(self) -> AsyncIterator[tuple[bytes | str, bool]]:
        """Yield (piece of a message, whether it is the last one) until the session ends."""
        ...

    async def send(self, data: bytes | str) -> None:
        """Send one message. Raises `PeerGoneError`."""
        ...

    async def close(self, code: int = ..., reason: str = ...) -> None:
        """End the session."""
        ...


def process(
    url: str,
    wanted: Wanted,
    tls: Tls | None = None,
    hooks: Hooks | None = None,
    again: Callable[[], str] | None = None,
) -> int:
    """Join a session's streams to ours; return the exit code. Raises `VmrtError`, `Detached` and what hooks raise.

    `again` returns another URL of the same session, to be used over SPDY where the server does not speak WebSocket v5:
    a delegate's may not.
    """
    tls, hooks = tls or Tls(), hooks or Hooks()
    with _raw_terminal(wanted.stdin_fd) if wanted.tty and wanted.stdin else contextlib.nullcontext():
        try:
            return asyncio.run(run_process(url, wanted, tls, hooks))
        except NotSpokenError:
            if again is None:
                raise
            return asyncio.run(run_process(again(), wanted, tls, hooks, over_spdy=True))


@contextlib.asynccontextmanager
async def _over_spdy(url: str, wanted: Wanted, tls: Tls) -> AsyncIterator[Channels]:
    async with spdy_session(url, spdy_process.V4, tls) as session:
        yield await spdy_process.opened(
            session, stdin=wanted.stdin, stdout=wanted.stdout_fd >= 0, stderr=not wanted.tty, tty=wanted.tty
        )


@dataclass(slots=True)
class _Session:
    """One session's tasks and what they tell each other."""

    socket: Channels
    wanted: Wanted
    hooks: Hooks
    opened: asyncio.Event = field(default_factory=asyncio.Event)
    detached: asyncio.Event = field(default_factory=asyncio.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    silent: bool = False

    async def output(self) -> bytes:
        """Write what comes to our stdout and stderr; return the status at the end."""
        loop = asyncio.get_running_loop()
        status = bytearray()
        channel: int | None = None
        async for piece, last in self.socket.messages():
            data = piece if isinstance(piece, bytes) else piece.encode()
            if channel is None and data:
                channel, data = data[0], data[1:]
            if channel != ERROR:
                self.opened.set()
            if channel == ERROR:
                status += data
            elif channel == STDERR and self.wanted.collected is not None:
                self.wanted.collected.extend(data[: max(0, _COLLECTED_BYTES - len(self.wanted.collected))])
            elif data and channel in (STDOUT, STDERR) and not self.silent:
                fd = self.wanted.stdout_fd if channel == STDOUT else self.wanted.stderr_fd
                await loop.run_in_executor(None, _write_all, fd, data)
            if last:
                channel = None
        return bytes(status)

    async def open(self) -> None:
        """Call the hook once there is a process, and never come back."""
        await self.opened.wait()
        await asyncio.get_running_loop().run_in_executor(None, self.hooks.opened)
        await asyncio.Event().wait()

    async def watch(self) -> None:
        """Call the checkpoint for ever."""
        while True:
            self.hooks.checkpoint()
            await asyncio.sleep(_CHECKPOINT_INTERVAL_S)

    async def sizes(self) -> None:
        """Send our terminal's size, now and whenever it changes."""
        resized = asyncio.Event()
        resized.set()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGWINCH, resized.set)
        try:
            while True:
                await resized.wait()
                resized.clear()
                with contextlib.suppress(OSError):
                    size = os.get_terminal_size(self.wanted.stdout_fd)
                    text = json.dumps({"Width": size.columns, "Height": size.lines})
                    await self.socket.send(bytes([RESIZE]) + text.encode())
        except PeerGoneError:
            await asyncio.Event().wait()
        finally:
            loop.remove_signal_handler(signal.SIGWINCH)

    def read_stdin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Send our stdin to its end: the work of a thread."""
        keys = DetachKeys(self.wanted.detach_keys)
        try:
            while not keys.typed:
                data = os.read(self.wanted.stdin_fd, _READ)
                message = bytes([STDIN]) + keys.feed(data) if data else bytes([255, STDIN])
                if len(message) > 1:
                    self._send(loop, message)
                if not data:
                    return
            loop.call_soon_threadsafe(self.detached.set)
        except (OSError, RuntimeError, PeerGoneError, concurrent.futures.CancelledError):
            pass  # the session has ended first

    def _send(self, loop: asyncio.AbstractEventLoop, message: bytes) -> None:
        if self.ended.is_set():
            raise PeerGoneError("the session has ended")
        sending = self.socket.send(message)
        try:
            future = asyncio.run_coroutine_threadsafe(sending, loop)
        except RuntimeError:
            sending.close()
            raise
        while True:
            # The loop may end between our look and its taking of the message.
            with contextlib.suppress(concurrent.futures.TimeoutError):
                return future.result(_CHECKPOINT_INTERVAL_S)
            if self.ended.is_set():
                raise PeerGoneError("the session has ended")

    async def detach(self, work: asyncio.Task[bytes]) -> None:
        """Leave, and wait until the daemon has seen that it is no failure."""
        self.silent = True
        await self.socket.close(DETACHED, "detached")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DETACH_TIMEOUT_S):
                await asyncio.wait([work])


async def run_process(url: str, wanted: Wanted, tls: Tls, hooks: Hooks, *, over_spdy: bool = False) -> int:
    """Do what `process` does, but for the terminal's mode."""
    loop = asyncio.get_running_loop()
    async with _over_spdy(url, wanted, tls) if over_spdy else websocket(url, tls) as socket:
        session = _Session(socket, wanted, hooks)
        work = asyncio.create_task(session.output())
        leaving = asyncio.create_task(session.detached.wait())
        beside: list[asyncio.Task[None]] = [
            asyncio.create_task(session.open()),
            asyncio.create_task(session.watch()),
            *([asyncio.create_task(session.sizes())] if wanted.tty else []),
        ]
        if wanted.stdin:
            threading.Thread(target=session.read_stdin, args=(loop,), daemon=True).start()
        try:
            await asyncio.wait([work, leaving, *beside], return_when=asyncio.FIRST_COMPLETED)
            for task in beside:
                if task.done():
                    task.result()  # has failed: none of them ends otherwise
            if not work.done():
                await session.detach(work)
                raise Detached
            return exit_code(work.result())
        finally:
            session.ended.set()
            for each in (work, leaving, *beside):
                each.cancel()
            await asyncio.wait([work, leaving, *beside])
            await socket.close()


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


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
def _raw_terminal(fd: int) -> Iterator[None]:
    import termios
    import tty

    before = termios.tcgetattr(fd)
    tty.setraw(fd, termios.TCSADRAIN)  # what is typed ahead is kept
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


# --- port-forward -----------------------------------------------------------------------------------------------------


async def forward_ports(
    url: str, address: str, ports: Sequence[tuple[int, int]], told: Callable[[str], object], tls: Tls | None = None
) -> None:
    """Listen on (local, remote) pairs of ports, local 0 for any, until the daemon's end. Raises `VmrtError`.

    `told` is called with a line for each port and for each connection that fails.
    """
    async with contextlib.AsyncExitStack() as stack:
        session = await stack.enter_async_context(spdy_session(url, "portforward.k8s.io", tls or Tls()))
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
