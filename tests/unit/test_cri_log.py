import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmrt.errors import VmrtError
from vmrt.pods.cri_log import LineSplitter, LogFile, Offsets, Position

LINE = re.compile(rb"^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z) (stdout|stderr) ([PF]) (.*)$", re.S)


def entries(path: Path) -> list[tuple[bytes, bytes, bytes]]:
    found = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        match = LINE.match(line)
        assert match, line
        found.append((match[2], match[3], match[4]))
    return found


def joined(path: Path, stream: bytes) -> bytes:
    return b"".join(content + (b"\n" if tag == b"F" else b"") for name, tag, content in entries(path) if name == stream)


@pytest.fixture
def log(tmp_path: Path) -> LogFile:
    return LogFile(tmp_path / "c" / "0.log", tmp_path / "position", 16)


def test_lines_long_lines_and_a_tail_without_newline(log: LogFile, tmp_path: Path) -> None:
    log.take(False, 0, b"hello\n\n" + b"x" * 40 + b"\nend", 0)
    log.take(True, 0, b"oops\r\n", 0)
    log.finish()
    assert entries(tmp_path / "c" / "0.log") == [
        (b"stdout", b"F", b"hello"),
        (b"stdout", b"F", b""),
        (b"stdout", b"P", b"x" * 16),
        (b"stdout", b"P", b"x" * 16),
        (b"stdout", b"F", b"x" * 8),
        (b"stderr", b"F", b"oops"),
        (b"stdout", b"P", b"end"),
    ]
    assert (tmp_path / "c" / "0.log").stat().st_mode & 0o777 == 0o640


def test_an_unfinished_line_is_not_acknowledged(log: LogFile) -> None:
    assert log.take(False, 0, b"one\ntwo", 0) == Offsets(4, 0)
    assert log.take(True, 0, b"err\n", 0) == Offsets(4, 4)
    assert log.take(False, 7, b"\n", 0) == Offsets(8, 4)


def test_replayed_octets_are_skipped(log: LogFile, tmp_path: Path) -> None:
    log.take(False, 0, b"one\ntwo\n", 0)
    log.take(False, 4, b"two\nthree\n", 0)
    assert joined(tmp_path / "c" / "0.log", b"stdout") == b"one\ntwo\nthree\n"


def test_reopen_goes_on_in_a_new_file_with_the_unfinished_line(log: LogFile, tmp_path: Path) -> None:
    path = tmp_path / "c" / "0.log"
    log.take(False, 0, b"old\nhal", 0)
    path.rename(tmp_path / "c" / "0.log.1")
    log.reopen()
    assert path.exists()
    log.take(False, 7, b"f\n", 0)
    assert joined(tmp_path / "c" / "0.log.1", b"stdout") == b"old\n"
    assert joined(path, b"stdout") == b"half\n"


def test_a_log_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.touch()
    (tmp_path / "link.log").symlink_to(target)
    with pytest.raises(VmrtError, match="cannot open the log"):
        LogFile(tmp_path / "link.log", tmp_path / "position", 16)


def test_time_never_runs_backwards_or_ahead_whatever_age_the_guest_claims(log: LogFile, tmp_path: Path) -> None:
    for n, age in enumerate((0, 10**18, 0, 5_000_000, 2**63)):
        log.take(False, n * 2, b"x\n", age)
    stamps = [line[:30] for line in (tmp_path / "c" / "0.log").read_bytes().split(b"\n")[:-1]]
    assert stamps == sorted(stamps)
    # Without an argument gmtime() asks time(2), which may be a tick behind clock_gettime(2).
    assert stamps[-1] <= time.strftime("%Y-%m-%dT%H:%M:%S.999999999Z", time.gmtime(time.time())).encode()


@pytest.mark.parametrize("written", ["nothing", "part", "all"])
def test_a_daemon_killed_in_a_write_neither_loses_nor_doubles(tmp_path: Path, written: str) -> None:
    path, position_path = tmp_path / "0.log", tmp_path / "position"
    first = LogFile(path, position_path, 16)
    first.take(False, 0, b"one\n", 0)
    first.close()
    # The instant of death: the intent is noted, the write has come this far.
    before = path.stat().st_size
    entry = b"2026-01-01T00:00:00.000000000Z stdout F two\n"
    position = Position(position_path)
    position.intend(Offsets(8, 0), path.stat().st_ino, before, before + len(entry))
    position.close()
    with path.open("ab") as file:
        file.write({"nothing": b"", "part": entry[:20], "all": entry}[written])
    second = LogFile(path, position_path, 16)
    at = second.position.committed.stdout
    second.take(False, at, b"one\ntwo\nthree\n"[at:], 0)
    assert joined(path, b"stdout") == b"one\ntwo\nthree\n"


@given(chunks=st.lists(st.binary(max_size=60), max_size=20), limit=st.integers(1, 40))
def test_splitting_keeps_every_octet(chunks: list[bytes], limit: int) -> None:
    splitter = LineSplitter(limit)
    out = []
    for chunk in chunks:
        out += splitter.feed(chunk.replace(b"\r", b" "))
    out += splitter.finish()
    assert b"".join(content + (b"\n" if ends else b"") for content, ends in out) == b"".join(chunks).replace(
        b"\r", b" "
    )
    assert all(len(content) <= limit for content, _ in out)
    assert all(b"\n" not in content for content, _ in out)
