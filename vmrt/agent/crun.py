"""The door to crun: command lines, its log as the source of errors, and terminals over its console socket.

crun's standard streams are the container's, so its own messages go to a log file (JSON lines). `create` and `exec -d`
return when the process exists; the process is then reparented to us and adopted by the pid that crun wrote.
"""

from __future__ import annotations

import _socket
import contextlib
import os
import select
import struct

from vmrt.agent import sockets, status, zygote
from vmrt.agent.process import DEVNULL

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from vmrt.agent.process import Child, Exit, Reaper

STATE = "/run/vmrt/crun"
# The kernel takes 4096 instructions of 8 octets.
_FILTER_BYTES = 4096 * 8
_FILTERS = 16
_FILTER_ANNOTATION = "run.oci.seccomp_bpf_data"
_CONSOLES = "/run/vmrt/tty"
_LOG_LIMIT = 16384
# crun's own words for a command that cannot be started (libcrun: find_executable, exec).
_COMMAND_ERRORS = (
    *("executable file", "open executable", "exec format error", "cannot be executed"),
    *("but it is not executable", "` is not a regular file"),  # crun 1.21
)
_COMMAND_LIMIT = 256
DEFAULT_TIMEOUT_S = 60.0


def parse_log(text: str) -> str:
    """Return the messages of crun's JSON log as one line; what is no JSON is kept as it is."""
    import json

    messages = []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            message = str(entry["msg"])
        except (ValueError, KeyError, TypeError):
            message = line.strip()
        if message and message not in messages:
            messages.append(message)
    return "; ".join(messages)


def refusal(what: str, log: str, command: str = "") -> status.AgentError:
    """Return the error for a failed crun: INVALID_ARGUMENT when the container's command or directory is to blame.

    `command` is the program that was to run: crun does not always name it.
    """
    message = parse_log(log) or "crun failed without a message"
    lower = message.lower()
    wrong_command = any(words in lower for words in _COMMAND_ERRORS) or lower.startswith("chdir")
    if wrong_command and command and command not in message:
        message = f"command {command[:_COMMAND_LIMIT]!r}: {message}"
    return status.AgentError(status.INVALID_ARGUMENT if wrong_command else status.INTERNAL, f"{what}: {message}")


def filter_path(container_id: str) -> str:
    """Return the file in which crun keeps a container's compiled seccomp filter."""
    return f"{STATE}/{container_id}/seccomp.bpf"


def _profile(spec: dict[str, Any]) -> str:
    import json

    profile = spec["linux"].get("seccomp")
    return json.dumps(profile) if profile and not profile.get("listenerPath") else ""


class Crun:
    """Runs crun. All methods raise `AgentError` with crun's message."""

    def __init__(self, reaper: Reaper) -> None:
        self._reaper = reaper
        self._zygote = zygote.Zygote(reaper)
        self._numbers = 0
        self._version = ""
        self._filters: dict[str, str] = {}  # seccomp profile as JSON -> the filter that crun made of it, base64

    @property
    def version(self) -> str:
        """The first line of `crun --version`; "" when it has not been asked yet or cannot be run."""
        return self._version

    def ask_version(self) -> None:
        """Run `crun --version`, once. The first run also loads crun, which the first container needs."""
        if not self._version:
            reader, writer = os.pipe()
            try:
                self._zygote.spawn(["crun", "--version"], stdin=DEVNULL, stdout=writer, stderr=DEVNULL).wait(10.0)
                os.set_blocking(reader, False)
                self._version = os.read(reader, 4096).decode(errors="replace").partition("\n")[0]
            except OSError:
                pass
            finally:
                os.close(reader)
                os.close(writer)

    def run(
        self,
        what: str,
        args: Sequence[str],
        *,
        stdin: int = DEVNULL,
        stdout: int = DEVNULL,
        stderr: int = DEVNULL,
        command: str = "",
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        """Run one crun command to its end; `what` begins the error message, `command` is what crun is to start."""
        log = f"/run/vmrt/crun.{self._number()}.log"
        argv = ["crun", "--root", STATE, f"--log={log}", "--log-format=json", "--cgroup-manager=cgroupfs", *args]
        try:
            try:
                child = self._zygote.spawn(argv, stdin=stdin, stdout=stdout, stderr=stderr)
            except OSError as e:
                raise status.from_os_error(e, f"{what}: start crun") from e
            ended = child.wait(timeout_s)
            if ended is None:
                self._reaper.signal(child, 9)
                raise status.AgentError(
                    status.DEADLINE_EXCEEDED, f"{what}: crun {args[0]} did not finish within {timeout_s:.0f} s"
                )
            if ended.code != 0:
                raise refusal(what, _read(log, _LOG_LIMIT) or f"crun {args[0]} exited with {ended.code}", command)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(log)  # noqa: PTH108

    def know_filter(self, spec: dict[str, Any]) -> None:
        """Tell crun the seccomp filter of a profile that it has compiled before in this VM.

        Compiling one of some 300 system calls takes an emulated guest longer than the rest of `crun create`; Debian's
        crun is built without its own cache. The annotation is crun's (crun(1), run.oci.seccomp_bpf_data).
        """
        if known := self._filters.get(_profile(spec)):
            spec["annotations"] = {**spec.get("annotations", {}), _FILTER_ANNOTATION: known}

    def keep_filter(self, container_id: str, spec: dict[str, Any]) -> None:
        """Keep the filter of a container that crun has created."""
        profile = _profile(spec)
        if profile and profile not in self._filters and len(self._filters) < _FILTERS:
            import binascii

            with contextlib.suppress(OSError):
                fd = os.open(filter_path(container_id), os.O_RDONLY | os.O_CLOEXEC)
                try:
                    self._filters[profile] = binascii.b2a_base64(os.read(fd, _FILTER_BYTES), newline=False).decode()
                finally:
                    os.close(fd)

    def start(self, what: str, container_id: str) -> None:
        """Let the container's process go on to its command, as `crun start` does: by one octet in a FIFO.

        crun's own start would take 50 ms of an emulated guest, to load its libraries and to read its state. It runs
        poststart hooks too: a container that has some is started by `run`.
        """
        fifo = f"{STATE}/{container_id}/exec.fifo"
        try:
            # Not blocking: a process that is gone reads nothing any more (ENXIO).
            fd = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                os.unlink(fifo)  # noqa: PTH108 - what crun, too, tells a created container by
                os.write(fd, b"0")
            finally:
                os.close(fd)
        except OSError as e:
            raise status.from_os_error(e, what) from e

    def start_process(
        self,
        what: str,
        args: Sequence[str],
        container_id: str,
        *,
        stdin: int,
        stdout: int,
        stderr: int,
        console: Console | None,
        command: str,
        on_exit: Callable[[Exit], None] | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> Child:
        """Run `create` or `exec -d` of `command` and adopt the process that it leaves."""
        pid_file = f"/run/vmrt/crun.{self._number()}.pid"
        options = [f"--pid-file={pid_file}"]
        if console is not None:
            options.append(f"--console-socket={console.path}")
        try:
            with self._reaper.adopting():
                argv = [args[0], *options, *args[1:], container_id]
                self.run(what, argv, stdin=stdin, stdout=stdout, stderr=stderr, command=command, timeout_s=timeout_s)
                try:
                    pid = int(_read(pid_file, 32))
                except ValueError:
                    raise status.AgentError(status.INTERNAL, f"{what}: crun wrote no pid") from None
                return self._reaper.adopt(pid, on_exit)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(pid_file)  # noqa: PTH108

    def console(self) -> Console:
        """Make a socket on which crun hands over the master side of a terminal."""
        return Console(f"{_CONSOLES}.{self._number()}")

    def _number(self) -> int:
        self._numbers += 1  # a duplicate is impossible: the interpreter's lock makes each caller see its own value
        return self._numbers


class Console:
    """The listening end of a console socket (runtime-spec, "console-socket"; SCM_RIGHTS of unix(7))."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        self._listener.bind(path)
        self._listener.listen(1)

    def receive(self, timeout_s: float = 5.0) -> int:
        """Return the terminal's master descriptor. Raises `AgentError` when crun sent none."""
        poll = select.poll()
        poll.register(self._listener.fileno(), select.POLLIN)
        if not poll.poll(timeout_s * 1000):
            raise status.AgentError(status.INTERNAL, "crun did not hand over the terminal")
        connection, _ = sockets.accept(self._listener)
        try:
            connection.settimeout(timeout_s)
            _, ancillary, _, _ = connection.recvmsg(4096, _socket.CMSG_LEN(4), _socket.MSG_CMSG_CLOEXEC)
        finally:
            connection.close()
        for level, kind, data in ancillary:
            if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS and len(data) >= 4:
                master: int = struct.unpack("=i", data[:4])[0]
                return master
        raise status.AgentError(status.INTERNAL, "crun sent no terminal on its console socket")

    def close(self) -> None:
        """Close and remove the socket."""
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)  # noqa: PTH108


def _read(path: str, limit: int) -> str:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return os.read(fd, limit).decode(errors="replace")
    finally:
        os.close(fd)
