"""ExecStream: one more process in a container, its stdio on the connection.

`crun exec -d` starts it in a leaf cgroup of its own below the container's and leaves it to us. The session then moves
octets between the connection and the pipes (or the terminal) until the process has ended and its output is drained.
A process that the command left in the background may keep the pipes open: it is not waited for once they have been
silent for `SILENCE_S`. When the host goes away first, the whole leaf cgroup is killed, whatever holds the stdio.
"""

from __future__ import annotations

import contextlib
import os
import select
import struct
import threading
import time

from vmrt.agent import agent_pb2 as pb
from vmrt.agent import cgroups, frames, spec, status
from vmrt.agent.channel import HANGUP, Closed, Pollset
from vmrt.agent.containers import RUNNING

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmrt.agent.channel import Channel
    from vmrt.agent.containers import Container, Containers
    from vmrt.agent.process import Child, Exit, Reaper

SILENCE_S = 0.2
_READ = 32768
_STDIN_BOUND = 128 * 1024

_number_lock = threading.Lock()
_number = 0


def _next_number() -> int:
    global _number
    with _number_lock:
        _number += 1
        return _number


def set_window(fd: int, width: int, height: int) -> None:
    """Set a terminal's size (TIOCSWINSZ); a size that does not fit 16 bits is cut."""
    import fcntl
    import termios

    with contextlib.suppress(OSError):
        fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", min(height, 65535), min(width, 65535), 0, 0))


class ExecSession:
    """One exec, from its hello to its EXIT frame."""

    def __init__(self, channel: Channel, containers: Containers, reaper: Reaper, request: pb.ExecStream) -> None:
        self._channel = channel
        self._reaper = reaper
        self._request = request
        self._container: Container = containers.get(request.container_id)
        self._crun = containers.crun
        self._cgroup = cgroups.Cgroup(self._container.id, f"exec-{_next_number()}")
        self._ended = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stdin = -1
        self._stdin_data = bytearray()
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
            self._pump()
            finished = True
        except Closed:
            pass
        finally:
            if not finished and self._request.detach_kills:
                self._cgroup.kill()
            self._close()
            self._cgroup.remove_if_empty()

    def _start(self) -> None:
        import json

        request = self._request
        if not request.args or not request.args[0]:
            raise status.AgentError(status.INVALID_ARGUMENT, "exec: no command")
        container = self._container
        container.require(RUNNING)
        process = spec.exec_process(
            container.spec, request.args, tty=request.tty, width=request.window.width, height=request.window.height
        )
        path = f"{container.directory}/{self._cgroup.path.rpartition('/')[2]}.json"
        what = f"exec in container {container.id}"
        with contextlib.ExitStack() as ours:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            ours.callback(os.unlink, path)
            with os.fdopen(fd, "w") as file:
                json.dump(process, file)
            args = ["exec", "--detach", f"--process={path}", f"--cgroup={self._cgroup.path.rpartition('/')[2]}"]
            os.makedirs(self._cgroup.path, exist_ok=True)  # noqa: PTH103
            if request.tty:
                terminal = self._crun.console()
                ours.callback(terminal.close)
                self._child = self._crun.start_process(
                    what, args, container.id, stdin=-1, stdout=-1, stderr=-1,
                    console=terminal, command=request.args[0], on_exit=self._on_exit,
                )  # fmt: skip
                master = terminal.receive()
                os.set_blocking(master, False)
                self._sources[master] = pb.STDOUT
                self._stdin = os.dup(master)
                if request.HasField("window"):
                    set_window(master, request.window.width, request.window.height)
                return
            stdin = -1
            if request.stdin:
                stdin, self._stdin = os.pipe()
                ours.callback(os.close, stdin)
                os.set_blocking(self._stdin, False)
            writers = []
            for kind in (pb.STDOUT, pb.STDERR):
                reader, writer = os.pipe()
                ours.callback(os.close, writer)
                os.set_blocking(reader, False)
                self._sources[reader] = kind
                writers.append(writer)
            self._child = self._crun.start_process(
                what, args, container.id, stdin=stdin, stdout=writers[0], stderr=writers[1],
                console=None, command=request.args[0], on_exit=self._on_exit,
            )  # fmt: skip

    def _on_exit(self, exit_: Exit) -> None:
        os.eventfd_write(self._ended, 1)

    def _pump(self) -> None:
        channel = self._channel
        silent_since = 0.0
        while True:
            ended = self._child is not None and self._child.exit is not None
            if ended and not channel.congested:
                silent_since = silent_since or time.monotonic()
            if ended and (not self._sources or (silent_since and time.monotonic() - silent_since >= SILENCE_S)):
                break
            polls = Pollset()
            polls.add(channel.fileno(), channel.interest(read=len(self._stdin_data) < _STDIN_BOUND))
            if not ended:
                polls.add(self._ended, select.POLLIN)
            if self._stdin_data:
                polls.add(self._stdin, select.POLLOUT)
            if not channel.congested:
                for fd in self._sources:
                    polls.add(fd, select.POLLIN)
            ready = polls.wait(SILENCE_S if ended else None)
            self._serve_channel(ready.get(channel.fileno(), 0))
            if self._stdin in ready:
                self._write_stdin()
            for fd in [fd for fd in self._sources if fd in ready]:
                self._read_source(fd)
                silent_since = 0.0
        assert self._child is not None and self._child.exit is not None
        for kind in set(self._sources.values()):
            channel.send(frames.close_frame(kind))
        self._child.exit.oom_killed = self._cgroup.oom_kills() > 0
        channel.send(frames.encode(pb.EXIT, self._child.exit.frame().SerializeToString()))
        channel.flush()

    def _serve_channel(self, events: int) -> None:
        if events & select.POLLOUT:
            self._channel.push()
        if events & select.POLLIN:
            for frame in self._channel.receive():
                self._handle(frame)
        elif events & HANGUP:
            raise Closed("hung up")

    def _handle(self, frame: frames.Frame) -> None:
        try:
            if frame.type == pb.STDIN:
                if self._stdin >= 0 and not self._stdin_closing:
                    self._stdin_data += frame.payload
                    self._write_stdin()
                else:
                    self._channel.consumed(len(frame.payload), all_gone=True)
            elif frame.type == pb.CLOSE and frames.closed_stream(frame) == pb.STDIN:
                self._stdin_closing = True
                self._write_stdin()
            elif frame.type == pb.RESIZE:
                window = frame.parse(pb.WindowSize)
                if self._request.tty and self._stdin >= 0:
                    set_window(self._stdin, window.width, window.height)
            elif frame.type == pb.SIGNAL:
                number = frame.parse(pb.SignalFrame).signal
                if self._child is not None and 0 < number <= 64:
                    self._reaper.signal(self._child, number)
            else:
                raise Closed(f"frame of type {frame.type} on an exec stream")
        except frames.FrameError as e:
            raise Closed(str(e)) from e

    def _write_stdin(self) -> None:
        while self._stdin_data and self._stdin >= 0:
            try:
                written = os.write(self._stdin, memoryview(self._stdin_data)[:_READ])
            except BlockingIOError:
                return
            except OSError:
                # The process has closed its stdin: the rest goes nowhere, as in a shell's pipe.
                written = len(self._stdin_data)
                self._stdin_closing = True
            del self._stdin_data[:written]
            self._channel.consumed(written, all_gone=not self._stdin_data)
        if self._stdin_closing and not self._stdin_data and self._stdin >= 0 and not self._request.tty:
            os.close(self._stdin)
            self._stdin = -1

    def _read_source(self, fd: int) -> None:
        kind = self._sources[fd]
        try:
            data = os.read(fd, _READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""  # EIO: the terminal's last slave is closed
        if data:
            self._channel.send(frames.encode(kind, data))
            return
        os.close(fd)
        del self._sources[fd]
        self._channel.send(frames.close_frame(kind))

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
