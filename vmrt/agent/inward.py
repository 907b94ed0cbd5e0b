"""What comes from the host for a process or a connection: octets for its stdin, a terminal's size, signals."""

from __future__ import annotations

import contextlib
import itertools
import struct
from collections import deque

from vmrt.agent import agent_pb2 as pb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmrt.agent.channel import Channel
    from vmrt.agent.frames import Frame
    from vmrt.agent.process import Child, Reaper

    Write = Callable[[Sequence[memoryview]], int]

# Above layout.STDIN_WINDOW: a connection that is not read any more may hold back its other direction.
BOUND = 512 * 1024
# Of writev(2), UIO_MAXIOV.
_MOST_PIECES = 1024


class Inward:
    """Octets on their way to a descriptor that does not always take them; the host is told of those that are gone."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._pieces: deque[memoryview] = deque()  # none of them empty
        self._lent = 0  # how many of them, at the end, are in the channel's buffer
        self._octets = 0

    def __bool__(self) -> bool:
        return self._octets > 0

    @property
    def full(self) -> bool:
        """Whether no more should be received."""
        return self._octets >= BOUND

    def add(self, payload: bytes | memoryview) -> None:
        """Take octets that the channel has lent; `write` has to follow."""
        if payload:
            self._pieces.append(memoryview(payload))
            self._lent += 1
            self._octets += len(payload)

    def write(self, write: Write) -> None:
        """Hand on what is taken, all pieces in one go. Raises `OSError` of the descriptor, `Closed`."""
        try:
            while self._pieces:
                written = write(list(itertools.islice(self._pieces, _MOST_PIECES)))
                if not written:
                    break
                self._octets -= written
                self._forget(written)
                self._channel.consumed(written)
        except BlockingIOError:
            pass
        finally:
            self._keep()

    def drop(self) -> None:
        """Throw all away: nobody takes it."""
        self._pieces.clear()
        dropped, self._octets, self._lent = self._octets, 0, 0
        self._channel.release()
        self._channel.consumed(dropped)

    def _forget(self, written: int) -> None:
        while written:
            first = self._pieces.popleft()
            if written < len(first):
                self._pieces.appendleft(first[written:])
                break
            written -= len(first)

    def _keep(self) -> None:
        for at in range(len(self._pieces) - min(self._lent, len(self._pieces)), len(self._pieces)):
            self._pieces[at] = memoryview(bytes(self._pieces[at]))
        self._lent = 0
        self._channel.release()


def steer(frame: Frame, reaper: Reaper, child: Child | None, terminal: int) -> bool:
    """Do what a RESIZE or SIGNAL frame says, to a terminal (-1: none) and a process. Raises `FrameError`.

    Returns False for a frame that is neither.
    """
    if frame.type == pb.RESIZE:
        window = frame.parse(pb.WindowSize)
        if terminal >= 0:
            set_window(terminal, window.width, window.height)
    elif frame.type == pb.SIGNAL:
        number = frame.parse(pb.SignalFrame).signal
        if child is not None and 0 < number <= 64:
            reaper.signal(child, number)
    else:
        return False
    return True


def set_window(fd: int, width: int, height: int) -> None:
    """Set a terminal's size (TIOCSWINSZ); a size that does not fit 16 bits is cut."""
    import fcntl
    import termios

    with contextlib.suppress(OSError):
        fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", min(height, 65535), min(width, 65535), 0, 0))
