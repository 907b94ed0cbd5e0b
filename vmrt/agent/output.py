"""What a container's main process prints: bounded buffers, their readers, and the thread that fills them.

Each of stdout and stderr is a run of octets numbered from 0. The buffer keeps those from the lowest offset that is
still needed: what the log's reader has not acknowledged and what an attached client has not been sent. When a buffer
is full its pipe is not read any more, so the container blocks on its write: nothing is lost, and nothing grows. Without
a log (`discard`) only attached clients hold octets back.

A reader (`Cursor`) is woken through an eventfd, so that a session can wait for it and for its socket at once.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from bisect import bisect_right

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

STDOUT, STDERR = 0, 1
DEFAULT_LIMIT = 1024 * 1024
MAX_LIMIT = 64 * 1024 * 1024
_READ = 65536
# Small writes that come within this time share a time stamp and one chunk.
_COALESCE_NS = 2_000_000
_COALESCE_OCTETS = 4096
# What a chunk costs beside its octets, counted so that many tiny ones stay within the bound.
_CHUNK_COST = 200


class Stream:
    """One of the two runs of octets. Not locked: `Output` does that."""

    def __init__(self) -> None:
        self.start = 0  # offset of the first octet kept
        self.end = 0  # offset behind the last octet read
        self.open = False
        self._offsets: list[int] = []
        self._chunks: list[bytes] = []
        self._times: list[int] = []

    @property
    def cost(self) -> int:
        """Return what the buffer occupies, in octets."""
        return self.end - self.start + _CHUNK_COST * len(self._chunks)

    def append(self, data: bytes, now_ns: int) -> None:
        """Add octets read at `now_ns`."""
        last = len(self._chunks) - 1
        if last >= 0 and now_ns - self._times[last] < _COALESCE_NS and len(self._chunks[last]) < _COALESCE_OCTETS:
            self._chunks[last] += data
        else:
            self._offsets.append(self.end)
            self._chunks.append(data)
            self._times.append(now_ns)
        self.end += len(data)

    def read(self, offset: int) -> tuple[bytes, int]:
        """Return (octets from `offset` to the end of their chunk, when they were read); empty at the end."""
        if offset >= self.end or not self._offsets:
            return b"", 0
        index = max(0, bisect_right(self._offsets, offset) - 1)
        return self._chunks[index][offset - self._offsets[index] :], self._times[index]

    def drop(self, floor: int) -> None:
        """Forget chunks that lie wholly below `floor`."""
        floor = min(floor, self.end)
        if floor <= self.start:
            return
        count = bisect_right(self._offsets, floor) - 1
        if floor == self.end:
            count = len(self._offsets)
        if count > 0:
            del self._offsets[:count], self._chunks[:count], self._times[:count]
        self.start = self._offsets[0] if self._offsets else self.end


class Cursor:
    """One reader's place in both streams. `wake_fd` becomes readable when there may be more."""

    def __init__(self, output: Output, positions: list[int], *, holds: bool) -> None:
        self._output = output
        self.positions = positions
        self.holds = holds
        self.ended = False
        self.wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def next(self) -> tuple[int, int, bytes, int] | None:
        """Return (stream, offset, octets, read at) of the next chunk, None when there is nothing now."""
        return self._output._next(self)

    def at_end(self) -> bool:
        """Whether both streams have ended and all of them has been taken."""
        return self._output._at_end(self)

    def clear_wake(self) -> None:
        """Make `wake_fd` wait for the next change."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.wake_fd)

    def wake(self) -> None:
        """Make `wake_fd` readable."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self.wake_fd, 1)

    def close(self) -> None:
        """Stop reading; what only this reader held back is dropped."""
        self._output._forget(self)


class Output:
    """Both output streams of one container."""

    def __init__(self, limit: int = 0, *, discard: bool = False) -> None:
        self._limit = min(limit or DEFAULT_LIMIT, MAX_LIMIT)
        self._discard = discard
        self._lock = threading.Lock()
        self._streams = (Stream(), Stream())
        self._acked = [0, 0]
        self._cursors: list[Cursor] = []
        self._log: Cursor | None = None
        self.room = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)  # readable when a full buffer has room again

    def opened(self, which: int) -> None:
        """Say that this stream has a writer."""
        self._streams[which].open = True

    def ended(self, which: int) -> None:
        """Say that this stream's last octet has been read."""
        with self._lock:
            self._streams[which].open = False
            self._wake_all()

    def full(self, which: int) -> bool:
        """Whether this stream's buffer takes nothing now."""
        return self._streams[which].cost >= self._limit

    def append(self, which: int, data: bytes) -> None:
        """Add octets just read from the container."""
        with self._lock:
            self._streams[which].append(data, time.monotonic_ns())
            self._trim()
            self._wake_all()

    def _wake_all(self) -> None:
        for cursor in self._cursors:
            cursor.wake()

    def nudge(self) -> None:
        """Wake the pump and all readers."""
        with self._lock:
            self._signal_room()
            self._wake_all()

    def _signal_room(self) -> None:
        # Under the lock, as is the closing: a late write must not hit a descriptor that was given away again.
        if self.room >= 0:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_write(self.room, 1)

    def pump_ended(self) -> None:
        """Say that nobody waits on `room` any more."""
        with self._lock:
            fd, self.room = self.room, -1
            os.close(fd)

    def follow_log(self, stdout_offset: int, stderr_offset: int) -> Cursor:
        """Start the log's reader at these offsets and end an older one.

        What lies below an offset counts as stored, what has been dropped is skipped: the reader sees it by the offset
        of its first chunk. Raises `ValueError` for an offset that has not been reached.
        """
        with self._lock:
            for stream, offset in zip(self._streams, (stdout_offset, stderr_offset), strict=True):
                if offset > stream.end:
                    raise ValueError(f"offset {offset} is behind the end, {stream.end}")
            older, self._log = self._log, None
            cursor = self._log = Cursor(self, [stdout_offset, stderr_offset], holds=False)
            self._cursors.append(cursor)
            if older is not None:
                older.ended = True
                older.wake()
            return cursor

    def attach(self) -> Cursor:
        """Start a reader of what is printed from now on."""
        with self._lock:
            cursor = Cursor(self, [stream.end for stream in self._streams], holds=True)
            self._cursors.append(cursor)
            return cursor

    def acknowledge(self, stdout_offset: int, stderr_offset: int) -> None:
        """Drop what the log's reader has stored; offsets that are not reached yet are cut."""
        with self._lock:
            for which, offset in enumerate((stdout_offset, stderr_offset)):
                self._acked[which] = max(self._acked[which], min(offset, self._streams[which].end))
            self._trim()

    def _trim(self) -> None:
        for which, stream in enumerate(self._streams):
            was_full = stream.cost >= self._limit
            floor = stream.end if self._discard else self._acked[which]
            for cursor in self._cursors:
                if cursor.holds:
                    floor = min(floor, cursor.positions[which])
            stream.drop(floor)
            if was_full and stream.cost < self._limit:
                self._signal_room()

    def _next(self, cursor: Cursor) -> tuple[int, int, bytes, int] | None:
        with self._lock:
            best: tuple[int, int, bytes, int] | None = None
            for which, stream in enumerate(self._streams):
                offset = max(cursor.positions[which], stream.start)
                data, read_at = stream.read(offset)
                # The older one first: the log shows both streams in the order in which they were read.
                if data and (best is None or read_at < best[3]):
                    best = (which, offset, data[:_READ], read_at)
            if best is not None:
                cursor.positions[best[0]] = best[1] + len(best[2])
                if cursor.holds:
                    self._trim()
            return best

    def _at_end(self, cursor: Cursor) -> bool:
        with self._lock:
            return all(
                not stream.open and cursor.positions[which] >= stream.end for which, stream in enumerate(self._streams)
            )

    def _forget(self, cursor: Cursor) -> None:
        with self._lock:
            if cursor not in self._cursors:
                return
            self._cursors.remove(cursor)
            if self._log is cursor:
                self._log = None
            self._trim()
            # All of wake()'s callers hold the lock, so none hits a descriptor that was given away again.
            fd, cursor.wake_fd = cursor.wake_fd, -1
            os.close(fd)

    def close(self) -> None:
        """End all readers; the container is being removed."""
        with self._lock:
            for cursor in self._cursors:
                cursor.ended = True
            self._wake_all()


class Pump(threading.Thread):
    """Reads a container's pipes (or terminal) into its `Output`, and watches its cgroup for OOM kills.

    It owns the descriptors given to it. It ends when both streams have ended and `finish` was called.
    """

    def __init__(self, output: Output, sources: dict[int, int], events_fd: int, on_oom: Callable[[], None]) -> None:
        super().__init__(name="output", daemon=True)
        self._output = output
        self._sources = sources  # descriptor -> stream
        self._events_fd = events_fd
        self._on_oom = on_oom
        self._finished = False
        for which in sources.values():
            output.opened(which)

    def finish(self) -> None:
        """Stop watching the cgroup; the thread ends once the streams have."""
        self._finished = True
        self._output.nudge()

    def run(self) -> None:
        """Pump until the end."""
        try:
            while self._sources or not self._finished:
                self._turn()
        finally:
            for fd in [*self._sources, self._events_fd]:
                if fd >= 0:
                    os.close(fd)
            self._output.pump_ended()

    def _turn(self) -> None:
        poll = select.poll()
        poll.register(self._output.room, select.POLLIN)
        if self._events_fd >= 0 and not self._finished:
            poll.register(self._events_fd, select.POLLPRI)
        for fd, which in self._sources.items():
            if not self._output.full(which):
                poll.register(fd, select.POLLIN)
        for fd, events in poll.poll():
            if fd == self._output.room:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(fd)
            elif fd == self._events_fd:
                # kernfs wants the file read again before it tells the next change.
                with contextlib.suppress(OSError):
                    os.pread(fd, 4096, 0)
                self._on_oom()
                if events & select.POLLHUP:
                    self._finished = True
            else:
                self._take(fd)

    def _take(self, fd: int) -> None:
        which = self._sources[fd]
        try:
            data = os.read(fd, _READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""  # a terminal's master says EIO when the last slave is closed
        if data:
            self._output.append(which, data)
            return
        del self._sources[fd]
        os.close(fd)
        self._output.ended(which)
