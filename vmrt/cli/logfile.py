r"""Reading CRI log files: the format without I/O, and a reader that follows a file across rotations.

Format (kubelet's reader, k8s.io/cri-client/pkg/logs; `vmrt.pods.cri_log` is the writer): one entry a line,
``<RFC3339Nano> <stdout|stderr> <tags> <content>\n``, where the first of the ``:``-separated tags is P for a piece of a
line that goes on and F for its end. Joining the contents of one stream, with a newline after every F, gives back the
octets that the container wrote.
"""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

CHUNK_BYTES = 256 * 1024
POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Entry:
    """One piece of output. `octets` includes the newline that an F stands for."""

    timestamp: bytes
    stderr: bool
    partial: bool
    octets: bytes


def parse(line: bytes) -> Entry | None:
    """Return the entry in one line (without its newline); None for a line that is not in the format."""
    fields = line.split(b" ", 3)
    if len(fields) < 3 or fields[1] not in (b"stdout", b"stderr"):
        return None
    tag = fields[2].split(b":", 1)[0]
    if tag not in (b"P", b"F"):
        return None
    content = fields[3] if len(fields) == 4 else b""
    partial = tag == b"P"
    return Entry(fields[0], fields[1] == b"stderr", partial, content if partial else content + b"\n")


class Parser:
    """Octets of a log file in, entries out. `skipped` counts the lines that were not in the format."""

    def __init__(self) -> None:
        self._rest = b""
        self.skipped = 0

    def feed(self, data: bytes) -> list[Entry]:
        """Take more of the file, return the entries that are complete now."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        entries = [parse(line) for line in lines]
        self.skipped += entries.count(None)
        return [entry for entry in entries if entry is not None]


def last_lines(entries: Iterable[Entry], count: int) -> list[Entry]:
    """Return the entries of the last `count` lines of output, a line with all its pieces counting once."""
    lines: collections.deque[list[Entry]] = collections.deque(maxlen=count)
    open_line: dict[bool, list[Entry]] = {}
    for entry in entries:
        line = open_line.get(entry.stderr)
        if line is None:
            line = []
            lines.append(line)
        line.append(entry)
        if entry.partial:
            open_line[entry.stderr] = line
        else:
            open_line.pop(entry.stderr, None)
    return [entry for line in lines for entry in line]


class LogReader:
    """One container's log file, read from its start; a file that does not exist yet is an empty one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parser = Parser()
        self._file: BinaryIO | None = None

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def available(self) -> Iterator[list[Entry]]:
        """Yield what is in the file by now, rotated-in files included, up to the end."""
        while True:
            if self._file is None:
                try:
                    self._file = self.path.open("rb", buffering=0)
                except FileNotFoundError:
                    return
                self.parser = _continued(self.parser)
            while data := self._file.read(CHUNK_BYTES):
                if entries := self.parser.feed(data):
                    yield entries
            if not self._rotated():
                return
            # What was written between our last read and the rename is still in the old file.
            if entries := self.parser.feed(self._file.read()):
                yield entries
            self.close()

    def follow(self, running: Callable[[], bool]) -> Iterator[list[Entry]]:
        """Yield entries as they come, until `running` says no and the file has been read to its end after that."""
        while True:
            alive = running()
            yield from self.available()
            if not alive:
                return
            time.sleep(POLL_S)

    def _rotated(self) -> bool:
        import os

        assert self._file is not None
        mine = os.fstat(self._file.fileno())
        if mine.st_size < self._file.tell():
            # A restarted daemon cut off a write that it had not noted as done; it writes those octets again.
            self._file.seek(mine.st_size)
        try:
            current = self.path.stat()
        except FileNotFoundError:
            return False
        return (current.st_dev, current.st_ino) != (mine.st_dev, mine.st_ino)


def _continued(parser: Parser) -> Parser:
    """Return a parser for the next file: a line cut by a rotation does not go on there."""
    fresh = Parser()
    fresh.skipped = parser.skipped
    return fresh


class Printer:
    """Writes entries to stdout and stderr, octet by octet as the container wrote them."""

    def __init__(self, stdout: IO[bytes], stderr: IO[bytes], *, timestamps: bool = False) -> None:
        self._streams = (stdout, stderr)
        self._timestamps = timestamps
        self._at_line_start = [True, True]

    def write(self, entries: Sequence[Entry]) -> None:
        """Write and flush. With `timestamps` every line begins with the time of its first piece."""
        for stderr in (False, True):
            mine = [entry for entry in entries if entry.stderr is stderr]
            if mine and not self._timestamps:
                self._streams[stderr].write(b"".join(entry.octets for entry in mine))
        if self._timestamps:
            for entry in entries:
                if self._at_line_start[entry.stderr]:
                    self._streams[entry.stderr].write(entry.timestamp + b" ")
                self._streams[entry.stderr].write(entry.octets)
                self._at_line_start[entry.stderr] = not entry.partial
        for stream in self._streams:
            stream.flush()


@contextlib.contextmanager
def opened(path: Path) -> Iterator[LogReader]:
    """Give a `LogReader` that is closed at the end."""
    reader = LogReader(path)
    try:
        yield reader
    finally:
        reader.close()
