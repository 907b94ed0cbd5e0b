"""Tar streams, read from chunks of bytes: ustar, GNU (long names, base-256 numbers, sparse) and PAX (POSIX pax(1)).

Sans-io: give `TarReader` an iterator of chunks, get entries; an entry's data comes as views into those chunks, without
copies. Names stay bytes. Everything in a stream is hostile until checked: header checksums are verified, the sizes of
extended headers and of sparse maps are bounded, and anything that does not parse raises `TarError`. What a path may
mean is decided by the reader's user, not here.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field

BLOCK = 512
EXTENDED_LIMIT_BYTES = 1024 * 1024
SPARSE_LIMIT = 1 << 18
# No file can be longer on Linux (loff_t).
SIZE_LIMIT = (1 << 63) - 1
NANOSECONDS = 1_000_000_000


class TarError(ValueError):
    """The stream is no tar archive, is cut short, or holds something that cannot be."""


class Kind(enum.Enum):
    """What an entry is, by its type flag."""

    FILE = b"0"
    LINK = b"1"
    SYMLINK = b"2"
    CHAR = b"3"
    BLOCK = b"4"
    DIRECTORY = b"5"
    FIFO = b"6"


_KINDS = {kind.value: kind for kind in Kind} | {b"\0": Kind.FILE, b"7": Kind.FILE, b"S": Kind.FILE}


@dataclass(slots=True)
class Entry:
    """One member. `mtime_ns` is nanoseconds since the epoch; `size` the file's, holes included.

    `extents` are the (offset, length) pieces of a sparse file that the stream holds, None for an ordinary file.
    """

    name: bytes
    kind: Kind
    mode: int = 0
    uid: int = 0
    gid: int = 0
    size: int = 0
    mtime_ns: int = 0
    linkname: bytes = b""
    major: int = 0
    minor: int = 0
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    extents: list[tuple[int, int]] | None = None


class TarReader:
    """Iterate over a tar stream: ``for entry in reader: for view in reader.data(): ...``.

    Data that was not read is skipped by going on. After the last entry the rest of the chunks is drained, because a
    layer's digest covers it.
    """

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._chunk = memoryview(b"")
        self._at = 0
        self._remaining = 0  # of the current entry's data in the stream
        self._padding = 0
        self.position = 0  # bytes taken from the stream so far

    def __iter__(self) -> Iterator[Entry]:
        try:
            while (entry := self._entry()) is not None:
                yield entry
                for _ in self.data():
                    pass
        finally:
            self._chunk = memoryview(b"")
        for _ in self._chunks:
            pass

    def data(self) -> Iterator[memoryview]:
        """Yield what is left of the current entry's data."""
        while self._remaining:
            view = self._take(self._remaining)
            self._remaining -= len(view)
            yield view
        if self._padding:
            self._exactly(self._padding)
            self._padding = 0

    # --- bytes -------------------------------------------------------------------------------------------------------

    def _take(self, limit: int) -> memoryview:
        """Return between 1 and `limit` bytes."""
        while self._at == len(self._chunk):
            chunk = next(self._chunks, None)
            if chunk is None:
                raise TarError(f"the archive is cut short after {self.position} bytes")
            self._chunk, self._at = memoryview(chunk), 0
        view = self._chunk[self._at : self._at + limit]
        self._at += len(view)
        self.position += len(view)
        return view

    def _exactly(self, size: int) -> bytes:
        view = self._take(size)
        if len(view) == size:
            return bytes(view)
        out = bytearray(view)
        while len(out) < size:
            out += self._take(size - len(out))
        return bytes(out)

    def _block(self) -> bytes | None:
        """Return the next header block; None at the end of the stream."""
        while self._at == len(self._chunk):
            chunk = next(self._chunks, None)
            if chunk is None:
                return None
            self._chunk, self._at = memoryview(chunk), 0
        return self._exactly(BLOCK)

    # --- headers -----------------------------------------------------------------------------------------------------

    def _entry(self) -> Entry | None:
        long_name = long_link = b""
        pax: dict[bytes, bytes] = {}
        while True:
            header = self._block()
            if header is None:
                if long_name or long_link or pax:
                    raise TarError("the archive ends after an extended header")
                return None
            if header == _ZERO:
                # Two zero blocks end an archive; some writers leave the second one out.
                second = self._block()
                if second is not None and second != _ZERO:
                    raise TarError("a lone zero block in the middle of the archive")
                return None
            if _checksum(header) != _octal(header[148:156]):
                raise TarError(f"bad header checksum at byte {self.position - BLOCK}")
            flag = header[156:157]
            if flag in b"LKxXg":
                size = _number(header[124:136])
                if not 0 <= size <= EXTENDED_LIMIT_BYTES:
                    raise TarError(f"an extended header of {size} bytes")
                body = self._exactly(size)
                if size % BLOCK:
                    self._exactly(-size % BLOCK)
                if flag == b"L":
                    long_name = body.split(b"\0", 1)[0]
                elif flag == b"K":
                    long_link = body.split(b"\0", 1)[0]
                elif flag != b"g":  # global attributes name no entry; containerd ignores them too
                    pax = _pax(body)
                continue
            return self._member(header, flag, long_name, long_link, pax)

    def _member(self, header: bytes, flag: bytes, long_name: bytes, long_link: bytes, pax: dict[bytes, bytes]) -> Entry:
        kind = _KINDS.get(flag)
        name = header[:100].split(b"\0", 1)[0]
        if header[257:263] == b"ustar\0" and header[345]:
            name = header[345:500].split(b"\0", 1)[0] + b"/" + name
        name = long_name or name
        if kind is None:
            raise TarError(f"{name!r} has the unsupported type {flag!r}")
        entry = Entry(
            name,
            kind,
            mode=_number(header[100:108]) & 0o7777,
            uid=_number(header[108:116]),
            gid=_number(header[116:124]),
            size=_number(header[124:136]),
            mtime_ns=_number(header[136:148]) * NANOSECONDS,
            linkname=long_link or header[157:257].split(b"\0", 1)[0],
        )
        if kind is Kind.CHAR or kind is Kind.BLOCK:
            entry.major, entry.minor = _number(header[329:337]), _number(header[337:345])
        if pax:
            _apply(entry, pax)
        # A regular entry whose name ends in a slash is how tar before POSIX wrote a directory.
        if kind is Kind.FILE and entry.name.endswith(b"/"):
            entry.kind = kind = Kind.DIRECTORY
        if not 0 <= entry.size <= SIZE_LIMIT:
            raise TarError(f"{entry.name!r} has the impossible size {entry.size}")
        stored = entry.size if kind is Kind.FILE else 0
        self._remaining, self._padding = stored, -stored % BLOCK
        if kind is not Kind.FILE:
            entry.size = 0
        elif flag == b"S":
            self._old_sparse(entry, header)
        elif b"GNU.sparse.major" in pax or b"GNU.sparse.map" in pax:
            self._pax_sparse(entry, pax)
        return entry

    # --- sparse files (GNU tar manual, "Storing Sparse Files") --------------------------------------------------------

    def _old_sparse(self, entry: Entry, header: bytes) -> None:
        stored = entry.size
        pieces = _sparse_slots(header[386:482])
        more = header[482]
        while more:
            block = self._exactly(BLOCK)
            pieces += _sparse_slots(block[:504])
            more = block[504]
            if len(pieces) > SPARSE_LIMIT:
                raise TarError(f"{entry.name!r} has too many sparse pieces")
        entry.size = _number(header[483:495])
        _set_extents(entry, pieces, stored)

    def _pax_sparse(self, entry: Entry, pax: dict[bytes, bytes]) -> None:
        stored = entry.size
        size = pax.get(b"GNU.sparse.realsize", pax.get(b"GNU.sparse.size"))
        if size is None:
            raise TarError(f"{entry.name!r} is sparse and has no real size")
        entry.size = _decimal(size)
        if b"GNU.sparse.map" in pax:  # formats 0.0 and 0.1
            numbers = [_decimal(text) for text in pax[b"GNU.sparse.map"].split(b",") if text]
        else:  # format 1.0: the map stands before the data, in lines, padded to a block
            numbers = []
            count, buffer, used = -1, b"", 0
            while count < 0 or len(numbers) < 2 * count:
                while b"\n" not in buffer:
                    if used + BLOCK > stored or len(buffer) > BLOCK:
                        raise TarError(f"{entry.name!r} has a broken sparse map")
                    buffer += self._exactly(BLOCK)
                    used += BLOCK
                line, _, buffer = buffer.partition(b"\n")
                if count < 0:
                    count = _decimal(line)
                    if count > SPARSE_LIMIT:
                        raise TarError(f"{entry.name!r} has too many sparse pieces")
                else:
                    numbers.append(_decimal(line))
            stored -= used
            self._remaining = stored
        if len(numbers) % 2:
            raise TarError(f"{entry.name!r} has a broken sparse map")
        _set_extents(entry, list(zip(numbers[::2], numbers[1::2], strict=True)), stored)


_ZERO = bytes(BLOCK)


def _checksum(header: bytes) -> int:
    # The checksum field itself counts as eight spaces.
    return sum(header) - sum(header[148:156]) + 256


def _octal(field: bytes) -> int:
    text = field.strip(b" \0").split(b"\0", 1)[0]
    if not text:
        return 0
    if text.isdigit() and b"8" not in text and b"9" not in text:
        return int(text, 8)
    raise TarError(f"bad number {field!r} in a header")


def _number(field: bytes) -> int:
    """Read octal digits or, with the top bit set, a base-256 two's complement number (GNU)."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
        return value - (1 << (8 * len(field) - 1)) if field[0] & 0x40 else value
    return _octal(field)


def _decimal(text: bytes) -> int:
    if not text.isdigit() or len(text) > 20:
        raise TarError(f"bad number {text[:40]!r} in an extended header")
    return int(text)


def _time_ns(text: bytes) -> int:
    sign = -1 if text.startswith(b"-") else 1
    seconds, _, fraction = text.lstrip(b"-").partition(b".")
    if fraction and not fraction.isdigit():
        raise TarError(f"bad time {text[:40]!r} in an extended header")
    return sign * (_decimal(seconds) * NANOSECONDS + int((fraction[:9] or b"0").ljust(9, b"0")))


def _pax(body: bytes) -> dict[bytes, bytes]:
    """Parse "length key=value newline" records; the sparse map of format 0.0 is gathered into format 0.1's."""
    records: dict[bytes, bytes] = {}
    pieces: list[bytes] = []
    at = 0
    while at < len(body) and body[at]:
        space = body.find(b" ", at, at + 8)
        if space < 0:
            raise TarError("broken extended header")
        length = _decimal(body[at:space])
        end = at + length
        if length < space - at + 4 or end > len(body) or body[end - 1] != 0x0A:
            raise TarError("broken extended header")
        key, equals, value = body[space + 1 : end - 1].partition(b"=")
        if not equals or not key:
            raise TarError("broken extended header")
        if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
            pieces.append(value)
        records[key] = value
        at = end
    if pieces and b"GNU.sparse.map" not in records:
        records[b"GNU.sparse.map"] = b",".join(pieces)
    return records


def _apply(entry: Entry, pax: dict[bytes, bytes]) -> None:
    """Let PAX records override the header; an empty value takes an override back."""
    for key, value in pax.items():
        # Empty values are meaningful for extended attributes only.
        if key.startswith(b"SCHILY.xattr."):
            entry.xattrs[key.removeprefix(b"SCHILY.xattr.")] = value
        elif not value:
            continue
        elif key == b"path":
            entry.name = value
        elif key == b"linkpath":
            entry.linkname = value
        elif key == b"size":
            entry.size = _decimal(value)
        elif key == b"uid":
            entry.uid = _decimal(value)
        elif key == b"gid":
            entry.gid = _decimal(value)
        elif key == b"mtime":
            entry.mtime_ns = _time_ns(value)
    if b"GNU.sparse.name" in pax:
        entry.name = pax[b"GNU.sparse.name"]


def _sparse_slots(area: bytes) -> list[tuple[int, int]]:
    slots = []
    for at in range(0, len(area) - 23, 24):
        if not area[at]:
            break
        slots.append((_number(area[at : at + 12]), _number(area[at + 12 : at + 24])))
    return slots


def _set_extents(entry: Entry, pieces: list[tuple[int, int]], stored: int) -> None:
    """Check that the pieces ascend, lie inside the file and add up to what the stream holds."""
    end = total = 0
    for offset, length in pieces:
        if offset < end or length < 0 or offset + length > entry.size:
            raise TarError(f"{entry.name!r} has a broken sparse map")
        end = offset + length
        total += length
    if total != stored or not 0 <= entry.size <= SIZE_LIMIT:
        raise TarError(f"{entry.name!r} has a sparse map that does not fit its data")
    entry.extents = [(offset, length) for offset, length in pieces if length]
