import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmrt.agent import agent_pb2 as pb
from vmrt.agent import frames
from vmrt.agent.layout import MAX_FRAME_BYTES


def test_frame_is_as_the_protocol_file_says() -> None:
    assert frames.encode(pb.STDIN, b"hi") == b"\x03\0\0\0\x02hi"


@given(
    st.lists(st.tuples(st.sampled_from(sorted(frames.FROM_HOST)), st.binary(max_size=200)), max_size=6),
    st.integers(1, 50),
)
def test_frames_survive_any_cutting(sent: list[tuple[int, bytes]], step: int) -> None:
    data = b"".join(frames.encode(kind, payload) for kind, payload in sent)
    decoder = frames.Decoder(frames.FROM_HOST)
    received = [frame for at in range(0, len(data), step) for frame in decoder.feed(data[at : at + step])]
    assert [(frame.type, frame.payload) for frame in received] == sent
    assert decoder.idle


@given(
    st.lists(st.tuples(st.sampled_from(sorted(frames.FROM_HOST)), st.binary(max_size=200)), max_size=6),
    st.integers(1, 50),
)
def test_payloads_in_pieces_are_the_same_octets_in_the_same_order(sent: list[tuple[int, bytes]], step: int) -> None:
    data = b"".join(frames.encode(kind, payload) for kind, payload in sent)
    decoder = frames.Decoder(frames.FROM_HOST, pieces=(pb.STDIN,))
    received: list[tuple[int, bytes]] = []
    for at in range(0, len(data), step):
        received += [(frame.type, bytes(frame.payload)) for frame in decoder.feed(data[at : at + step])]
    assert decoder.idle

    def joined(those: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
        out: list[tuple[int, bytes]] = []
        for kind, payload in those:
            if out and kind == out[-1][0] == pb.STDIN:
                out[-1] = (kind, out[-1][1] + payload)
            else:
                out.append((kind, payload))
        return out

    assert joined(received) == joined(sent)


def test_a_payload_in_pieces_is_no_clean_place_for_an_end() -> None:
    decoder = frames.Decoder(frames.FROM_HOST, pieces=(pb.STDIN,))
    whole = frames.encode(pb.STDIN, b"abc")
    seen = []
    for data in (whole[:5], whole[5:7], whole[7:] + frames.encode(pb.STDIN)):
        seen.append(([bytes(frame.payload) for frame in decoder.feed(data)], decoder.idle))
    assert seen == [([], False), ([b"ab"], False), ([b"c", b""], True)]
    with pytest.raises(frames.FrameError):
        decoder.feed(frames.HEADER.pack(pb.STDIN, MAX_FRAME_BYTES + 1))


@given(st.lists(st.binary(max_size=64)))
def test_any_octets_give_acceptable_frames_or_an_error(pieces: list[bytes]) -> None:
    decoder = frames.Decoder(frames.FROM_GUEST)
    try:
        for piece in pieces:
            assert all(frame.type in frames.FROM_GUEST for frame in decoder.feed(piece))
    except frames.FrameError:
        with pytest.raises(frames.FrameError):
            decoder.feed(frames.encode(pb.STDOUT, b""))


def test_limit_leaves_the_rest_for_later() -> None:
    decoder = frames.Decoder(frames.FROM_HOST)
    both = frames.encode(pb.HELLO, b"a") + frames.encode(pb.STDIN, b"b")
    assert [frame.type for frame in decoder.feed(both, 1)] == [pb.HELLO]
    assert [frame.payload for frame in decoder.feed(b"")] == [b"b"]


def test_length_is_bounded_both_ways() -> None:
    with pytest.raises(frames.FrameError):
        frames.encode(pb.STDIN, bytes(MAX_FRAME_BYTES + 1))
    with pytest.raises(frames.FrameError):
        frames.Decoder(frames.FROM_HOST).feed(frames.HEADER.pack(pb.STDIN, MAX_FRAME_BYTES + 1))


def test_ends_take_only_what_the_other_may_send() -> None:
    assert not frames.FROM_HOST & frames.FROM_GUEST - {pb.CLOSE}
    with pytest.raises(frames.FrameError):
        frames.Decoder(frames.FROM_GUEST).feed(frames.encode(pb.STDIN, b""))


@given(st.binary(max_size=3 * MAX_FRAME_BYTES))
def test_data_of_any_length_arrives_whole(data: bytes) -> None:
    received = frames.Decoder(frames.FROM_HOST).feed(frames.encode_data(pb.STDIN, data))
    assert b"".join(frame.payload for frame in received) == data


@pytest.mark.parametrize("payload", [b"", b"\x03\x03", bytes((pb.EXIT,))])
def test_close_names_one_stream(payload: bytes) -> None:
    assert frames.closed_stream(frames.Frame(pb.CLOSE, bytes((pb.STDIN,)))) == pb.STDIN
    with pytest.raises(frames.FrameError):
        frames.closed_stream(frames.Frame(pb.CLOSE, payload))


def test_payload_of_another_message_is_an_error() -> None:
    with pytest.raises(frames.FrameError, match="WindowSize"):
        frames.Frame(pb.RESIZE, b"\xff").parse(pb.WindowSize)
