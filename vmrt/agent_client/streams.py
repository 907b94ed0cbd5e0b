"""Stream connections to an agent: the framed connection and the sessions over it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Protocol, Self, TypeVar

from google.protobuf.message import Message

from vmrt import errors
from vmrt.agent import agent_pb2 as pb
from vmrt.agent import frames, layout
from vmrt.agent_client.calls import printable, translate

M = TypeVar("M", bound=Message)

# Opening a stream runs crun in a guest that may be busy.
OPEN_TIMEOUT_S = 60.0
_READ = 256 * 1024
# At most 64 KiB each.
_STASH_FRAMES = 8


class Stream:
    """One stream connection after its hello."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, phase: str, resource: str) -> None:
        self.reader = reader
        self.writer = writer
        self._phase = phase
        self._resource = resource
        self._decoder = frames.Decoder(frames.FROM_GUEST)
        self._frames: deque[frames.Frame] = deque()
        # Who writes stdin reads too while it waits; what it reads for others is stashed.
        self._reading = asyncio.Lock()
        self._stash: deque[frames.Frame] = deque()
        self._ended = False
        self._changed = asyncio.Event()
        # Octets of stdin that the agent still holds (agent.proto, StreamHello.stdin_acks).
        self._unacknowledged = 0

    async def open(self, hello: pb.StreamHello) -> None:
        """Send the hello and take the reply."""
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                await self.send(frames.encode(pb.HELLO, hello.SerializeToString()))
                kind, length = frames.HEADER.unpack(await self.reader.readexactly(frames.HEADER.size))
                if kind != pb.REPLY or length > layout.MAX_FRAME_BYTES:
                    raise self.broken(f"answered the hello with a frame of type {kind} and {length} octets")
                reply = self.parse(frames.Frame(kind, await self.reader.readexactly(length)), pb.StreamReply)
        except TimeoutError as e:
            raise errors.DeadlineError(
                f"the agent did not open the stream within {OPEN_TIMEOUT_S:g} s",
                phase=self._phase,
                resource=self._resource,
            ) from e
        except (OSError, asyncio.IncompleteReadError) as e:
            raise self.unavailable("the connection ended before the agent answered") from e
        if reply.code:
            raise translate(reply.code, reply.message, self._phase, self._resource)

    async def next(self) -> frames.Frame | None:
        """Return the next frame that is no STDIN_ACK, None when the agent has closed the connection between two."""
        try:
            while not self._stash and not self._ended:
                async with self._reading:
                    if not self._stash and not self._ended:
                        await self._read_one()
            return self._stash.popleft() if self._stash else None
        finally:
            self._changed.set()

    async def send_stdin(self, data: bytes) -> None:
        """Send octets of stdin, waiting while the agent holds too many."""
        for at in range(0, len(data), layout.STDIN_PIECE):
            piece = data[at : at + layout.STDIN_PIECE]
            while self._unacknowledged + len(piece) > layout.STDIN_WINDOW:
                await self._wait_for_ack()
            self._unacknowledged += len(piece)
            await self.send(frames.encode(pb.STDIN, piece))

    async def _wait_for_ack(self) -> None:
        """Let one more frame arrive: read it here where nobody else does, for acknowledgements are among the rest."""
        if self._ended:
            raise self.unavailable("the connection ended")
        self._changed.clear()
        if self._reading.locked() or len(self._stash) >= _STASH_FRAMES:
            await self._changed.wait()
            return
        async with self._reading:
            await self._read_one()

    async def _read_one(self) -> None:
        """Take one frame: a STDIN_ACK into the window, any other into the stash."""
        frame = await self._receive()
        if frame is None:
            self._ended = True
        elif frame.type != pb.STDIN_ACK:
            self._stash.append(frame)
        else:
            try:
                octets = frames.acknowledged(frame)
            except frames.FrameError as e:
                raise self.broken(str(e)) from e
            if octets > self._unacknowledged:
                raise self.broken(f"acknowledged {octets} octets of {self._unacknowledged}")
            self._unacknowledged -= octets
        self._changed.set()

    async def _receive(self) -> frames.Frame | None:
        while not self._frames:
            try:
                data = await self.reader.read(_READ)
            except OSError as e:
                raise self.unavailable(f"the connection broke: {e}") from e
            if not data:
                if not self._decoder.idle:
                    raise self.unavailable("the connection ended within a frame")
                return None
            try:
                self._frames.extend(self._decoder.feed(data))
            except frames.FrameError as e:
                raise self.broken(str(e)) from e
        return self._frames.popleft()

    def parse(self, frame: frames.Frame, message: type[M]) -> M:
        """Return a frame's message."""
        try:
            return frame.parse(message)
        except frames.FrameError as e:
            raise self.broken(str(e)) from e

    async def send(self, data: bytes) -> None:
        """Send octets, waiting while the guest takes none."""
        try:
            self.writer.write(data)
            await self.writer.drain()
        except OSError as e:
            raise self.unavailable(f"the connection broke: {e}") from e

    def broken(self, what: str) -> errors.AgentError:
        """Return the error for a guest that breaks the protocol."""
        return errors.AgentError(
            f"the agent broke the protocol: {printable(what)}", phase=self._phase, resource=self._resource
        )

    def unavailable(self, what: str) -> errors.UnavailableError:
        """Return the error for a connection that ended."""
        return errors.UnavailableError(what, phase=self._phase, resource=self._resource)

    def close(self) -> None:
        """Close the connection."""
        self._ended = True
        self._changed.set()
        self.writer.close()


class Opener(Protocol):
    """What a session needs of the client."""

    async def open_stream(self, hello: pb.StreamHello, phase: str) -> Stream:
        """Open a stream."""
        ...

    def forget(self, stream: Stream) -> None:
        """Say that a stream is closed by its owner."""
        ...


class _Opened:
    """What sessions have in common: opened by `async with`, closed at its end, whatever happened."""

    def __init__(self, client: Opener, hello: pb.StreamHello, phase: str) -> None:
        self._client = client
        self._hello = hello
        self._phase = phase
        self._open_stream: Stream | None = None

    @property
    def _stream(self) -> Stream:
        if self._open_stream is None:
            raise RuntimeError("the stream is opened by `async with`")
        return self._open_stream

    async def __aenter__(self) -> Self:
        self._open_stream = await self._client.open_stream(self._hello, self._phase)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; harmless when it is closed."""
        if self._open_stream is not None:
            self._client.forget(self._open_stream)
            self._open_stream.close()


class Session(_Opened):
    """An exec or attach session. Iterating yields (is stderr, octets) until the output or the connection ends.

    Closing an exec session before its process has ended kills the process and what holds its stdio.
    """

    def __init__(self, client: Opener, hello: pb.StreamHello, phase: str) -> None:
        super().__init__(client, hello, phase)
        self.exit: pb.ExitFrame | None = None

    async def __aiter__(self) -> AsyncIterator[tuple[bool, bytes]]:
        """Yield the output. Raises `UnavailableError` when the connection ends before the process."""
        while self.exit is None:
            frame = await self._stream.next()
            if frame is None:
                raise self._stream.unavailable("the connection ended before the process")
            if frame.type in (pb.STDOUT, pb.STDERR):
                yield frame.type == pb.STDERR, bytes(frame.payload)
            elif frame.type == pb.EXIT:
                ended = self._stream.parse(frame, pb.ExitFrame)
                if ended.code > 255 or ended.signal > 127:
                    raise self._stream.broken(f"exit code {ended.code}, signal {ended.signal}")
                self.exit = ended
            elif frame.type != pb.CLOSE:
                raise self._stream.broken(f"frame of type {frame.type} in a session")

    async def exit_code(self) -> int:
        """Wait for the process, throwing output away, and return its exit code: 128 + n when signal n killed it."""
        async for _ in self:
            pass
        assert self.exit is not None
        return self.exit.code

    async def write_stdin(self, data: bytes) -> None:
        """Send octets to the process's stdin, waiting while it takes none."""
        await self._stream.send_stdin(data)

    async def close_stdin(self) -> None:
        """Send end of file to the process's stdin."""
        await self._stream.send(frames.close_frame(pb.STDIN))

    async def resize(self, width: int, height: int) -> None:
        """Set the terminal's size."""
        window = pb.WindowSize(width=width, height=height)
        await self._stream.send(frames.encode(pb.RESIZE, window.SerializeToString()))

    async def signal(self, number: int) -> None:
        """Signal the process."""
        await self._stream.send(frames.encode(pb.SIGNAL, pb.SignalFrame(signal=number).SerializeToString()))


class OutputSession(_Opened):
    """A container's output from the agent's buffer. Iterating yields chunks; the last one has `eof`.

    The connection may end at any time (`UnavailableError`); a new session from the acknowledged offsets goes on without
    loss. A chunk's offset is never lower than asked for; a higher one tells that octets are lost for good.
    """

    def __init__(self, client: Opener, hello: pb.StreamHello, phase: str) -> None:
        super().__init__(client, hello, phase)
        self._expected = [hello.output.stdout_offset, hello.output.stderr_offset]

    async def __aiter__(self) -> AsyncIterator[pb.OutputChunk]:
        """Yield chunks up to and with the one that has `eof`."""
        while True:
            frame = await self._stream.next()
            if frame is None:
                raise self._stream.unavailable("the connection ended before the output")
            if frame.type != pb.OUTPUT:
                raise self._stream.broken(f"frame of type {frame.type} on an output stream")
            chunk = self._stream.parse(frame, pb.OutputChunk)
            if chunk.eof:
                yield chunk
                return
            if chunk.offset < self._expected[chunk.stderr]:
                raise self._stream.broken(f"output went back to offset {chunk.offset}")
            self._expected[chunk.stderr] = chunk.offset + len(chunk.data)
            yield chunk

    async def ack(self, stdout_offset: int, stderr_offset: int) -> None:
        """Tell the agent that all octets below these offsets are stored."""
        ack = pb.OutputAck(stdout_offset=stdout_offset, stderr_offset=stderr_offset)
        await self._stream.send(frames.encode(pb.ACK, ack.SerializeToString()))


class DialSession(_Opened):
    """A TCP connection to a port of the pod's loopback."""

    def __init__(self, client: Opener, hello: pb.StreamHello, phase: str) -> None:
        super().__init__(client, hello, phase)
        self._ended = False

    async def read(self) -> bytes:
        """Return the next octets, nothing at the other side's end of file. Raises `UnavailableError` when reset."""
        while not self._ended:
            frame = await self._stream.next()
            if frame is None:
                raise self._stream.unavailable("the connection was reset")
            if frame.type == pb.CLOSE:
                self._ended = True
            elif frame.type != pb.STDOUT:
                raise self._stream.broken(f"frame of type {frame.type} on a dialled stream")
            elif frame.payload:
                return bytes(frame.payload)
        return b""

    async def write(self, data: bytes) -> None:
        """Send octets, waiting while the other side takes none."""
        await self._stream.send_stdin(data)

    async def write_eof(self) -> None:
        """Half-close: the other side sees end of file and may still send."""
        await self._stream.send(frames.close_frame(pb.STDIN))
