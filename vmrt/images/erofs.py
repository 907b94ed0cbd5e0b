"""An EROFS image written in one pass, uncompressed and deterministic.

Source of the format: the kernel's Documentation/filesystems/erofs.rst and fs/erofs/erofs_fs.h, and what Linux 6.1's
driver and fsck.erofs 1.5 take. Why our own writer: Debian 12's mkfs.erofs reads no tar, and an untrusted tar must not
be unpacked on the host.

How an image is laid out (4 KiB blocks, no feature that 6.1 lacks):

    block 0      superblock at 1024, the root directory's inode at 1152 (its number has 16 bits only, so it stays here)
    block 1...   data and metadata areas in turn, as the input came; directories last

A file's whole blocks go out as they come. Its inode follows with the rest of its data right behind it (tail packing)
when both fit into one block, so that a small file costs its size and 64 octets. Inodes are all of the extended form:
only that one has 32-bit owners and times. With meta_blkaddr 0 an inode's number is its offset divided by 32.

What is kept in memory: the inodes' numbers, one open metadata area, and buffered data; never a file's contents.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from stat import S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFMT, S_IFREG

BLOCK = 4096
SUPER_OFFSET = 1024
MAGIC = 0xE0F5E1E2
INODE_BYTES = 64
SLOT_BYTES = 32
ROOT_OFFSET = SUPER_OFFSET + 128
NAME_LIMIT = 255
SYMLINK_LIMIT = BLOCK - 1
# i_xattr_icount has 16 bits; Linux itself takes values of 64 KiB and lists of 64 KiB (limits.h).
XATTR_LIMIT_BYTES = 128 * 1024
BLOCK_COUNT_LIMIT = 1 << 32

FLAT_PLAIN, FLAT_INLINE = 0, 2
COMPAT_SB_CHKSUM, COMPAT_MTIME = 1, 2

FILE_TYPE_DIRECTORY = 2
_FILE_TYPES = {S_IFREG: 1, S_IFDIR: FILE_TYPE_DIRECTORY, S_IFCHR: 3, S_IFBLK: 4, S_IFIFO: 5, S_IFLNK: 7}

# The longest prefix comes first where two match; the two ACL names are whole names.
XATTR_PREFIXES = (
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"user.", 1),
    (b"trusted.", 4),
    (b"security.", 6),
)

INODE = struct.Struct("<HHHHQIIIIqII16x")
DIRENT = struct.Struct("<QHBB")
SUPER = struct.Struct("<IIIBBHQQIIII16s16sIHHHB37x")
assert INODE.size == INODE_BYTES and SUPER.size == 128

_BUFFER_BYTES = 1 << 20
_AREA_BLOCKS = 32
_ZEROS = bytes(BLOCK)


class ErofsError(ValueError):
    """Something that the format cannot hold; the text says what."""


@dataclass(frozen=True, slots=True)
class Attributes:
    """What an inode says about its file: `mode` with the type bits, `mtime_ns` since the epoch, `rdev` encoded."""

    mode: int
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    rdev: int = 0
    xattrs: Mapping[bytes, bytes] | None = None


def encode_rdev(major: int, minor: int) -> int:
    """Return a device number as inodes hold it (the kernel's new_encode_dev: 12 and 20 bits)."""
    if not (0 <= major < 1 << 12 and 0 <= minor < 1 << 20):
        raise ErofsError(f"device number {major}:{minor} is out of range")
    return (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)


def knows_xattr(name: bytes) -> bool:
    """Say whether the format (and Linux) has a place for an attribute of this name."""
    return _xattr_index(name) is not None


class ErofsWriter:
    """Write one image into an empty file.

    Call `file`, `symlink` and `special` for the leaves in any order, each returns its inode's number; `link` for every
    further name of one; then `finish` with the tree. The file descriptor stays open and is not synced. OSError from
    writing (ENOSPC, EFBIG) is passed on.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._buffer = bytearray()
        self._buffer_block = 1
        self._next_block = 1
        self._inodes = 0
        self._links: dict[int, int] = {}
        # The open metadata area: where it starts, its bytes, and how much of each block is used.
        self._area_block = 0
        self._area = bytearray()
        self._used: list[int] = []

    # --- leaves ------------------------------------------------------------------------------------------------------

    def file(
        self,
        attributes: Attributes,
        size: int,
        data: Iterable[memoryview],
        extents: Sequence[tuple[int, int]] | None = None,
    ) -> int:
        """Write a regular file of `size` octets. With `extents` the data is theirs, and the rest is holes."""
        xattrs = _xattr_body(attributes.xattrs)
        if extents is not None:
            return self._sparse(attributes, xattrs, size, data, extents)
        tail_size = size % BLOCK
        inline = 0 < tail_size <= BLOCK - INODE_BYTES - len(xattrs)
        start, whole = self._next_block, size - tail_size if inline else size
        tail = bytearray()
        written = 0
        for view in data:
            room = max(0, whole - written)
            if room >= len(view):
                self._append(view)
            else:
                self._append(view[:room])
                tail += view[room:]
            written += len(view)
        if written != size:
            raise ErofsError(f"{written} octets of data for a file of {size}")
        self._pad()
        return self._inode(attributes, xattrs, size, start if whole else 0, bytes(tail) if inline else None)

    def symlink(self, attributes: Attributes, target: bytes) -> int:
        """Write a symbolic link."""
        if not 0 < len(target) <= SYMLINK_LIMIT or b"\0" in target:
            raise ErofsError(f"a symbolic link's target must have 1 to {SYMLINK_LIMIT} octets without NUL")
        return self.file(attributes, len(target), [memoryview(target)])

    def special(self, attributes: Attributes) -> int:
        """Write a device node or FIFO."""
        return self._inode(attributes, _xattr_body(attributes.xattrs), 0, attributes.rdev, None)

    def link(self, nid: int) -> None:
        """Count one more name for an inode."""
        self._links[nid] = self._links.get(nid, 1) + 1

    # --- directories and the end -------------------------------------------------------------------------------------

    def finish(self, root: Directory) -> int:
        """Write the directories and the superblock; return the image's size in octets."""
        head = bytearray(BLOCK)
        body = _xattr_body(root.attributes.xattrs)
        if len(body) > BLOCK - ROOT_OFFSET - INODE_BYTES:
            raise ErofsError("the root directory has too many extended attributes")
        root.nid = ROOT_OFFSET // SLOT_BYTES
        directories = list(root.walk())
        plans = []
        # Numbers first: a directory's entries name its children and its parent.
        for directory in directories:
            directory.blocks = _plan(directory)
            xattrs = _xattr_body(directory.attributes.xattrs)
            tail = directory.blocks[-1][1]
            inline = directory is not root and tail < BLOCK and INODE_BYTES + len(xattrs) + tail <= BLOCK
            size = (len(directory.blocks) - 1) * BLOCK + tail
            if directory is not root:
                directory.nid = self._place(INODE_BYTES + len(xattrs), tail if inline else 0) // SLOT_BYTES
            plans.append((directory, xattrs, size, inline))
        for directory, xattrs, size, inline in plans:
            start = self._next_block
            blocks = list(_dirents(directory))
            for block in blocks[:-1] if inline else blocks:
                self._append(memoryview(block))
                self._pad()
            whole = len(blocks) - (1 if inline else 0)
            subdirectories = sum(isinstance(child, Directory) for child in directory.children.values())
            inode = self._pack(
                directory.attributes, xattrs, size, start if whole else 0, inline, nlink=2 + subdirectories
            )
            if directory is root:
                head[ROOT_OFFSET : ROOT_OFFSET + len(inode)] = inode
            else:
                self._put(directory.nid * SLOT_BYTES, inode + (blocks[-1] if inline else b""))
        self._close_area()
        self._flush()
        for nid, count in self._links.items():
            os.pwrite(self._fd, struct.pack("<I", count), nid * SLOT_BYTES + 44)
        end = self._next_block * BLOCK
        os.ftruncate(self._fd, end)
        SUPER.pack_into(
            head,
            SUPER_OFFSET,
            MAGIC,
            0,
            COMPAT_SB_CHKSUM | COMPAT_MTIME,
            12,  # blkszbits
            0,
            root.nid,
            self._inodes,
            0,  # build_time: extended inodes have their own times
            0,
            self._next_block,
            0,  # meta_blkaddr
            0,  # xattr_blkaddr: attributes are inline, none is shared
            b"",
            b"",
            0,  # feature_incompat
            0,
            0,
            0,
            0,
        )
        # The checksum covers the rest of the superblock's block, with the field itself zero.
        struct.pack_into("<I", head, SUPER_OFFSET + 4, _crc32c(head[SUPER_OFFSET:]))
        _write_all(self._fd, memoryview(head), 0)
        return end

    # --- data --------------------------------------------------------------------------------------------------------

    def _sparse(
        self,
        attributes: Attributes,
        xattrs: bytes,
        size: int,
        data: Iterable[memoryview],
        extents: Sequence[tuple[int, int]],
    ) -> int:
        """Write the pieces where they belong and leave the holes to the file that holds the image."""
        self._flush()
        start = self._next_block
        self._claim(-(-size // BLOCK))
        base = start * BLOCK
        pieces = iter(extents)
        offset = left = 0
        for view in data:
            while view:
                if not left:
                    offset, left = next(pieces)
                part = view[:left]
                _write_all(self._fd, part, base + offset)
                offset, left, view = offset + len(part), left - len(part), view[len(part) :]
        return self._inode(attributes, xattrs, size, start if size else 0, None)

    def _claim(self, blocks: int) -> None:
        self._next_block += blocks
        if self._next_block >= BLOCK_COUNT_LIMIT:
            raise ErofsError("the image would have more than 2^32 blocks")
        self._buffer_block = self._next_block

    def _append(self, view: memoryview) -> None:
        if len(view) >= _BUFFER_BYTES // 4:
            # Large pieces go straight to the file, but for what completes the block before and begins the one after.
            lead = -len(self._buffer) % BLOCK
            self._buffer += view[:lead]
            self._spill()
            whole = (len(view) - lead) // BLOCK
            _write_all(self._fd, view[lead : lead + whole * BLOCK], self._buffer_block * BLOCK)
            self._buffer_block += whole
            view = view[lead + whole * BLOCK :]
        self._buffer += view
        if len(self._buffer) >= _BUFFER_BYTES:
            self._spill()

    def _spill(self) -> None:
        """Write the buffer's whole blocks."""
        whole = len(self._buffer) // BLOCK
        if whole:
            with memoryview(self._buffer) as view:
                _write_all(self._fd, view[: whole * BLOCK], self._buffer_block * BLOCK)
            del self._buffer[: whole * BLOCK]
            self._buffer_block += whole

    def _pad(self) -> None:
        """Fill up the last data block, so that the next thing starts on a block."""
        if len(self._buffer) % BLOCK:
            self._buffer += _ZEROS[: -len(self._buffer) % BLOCK]
        self._next_block = self._buffer_block + len(self._buffer) // BLOCK
        if self._next_block >= BLOCK_COUNT_LIMIT:
            raise ErofsError("the image would have more than 2^32 blocks")

    def _flush(self) -> None:
        self._pad()
        self._spill()

    # --- metadata ----------------------------------------------------------------------------------------------------

    def _inode(self, attributes: Attributes, xattrs: bytes, size: int, address: int, tail: bytes | None) -> int:
        """Place an inode with its tail (None: nothing inline) and return its number."""
        packed = self._pack(attributes, xattrs, size, address, tail is not None, nlink=1)
        offset = self._place(len(packed), len(tail or b""))
        self._put(offset, packed + (tail or b""))
        return offset // SLOT_BYTES

    def _pack(
        self, attributes: Attributes, xattrs: bytes, size: int, address: int, inline: bool, *, nlink: int
    ) -> bytes:
        self._inodes += 1
        layout = FLAT_INLINE if inline else FLAT_PLAIN
        seconds, nanoseconds = divmod(attributes.mtime_ns, 1_000_000_000)
        try:
            head = INODE.pack(
                1 | layout << 1,
                1 + (len(xattrs) - 12) // 4 if xattrs else 0,
                attributes.mode,
                0,
                size,
                address,
                self._inodes & 0xFFFFFFFF,
                attributes.uid,
                attributes.gid,
                seconds,
                nanoseconds,
                nlink,
            )
        except struct.error as e:
            raise ErofsError(f"an attribute is out of range: {attributes}") from e
        return head + xattrs

    def _place(self, size: int, tail: int) -> int:
        """Find room for an inode with its attributes and inline tail; return the offset in the image.

        The inode never straddles blocks; neither does an inline tail, as the kernel demands. Only attributes may, when
        they are too many for one block.
        """
        need = -(-(size + tail) // SLOT_BYTES) * SLOT_BYTES
        if need > BLOCK:
            self._new_area(-(-need // BLOCK))
            offset = self._area_block * BLOCK
            for index in range(len(self._used)):
                self._used[index] = min(BLOCK, need - index * BLOCK)
            return offset
        for index, used in enumerate(self._used):
            if used + need <= BLOCK:
                self._used[index] = used + need
                return (self._area_block + index) * BLOCK + used
        # Areas grow, so that a small layer stays small and a large one is not made of single blocks.
        self._new_area(min(_AREA_BLOCKS, max(1, 2 * len(self._used))))
        self._used[0] = need
        return self._area_block * BLOCK

    def _new_area(self, blocks: int) -> None:
        self._close_area()
        self._flush()
        self._area_block = self._next_block
        self._claim(blocks)
        self._area = bytearray(blocks * BLOCK)
        self._used = [0] * blocks

    def _put(self, offset: int, data: bytes) -> None:
        """Store metadata in the open area, or in the file where its area is closed already."""
        at = offset - self._area_block * BLOCK
        if 0 <= at < len(self._area):
            self._area[at : at + len(data)] = data
        else:
            _write_all(self._fd, memoryview(data), offset)

    def _close_area(self) -> None:
        if self._area:
            with memoryview(self._area) as view:
                _write_all(self._fd, view, self._area_block * BLOCK)
            self._area = bytearray()
            self._used = []


class Directory:
    """A directory of the tree given to `ErofsWriter.finish`: names to directories, or to (inode number, mode)."""

    __slots__ = ("attributes", "blocks", "children", "nid", "parent")

    def __init__(self, attributes: Attributes, parent: Directory | None = None) -> None:
        self.attributes = attributes
        self.parent = parent if parent is not None else self
        self.children: dict[bytes, Directory | tuple[int, int]] = {}
        self.nid = 0
        self.blocks: list[tuple[list[bytes], int]] = []

    def walk(self) -> Iterator[Directory]:
        """Yield this directory and all below it, names in order; without recursion, as trees may be deep."""
        stack = [self]
        while stack:
            directory = stack.pop()
            yield directory
            below = [
                child for _, child in sorted(directory.children.items(), key=_by_name) if isinstance(child, Directory)
            ]
            stack.extend(reversed(below))


def _by_name(item: tuple[bytes, object]) -> bytes:
    return item[0]


def _plan(directory: Directory) -> list[tuple[list[bytes], int]]:
    """Cut the sorted names into blocks: (names, octets used) each."""
    blocks: list[tuple[list[bytes], int]] = []
    names: list[bytes] = []
    used = 0
    for name in sorted([b".", b"..", *directory.children]):
        if not 0 < len(name) <= NAME_LIMIT or b"/" in name or b"\0" in name:
            raise ErofsError(f"a directory cannot hold the name {name!r}")
        need = DIRENT.size + len(name)
        if used + need > BLOCK:
            blocks.append((names, used))
            names, used = [], 0
        names.append(name)
        used += need
    blocks.append((names, used))
    return blocks


def _dirents(directory: Directory) -> Iterator[bytes]:
    """Pack each block: the fixed entries, then the names they point to. All but the last are filled up with zeros."""
    resolve: Callable[[bytes], tuple[int, int]] = _resolver(directory)
    for index, (names, used) in enumerate(directory.blocks):
        offset = len(names) * DIRENT.size
        entries = bytearray()
        for name in names:
            nid, mode = resolve(name)
            entries += DIRENT.pack(nid, offset, _FILE_TYPES[S_IFMT(mode)], 0)
            offset += len(name)
        block = bytes(entries) + b"".join(names)
        last = index == len(directory.blocks) - 1
        yield block if last else block + bytes(BLOCK - used)


def _resolver(directory: Directory) -> Callable[[bytes], tuple[int, int]]:
    def resolve(name: bytes) -> tuple[int, int]:
        if name == b".":
            return directory.nid, S_IFDIR
        if name == b"..":
            return directory.parent.nid, S_IFDIR
        child = directory.children[name]
        return (child.nid, S_IFDIR) if isinstance(child, Directory) else child

    return resolve


def _xattr_index(name: bytes) -> tuple[int, bytes] | None:
    for prefix, index in XATTR_PREFIXES:
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            # The ACL names stand for themselves, the others are prefixes of something.
            return (index, rest) if (index in (2, 3)) == (not rest) else None
    return None


def _xattr_body(xattrs: Mapping[bytes, bytes] | None) -> bytes:
    """Return the inline attributes behind an inode: a 12-octet header without shared ones, then aligned entries."""
    if not xattrs:
        return b""
    body = bytearray(12)
    for name, value in sorted(xattrs.items()):
        found = _xattr_index(name)
        if found is None:
            raise ErofsError(f"the extended attribute {name!r} has no place in the format")
        index, rest = found
        if len(rest) > NAME_LIMIT or len(value) > 0xFFFF or b"\0" in rest:
            raise ErofsError(f"the extended attribute {name[:300]!r} is too large")
        body += struct.pack("<BBH", len(rest), index, len(value)) + rest + value
        body += bytes(-len(body) % 4)
    if len(body) > XATTR_LIMIT_BYTES:
        raise ErofsError(f"extended attributes of {len(body)} octets on one file")
    return bytes(body)


def _write_all(fd: int, view: memoryview, offset: int) -> None:
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _crc32c_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


_CRC32C = _crc32c_table()


def _crc32c(data: bytes | bytearray) -> int:
    """CRC-32C (RFC 3720, B.4) as the kernel's crc32c(~0, ...): without the final inversion."""
    crc = 0xFFFFFFFF
    for octet in data:
        crc = crc >> 8 ^ _CRC32C[(crc ^ octet) & 0xFF]
    return crc
