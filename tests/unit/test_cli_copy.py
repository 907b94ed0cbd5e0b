"""`vmrt cp`: what its arguments mean, and what may and may not be unpacked on this side."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmrt.cli import copy
from vmrt.cli.copy import Place, place
from vmrt.cli.unpack import Unpacker, UnpackError
from vmrt.errors import VmrtError


def member(name: str, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o644
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def archive(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def pieces(data: bytes, size: int = 1000) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


def unpack(data: bytes, directory: Path, asked: str = "", name: str = "") -> list[str]:
    told: list[str] = []
    unpacker = Unpacker(directory, asked, name, told.append)
    try:
        unpacker.run(pieces(data))
    finally:
        unpacker.close()
    return told


@pytest.fixture
def inside(tmp_path: Path) -> Path:
    (tmp_path / "outside").write_text("untouched")
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("web:/etc", Place("web", "/etc")),
        ("pod/web:etc/a:b", Place("pod/web", "etc/a:b")),
        ("./a:b", Place("", "./a:b")),
        ("/a:b", Place("", "/a:b")),
        ("file", Place("", "file")),
        ("-", Place("", "-")),
    ],
)
def test_what_an_argument_means(text: str, wanted: Place) -> None:
    assert place(text) == wanted


@pytest.mark.parametrize("text", [":x", "web:"])
def test_what_an_argument_cannot_be(text: str) -> None:
    with pytest.raises(click.UsageError):
        place(text)


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("/etc/passwd", ("/etc", "passwd")),
        ("/srv/", ("/", "srv")),
        ("/", ("/", "")),
        ("/srv/.", ("/srv/.", "")),
        ("..", ("..", "")),
        ("name", (".", "name")),
    ],
)
def test_the_parts_of_a_path_in_a_container(path: str, wanted: tuple[str, str]) -> None:
    assert copy._split(path) == wanted


def test_a_tree_is_renamed_and_keeps_what_is_harmless(inside: Path) -> None:
    data = archive(
        member("./old", type=tarfile.DIRTYPE, mode=0o500),
        member("./old/sub/run", b"x" * 3000, mode=0o4755, uid=7, gid=8),
        member("./old/link", type=tarfile.SYMTYPE, linkname="../../outside"),
        member("./old/same", type=tarfile.LNKTYPE, linkname="./old/sub/run"),
        member("./old/device", type=tarfile.CHRTYPE),
    )
    told = unpack(data, inside, "old", "new")
    assert (inside / "new" / "sub" / "run").read_bytes() == b"x" * 3000
    status = (inside / "new" / "sub" / "run").stat()
    assert (status.st_mode & 0o7777, status.st_uid, status.st_nlink) == (0o755, os.geteuid(), 2)
    assert (inside / "new" / "link").readlink() == Path("../../outside")
    assert (inside / "new").stat().st_mode & 0o777 == 0o700
    assert not (inside / "new" / "device").exists()
    assert "device is left out" in told[0]


@pytest.mark.parametrize(
    "members",
    [
        [member("../outside", b"gone")],
        [member("/outside", b"gone")],
        [member("a/../../outside", b"gone")],
        [member("up", type=tarfile.SYMTYPE, linkname=".."), member("up/outside", b"gone")],
        [member("up", type=tarfile.SYMTYPE, linkname=".."), member("up/made", type=tarfile.DIRTYPE)],
        [
            member("up", type=tarfile.SYMTYPE, linkname="../outside"),
            member("same", type=tarfile.LNKTYPE, linkname="up"),
        ],
        [member("same", type=tarfile.LNKTYPE, linkname="../outside")],
        [member("same", type=tarfile.LNKTYPE, linkname="/etc/passwd")],
        [member("d", type=tarfile.DIRTYPE), member("d", b"a file")],
    ],
    ids=lambda members: members[-1][0].name,
)
def test_nothing_leads_out_of_the_destination(inside: Path, members: Sequence[tuple[tarfile.TarInfo, bytes]]) -> None:
    before = sorted(inside.parent.iterdir())
    with pytest.raises(UnpackError):
        unpack(archive(*members), inside)
    assert (inside.parent / "outside").read_text() == "untouched"
    assert sorted(inside.parent.iterdir()) == before
    assert not (inside / "same").exists()


def test_a_link_is_replaced_and_not_written_through(inside: Path) -> None:
    (inside / "a").symlink_to("../outside")
    os.link(inside.parent / "outside", inside / "b")
    unpack(archive(member("a", b"new"), member("b", b"new")), inside)
    assert (inside.parent / "outside").read_text() == "untouched"
    assert ((inside / "a").is_symlink(), (inside / "a").read_text(), (inside / "b").read_text()) == (
        False,
        "new",
        "new",
    )


def test_a_directory_that_is_a_link_here_is_not_followed(inside: Path) -> None:
    (inside.parent / "elsewhere").mkdir()
    (inside / "d").symlink_to("../elsewhere")
    with pytest.raises(UnpackError, match="links are not followed"):
        unpack(archive(member("d/file", b"x")), inside)
    assert list((inside.parent / "elsewhere").iterdir()) == []


def test_only_what_was_asked_for_is_taken(inside: Path) -> None:
    with pytest.raises(UnpackError, match="not asked for"):
        unpack(archive(member("./wanted", b"x"), member("./.bashrc", b"evil")), inside, "wanted", "wanted")
    assert [path.name for path in inside.iterdir()] == ["wanted"]


def test_descriptors_are_closed_whatever_happens(inside: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    names = [f"d{n}/e/f" for n in range(50)]
    unpack(archive(*[member(name, b"x") for name in names]), inside)
    for data in (archive(member("d1/e/f/below", b"x")), archive(member("x/y", b"abc"))[:700], b"no archive" * 100):
        with pytest.raises(UnpackError):
            unpack(data, inside)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


NAMES = st.sampled_from(["a", "b", "a/b", "..", "/", "./", "a/../b", "a//b", ".", "b/c", "../../x", "a/b/c/d"])
KINDS = st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])


@given(members=st.lists(st.tuples(NAMES, KINDS, NAMES), max_size=8))
def test_any_archive_stays_in_its_place(
    tmp_path_factory: pytest.TempPathFactory, members: list[tuple[str, bytes, str]]
) -> None:
    top = tmp_path_factory.mktemp("any")
    (top / "outside").write_text("untouched")
    (top / "in").mkdir()
    with contextlib.suppress(UnpackError):
        unpack(archive(*[member(name, type=kind, linkname=link) for name, kind, link in members]), top / "in")
    assert sorted(path.name for path in top.iterdir()) == ["in", "outside"]
    assert (top / "outside").read_text() == "untouched"
    assert (top / "outside").stat().st_nlink == 1


def packed(source: Path, name: str) -> bytes:
    with copy._pipe() as (reading, writing):
        out = bytearray()
        worker = copy._Worker(lambda: copy._pack(source, name, writing.fd), writing)
        with worker.blamed_first():
            while data := os.read(reading.fd, 65536):
                out += data
    return bytes(out)


def test_gnu_tar_reads_what_we_write_and_we_read_what_it_writes(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "d").mkdir(parents=True)
    (tree / "d" / "data").write_bytes(data := os.urandom(300_000))
    (tree / ("n" * 150)).write_text("long")
    (tree / "link").symlink_to("t" * 150)
    os.mkfifo(tree / "fifo")
    with (tree / "sparse").open("wb") as sparse:
        sparse.truncate(5_000_000)
        sparse.seek(4_000_000)
        sparse.write(b"island")
    (tmp_path / "theirs").mkdir()
    subprocess.run(["tar", "-x", "-o", "-f", "-", "-C", tmp_path / "theirs"], input=packed(tree, "new"), check=True)
    theirs = tmp_path / "theirs" / "new"
    assert (theirs / "d" / "data").read_bytes() == data
    assert not (theirs / "fifo").exists()
    sent = subprocess.run(["tar", "-c", "-S", "-f", "-", "-C", tmp_path, "./tree"], capture_output=True, check=True)
    (tmp_path / "ours").mkdir()
    told = unpack(sent.stdout, tmp_path / "ours", "tree", "back")
    assert ["fifo" in text for text in told] == [True]
    ours = tmp_path / "ours" / "back"
    assert (ours / "d" / "data").read_bytes() == data
    assert (ours / ("n" * 150)).read_text() == "long"
    assert (ours / "link").readlink() == Path("t" * 150)
    assert (ours / "sparse").read_bytes() == (tree / "sparse").read_bytes()
    assert (ours / "sparse").stat().st_blocks * 512 < 1_000_000


def test_the_packers_error_is_the_one_that_is_told(tmp_path: Path) -> None:
    with pytest.raises(VmrtError, match="copying failed"):
        packed(tmp_path / "absent", "x")
