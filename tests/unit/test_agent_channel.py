"""The agent's end of a stream connection: frames through a socket that takes little, acknowledgements, polling."""

from __future__ import annotations

import os
import select
import socket
import tempfile
import threading
from collections.abc import Iterator

import pytest

from vmrt.agent import agent_pb2 as pb
from vmrt.agent import channel, frames, inward, layout, sockets
from vmrt.hypervisor import vhost_vsock


@pytest.fixture
def ends() -> Iterator[tuple[channel.Channel, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    theirs.settimeout(60)
    yield channel.Channel(ours), theirs
    for end in (ours, theirs):
        end.close()


def test_no_send_is_larger_than_one_packet_that_the_device_takes() -> None:
    """A socket that keeps each send(2) apart, as a vsock makes a packet of each."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    data = os.urandom(3 * layout.MAX_FRAME_BYTES + 5000)
    packets: list[bytes] = []

    def read() -> None:
        while packet := theirs.recv(2 * layout.MAX_FRAME_BYTES):
            packets.append(packet)

    reader = threading.Thread(target=read)
    reader.start()
    with ours, theirs:
        agent = channel.Channel(ours)
        with tempfile.TemporaryFile(buffering=0) as source:
            source.write(data)
            source.seek(0)
            assert agent.relay(pb.STDOUT, source.fileno()) == len(data)
        agent.send(frames.encode_data(pb.STDERR, data))
        agent.flush()
        sockets.send_all(ours, data, 60)
        ours.shutdown(socket.SHUT_WR)
        reader.join(60)
    assert b"".join(packets).endswith(frames.encode_data(pb.STDERR, data) + data)
    assert max(map(len, packets)) == sockets.PACKET_BYTES


@pytest.mark.parametrize(
    ("release", "kib"),
    [
        ("6.1.192-vmrt", 64),
        ("6.1.0-37-amd64", 64),
        ("5.10", 64),
        ("6.3.0", 31),
        ("6.12.118+deb13-amd64", 31),
        ("7.0-rc1", 31),
        ("strange", 31),
    ],
)
def test_a_packet_is_as_large_as_the_guests_kernel_keeps_in_one_piece(release: str, kib: int) -> None:
    assert sockets.packet_bytes(release) == kib * 1024


def say_hello(to: channel.Channel, host: socket.socket) -> None:
    host.sendall(frames.encode(pb.HELLO, pb.StreamHello(stdin_acks=True).SerializeToString()))
    assert to.hello().stdin_acks


def test_data_arrives_whole_and_in_order_however_little_the_socket_takes(
    ends: tuple[channel.Channel, socket.socket],
) -> None:
    ours, host = ends
    data = os.urandom(3 * channel.Buffer.FRAMES * layout.MAX_FRAME_BYTES + 5000)
    received: list[frames.Frame] = []

    def read() -> None:
        decoder = frames.Decoder(frames.FROM_GUEST)
        while not received or received[-1].type != pb.CLOSE:
            received.extend(decoder.feed(host.recv(3000)))

    with tempfile.TemporaryFile(buffering=0) as source:
        source.write(data)
        source.seek(0)
        ours._connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)
        assert ours.relay(pb.STDOUT, source.fileno()) == channel.Buffer.FRAMES * layout.MAX_FRAME_BYTES
        assert ours.interest() & select.POLLOUT  # the socket cannot have taken it, and nobody reads yet
        assert ours.congested
        reader = threading.Thread(target=read)
        reader.start()
        ours.queue(frames.stdin_ack(7))  # behind the rest of it
        while ours.relay(pb.STDOUT, source.fileno()):
            pass  # a session would wait while it is congested; what comes too early must queue all the same
    ours.send(frames.close_frame(pb.STDOUT))
    ours.flush()
    reader.join(60)
    kinds = [frame.type for frame in received]
    assert kinds == [*[pb.STDOUT] * 4, pb.STDIN_ACK, *[pb.STDOUT] * 9, pb.CLOSE]
    assert b"".join(frame.payload for frame in received if frame.type == pb.STDOUT) == data
    assert not ours.interest() & select.POLLOUT
    assert not ours.congested


def test_a_relayed_frame_is_as_long_as_what_was_there(ends: tuple[channel.Channel, socket.socket]) -> None:
    ours, host = ends
    reader, writer = os.pipe()
    try:
        os.set_blocking(reader, False)
        with pytest.raises(BlockingIOError):
            ours.relay(pb.STDERR, reader)
        os.write(writer, b"some")
        assert ours.relay(pb.STDERR, reader) == 4
        assert host.recv(100) == frames.encode(pb.STDERR, b"some")
        os.close(writer)
        assert ours.relay(pb.STDERR, reader) == 0
    finally:
        os.close(reader)


def test_no_buffer_is_in_two_hands(
    ends: tuple[channel.Channel, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, host = ends
    monkeypatch.setattr(channel.Buffer, "_spare", [])
    spare = channel.Buffer._spare
    reader, writer = os.pipe()
    try:
        os.set_blocking(reader, False)
        os.write(writer, bytes(100))
        ours.relay(pb.STDOUT, reader)
        assert len(spare) == 1
        with pytest.raises(BlockingIOError):
            ours.relay(pb.STDOUT, reader)
        assert len(spare) == 1
        host.sendall(frames.encode(pb.STDIN, b"lent"))
        (frame,) = ours.receive()
        assert not spare  # it is in `frame`'s payload
        os.write(writer, bytes(65536))
        ours.relay(pb.STDOUT, reader)
        assert ours.congested
        assert frame.payload == b"lent"
        ours.release()
        ours.close()
        assert len(spare) == len({id(buffer) for buffer in spare}) == 2
    finally:
        os.close(reader)
        os.close(writer)


def test_stdin_is_acknowledged_in_few_frames_and_never_too_late(ends: tuple[channel.Channel, socket.socket]) -> None:
    ours, host = ends
    say_hello(ours, host)
    decoder = frames.Decoder(frames.FROM_GUEST)
    for _ in range(layout.STDIN_ACK - 1):
        ours.consumed(1)
    host.setblocking(False)
    with pytest.raises(BlockingIOError):
        host.recv(1)
    ours.consumed(1)
    (ack,) = decoder.feed(host.recv(4096))
    assert frames.acknowledged(ack) == layout.STDIN_ACK


def test_the_windows_fit_into_each_other() -> None:
    """A host that waits for room, and an agent that waits for more to acknowledge, must not wait for each other."""
    assert layout.STDIN_ACK + layout.STDIN_PIECE <= layout.STDIN_WINDOW
    assert layout.STDIN_PIECE <= layout.MAX_FRAME_BYTES
    # With their headers, too: else each turn is followed by one for the rest.
    turn = len(channel.Buffer().view)
    assert turn >= layout.STDIN_WINDOW + layout.STDIN_WINDOW // layout.STDIN_PIECE * frames.HEADER.size
    assert min(sockets._BUFFER_BYTES, vhost_vsock._TX_BYTES) >= turn
    # The agent reads on with all of a window in its hands.
    assert inward.BOUND > layout.STDIN_WINDOW


def test_a_watch_waits_for_what_it_was_told_last() -> None:
    reader, writer = os.pipe()
    try:
        watch = channel.Watch()
        watch.want(-1, select.POLLIN)
        watch.want(reader, select.POLLIN)
        assert watch.wait(0) == {}
        os.write(writer, b"x")
        assert watch.wait(60) == {reader: select.POLLIN}
        watch.want(reader, 0)
        assert watch.wait(0) == {}
        watch.want(reader, select.POLLIN)
        watch.want(reader, select.POLLIN)
        assert watch.wait(60) == {reader: select.POLLIN}
        watch.forget(reader)
        watch.forget(reader)
        assert watch.wait(0) == {}
    finally:
        os.close(reader)
        os.close(writer)
