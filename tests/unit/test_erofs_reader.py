"""A small reader of EROFS, written from the kernel's documents alone, and held to what mkfs.erofs makes.

The writer's tests read images back with it, so that they do not compare the writer with itself.
"""

import os
import shutil
import stat
import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PREFIXES = {1: b"user.", 2: b"system.posix_acl_access", 3: b"system.posix_acl_default", 4: b"trusted.", 6: b"security."}
TYPES = {1: stat.S_IFREG, 2: stat.S_IFDIR, 3: stat.S_IFCHR, 4: stat.S_IFBLK, 5: stat.S_IFIFO, 7: stat.S_IFLNK}


@dataclass
class Node:
    nid: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    nlink: int
    size: int
    rdev: tuple[int, int] = (0, 0)
    data: bytes = b""
    xattrs: dict[bytes, bytes] = field(default_factory=dict)


class Reader:
    """The whole tree of an image, by path; b"" is the root."""

    def __init__(self, image: bytes) -> None:
        self.image = image
        sb = image[1024:1152]
        magic, self.checksum, self.compat, bits, _slots, root = struct.unpack_from("<IIIBBH", sb)
        assert magic == 0xE0F5E1E2
        assert bits == 12
        self.build_time, self.build_nsec, self.blocks, self.meta, self.xattr_start = struct.unpack_from(
            "<QIIII", sb, 24
        )
        (self.inos,) = struct.unpack_from("<Q", sb, 16)
        (self.incompat,) = struct.unpack_from("<I", sb, 80)
        assert self.blocks * 4096 == len(image)
        self.nodes: dict[bytes, Node] = {}
        self._walk(b"", root, root)

    def _walk(self, path: bytes, nid: int, parent: int) -> None:
        node = self.nodes[path] = self.inode(nid)
        if not stat.S_ISDIR(node.mode):
            return
        seen: list[bytes] = []
        for base in range(0, len(node.data), 4096):
            block = node.data[base : base + 4096]
            count = struct.unpack_from("<H", block, 8)[0] // 12
            entries = [struct.unpack_from("<QHBB", block, 12 * i) for i in range(count)]
            for i, (child, start, kind, _) in enumerate(entries):
                end = entries[i + 1][1] if i + 1 < count else len(block)
                name = block[start:end].split(b"\0")[0]
                seen.append(name)
                if name in (b".", b".."):
                    assert child == (nid if name == b"." else parent)
                    continue
                below = path + b"/" + name
                self._walk(below, child, nid)
                assert TYPES[kind] == stat.S_IFMT(self.nodes[below].mode)
        assert seen == sorted(seen) and len(set(seen)) == len(seen), "the kernel searches directories by bisection"

    def inode(self, nid: int) -> Node:
        at = self.meta * 4096 + 32 * nid
        form, icount, mode = struct.unpack_from("<HHH", self.image, at)
        layout = form >> 1 & 7
        if form & 1:
            size, address, _ino, uid, gid, seconds, nsec, nlink = struct.unpack_from("<QIIIIqII", self.image, at + 8)
            end = at + 64
        else:
            nlink, size, _, address, _ino, uid, gid = struct.unpack_from("<HIIIIHH", self.image, at + 6)
            seconds, nsec, end = self.build_time, self.build_nsec, at + 32
        node = Node(nid, mode, uid, gid, seconds * 10**9 + nsec, nlink, size)
        if icount:
            node.xattrs = self._xattrs(end, 12 + 4 * (icount - 1))
            end += 12 + 4 * (icount - 1)
        if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            node.rdev = (address >> 8 & 0xFFF, (address & 0xFF) | (address >> 12 & 0xFFF00))
        elif layout == 0:
            node.data = self.image[address * 4096 : address * 4096 + size]
        else:
            assert layout == 2
            whole = size // 4096 * 4096
            assert end // 4096 == (end + size - whole - 1) // 4096, "inline data crosses a block"
            node.data = self.image[address * 4096 : address * 4096 + whole] + self.image[end : end + size - whole]
        assert size == len(node.data) or not size or node.rdev != (0, 0)
        return node

    def _xattrs(self, at: int, length: int) -> dict[bytes, bytes]:
        body = self.image[at : at + length]
        found = {}
        places = [self.xattr_start * 4096 + 4 * i for i in struct.unpack_from(f"<{body[4]}I", body, 12)]
        inline = 12 + 4 * body[4]
        while inline < length:
            places.append(at + inline)
            name_len, _, value_len = struct.unpack_from("<BBH", body, inline)
            inline += (4 + name_len + value_len + 3) // 4 * 4
        for place in places:
            name_len, index, value_len = struct.unpack_from("<BBH", self.image, place)
            name = self.image[place + 4 : place + 4 + name_len]
            found[PREFIXES[index] + name] = self.image[place + 4 + name_len :][:value_len]
        return found


@pytest.mark.skipif(shutil.which("mkfs.erofs") is None, reason="needs erofs-utils")
def test_reads_what_mkfs_erofs_makes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep" / "er").mkdir(parents=True)
    (source / "deep" / "er" / "big").write_bytes(os.urandom(3 * 4096 + 17))
    (source / "small").write_bytes(b"hello")
    (source / "link").symlink_to("small")
    os.link(source / "small", source / "deep" / "same")
    for number in range(400):
        (source / f"file{number:03}").write_bytes(b"%d" % number)
    image = tmp_path / "image"
    subprocess.run(["mkfs.erofs", "-x-1", image, source], check=True, capture_output=True)
    reader = Reader(image.read_bytes())
    for path in source.rglob("*"):
        node = reader.nodes[b"/" + os.fsencode(path.relative_to(source))]
        status = path.lstat()
        assert (node.mode, node.uid, node.mtime_ns) == (status.st_mode, status.st_uid, status.st_mtime_ns)
        if path.is_symlink():
            assert node.data == b"small"
        elif path.is_file():
            assert node.data == path.read_bytes()
            assert node.nlink == status.st_nlink
    assert len(reader.nodes) == 1 + len(list(source.rglob("*")))
