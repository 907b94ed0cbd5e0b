"""The agent's end of a stream connection: frames through a socket that takes little, acknowledgements, polling."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Iterator

import pytest

from vmrt.agent import agent_pb2 as pb
from vmrt.agent import channel, execs, frames, layout, streams


@pytest.fixture
def ends() -> Iterator[tuple[channel.Channel, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    theirs.settimeout(60)
    yield channel.Channel(ours), theirs
    for end in (ours, theirs):
        end.close()


def say_hello(to: channel.Channel, host: socket.socket) -> None:
    host.sendall(frames.encode(pb.HELLO, pb.StreamHello(stdin_acks=True).SerializeToString()))
    assert to.hello().stdin_acks


def test_data_arrives_whole_and_in_order_however_little_the_socket_takes(
    ends: tuple[channel.Channel, socket.socket],
) -> None:
    ours, host = ends
    payloads = [os.urandom(size) for size in (65536, 1, 65536, 0, 65536, 5000)]
    received: list[frames.Frame] = []

    def read() -> None:
        decoder = frames.Decoder(frames.FROM_GUEST)
        while len(received) <= len(payloads):
            received.extend(decoder.feed(host.recv(3000)))

    for payload in payloads:
        ours.send_data(pb.STDOUT, payload)
    assert ours.congested  # the socket cannot have taken it: what follows has to queue behind the rest
    ours.send(frames.close_frame(pb.STDOUT))
    reader = threading.Thread(target=read)
    reader.start()
    ours.flush()
    reader.join(60)
    assert [frame.payload for frame in received] == [*payloads, bytes([pb.STDOUT])]
    assert not ours.congested


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
    # The agent reads on with all of a window in its hands.
    assert min(execs._STDIN_BOUND, streams._STDIN_BOUND, streams._DIAL_BUFFER) > layout.STDIN_WINDOW


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
