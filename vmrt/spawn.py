"""The only door to subprocesses.

Rules: no shell, ever; every child gets its own stdio (a child that inherits the daemon's pipes keeps them open);
arguments are logged in a form that can be pasted into a shell, so secrets never go into arguments; what a child prints
is bounded; a cancelled or timed-out `run` kills the child's whole process group before it raises.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from vmrt import realtime
from vmrt.errors import DeadlineError, ProcessError

log = logging.getLogger(__name__)

OUTPUT_LIMIT_BYTES = 16 * 1024 * 1024
STDERR_TAIL_BYTES = 8 * 1024


@dataclass(frozen=True, slots=True)
class Completed:
    """What a finished child left: exit `status` and its bounded output."""

    status: int
    stdout: bytes
    stderr: bytes

    def text(self) -> str:
        """Return stdout as text, undecodable bytes replaced."""
        return self.stdout.decode(errors="replace")


def pasteable(argv: Sequence[str | Path]) -> str:
    """Return `argv` quoted for a POSIX shell."""
    return shlex.join(str(arg) for arg in argv)


async def _drain(reader: asyncio.StreamReader | None, limit: int) -> bytes:
    """Read to EOF, keeping at most `limit` bytes: the first ones of a long output, so that errors stay parseable."""
    if reader is None:
        return b""
    kept = bytearray()
    while chunk := await reader.read(65536):
        if len(kept) < limit:
            kept += chunk[: limit - len(kept)]
    return bytes(kept)


def kill_group(pid: int, sig: int = signal.SIGKILL) -> None:
    """Signal the process group that `pid` leads; a group that is gone is no error."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, sig)


class Child:
    """A started process that leads its own session: pipes as asyncio streams, and its end as something to wait for.

    Not asyncio's own: the cancellation of its start waits for whoever holds the pipes, or leaves the child's status to
    nobody. Here the start is one step, the end comes by a pidfd, and the process stays a zombie until `end`: its number
    is its group's until then, so that killing the group can hit nobody else.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._transports: list[asyncio.ReadTransport | asyncio.WriteTransport] = []
        self.pid = process.pid
        self.stdin: asyncio.StreamWriter | None = None
        self.stdout: asyncio.StreamReader | None = None
        self.stderr: asyncio.StreamReader | None = None
        self._pidfd = os.pidfd_open(process.pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._on_exit)

    @property
    def returncode(self) -> int | None:
        """The exit status, -n after a signal n; None while it runs."""
        return self._exited.result() if self._exited.done() else None

    async def wait(self) -> int:
        """Wait for its end; return its status."""
        return await asyncio.shield(self._exited)

    async def connect(self) -> None:
        """Make streams of its pipes."""
        if self._process.stdin is not None:
            loop = asyncio.get_running_loop()
            transport, protocol = await loop.connect_write_pipe(
                lambda: asyncio.StreamReaderProtocol(asyncio.StreamReader()), self._process.stdin
            )
            self._transports.append(transport)
            self.stdin = asyncio.StreamWriter(transport, protocol, None, loop)
        self.stdout = await self._reader(self._process.stdout)
        self.stderr = await self._reader(self._process.stderr)

    async def _reader(self, pipe: IO[bytes] | None) -> asyncio.StreamReader | None:
        if pipe is None:
            return None
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), pipe
        )
        self._transports.append(transport)
        return reader

    def _on_exit(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        result = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if result is None:  # cannot be: the pidfd said that it has ended
            self._exited.set_result(-signal.SIGKILL)
        else:
            self._exited.set_result(result.si_status if result.si_code == os.CLD_EXITED else -result.si_status)

    async def end(self, *, kill: bool) -> None:
        """Reap it and close the pipes; with `kill`, or when it still runs, its group is killed first.

        Never cut short: a cancellation meanwhile is raised when it is done.
        """
        if kill or not self._exited.done():
            kill_group(self.pid)
        cancelled: asyncio.CancelledError | None = None
        while not self._exited.done():
            try:
                await asyncio.shield(self._exited)
            except asyncio.CancelledError as e:
                cancelled = e
        # In a thread: taking a zombie's status has been seen to keep its caller for 110 ms on a busy machine.
        reaped = asyncio.get_running_loop().run_in_executor(None, self._process.wait)
        while not reaped.done():
            try:
                await asyncio.shield(reaped)
            except asyncio.CancelledError as e:
                cancelled = e
        for transport in self._transports:
            if not isinstance(transport, asyncio.WriteTransport):
                transport.close()
            elif not transport.is_closing() or transport.get_write_buffer_size():
                # What is still to be written has no reader any more.
                transport.abort()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()
        if cancelled is not None:
            raise cancelled


@contextlib.asynccontextmanager
async def _started(
    args: tuple[str, ...],
    *,
    stdin: int,
    stdout: int,
    env: Mapping[str, str] | None,
    cwd: Path | None = None,
    phase: str = "",
    resource: str = "",
) -> AsyncIterator[Child]:
    """Run a child with a pipe on stderr; at the end of an unclean use its group is killed."""
    try:
        child = _start(args, stdin=stdin, stdout=stdout, env=env, cwd=cwd)
    except OSError as e:
        raise ProcessError(
            f"cannot start {args[0]}: {e.strerror or e}",
            argv=args,
            phase=phase,
            resource=resource,
            hint="is it installed? `vmrt doctor` checks",
        ) from e
    kill = True
    try:
        await child.connect()
        yield child
        kill = False
    finally:
        await child.end(kill=kill)


def _found(args: tuple[str, ...], env: Mapping[str, str] | None) -> tuple[str, ...]:
    """Return a command with the path of its program, so that a missing one is known before the start."""
    path = None if env is None else env.get("PATH", os.defpath)
    program = shutil.which(args[0], path=path)
    if program is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    return (program, *args[1:])


def _start(args: tuple[str, ...], *, stdin: int, stdout: int, env: Mapping[str, str] | None, cwd: Path | None) -> Child:
    """Start a child; after a failure nothing of it is left."""
    with realtime.hurried() as prefix:
        process = subprocess.Popen(
            (*prefix, *(args if not prefix else _found(args, env))),
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=None if env is None else dict(env),
            cwd=cwd,
            start_new_session=True,
        )
    try:
        return Child(process)
    except BaseException:
        kill_group(process.pid)
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
        raise


async def run(
    argv: Sequence[str | Path],
    *,
    input_bytes: bytes | None = None,
    timeout_s: float | None = 60.0,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    check: bool = True,
    phase: str = "",
    resource: str = "",
) -> Completed:
    """Run a command to its end and return what it printed.

    Raises `ProcessError` when the program is missing or, with `check`, exits non-zero (its stderr's tail is in the
    message), and `DeadlineError` after `timeout_s`. On cancellation the child's process group is killed and reaped.
    """
    args = tuple(str(arg) for arg in argv)
    log.debug("run: %s", pasteable(args))
    stdin = subprocess.DEVNULL if input_bytes is None else subprocess.PIPE
    async with _started(
        args, stdin=stdin, stdout=subprocess.PIPE, env=env, cwd=cwd, phase=phase, resource=resource
    ) as child:
        try:
            async with asyncio.timeout(timeout_s):
                _, out, err = await asyncio.gather(
                    _feed(child.stdin, input_bytes),
                    _drain(child.stdout, OUTPUT_LIMIT_BYTES),
                    _drain(child.stderr, OUTPUT_LIMIT_BYTES),
                )
                status = await child.wait()
        except TimeoutError as e:
            message = f"{args[0]} did not finish within {timeout_s:g} s"
            raise DeadlineError(message, phase=phase, resource=resource) from e
    if check and status != 0:
        tail = err[-STDERR_TAIL_BYTES:].decode(errors="replace").strip()
        raise ProcessError(
            f"{Path(args[0]).name} failed with status {status}: {tail or 'no message'}",
            argv=args,
            status=status,
            stderr=tail,
            phase=phase,
            resource=resource,
        )
    return Completed(status, out, err)


async def _feed(writer: asyncio.StreamWriter | None, data: bytes | None) -> None:
    """Write it all and close; a child that does not want it is no error."""
    if writer is not None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            writer.write(data or b"")
            await writer.drain()
        writer.close()


@contextlib.asynccontextmanager
async def piped(
    argv: Sequence[str | Path], *, stdout_fd: int | None = None, env: Mapping[str, str] | None = None
) -> AsyncIterator[Child]:
    """Run a child with pipes on stdin, stderr and (without `stdout_fd`) stdout; kill one that still runs at the end.

    Its whole group is killed, also when the use of it fails.
    """
    args = tuple(str(arg) for arg in argv)
    log.debug("pipe: %s", pasteable(args))
    stdout = subprocess.PIPE if stdout_fd is None else stdout_fd
    async with _started(args, stdin=subprocess.PIPE, stdout=stdout, env=env) as child:
        yield child


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process named so that a reused pid is not taken for it: `start_ticks` is field 22 of proc_pid_stat(5)."""

    pid: int
    start_ticks: int


_children: dict[int, subprocess.Popen[bytes]] = {}


def identify(pid: int) -> ProcessId | None:
    """Return the identity of a live process; None for one that is gone or a zombie."""
    child = _children.get(pid)
    if child is not None and child.poll() is not None:
        del _children[pid]
        return None
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The command name may hold spaces and parentheses: fields are counted from the last ")".
    fields = stat[stat.rindex(")") + 2 :].split()
    if fields[0] in "ZX":
        # It ended between the two looks.
        if child is not None and child.poll() is not None:
            _children.pop(pid, None)
        return None
    return ProcessId(pid, int(fields[19]))


def alive(process: ProcessId) -> bool:
    """Say whether exactly this process (not another one with its pid) still runs."""
    return identify(process.pid) == process


def terminate(process: ProcessId, sig: int = signal.SIGKILL) -> None:
    """Signal exactly this process; one that is gone is no error."""
    if alive(process):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, sig)


@contextlib.contextmanager
def holding(argv: Sequence[str | Path]) -> Iterator[int]:
    """Run a child, without stdio, for as long as the block lasts; yields its pid. For threads: it waits for its end.

    Raises `ProcessError` when it cannot be started. That it has ended early shows in /proc only.
    """
    args = tuple(str(arg) for arg in argv)
    log.debug("hold: %s", pasteable(args))
    null = subprocess.DEVNULL
    try:
        process = subprocess.Popen(args, stdin=null, stdout=null, stderr=null, start_new_session=True)
    except OSError as e:
        raise ProcessError(f"cannot start {args[0]}: {e.strerror or e}", argv=args) from e
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def detached(
    argv: Sequence[str | Path],
    *,
    log_fd: int | None = None,
    pass_fds: Sequence[int] = (),
    env: Mapping[str, str] | None = None,
    owner: tuple[int, int] | None = None,
) -> ProcessId:
    """Start a helper that outlives this process: its own session, no inherited stdio; return its identity.

    stdout and stderr go to `log_fd`, else to /dev/null. `owner` (uid, gid) runs it as that user, without supplementary
    groups. Raises `ProcessError` when it cannot be started.
    """
    args = tuple(str(arg) for arg in argv)
    if owner is not None:
        # Not Popen's user=: with it CPython forks instead of vforking, which copies the daemon's page tables and runs
        # the fork handlers of every library in the process (grpc's crash there). setpriv(1) execs: the pid is the same.
        args = ("setpriv", f"--reuid={owner[0]}", f"--regid={owner[1]}", "--clear-groups", "--", *args)
    log.debug("detach: %s", pasteable(args))
    sink = subprocess.DEVNULL if log_fd is None else log_fd
    try:
        with realtime.hurried() as prefix:
            process = subprocess.Popen(
                (*prefix, *(args if not prefix else _found(args, env))),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env=None if env is None else dict(env),
                pass_fds=tuple(pass_fds),
                start_new_session=True,
            )
    except OSError as e:
        raise ProcessError(f"cannot start {args[0]}: {e.strerror or e}", argv=args) from e
    # Kept so that `identify` can reap it: an unreaped child would look alive for ever.
    _children[process.pid] = process
    identity = identify(process.pid)
    if identity is None:
        raise ProcessError(f"{args[0]} exited at once with status {process.returncode}", argv=args)
    return identity
