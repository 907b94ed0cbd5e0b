"""One stream connection: frames in and out over a non-blocking socket, for a session that polls several descriptors.

What streams cost an emulated guest is turns, copies and fresh memory. So one turn moves all that a pipe holds, data
goes from one descriptor to the other through one buffer in which frames are made and read in place, and buffers are
kept.
"""

from __future__ import annotations

import _socket
import contextlib
import os
import select
import time

from vmrt.agent import agent_pb2 as pb
from vmrt.agent import frames, status
from vmrt.agent.layout import MAX_FRAME_BYTES, STDIN_ACK
from vmrt.agent.sockets import PACKET_BYTES

_READ = 64 * 1024
# Sources are not read while more than this waits for the socket: the kernel's flow control is the back-pressure.
_HIGH_WATER = 128 * 1024
HELLO_TIMEOUT_S = 10.0
LINGER_S = 5.0
HANGUP = select.POLLRDHUP | select.POLLHUP | select.POLLERR | select.POLLNVAL


class Closed(Exception):
    """The host has closed the connection, or broken the protocol."""


class Buffer:
    """Room for as many frames as one turn moves; the slots are where their payloads are."""

    FRAMES = 4
    _SPARES = 4
    _spare: list[Buffer] = []  # noqa: RUF012 - all threads'; a list's append and pop need no lock

    __slots__ = ("slots", "view")

    def __init__(self) -> None:
        stride = frames.HEADER.size + MAX_FRAME_BYTES
        self.view = memoryview(bytearray(self.FRAMES * stride))
        self.slots = [self.view[at + frames.HEADER.size : at + stride] for at in range(0, len(self.view), stride)]

    @classmethod
    def take(cls) -> Buffer:
        """Return one that nobody uses."""
        try:
            return cls._spare.pop()
        except IndexError:
            return cls()

    def give_back(self) -> None:
        """Let it be used again: no view of it may be read from now on."""
        if len(self._spare) < self._SPARES:
            self._spare.append(self)

    def enframe(self, type_: int, octets: int) -> memoryview:
        """Return the frames of the first so many octets in the slots."""
        at = 0
        for slot in self.slots:
            length = min(octets, len(slot))
            frames.HEADER.pack_into(self.view, at, type_, length)
            at += frames.HEADER.size + length
            octets -= length
            if not octets:
                break
        return self.view[:at]


class Channel:
    """Framed connection. Every method but `flush` and `close` is non-blocking."""

    def __init__(self, connection: _socket.socket) -> None:
        self._connection = connection
        self._decoder = frames.Decoder(frames.FROM_HOST, pieces=(pb.STDIN,))
        self._lent: Buffer | None = None  # what `receive` has handed out is in it
        self._rest: memoryview | None = None  # of `_sending`, to go before `_out`
        self._sending: Buffer | None = None
        self._out = bytearray()
        self._acks = False
        self._consumed = 0
        connection.setblocking(False)

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._connection.fileno()

    @property
    def congested(self) -> bool:
        """Whether no more should be queued now."""
        return self._rest is not None or len(self._out) > _HIGH_WATER

    def interest(self, *, read: bool = True) -> int:
        """Return the poll(2) events to wait for. A hang-up is always told, also while nothing is read."""
        events: int = select.POLLRDHUP
        if read:
            events |= select.POLLIN
        if self._out or self._rest is not None:
            events |= select.POLLOUT
        return events

    def receive(self) -> list[frames.Frame]:
        """Return the frames that are here now. Raises `Closed` at the end of the connection or for a broken frame.

        Payloads of STDIN come in pieces, on loan until `release` or the next `receive`.
        """
        buffer = self._lent or Buffer.take()
        self._lent = buffer
        lent = False
        try:
            count = self._connection.recv_into(buffer.view)
            if not count:
                raise Closed("closed by the host")
            received = self._decoder.feed(buffer.view[:count])
            lent = any(frame.type == pb.STDIN for frame in received)
        except BlockingIOError:
            return []
        except (OSError, frames.FrameError) as e:
            raise Closed(str(e)) from e
        else:
            return received
        finally:
            if not lent:
                self.release()

    def release(self) -> None:
        """Say that no payload of the last `receive` is needed any more."""
        if self._lent is not None:
            self._lent.give_back()
            self._lent = None

    def queue(self, frame: bytes) -> None:
        """Have a frame sent with the next one, or by `push`."""
        self._out += frame

    def send(self, frame: bytes) -> None:
        """Queue a frame and send what the socket takes. Raises `Closed`."""
        self._out += frame
        self.push()

    def relay(self, type_: int, source: int) -> int:
        """Read a descriptor and send what it has as frames; to be called while not `congested`.

        Returns how many octets there were, 0 at its end. The read's `OSError` is the caller's; raises `Closed`.
        """
        self.push()
        buffer = Buffer.take()
        try:
            octets = os.readv(source, buffer.slots)
        except OSError:
            buffer.give_back()
            raise
        if octets and not self._out and self._rest is None:
            self._sending, self._rest = buffer, buffer.enframe(type_, octets)
            self.push()
            return octets
        if octets:
            self._out += buffer.enframe(type_, octets)
        buffer.give_back()
        return octets

    def consumed(self, octets: int) -> None:
        """Tell the host that octets of stdin are gone, in few frames (layout.STDIN_ACK). Raises `Closed`."""
        self._consumed += octets
        if self._acks and self._consumed >= STDIN_ACK:
            self.send(frames.stdin_ack(self._consumed))
            self._consumed = 0

    def push(self) -> None:
        """Send what the socket takes. Raises `Closed`."""
        while self._rest is not None:
            sent = self._send(self._rest)
            if not sent:
                return
            self._keep(self._rest[sent:])
        while self._out:
            sent = self._send(memoryview(self._out))
            if not sent:
                return
            del self._out[:sent]

    def _send(self, data: memoryview) -> int:
        """Return how many octets the socket takes. Raises `Closed`."""
        try:
            return self._connection.send(data[:PACKET_BYTES])
        except BlockingIOError:
            return 0
        except OSError as e:
            raise Closed(str(e)) from e

    def _keep(self, rest: memoryview) -> None:
        """Have what is left of `_sending` sent first, or the buffer used again when that is nothing."""
        self._rest = rest or None
        if self._rest is None and self._sending is not None:
            self._sending.give_back()
            self._sending = None

    def flush(self) -> None:
        """Send all that is queued, for as long as the host stays connected. Raises `Closed`."""
        poll = select.poll()
        poll.register(self.fileno(), select.POLLOUT | select.POLLRDHUP)
        while self._out or self._rest is not None:
            for _, events in poll.poll():
                if events & (select.POLLERR | select.POLLHUP | select.POLLNVAL):
                    raise Closed("hung up")
            self.push()

    def hello(self, timeout_s: float = HELLO_TIMEOUT_S) -> pb.StreamHello:
        """Wait for the first frame. Raises `Closed` when it does not come or is no HELLO."""
        deadline = time.monotonic() + timeout_s
        poll = select.poll()
        poll.register(self.fileno(), select.POLLIN)
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                raise Closed("no hello in time")
            try:
                data = self._connection.recv(_READ)
                # Only the first frame: what follows is the session's, once there is one (`pending`).
                received = self._decoder.feed(data, 1)
                if received and received[0].type == pb.HELLO:
                    hello = received[0].parse(pb.StreamHello)
                    self._acks = hello.stdin_acks
                    return hello
            except BlockingIOError:
                continue
            except (OSError, frames.FrameError) as e:
                raise Closed(str(e)) from e
            if received or not data:
                raise Closed("the first frame is no hello")

    def reply(self, error: status.AgentError | None = None) -> None:
        """Answer the hello. Raises `Closed`."""
        message = pb.StreamReply() if error is None else pb.StreamReply(code=error.code, message=error.message)
        self.send(frames.encode(pb.REPLY, message.SerializeToString()))

    def pending(self) -> list[frames.Frame]:
        """Return frames that came together with the hello. Raises `Closed` for a broken one."""
        try:
            return self._decoder.feed(b"")
        except frames.FrameError as e:
            raise Closed(str(e)) from e

    def close(self) -> None:
        """Close the connection after the host: what is in flight is lost when a transport sees our close first."""
        self.release()
        self._keep(memoryview(b""))
        with contextlib.suppress(OSError):
            self._connection.shutdown(_socket.SHUT_WR)
            self._linger()
        with contextlib.suppress(OSError):
            self._connection.close()

    def _linger(self) -> None:
        deadline = time.monotonic() + LINGER_S
        poll = select.poll()
        poll.register(self.fileno(), select.POLLIN | select.POLLRDHUP)
        while (left := deadline - time.monotonic()) > 0:
            ready = poll.poll(left * 1000)
            if not ready or ready[0][1] & ~select.POLLIN:
                return
            try:
                if not self._connection.recv(_READ):
                    return
            except BlockingIOError:
                continue


class Watch:
    """A poll(2) set that lasts: what stays the same from turn to turn costs nothing."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._events: dict[int, int] = {}

    def want(self, fd: int, events: int) -> None:
        """Wait for these events of `fd` from now on, for none with 0; a negative `fd` is nothing to wait for."""
        if fd < 0 or self._events.get(fd, 0) == events:
            return
        if events:
            self._events[fd] = events
            self._poll.register(fd, events)
        else:
            self.forget(fd)

    def forget(self, fd: int) -> None:
        """Wait for nothing of `fd`; to be called before it is closed."""
        if self._events.pop(fd, 0):
            self._poll.unregister(fd)

    def wait(self, timeout_s: float | None = None) -> dict[int, int]:
        """Return descriptor -> events, empty after `timeout_s`."""
        return dict(self._poll.poll(None if timeout_s is None else max(0.0, timeout_s) * 1000))


class Pollset:
    """A poll(2) set built anew each turn, with negative descriptors left out."""

    def __init__(self) -> None:
        self._poll = select.poll()

    def add(self, fd: int, events: int) -> None:
        """Wait for these events of `fd`; a negative `fd` is nothing to wait for."""
        if fd >= 0:
            self._poll.register(fd, events)

    def wait(self, timeout_s: float | None = None) -> dict[int, int]:
        """Return descriptor -> events, empty after `timeout_s`."""
        return dict(self._poll.poll(None if timeout_s is None else max(0.0, timeout_s) * 1000))
