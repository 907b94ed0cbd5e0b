"""Mounts as detached trees: open_tree(2), mount_setattr(2), move_mount(2) (Linux 5.12), through libc.

A tree is cloned from an open descriptor, gets its attributes while nothing can see it, and is attached in one step. So
no path is looked up twice, no container meets a mount that is not yet read-only, and a failure leaves nothing mounted.
"""

from __future__ import annotations

import ctypes
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from vmrt.libc import check, libc

_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_MOUNT_SETATTR = 428, 429, 442
_OPEN_TREE_CLONE = 1
_AT_EMPTY_PATH, _AT_RECURSIVE = 0x1000, 0x8000
_MOVE_MOUNT_F_EMPTY_PATH, _MOVE_MOUNT_T_EMPTY_PATH = 0x4, 0x40
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
# mount_setattr(2)
RDONLY, NOSUID, NODEV = 0x1, 0x2, 0x4
_IDMAP = 0x100000
# mount(2), as mount_setattr's propagation
PRIVATE, SLAVE = 1 << 18, 1 << 19


def clone(fd: int) -> int:
    """Return a descriptor of a detached copy of what `fd` (O_PATH will do) names, with all mounts below it."""
    flags = ctypes.c_uint(_OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_EMPTY_PATH | _AT_RECURSIVE)
    return check(libc().syscall(ctypes.c_long(_SYS_OPEN_TREE), fd, b"", flags), "open_tree")


def change(fd: int, *, attributes: int = 0, propagation: int = 0, recursive: bool = True) -> None:
    """Set attributes (`RDONLY`, ...) and the propagation type of the mount that `fd` names, or of the whole tree."""
    flags = ctypes.c_uint(_AT_EMPTY_PATH | (_AT_RECURSIVE if recursive else 0))
    wanted = struct.pack("QQQQ", attributes, 0, propagation, 0)
    size = ctypes.c_size_t(len(wanted))
    check(libc().syscall(ctypes.c_long(_SYS_MOUNT_SETATTR), fd, b"", flags, wanted, size), "mount_setattr")


def idmap(fd: int, userns_fd: int) -> None:
    """Have the whole tree that `fd` names show its files' owners as a user namespace maps them.

    Raises `OSError`: EINVAL when one of its file systems cannot do that.
    """
    wanted = struct.pack("QQQQ", _IDMAP, 0, 0, userns_fd)
    flags = ctypes.c_uint(_AT_EMPTY_PATH | _AT_RECURSIVE)
    size = ctypes.c_size_t(len(wanted))
    check(libc().syscall(ctypes.c_long(_SYS_MOUNT_SETATTR), fd, b"", flags, wanted, size), "mount_setattr")


def attach(tree_fd: int, target_fd: int) -> None:
    """Mount a detached tree on what `target_fd` names; the tree's own descriptor then names the mounted root."""
    flags = ctypes.c_uint(_MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH)
    check(libc().syscall(ctypes.c_long(_SYS_MOVE_MOUNT), tree_fd, b"", target_fd, b"", flags), "move_mount")


def detach(path: str) -> None:
    """Unmount lazily, with all below: busy or not, the name is free at once (umount2(2))."""
    check(libc().umount2(os.fsencode(path), _MNT_DETACH | _UMOUNT_NOFOLLOW), path)


@dataclass(frozen=True, slots=True)
class Entry:
    """A mount in this namespace: its id, its file system's device, what of that it shows, where, and of which type."""

    id: int
    device: str
    root: str
    place: str
    fstype: str

    def within(self, place: str) -> bool:
        """Say whether it is mounted at `place` or below it."""
        return self.place == place or self.place.startswith(place.rstrip("/") + "/")


def parse(line: str) -> Entry:
    """Return the mount that a line of /proc/PID/mountinfo tells of (proc_pid_mountinfo(5))."""
    before, _, after = line.partition(" - ")
    fields = before.split(" ")
    return Entry(int(fields[0]), fields[2], _unescape(fields[3]), _unescape(fields[4]), after.split(" ", 1)[0])


def mounts() -> list[Entry]:
    """Return the mounts of this namespace, oldest first."""
    with Path("/proc/self/mountinfo").open(encoding="utf-8", errors="surrogateescape") as lines:
        return [parse(line) for line in lines]


def entry_of(fd: int) -> Entry | None:
    """Return the mount through which a file was opened; None when it is not one of this namespace."""
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines():
        if line.startswith("mnt_id:"):
            number = int(line.partition(":")[2])
            return next((entry for entry in mounts() if entry.id == number), None)
    return None


def entries(path: Path) -> list[Entry]:
    """Return what is mounted at and below `path` in this namespace, oldest first; stacked ones appear repeatedly."""
    return [entry for entry in mounts() if entry.within(str(path))]


def _unescape(field: str) -> str:
    # Space, tab, newline and backslash are in octal.
    if "\\" not in field:
        return field
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(code, character)
    return field
