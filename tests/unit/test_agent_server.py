"""The agent's server loops over socket pairs and Unix sockets: any octets, too many of anything, both ends together."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmrt import errors
from vmrt.agent import agent_pb2 as pb
from vmrt.agent import frames, layout, process, server, service, status, ttrpc
from vmrt.agent_client import AgentClient


class Agent:
    """A real service without a guest: no container can be made, everything else answers."""

    def __init__(self, directory: Path) -> None:
        self.reaper = process.Reaper()
        self.service = service.Service(self.reaper)
        self.service.booted.set()
        self.paths = {layout.CALL_PORT: directory / "calls", layout.STREAM_PORT: directory / "streams"}
        self.listeners: list[socket.socket] = []
        self.calls = server.CallServer(self.service.call)
        for port, serve in ((layout.CALL_PORT, self.calls.serve), (layout.STREAM_PORT, self.service.streams.serve)):
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(self.paths[port]))
            listener.listen(64)
            self.listeners.append(listener)
            acceptor = server.Acceptor(listener, 64, trusted=lambda peer: True)
            threading.Thread(target=self._run, args=(acceptor, serve), daemon=True).start()

    @staticmethod
    def _run(acceptor: server.Acceptor, serve: object) -> None:
        with contextlib.suppress(OSError):
            acceptor.run(serve)  # type: ignore[arg-type]

    def client(self) -> AgentClient:
        async def dial(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            return await asyncio.open_unix_connection(self.paths[port])

        return AgentClient(dial, "test")

    def close(self) -> None:
        for listener in self.listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    made = Agent(tmp_path)
    yield made
    made.close()


def echo(envelope: pb.TtrpcRequest) -> bytes:
    if envelope.method == "Fail":
        raise RuntimeError("a bug")
    if envelope.method == "Refuse":
        raise status.AgentError(status.NOT_FOUND, "no such thing")
    return envelope.payload


def exchange(data: bytes) -> list[ttrpc.Message]:
    """Send octets to a call connection, half-close, return all that it answers."""
    ours, theirs = socket.socketpair()
    connection = server.CallConnection(theirs, echo, threading.Semaphore(server.MAX_CALLS))
    thread = threading.Thread(target=connection.serve)
    with ours:
        ours.settimeout(10)
        thread.start()
        with contextlib.suppress(OSError):
            ours.sendall(data)
        decoder = ttrpc.ClientDecoder()
        messages: list[ttrpc.Message] = []
        wanted = sum(1 for _ in requests_in(data))
        with contextlib.suppress(OSError):
            while len(messages) < wanted and (received := ours.recv(65536)):
                messages += decoder.feed(received)
            ours.shutdown(socket.SHUT_WR)
            while received := ours.recv(65536):
                messages += decoder.feed(received)
    thread.join(10)
    assert not thread.is_alive()
    return messages


def requests_in(data: bytes) -> Iterator[ttrpc.Message]:
    with contextlib.suppress(ttrpc.ProtocolError):
        decoder = ttrpc.ServerDecoder()
        yield from decoder.feed(data)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
def test_any_octets_leave_the_call_server_alive(noise: bytes) -> None:
    exchange(noise)
    (answer,) = exchange(ttrpc.request(1, "s", "Echo", b"x"))
    assert ttrpc.parse_response(answer) == b"x"


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=100))
def test_any_envelope_is_answered(payload: bytes) -> None:
    (answer,) = exchange(ttrpc.encode(1, ttrpc.REQUEST, payload))
    assert answer.stream_id == 1


def test_a_bug_in_a_handler_answers_internal_and_the_connection_lives() -> None:
    answers = exchange(ttrpc.request(1, "s", "Fail", b"") + ttrpc.request(3, "s", "Refuse", b""))
    codes = {}
    for answer in answers:
        with pytest.raises(status.AgentError) as caught:
            ttrpc.parse_response(answer)
        codes[answer.stream_id] = caught.value.code
    assert codes == {1: status.INTERNAL, 3: status.NOT_FOUND}


def test_an_oversized_message_is_named_before_the_connection_closes() -> None:
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=server.CallConnection(theirs, echo, threading.Semaphore(1)).serve)
    thread.start()
    with ours:
        ours.sendall(ttrpc.HEADER.pack(layout.MAX_MESSAGE_BYTES + 1, 7, ttrpc.REQUEST, 0))
        (answer,) = ttrpc.ClientDecoder().feed(ours.recv(65536))
        with pytest.raises(status.AgentError, match="longer than"):
            ttrpc.parse_response(answer)
        assert (answer.stream_id, ours.recv(1)) == (7, b"")
    thread.join(10)
    assert not thread.is_alive()


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_any_octets_end_a_stream_without_harm(noise: bytes, framed: bool) -> None:
    streams = service.Service(process.Reaper()).streams
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=streams.serve, args=(theirs,))
    with ours:
        thread.start()
        with contextlib.suppress(OSError):
            ours.sendall(frames.encode(pb.HELLO, noise) if framed else noise)
            ours.shutdown(socket.SHUT_WR)
            ours.settimeout(10)
            while ours.recv(65536):
                pass
    thread.join(10)
    assert not thread.is_alive()


async def test_calls_and_their_errors(agent: Agent) -> None:
    client = agent.client()
    assert (await client.list_containers()).last_event == 0
    await client.remove_container("absent")
    await asyncio.gather(*(client.list_containers() for _ in range(20)))
    with pytest.raises(errors.NotFoundError, match="container absent does not exist"):
        await client.start_container("absent")
    with pytest.raises(errors.InvalidArgumentError, match="no container id"):
        await client.remove_container("../../etc")
    with pytest.raises(errors.FailedPreconditionError, match="ConfigureSandbox has not been called"):
        await client.create_container(pb.CreateContainerRequest(container_id="c"))
    with pytest.raises(errors.UnimplementedError, match="no such method"):
        await client._call("Nonsense", pb.CheckRequest(), pb.CheckResponse, 5)
    with pytest.raises(status.AgentError, match="the payload is no CheckRequest"):
        agent.service.call(pb.TtrpcRequest(service=service.SERVICE, method="Check", payload=b"\xff"))
    await client.close()
    with pytest.raises(errors.VmGoneError):
        await client.list_containers()


async def test_events_are_replayed_and_followed(agent: Agent) -> None:
    client = agent.client()
    agent.service.events.out_of_memory("a")
    stream = client.events(0)
    first = await anext(stream)
    assert (first.sequence, first.oom.container_id) == (1, "a")
    exit_ = process.Exit(9)  # wait(2)'s status: killed by signal 9
    agent.service.events.exited("a", exit_, oom_killed=True)
    second = await anext(stream)
    assert (second.exit.exit.code, second.exit.exit.signal, second.exit.exit.oom_killed) == (137, 9, True)
    await stream.aclose()
    assert [(await anext(client.events(1))).sequence] == [2]
    with pytest.raises(errors.InvalidArgumentError, match="has not happened"):
        await anext(client.events(3))
    await client.close()


async def test_streams_that_cannot_be_opened(agent: Agent) -> None:
    client = agent.client()
    with pytest.raises(errors.NotFoundError, match="does not exist in this VM"):
        async with client.exec("absent", ["true"]):
            pass
    with pytest.raises(errors.NotFoundError):
        async with client.output("absent"):
            pass
    with pytest.raises(errors.InvalidArgumentError, match="no TCP port"):
        async with client.dial_port(70000):
            pass
    await client.close()


async def test_dial_carries_half_closes_both_ways(agent: Agent) -> None:
    async def answer_after_eof(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = await reader.read()
        writer.write(data.upper())
        writer.write_eof()
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer_after_eof, "127.0.0.1", 0) as tcp:
        port = tcp.sockets[0].getsockname()[1]
        client = agent.client()
        async with client.dial_port(port) as dialled:
            await dialled.write(b"abc" * 50_000)
            await dialled.write_eof()
            received = b""
            while data := await dialled.read():
                received += data
        assert received == b"ABC" * 50_000
    with pytest.raises(errors.NotFoundError, match=f"nothing answers on port {port}"):
        async with client.dial_port(port):
            pass
    await client.close()


async def test_closing_the_client_ends_what_waits(agent: Agent) -> None:
    client = agent.client()

    async def follow() -> None:
        await anext(client.events(0))

    following = asyncio.create_task(follow())
    await client.list_containers()
    await asyncio.sleep(0.05)
    await client.close()
    with pytest.raises((errors.UnavailableError, errors.VmGoneError)):
        await following


def test_oldest_connection_gives_way(agent: Agent) -> None:
    connections = []
    for _ in range(server.MAX_CALL_CONNECTIONS + 1):
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(10)
        connection.connect(str(agent.paths[layout.CALL_PORT]))
        connection.sendall(ttrpc.request(1, service.SERVICE, "ListContainers", b""))
        assert connection.recv(4096)
        connections.append(connection)
    assert connections[0].recv(1) == b""
    connections[-1].sendall(ttrpc.request(3, service.SERVICE, "ListContainers", b""))
    assert connections[-1].recv(4096)
    for connection in connections:
        connection.close()


def test_strangers_are_turned_away(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    acceptor = server.Acceptor(listener, 1, trusted=lambda peer: False)

    def run() -> None:
        with contextlib.suppress(OSError):
            acceptor.run(lambda connection: pytest.fail("served a stranger"))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.settimeout(10)
        stranger.connect(str(tmp_path / "s"))
        assert stranger.recv(1) == b""
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(10)


@pytest.mark.parametrize(("peer", "trusted"), [((2, 99), True), ((3, 99), False), ((1, 99), False), ("", False)])
def test_only_the_hosts_cid_is_trusted(peer: object, trusted: bool) -> None:
    from vmrt.agent import sockets

    assert sockets.is_host(peer) is trusted


def test_a_peer_that_does_not_read_cannot_hold_a_sender() -> None:
    from vmrt.agent import sockets

    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(TimeoutError):
        sockets.send_all(ours, bytes(10_000_000), 0.05)


class Hostile:
    """A guest that answers every connection with the same octets, then closes it or waits."""

    def __init__(self, answer: bytes, *, close: bool = True) -> None:
        self.answer = answer
        self.closes = close
        self.server: asyncio.Server | None = None

    async def client(self, path: Path) -> AgentClient:
        self.server = await asyncio.start_unix_server(self.serve, path)

        async def dial(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            return await asyncio.open_unix_connection(path)

        return AgentClient(dial, "test")

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(self.answer)
        with contextlib.suppress(OSError):
            await writer.drain()
            if not self.closes:
                await reader.read()
        writer.close()

    async def close(self) -> None:
        assert self.server is not None
        self.server.close()


REPLY_OK = frames.encode(pb.REPLY, b"")


@pytest.mark.parametrize(
    "answer",
    [b"", b"\x00" * 9, b"HTTP/1.1 400 Bad Request\r\n\r\n", ttrpc.HEADER.pack(2**32 - 1, 1, ttrpc.RESPONSE, 0)],
)
async def test_a_hostile_call_answer_is_an_error(tmp_path: Path, answer: bytes) -> None:
    hostile = Hostile(answer)
    client = await hostile.client(tmp_path / "s")
    with pytest.raises(errors.VmrtError):
        await client.list_containers(timeout_s=5)
    await client.close()
    await hostile.close()


async def test_an_answer_of_the_wrong_message_is_an_agent_error(tmp_path: Path) -> None:
    hostile = Hostile(ttrpc.response(1, b"\xff\xff"), close=False)
    client = await hostile.client(tmp_path / "s")
    with pytest.raises(errors.AgentError, match="the answer is no ListContainersResponse"):
        await client.list_containers(timeout_s=5)
    await client.close()
    await hostile.close()


async def test_an_error_text_cannot_carry_control_characters(tmp_path: Path) -> None:
    hostile = Hostile(ttrpc.failure(1, status.INTERNAL, "a\x1b[2Jb\n" + "x" * 10_000), close=False)
    client = await hostile.client(tmp_path / "s")
    with pytest.raises(errors.AgentError) as caught:
        await client.list_containers(timeout_s=5)
    assert caught.value.message.isprintable()
    assert len(caught.value.message) <= status.MAX_MESSAGE_CHARS
    await client.close()
    await hostile.close()


async def test_a_silent_agent_runs_into_the_time_limit(tmp_path: Path) -> None:
    hostile = Hostile(b"", close=False)
    client = await hostile.client(tmp_path / "s")
    started = time.monotonic()
    with pytest.raises(errors.DeadlineError):
        await client.list_containers(timeout_s=0.1)
    assert time.monotonic() - started < 60
    await client.close()
    await hostile.close()


@pytest.mark.parametrize(
    "after",
    [
        b"\xff" * 20,
        frames.encode(pb.EXIT, b"\xff"),
        frames.encode(pb.EXIT, pb.ExitFrame(code=4000).SerializeToString()),
        frames.encode(pb.OUTPUT, b""),
        b"\x04\x00",
        b"",
    ],
)
async def test_a_hostile_exec_stream_is_an_error(tmp_path: Path, after: bytes) -> None:
    hostile = Hostile(REPLY_OK + after)
    client = await hostile.client(tmp_path / "s")
    with pytest.raises((errors.AgentError, errors.UnavailableError)):
        async with client.exec("c", ["true"]) as session:
            await session.exit_code()
    await client.close()
    await hostile.close()


async def test_events_and_output_may_not_go_backwards(tmp_path: Path) -> None:
    event = frames.encode(pb.EVENT, pb.Event(sequence=4).SerializeToString())
    hostile = Hostile(REPLY_OK + event)
    client = await hostile.client(tmp_path / "e")
    with pytest.raises(errors.AgentError, match="event 4 after 5"):
        await anext(client.events(5))
    await client.close()
    await hostile.close()
    chunk = frames.encode(pb.OUTPUT, pb.OutputChunk(offset=1, data=b"x").SerializeToString())
    hostile = Hostile(REPLY_OK + chunk)
    client = await hostile.client(tmp_path / "o")
    with pytest.raises(errors.AgentError, match="went back"):
        async with client.output("c", 2, 0) as output:
            async for _ in output:
                pass
    await client.close()
    await hostile.close()
