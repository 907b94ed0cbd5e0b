import os
import select
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmrt.agent.output import STDERR, STDOUT, Output, Pump, Stream

chunks = st.lists(st.binary(min_size=1, max_size=50), max_size=20)


def read_all(stream: Stream, offset: int) -> bytes:
    data = b""
    while part := stream.read(offset + len(data))[0]:
        data += part
    return data


@given(chunks, st.integers(0, 1000), st.integers(0, 5_000_000))
def test_stream_gives_back_what_was_not_dropped(parts: list[bytes], floor: int, gap_ns: int) -> None:
    stream, whole = Stream(), b"".join(parts)
    for number, part in enumerate(parts):
        stream.append(part, number * gap_ns)
    stream.drop(floor)
    # Whole chunks only: more may be kept than was asked for, never less.
    assert stream.start <= min(floor, len(whole)) or stream.start == stream.end
    assert read_all(stream, stream.start) == whole[stream.start :]
    assert stream.end == len(whole)


def test_stream_forgets_everything_that_is_acknowledged() -> None:
    stream = Stream()
    stream.append(b"abc", 0)
    stream.drop(3)
    assert (stream.start, stream.end, stream.cost) == (3, 3, 0)
    stream.append(b"d", 0)
    assert stream.read(3) == (b"d", 0)


def test_a_new_log_reader_goes_on_where_the_acknowledged_one_was() -> None:
    output = Output()
    output.append(STDOUT, b"hello ")
    first = output.follow_log(0, 0)
    assert first.next() is not None
    output.acknowledge(3, 0)
    second = output.follow_log(3, 0)
    assert first.ended  # one log reader at a time
    taken = second.next()
    assert taken is not None
    assert taken[:3] == (STDOUT, 3, b"lo ")
    first.close()
    second.close()


def test_offset_behind_the_end_is_refused_and_a_dropped_one_is_skipped() -> None:
    output = Output()
    output.append(STDERR, b"abc")
    output.acknowledge(0, 3)
    output.append(STDERR, b"def")
    with pytest.raises(ValueError, match="behind the end"):
        output.follow_log(1, 0)
    cursor = output.follow_log(0, 0)
    taken = cursor.next()
    assert taken is not None
    assert taken[:3] == (STDERR, 3, b"def")
    cursor.close()


def test_acknowledging_what_never_was_changes_nothing() -> None:
    output = Output()
    output.append(STDOUT, b"abc")
    output.acknowledge(2**60, 2**60)
    output.append(STDOUT, b"def")
    cursor = output.follow_log(0, 0)
    taken = cursor.next()
    assert taken is not None
    assert taken[:3] == (STDOUT, 3, b"def")
    cursor.close()


def test_a_full_buffer_has_room_again_after_the_acknowledgement() -> None:
    output = Output(1000)
    output.append(STDOUT, bytes(2000))
    assert output.full(STDOUT)
    assert not output.full(STDERR)
    output.acknowledge(2000, 0)
    assert not output.full(STDOUT)
    assert select.select([output.room], [], [], 0)[0]


def test_many_tiny_writes_are_bounded_too() -> None:
    stream, limit = Stream(), 10_000
    count = 0
    while stream.cost < limit:
        stream.append(b"x", count * 10_000_000)
        count += 1
    assert count < 100


def test_an_attached_client_holds_back_what_it_has_not_been_sent() -> None:
    output = Output(1000, discard=True)
    output.append(STDOUT, b"before")
    cursor = output.attach()
    output.append(STDOUT, bytes(1500))
    assert output.full(STDOUT)
    taken = cursor.next()
    assert taken is not None
    assert taken[1] == len(b"before")  # live output only
    assert not output.full(STDOUT)
    cursor.close()


def test_without_log_and_client_nothing_is_kept() -> None:
    output = Output(1000, discard=True)
    for _ in range(100):
        output.append(STDOUT, bytes(500))
    assert not output.full(STDOUT)


def test_readers_get_both_streams_in_the_order_of_reading() -> None:
    output = Output()
    output.append(STDOUT, b"one")
    time.sleep(0.005)
    output.append(STDERR, b"two")
    cursor = output.follow_log(0, 0)
    assert [chunk[0] for chunk in (cursor.next(), cursor.next()) if chunk is not None] == [STDOUT, STDERR]
    cursor.close()


def test_pump_stops_reading_when_full_and_ends_with_its_streams() -> None:
    output = Output(4096)
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    pump = Pump(output, {reader: STDOUT}, -1, lambda: None)
    pump.start()
    cursor = output.follow_log(0, 0)
    written = 0
    try:
        while select.select([], [writer], [], 0.3)[1]:
            written += os.write(writer, bytes(65536))
    except BlockingIOError:
        pass
    assert written < 1_000_000  # the pipe's own room and a read or two; then the writer blocks
    os.close(writer)
    read = 0
    while not cursor.at_end():
        chunk = cursor.next()
        if chunk is None:
            select.select([cursor.wake_fd], [], [], 5)
            cursor.clear_wake()
        else:
            read += len(chunk[2])
            output.acknowledge(read, 0)
    assert read == written
    cursor.close()
    pump.finish()
    pump.join(10)
    assert not pump.is_alive()
