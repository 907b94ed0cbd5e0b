"""The stream port: reads a hello, opens the stream it names, serves it to its end (proto/agent.proto, StreamHello).

Each stream has a thread of its own. OutputStream, EventStream, AttachStream and DialStream are here, ExecStream in
`execs`.
"""

from __future__ import annotations

import _socket
import contextlib
import select
import time

from vmrt.agent import agent_pb2 as pb
from vmrt.agent import console, frames, status
from vmrt.agent.channel import HANGUP, Channel, Closed, Pollset
from vmrt.agent.containers import CREATED, RUNNING
from vmrt.agent.execs import ExecSession, set_window
from vmrt.agent.output import STDERR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmrt.agent.containers import Container, Containers
    from vmrt.agent.events import Events
    from vmrt.agent.process import Reaper

_CHUNK = 32768
_DIAL_TIMEOUT_S = 10.0
_DIAL_BUFFER = 128 * 1024


class Streams:
    """Serves stream connections."""

    def __init__(self, containers: Containers, events: Events, reaper: Reaper) -> None:
        self._containers = containers
        self._events = events
        self._reaper = reaper

    def serve(self, connection: _socket.socket) -> None:
        """Serve one connection to its end and close it. Never raises."""
        channel = Channel(connection)
        try:
            hello = channel.hello()
            try:
                self._open(channel, hello)
            except status.AgentError as e:
                channel.reply(e)
                channel.flush()
        except Closed:
            pass
        except Exception as e:
            console.log(f"stream: {type(e).__name__}: {e}")
            with contextlib.suppress(Closed):
                channel.reply(status.AgentError(status.INTERNAL, f"agent: {type(e).__name__}: {e}"))
        finally:
            channel.close()

    def _open(self, channel: Channel, hello: pb.StreamHello) -> None:
        kind = hello.WhichOneof("kind")
        if kind == "exec":
            ExecSession(channel, self._containers, self._reaper, hello.exec).run()
        elif kind == "output":
            serve_output(channel, self._containers.get(hello.output.container_id), hello.output)
        elif kind == "events":
            serve_events(channel, self._events, hello.events.after)
        elif kind == "attach":
            AttachSession(channel, self._reaper, self._containers.get(hello.attach.container_id), hello.attach).run()
        elif kind == "dial":
            serve_dial(channel, hello.dial.port)
        else:
            raise status.AgentError(status.UNIMPLEMENTED, "the hello names no stream that this agent knows")


def serve_output(channel: Channel, container: Container, request: pb.OutputStream) -> None:
    """Send the container's buffered output and what follows; acknowledged octets are dropped."""
    output = container.output
    try:
        cursor = output.follow_log(request.stdout_offset, request.stderr_offset)
    except ValueError as e:
        raise status.AgentError(status.OUT_OF_RANGE, f"output of container {container.id}: {e}") from e
    output.acknowledge(request.stdout_offset, request.stderr_offset)
    told_end = False
    try:
        channel.reply()
        for frame in channel.pending():
            _acknowledge(container, frame)
        while not cursor.ended:
            cursor.clear_wake()
            while not channel.congested and (chunk := cursor.next()) is not None:
                which, offset, data, read_at = chunk
                for at in range(0, len(data), _CHUNK):
                    message = pb.OutputChunk(
                        stderr=which == STDERR,
                        offset=offset + at,
                        data=data[at : at + _CHUNK],
                        age_us=max(0, time.monotonic_ns() - read_at) // 1000,
                    )
                    channel.send(frames.encode(pb.OUTPUT, message.SerializeToString()))
            if not told_end and cursor.at_end():
                told_end = True
                channel.send(frames.encode(pb.OUTPUT, pb.OutputChunk(eof=True).SerializeToString()))
            polls = Pollset()
            polls.add(channel.fileno(), channel.interest())
            polls.add(cursor.wake_fd, select.POLLIN)
            events = polls.wait().get(channel.fileno(), 0)
            if events & select.POLLOUT:
                channel.push()
            if events & select.POLLIN:
                for frame in channel.receive():
                    _acknowledge(container, frame)
            elif events & HANGUP:
                return
    finally:
        cursor.close()


def _acknowledge(container: Container, frame: frames.Frame) -> None:
    if frame.type != pb.ACK:
        raise Closed(f"frame of type {frame.type} on an output stream")
    try:
        ack = frame.parse(pb.OutputAck)
    except frames.FrameError as e:
        raise Closed(str(e)) from e
    container.output.acknowledge(ack.stdout_offset, ack.stderr_offset)


def serve_events(channel: Channel, events: Events, after: int) -> None:
    """Send the events behind number `after`, those kept and those to come."""
    try:
        subscriber = events.subscribe(after)
    except ValueError as e:
        raise status.AgentError(status.OUT_OF_RANGE, f"events: {e}") from e
    try:
        channel.reply()
        while True:
            while not channel.congested and (event := events.next(subscriber)) is not None:
                channel.send(frames.encode(pb.EVENT, event.SerializeToString()))
            polls = Pollset()
            polls.add(channel.fileno(), channel.interest())
            polls.add(subscriber.wake_fd, select.POLLIN)
            ready = polls.wait().get(channel.fileno(), 0)
            if ready & select.POLLOUT:
                channel.push()
            if ready & select.POLLIN and channel.receive():
                raise Closed("the host sends nothing on an event stream")
            if ready & HANGUP:
                return
    finally:
        events.unsubscribe(subscriber)


class AttachSession:
    """The main process's stdin and its output from now on. Ends with the container's output or the host's hang-up."""

    def __init__(self, channel: Channel, reaper: Reaper, container: Container, request: pb.AttachStream) -> None:
        container.require(CREATED, RUNNING)
        self._channel = channel
        self._reaper = reaper
        self._container = container
        self._stdin = request.stdin
        self._stdin_data = bytearray()
        self._stdin_ended = False

    def run(self) -> None:
        """Serve the stream to its end."""
        channel, container = self._channel, self._container
        cursor = container.output.attach()
        try:
            channel.reply()
            for frame in channel.pending():
                self._handle(frame)
            while not cursor.ended:
                cursor.clear_wake()
                while not channel.congested and (chunk := cursor.next()) is not None:
                    kind = pb.STDERR if chunk[0] == STDERR else pb.STDOUT
                    channel.send(frames.encode_data(kind, chunk[2]))
                if cursor.at_end() and container.exit is not None:
                    channel.send(frames.encode(pb.EXIT, container.exit.frame().SerializeToString()))
                    channel.flush()
                    return
                polls = Pollset()
                polls.add(channel.fileno(), channel.interest(read=not self._stdin_data))
                polls.add(cursor.wake_fd, select.POLLIN)
                if self._stdin_data:
                    polls.add(container.stdin_fd, select.POLLOUT)
                ready = polls.wait()
                if self._stdin_data:
                    self._write_stdin()
                events = ready.get(channel.fileno(), 0)
                if events & select.POLLOUT:
                    channel.push()
                if events & select.POLLIN:
                    for frame in channel.receive():
                        self._handle(frame)
                elif events & HANGUP:
                    return
        finally:
            cursor.close()
            # CRI stdin_once: the first client's end is the container's EOF.
            if self._stdin and container.stdin_once:
                container.close_stdin()

    def _handle(self, frame: frames.Frame) -> None:
        container = self._container
        try:
            if frame.type == pb.STDIN:
                if self._stdin and not self._stdin_ended:
                    self._stdin_data += frame.payload
                    self._write_stdin()
            elif frame.type == pb.CLOSE and frames.closed_stream(frame) == pb.STDIN:
                self._stdin_ended = True
                if self._stdin and container.stdin_once and not self._stdin_data:
                    container.close_stdin()
            elif frame.type == pb.RESIZE:
                window = frame.parse(pb.WindowSize)
                if container.tty and container.stdin_fd >= 0:
                    set_window(container.stdin_fd, window.width, window.height)
            elif frame.type == pb.SIGNAL:
                number = frame.parse(pb.SignalFrame).signal
                if container.child is not None and 0 < number <= 64:
                    self._reaper.signal(container.child, number)
            else:
                raise Closed(f"frame of type {frame.type} on an attach stream")
        except frames.FrameError as e:
            raise Closed(str(e)) from e

    def _write_stdin(self) -> None:
        while self._stdin_data:
            try:
                written = self._container.write_stdin(bytes(self._stdin_data[:_CHUNK]))
            except BlockingIOError:
                return
            except OSError:
                self._stdin_data.clear()  # nobody reads it any more
                return
            del self._stdin_data[:written]
        if self._stdin_ended and self._container.stdin_once:
            self._container.close_stdin()


def serve_dial(channel: Channel, port: int) -> None:
    """Connect to a TCP port of the pod's loopback and pass octets both ways, half-closes too."""
    if not 0 < port < 65536:
        raise status.AgentError(status.INVALID_ARGUMENT, f"{port} is no TCP port")
    target = _connect_loopback(port)
    try:
        channel.reply()
        channel.flush()
        _splice(channel.connection, target, channel.take_rest())
    except OSError as e:
        raise Closed(str(e)) from e
    finally:
        target.close()


def _connect_loopback(port: int) -> _socket.socket:
    refusals = []
    for family, host in ((_socket.AF_INET, "127.0.0.1"), (_socket.AF_INET6, "::1")):
        target = _socket.socket(family, _socket.SOCK_STREAM)
        try:
            target.settimeout(_DIAL_TIMEOUT_S)
            target.connect((host, port))
        except OSError as e:
            target.close()
            refusals.append(f"{host}: {e.strerror or e}")
        else:
            return target
    raise status.AgentError(status.NOT_FOUND, f"nothing answers on port {port} of the pod: {'; '.join(refusals)}")


class _Direction:
    """Octets on their way from one socket to the other."""

    def __init__(self, source: _socket.socket, sink: _socket.socket, first: bytes = b"") -> None:
        self.source = source
        self.sink = sink
        self.data = bytearray(first)
        self.reading = True
        self.done = False

    def turn(self, readable: bool, writable: bool) -> None:
        if readable and self.reading:
            try:
                data = self.source.recv(65536)
                self.reading = bool(data)
                self.data += data
            except BlockingIOError:
                pass
        if self.data and (writable or readable):
            with contextlib.suppress(BlockingIOError):
                del self.data[: self.sink.send(self.data)]
        if not self.reading and not self.data and not self.done:
            self.done = True
            with contextlib.suppress(OSError):
                self.sink.shutdown(_socket.SHUT_WR)


def _splice(one: _socket.socket, other: _socket.socket, first: bytes) -> None:
    """Pass octets both ways until both directions have ended. Raises `OSError` when a side breaks."""
    one.setblocking(False)
    other.setblocking(False)
    directions = (_Direction(one, other, first), _Direction(other, one))
    while not all(direction.done for direction in directions):
        wanted: dict[int, int] = {one.fileno(): 0, other.fileno(): 0}
        for direction in directions:
            if direction.reading and len(direction.data) < _DIAL_BUFFER:
                wanted[direction.source.fileno()] |= select.POLLIN
            if direction.data:
                wanted[direction.sink.fileno()] |= select.POLLOUT
        polls = Pollset()
        for fd, events in wanted.items():
            polls.add(fd, events)
        ready = polls.wait()
        for direction in directions:
            source, sink = ready.get(direction.source.fileno(), 0), ready.get(direction.sink.fileno(), 0)
            if sink & select.POLLERR or (sink & select.POLLHUP and direction.data):
                raise OSError("the other side broke the connection")
            direction.turn(bool(source & (select.POLLIN | select.POLLHUP)), bool(sink & select.POLLOUT))
