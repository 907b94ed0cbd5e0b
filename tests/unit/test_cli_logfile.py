from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmrt.cli.logfile import Entry, LogReader, Parser, Printer, last_lines, parse
from vmrt.pods.cri_log import LogFile

STAMP = b"2026-11-21T06:00:00.123456789Z"


def entry(octets: bytes, *, stderr: bool = False) -> Entry:
    return Entry(STAMP, stderr, not octets.endswith(b"\n"), octets)


def line(each: Entry) -> bytes:
    tag = b"P" if each.partial else b"F"
    return b"%s %s %s %s\n" % (STAMP, b"stderr" if each.stderr else b"stdout", tag, each.octets.removesuffix(b"\n"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"T stdout F hello", Entry(b"T", False, False, b"hello\n")),
        (b"T stderr P hel", Entry(b"T", True, True, b"hel")),
        (b"T stdout F:x:y two  words ", Entry(b"T", False, False, b"two  words \n")),
        (b"T stdout F ", Entry(b"T", False, False, b"\n")),
        (b"T stdout F", Entry(b"T", False, False, b"\n")),
        (b"T stdout F \xff\x00\r", Entry(b"T", False, False, b"\xff\x00\r\n")),
        (b"", None),
        (b"T stdout", None),
        (b"T stdlog F x", None),
        (b"T stdout X x", None),
        (b"T stdout  x", None),
    ],
)
def test_parse(text: bytes, expected: Entry | None) -> None:
    assert parse(text) == expected


pieces = st.lists(
    st.builds(
        lambda content, end, stderr: entry(content + end, stderr=stderr),
        st.binary(max_size=40).map(lambda octets: octets.replace(b"\n", b" ")),
        st.sampled_from([b"\n", b""]),
        stderr=st.booleans(),
    ),
    max_size=20,
)


@given(pieces, st.lists(st.integers(0, 2000), max_size=10))
def test_however_the_file_is_cut_the_entries_are_the_same(entries: list[Entry], cuts: list[int]) -> None:
    data = b"".join(line(each) for each in entries)
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    parser = Parser()
    got = [each for i in range(len(places) - 1) for each in parser.feed(data[places[i] : places[i + 1]])]
    assert got == entries
    assert parser.skipped == 0


@given(st.binary())
def test_any_octets_are_survived(data: bytes) -> None:
    parser = Parser()
    entries = parser.feed(data)
    assert len(entries) + parser.skipped == data.count(b"\n")


def without_cr(octets: bytes) -> bytes:
    # The daemon drops a carriage return before a newline, as containerd does.
    return octets.replace(b"\r", b" ")


@given(
    st.lists(st.tuples(st.booleans(), st.binary(min_size=1, max_size=200).map(without_cr)), max_size=12),
    st.integers(1, 64),
)
def test_what_the_daemon_writes_is_given_back_octet_by_octet(
    tmp_path_factory: pytest.TempPathFactory, chunks: list[tuple[bool, bytes]], limit: int
) -> None:
    """The daemon's writer and this reader are inverse, for any output and any line limit."""
    directory = tmp_path_factory.mktemp("log")
    log = LogFile(directory / "0.log", directory / "position", limit)
    offsets = [0, 0]
    for stderr, data in chunks:
        log.take(stderr, offsets[stderr], data, 0)
        offsets[stderr] += len(data)
    log.finish()
    log.close()
    streams = io.BytesIO(), io.BytesIO()
    printer, reader = Printer(*streams), LogReader(directory / "0.log")
    for entries in reader.available():
        printer.write(entries)
    reader.close()
    for stderr in (False, True):
        assert streams[stderr].getvalue() == b"".join(data for each, data in chunks if each is stderr)


@given(pieces, st.integers(0, 6))
def test_last_lines_is_the_end_of_each_stream(entries: list[Entry], count: int) -> None:
    kept = last_lines(entries, count)
    for stderr in (False, True):
        whole = b"".join(each.octets for each in entries if each.stderr is stderr)
        assert whole.endswith(b"".join(each.octets for each in kept if each.stderr is stderr))
    lines = sum(not each.partial for each in kept) + sum(
        bool(mine) and mine[-1].partial for mine in ([e for e in kept if e.stderr is s] for s in (False, True))
    )
    assert lines <= count
    if count == 6 and len(entries) <= 6:
        assert sorted(kept, key=id) == sorted(entries, key=id)


def test_last_lines_counts_a_line_in_pieces_once() -> None:
    entries = [entry(b"a\n"), entry(b"b1"), entry(b"err\n", stderr=True), entry(b"b2\n"), entry(b"c\n")]
    assert [each.octets for each in last_lines(entries, 3)] == [b"b1", b"b2\n", b"err\n", b"c\n"]


def everything(reader: LogReader) -> bytes:
    return b"".join(each.octets for entries in reader.available() for each in entries)


def test_reader_waits_for_the_rest_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    reader = LogReader(path)
    assert everything(reader) == b""  # not there yet
    path.write_bytes(line(entry(b"one\n")) + b"2026 stdout F tw")
    assert everything(reader) == b"one\n"
    with path.open("ab") as log:
        log.write(b"o\n")
    assert everything(reader) == b"two\n"
    reader.close()


def test_reader_follows_rotations_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    path.write_bytes(line(entry(b"one\n")))
    reader = LogReader(path)
    assert everything(reader) == b"one\n"
    with path.open("ab") as log:
        log.write(line(entry(b"two\n")))
    path.rename(tmp_path / "0.log.1")
    path.write_bytes(line(entry(b"three\n")))
    assert everything(reader) == b"two\nthree\n"
    path.unlink()
    assert everything(reader) == b""
    reader.close()


def test_follow_reads_to_the_end_after_the_container_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    answers = iter([True, True, False])

    def running() -> bool:
        alive = next(answers)
        with path.open("ab") as log:
            log.write(line(entry(b"more\n" if alive else b"last\n")))
        return alive

    reader = LogReader(path)
    assert [each.octets for entries in reader.follow(running) for each in entries] == [b"more\n", b"more\n", b"last\n"]
    reader.close()


def test_timestamps_stand_at_line_starts_only() -> None:
    out, err = io.BytesIO(), io.BytesIO()
    printer = Printer(out, err, timestamps=True)
    printer.write([entry(b"a")])
    printer.write([entry(b"b\n"), entry(b"x\n", stderr=True), entry(b"c\n")])
    assert out.getvalue() == STAMP + b" ab\n" + STAMP + b" c\n"
    assert err.getvalue() == STAMP + b" x\n"
