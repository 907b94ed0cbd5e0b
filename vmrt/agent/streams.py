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
from vmrt.agent import console, frames, namespaces, status
from vmrt.agent.channel import HANGUP, Channel, Closed, Pollset
from vmrt.agent.containers import CREATED, RUNNING
from vmrt.agent.execs import ExecSession
from vmrt.agent.inward import Inward, steer
from vmrt.agent.output import STDERR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmrt.agent.containers import Container, Containers
    from vmrt.agent.events import Events
    from vmrt.agent.process import Reaper

_CHUNK = 32768
_DIAL_TIMEOUT_S = 10.0


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
            DialSession(channel, hello.dial.port).run()
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
        self._stdin_data = Inward(channel)
        self._stdin_ended = False

    def run(self) -> None:
        """Serve the stream to its end."""
        channel, container = self._channel, self._container
        cursor = container.output.attach()
        try:
            channel.reply()
            for frame in channel.pending():
                self._handle(frame)
            self._write_stdin()
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
                polls.add(channel.fileno(), channel.interest(read=not self._stdin_data.full))
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
                    self._write_stdin()
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
                    self._stdin_data.add(frame.payload)
                else:
                    self._channel.consumed(len(frame.payload))
            elif frame.type == pb.CLOSE and frames.closed_stream(frame) == pb.STDIN:
                self._stdin_ended = True
            elif not steer(frame, self._reaper, container.child, container.stdin_fd if container.tty else -1):
                raise Closed(f"frame of type {frame.type} on an attach stream")
        except frames.FrameError as e:
            raise Closed(str(e)) from e

    def _write_stdin(self) -> None:
        try:
            self._stdin_data.write(self._container.write_stdin)
        except OSError:
            self._stdin_data.drop()  # nobody reads it any more
        if self._stdin and self._stdin_ended and not self._stdin_data and self._container.stdin_once:
            self._container.close_stdin()


class DialSession:
    """A TCP connection to the pod's loopback, octets and half-closes in frames both ways."""

    def __init__(self, channel: Channel, port: int) -> None:
        if not 0 < port < 65536:
            raise status.AgentError(status.INVALID_ARGUMENT, f"{port} is no TCP port")
        self._channel = channel
        self._target = _connect_loopback(port)
        self._target.setblocking(False)
        self._data = Inward(channel)
        self._host_ended = False
        self._told_target = False
        self._target_ended = False

    def run(self) -> None:
        """Serve until both directions have ended or a side breaks."""
        channel = self._channel
        try:
            channel.reply()
            for frame in channel.pending():
                self._handle(frame)
            self._write_target()
            while not (self._told_target and self._target_ended):
                self._turn()
            channel.flush()
        except OSError:
            pass  # reset by the target: the connection ends without CLOSE
        finally:
            self._target.close()

    def _turn(self) -> None:
        channel = self._channel
        polls = Pollset()
        polls.add(channel.fileno(), channel.interest(read=not self._data.full))
        wanted = select.POLLOUT if self._data else 0
        if not self._target_ended and not channel.congested:
            wanted |= select.POLLIN
        if wanted:
            polls.add(self._target.fileno(), wanted)
        ready = polls.wait()
        host, target = ready.get(channel.fileno(), 0), ready.get(self._target.fileno(), 0)
        if host & select.POLLOUT:
            channel.push()
        if host & select.POLLIN:
            for frame in channel.receive():
                self._handle(frame)
            self._write_target()
        elif host & HANGUP:
            raise Closed("hung up")
        if target & wanted & select.POLLIN or (target & HANGUP and not self._target_ended):
            self._read_target()
        if target & select.POLLOUT:
            self._write_target()

    def _handle(self, frame: frames.Frame) -> None:
        try:
            if frame.type == pb.STDIN and not self._host_ended:
                self._data.add(frame.payload)
            elif frame.type == pb.CLOSE and frames.closed_stream(frame) == pb.STDIN:
                self._host_ended = True
            else:
                raise Closed(f"frame of type {frame.type} on a dialled stream")
        except frames.FrameError as e:
            raise Closed(str(e)) from e

    def _write_target(self) -> None:
        self._data.write(self._target.sendmsg)
        if self._host_ended and not self._data and not self._told_target:
            self._told_target = True
            with contextlib.suppress(OSError):  # it may have gone meanwhile
                self._target.shutdown(_socket.SHUT_WR)

    def _read_target(self) -> None:
        try:
            if self._channel.congested or self._channel.relay(pb.STDOUT, self._target.fileno()):
                return
        except BlockingIOError:
            return
        self._target_ended = True
        self._channel.send(frames.close_frame(pb.STDOUT))


def _connect_loopback(port: int) -> _socket.socket:
    refusals = []
    for family, host in ((_socket.AF_INET, "127.0.0.1"), (_socket.AF_INET6, "::1")):
        with namespaces.entered():
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
