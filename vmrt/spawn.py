"""The only door to subprocesses.

Rules: no shell, ever; every child gets its own stdio (a child that inherits the daemon's pipes keeps them open);
arguments are logged in a form that can be pasted into a shell, so secrets never go into arguments; what a child prints
is bounded; a cancelled or timed-out `run` kills the child's whole process group before it raises.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


async def _started(*args: str, **options: Any) -> asyncio.subprocess.Process:
    """Start a child with a group of its own. Cancelled meanwhile, it kills the group before it lets the caller go.

    asyncio itself (3.11) would kill the child alone, and then wait for pipes that grandchildren keep open.
    """
    starting = asyncio.ensure_future(asyncio.create_subprocess_exec(*args, start_new_session=True, **options))
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        while not starting.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([starting])
        if not starting.cancelled() and starting.exception() is None:
            process = starting.result()
            kill_group(process.pid)
            await asyncio.shield(process.wait())
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
    try:
        process = await _started(
            *args,
            stdin=subprocess.DEVNULL if input_bytes is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=None if env is None else dict(env),
            cwd=cwd,
        )
    except OSError as e:
        raise ProcessError(
            f"cannot start {args[0]}: {e.strerror or e}",
            argv=args,
            phase=phase,
            resource=resource,
            hint="is it installed? `vmrt doctor` checks",
        ) from e

    async def feed() -> None:
        if input_bytes is not None and process.stdin is not None:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                process.stdin.write(input_bytes)
                await process.stdin.drain()
            process.stdin.close()

    try:
        async with asyncio.timeout(timeout_s):
            _, out, err = await asyncio.gather(
                feed(), _drain(process.stdout, OUTPUT_LIMIT_BYTES), _drain(process.stderr, OUTPUT_LIMIT_BYTES)
            )
            status = await process.wait()
    except TimeoutError as e:
        raise DeadlineError(f"{args[0]} did not finish within {timeout_s:g} s", phase=phase, resource=resource) from e
    finally:
        if process.returncode is None:
            kill_group(process.pid)
            await asyncio.shield(process.wait())
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


@contextlib.asynccontextmanager
async def piped(
    argv: Sequence[str | Path], *, stdout_fd: int | None = None, env: Mapping[str, str] | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a child with pipes on stdin, stderr and (without `stdout_fd`) stdout; kill its group at the end."""
    args = tuple(str(arg) for arg in argv)
    log.debug("pipe: %s", pasteable(args))
    try:
        process = await _started(
            *args,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if stdout_fd is None else stdout_fd,
            stderr=subprocess.PIPE,
            env=None if env is None else dict(env),
        )
    except OSError as e:
        raise ProcessError(f"cannot start {args[0]}: {e.strerror or e}", argv=args) from e
    try:
        yield process
    finally:
        if process.returncode is None:
            kill_group(process.pid)
            await asyncio.shield(process.wait())


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
    return None if fields[0] in "ZX" else ProcessId(pid, int(fields[19]))


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
        process = subprocess.Popen(
            args,
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
