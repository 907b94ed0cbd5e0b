"""The mount namespace of a VM's virtiofsd: where its volumes are mounted, and nowhere else on the host.

virtiofsd makes it when QEMU connects, with the share's directory as its root and no other mount in it. It goes with the
process, so whatever ends a VM takes its volumes' mounts along; a daemon that starts finds it by the process again.

A mount can only be made by who is in the namespace. So a thread enters it, does one system call's work and ends: root,
working directory and namespace are the thread's own. It sees the share as "/" and no other file of the host; what it
runs opens nothing but that and imports nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from vmrt import realtime, spawn
from vmrt.errors import VmGoneError, VmrtError
from vmrt.libc import check, libc
from vmrt.pods import mount_tree
from vmrt.spawn import ProcessId

# unshare(2), setns(2)
_CLONE_FS, _CLONE_NEWNS = 0x200, 0x20000
_PHASE = "volumes"


class ShareNamespace:
    """A namespace that is open for work. `of` makes one."""

    def __init__(self, proc_fd: int, namespace_fd: int) -> None:
        self._proc = proc_fd
        self._namespace = namespace_fd

    def seal(self) -> None:
        """Make the root read-only, without device nodes and set-user-ID bits, and deaf to the host's mounts.

        Its names are mount points: a guest that could make one would lead a later mount elsewhere.
        """

        def work() -> None:
            with _opened("/") as root:
                attributes = mount_tree.RDONLY | mount_tree.NOSUID | mount_tree.NODEV
                mount_tree.change(root, attributes=attributes, propagation=mount_tree.PRIVATE, recursive=False)

        self._inside(work)

    def attach(self, tree_fd: int, name: str) -> None:
        """Mount a detached tree on the entry `name` of the root. Raises `OSError`."""

        def work() -> None:
            with _opened(f"/{name}") as target:
                mount_tree.attach(tree_fd, target)

        self._inside(work)

    def detach(self, name: str) -> None:
        """Unmount all that is mounted on the entry `name`, and below; nothing there is no error. Raises `OSError`."""

        def work() -> None:
            try:
                while True:  # mounts may be stacked
                    mount_tree.detach(f"/{name}")
            except OSError as e:
                # EINVAL: it is no mount point (any more).
                if e.errno not in (errno.EINVAL, errno.ENOENT):
                    raise

        self._inside(work)

    def mounts_at(self, name: str) -> int:
        """Return how many mounts are on the entry `name` and below it. Raises `VmGoneError`."""
        try:
            fd = os.open("mountinfo", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._proc)
            with os.fdopen(fd, encoding="utf-8", errors="surrogateescape") as lines:
                return sum(mount_tree.parse(line).within(f"/{name}") for line in lines)
        except OSError as e:
            raise _gone() from e

    def _inside(self, work: Callable[[], None]) -> None:
        def body() -> None:
            # A mount namespace has a root and a working directory: who enters one must not share them.
            check(libc().unshare(_CLONE_FS), "unshare")
            check(libc().setns(self._namespace, _CLONE_NEWNS), "setns")
            work()

        realtime.in_own_thread("vmrt-share", body)


@contextlib.contextmanager
def of(process: ProcessId) -> Iterator[ShareNamespace]:
    """Open the namespace of exactly this virtiofsd. Raises `VmGoneError`, `VmrtError`."""
    with contextlib.ExitStack() as opened:
        try:
            # What is opened below it is this process's or an error, whoever gets its number later.
            proc = os.open(f"/proc/{process.pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            opened.callback(os.close, proc)
            if not spawn.alive(process):
                raise _gone()
            namespace = os.open("ns/mnt", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
            opened.callback(os.close, namespace)
        except OSError as e:
            raise _gone() from e
        if os.fstat(namespace).st_ino == Path("/proc/self/ns/mnt").stat().st_ino:
            raise VmrtError(
                "virtiofsd has no mount namespace of its own", phase=_PHASE, resource=f"process {process.pid}"
            )
        yield ShareNamespace(proc, namespace)


def _gone() -> VmGoneError:
    return VmGoneError("virtiofsd has ended, and its VM with it", phase=_PHASE)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        yield fd
    finally:
        os.close(fd)
