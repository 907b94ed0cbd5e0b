"""ExecStream: one more process in a container, its stdio on the connection.

It is started (`enter`) in a leaf cgroup of its own below the container's, as our child. The session then moves octets
between the connection and the pipes (or the terminal) until the process has ended and its output is drained.
A process that the command left in the background may keep the pipes open: it is not waited for once they have been
silent for `SILENCE_S`. When the host goes away first, the whole leaf cgroup is killed, whatever holds the stdio.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time

from vmrt.agent import agent_pb2 as pb
from vmrt.agent import cgroups, enter, frames, status
from vmrt.agent.channel import HANGUP, Closed, Watch
from vmrt.agent.containers import RUNNING
from vmrt.agent.inward import Inward, steer
from vmrt.agent.process import DEVNULL

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmrt.agent.channel import Channel
    from vmrt.agent.containers import Container, Containers
    from vmrt.agent.process import Child, Exit, Reaper

SILENCE_S = 0.2
# What one turn moves (channel.Buffer): the fewer turns, the less an emulated CPU spends on them.
_PIPE_BYTES = 256 * 1024
_F_SETPIPE_SZ = 1031
_BURST_S = 0.005
_HOLD_S = 0.01


def _pipe() -> tuple[int, int]:
    """Return a pipe's two ends, larger than usual where the kernel lets it be (F_SETPIPE_SZ, Linux's number)."""
    import fcntl

    reader, writer = os.pipe()
    with contextlib.suppress(OSError):
        fcntl.fcntl(reader, _F_SETPIPE_SZ, _PIPE_BYTES)
    return reader, writer


class ExecSession:
    """One exec, from its hello to its EXIT frame."""

    def __init__(self, channel: Channel, containers: Containers, reaper: Reaper, request: pb.ExecStream) -> None:
        self._channel = channel
        self._reaper = reaper
        self._request = request
        self._container: Container = containers.get(request.container_id)
        self._own = containers.own
        self._cgroup = cgroups.Cgroup(self._container.id, f"exec-{self._container.next_exec()}")
        self._ended = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stdin = -1
        self._stdin_data = Inward(channel)
        self._watch = Watch()
        self._stdin_closing = False
        self._sources: dict[int, int] = {}  # descriptor -> STDOUT or STDERR
        self._child: Child | None = None

    def run(self) -> None:
        """Serve the stream to its end. Raises `AgentError` when the process cannot be started."""
        finished = False
        try:
            self._start()
            self._channel.reply()
            for frame in self._channel.pending():
                self._handle(frame)
            self._write_stdin()
            self._pump()
            finished = True
        except Closed:
            pass
        finally:
            if self._child is None:
                self._cgroup.remove()  # what did not start may still be on its way out
            elif not finished and self._request.detach_kills:
                self._cgroup.kill()
            self._close()
            self._cgroup.remove_if_empty()

    def _start(self) -> None:
        request, container = self._request, self._container
        if not request.args or not request.args[0]:
            raise status.AgentError(status.INVALID_ARGUMENT, "exec: no command")
        container.require(RUNNING)
        assert container.child is not None
        window = (request.window.width, request.window.height) if request.tty else None
        wanted = enter.plan(container.exec_template(), request.args, self._cgroup.path, window=window)
        os.makedirs(self._cgroup.path, exist_ok=True)  # noqa: PTH103
        with contextlib.ExitStack() as ours:
            stdin = stdout = stderr = DEVNULL
            if not request.tty:
                if request.stdin:
                    stdin, self._stdin = _pipe()
                    ours.callback(os.close, stdin)
                    os.set_blocking(self._stdin, False)
                    self._own(container, stdin)
                stdout, stderr = (self._output_pipe(kind, ours) for kind in (pb.STDOUT, pb.STDERR))
                self._own(container, stdout, stderr)
            started = enter.start(
                self._reaper, container.child, wanted, f"exec in container {container.id}",
                stdin=stdin, stdout=stdout, stderr=stderr, on_exit=self._on_exit,
            )  # fmt: skip
        self._child = started.child
        if request.tty:
            if started.master < 0:
                raise status.AgentError(status.INTERNAL, f"exec in container {container.id}: no terminal came")
            self._sources[started.master] = pb.STDOUT
            os.set_blocking(started.master, False)
            self._stdin = os.dup(started.master)

    def _output_pipe(self, kind: int, ours: contextlib.ExitStack) -> int:
        """Return the writing end of a new pipe whose other end is read as `kind`."""
        reader, writer = _pipe()
        ours.callback(os.close, writer)
        os.set_blocking(reader, False)
        self._sources[reader] = kind
        return writer

    def _on_exit(self, exit_: Exit) -> None:
        os.eventfd_write(self._ended, 1)

    def _pump(self) -> None:
        channel, watch = self._channel, self._watch
        silent_since = 0.0
        last_output = 0.0
        held = False
        while True:
            ended = self._child is not None and self._child.exit is not None
            if ended and not channel.congested:
                silent_since = silent_since or time.monotonic()
            if ended and (not self._sources or (silent_since and time.monotonic() - silent_since >= SILENCE_S)):
                break
            interest = channel.interest(read=not self._stdin_data.full)
            # A process whose output has ended mostly ends, too: what is said of both goes in one piece.
            hold = not self._sources and not ended and not held
            watch.want(channel.fileno(), interest & ~select.POLLOUT if hold else interest)
            watch.want(self._ended, 0 if ended else select.POLLIN)
            watch.want(self._stdin, select.POLLOUT if self._stdin_data else 0)
            for fd in self._sources:
                watch.want(fd, 0 if channel.congested else select.POLLIN)
            ready = watch.wait(SILENCE_S if ended else _HOLD_S if hold else None)
            held = held or (hold and self._ended not in ready)
            self._serve_channel(ready.get(channel.fileno(), 0))
            if self._stdin in ready:
                self._write_stdin()
            readable = [fd for fd in self._sources if fd in ready]
            if readable:
                # Output that goes on is let grow for a moment, on a guest's one processor: a program that writes a page
                # at a time would else be interrupted, and a frame sent, for each of them.
                if time.monotonic() - last_output < _BURST_S:
                    os.sched_yield()
                for fd in readable:
                    if not channel.congested:
                        self._read_source(fd)
                last_output = time.monotonic()
                silent_since = 0.0
        assert self._child is not None and self._child.exit is not None
        for kind in set(self._sources.values()):
            channel.queue(frames.close_frame(kind))
        self._child.exit.oom_killed = self._cgroup.oom_kills() > 0
        channel.send(frames.encode(pb.EXIT, self._child.exit.frame().SerializeToString()))
        channel.flush()

    def _serve_channel(self, events: int) -> None:
        if events & select.POLLOUT:
            self._channel.push()
        if events & select.POLLIN:
            for frame in self._channel.receive():
                self._handle(frame)
            self._write_stdin()
        elif events & HANGUP:
            raise Closed("hung up")

    def _handle(self, frame: frames.Frame) -> None:
        try:
            if frame.type == pb.STDIN:
                if self._stdin >= 0 and not self._stdin_closing:
                    self._stdin_data.add(frame.payload)
                else:
                    self._channel.consumed(len(frame.payload))
            elif frame.type == pb.CLOSE and frames.closed_stream(frame) == pb.STDIN:
                self._stdin_closing = True
            elif not steer(frame, self._reaper, self._child, self._stdin if self._request.tty else -1):
                raise Closed(f"frame of type {frame.type} on an exec stream")
        except frames.FrameError as e:
            raise Closed(str(e)) from e

    def _write_stdin(self) -> None:
        try:
            self._stdin_data.write(lambda pieces: os.writev(self._stdin, pieces))
        except OSError:
            # The process has closed its stdin: the rest goes nowhere, as in a shell's pipe.
            self._stdin_data.drop()
            self._stdin_closing = True
        if self._stdin_closing and not self._stdin_data and self._stdin >= 0 and not self._request.tty:
            self._watch.forget(self._stdin)
            os.close(self._stdin)
            self._stdin = -1

    def _read_source(self, fd: int) -> None:
        kind = self._sources[fd]
        try:
            octets = self._channel.relay(kind, fd)
        except BlockingIOError:
            return
        except OSError:
            octets = 0  # EIO: the terminal's last slave is closed
        if octets:
            return
        self._watch.forget(fd)
        os.close(fd)
        del self._sources[fd]
        self._channel.queue(frames.close_frame(kind))

    def _close(self) -> None:
        for fd in [*self._sources, self._stdin]:
            if fd >= 0:
                os.close(fd)
        self._sources.clear()
        self._stdin = -1
        child = self._child
        if child is None or child.exit is not None:
            if child is not None:
                child.wait()  # `exit` is there a moment before the descriptor has been written to
            os.close(self._ended)
        else:
            # The exit may still be told to this descriptor: it is closed after that.
            threading.Thread(target=self._close_later, args=(child,), daemon=True).start()

    def _close_later(self, child: Child) -> None:
        child.wait()
        os.close(self._ended)
        self._cgroup.remove_if_empty()
