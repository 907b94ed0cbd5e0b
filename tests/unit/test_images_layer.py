"""Tar to layer image: every feature at once (the torture layer), OCI's whiteouts, and what is refused."""

import gzip
import io
import os
import shutil
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_erofs_reader import Node, Reader

from vmrt.errors import ExhaustedError, ImageError
from vmrt.images import layer
from vmrt.images.tar import Kind, TarError, TarReader

CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")
OPAQUE = b"trusted.overlay.opaque"


@dataclass
class Member:
    """One tar member; `type` is tarfile's."""

    name: str
    data: bytes = b""
    type: bytes = tarfile.REGTYPE
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime: float = 0
    link: str = ""
    device: tuple[int, int] = (0, 0)
    pax: dict[str, str] = field(default_factory=dict)


def tar_of(*members: Member, form: int = tarfile.PAX_FORMAT) -> bytes:
    """Build an archive with the standard library, an implementation that is not ours."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for m in members:
            info = tarfile.TarInfo(m.name)
            info.type, info.mode, info.uid, info.gid, info.mtime = m.type, m.mode, m.uid, m.gid, m.mtime
            info.linkname, info.size, info.pax_headers = m.link, len(m.data), dict(m.pax)
            info.devmajor, info.devminor = m.device
            tar.addfile(info, io.BytesIO(m.data))
    return out.getvalue()


def chunks(data: bytes, size: int = 1000) -> Iterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]


def convert(tmp_path: Path, data: bytes, size: int = 1000) -> dict[bytes, Node]:
    image = tmp_path / "layer.erofs"
    with image.open("w+b") as file:
        converted = layer.write(chunks(data, size), file.fileno(), name="layer x")
    assert converted.size_bytes == image.stat().st_size
    if shutil.which("fsck.erofs"):
        subprocess.run(["fsck.erofs", image], check=True, capture_output=True)
    return Reader(image.read_bytes()).nodes


def raw(value: bytes) -> str:
    """Return bytes as tarfile wants them in PAX values."""
    return value.decode("utf-8", "surrogateescape")


DIR = tarfile.DIRTYPE
TORTURE = [
    Member("./", type=DIR, mode=0o1777, uid=7),
    Member("usr", type=DIR, mode=0o755, mtime=1_600_000_000.123456789),
    Member("usr/bin/su", b"#!su", mode=0o4755, uid=3_000_000_000, gid=4_000_000_000, mtime=1.5),
    Member("usr/bin/wall", b"wall", mode=0o2755, pax={"SCHILY.xattr.security.capability": raw(CAPABILITY)}),
    Member("usr/bin/also-su", type=tarfile.LNKTYPE, link="usr/bin/su"),
    Member("usr/bin/su-again", type=tarfile.LNKTYPE, link="./usr/bin/also-su"),
    Member("usr/lib", type=DIR, pax={"SCHILY.xattr.user.note": "with = and \n", "SCHILY.xattr.user.empty": ""}),
    Member("lib", type=tarfile.SYMTYPE, mode=0o777, link="usr/lib"),
    Member("also-lib", type=tarfile.LNKTYPE, link="lib"),
    Member("dev/null", type=tarfile.CHRTYPE, mode=0o666, device=(1, 3)),
    Member("dev/sda", type=tarfile.BLKTYPE, mode=0o660, device=(259, 70000)),
    Member("run/pipe", type=tarfile.FIFOTYPE, mode=0o600),
    Member("big", bytes(range(256)) * 5000),
    Member("exact", b"e" * 8192),
    Member("empty"),
    Member("n" * 255, b"long name"),
    Member("/".join(["deep" * 10] * 8) + "/leaf", b"deep"),
    Member(raw(b"odd\xff\xfe\n name"), b"odd"),
    Member("negative", b"x", mtime=-1.25),
    Member("gone/.wh.file"),
    Member(".wh.top"),
    Member("opaque/", type=DIR, mode=0o700),
    Member("opaque/.wh..wh..opq"),
    Member("opaque/new", b"new"),
    Member(".wh..wh.plnk/1.2", b"aufs"),
    Member(".wh..wh.aufs", b"aufs"),
]


@pytest.mark.parametrize("size", [1, 511, 4096, 1 << 20])
def test_torture_layer(tmp_path: Path, size: int) -> None:
    nodes = convert(tmp_path, tar_of(*TORTURE), size)
    root = nodes[b""]
    assert (root.mode, root.uid) == (stat.S_IFDIR | 0o1777, 7)
    assert nodes[b"/usr"].mtime_ns == pytest.approx(1_600_000_000_123_456_789, abs=1000)
    su = nodes[b"/usr/bin/su"]
    assert (su.mode, su.uid, su.gid, su.data) == (stat.S_IFREG | 0o4755, 3_000_000_000, 4_000_000_000, b"#!su")
    assert (su.mtime_ns, su.nlink) == (1_500_000_000, 3)
    assert {nodes[b"/usr/bin/" + n].nid for n in (b"su", b"also-su", b"su-again")} == {su.nid}
    assert nodes[b"/usr/bin/wall"].xattrs == {b"security.capability": CAPABILITY}
    assert nodes[b"/usr/bin/wall"].mode == stat.S_IFREG | 0o2755
    assert nodes[b"/usr/lib"].xattrs == {b"user.note": b"with = and \n", b"user.empty": b""}
    assert (nodes[b"/lib"].mode, nodes[b"/lib"].data) == (stat.S_IFLNK | 0o777, b"usr/lib")
    assert nodes[b"/also-lib"].nid == nodes[b"/lib"].nid
    assert (nodes[b"/dev/null"].mode, nodes[b"/dev/null"].rdev) == (stat.S_IFCHR | 0o666, (1, 3))
    assert (nodes[b"/dev/sda"].mode, nodes[b"/dev/sda"].rdev) == (stat.S_IFBLK | 0o660, (259, 70000))
    assert nodes[b"/run/pipe"].mode == stat.S_IFIFO | 0o600
    assert nodes[b"/big"].data == bytes(range(256)) * 5000
    assert nodes[b"/exact"].data == b"e" * 8192
    assert nodes[b"/empty"].size == 0
    assert nodes[b"/" + b"n" * 255].data == b"long name"
    assert nodes[b"/" + b"/".join([b"deep" * 10] * 8) + b"/leaf"].data == b"deep"
    assert nodes[b"/odd\xff\xfe\n name"].data == b"odd"
    assert nodes[b"/negative"].mtime_ns == -1_250_000_000
    # Parents that no member names.
    assert (nodes[b"/usr/bin"].mode, nodes[b"/usr/bin"].uid) == (stat.S_IFDIR | 0o755, 0)
    for whiteout in (b"/gone/file", b"/top"):
        assert (nodes[whiteout].mode, nodes[whiteout].rdev) == (stat.S_IFCHR, (0, 0))
    assert nodes[b"/opaque"].xattrs == {OPAQUE: b"y"}
    assert nodes[b"/opaque"].mode == stat.S_IFDIR | 0o700
    assert nodes[b"/opaque/new"].data == b"new"
    assert not any(b".wh." in path for path in nodes)
    directories = sum(1 for path in nodes if path.count(b"/") == 1 and stat.S_ISDIR(nodes[path].mode))
    assert root.nlink == 2 + directories


@pytest.mark.skipif(shutil.which("fsck.erofs") is None, reason="needs erofs-utils")
def test_fsck_extracts_the_torture_layer(tmp_path: Path) -> None:
    convert(tmp_path, tar_of(*(m for m in TORTURE if m.type not in (tarfile.CHRTYPE, tarfile.BLKTYPE))))
    out = tmp_path / "out"
    extract = ["fsck.erofs", f"--extract={out}", "--no-preserve", str(tmp_path / "layer.erofs")]
    subprocess.run(extract, check=True, capture_output=True)
    assert (out / "big").read_bytes() == bytes(range(256)) * 5000
    assert (out / "lib").readlink() == Path("usr/lib")
    assert (out / "usr/bin/su").read_bytes() == b"#!su"


def test_later_members_replace_earlier_ones(tmp_path: Path) -> None:
    nodes = convert(
        tmp_path,
        tar_of(
            Member("f", b"old"),
            Member("f", b"new", mode=0o600),
            Member("d/kept", b"kept"),
            Member("d", type=DIR, mode=0o711),
            Member("was-dir/inside", b"x"),
            Member("was-dir", b"file"),
            Member("was-file", b"x"),
            Member("was-file", type=DIR),
            Member("h", b"one"),
            Member("h2", type=tarfile.LNKTYPE, link="h"),
            Member("h", b"two"),
        ),
    )
    assert (nodes[b"/f"].data, nodes[b"/f"].mode & 0o777) == (b"new", 0o600)
    assert (nodes[b"/d"].mode & 0o777, nodes[b"/d/kept"].data) == (0o711, b"kept")
    assert nodes[b"/was-dir"].data == b"file"
    assert b"/was-dir/inside" not in nodes
    assert stat.S_ISDIR(nodes[b"/was-file"].mode)
    assert (nodes[b"/h2"].data, nodes[b"/h"].data) == (b"one", b"two")


@pytest.mark.parametrize("first", [True, False])
def test_a_whiteout_does_not_hide_its_own_layer(tmp_path: Path, first: bool) -> None:
    marks = [Member("d/.wh.file"), Member("d/.wh.dir")]
    members = [Member("d/file", b"x"), Member("d/dir/inside", b"y")]
    nodes = convert(tmp_path, tar_of(*(marks + members if first else members + marks)))
    assert nodes[b"/d/file"].data == b"x"
    # What lower layers had in d/dir is gone; what this one has is there.
    assert nodes[b"/d/dir"].xattrs == {OPAQUE: b"y"}
    assert nodes[b"/d/dir/inside"].data == b"y"


def test_opaque_root(tmp_path: Path) -> None:
    with (tmp_path / "x").open("w+b") as file:
        converted = layer.convert(chunks(tar_of(Member(".wh..wh..opq"), Member("a", b"a"))), file.fileno())
    assert converted.opaque_root


def test_symlinked_parents_are_followed_inside_the_layer(tmp_path: Path) -> None:
    nodes = convert(
        tmp_path,
        tar_of(
            Member("usr/lib", type=DIR),
            Member("lib", type=tarfile.SYMTYPE, link="usr/lib"),
            Member("lib/a", b"a"),
            Member("up", type=tarfile.SYMTYPE, link="../../../usr"),
            Member("up/b", b"b"),
            Member("abs", type=tarfile.SYMTYPE, link="/lib/new"),
            Member("abs/c", b"c"),
            Member("c-link", type=tarfile.LNKTYPE, link="abs/c"),
        ),
    )
    assert nodes[b"/usr/lib/a"].data == b"a"
    assert nodes[b"/usr/b"].data == b"b"
    assert nodes[b"/usr/lib/new/c"].data == b"c"
    assert nodes[b"/c-link"].nid == nodes[b"/usr/lib/new/c"].nid
    assert stat.S_ISLNK(nodes[b"/lib"].mode)


def test_names_that_are_cleaned_and_attributes_that_are_dropped(tmp_path: Path) -> None:
    pax = {"SCHILY.xattr.trusted.overlay.redirect": "/etc", "SCHILY.xattr.com.apple.x": "y", "SCHILY.xattr.user.k": "v"}
    nodes = convert(tmp_path, tar_of(Member("/abs//./path", b"x", pax=pax), Member("././rel", b"y")))
    assert nodes[b"/abs/path"].xattrs == {b"user.k": b"v"}
    assert nodes[b"/rel"].data == b"y"


REFUSED = {
    "dotdot": ([Member("a/../../etc/passwd", b"x")], r'"\.\." in a path'),
    "empty": ([Member("x", pax={"path": "\0"})], "NUL in a name"),
    "long component": ([Member("x" * 256)], "name of 256 octets"),
    "long path": ([Member("/".join(["x" * 200] * 21))], "path of"),
    "hard link outside": ([Member("l", type=tarfile.LNKTYPE, link="../../etc/shadow")], r'"\.\."'),
    "hard link missing": ([Member("l", type=tarfile.LNKTYPE, link="etc/shadow")], "does not hold before it"),
    "hard link to directory": ([Member("d", type=DIR), Member("l", type=tarfile.LNKTYPE, link="d")], "a directory"),
    "hard link to root": ([Member("l", type=tarfile.LNKTYPE, link="/")], "a directory"),
    "parent is a file": ([Member("f", b"x"), Member("f/below", b"y")], "is no directory"),
    "symlink loop": (
        [Member("a", type=tarfile.SYMTYPE, link="b"), Member("b", type=tarfile.SYMTYPE, link="a"), Member("a/x")],
        "is no directory",
    ),
    "empty symlink": ([Member("s", type=tarfile.SYMTYPE, link="")], "symbolic link's target"),
    "root is a file": ([Member("./", type=tarfile.SYMTYPE, link="x")], "root must be a directory"),
    "device": ([Member("d", type=tarfile.CHRTYPE, device=(4096, 0))], "out of range"),
    "owner": ([Member("f", uid=2**32 - 1)], "owner 4294967295 is out of range"),
    "whiteout of nothing": ([Member("d/.wh...")], "whiteout of nothing"),
    "below a whiteout": ([Member(".wh.d/x")], "below a whiteout"),
    "attribute": ([Member("f", pax={"SCHILY.xattr.user.x": "v" * 65536})], "too large"),
    "type": ([Member("f", type=b"M")], "unsupported type"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_hostile_layers_are_refused_by_name(tmp_path: Path, case: str) -> None:
    members, text = REFUSED[case]
    with (tmp_path / "x").open("w+b") as file, pytest.raises(ImageError, match=text) as caught:
        layer.convert(chunks(tar_of(*members)), file.fileno(), name="layer x")
    assert "layer x" in str(caught.value)


def test_full_disk_is_named() -> None:
    with open("/dev/full", "r+b", buffering=0) as full, pytest.raises(ExhaustedError, match="no space left"):  # noqa: PTH123
        layer.convert(chunks(tar_of(Member("f", bytes(3 << 20))), 1 << 20), full.fileno())


# --- the tar reader ---------------------------------------------------------------------------------------------------


def read(data: bytes, size: int = 700) -> list[tuple[bytes, Kind, bytes]]:
    reader = TarReader(chunks(data, size))
    return [(entry.name, entry.kind, b"".join(reader.data())) for entry in reader]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@settings(deadline=None)
@given(names=st.lists(st.text("abcé./-", min_size=1, max_size=90), max_size=5), data=st.binary(max_size=1500))
def test_reads_what_tarfile_writes(form: int, names: list[str], data: bytes) -> None:
    names = [f"x{n}y" for n in names]
    archive = tar_of(*(Member(n, data) for n in names), form=form)
    assert read(archive) == [(n.encode(), Kind.FILE, data) for n in names]


def test_gnu_long_names_and_numbers() -> None:
    long, target = "d/" * 150 + "f", "t" * 300
    archive = tar_of(
        Member(long, b"1", uid=2**31, mtime=-5), Member("s", type=tarfile.SYMTYPE, link=target), form=tarfile.GNU_FORMAT
    )
    entries = list(TarReader(chunks(archive)))
    assert (entries[0].name, entries[0].uid, entries[0].mtime_ns) == (long.encode(), 2**31, -5_000_000_000)
    assert entries[1].linkname == target.encode()


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs GNU tar")
@pytest.mark.parametrize(
    "options", [["--format=gnu"], *(["--format=posix", f"--sparse-version={v}"] for v in ("0.0", "0.1", "1.0"))]
)
def test_sparse_files_of_gnu_tar(tmp_path: Path, options: list[str]) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        for number in range(60):
            file.seek(number * 100_000)
            file.write(b"piece %d" % number)
        file.truncate(7_000_001)
    subprocess.run(["tar", "-C", tmp_path, "-S", *options, "-cf", tmp_path / "t.tar", "sparse"], check=True)
    archive = (tmp_path / "t.tar").read_bytes()
    assert len(archive) < 1_000_000
    nodes = convert(tmp_path, archive + archive[:0])
    assert nodes[b"/sparse"].data == (tmp_path / "sparse").read_bytes()


def test_ends_of_archives() -> None:
    archive = tar_of(Member("f", b"data"))
    assert read(archive[:1024]) == read(archive)  # no zero blocks at all
    assert read(archive[:1536]) == read(archive)  # one of them
    drained = chunks(archive + b"anything behind the end")
    list(TarReader(drained))
    assert list(drained) == []
    for cut in (1, 511, 513, 1023):
        with pytest.raises(TarError, match="cut short"):
            read(archive[:cut])


def test_broken_headers() -> None:
    archive = bytearray(tar_of(Member("f", b"data")))
    archive[0] ^= 1
    with pytest.raises(TarError, match="checksum"):
        read(bytes(archive))
    with pytest.raises(TarError, match="checksum"):
        read(gzip.compress(b"not a tar") + bytes(1024))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_mutated_archives_never_do_worse_than_an_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    archive = bytearray(tar_of(*TORTURE[:12]))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(archive) - 1))
        archive[at] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()):  # with a checksum that fits, so that the fields themselves are reached
            base = at // 512 * 512
            block = archive[base : base + 512]
            total = sum(block) - sum(block[148:156]) + 256
            archive[base + 148 : base + 156] = b"%06o\0 " % total
    with (tmp_path_factory.getbasetemp() / "mutated").open("w+b") as file:
        try:
            layer.convert(chunks(bytes(archive), 4096), file.fileno())
        except ImageError:
            return
        if file.seek(0, os.SEEK_END) < 64 << 20:
            Reader((tmp_path_factory.getbasetemp() / "mutated").read_bytes())
