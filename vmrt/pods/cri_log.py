r"""The CRI log file of one container, written exactly once per octet, across rotations and kills of the daemon.

Format (kubelet's reader, k8s.io/cri-client/pkg/logs): ``<RFC3339Nano> <stdout|stderr> <P|F> <content>\n``; P marks a
piece of a line that goes on, F its end. A line longer than the limit is cut into P pieces; what a process leaves
without a newline at its end is one P.

Nothing may be lost or doubled when the daemon is killed between the write and its note of it. So a 72-octet position
file (mapped, so it lives in the page cache and survives the process) holds the offsets in the agent's streams up to
which the log is complete, and before each write the intent: the offsets after it, the file's inode, and its size before
and after. At the next start, a log as long as "after" has the write, a shorter one is cut back to "before".
"""

from __future__ import annotations

import glob
import mmap
import os
import stat
import struct
import time
from dataclasses import dataclass
from pathlib import Path

from vmrt.errors import VmrtError

# committed out, err; intended out, err; inode, size before, size after; intent flag. A kill may fall between any two
# octets of these, so the flag is one octet that goes up after the intent and down after the commit.
_COMMITTED = struct.Struct("=2Q")
_INTENT = struct.Struct("=5Q")
_FLAG = _COMMITTED.size + _INTENT.size
_SIZE = _FLAG + 8
_FILE_MODE = 0o640


@dataclass(frozen=True, slots=True)
class Offsets:
    """How far the two streams of a container are in the log, in octets."""

    stdout: int = 0
    stderr: int = 0


class Position:
    """The mapped position file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(fd).st_size < _SIZE:
                os.ftruncate(fd, _SIZE)
            self._map = mmap.mmap(fd, _SIZE)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Unmap the file."""
        self._map.close()

    @property
    def committed(self) -> Offsets:
        """Up to where the log is complete."""
        return Offsets(*_COMMITTED.unpack_from(self._map))

    def intend(self, offsets: Offsets, inode: int, before: int, after: int) -> None:
        """Note what is about to be written."""
        _INTENT.pack_into(self._map, _COMMITTED.size, offsets.stdout, offsets.stderr, inode, before, after)
        self._map[_FLAG] = 1  # last: only now what stands before it counts

    def commit(self, offsets: Offsets) -> None:
        """Note that it was written."""
        _COMMITTED.pack_into(self._map, 0, offsets.stdout, offsets.stderr)
        self._map[_FLAG] = 0  # last: until then the intent says the same

    def recover(self, log_path: Path) -> None:
        """Settle a write that a killed daemon left open; `log_path` is the file as it is named now."""
        if not self._map[_FLAG]:
            return
        out, err, inode, before, after = _INTENT.unpack_from(self._map, _COMMITTED.size)
        written = _find(log_path, inode)
        if written is not None and written.stat().st_size < after:
            # The write did not happen, or not whole (a full disk): take it back and let the stream bring it again.
            if written.stat().st_size > before:
                os.truncate(written, before)
            self.commit(self.committed)
        else:
            # Written; or the file is gone, and with it whoever could tell.
            self.commit(Offsets(out, err))


def _find(log_path: Path, inode: int) -> Path | None:
    """Return the file with this inode: the log itself, or what a rotation has made of it in the same directory."""
    try:
        for path in (log_path, *log_path.parent.glob(f"{glob.escape(log_path.stem)}*")):
            status = path.lstat() if path.exists() else None
            if status is not None and status.st_ino == inode and stat.S_ISREG(status.st_mode):
                return path
    except OSError:
        pass
    return None


class LineSplitter:
    """Cuts one stream's octets into log entries of at most `limit` octets of content."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._rest = b""

    @property
    def pending(self) -> int:
        """Octets taken in and not given out yet."""
        return len(self._rest)

    def feed(self, data: bytes) -> list[tuple[bytes, bool]]:
        """Return the entries that `data` completes, as (content, ends a line)."""
        buffer = self._rest + data if self._rest else data
        entries: list[tuple[bytes, bool]] = []
        start = 0
        while True:
            end = buffer.find(b"\n", start)
            stop = len(buffer) if end < 0 else end
            while stop - start > self._limit:
                entries.append((buffer[start : start + self._limit], False))
                start += self._limit
            if end < 0:
                break
            content = buffer[start:end]
            entries.append((content[:-1] if content.endswith(b"\r") else content, True))
            start = end + 1
        self._rest = buffer[start:]
        return entries

    def finish(self) -> list[tuple[bytes, bool]]:
        """Return what is left when the stream ends."""
        rest, self._rest = self._rest, b""
        return [(rest, False)] if rest else []


class LogFile:
    """One container's log: chunks in, lines on disk. Not for use from several tasks at once."""

    def __init__(self, path: Path | None, position_path: Path, line_limit: int) -> None:
        """Open (and settle) the log at `path`; None discards the output but keeps count of it."""
        self._path = path
        self.position = Position(position_path)
        self._splitters = (LineSplitter(line_limit), LineSplitter(line_limit))
        self._fd = -1
        self._inode = 0
        self._last_ns = 0
        if path is not None:
            self.position.recover(path)
        done = self.position.committed
        self._taken = [done.stdout, done.stderr]
        self.reopen()

    def reopen(self) -> None:
        """Open the file by its name again, creating it: what comes next goes to the new file."""
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            fd = os.open(self._path, flags, _FILE_MODE)
        except OSError as e:
            raise VmrtError(f"cannot open the log: {e.strerror}", phase="log", resource=str(self._path)) from e
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise VmrtError("the log path names something that is not a file", phase="log", resource=str(self._path))
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = fd
        self._inode = os.fstat(fd).st_ino

    def take(self, stderr: bool, offset: int, data: bytes, age_us: int) -> Offsets:
        """Log one chunk of a stream and return up to where both streams are on disk.

        `offset` is where the chunk starts: octets seen already are skipped, so a stream may be replayed. A write error
        (a full disk) drops the lines, as a container must never block on its log; counted as written.
        """
        index = int(stderr)
        known = self._taken[index]
        if offset < known:
            data = data[known - offset :]
            offset = known
        if data:
            self._taken[index] = offset + len(data)
            self._write(index, self._splitters[index].feed(data), age_us)
        return self.position.committed

    def finish(self) -> Offsets:
        """Write what the streams left without a newline."""
        for index, splitter in enumerate(self._splitters):
            self._write(index, splitter.finish(), 0)
        return self.position.committed

    def close(self) -> None:
        """Close file and position."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self.position.close()

    def _write(self, index: int, entries: list[tuple[bytes, bool]], age_us: int) -> None:
        reached = [self._taken[i] - self._splitters[i].pending for i in (0, 1)]
        offsets = Offsets(*reached)
        if not entries:
            return
        if self._fd < 0:
            self.position.commit(offsets)
            return
        stamp = self._stamp(age_us)
        name = b"stderr" if index else b"stdout"
        text = b"".join(
            b"%b %b %b %b\n" % (stamp, name, b"F" if whole else b"P", content) for content, whole in entries
        )
        before = os.fstat(self._fd).st_size
        self.position.intend(offsets, self._inode, before, before + len(text))
        view = memoryview(text)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError:
            os.ftruncate(self._fd, before)  # no half lines
        self.position.commit(offsets)

    def _stamp(self, age_us: int) -> bytes:
        now = time.time_ns()
        # The age comes from the guest: it may not make time run backwards or reach into the future.
        at = (
            max(self._last_ns, now - max(0, age_us) * 1000)
            if self._last_ns
            else now - min(age_us, 86_400_000_000) * 1000
        )
        self._last_ns = min(max(at, 0), now)
        seconds, fraction = divmod(self._last_ns, 1_000_000_000)
        return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)).encode() + b".%09dZ" % fraction
