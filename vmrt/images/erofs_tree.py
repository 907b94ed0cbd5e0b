"""Directories and their attributes read back from the images that `vmrt.images.erofs` writes, and from no others.

Nothing is kept open: an image has up to hundreds of layers, which is more descriptors than one look at them should
take. A file that is not what the writer makes raises `ErofsError`.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR

from vmrt.images.erofs import (
    BLOCK,
    DIRENT,
    FILE_TYPE_DIRECTORY,
    FLAT_INLINE,
    FLAT_PLAIN,
    INODE,
    INODE_BYTES,
    MAGIC,
    SLOT_BYTES,
    SUPER,
    SUPER_OFFSET,
    XATTR_PREFIXES,
    Attributes,
    ErofsError,
)

_PREFIXES = {index: prefix for prefix, index in XATTR_PREFIXES}


@dataclass(frozen=True, slots=True)
class _Inode:
    attributes: Attributes
    size: int
    address: int
    inline_at: int  # where the inline tail is in the image, 0 for none


class ErofsTree:
    """One image. `root` is its root directory's inode number."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._opened() as fd:
            magic, *rest = SUPER.unpack(self._exactly(fd, SUPER.size, SUPER_OFFSET))
        if magic != MAGIC:
            raise ErofsError(f"{path.name} is no EROFS image")
        self.root: int = rest[4]

    def attributes(self, nid: int) -> Attributes:
        """Return a directory's attributes."""
        with self._opened() as fd:
            return self._inode(fd, nid).attributes

    def entries(self, nid: int) -> dict[bytes, tuple[int, bool]]:
        """Return what a directory holds: names to (inode number, whether it is a directory)."""
        with self._opened() as fd:
            inode = self._inode(fd, nid)
            tail = inode.size % BLOCK if inode.inline_at else 0
            data = self._exactly(fd, inode.size - tail, inode.address * BLOCK)
            data += self._exactly(fd, tail, inode.inline_at)
        found: dict[bytes, tuple[int, bool]] = {}
        with self._understood():
            for at in range(0, len(data), BLOCK):
                _dirents(data[at : at + BLOCK], found)
            del found[b"."], found[b".."]
        return found

    @contextmanager
    def _opened(self) -> Iterator[int]:
        fd = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def _understood(self) -> Iterator[None]:
        try:
            yield
        except (struct.error, LookupError) as e:
            raise ErofsError(f"{self._path.name} is damaged") from e

    def _exactly(self, fd: int, size: int, offset: int) -> bytes:
        # Before any memory is asked for: a damaged size may be anything.
        if offset + size > os.fstat(fd).st_size:
            raise ErofsError(f"{self._path.name} is damaged or cut short")
        out = b""
        while len(out) < size:
            chunk = os.pread(fd, size - len(out), offset + len(out))
            if not chunk:
                raise ErofsError(f"{self._path.name} is cut short")
            out += chunk
        return out

    def _inode(self, fd: int, nid: int) -> _Inode:
        at = nid * SLOT_BYTES
        head = INODE.unpack(self._exactly(fd, INODE_BYTES, at))
        form, count, mode, _, size, address, _, uid, gid, seconds, nanoseconds, _ = head
        if form & 1 == 0 or form >> 1 not in (FLAT_PLAIN, FLAT_INLINE) or not S_ISDIR(mode):
            raise ErofsError(f"{self._path.name} has no directory at inode {nid}")
        body = self._exactly(fd, 12 + 4 * (count - 1), at + INODE_BYTES) if count else b""
        with self._understood():
            xattrs = _xattrs(body) or None
        attributes = Attributes(mode, uid, gid, seconds * 1_000_000_000 + nanoseconds, 0, xattrs)
        inline_at = at + INODE_BYTES + len(body) if form >> 1 == FLAT_INLINE else 0
        return _Inode(attributes, size, address, inline_at)


def _dirents(block: bytes, found: dict[bytes, tuple[int, bool]]) -> None:
    """Take one block's entries: the first one's name offset says how many there are."""
    count = DIRENT.unpack_from(block)[1] // DIRENT.size
    entries = list(DIRENT.iter_unpack(block[: count * DIRENT.size]))
    for number, (nid, start, kind, _) in enumerate(entries, 1):
        end = entries[number][1] if number < count else len(block)
        # Only a block's last name is followed by padding.
        found[block[start:end].rstrip(b"\0")] = nid, kind == FILE_TYPE_DIRECTORY


def _xattrs(body: bytes) -> dict[bytes, bytes]:
    """Read inline attributes: a 12-octet header, then entries aligned to 4."""
    found: dict[bytes, bytes] = {}
    at = 12
    while at < len(body):
        length, index, size = struct.unpack_from("<BBH", body, at)
        name, value = at + 4, at + 4 + length
        found[_PREFIXES[index] + body[name:value]] = body[value : value + size]
        at = -(-(value + size) // 4) * 4
    return found
