"""The "newc" cpio archive that the kernel unpacks as its initramfs.

Format: kernel, Documentation/driver-api/early-userspace/buffer-format.rst. Written here rather than by cpio(1) so that
the same input gives the same octets: inode numbers count up, times are 0, the owner is root, and device nodes need no
privilege.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from dataclasses import dataclass

_TRAILER = "TRAILER!!!"


@dataclass(frozen=True, slots=True)
class Entry:
    """One member: `name` is relative to the root; `mode` holds the type bits too; `rdev` is (major, minor)."""

    name: str
    mode: int
    data: bytes = b""
    rdev: tuple[int, int] = (0, 0)


def directory(name: str, permissions: int = 0o755) -> Entry:
    """Return a directory's entry."""
    return Entry(name, stat.S_IFDIR | permissions)


def file(name: str, data: bytes, permissions: int = 0o644) -> Entry:
    """Return a regular file's entry."""
    return Entry(name, stat.S_IFREG | permissions, data)


def character_device(name: str, major: int, minor: int, permissions: int = 0o600) -> Entry:
    """Return a character device node's entry."""
    return Entry(name, stat.S_IFCHR | permissions, rdev=(major, minor))


def archive(entries: Iterable[Entry]) -> bytes:
    """Return the archive. Directories must come before what is in them: the kernel creates members in order."""
    out = bytearray()
    for inode, entry in enumerate([*entries, Entry(_TRAILER, 0)], start=1):
        last = entry.name == _TRAILER
        name = entry.name.encode() + b"\0"
        fields = (
            0 if last else inode,
            entry.mode,
            0,  # uid
            0,  # gid
            2 if stat.S_ISDIR(entry.mode) else 1,  # links
            0,  # mtime
            len(entry.data),
            0,  # device of the file itself
            0,
            *entry.rdev,
            len(name),
            0,  # checksum, used by the "crc" variant only
        )
        out += b"070701" + b"".join(b"%08X" % field for field in fields) + name
        out += bytes(-len(out) % 4)
        out += entry.data
        out += bytes(-len(out) % 4)
    return bytes(out)
