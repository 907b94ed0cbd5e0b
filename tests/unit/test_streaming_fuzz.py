"""Whatever octets a client sends behind the upgrade: the session ends or goes on, and holds a bounded amount.

Whole sessions over a transport in memory: framing, streams, exec and port-forward, with a pod in memory. The corpus has
what once went wrong or what random octets find hardly ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Sequence
from pathlib import Path

import h11
import pytest
import wsproto
from hypothesis import given
from hypothesis import strategies as st
from streaming_targets import FakeTargets

from vmrt.streaming import spdy, stream, upgrade
from vmrt.streaming.stream import PeerGoneError
from vmrt.streaming.targets import ExecRequest, PortForwardRequest, Request
from vmrt.streaming.websocket import PORTFORWARD, REMOTECOMMAND

CORPUS = Path(__file__).parent / "corpus"
EXEC = ExecRequest("c", ("sleep",), True, True, True, False)
TERMINAL = ExecRequest("c", ("sleep",), True, True, False, True)
FORWARD = PortForwardRequest("p", (80, 2))
HEADERS = [("Host", "h"), ("Connection", "Upgrade")]


class Octets:
    """A client that sends what it has and is gone."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = [piece for piece in pieces if piece]
        self.sent = 0
        # A client that has detached leaves its process until the daemon stops.
        self.stopping = asyncio.Event()

    async def read(self) -> bytes:
        await asyncio.sleep(0)
        if len(self._pieces) < 2:
            asyncio.get_running_loop().call_later(0.05, self.stopping.set)
        return self._pieces.pop(0) if self._pieces else b""

    async def write(self, data: bytes) -> None:
        self.sent += len(data)

    async def close(self) -> None:
        pass

    async def hung_up(self) -> None:
        await asyncio.Event().wait()


def session_of(request: Request, protocol: str, *, over_websocket: bool) -> upgrade.Session:
    """Negotiate as the server does, and give the session that comes of it."""
    http = h11.Connection(h11.CLIENT)
    if over_websocket:
        client = wsproto.WSConnection(wsproto.ConnectionType.CLIENT)
        offered = [protocol] if protocol else []
        data = client.send(wsproto.events.Request(host="h", target="/exec/x", subprotocols=offered))
    else:
        headers = [*HEADERS, ("Upgrade", "SPDY/3.1"), (upgrade.PROTOCOL_HEADER, protocol)]
        data = http.send(h11.Request(method="POST", target="/exec/x", headers=headers)) or b""
        data += http.send(h11.EndOfMessage()) or b""
    server = h11.Connection(h11.SERVER)
    server.receive_data(data)
    asked = server.next_event()
    assert isinstance(asked, h11.Request)
    server.next_event()
    session = upgrade.negotiate(asked, upgrade.Headers(asked.headers), request)
    session.accept(server)
    return session


async def serve(session: upgrade.Session, request: Request, pieces: Sequence[bytes]) -> None:
    transport = Octets(pieces)
    async with asyncio.timeout(60):
        # What a session raises beyond this would be the server's internal error.
        with contextlib.suppress(PeerGoneError):
            await session.serve(transport, FakeTargets(), request, transport.stopping)
    size = sum(len(piece) for piece in pieces)
    assert transport.sent <= 4096 + 4 * size, "a small message makes a large answer"
    await asyncio.sleep(0)
    left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for _ in range(5):
        await asyncio.sleep(0)
    assert [task for task in left if not task.done()] == []


def run(request: Request, protocol: str, pieces: Sequence[bytes], *, over_websocket: bool) -> None:
    async def both() -> None:
        await serve(session_of(request, protocol, over_websocket=over_websocket), request, pieces)

    asyncio.run(both())


def cut(data: bytes, sizes: Sequence[int]) -> list[bytes]:
    pieces, at = [], 0
    for size in [*sizes, len(data)]:
        pieces.append(data[at : at + size])
        at += size
    return pieces


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client of these tests has gone when it has sent everything: nothing is to be waited for."""
    monkeypatch.setattr(upgrade, "LINGER_S", 0.01)
    monkeypatch.setattr(upgrade, "STREAMS_TIMEOUT_S", 5.0)


# --- SPDY -------------------------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["streamtype", "port", "requestid", "x"])
VALUES = st.sampled_from(
    ["error", "data", "stdin", "stdout", "stderr", "resize", "80", "0", "1", "2", "65536", "", "7"]
)
OPENING = st.builds(
    lambda headers, fin: ("open", headers, fin), st.dictionaries(NAMES, VALUES, max_size=4), st.booleans()
)
SENDING = st.tuples(st.just("send"), st.integers(1, 15), st.binary(max_size=300), st.booleans())
STEPS = st.one_of(
    OPENING,
    SENDING,
    st.tuples(st.just("reset"), st.integers(1, 15)),
    st.tuples(st.just("raw"), st.binary(max_size=30)),
    st.just(("ping",)),
    st.just(("away",)),
)


def conversation(steps: Sequence[tuple[object, ...]]) -> bytes:
    """Return the octets of a client that does these things, sensible or not."""
    client = spdy.Connection(client=True)
    out = b""
    for step in steps:
        match step:
            case ("open", dict(headers), bool(fin)):
                client.open(list(headers.items()), fin=fin)
            case ("send", int(number), bytes(data), bool(fin)):
                out += client.take() + struct.pack(">II", number, (int(fin) << 24) | len(data)) + data
            case ("reset", int(number)):
                client._send_reset(number, spdy.Reset.CANCEL)
            case ("raw", bytes(data)):
                out += client.take() + data
            case ("ping",):
                client.ping()
            case ("away",):
                client.go_away()
    return out + client.take()


@given(
    st.sampled_from([(EXEC, p) for p in upgrade.SPDY_REMOTECOMMAND] + [(FORWARD, "portforward.k8s.io")]),
    st.lists(STEPS, max_size=12),
    st.lists(st.integers(1, 200), max_size=6),
)
def test_spdy_sessions_take_any_conversation(
    kind: tuple[Request, str], steps: list[tuple[object, ...]], sizes: list[int]
) -> None:
    run(*kind, cut(conversation(steps), sizes), over_websocket=False)


@given(st.binary(max_size=300), st.booleans())
def test_spdy_sessions_take_any_octets(data: bytes, forward: bool) -> None:
    request, protocol = (FORWARD, "portforward.k8s.io") if forward else (EXEC, upgrade.SPDY_REMOTECOMMAND[0])
    run(request, protocol, [data], over_websocket=False)


@pytest.mark.parametrize("path", sorted((CORPUS / "spdy").iterdir()), ids=lambda path: path.name)
@pytest.mark.parametrize("request_", [EXEC, TERMINAL, FORWARD], ids=["exec", "terminal", "portforward"])
def test_the_spdy_corpus(path: Path, request_: Request) -> None:
    protocol = "portforward.k8s.io" if request_ is FORWARD else upgrade.SPDY_REMOTECOMMAND[0]
    data = path.read_bytes()
    run(request_, protocol, [data], over_websocket=False)
    run(request_, protocol, cut(data, [7] * 100), over_websocket=False)


# --- WebSocket --------------------------------------------------------------------------------------------------------


def frame(opcode: int, payload: bytes, *, fin: bool = True, masked: bool = True, length: int = -1) -> bytes:
    """Return a client's frame (RFC 6455, 5.2), masked with zeros; `length` may lie."""
    claimed = len(payload) if length < 0 else length
    head = bytes([(0x80 if fin else 0) | opcode])
    mask = 0x80 if masked else 0
    if claimed < 126:
        head += bytes([mask | claimed])
    elif claimed < 65536:
        head += bytes([mask | 126]) + struct.pack(">H", claimed)
    else:
        head += bytes([mask | 127]) + struct.pack(">Q", claimed)
    return head + (bytes(4) if masked else b"") + payload


FRAMES = st.builds(
    lambda opcode, payload, fin, masked, lie: frame(opcode, payload, fin=fin, masked=masked, length=lie),
    st.sampled_from([0, 1, 2, 2, 2, 8, 9, 10, 3, 11]),
    st.one_of(
        st.binary(max_size=130), st.builds(lambda c, d: bytes([c]) + d, st.integers(0, 255), st.binary(max_size=9))
    ),
    st.booleans(),
    st.sampled_from([True, True, True, False]),
    st.sampled_from([-1, -1, -1, -1, 0, 1 << 20, 1 << 62]),
)
KINDS = [(EXEC, p) for p in REMOTECOMMAND] + [(TERMINAL, REMOTECOMMAND[0])] + [(FORWARD, p) for p in PORTFORWARD]


@given(st.sampled_from(KINDS), st.lists(FRAMES, max_size=8), st.lists(st.integers(1, 60), max_size=6))
def test_websocket_sessions_take_any_frames(kind: tuple[Request, str], frames: list[bytes], sizes: list[int]) -> None:
    run(*kind, cut(b"".join(frames), sizes), over_websocket=True)


@given(st.sampled_from(KINDS), st.binary(max_size=300))
def test_websocket_sessions_take_any_octets(kind: tuple[Request, str], data: bytes) -> None:
    run(*kind, [data], over_websocket=True)


@given(st.lists(STEPS, max_size=8), st.integers(1, 100))
def test_tunnelled_spdy_takes_any_conversation(steps: list[tuple[object, ...]], size: int) -> None:
    data = conversation(steps)
    frames = b"".join(frame(2, data[at : at + size]) for at in range(0, len(data), size))
    run(FORWARD, PORTFORWARD[0], [frames], over_websocket=True)


@pytest.mark.parametrize("path", sorted((CORPUS / "websocket").iterdir()), ids=lambda path: path.name)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{type(kind[0]).__name__}-{kind[1]}")
def test_the_websocket_corpus(path: Path, kind: tuple[Request, str]) -> None:
    data = path.read_bytes()
    run(*kind, [data], over_websocket=True)
    run(*kind, cut(data, [5] * 60), over_websocket=True)


def test_a_message_without_an_end_is_not_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gigabyte announced in one frame, and a fragmented message: pieces go on as they come, whatever is to follow."""
    held: list[int] = []
    put = stream.Inbox.put

    async def spy(self: stream.Inbox, data: bytes, *, fin: bool = False) -> None:
        held.append(len(data))
        await put(self, data, fin=fin)

    monkeypatch.setattr(stream.Inbox, "put", spy)
    begin = frame(2, b"\0" + b"x" * 99, length=1 << 30)
    run(EXEC, REMOTECOMMAND[0], [begin, b"y" * 1000, b"z" * 1000], over_websocket=True)
    assert sum(held) == 2099
