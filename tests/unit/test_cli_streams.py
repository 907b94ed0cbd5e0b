"""The command line's end of the streaming server, against a real one with a pod in memory."""

from __future__ import annotations

import asyncio
import os
import ssl
import threading
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from streaming_targets import FakeTargets

from vmrt.cli import streams
from vmrt.cli.connections import NotSpokenError, Tls
from vmrt.cli.interactive import PortPair
from vmrt.config import StreamingConfig
from vmrt.errors import UnavailableError, VmrtError
from vmrt.streaming import spdy
from vmrt.streaming.server import StreamServer
from vmrt.streaming.spdy_session import SpdySession
from vmrt.streaming.stream import PeerGoneError
from vmrt.streaming.targets import ExecRequest, PortForwardRequest


def test_a_ca_without_a_key_identifier_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    strict = ssl.create_default_context()
    strict.verify_flags |= ssl.VERIFY_X509_STRICT  # what Python 3.13 makes of it
    monkeypatch.setattr(ssl, "create_default_context", lambda **_: strict)
    assert not Tls().context().verify_flags & ssl.VERIFY_X509_STRICT


@pytest.fixture
def targets() -> FakeTargets:
    return FakeTargets()


@pytest.fixture
async def server(targets: FakeTargets) -> AsyncIterator[StreamServer]:
    made = StreamServer(StreamingConfig(), targets)
    await made.open()
    try:
        yield made
    finally:
        await made.close()


async def joined(url: str, wanted: streams.Wanted, hooks: streams.Hooks | None = None) -> int:
    return await streams.run_process(url, wanted, Tls(), hooks or streams.Hooks())


def exec_url(server: StreamServer, name: str) -> str:
    return server.url(ExecRequest("c", (name,), False, True, True, False))


@pytest.fixture(params=["WebSocket", "SPDY"])
def over_spdy(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "SPDY")


async def test_output_and_exit_code(server: StreamServer, over_spdy: bool, capfd: pytest.CaptureFixture[str]) -> None:
    nothing = streams.Wanted(stdin=False, tty=False)
    url = exec_url(server, "fail")
    assert await streams.run_process(url, nothing, Tls(), streams.Hooks(), over_spdy=over_spdy) == 7
    assert capfd.readouterr() == ("", "failing")


async def test_stdin_and_its_end(
    server: StreamServer, over_spdy: bool, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = [b"hello ", b"world", b""]
    monkeypatch.setattr(os, "read", lambda fd, size: pieces.pop(0))
    url = server.url(ExecRequest("c", ("cat",), True, True, True, False))
    wanted = streams.Wanted(stdin=True, tty=False)
    assert await streams.run_process(url, wanted, Tls(), streams.Hooks(), over_spdy=over_spdy) == 0
    assert capfd.readouterr() == ("hello world", "end of file")


async def test_a_server_without_our_websocket_is_spoken_to_in_spdy(
    server: StreamServer, capfd: pytest.CaptureFixture[str]
) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1") as older:
        url = f"http://127.0.0.1:{older.sockets[0].getsockname()[1]}/exec/token"
        nothing = streams.Wanted(stdin=False, tty=False)
        with pytest.raises(NotSpokenError, match=r"does not speak v5\.channel\.k8s\.io"):
            await asyncio.to_thread(streams.process, url, nothing)
        again = exec_url(server, "fail")
        assert await asyncio.to_thread(streams.process, url, nothing, None, None, lambda: again) == 7
    assert capfd.readouterr() == ("", "failing")


class Scripted:
    """A transport on which everything comes at once, and then nothing more."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.sent = b""

    async def read(self) -> bytes:
        data, self._data = self._data, b""
        return data

    async def write(self, data: bytes) -> None:
        self.sent += data

    async def close(self) -> None: ...

    async def hung_up(self) -> None:
        await asyncio.Event().wait()


@pytest.mark.parametrize("lasting", [True, False])
async def test_what_came_before_a_reset_is_read_where_resets_end_sessions(lasting: bool) -> None:
    """Go's servers reset all streams right after they have written the status."""
    ours, theirs = spdy.Connection(client=True), spdy.Connection()
    transport = Scripted(b"")
    session = SpdySession(transport, ours)
    stream = await session.open([("streamtype", "error")], lasting=lasting)
    list(theirs.receive(transport.sent))
    theirs.reply(stream.id)
    theirs.send(stream.id, b"status")
    theirs.reset(stream.id)
    transport._data = theirs.take()
    await session.run()
    if lasting:
        assert [await stream.read(), await stream.read()] == [b"status", b""]
    else:
        with pytest.raises(PeerGoneError):
            await stream.read()


async def test_failures_are_errors_with_the_servers_text(server: StreamServer) -> None:
    nothing = streams.Wanted(stdin=False, tty=False)
    with pytest.raises(VmrtError, match="absent: no such file"):
        await joined(exec_url(server, "absent"), nothing)
    url = exec_url(server, "fail")
    await joined(url, nothing)
    with pytest.raises(UnavailableError, match="404"):
        await joined(url, nothing)


async def test_a_hook_is_called_once_the_process_is_there(
    server: StreamServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = threading.Event()
    nothing = streams.Wanted(stdin=False, tty=False)
    # The process ends when its stdin does, which is when the hook has been called.
    monkeypatch.setattr(os, "read", lambda fd, size: b"" if called.wait(60) else b"never")
    url = server.url(ExecRequest("c", ("cat",), True, True, True, False))
    assert await joined(url, streams.Wanted(stdin=True, tty=False), streams.Hooks(opened=called.set)) == 0
    called.clear()
    with pytest.raises(VmrtError, match="absent"):
        await joined(exec_url(server, "absent"), nothing, streams.Hooks(opened=called.set))
    assert not called.is_set()


async def test_what_a_hook_raises_ends_the_session(server: StreamServer, targets: FakeTargets) -> None:
    class Enough(BaseException):
        pass

    def fail() -> None:
        raise Enough

    for hooks in (streams.Hooks(opened=fail), streams.Hooks(checkpoint=fail)):
        with pytest.raises(Enough):
            await joined(exec_url(server, "sleep"), streams.Wanted(stdin=False, tty=False), hooks)
    await asyncio.wait_for(targets.left.wait(), 60)


async def test_collected_stderr_is_bounded(server: StreamServer, capfd: pytest.CaptureFixture[str]) -> None:
    collected = bytearray()
    wanted = streams.Wanted(stdin=False, tty=False, collected=collected)
    assert await joined(exec_url(server, "fail"), wanted) == 7
    assert collected == b"failing"
    collected[:] = bytes(64 * 1024 - 2)
    await joined(exec_url(server, "fail"), wanted)
    assert collected[-4:] == b"\0\0fa"
    assert capfd.readouterr() == ("", "")


async def test_detaching_leaves_the_process(
    server: StreamServer, targets: FakeTargets, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = [b"typed\x10", b"\x11never sent"]
    monkeypatch.setattr(os, "read", lambda fd, size: pieces.pop(0))
    url = server.url(ExecRequest("c", ("cat",), True, True, True, False))
    with pytest.raises(streams.Detached):
        await joined(url, streams.Wanted(stdin=True, tty=False, detach_keys=b"\x10\x11"))
    (process,) = targets.processes
    assert not process.closed
    assert process.taken == len(b"typed")
    # Its output has nobody left to go to, and that does not end it.
    await process.write_stdin(b"more")
    await process.close_stdin()
    await asyncio.wait_for(targets.left.wait(), 60)
    assert process.closed


async def test_ports_are_forwarded_until_the_daemons_end(server: StreamServer) -> None:
    told: asyncio.Queue[str] = asyncio.Queue()
    url = server.url(PortForwardRequest("p"))
    forwarding = asyncio.create_task(streams.forward_ports(url, "127.0.0.1", [(0, 80), (0, 1)], told.put_nowait))
    local = [int((await told.get()).partition(" ")[0].rpartition(":")[2]) for _ in range(2)]
    reader, writer = await asyncio.open_connection("127.0.0.1", local[0])
    writer.write(b"there and back")
    writer.write_eof()
    assert await reader.read() == b"there and back"
    writer.close()
    reader, writer = await asyncio.open_connection("127.0.0.1", local[1])
    assert await reader.read() == b""
    writer.close()
    assert "nothing answers on port 1" in await told.get()
    await server.close()
    with pytest.raises(UnavailableError, match="ended the connection"):
        await forwarding


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (b"", "without a status"),
        (b"[]", "without a status"),
        (b'{"status":"Failure","details":{"causes":[{"reason":"ExitCode","message":"x"}]}}', "without a status"),
        (b'{"status":"Failure","message":"told"}', "told"),
    ],
)
def test_a_status_that_tells_no_exit_code_is_an_error(status: bytes, text: str) -> None:
    with pytest.raises(VmrtError, match=text):
        streams.exit_code(status)


@given(st.binary(max_size=60), st.integers(1, 10))
def test_detach_keys_lose_nothing_that_is_typed(typed: bytes, size: int) -> None:
    keys = streams.DetachKeys(streams.detach_sequence("ctrl-p,ctrl-q"))
    sent = b""
    for at in range(0, len(typed), size):
        sent += keys.feed(typed[at : at + size])
        if keys.typed:
            break
    if b"\x10\x11" in typed:
        assert keys.typed
        assert sent == typed[: typed.index(b"\x10\x11")]
    else:
        assert not keys.typed
        assert sent == (typed[:-1] if typed.endswith(b"\x10") else typed)


def test_detach_sequences() -> None:
    assert streams.detach_sequence("ctrl-],x") == b"\x1dx"
    assert streams.detach_sequence("") == b""
    with pytest.raises(ValueError, match="ctrl"):
        streams.detach_sequence("ctrl-")


def test_port_pairs() -> None:
    assert [PortPair().convert(text, None, None) for text in ("80", "8080:80", ":80")] == [
        (80, 80),
        (8080, 80),
        (0, 80),
    ]
