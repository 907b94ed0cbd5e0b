"""The command line's end of the streaming server, against a real one with a pod in memory."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from streaming_targets import FakeTargets

from vmrt.cli import streams
from vmrt.cli.interactive import PortPair
from vmrt.config import StreamingConfig
from vmrt.errors import UnavailableError, VmrtError
from vmrt.streaming.server import StreamServer
from vmrt.streaming.targets import ExecRequest, PortForwardRequest


@pytest.fixture
async def server() -> AsyncIterator[StreamServer]:
    made = StreamServer(StreamingConfig(), FakeTargets())
    await made.open()
    try:
        yield made
    finally:
        await made.close()


def exec_url(server: StreamServer, name: str) -> str:
    return server.url(ExecRequest("c", (name,), False, True, True, False))


async def test_output_and_exit_code(server: StreamServer, capfd: pytest.CaptureFixture[str]) -> None:
    assert await streams._process(exec_url(server, "fail"), streams.Wanted(stdin=False, tty=False)) == 7
    assert capfd.readouterr() == ("", "failing")


async def test_stdin_and_its_end(
    server: StreamServer, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = [b"hello ", b"world", b""]
    monkeypatch.setattr(os, "read", lambda fd, size: pieces.pop(0))
    url = server.url(ExecRequest("c", ("cat",), True, True, True, False))
    assert await streams._process(url, streams.Wanted(stdin=True, tty=False)) == 0
    assert capfd.readouterr() == ("hello world", "end of file")


async def test_failures_are_errors_with_the_servers_text(server: StreamServer) -> None:
    nothing = streams.Wanted(stdin=False, tty=False)
    with pytest.raises(VmrtError, match="absent: no such file"):
        await streams._process(exec_url(server, "absent"), nothing)
    url = exec_url(server, "fail")
    await streams._process(url, nothing)
    with pytest.raises(UnavailableError, match="404"):
        await streams._process(url, nothing)


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
