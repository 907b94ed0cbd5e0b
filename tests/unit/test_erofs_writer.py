"""The EROFS writer against an independent reader, fsck.erofs, and (as root) the kernel."""

import os
import shutil
import stat
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_erofs_reader import Reader

from vmrt.images import erofs
from vmrt.images.erofs import Attributes, Directory, ErofsError, ErofsWriter

FILE, DIRECTORY = stat.S_IFREG | 0o644, stat.S_IFDIR | 0o755


def fsck(image: Path) -> None:
    """Let erofs-utils judge, where it is installed."""
    if shutil.which("fsck.erofs"):
        subprocess.run(["fsck.erofs", image], check=True, capture_output=True)


def views(data: bytes, piece: int) -> list[memoryview]:
    return [memoryview(data)[at : at + piece] for at in range(0, len(data), piece)]


class Image:
    """A writer on a file of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        self.writer = ErofsWriter(self.fd)
        self.root = Directory(Attributes(DIRECTORY))

    def read(self) -> Reader:
        size = self.writer.finish(self.root)
        os.close(self.fd)
        data = self.path.read_bytes()
        assert len(data) == size
        fsck(self.path)
        return Reader(data)


names = st.binary(min_size=1, max_size=255).filter(lambda n: not {0, 47} & set(n) and n not in (b".", b".."))
xattrs = st.dictionaries(
    st.builds(bytes.__add__, st.sampled_from([b"user.", b"trusted.", b"security."]), names.map(lambda n: n[:200])),
    st.binary(max_size=300),
    max_size=4,
)
attributes = st.builds(
    Attributes,
    mode=st.integers(0, 0o7777),
    uid=st.integers(0, 2**32 - 2),
    gid=st.integers(0, 2**32 - 2),
    mtime_ns=st.integers(-(2**40) * 10**9, 2**40 * 10**9),
    xattrs=xattrs,
)
sizes = st.one_of(st.integers(0, 200), st.integers(4000, 4200), st.sampled_from([4096, 8192, 3 * 4096 - 64, 300_000]))


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(names, st.tuples(attributes, sizes, st.integers(1, 5000)), max_size=40),
    st.dictionaries(names, attributes, max_size=5),
)
def test_reads_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    files: dict[bytes, tuple[Attributes, int, int]],
    directories: dict[bytes, Attributes],
) -> None:
    image = Image(tmp_path_factory.mktemp("erofs") / "image")
    expected: dict[bytes, tuple[Attributes, int, bytes]] = {}
    for name, (a, size, piece) in files.items():
        data = (name * (size // len(name) + 1))[:size]
        full = Attributes(stat.S_IFREG | a.mode, a.uid, a.gid, a.mtime_ns, 0, a.xattrs)
        nid = image.writer.file(full, size, views(data, piece))
        image.root.children[name] = (nid, full.mode)
        expected[b"/" + name] = (full, size, data)
    for name, a in (item for item in directories.items() if item[0] not in files):
        full = Attributes(stat.S_IFDIR | a.mode, a.uid, a.gid, a.mtime_ns, 0, a.xattrs)
        image.root.children[name] = Directory(full, image.root)
        expected[b"/" + name] = (full, -1, b"")
    reader = image.read()
    assert set(reader.nodes) == {b"", *expected}
    for path, (a, size, data) in expected.items():
        node = reader.nodes[path]
        assert (node.mode, node.uid, node.gid, node.mtime_ns) == (a.mode, a.uid, a.gid, a.mtime_ns)
        assert node.xattrs == a.xattrs
        if size >= 0:
            assert (node.size, node.nlink) == (size, 1)
            assert node.data == data
    assert reader.inos == len(reader.nodes)


def test_same_input_gives_same_bytes(tmp_path: Path) -> None:
    def write(name: str) -> bytes:
        image = Image(tmp_path / name)
        for number in range(100):
            nid = image.writer.file(Attributes(FILE), 5000, views(b"%4d" % number * 1250, 999))
            image.root.children[b"%d" % number] = (nid, FILE)
        image.read()
        return image.path.read_bytes()

    assert write("one") == write("two")


def test_small_files_share_blocks(tmp_path: Path) -> None:
    image = Image(tmp_path / "image")
    for number in range(1000):
        nid = image.writer.file(Attributes(FILE), 100, [memoryview(bytes(100))])
        image.root.children[b"%d" % number] = (nid, FILE)
    reader = image.read()
    assert len(reader.image) < 1000 * (64 + 100 + 50) + 64 * 4096


def test_directory_of_many_names_and_long_ones(tmp_path: Path) -> None:
    image = Image(tmp_path / "image")
    nid = image.writer.file(Attributes(FILE), 1, [memoryview(b"x")])
    wanted = {b"%05d" % n + b"n" * (n % 251) for n in range(3000)} | {b"\xff" * 255, b"!", b"a b\n"}
    for number, name in enumerate(wanted):
        image.root.children[name] = (nid, FILE)
        if number:
            image.writer.link(nid)
    reader = image.read()
    assert {path[1:] for path in reader.nodes if path} == wanted
    assert reader.nodes[b"/!"].nlink == len(wanted)


def test_extended_attributes_beyond_a_block(tmp_path: Path) -> None:
    image = Image(tmp_path / "image")
    large = {b"user.%d" % n: bytes([n]) * 60_000 for n in range(2)} | {b"security.capability": b"\1" * 20}
    nid = image.writer.file(Attributes(FILE, xattrs=large), 10, [memoryview(b"0123456789")])
    image.root.children[b"f"] = (nid, FILE)
    below = image.root.children[b"d"] = Directory(Attributes(DIRECTORY, xattrs=large), image.root)
    below.children[b"g"] = (nid, FILE)
    image.writer.link(nid)
    after = image.writer.file(Attributes(FILE), 3, [memoryview(b"abc")])
    image.root.children[b"after"] = (after, FILE)
    reader = image.read()
    assert reader.nodes[b"/f"].xattrs == large
    assert reader.nodes[b"/d"].xattrs == large
    assert reader.nodes[b"/d/g"].data == b"0123456789"
    assert reader.nodes[b"/after"].data == b"abc"


def test_symlinks_up_to_the_limit(tmp_path: Path) -> None:
    image = Image(tmp_path / "image")
    for length in (1, 100, 4032, 4033, 4095):
        nid = image.writer.symlink(Attributes(stat.S_IFLNK | 0o777), b"t" * length)
        image.root.children[b"%d" % length] = (nid, stat.S_IFLNK)
    reader = image.read()
    for length in (1, 100, 4032, 4033, 4095):
        assert reader.nodes[b"/%d" % length].data == b"t" * length
    for bad in (b"", b"t" * 4096, b"a\0b"):
        with pytest.raises(ErofsError):
            Image(tmp_path / "bad").writer.symlink(Attributes(stat.S_IFLNK), bad)


def test_sparse_file_beyond_4_gib_takes_no_space(tmp_path: Path) -> None:
    image = Image(tmp_path / "image")
    size = (5 << 30) + 123
    pieces = [(0, 5), (4096, 3), ((1 << 32) + 7, 4), (size - 2, 2)]
    nid = image.writer.file(Attributes(FILE), size, views(b"abcde" + b"fgh" + b"ijkl" + b"mn", 4), pieces)
    image.root.children[b"sparse"] = (nid, FILE)
    total = image.writer.finish(image.root)
    assert total > size
    assert image.path.stat().st_blocks * 512 < 1 << 20
    fsck(image.path)
    # Read without taking the whole of it into memory.
    inode = os.pread(image.fd, 64, nid * 32)
    stored, address = struct.unpack_from("<QI", inode, 8)
    assert stored == size
    for (offset, length), data in zip(pieces, (b"abcde", b"fgh", b"ijkl", b"mn"), strict=True):
        assert os.pread(image.fd, length, address * 4096 + offset) == data
    os.close(image.fd)


def test_devices(tmp_path: Path) -> None:
    image = Image(tmp_path / "image")
    wanted = {b"null": (1, 3), b"whiteout": (0, 0), b"large": (4095, 1048575), b"mid": (259, 70000)}
    for name, (major, minor) in wanted.items():
        a = Attributes(stat.S_IFCHR | 0o600, rdev=erofs.encode_rdev(major, minor))
        image.root.children[name] = (image.writer.special(a), a.mode)
    reader = image.read()
    assert {path[1:]: node.rdev for path, node in reader.nodes.items() if path} == wanted
    with pytest.raises(ErofsError, match="out of range"):
        erofs.encode_rdev(4096, 0)


def test_refuses_what_the_format_cannot_hold(tmp_path: Path) -> None:
    writer = Image(tmp_path / "image").writer
    with pytest.raises(ErofsError, match="no place"):
        writer.special(Attributes(FILE, xattrs={b"com.apple.quarantine": b""}))
    with pytest.raises(ErofsError, match="too large"):
        writer.special(Attributes(FILE, xattrs={b"user.x": bytes(65536)}))
    with pytest.raises(ErofsError, match="2 octets of data for a file of 3"):
        writer.file(Attributes(FILE), 3, [memoryview(b"ab")])
    root = Directory(Attributes(DIRECTORY))
    root.children[b"n" * 256] = (1, FILE)
    with pytest.raises(ErofsError, match="cannot hold the name"):
        writer.finish(root)
    with pytest.raises(ErofsError, match="root directory"):
        writer.finish(Directory(Attributes(DIRECTORY, xattrs={b"user.x": bytes(5000)})))


def test_checksum_is_crc32c() -> None:
    # RFC 3720, B.4: the vectors are of the inverted form.
    assert erofs._crc32c(bytes(32)) ^ 0xFFFFFFFF == 0x8A9136AA
    assert erofs._crc32c(bytes(range(32))) ^ 0xFFFFFFFF == 0x46DD794E


def test_full_disk_is_an_os_error() -> None:
    fd = os.open("/dev/full", os.O_RDWR)
    try:
        writer = ErofsWriter(fd)
        with pytest.raises(OSError, match="No space left"):
            writer.file(Attributes(FILE), 8 << 20, views(bytes(8 << 20), 1 << 20))
    finally:
        os.close(fd)
