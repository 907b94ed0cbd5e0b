"""ttRPC without I/O: octets in, messages out; used by the guest's server and the host's client.

Wire format (containerd/ttrpc, PROTOCOL.md): a header of 10 octets, big endian, then the payload::

    4 octets payload length, at most 4 MiB
    4 octets stream id: odd for streams that the client opened
    1 octet  type: 1 request, 2 response, 3 data
    1 octet  flags: 1 remote closed, 2 remote open, 4 no data

Only unary calls are spoken here, so a request opens and closes its stream and a data message breaks the protocol.
Rules held by the decoders, each broken one being a `ProtocolError` after which the connection is of no use:
a server takes requests only, with odd, rising stream ids; a client takes responses only; no payload is longer than
`max_payload`, and none is buffered before its header has been checked.
"""

from __future__ import annotations

import struct

from google.protobuf.message import DecodeError

from vmrt.agent import agent_pb2 as pb
from vmrt.agent import status
from vmrt.agent.layout import MAX_MESSAGE_BYTES

HEADER = struct.Struct(">IIBB")
REQUEST = 1
RESPONSE = 2
DATA = 3
REMOTE_CLOSED = 1

_TYPES = (REQUEST, RESPONSE, DATA)


class ProtocolError(Exception):
    """The peer broke the protocol. `stream_id` is the stream to blame, 0 when none is."""

    def __init__(self, message: str, stream_id: int = 0) -> None:
        super().__init__(message)
        self.stream_id = stream_id


class Message:
    """One ttRPC message."""

    __slots__ = ("flags", "kind", "payload", "stream_id")

    def __init__(self, stream_id: int, kind: int, flags: int, payload: bytes) -> None:
        self.stream_id = stream_id
        self.kind = kind
        self.flags = flags
        self.payload = payload


def encode(stream_id: int, kind: int, payload: bytes, flags: int = 0) -> bytes:
    """Return one message as octets. Raises `ProtocolError` when the payload is longer than the peer would take."""
    if len(payload) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"message of {len(payload)} octets is longer than {MAX_MESSAGE_BYTES}", stream_id)
    return HEADER.pack(len(payload), stream_id, kind, flags) + payload


class Decoder:
    """Cuts a byte stream into messages. After a `ProtocolError` it takes nothing more."""

    def __init__(self, max_payload: int = MAX_MESSAGE_BYTES) -> None:
        self._max_payload = max_payload
        self._buffer = bytearray()
        self._broken = False

    def feed(self, data: bytes) -> list[Message]:
        """Add octets; return the messages that are complete now. Raises `ProtocolError`."""
        if self._broken:
            raise ProtocolError("octets after a protocol error")
        self._buffer += data
        messages: list[Message] = []
        start = 0
        try:
            while len(self._buffer) - start >= HEADER.size:
                length, stream_id, kind, flags = HEADER.unpack_from(self._buffer, start)
                self._check(length, stream_id, kind)
                end = start + HEADER.size + length
                if len(self._buffer) < end:
                    break
                payload = bytes(memoryview(self._buffer)[start + HEADER.size : end])
                messages.append(Message(stream_id, kind, flags, payload))
                start = end
        except ProtocolError:
            self._broken = True
            self._buffer.clear()
            raise
        del self._buffer[:start]
        return messages

    @property
    def idle(self) -> bool:
        """Whether the stream stands between two messages, where an EOF is a clean one."""
        return not self._buffer

    def _check(self, length: int, stream_id: int, kind: int) -> None:
        if kind not in _TYPES:
            raise ProtocolError(f"unknown message type {kind}", stream_id)
        if length > self._max_payload:
            raise ProtocolError(f"message of {length} octets is longer than {self._max_payload}", stream_id)


class ServerDecoder(Decoder):
    """What a server may receive: requests on odd, rising stream ids."""

    def __init__(self, max_payload: int = MAX_MESSAGE_BYTES) -> None:
        super().__init__(max_payload)
        self._last = 0

    def feed(self, data: bytes) -> list[Message]:
        """Add octets; return the requests that are complete now. Raises `ProtocolError`."""
        messages = super().feed(data)
        for message in messages:
            if message.kind != REQUEST:
                self._broken = True
                raise ProtocolError(f"a server takes requests only, not type {message.kind}", message.stream_id)
            if message.stream_id % 2 == 0 or message.stream_id <= self._last:
                self._broken = True
                raise ProtocolError(f"stream id {message.stream_id} is not odd and rising", message.stream_id)
            self._last = message.stream_id
        return messages


class ClientDecoder(Decoder):
    """What a client may receive: responses."""

    def feed(self, data: bytes) -> list[Message]:
        """Add octets; return the responses that are complete now. Raises `ProtocolError`."""
        messages = super().feed(data)
        for message in messages:
            if message.kind != RESPONSE:
                self._broken = True
                raise ProtocolError(f"a client takes responses only, not type {message.kind}", message.stream_id)
        return messages


def request(stream_id: int, service: str, method: str, payload: bytes, timeout_ns: int = 0) -> bytes:
    """Return a request message; `timeout_ns` 0 means that the server chooses its own limits."""
    envelope = pb.TtrpcRequest(service=service, method=method, payload=payload, timeout_nano=timeout_ns)
    return encode(stream_id, REQUEST, envelope.SerializeToString(), REMOTE_CLOSED)


def parse_request(message: Message) -> pb.TtrpcRequest:
    """Return the envelope of a request. Raises `AgentError` (INVALID_ARGUMENT) when it is not one."""
    envelope = pb.TtrpcRequest()
    try:
        envelope.ParseFromString(message.payload)
    except DecodeError as e:
        raise status.AgentError(status.INVALID_ARGUMENT, f"the request is no ttRPC envelope: {e}") from e
    return envelope


def response(stream_id: int, payload: bytes) -> bytes:
    """Return a successful response."""
    return encode(stream_id, RESPONSE, pb.TtrpcResponse(payload=payload).SerializeToString())


def failure(stream_id: int, code: int, text: str) -> bytes:
    """Return a response that carries an error."""
    envelope = pb.TtrpcResponse(status=pb.TtrpcStatus(code=code, message=text))
    return encode(stream_id, RESPONSE, envelope.SerializeToString())


def parse_response(message: Message) -> bytes:
    """Return a response's payload. Raises `AgentError` with the status sent, `ProtocolError` for what is none."""
    envelope = pb.TtrpcResponse()
    try:
        envelope.ParseFromString(message.payload)
    except DecodeError as e:
        raise ProtocolError(f"the response is no ttRPC envelope: {e}", message.stream_id) from e
    if envelope.status.code != 0:
        raise status.AgentError(envelope.status.code, envelope.status.message)
    return envelope.payload
