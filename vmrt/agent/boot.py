"""What PID 1 does once, after it listens: the mounts of a Linux system and the cgroup tree.

Each mount is skipped where the initramfs has made it. A missing optional one (a kernel without mqueue) costs its users
only and is logged.
"""

from __future__ import annotations

import contextlib
import errno
import os

from vmrt.agent import cgroups, console, kernel, layout

_SAFE = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
# (target, type, flags, options), in order.
_MOUNTS = (
    ("/proc", "proc", _SAFE, ""),
    ("/sys", "sysfs", _SAFE, ""),
    ("/dev", "devtmpfs", kernel.MS_NOSUID, "mode=755"),
    ("/dev/pts", "devpts", kernel.MS_NOSUID | kernel.MS_NOEXEC, "mode=620,gid=5,ptmxmode=666"),
    ("/dev/shm", "tmpfs", _SAFE, "mode=1777"),
    ("/dev/mqueue", "mqueue", _SAFE, ""),
    ("/run", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755"),
    ("/tmp", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=1777"),
    ("/sys/fs/cgroup", "cgroup2", _SAFE, "nsdelegate,memory_recursiveprot"),
)  # fmt: skip
_DEV_LINKS = (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2"))


def mount_all() -> None:
    """Make the mounts and the agent's directories. Raises `OSError` when one that nothing works without fails."""
    mounted: set[str] = set()
    for target, fstype, flags, options in _MOUNTS:
        # Asked once /proc is there. The kernel itself refuses a second /proc, /sys or /dev (EBUSY).
        mounted = mounted or _mounted()
        if target in mounted:
            continue
        try:
            if target.startswith("/dev/"):
                os.makedirs(target, exist_ok=True)  # noqa: PTH103
            kernel.mount(fstype, target, fstype, flags, options)
        except OSError as e:
            if e.errno == errno.EBUSY:
                continue
            if target in ("/proc", "/sys", "/dev", "/run", "/sys/fs/cgroup"):
                raise
            console.log(f"mount {target}: {e.strerror}")
    for name, target in _DEV_LINKS:
        with contextlib.suppress(FileExistsError):
            os.symlink(target, f"/dev/{name}")  # noqa: PTH211
    for directory in (layout.RUN, layout.SANDBOX, layout.CONTAINERS, layout.SCRATCH):
        os.makedirs(directory, exist_ok=True)  # noqa: PTH103
    os.chmod(layout.RUN, 0o711)  # noqa: PTH101 - containers' files are no other user's business
    cgroups.set_up()


def _mounted() -> set[str]:
    try:
        with open("/proc/self/mounts", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
            return {line.split(" ", 2)[1] for line in file if line.count(" ") >= 2}
    except OSError:
        return set()
