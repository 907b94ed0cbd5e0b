import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmrt.agent import agent_pb2 as pb
from vmrt.agent import status, ttrpc
from vmrt.agent.layout import MAX_MESSAGE_BYTES

odd_ids = st.integers(0, 2**31 - 1).map(lambda n: 2 * n + 1)


def feed_in_pieces(decoder: ttrpc.Decoder, data: bytes, cuts: list[int]) -> list[ttrpc.Message]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [m for start, end in itertools.pairwise(edges) for m in decoder.feed(data[start:end])]


def test_header_is_as_the_protocol_document_draws_it() -> None:
    assert ttrpc.encode(3, ttrpc.REQUEST, b"ab", 1) == b"\0\0\0\x02\0\0\0\x03\x01\x01ab"


@given(
    st.lists(st.tuples(odd_ids, st.binary(max_size=300)), unique_by=lambda pair: pair[0], max_size=6),
    st.lists(st.integers(0, 10_000)),
)
def test_requests_survive_any_cutting(sent: list[tuple[int, bytes]], cuts: list[int]) -> None:
    sent.sort()
    data = b"".join(ttrpc.encode(stream_id, ttrpc.REQUEST, payload) for stream_id, payload in sent)
    decoder = ttrpc.ServerDecoder()
    received = feed_in_pieces(decoder, data, cuts)
    assert [(m.stream_id, m.payload) for m in received] == sent
    assert decoder.idle


@given(st.lists(st.binary(max_size=64)))
def test_any_octets_give_messages_or_a_protocol_error(pieces: list[bytes]) -> None:
    for decoder in (ttrpc.ServerDecoder(1000), ttrpc.ClientDecoder(1000)):
        try:
            for piece in pieces:
                for message in decoder.feed(piece):
                    assert len(message.payload) <= 1000
        except ttrpc.ProtocolError:
            with pytest.raises(ttrpc.ProtocolError):
                decoder.feed(ttrpc.encode(1, ttrpc.REQUEST, b""))


def test_too_long_a_message_is_refused_by_its_header() -> None:
    header = ttrpc.HEADER.pack(MAX_MESSAGE_BYTES + 1, 5, ttrpc.REQUEST, 0)
    with pytest.raises(ttrpc.ProtocolError, match="longer than") as caught:
        ttrpc.ServerDecoder().feed(header)
    assert caught.value.stream_id == 5
    with pytest.raises(ttrpc.ProtocolError, match="longer than"):
        ttrpc.encode(1, ttrpc.REQUEST, bytes(MAX_MESSAGE_BYTES + 1))


@pytest.mark.parametrize("ids", [(2,), (0,), (3, 3), (5, 3)])
def test_server_wants_odd_rising_stream_ids(ids: tuple[int, ...]) -> None:
    data = b"".join(ttrpc.encode(stream_id, ttrpc.REQUEST, b"") for stream_id in ids)
    with pytest.raises(ttrpc.ProtocolError, match="not odd and rising"):
        ttrpc.ServerDecoder().feed(data)


@pytest.mark.parametrize("kind", [ttrpc.RESPONSE, ttrpc.DATA, 0, 9])
def test_server_takes_requests_only(kind: int) -> None:
    with pytest.raises(ttrpc.ProtocolError):
        ttrpc.ServerDecoder().feed(ttrpc.HEADER.pack(0, 1, kind, 0))


@pytest.mark.parametrize("kind", [ttrpc.REQUEST, ttrpc.DATA])
def test_client_takes_responses_only(kind: int) -> None:
    with pytest.raises(ttrpc.ProtocolError):
        ttrpc.ClientDecoder().feed(ttrpc.HEADER.pack(0, 1, kind, 0))


def test_request_envelope_has_the_documented_fields() -> None:
    (message,) = ttrpc.ServerDecoder().feed(ttrpc.request(1, "svc", "Do", b"\x01", 7))
    assert message.flags == ttrpc.REMOTE_CLOSED
    # service = 1, method = 2, payload = 3, timeout_nano = 4
    assert message.payload == b"\x0a\x03svc\x12\x02Do\x1a\x01\x01\x20\x07"
    assert ttrpc.parse_request(message).method == "Do"


def test_a_payload_that_is_no_envelope_is_the_callers_fault() -> None:
    with pytest.raises(status.AgentError) as caught:
        ttrpc.parse_request(ttrpc.Message(1, ttrpc.REQUEST, 0, b"\xff\xff"))
    assert caught.value.code == status.INVALID_ARGUMENT
    with pytest.raises(ttrpc.ProtocolError):
        ttrpc.parse_response(ttrpc.Message(1, ttrpc.RESPONSE, 0, b"\xff\xff"))


def test_answers_come_back_as_payload_or_error() -> None:
    good, bad = ttrpc.ClientDecoder().feed(ttrpc.response(1, b"x") + ttrpc.failure(3, status.NOT_FOUND, "no such"))
    assert ttrpc.parse_response(good) == b"x"
    with pytest.raises(status.AgentError, match="no such") as caught:
        ttrpc.parse_response(bad)
    assert caught.value.code == status.NOT_FOUND


def test_status_with_details_of_a_foreign_server_is_understood() -> None:
    # google.rpc.Status has `details` as field 3, which our message leaves out.
    with_details = pb.TtrpcStatus(code=5, message="m").SerializeToString() + b"\x1a\x02\x0a\x00"
    envelope = b"\x0a" + bytes((len(with_details),)) + with_details
    with pytest.raises(status.AgentError, match="m"):
        ttrpc.parse_response(ttrpc.Message(1, ttrpc.RESPONSE, 0, envelope))
