"""System calls that Python 3.11 does not offer, through libc.

ctypes is imported on first use: it costs the emulated guest some tens of milliseconds, which the boot until the agent
listens must not pay.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ctypes

# mount(2)
MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_REMOUNT = 0x20
MS_BIND = 0x1000
MS_REC = 0x4000
MS_SHARED = 1 << 20
MNT_DETACH = 0x2
# sched.h
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
# open_tree(2), move_mount(2), mount_setattr(2)
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_MOUNT_SETATTR = 428, 429, 442
_OPEN_TREE_CLONE = 1
_AT_EMPTY_PATH, _AT_FDCWD = 0x1000, -100
_MOVE_MOUNT_F_EMPTY_PATH = 0x4
_MOUNT_ATTR_IDMAP = 0x100000
_SYS_SETRESUID = 117
# openat2(2)
_SYS_OPENAT2 = 437
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_IN_ROOT = 0x10
# reboot(2)
_RB_POWER_OFF = 0x4321FEDC
# prctl(2)
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36

_libc: ctypes.CDLL | None = None


def load() -> ctypes.CDLL:
    """Load libc; what calls the functions below in a fork does so before it."""
    global _libc
    if _libc is None:
        import ctypes

        _libc = ctypes.CDLL(None, use_errno=True)
    return _libc


def _check(result: int, filename: str = "") -> int:
    if result < 0:
        import ctypes

        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno), filename) if filename else OSError(errno, os.strerror(errno))
    return result


def mount(source: str, target: str, fstype: str, flags: int = 0, data: str = "") -> None:
    """Mount a file system (mount(2)). Raises `OSError` naming the target."""
    libc = load()
    args = (os.fsencode(source), os.fsencode(target), os.fsencode(fstype))
    _check(libc.mount(*args, _ulong(flags), os.fsencode(data) if data else None), target)


def umount(target: str, flags: int = MNT_DETACH) -> None:
    """Unmount (umount2(2)), by default at once and with everything below it. Raises `OSError` naming the target."""
    _check(load().umount2(os.fsencode(target), flags), target)


def unshare(flags: int) -> None:
    """Leave namespaces (unshare(2)), for the calling thread where the flags allow that."""
    _check(load().unshare(flags))


def setns(fd: int, kind: int) -> None:
    """Move the calling thread into a namespace (setns(2))."""
    _check(load().setns(fd, kind))


def idmap(path: str, userns_fd: int) -> None:
    """Replace the mount at `path` by one whose owners are shifted as the user namespace maps them.

    mount_setattr(2), MOUNT_ATTR_IDMAP: only a detached mount can be given a mapping. Raises `OSError` naming the path,
    EINVAL for a file system that cannot be id-mapped; the mount is gone then.
    """
    import ctypes
    import struct

    libc = load()
    flags = ctypes.c_uint(_OPEN_TREE_CLONE | os.O_CLOEXEC)
    number = ctypes.c_long
    tree = _check(libc.syscall(number(_SYS_OPEN_TREE), _AT_FDCWD, os.fsencode(path), flags), path)
    try:
        umount(path)
        wanted = struct.pack("QQQQ", _MOUNT_ATTR_IDMAP, 0, 0, userns_fd)
        empty = ctypes.c_uint(_AT_EMPTY_PATH)
        size = ctypes.c_size_t(len(wanted))
        _check(libc.syscall(number(_SYS_MOUNT_SETATTR), tree, b"", empty, wanted, size), path)
        flags = ctypes.c_uint(_MOVE_MOUNT_F_EMPTY_PATH)
        target = os.fsencode(path)
        _check(libc.syscall(number(_SYS_MOVE_MOUNT), tree, b"", _AT_FDCWD, target, flags), path)
    finally:
        os.close(tree)


def set_thread_euid(uid: int) -> None:
    """Change the effective uid of the calling thread alone (setresuid(2) without libc, which changes all threads)."""
    keep = 2**32 - 1
    import ctypes

    ids = (ctypes.c_uint(number) for number in (keep, uid, keep))
    _check(load().syscall(ctypes.c_long(_SYS_SETRESUID), *ids))


def set_process_name(name: str) -> None:
    """Set what ps(1) shows as the calling thread's command (PR_SET_NAME), at most 15 octets."""
    _check(load().prctl(_PR_SET_NAME, name.encode(), 0, 0, 0))


def become_subreaper() -> None:
    """Have orphans reparented to this process although it is not PID 1 (PR_SET_CHILD_SUBREAPER)."""
    _check(load().prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))


def open_in_root(root_fd: int, path: str, flags: int, mode: int = 0) -> int:
    """Open `path` as a process chrooted to `root_fd` would: no symbolic link leads out (openat2(2), RESOLVE_IN_ROOT).

    Returns a descriptor. Raises `OSError`.
    """
    import ctypes
    import struct

    how = struct.pack("QQQ", flags | os.O_CLOEXEC, mode, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
    buffer = ctypes.create_string_buffer(how, len(how))
    libc = load()
    result = libc.syscall(
        ctypes.c_long(_SYS_OPENAT2), root_fd, os.fsencode(path or "."), buffer, ctypes.c_size_t(len(how))
    )
    return _check(result, path)


def power_off() -> None:
    """Power the machine off at once, file systems as they are (reboot(2))."""
    _check(load().reboot(_RB_POWER_OFF))


def _ulong(value: int) -> ctypes.c_ulong:
    import ctypes

    return ctypes.c_ulong(value)
