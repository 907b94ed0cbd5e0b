"""The frames of stream connections without I/O (proto/agent.proto, FrameType); used by both ends.

1 octet type, 4 octets payload length (big endian, at most 64 KiB), payload. A broken frame is a `FrameError`, after
which the connection is of no use.
"""

from __future__ import annotations

import struct

from google.protobuf.message import DecodeError, Message

from vmrt.agent import agent_pb2 as pb
from vmrt.agent.layout import MAX_FRAME_BYTES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection
    from typing import TypeVar

    M = TypeVar("M", bound=Message)

HEADER = struct.Struct(">BI")

# What each end may receive; anything else breaks the protocol.
FROM_HOST = frozenset((pb.HELLO, pb.STDIN, pb.CLOSE, pb.RESIZE, pb.SIGNAL, pb.ACK))
FROM_GUEST = frozenset((pb.REPLY, pb.STDOUT, pb.STDERR, pb.CLOSE, pb.EXIT, pb.OUTPUT, pb.EVENT, pb.STDIN_ACK))


class FrameError(Exception):
    """The peer sent something that is no frame, or no frame that it may send."""


class Frame:
    """One frame: a `FrameType` number and its payload, or a piece of it (`Decoder`)."""

    __slots__ = ("payload", "type")

    def __init__(self, type_: int, payload: bytes | memoryview) -> None:
        self.type = type_
        self.payload = payload

    def parse(self, message: type[M]) -> M:
        """Return the payload as a message of this class. Raises `FrameError`."""
        parsed = message()
        try:
            parsed.ParseFromString(bytes(self.payload))
        except DecodeError as e:
            raise FrameError(f"frame of type {self.type} does not hold a {message.__name__}: {e}") from e
        return parsed


def encode(type_: int, payload: bytes = b"") -> bytes:
    """Return one frame. Raises `FrameError` for a payload that no peer would take."""
    if len(payload) > MAX_FRAME_BYTES:
        raise FrameError(f"payload of {len(payload)} octets is longer than {MAX_FRAME_BYTES}")
    return HEADER.pack(type_, len(payload)) + payload


def encode_data(type_: int, data: bytes) -> bytes:
    """Return raw octets of any length as frames of one type; nothing for no octets."""
    view = memoryview(data)
    return b"".join(
        encode(type_, bytes(view[at : at + MAX_FRAME_BYTES])) for at in range(0, len(data), MAX_FRAME_BYTES)
    )


class Decoder:
    """Cuts a byte stream into frames of the types `accepted`.

    Payloads of the types `pieces` are handed on as they arrive, each piece as a frame of its own whose payload is a
    memoryview of the octets that were fed: nothing is copied or waited for. All other frames come whole.
    """

    def __init__(self, accepted: Collection[int], pieces: Collection[int] = ()) -> None:
        self._accepted = accepted
        self._pieces = pieces
        self._held = bytearray()  # the beginning of a frame
        self._type = 0
        self._left = 0  # octets of the payload of type `_type` that are to come in pieces
        self._broken = False

    def feed(self, data: bytes | memoryview, limit: int = 0) -> list[Frame]:
        """Add octets; return the frames that are complete now, at most `limit` (0: all). Raises `FrameError`."""
        if self._broken:
            raise FrameError("octets after a broken frame")
        if self._held:
            data = b"".join((self._held, data))
            self._held.clear()
        view = memoryview(data)
        frames: list[Frame] = []
        at, have = 0, len(view)
        if self._left and have:
            at = min(self._left, have)
            self._left -= at
            frames.append(Frame(self._type, view[:at]))
        while have - at >= HEADER.size and not (limit and len(frames) == limit):
            type_, length = HEADER.unpack_from(view, at)
            if type_ not in self._accepted or length > MAX_FRAME_BYTES:
                self._broken = True
                raise FrameError(f"frame of type {type_} with {length} octets is not acceptable here")
            start = at + HEADER.size
            end = start + length
            if type_ in self._pieces:
                at = min(end, have)
                self._type, self._left = type_, end - at
                if at > start or not length:
                    frames.append(Frame(type_, view[start:at]))
            elif have < end:
                break
            else:
                frames.append(Frame(type_, bytes(view[start:end])))
                at = end
        self._held += view[at:]
        return frames

    @property
    def idle(self) -> bool:
        """Whether the stream stands between two frames, where an EOF is a clean one."""
        return not self._held and not self._left


def close_frame(stream: int) -> bytes:
    """Return the CLOSE frame for STDIN, STDOUT or STDERR."""
    return encode(pb.CLOSE, bytes((stream,)))


def stdin_ack(octets: int) -> bytes:
    """Return the STDIN_ACK frame for so many octets."""
    return encode(pb.STDIN_ACK, octets.to_bytes(4, "big"))


def acknowledged(frame: Frame) -> int:
    """Return the octets of a STDIN_ACK frame. Raises `FrameError`."""
    if len(frame.payload) != 4:
        raise FrameError("a STDIN_ACK frame has 4 octets")
    return int.from_bytes(frame.payload, "big")


def closed_stream(frame: Frame) -> int:
    """Return which stream a CLOSE frame ends. Raises `FrameError`."""
    if len(frame.payload) != 1 or frame.payload[0] not in (pb.STDIN, pb.STDOUT, pb.STDERR):
        raise FrameError("a CLOSE frame names one of STDIN, STDOUT, STDERR in one octet")
    return frame.payload[0]
