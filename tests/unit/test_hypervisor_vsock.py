import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmrt.agent import agent_pb2 as pb
from vmrt.errors import VmError
from vmrt.hypervisor import vsock
from vmrt.hypervisor.vsock import HybridVsock, KernelVsock, KernelVsockListener

ME = (os.getuid(), os.getgid())
NOTICE = pb.ReadyNotice(protocol=1, version="v").SerializeToString()


def hello(payload: bytes, kind: int = pb.HELLO) -> bytes:
    return bytes((kind,)) + len(payload).to_bytes(4, "big") + payload


async def read(octets: bytes, *, eof: bool = True) -> pb.ReadyNotice:
    reader = asyncio.StreamReader()
    reader.feed_data(octets)
    if eof:
        reader.feed_eof()
    return await vsock.read_notice(reader)


async def test_notice() -> None:
    assert await read(hello(NOTICE)) == pb.ReadyNotice(protocol=1, version="v")


@pytest.mark.parametrize(
    "octets",
    [
        b"",
        b"\x01\x00",
        hello(NOTICE)[:-1],
        hello(NOTICE, pb.STDOUT),
        b"\x01\x00\x00\x10\x01" + bytes(4097),
        b"\x01\xff\xff\xff\xff",
        hello(b"\xff\xff"),
    ],
)
async def test_what_is_no_notice(octets: bytes) -> None:
    with pytest.raises(VmError):
        await read(octets)


@given(st.binary(max_size=200))
def test_any_octets_give_a_notice_or_an_error(octets: bytes) -> None:
    with contextlib.suppress(VmError):
        asyncio.run(read(octets))


async def test_a_notice_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vsock, "_NOTICE_TIMEOUT_S", 0.01)
    with pytest.raises(VmError, match="did not end"):
        await read(b"\x01", eof=False)


@pytest.fixture
async def hybrid(tmp_path: Path) -> AsyncIterator[HybridVsock]:
    hybrid = HybridVsock(tmp_path / "v", tmp_path / "v_1026", tmp_path / "vhost", ME)
    yield hybrid
    await hybrid.close()


async def send(path: Path, octets: bytes) -> None:
    _, writer = await asyncio.open_unix_connection(path)
    writer.write(octets)
    await writer.drain()
    writer.close()
    await writer.wait_closed()


async def test_ready_takes_the_first_notice_and_unbinds(hybrid: HybridVsock, tmp_path: Path) -> None:
    await hybrid.listen()
    await send(tmp_path / "v_1026", hello(NOTICE))
    assert (await hybrid.ready()).version == "v"
    assert not (tmp_path / "v_1026").exists()


async def test_ready_fails_on_rubbish(hybrid: HybridVsock, tmp_path: Path) -> None:
    await hybrid.listen()
    await send(tmp_path / "v_1026", b"GET / HTTP/1.1\r\n")
    with pytest.raises(VmError):
        await hybrid.ready()


async def test_nothing_stays_bound_when_cancelled(hybrid: HybridVsock, tmp_path: Path) -> None:
    task = asyncio.create_task(hybrid.listen())
    await asyncio.sleep(0)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await hybrid.close()
    assert list(tmp_path.iterdir()) == []


@contextlib.asynccontextmanager
async def device(path: Path, answer: bytes) -> AsyncIterator[list[bytes]]:
    """A vhost-device-vsock that answers every CONNECT with these octets, and closes when they are no OK."""
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readline())
        writer.write(answer)
        if answer.startswith(b"OK"):
            while data := await reader.read(100):
                writer.write(data)
        writer.close()

    server = await asyncio.start_unix_server(serve, path)
    yield asked
    server.close()


async def test_dial(hybrid: HybridVsock, tmp_path: Path) -> None:
    # What follows the answer at once belongs to the connection.
    async with device(tmp_path / "v", b"OK 1024\nfirst ") as asked:
        reader, writer = await hybrid.dial(1024)
        writer.write(b"hello")
        assert await reader.readexactly(11) == b"first hello"
        writer.close()
        await writer.wait_closed()
    assert asked == [b"CONNECT 1024\n"]


@pytest.mark.parametrize("answer", [b"", b"NO\n", b"OK", b"x" * 100])
async def test_dial_refused(hybrid: HybridVsock, tmp_path: Path, answer: bytes) -> None:
    if answer == b"OK":
        answer = b"KO 1\n"
    async with device(tmp_path / "v", answer):
        with pytest.raises(VmError):
            await hybrid.dial(1024)


async def test_dial_without_device(hybrid: HybridVsock) -> None:
    with pytest.raises(VmError, match="cannot reach"):
        await hybrid.dial(1024)


@pytest.fixture
async def listener() -> AsyncIterator[tuple[KernelVsockListener, int]]:
    """The kernel's listener on a TCP socket: the peer's port stands for its CID."""
    bound = socket.create_server(("127.0.0.1", 0))
    bound.setblocking(False)
    listener = KernelVsockListener()
    listener.serve(bound, lambda address: int(address[1]))
    yield listener, bound.getsockname()[1]
    await listener.close()


async def connect(port: int) -> tuple[int, asyncio.StreamWriter]:
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    return writer.get_extra_info("sockname")[1], writer


async def test_kernel_notices_go_by_the_peers_cid(listener: tuple[KernelVsockListener, int]) -> None:
    kernel, port = listener
    first, second = await connect(port), await connect(port)
    guests = []
    for (cid, writer), version in ((first, "one"), (second, "two")):
        guest = KernelVsock(kernel)
        guest.started(cid)
        guests.append(guest)
        writer.write(hello(pb.ReadyNotice(protocol=1, version=version).SerializeToString()))
        await writer.drain()
        writer.close()
    async with asyncio.timeout(5):
        assert [(await guest.ready()).version for guest in reversed(guests)] == ["two", "one"]


async def test_kernel_guest_that_sends_rubbish(listener: tuple[KernelVsockListener, int]) -> None:
    kernel, port = listener
    cid, writer = await connect(port)
    guest = KernelVsock(kernel)
    guest.started(cid)
    writer.write(b"\xff" * 5)
    await writer.drain()
    writer.close()
    async with asyncio.timeout(5):
        with pytest.raises(VmError):
            await guest.ready()


async def test_kernel_unclaimed_notices_are_bounded(listener: tuple[KernelVsockListener, int]) -> None:
    kernel, _ = listener
    first = kernel.notice_of(0)
    for cid in range(1, 65):
        kernel.notice_of(cid)
    assert first.cancelled()


async def test_kernel_needs_a_cid(listener: tuple[KernelVsockListener, int]) -> None:
    guest = KernelVsock(listener[0])
    with pytest.raises(VmError):
        guest.started(None)
    with pytest.raises(VmError):
        await guest.dial(1024)
