"""What the host sends towards a process: stdin into a descriptor that takes little, sizes and signals."""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import socket
import struct
import termios
from collections.abc import Iterator, Sequence

import pytest

from vmrt.agent import agent_pb2 as pb
from vmrt.agent import channel, frames, inward
from vmrt.agent.layout import STDIN_ACK


@pytest.fixture
def ends() -> Iterator[tuple[channel.Channel, socket.socket]]:
    ours, theirs = socket.socketpair()
    theirs.settimeout(60)
    yield channel.Channel(ours), theirs
    for end in (ours, theirs):
        end.close()


def acknowledged(host: socket.socket) -> int:
    host.setblocking(False)
    try:
        received = frames.Decoder(frames.FROM_GUEST).feed(host.recv(4096))
    except BlockingIOError:
        return 0
    return sum(frames.acknowledged(frame) for frame in received)


class Slow:
    """A descriptor that takes so many octets at a time, then nothing until it is asked again."""

    def __init__(self, most: int) -> None:
        self.got = bytearray()
        self._most = most
        self._full = False

    def write(self, pieces: Sequence[memoryview]) -> int:
        self._full = not self._full
        if not self._full:
            raise BlockingIOError
        taken = b"".join(pieces)[: self._most]
        self.got += taken
        return len(taken)


@pytest.mark.parametrize("most", [1, 999, 70_000])
def test_octets_outlive_the_buffer_they_came_in(ends: tuple[channel.Channel, socket.socket], most: int) -> None:
    ours, host = ends
    host.sendall(frames.encode(pb.HELLO, pb.StreamHello(stdin_acks=True).SerializeToString()))
    ours.hello()
    sent = [os.urandom(size) for size in (3000, 1, 0, 5000, 60_000)]
    towards, slow = inward.Inward(ours), Slow(most)
    for data in sent:
        host.sendall(frames.encode(pb.STDIN, data))
        taken = 0
        while taken < len(data):
            for frame in ours.receive():
                taken += len(frame.payload)
                towards.add(frame.payload)
            towards.write(slow.write)  # what it leaves must not be in the buffer that the next `receive` fills
        channel.Buffer.take().view[:] = bytes(len(channel.Buffer.take().view))
    assert towards
    while towards:
        towards.write(slow.write)
    assert slow.got == b"".join(sent)
    assert acknowledged(host) // STDIN_ACK == 1


def test_what_nobody_takes_is_acknowledged(ends: tuple[channel.Channel, socket.socket]) -> None:
    ours, host = ends
    host.sendall(frames.encode(pb.HELLO, pb.StreamHello(stdin_acks=True).SerializeToString()))
    ours.hello()
    towards = inward.Inward(ours)

    def closed(_: Sequence[memoryview]) -> int:
        raise BrokenPipeError(errno.EPIPE, "closed")

    towards.add(bytes(STDIN_ACK))
    with pytest.raises(BrokenPipeError):
        towards.write(closed)
    towards.drop()
    assert acknowledged(host) == STDIN_ACK
    assert not towards


def test_it_is_full_at_its_bound(ends: tuple[channel.Channel, socket.socket]) -> None:
    towards = inward.Inward(ends[0])
    towards.add(bytes(inward.BOUND - 1))
    seen = [towards.full]
    towards.add(b"x")
    assert [*seen, towards.full] == [False, True]


class Signals:
    """A reaper that only remembers."""

    def __init__(self) -> None:
        self.sent: list[int] = []

    def signal(self, child: object, number: int) -> None:
        self.sent.append(number)


def steer(frame: bytes, signals: Signals, child: object, terminal: int = -1) -> bool:
    (decoded,) = frames.Decoder(frames.FROM_HOST).feed(frame)
    return inward.steer(decoded, signals, child, terminal)  # type: ignore[arg-type]


def test_signals_that_exist_reach_a_process_that_is_there() -> None:
    signals = Signals()
    for number in (15, 0, 64, 65):
        assert steer(frames.encode(pb.SIGNAL, pb.SignalFrame(signal=number).SerializeToString()), signals, object())
    assert steer(frames.encode(pb.SIGNAL, pb.SignalFrame(signal=9).SerializeToString()), signals, None)
    assert signals.sent == [15, 64]


def test_a_size_reaches_the_terminal_and_no_terminal_is_no_error() -> None:
    master, slave = pty.openpty()
    try:
        resize = frames.encode(pb.RESIZE, pb.WindowSize(width=100_000, height=40).SerializeToString())
        assert steer(resize, Signals(), None, master)
        assert struct.unpack("HHHH", fcntl.ioctl(slave, termios.TIOCGWINSZ, bytes(8)))[:2] == (40, 65535)
        assert steer(resize, Signals(), None)
    finally:
        os.close(master)
        os.close(slave)


def test_other_frames_are_left_alone_and_broken_ones_told() -> None:
    assert not steer(frames.close_frame(pb.STDIN), Signals(), None)
    with pytest.raises(frames.FrameError):
        steer(frames.encode(pb.SIGNAL, b"\xff"), Signals(), None)
