"""One stream connection: frames in and out over a non-blocking socket, for a session that polls several descriptors."""

from __future__ import annotations

import _socket
import contextlib
import select
import time

from vmrt.agent import agent_pb2 as pb
from vmrt.agent import frames, status
from vmrt.agent.layout import STDIN_ACK

_READ = 256 * 1024
_WRITE = 64 * 1024
# Sources are not read while more than this waits for the socket: the kernel's flow control is the back-pressure.
_HIGH_WATER = 128 * 1024
HELLO_TIMEOUT_S = 10.0
LINGER_S = 5.0
HANGUP = select.POLLRDHUP | select.POLLHUP | select.POLLERR | select.POLLNVAL


class Closed(Exception):
    """The host has closed the connection, or broken the protocol."""


class Channel:
    """Framed connection. Every method but `flush` and `close` is non-blocking."""

    def __init__(self, connection: _socket.socket) -> None:
        self._connection = connection
        self._decoder = frames.Decoder(frames.FROM_HOST)
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
        return len(self._out) > _HIGH_WATER

    def interest(self, *, read: bool = True) -> int:
        """Return the poll(2) events to wait for. A hang-up is always told, also while nothing is read."""
        events: int = select.POLLRDHUP
        if read:
            events |= select.POLLIN
        if self._out:
            events |= select.POLLOUT
        return events

    def receive(self) -> list[frames.Frame]:
        """Return the frames that are here now. Raises `Closed` at the end of the connection or for a broken frame."""
        try:
            data = self._connection.recv(_READ)
        except BlockingIOError:
            return []
        except OSError as e:
            raise Closed(str(e)) from e
        if not data:
            raise Closed("closed by the host")
        try:
            return self._decoder.feed(data)
        except frames.FrameError as e:
            raise Closed(str(e)) from e

    def queue(self, frame: bytes) -> None:
        """Have a frame sent with the next one, or by `push`."""
        self._out += frame

    def send(self, frame: bytes) -> None:
        """Queue a frame and send what the socket takes. Raises `Closed`."""
        self._out += frame
        self.push()

    def send_data(self, type_: int, data: bytes) -> None:
        """Queue octets, at most MAX_FRAME_BYTES, as one frame, uncopied where the socket takes all. Raises `Closed`."""
        head = frames.header(type_, len(data))
        sent = 0
        if not self._out:
            try:
                sent = self._connection.sendmsg([head, data])
            except BlockingIOError:
                pass
            except OSError as e:
                raise Closed(str(e)) from e
            if sent == len(head) + len(data):
                return
        self._out += head[sent:]
        self._out += memoryview(data)[max(0, sent - len(head)) :]

    def consumed(self, octets: int) -> None:
        """Tell the host that octets of stdin are gone, in few frames (layout.STDIN_ACK). Raises `Closed`."""
        self._consumed += octets
        if self._acks and self._consumed >= STDIN_ACK:
            self.send(frames.stdin_ack(self._consumed))
            self._consumed = 0

    def push(self) -> None:
        """Send what the socket takes. Raises `Closed`."""
        while self._out:
            try:
                sent = self._connection.send(memoryview(self._out)[:_WRITE])
            except BlockingIOError:
                return
            except OSError as e:
                raise Closed(str(e)) from e
            del self._out[:sent]

    def flush(self) -> None:
        """Send all that is queued, for as long as the host stays connected. Raises `Closed`."""
        poll = select.poll()
        poll.register(self.fileno(), select.POLLOUT | select.POLLRDHUP)
        while self._out:
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
