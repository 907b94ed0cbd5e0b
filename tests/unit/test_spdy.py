"""SPDY/3.1 framing: both ends against each other, the limits, and whatever octets a peer may send."""

from __future__ import annotations

import hashlib
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmrt.streaming import spdy
from vmrt.streaming.spdy_dictionary import DICTIONARY

CORPUS = Path(__file__).parent / "corpus" / "spdy"
# As Go's client sends it: SYN_STREAM 1 with streamtype: error, by moby/spdystream.
SYN = [("streamtype", "error")]


def pair() -> tuple[spdy.Connection, spdy.Connection]:
    return spdy.Connection(client=True), spdy.Connection()


def control(kind: int, body: bytes, flags: int = 0, version: int = 3) -> bytes:
    return struct.pack(">II", 0x80000000 | version << 16 | kind, flags << 24 | len(body)) + body


def syn(stream_id: int, block: bytes, flags: int = 0) -> bytes:
    return control(1, struct.pack(">IIH", stream_id, 0, 0) + block, flags)


def block(plain: bytes) -> bytes:
    deflate = zlib.compressobj(zdict=DICTIONARY)
    return deflate.compress(plain) + deflate.flush(zlib.Z_SYNC_FLUSH)


def test_the_dictionary_is_the_drafts() -> None:
    assert len(DICTIONARY) == 1423
    assert hashlib.sha256(DICTIONARY).hexdigest() == "51d27341373f923f3cd88e1eb7162aeaa3723d7585ff2399201dc06498407f02"


def test_a_stream_from_open_to_end() -> None:
    client, server = pair()
    stream = client.open([("streamtype", "data"), ("Port", "80"), ("x", "1"), ("x", "2")])
    (opened,) = server.receive(client.take())
    headers = [("streamtype", "data"), ("port", "80"), ("x", "1"), ("x", "2")]
    assert opened == spdy.StreamOpened(stream, headers, False)
    server.reply(stream)
    server.send(stream, b"hello")
    assert list(client.receive(server.take())) == [
        spdy.StreamReplied(stream, [], False),
        spdy.DataReceived(stream, b"hello", False),
    ]
    assert client.send(stream, b"bye", fin=True)
    assert not client.send(stream, b"more")
    assert list(server.receive(client.take())) == [spdy.DataReceived(stream, b"bye", True)]
    assert server.send(stream, b"", fin=True)
    assert list(client.receive(server.take())) == [spdy.DataReceived(stream, b"", True)]
    assert not server.send(stream, b"late")


def test_header_compression_is_one_context_for_each_direction() -> None:
    client, server = pair()
    for number in range(5):
        client.open([("streamtype", "data"), ("requestid", str(number))])
    ids = [dict(event.headers)["requestid"] for event in server.receive(client.take())]  # type: ignore[union-attr]
    assert ids == ["0", "1", "2", "3", "4"]


def test_a_data_frame_is_handed_on_before_it_is_whole() -> None:
    client, server = pair()
    stream = client.open(SYN)
    list(server.receive(client.take()))
    client.send(stream, b"x" * 100_000, fin=True)
    data = client.take()
    assert list(server.receive(data[:1000])) == [spdy.DataReceived(stream, b"x" * 992, False)]
    rest = list(server.receive(data[1000:]))
    assert rest == [spdy.DataReceived(stream, b"x" * (100_000 - 992), True)]


def test_a_ping_is_echoed_and_an_answer_told() -> None:
    client, server = pair()
    number = client.ping()
    assert list(server.receive(client.take())) == []
    assert list(client.receive(server.take())) == [spdy.PingAnswered(number)]


def test_a_reset_ends_a_stream_and_late_data_is_dropped() -> None:
    client, server = pair()
    stream = client.open(SYN)
    client.send(stream, b"late")
    first = client.take()
    list(server.receive(first[:-12]))
    server.reset(stream)
    assert list(server.receive(first[-12:])) == []
    assert list(client.receive(server.take())) == [spdy.StreamReset(stream, spdy.Reset.CANCEL)]
    assert not client.send(stream, b"x")


def test_data_for_a_stream_that_never_was_is_answered_by_a_reset() -> None:
    _, server = pair()
    assert list(server.receive(struct.pack(">II", 7, 3) + b"abc")) == []
    assert server.take() == control(3, struct.pack(">II", 7, spdy.Reset.INVALID_STREAM))


def test_data_behind_fin_is_answered_by_a_reset() -> None:
    client, server = pair()
    stream = client.open(SYN, fin=True)
    (opened,) = server.receive(client.take())
    assert isinstance(opened, spdy.StreamOpened)
    assert opened.fin
    assert list(server.receive(struct.pack(">II", stream, 1) + b"a")) == []
    assert server.take() == control(3, struct.pack(">II", stream, spdy.Reset.STREAM_ALREADY_CLOSED))


def test_too_many_streams_are_refused_one_by_one() -> None:
    client, server = spdy.Connection(client=True), spdy.Connection(max_streams=2)
    for _ in range(3):
        client.open(SYN)
    assert len(list(server.receive(client.take()))) == 2
    assert list(client.receive(server.take())) == [spdy.StreamReset(5, spdy.Reset.REFUSED_STREAM)]


@pytest.mark.parametrize("number", [2, 0, 1])
def test_a_stream_id_that_is_not_the_clients_next_ends_the_connection(number: int) -> None:
    client, server = pair()
    client.open(SYN)
    list(server.receive(client.take()))
    other = zlib.compressobj(zdict=DICTIONARY)
    with pytest.raises(spdy.ProtocolError):
        list(server.receive(syn(number, other.compress(b""))))
    with pytest.raises(spdy.ProtocolError, match="broken"):
        list(server.receive(b""))


@pytest.mark.parametrize(
    "data",
    [
        control(1, b"", version=2),
        struct.pack(">II", 0x80030001, spdy.MAX_CONTROL_BYTES + 1),
        control(1, b"\0" * 4),
        control(3, b"\0" * 7),
        control(6, b"\0"),
        syn(1, b"not zlib"),
        syn(1, block(b"")),
        syn(1, block(struct.pack(">I", 1))),
        syn(1, block(struct.pack(">II", 1, 99) + b"x")),
        syn(1, block(struct.pack(">I", spdy.MAX_HEADERS + 1))),
        syn(1, block(struct.pack(">I", 0) + b"rest")),
        syn(1, block(struct.pack(">III", 1, 0, 0))),
        syn(1, block(struct.pack(">II", 2, 1) + b"a" + struct.pack(">II", 0, 1) + b"a" + struct.pack(">I", 0))),
    ],
)
def test_a_broken_frame_ends_the_connection(data: bytes) -> None:
    with pytest.raises(spdy.ProtocolError):
        list(spdy.Connection().receive(data))


def test_a_zlib_bomb_is_not_inflated() -> None:
    bomb = block(struct.pack(">II", 1, 30_000_000) + b"a" * 30_000_000)
    assert len(bomb) < spdy.MAX_CONTROL_BYTES
    with pytest.raises(spdy.ProtocolError, match="headers of more than"):
        list(spdy.Connection().receive(syn(1, bomb)))


def test_settings_window_updates_and_unknown_frames_are_read_over() -> None:
    server = spdy.Connection()
    data = control(4, struct.pack(">I", 0)) + control(9, struct.pack(">II", 1, 5)) + control(77, b"future")
    assert list(server.receive(data)) == []
    assert server.take() == b""


def feed(data: bytes, sizes: list[int]) -> list[spdy.Event]:
    connection = spdy.Connection(max_streams=8)
    events: list[spdy.Event] = []
    try:
        at = 0
        for size in [*sizes, len(data)]:
            events += connection.receive(data[at : at + size])
            at += size
    except spdy.ProtocolError:
        pass
    return events


@given(st.binary(max_size=400), st.lists(st.integers(1, 50), max_size=8))
def test_any_octets_give_events_or_a_protocol_error(data: bytes, sizes: list[int]) -> None:
    feed(data, sizes)


FRAMES = st.one_of(
    st.builds(syn, st.integers(0, 9), st.binary(max_size=40).map(block), st.integers(0, 3)),
    st.builds(
        lambda number, headers: syn(number, block(spdy.encode_headers(headers))),
        st.integers(0, 9),
        st.lists(st.tuples(st.text(max_size=5), st.text(max_size=5)), max_size=3),
    ),
    st.builds(control, st.integers(0, 12), st.binary(max_size=20), st.integers(0, 3)),
    st.builds(
        lambda number, data, flags: struct.pack(">II", number, flags << 24 | len(data)) + data,
        st.integers(0, 9),
        st.binary(max_size=30),
        st.integers(0, 3),
    ),
)


@given(st.lists(FRAMES, max_size=8), st.lists(st.integers(1, 50), max_size=8))
def test_frames_out_of_place_give_events_or_a_protocol_error(frames: list[bytes], sizes: list[int]) -> None:
    feed(b"".join(frames), sizes)


@given(
    st.lists(
        st.tuples(st.text(min_size=1, max_size=10).map(str.lower), st.text(max_size=20)),
        max_size=5,
        unique_by=lambda pair: pair[0].lower(),
    ),
    st.lists(st.binary(max_size=200), max_size=5),
    st.integers(1, 40),
)
def test_what_one_end_sends_the_other_receives(headers: list[tuple[str, str]], pieces: list[bytes], size: int) -> None:
    client, server = pair()
    stream = client.open(headers)
    for piece in pieces:
        client.send(stream, piece)
    client.send(stream, b"", fin=True)
    data = client.take()
    events = [event for at in range(0, len(data), size) for event in server.receive(data[at : at + size])]
    assert isinstance(events[0], spdy.StreamOpened)
    wanted = [(n.lower(), part) for n, v in headers for part in v.split("\0")]
    assert sorted(events[0].headers) == sorted(wanted)
    received = [event for event in events[1:] if isinstance(event, spdy.DataReceived)]
    assert b"".join(event.data for event in received) == b"".join(pieces)
    assert [event.fin for event in received].count(True) == 1


@pytest.mark.parametrize("path", sorted(CORPUS.iterdir()), ids=lambda path: path.name)
def test_the_corpus_gives_events_or_a_protocol_error(path: Path) -> None:
    data = path.read_bytes()
    assert feed(data, []) is not None
    feed(data, [1] * len(data))
