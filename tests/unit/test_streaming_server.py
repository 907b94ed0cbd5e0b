"""The streaming server over real sockets, with SPDY and WebSocket clients and a pod in memory."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import pytest
import wsproto
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming_targets import FakeTargets
from wsproto import events

from vmrt.config import StreamingConfig
from vmrt.errors import ConfigError, ExhaustedError, UnavailableError
from vmrt.streaming import server, spdy, stream, tokens
from vmrt.streaming.remotecommand import WindowSizes
from vmrt.streaming.spdy_session import SpdySession, SpdyStream
from vmrt.streaming.stream import PeerGoneError, SocketTransport
from vmrt.streaming.targets import AttachRequest, ExecRequest, PortForwardRequest, Request
from vmrt.streaming.websocket import TUNNEL, V5, TunnelTransport, WebSocket

V4 = "v4.channel.k8s.io"


class House:
    def __init__(self) -> None:
        self.targets = FakeTargets()
        self.server = server.StreamServer(StreamingConfig(), self.targets)

    def url(self, request: Request) -> str:
        return self.server.url(request)

    def exec(self, name: str, *, tty: bool = False, stdin: bool = True) -> str:
        return self.url(ExecRequest("c", (name,), stdin, True, not tty, tty))


@pytest.fixture
async def house() -> AsyncIterator[House]:
    made = House()
    await made.server.open()
    try:
        yield made
    finally:
        await made.server.close()


async def http(url: str, *headers: str, method: str = "POST", path: str = "") -> tuple[int, str, SocketTransport]:
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    lines = [f"{method} {path or parts.path} HTTP/1.1", f"Host: {parts.netloc}", *headers, "", ""]
    writer.write("\r\n".join(lines).encode())
    head = await reader.readuntil(b"\r\n\r\n")
    status = int(head.split(b" ")[1])
    return status, head.decode(), SocketTransport(reader, writer)


@contextlib.asynccontextmanager
async def spdy_client(url: str, *protocols: str) -> AsyncIterator[SpdySession]:
    offered = [f"X-Stream-Protocol-Version: {protocol}" for protocol in protocols]
    status, head, transport = await http(url, "Connection: Upgrade", "Upgrade: SPDY/3.1", *offered)
    assert status == 101, head
    session = SpdySession(transport, spdy.Connection(client=True))
    reading = asyncio.create_task(session.run())
    try:
        yield session
    finally:
        reading.cancel()
        await asyncio.wait([reading])
        await transport.close()


async def opened(session: SpdySession, *kinds: str) -> dict[str, SpdyStream]:
    return {kind: await session.open([("streamtype", kind)]) for kind in kinds}


async def all_of(stream: SpdyStream) -> bytes:
    data = b""
    while piece := await stream.read():
        data += piece
    return data


@contextlib.asynccontextmanager
async def websocket_client(url: str, *protocols: str) -> AsyncIterator[WebSocket]:
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    connection = wsproto.WSConnection(wsproto.ConnectionType.CLIENT)
    target = f"{parts.path}?{parts.query}" if parts.query else parts.path
    request = events.Request(host=parts.netloc, target=target, subprotocols=list(protocols))
    writer.write(connection.send(request))
    while True:
        connection.receive_data(await reader.read(65536))
        answer = next(iter(connection.events()), None)
        if answer is not None:
            break
    assert isinstance(answer, events.AcceptConnection), answer
    assert answer.subprotocol == (protocols[0] if protocols else None)
    transport = SocketTransport(reader, writer)
    try:
        yield WebSocket(transport, connection)
    finally:
        await transport.close()


async def received(socket: WebSocket) -> dict[int, bytes]:
    """Read binary channel messages to the close."""
    found: dict[int, bytes] = {}
    message = b""
    async for piece, last in socket.messages():
        assert isinstance(piece, bytes)
        message += piece
        if last:
            found[message[0]] = found.get(message[0], b"") + message[1:]
            message = b""
    return found


# --- HTTP -------------------------------------------------------------------------------------------------------------


async def test_what_is_no_upgrade_is_refused_and_leaves_the_token(house: House) -> None:
    url = house.exec("cat")
    spdy_upgrade = ("Connection: Upgrade", "Upgrade: SPDY/3.1")
    for headers, method, wanted in (
        ((), "POST", 400),
        (("Connection: Upgrade", "Upgrade: h2c"), "POST", 400),
        (spdy_upgrade, "POST", 400),
        ((*spdy_upgrade, "X-Stream-Protocol-Version: v9"), "POST", 403),
        ((*spdy_upgrade, f"X-Stream-Protocol-Version: {V4}"), "PUT", 405),
        ((*spdy_upgrade, "Content-Length: 3", "", "abc"), "POST", 413),
        (("Connection: Upgrade", "Upgrade: websocket"), "GET", 400),
        (("Connection: Upgrade", "Upgrade: websocket"), "POST", 405),
    ):
        status, head, transport = await http(url, *headers, method=method)
        assert status == wanted, head
        await transport.close()
    async with spdy_client(url, "v5.channel.k8s.io", V4):
        pass


async def test_a_url_serves_once_and_for_its_kind_only(house: House) -> None:
    url = house.exec("sleep")
    upgrade = ("Connection: Upgrade", "Upgrade: SPDY/3.1", f"X-Stream-Protocol-Version: {V4}")
    for path in ("/", "/exec", "/exec/", "/exec/nonsense", urlsplit(url).path.replace("exec", "attach"), "/x/y/z"):
        status, _, transport = await http(url, *upgrade, path=path)
        assert status == 404
        await transport.close()
    first = await http(url, *upgrade)
    second = await http(url, *upgrade)
    assert (first[0], second[0]) == (101, 404)
    for _, _, transport in (first, second):
        await transport.close()


async def test_the_accepted_protocols_are_told(house: House) -> None:
    headers = ("Connection: Upgrade", "Upgrade: SPDY/3.1", "X-Stream-Protocol-Version: v9")
    status, head, transport = await http(house.exec("cat"), *headers)
    await transport.close()
    assert status == 403
    assert f"X-Accepted-Stream-Protocol-Versions: {V4}" in head


@pytest.mark.parametrize("junk", [b"\0\1\2\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 20000 + b"\r\n\r\n"])
async def test_what_is_no_http_gets_an_answer_and_a_close(house: House, junk: bytes) -> None:
    parts = urlsplit(house.exec("cat"))
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(junk)
    answer = await reader.read()
    assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 431 "))
    writer.close()


def test_tokens_end_after_a_minute_and_are_bounded() -> None:
    now = [0.0]
    waiting = tokens.Tokens(lambda: now[0])
    request = PortForwardRequest("p")
    token = waiting.add(request)
    assert len(base64.urlsafe_b64decode(token)) * 8 >= 128
    assert waiting.take(token) is request
    assert waiting.take(token) is None
    token = waiting.add(request)
    now[0] = tokens.TTL_S
    assert waiting.take(token) is None
    for _ in range(tokens.MAX_WAITING):
        waiting.add(request)
    with pytest.raises(ExhaustedError):
        waiting.add(request)
    now[0] += tokens.TTL_S
    waiting.add(request)


async def test_tls_settings_that_cannot_be_used_are_a_config_error(tmp_path: object) -> None:
    with pytest.raises(ConfigError, match="TLS"):
        await server.StreamServer(StreamingConfig(tls_cert=f"{tmp_path}/none.pem"), FakeTargets()).open()


async def test_an_address_that_cannot_be_listened_on_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="cannot listen"):
        await server.StreamServer(StreamingConfig(address="192.0.2.1"), FakeTargets()).open()


# --- exec and attach over SPDY ----------------------------------------------------------------------------------------


async def test_a_spdy_exec_from_stdin_to_status(house: House) -> None:
    async with spdy_client(house.exec("cat"), "v5.channel.k8s.io", V4) as session:
        streams = await opened(session, "error", "stdin", "stdout", "stderr")
        await streams["stdin"].write(b"hello")
        await streams["stdin"].close()
        assert await all_of(streams["stdout"]) == b"hello"
        assert await all_of(streams["stderr"]) == b"end of file"
        assert json.loads(await all_of(streams["error"])) == {"metadata": {}, "status": "Success"}


async def test_an_exit_code_is_a_status(house: House) -> None:
    async with spdy_client(house.exec("fail", stdin=False), V4) as session:
        streams = await opened(session, "error", "stdout", "stderr")
        status = json.loads(await all_of(streams["error"]))
    assert (status["reason"], status["details"]["causes"]) == (
        "NonZeroExitCode",
        [{"reason": "ExitCode", "message": "7"}],
    )


async def test_older_protocols_have_text_for_failures_only(house: House) -> None:
    for name, wanted in (("fail", b"command terminated with non-zero exit code: 7"), ("cat", b"")):
        async with spdy_client(house.exec(name), "channel.k8s.io") as session:
            streams = await opened(session, "error", "stdin", "stdout", "stderr")
            await streams["stdin"].close()
            assert await all_of(streams["error"]) == wanted


@pytest.mark.parametrize(("name", "text"), [("absent", "no such file"), ("vanish", "ended before the process")])
async def test_what_fails_is_an_internal_error_with_its_text(house: House, name: str, text: str) -> None:
    async with spdy_client(house.exec(name, stdin=False), V4) as session:
        streams = await opened(session, "error", "stdout", "stderr")
        status = json.loads(await all_of(streams["error"]))
    assert status["reason"] == "InternalError"
    assert text in status["message"]


async def test_an_attach_ends_with_success(house: House) -> None:
    async with spdy_client(house.url(AttachRequest("c", False, True, True, False)), V4) as session:
        streams = await opened(session, "error", "stdout", "stderr")
        assert await all_of(streams["stderr"]) == b"failing"
        assert json.loads(await all_of(streams["error"]))["status"] == "Success"


async def test_a_terminal_gets_its_size(house: House) -> None:
    async with spdy_client(house.exec("size", tty=True), V4) as session:
        streams = await opened(session, "error", "stdin", "stdout", "resize")
        await streams["resize"].write(b'{"Width":80,"Height":24}{"Width":100,"Hei')
        await streams["resize"].write(b'ght":40}\n')
        assert await all_of(streams["stdout"]) in (b"(80, 24)", b"(100, 40)")


async def test_the_clients_end_ends_the_process(house: House) -> None:
    async with spdy_client(house.exec("sleep", stdin=False), V4) as session:
        await opened(session, "error", "stdout", "stderr")
        while not house.targets.processes:
            await asyncio.sleep(0.01)
    await house.targets.left.wait()


async def test_a_client_that_does_not_read_holds_the_process_back(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers = []

    class Recorded(SocketTransport):
        def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            super().__init__(reader, writer)
            writers.append(writer)

    monkeypatch.setattr(server, "SocketTransport", Recorded)
    parts = urlsplit(house.exec("flood", stdin=False))
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=4096)
    lines = [f"POST {parts.path} HTTP/1.1", "Host: x", "Connection: Upgrade", "Upgrade: SPDY/3.1"]
    writer.write("\r\n".join([*lines, f"X-Stream-Protocol-Version: {V4}", "", ""]).encode())
    connection = spdy.Connection(client=True)
    for kind in ("error", "stdout", "stderr"):
        connection.open([("streamtype", kind)])
    writer.write(connection.take())
    await reader.readuntil(b"\r\n\r\n")
    while not house.targets.processes:
        await asyncio.sleep(0.01)
    process, before = house.targets.processes[0], -1
    while process.written != before:
        before = process.written
        await asyncio.sleep(0.3)
    # Behind the kernel's socket buffers an endless flood stands still, and what we hold of it is bounded.
    assert 0 < writers[0].transport.get_write_buffer_size() <= 1024 * 1024
    writer.transport.abort()
    await house.targets.left.wait()


@pytest.mark.parametrize("kind", ["spdy", "websocket"])
async def test_the_clients_end_is_seen_while_its_input_is_held_back(
    house: House, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "HANG_UP_GRACE_S", 0.01)
    monkeypatch.setattr(stream, "INBOX_BYTES", 1000)
    url = house.exec("sleep")
    # More than the process and the inbox take, less than the kernel holds: TCP tells no end behind a full window.
    piece, count = b"x" * 2048, 40
    if kind == "spdy":
        async with spdy_client(url, V4) as session:
            streams = await opened(session, "error", "stdin", "stdout", "stderr")
            for _ in range(count):
                await streams["stdin"].write(piece)
            await until_held_back(house)
    else:
        async with websocket_client(url, V5) as socket:
            for _ in range(count):
                await socket.send(b"\0" + piece)
            await until_held_back(house)
    await asyncio.wait_for(house.targets.left.wait(), 60)
    assert house.targets.processes[0].taken < count * len(piece)


async def until_held_back(house: House) -> None:
    """Wait until a process takes nothing any more."""
    while not house.targets.processes or not house.targets.processes[0].taken:
        await asyncio.sleep(0.01)
    taken = 0
    while taken != house.targets.processes[0].taken:
        taken = house.targets.processes[0].taken
        await asyncio.sleep(0.2)


async def test_streams_that_nobody_accepts_are_refused_and_hide_no_end(house: House) -> None:
    async with spdy_client(house.exec("sleep"), V4) as session:
        await opened(session, "error", "stdin", "stdout", "stderr")
        while not house.targets.processes:
            await asyncio.sleep(0.01)
        for _ in range(300):
            late = await session.open([("streamtype", "data")])
        with pytest.raises(PeerGoneError):
            await late.read()
    await asyncio.wait_for(house.targets.left.wait(), 60)


async def test_what_a_session_buffers_is_bounded_however_many_its_streams() -> None:
    budget = stream.Budget()
    inboxes = [stream.Inbox(budget) for _ in range(100)]
    held = 0

    async def fill() -> None:
        nonlocal held
        for inbox in inboxes:
            await inbox.put(b"x" * 200_000)
            held += 200_000

    filling = asyncio.create_task(fill())
    for _ in range(1000):
        await asyncio.sleep(0)
    assert stream.SESSION_BYTES <= held < stream.SESSION_BYTES + stream.INBOX_BYTES
    # What is taken, thrown away or reset makes room again.
    for number, inbox in enumerate(inboxes):
        if number % 3 == 0:
            await inbox.get()
        elif number % 3 == 1:
            await inbox.discard()
        else:
            await inbox.end(reset=True)
        for _ in range(10):
            await asyncio.sleep(0)
    await asyncio.wait_for(filling, 60)
    assert budget._used == 0


async def test_a_process_that_does_not_read_holds_the_client_back(house: House) -> None:
    async with spdy_client(house.exec("sleep"), V4) as session:
        streams = await opened(session, "error", "stdin", "stdout", "stderr")

        async def push() -> None:
            while True:
                await streams["stdin"].write(b"x" * 65536)

        pushing = asyncio.create_task(push())
        while not house.targets.processes:
            await asyncio.sleep(0.01)
        process, before = house.targets.processes[0], -1
        while process.taken != before:
            before = process.taken
            await asyncio.sleep(0.3)
        assert not pushing.done()
        pushing.cancel()
        await asyncio.wait([pushing])


async def test_a_stop_of_the_daemon_is_told(house: House) -> None:
    async with spdy_client(house.exec("sleep", stdin=False), V4) as session:
        streams = await opened(session, "error", "stdout", "stderr")
        while not house.targets.processes:
            await asyncio.sleep(0.01)
        closing = asyncio.create_task(house.server.close())
        status = json.loads(await all_of(streams["error"]))
        assert "the daemon is stopping" in status["message"]
    await closing
    with pytest.raises(UnavailableError):
        house.exec("cat")


async def test_streams_that_nobody_asked_for_are_reset(house: House) -> None:
    async with spdy_client(house.exec("cat"), V4) as session:
        streams = await opened(session, "error", "nonsense", "stdin")
        with pytest.raises(PeerGoneError):
            await streams["nonsense"].read()
        streams |= await opened(session, "stdout", "stderr")
        await streams["stdin"].close()
        assert await all_of(streams["stderr"]) == b"end of file"


async def test_a_broken_protocol_ends_the_session(house: House) -> None:
    upgrade = ("Connection: Upgrade", "Upgrade: SPDY/3.1", f"X-Stream-Protocol-Version: {V4}")
    _, _, transport = await http(house.exec("cat"), *upgrade)
    await transport.write(b"\x80\x02" + b"\0" * 100)
    answer = b""
    while data := await transport.read():
        answer += data
    assert answer[:4] == b"\x80\x03\x00\x07"  # GOAWAY
    await transport.close()


# --- exec over WebSocket ----------------------------------------------------------------------------------------------


async def test_a_v5_exec_half_closes_stdin(house: House) -> None:
    async with websocket_client(house.exec("cat"), V5) as socket:
        await socket.send(b"\0hello")
        await socket.ping()
        await socket.send(b"\xff\0")
        found = await received(socket)
    assert (found[1], found[2]) == (b"hello", b"end of file")
    assert json.loads(found[3])["status"] == "Success"


async def test_v4_and_v1_tell_a_failure_each_in_its_way(house: House) -> None:
    async with websocket_client(house.exec("fail"), V4) as socket:
        assert json.loads((await received(socket))[3])["reason"] == "NonZeroExitCode"
    async with websocket_client(house.exec("fail")) as socket:
        assert b"code: 7" in (await received(socket))[3]


async def test_base64_in_pieces(house: House) -> None:
    async with websocket_client(house.exec("cat"), "v4.base64.channel.k8s.io") as socket:
        await socket.send("0" + base64.b64encode(b"hello world").decode())
        text = ""
        async for piece, _ in socket.messages():
            assert isinstance(piece, str)
            text += piece
            if base64.b64encode(b"hello world").decode() in text:
                break
    await house.targets.left.wait()


@pytest.mark.parametrize("message", ["x", "0!!!", "0abc\u00e9"])
async def test_a_message_that_is_no_base64_ends_the_session(house: House, message: str) -> None:
    async with websocket_client(house.exec("sleep"), "v4.base64.channel.k8s.io") as socket:
        await socket.send(message)
        async for _ in socket.messages():
            pass
    await house.targets.left.wait()


# --- port-forward -----------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def forward_client(house: House, kind: str) -> AsyncIterator[SpdySession]:
    url = house.url(PortForwardRequest("p"))
    if kind == "spdy":
        async with spdy_client(url, "portforward.k8s.io") as session:
            yield session
        return
    async with websocket_client(url, TUNNEL) as socket:
        session = SpdySession(TunnelTransport(socket), spdy.Connection(client=True))
        reading = asyncio.create_task(session.run())
        try:
            yield session
        finally:
            reading.cancel()
            await asyncio.wait([reading])


async def pair(session: SpdySession, port: str, number: int) -> tuple[SpdyStream, SpdyStream]:
    headers = [("port", port), ("requestid", str(number))]
    error = await session.open([("streamtype", "error"), *headers])
    await error.close()
    return await session.open([("streamtype", "data"), *headers]), error


@pytest.mark.parametrize("kind", ["spdy", "tunnel"])
async def test_many_pairs_on_one_connection(house: House, kind: str) -> None:
    async with forward_client(house, kind) as session:

        async def one(number: int) -> bytes:
            data, error = await pair(session, "80", number)
            await data.write(b"%d" % number)
            await data.close()
            answer = await all_of(data)
            assert await all_of(error) == b""
            return answer

        assert await asyncio.gather(*(one(n) for n in range(50))) == [b"%d" % n for n in range(50)]
    assert house.targets.connections == 50


@pytest.mark.parametrize("kind", ["spdy", "tunnel"])
async def test_a_port_that_nothing_listens_on_is_told_and_the_rest_goes_on(house: House, kind: str) -> None:
    async with forward_client(house, kind) as session:
        _, error = await pair(session, "1", 0)
        assert b"nothing answers on port 1" in await all_of(error)
        data, _ = await pair(session, "80", 1)
        await data.close()
        assert await all_of(data) == b""


async def test_a_reset_connection_is_a_reset_stream_without_a_text(house: House) -> None:
    async with forward_client(house, "spdy") as session:
        data, error = await pair(session, "2", 0)
        await data.write(b"x")
        with pytest.raises(PeerGoneError):
            await data.read()
        assert await all_of(error) == b""


@pytest.mark.parametrize("port", ["", "0", "65536", "x", "-1", "\u0661"])
async def test_a_wrong_port_is_reset(house: House, port: str) -> None:
    async with forward_client(house, "spdy") as session:
        data, _ = await pair(session, port, 0)
        with pytest.raises(PeerGoneError):
            await data.read()


async def test_old_clients_without_request_ids(house: House) -> None:
    async with forward_client(house, "spdy") as session:
        await session.open([("streamtype", "error"), ("port", "80")])
        data = await session.open([("streamtype", "data"), ("port", "80")])
        await data.write(b"x")
        await data.close()
        assert await all_of(data) == b"x"


async def test_the_older_websocket_port_forward(house: House) -> None:
    async with websocket_client(house.url(PortForwardRequest("p", (80, 1))), V4) as socket:
        await socket.send(b"\0hello")
        found: dict[int, bytes] = {}
        async for piece, _ in socket.messages():
            assert isinstance(piece, bytes)
            found[piece[0]] = found.get(piece[0], b"") + piece[1:]
            if len(found.get(0, b"")) == 7 and len(found.get(3, b"")) > 2:
                break
    assert (found[0], found[1], found[2]) == (b"\x50\0hello", b"\x50\0", b"\1\0")
    assert found[3].startswith(b"\1\0")
    assert b"nothing answers on port 1" in found[3]


async def test_its_ports_may_stand_in_the_query(house: House) -> None:
    async with websocket_client(house.url(PortForwardRequest("p")) + "?port=258", V4) as socket:
        async for piece, _ in socket.messages():
            assert piece == b"\0\2\1"
            break
    upgrade = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13")
    key = "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="
    for query in ("", "?port=0", "?port=x", "?port=" + ",".join(["1"] * 200)):
        url = house.url(PortForwardRequest("p"))
        path = urlsplit(url).path + query
        status, head, transport = await http(
            url, *upgrade, key, f"Sec-WebSocket-Protocol: {V4}", method="GET", path=path
        )
        assert status == 400, head
        await transport.close()


# --- pieces -----------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=100), st.integers(1, 20))
def test_any_octets_on_the_resize_stream_are_sizes_or_nothing(data: bytes, size: int) -> None:
    sizes = WindowSizes()
    for at in range(0, len(data), size):
        for width, height in sizes.feed(data[at : at + size]):
            assert 0 < width < 65536
            assert 0 < height < 65536


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 65535), st.integers(1, 65535)), max_size=5), st.integers(1, 30))
def test_sizes_in_pieces(wanted: list[tuple[int, int]], size: int) -> None:
    data = "\n".join(json.dumps({"Width": w, "Height": h}) for w, h in wanted).encode()
    sizes = WindowSizes()
    assert [each for at in range(0, len(data), size) for each in sizes.feed(data[at : at + size])] == wanted
