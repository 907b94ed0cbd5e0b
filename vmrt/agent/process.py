"""Child processes and the one place that waits for them.

PID 1 inherits every orphan of the guest, so nothing may call waitpid() for a child of its own: `Reaper.run` collects
them all and tells the `Child` that was registered for the pid. Rules:

- a child is registered under the reaper's lock before its exit can be looked up (`spawn`);
- a process that another one leaves to us (crun's container) is taken over inside `with reaper.adopting():`. While
  anyone adopts, exits of unknown processes are kept, so a process that ends before its pid was read is not lost;
- a pid stays a zombie, and so cannot be reused, until the lock is held: `signal` never hits a stranger.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time

from vmrt.agent import agent_pb2 as pb
from vmrt.agent import console

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

# What containers' helpers run with; the agent's own environment is the kernel's command line.
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
DEVNULL = -1


class Exit:
    """How a process ended: `code` as a shell counts it (128 + `signal` when killed by one), at `at_ns` (monotonic)."""

    __slots__ = ("at_ns", "code", "oom_killed", "signal")

    def __init__(self, wait_status: int) -> None:
        self.signal = os.WTERMSIG(wait_status) if os.WIFSIGNALED(wait_status) else 0
        self.code = 128 + self.signal if self.signal else os.WEXITSTATUS(wait_status)
        self.at_ns = time.monotonic_ns()
        self.oom_killed = False

    def frame(self) -> pb.ExitFrame:
        """Return it as the protocol tells it."""
        age_us = max(0, time.monotonic_ns() - self.at_ns) // 1000
        return pb.ExitFrame(code=self.code, signal=self.signal, oom_killed=self.oom_killed, age_us=age_us)


class Child:
    """A process that we started or adopted."""

    def __init__(self, pid: int, on_exit: Callable[[Exit], None] | None = None) -> None:
        self.pid = pid
        self.exit: Exit | None = None
        self._on_exit = on_exit
        self._ended = threading.Event()

    def wait(self, timeout_s: float | None = None) -> Exit | None:
        """Wait for its end, and for `on_exit` to have run; None when it still runs after `timeout_s`."""
        self._ended.wait(timeout_s)
        return self.exit

    def _tell(self, exit_: Exit) -> None:
        self.exit = exit_
        try:
            if self._on_exit is not None:
                self._on_exit(exit_)
        except Exception as e:  # the reaper is PID 1: its end would be the VM's
            console.log(f"exit of process {self.pid}: {type(e).__name__}: {e}")
        finally:
            self._ended.set()


class Reaper:
    """All children of this process."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._children: dict[int, Child] = {}
        self._adoptions = 0
        self._unclaimed: dict[int, Exit] = {}

    def spawn(
        self,
        argv: Sequence[str],
        *,
        stdin: int = DEVNULL,
        stdout: int = DEVNULL,
        stderr: int = DEVNULL,
        inherit: Sequence[int] = (),
        env: Mapping[str, str] = ENVIRONMENT,
        on_exit: Callable[[Exit], None] | None = None,
    ) -> Child:
        """Start a program (looked up in PATH when it has no slash) in a session of its own. Raises `OSError`.

        It gets the three descriptors, and those of `inherit` (above 2) under their own numbers; all stay the caller's.
        `on_exit` runs in the reaper's thread and must be quick.
        """
        actions: list[tuple[int, int, int] | tuple[int, int, str, int, int]] = []
        for target, fd in enumerate((stdin, stdout, stderr)):
            if fd == DEVNULL:
                actions.append((os.POSIX_SPAWN_OPEN, target, "/dev/null", os.O_RDWR, 0))
            else:
                actions.append((os.POSIX_SPAWN_DUP2, fd, target))
        # Onto itself: the child's copy loses the close-on-exec flag, ours keeps it.
        actions.extend((os.POSIX_SPAWN_DUP2, fd, fd) for fd in inherit)
        with self._lock:
            # SIGPIPE, SIGXFSZ: Python has them ignored.
            pid = os.posix_spawnp(
                argv[0], list(argv), dict(env), file_actions=actions, setsid=True, setsigmask=(), setsigdef=(13, 25)
            )
            child = self._children[pid] = Child(pid, on_exit)
            self._lock.notify_all()
        return child

    def register(self, start: Callable[[], int]) -> Child:
        """Call `start`, which forks and returns a pid, and register that child."""
        with self._lock:
            pid = start()
            child = self._children[pid] = Child(pid)
            self._lock.notify_all()
        return child

    @contextlib.contextmanager
    def adopting(self) -> Iterator[None]:
        """Keep the exits of unknown processes until the block ends, for `adopt` inside it."""
        with self._lock:
            self._adoptions += 1
        try:
            yield
        finally:
            with self._lock:
                self._adoptions -= 1
                if self._adoptions == 0:
                    self._unclaimed.clear()

    def adopt(self, pid: int, on_exit: Callable[[Exit], None] | None = None) -> Child:
        """Take over a process that was, or is about to be, reparented to us; call it inside `adopting`."""
        with self._lock:
            child = Child(pid, on_exit)
            ended = self._unclaimed.pop(pid, None)
            if ended is None:
                self._children[pid] = child
                self._lock.notify_all()
        if ended is not None:
            child._tell(ended)
        return child

    def signal(self, child: Child, number: int) -> bool:
        """Send a signal; False when the process has ended. Raises `OSError` (EINVAL) for no signal number."""
        with self._lock:
            if self._children.get(child.pid) is not child:
                return False
            try:
                os.kill(child.pid, number)
            except ProcessLookupError:
                return False
            return True

    def pidfd(self, child: Child) -> int:
        """Return a descriptor of a child's process, to be closed by the caller. Raises `ProcessLookupError`."""
        with self._lock:
            if self._children.get(child.pid) is not child:
                raise ProcessLookupError(errno.ESRCH, "the process has ended")
            return os.pidfd_open(child.pid)

    def run(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Collect children for ever, or until `stop` returns true after some exit."""
        while not stop():
            try:
                # WNOWAIT leaves the zombie, and with it the pid, until the lock is held.
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
            except ChildProcessError:
                with self._lock:
                    # Until there is a child; one that was adopted early (still its parent's) is polled for.
                    self._lock.wait(0.05 if self._children else None)
                continue
            if found is not None:
                self._collect(found.si_pid)

    def _collect(self, pid: int) -> None:
        with self._lock:
            try:
                reaped, wait_status = os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                return
            if reaped == 0:
                return
            ended = Exit(wait_status)
            child = self._children.pop(pid, None)
            if child is None and self._adoptions:
                self._unclaimed[pid] = ended
        if child is not None:
            child._tell(ended)
