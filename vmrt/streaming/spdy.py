"""SPDY/3.1 framing without I/O: octets in, events out, octets to send (draft-mbelshe-httpbis-spdy-00, -3.1).

What Kubernetes' clients speak is that draft as moby/spdystream has it: no flow control (WINDOW_UPDATE and SETTINGS are
read and ignored), streams made by the client only, headers compressed with one zlib context for each direction of the
connection. Both roles are here: the server's, and the client's for `vmrt port-forward` and the tests.

States of a stream, as this end sees it; a stream that is CLOSED is forgotten:

    OPEN -- we send FIN --> LOCAL_CLOSED -- peer sends FIN, or RST by either --> CLOSED
    OPEN -- peer sends FIN --> REMOTE_CLOSED -- we send FIN, or RST by either --> CLOSED

Rules: nothing is buffered but what is incomplete, and that is bounded: a control frame by `MAX_CONTROL_BYTES`, its
headers by `MAX_HEADER_BYTES` after decompression, streams by `max_streams`. A data frame of any length is handed on
piece by piece as it arrives. `ProtocolError` ends the connection; what concerns one stream is answered by RST_STREAM.
"""

from __future__ import annotations

import enum
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vmrt.streaming.spdy_dictionary import DICTIONARY

VERSION = 3
MAX_CONTROL_BYTES = 64 * 1024
MAX_HEADER_BYTES = 8 * 1024
MAX_HEADERS = 128
MAX_STREAMS = 2048
MAX_DATA_BYTES = 0xFFFFFF

_FRAME = struct.Struct(">II")  # control bit, version, type or stream id; flags, length
_WORD = struct.Struct(">I")
_STREAM_ID = 0x7FFFFFFF
_FIN = 0x01
_UNIDIRECTIONAL = 0x02

Headers = Sequence[tuple[str, str]]


class FrameType(enum.IntEnum):
    """Control frames."""

    SYN_STREAM = 1
    SYN_REPLY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PING = 6
    GOAWAY = 7
    HEADERS = 8
    WINDOW_UPDATE = 9


class Reset(enum.IntEnum):
    """Why a stream is reset (2.6.3)."""

    PROTOCOL_ERROR = 1
    INVALID_STREAM = 2
    REFUSED_STREAM = 3
    UNSUPPORTED_VERSION = 4
    CANCEL = 5
    INTERNAL_ERROR = 6
    STREAM_IN_USE = 8
    STREAM_ALREADY_CLOSED = 9
    FRAME_TOO_LARGE = 11


class StreamState(enum.Enum):
    """Which ends may still send."""

    OPEN = "open"
    LOCAL_CLOSED = "closed by us"
    REMOTE_CLOSED = "closed by the peer"


class ProtocolError(Exception):
    """The peer broke the framing: the connection is of no use any more."""


@dataclass(frozen=True, slots=True)
class StreamOpened:
    """SYN_STREAM: the peer has made a stream; to be answered by `reply` or `reset`."""

    stream_id: int
    headers: Headers
    fin: bool


@dataclass(frozen=True, slots=True)
class StreamReplied:
    """SYN_REPLY or HEADERS on a stream that is open."""

    stream_id: int
    headers: Headers
    fin: bool


@dataclass(frozen=True, slots=True)
class DataReceived:
    """A piece of a stream's data; `fin` marks the last one, which may be empty."""

    stream_id: int
    data: bytes
    fin: bool


@dataclass(frozen=True, slots=True)
class StreamReset:
    """RST_STREAM: the stream is gone."""

    stream_id: int
    status: int


@dataclass(frozen=True, slots=True)
class PingAnswered:
    """The peer's answer to `ping`."""

    number: int


@dataclass(frozen=True, slots=True)
class GoneAway:
    """GOAWAY: the peer makes no more streams."""

    status: int


Event = StreamOpened | StreamReplied | DataReceived | StreamReset | PingAnswered | GoneAway


class Connection:
    """One connection. `receive` yields events; what is to be sent is taken with `take`."""

    def __init__(self, *, client: bool = False, max_streams: int = MAX_STREAMS) -> None:
        self._client = client
        self._max_streams = max_streams
        self._streams: dict[int, StreamState] = {}
        self._last_remote = 0
        self._next_local = 1 if client else 2
        self._next_ping = 1 if client else 2
        self._in = bytearray()
        self._data: tuple[int, int, bool] | None = None  # stream id, octets still to come, fin
        self._out = bytearray()
        self._deflate = zlib.compressobj(zdict=DICTIONARY)
        self._inflate = zlib.decompressobj(zdict=DICTIONARY)
        self._broken = False

    # --- what arrives -------------------------------------------------------------------------------------------------

    def receive(self, data: bytes) -> Iterator[Event]:
        """Yield the events of these octets. Raises `ProtocolError`, also for every call after it."""
        if self._broken:
            raise ProtocolError("the connection is broken")
        self._in += data
        try:
            yield from self._events()
        except ProtocolError:
            self._broken = True
            self._in.clear()
            raise

    def _events(self) -> Iterator[Event]:
        while True:
            if self._data is not None:
                if (event := self._data_piece()) is None:
                    return
                if event.data or event.fin:
                    yield event
                continue
            if len(self._in) < _FRAME.size:
                return
            word, rest = _FRAME.unpack_from(self._in)
            flags, length = rest >> 24, rest & 0xFFFFFF
            if not word >> 31:
                del self._in[: _FRAME.size]
                self._data = (word & _STREAM_ID, length, bool(flags & _FIN))
                self._check_data(word & _STREAM_ID)
                continue
            if length > MAX_CONTROL_BYTES:
                raise ProtocolError(f"a control frame of {length} octets, more than {MAX_CONTROL_BYTES}")
            if (word >> 16) & 0x7FFF != VERSION:
                raise ProtocolError(f"a frame of version {(word >> 16) & 0x7FFF}, not {VERSION}")
            if len(self._in) < _FRAME.size + length:
                return
            body = bytes(self._in[_FRAME.size : _FRAME.size + length])
            del self._in[: _FRAME.size + length]
            event_ = self._control(word & 0xFFFF, flags, body)
            if event_ is not None:
                yield event_

    def _check_data(self, stream_id: int) -> None:
        state = self._streams.get(stream_id)
        if state is StreamState.REMOTE_CLOSED:
            self.reset(stream_id, Reset.STREAM_ALREADY_CLOSED)
        elif state is None and not self._was_open(stream_id):
            self._send_reset(stream_id, Reset.INVALID_STREAM)

    def _was_open(self, stream_id: int) -> bool:
        """Whether data for this forgotten stream may still be on its way: it is thrown away then, not answered."""
        ours = bool(stream_id % 2) == self._client
        return 0 < stream_id < self._next_local if ours else 0 < stream_id <= self._last_remote

    def _data_piece(self) -> DataReceived | None:
        assert self._data is not None
        stream_id, left, fin = self._data
        if left and not self._in:
            return None
        piece = bytes(self._in[:left])
        del self._in[: len(piece)]
        left -= len(piece)
        self._data = (stream_id, left, fin) if left else None
        state = self._streams.get(stream_id)
        if state is None or state is StreamState.REMOTE_CLOSED:
            return DataReceived(stream_id, b"", False)  # of a stream that is gone
        ended = fin and not left
        if ended:
            self._remote_fin(stream_id)
        return DataReceived(stream_id, piece, ended)

    def _control(self, kind: int, flags: int, body: bytes) -> Event | None:
        if kind == FrameType.SYN_STREAM:
            return self._syn_stream(flags, body)
        if kind in (FrameType.SYN_REPLY, FrameType.HEADERS):
            stream_id = self._id(body, 4)
            headers = self._headers(body[4:])
            if stream_id not in self._streams:
                return None
            fin = bool(flags & _FIN)
            if fin:
                self._remote_fin(stream_id)
            return StreamReplied(stream_id, headers, fin)
        if kind == FrameType.RST_STREAM:
            stream_id = self._id(body, 8)
            known = self._streams.pop(stream_id, None)
            return None if known is None else StreamReset(stream_id, _WORD.unpack_from(body, 4)[0])
        if kind == FrameType.PING:
            number = self._id(body, 4, mask=0xFFFFFFFF)
            if bool(number % 2) == self._client:
                return PingAnswered(number)
            self._send_control(FrameType.PING, 0, body[:4])
            return None
        if kind == FrameType.GOAWAY:
            self._id(body, 8)
            return GoneAway(_WORD.unpack_from(body, 4)[0])
        return None  # SETTINGS, WINDOW_UPDATE, and what a later draft may bring (2.2.1)

    def _syn_stream(self, flags: int, body: bytes) -> Event | None:
        stream_id = self._id(body, 10)
        # Always inflated: the context is the connection's.
        headers = self._headers(body[10:])
        if self._client:
            self._send_reset(stream_id, Reset.REFUSED_STREAM)
            return None
        if stream_id % 2 == 0 or stream_id <= self._last_remote:
            raise ProtocolError(f"the peer made stream {stream_id} after {self._last_remote}")
        self._last_remote = stream_id
        if len(self._streams) >= self._max_streams:
            self._send_reset(stream_id, Reset.REFUSED_STREAM)
            return None
        self._streams[stream_id] = StreamState.OPEN
        fin = bool(flags & _FIN)
        if fin:
            self._remote_fin(stream_id)
        if flags & _UNIDIRECTIONAL:
            self.reset(stream_id, Reset.REFUSED_STREAM)
            return None
        return StreamOpened(stream_id, headers, fin)

    def _id(self, body: bytes, least: int, mask: int = _STREAM_ID) -> int:
        if len(body) < least:
            raise ProtocolError(f"a control frame of {len(body)} octets where at least {least} are needed")
        return int(_WORD.unpack_from(body)[0]) & mask

    def _headers(self, block: bytes) -> Headers:
        try:
            plain = self._inflate.decompress(block, MAX_HEADER_BYTES + 1)
        except zlib.error as e:
            raise ProtocolError(f"headers that are no zlib stream: {e}") from e
        if len(plain) > MAX_HEADER_BYTES or self._inflate.unconsumed_tail:
            raise ProtocolError(f"headers of more than {MAX_HEADER_BYTES} octets")
        if self._inflate.eof:
            raise ProtocolError("the peer ended its header compression")
        return decode_headers(plain)

    def _remote_fin(self, stream_id: int) -> None:
        if self._streams[stream_id] is StreamState.LOCAL_CLOSED:
            del self._streams[stream_id]
        else:
            self._streams[stream_id] = StreamState.REMOTE_CLOSED

    # --- what is sent -------------------------------------------------------------------------------------------------

    def take(self) -> bytes:
        """Return what is to be sent now, and forget it."""
        data = bytes(self._out)
        self._out.clear()
        return data

    def open(self, headers: Headers, *, fin: bool = False) -> int:
        """Make a stream and return its id."""
        stream_id = self._next_local
        self._next_local += 2
        self._streams[stream_id] = StreamState.OPEN
        body = struct.pack(">IIH", stream_id, 0, 0) + self._block(headers)
        self._send_control(FrameType.SYN_STREAM, _FIN if fin else 0, body)
        if fin:
            self._streams[stream_id] = StreamState.LOCAL_CLOSED
        return stream_id

    def reply(self, stream_id: int, headers: Headers = ()) -> None:
        """Accept a stream; nothing happens when it is gone."""
        if stream_id in self._streams:
            self._send_control(FrameType.SYN_REPLY, 0, _WORD.pack(stream_id) + self._block(headers))

    def send(self, stream_id: int, data: bytes, *, fin: bool = False) -> bool:
        """Send data on a stream; False when it no longer takes any (it is gone, or we have sent FIN)."""
        state = self._streams.get(stream_id)
        if state is None or state is StreamState.LOCAL_CLOSED:
            return False
        for at in range(0, max(len(data), 1), MAX_DATA_BYTES):
            piece = data[at : at + MAX_DATA_BYTES]
            last = fin and at + MAX_DATA_BYTES >= len(data)
            self._out += _FRAME.pack(stream_id, (_FIN << 24 if last else 0) | len(piece)) + piece
        if fin:
            if state is StreamState.REMOTE_CLOSED:
                del self._streams[stream_id]
            else:
                self._streams[stream_id] = StreamState.LOCAL_CLOSED
        return True

    def sending(self, stream_id: int) -> bool:
        """Whether a stream takes data from us."""
        return self._streams.get(stream_id) in (StreamState.OPEN, StreamState.REMOTE_CLOSED)

    def reset(self, stream_id: int, status: Reset = Reset.CANCEL) -> None:
        """Reset a stream; nothing happens when it is gone."""
        if self._streams.pop(stream_id, None) is not None:
            self._send_reset(stream_id, status)

    def ping(self) -> int:
        """Ask for a sign of life and return its number."""
        number = self._next_ping
        self._next_ping += 2
        self._send_control(FrameType.PING, 0, _WORD.pack(number))
        return number

    def go_away(self, status: int = 0) -> None:
        """Tell the peer to make no more streams: 0 is normal, 1 a protocol error, 2 an internal one."""
        self._send_control(FrameType.GOAWAY, 0, struct.pack(">II", self._last_remote, status))

    def _send_reset(self, stream_id: int, status: Reset) -> None:
        self._send_control(FrameType.RST_STREAM, 0, struct.pack(">II", stream_id, status))

    def _send_control(self, kind: FrameType, flags: int, body: bytes) -> None:
        self._out += _FRAME.pack(0x80000000 | VERSION << 16 | kind, flags << 24 | len(body)) + body

    def _block(self, headers: Headers) -> bytes:
        return self._deflate.compress(encode_headers(headers)) + self._deflate.flush(zlib.Z_SYNC_FLUSH)


def encode_headers(headers: Headers) -> bytes:
    """Return a name/value block (2.6.10); names become lower case, values of one name are joined by NUL."""
    joined: dict[str, list[str]] = {}
    for name, value in headers:
        joined.setdefault(name.lower(), []).append(value)
    block = bytearray(_WORD.pack(len(joined)))
    for name, values in joined.items():
        for text in (name, "\0".join(values)):
            octets = text.encode()
            block += _WORD.pack(len(octets)) + octets
    return bytes(block)


def decode_headers(block: bytes) -> Headers:
    """Return the pairs of a name/value block. Raises `ProtocolError`."""
    if len(block) < _WORD.size:
        raise ProtocolError("a header block without its count")
    count = _WORD.unpack_from(block)[0]
    if count > MAX_HEADERS:
        raise ProtocolError(f"{count} headers, more than {MAX_HEADERS}")
    at = _WORD.size
    texts = []
    for _ in range(2 * count):
        if at + _WORD.size > len(block):
            raise ProtocolError("a header block that is cut off")
        length = _WORD.unpack_from(block, at)[0]
        at += _WORD.size
        if at + length > len(block):
            raise ProtocolError("a header that is longer than its block")
        texts.append(block[at : at + length].decode("utf-8", "replace"))
        at += length
    if at != len(block):
        raise ProtocolError("octets behind the last header")
    names = texts[::2]
    if len(set(names)) != len(names) or not all(names):
        raise ProtocolError("a header name that is empty or twice there")
    return [
        (name.lower(), value) for name, joined in zip(names, texts[1::2], strict=True) for value in joined.split("\0")
    ]
