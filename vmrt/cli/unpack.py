"""Unpacks what a container's tar sends below one directory of this machine.

The container may be hostile, and the user may be root. Nothing is written outside the place that was asked for: names
are taken apart here, every directory on the way is opened from the one above without following links, files are always
made new, and links are made but never used. Owners, setuid and sticky bits stay behind; so do device nodes and FIFOs.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from vmrt.errors import VmrtError
from vmrt.images.tar import Entry, Kind, TarError, TarReader

_READ = 65536
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_TOLD = 20


class UnpackError(VmrtError):
    """An entry that cannot be unpacked here."""


def chunks(fd: int) -> Iterator[bytes]:
    """Yield what a descriptor gives."""
    while data := os.read(fd, _READ):
        yield data


class Unpacker:
    """Writes the entries of one archive below `directory`.

    `asked` is the first name of every entry, and is replaced by `name`; with `asked` "" entries keep their own names.
    """

    def __init__(self, directory: Path, asked: str, name: str, told: Callable[[str], object]) -> None:
        self._asked = os.fsencode(asked)
        self._name = os.fsencode(name)
        self._told = told
        self._left_out = 0
        self._root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        # The directory that was used last, by its names: entries of one directory mostly follow each other.
        self._last: tuple[Sequence[bytes], int] = ((), -1)

    def close(self) -> None:
        """Close what is open."""
        self._forget()
        os.close(self._root)

    def run(self, pieces: Iterator[bytes]) -> int:
        """Unpack an archive; return how many entries there were. Raises `UnpackError`; what is there by then stays."""
        count = 0
        try:
            reader = TarReader(pieces)
            for entry in reader:
                count += 1
                self._entry(entry, reader)
        except TarError as e:
            raise UnpackError(f"what came from the container is no archive that can be unpacked: {e}") from e
        if self._left_out > _TOLD:
            self._told(f"{self._left_out - _TOLD} more have been left out")
        return count

    def _entry(self, entry: Entry, reader: TarReader) -> None:
        names = self._names(entry.name)
        if not names:
            return  # the directory itself, which is there
        try:
            if entry.kind is Kind.DIRECTORY:
                self._directory(names, entry.mode)
                return
            parent, last = self._directory(names[:-1]), names[-1]
            if entry.kind is Kind.FILE:
                self._file(parent, last, entry, reader)
            elif entry.kind is Kind.SYMLINK:
                _make_room(parent, last)
                os.symlink(entry.linkname, last, dir_fd=parent)
            elif entry.kind is Kind.LINK:
                self._link(parent, last, self._names(entry.linkname))
            else:
                self._left_out += 1
                if self._left_out <= _TOLD:
                    self._told(f"{os.fsdecode(entry.name)} is left out: a {entry.kind.name.lower()} device or FIFO")
        except OSError as e:
            raise UnpackError(f"cannot write {os.fsdecode(b'/'.join(names))}: {e.strerror or e}") from e

    def _names(self, path: bytes) -> list[bytes]:
        """Return the parts of an entry's name. Raises `UnpackError` for one that leads elsewhere."""
        names = [name for name in path.split(b"/") if name not in (b"", b".")]
        if path.startswith(b"/") or b".." in names or b"\0" in path:
            raise UnpackError(f"the archive holds {os.fsdecode(path)!r}, which leads out of the destination")
        if self._asked:
            if not names or names[0] != self._asked:
                raise UnpackError(f"the archive holds {os.fsdecode(path)!r}, which was not asked for")
            names[0] = self._name
        return names

    def _directory(self, names: Sequence[bytes], mode: int = 0o755) -> int:
        """Return a directory's descriptor, making what is not there; it is good until the next call."""
        if not names:
            return self._root
        if self._last[0] == names:
            return self._last[1]
        at = os.dup(self._root)
        try:
            for index, name in enumerate(names):
                below = self._step(at, name, mode if index == len(names) - 1 else 0o755)
                os.close(at)
                at = below
        except BaseException:
            os.close(at)
            raise
        self._forget()
        self._last = (list(names), at)
        return at

    def _step(self, at: int, name: bytes, mode: int) -> int:
        """Open a directory of the directory `at`, after making it where it is not there."""
        made = False
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=at)
            made = True
        try:
            below = os.open(name, _DIRECTORY, dir_fd=at)
        except NotADirectoryError as e:
            raise UnpackError(f"{os.fsdecode(name)} is no directory on this side (links are not followed)") from e
        if made:
            # What is in it has to be written yet, so its owner keeps that right.
            os.fchmod(below, mode & 0o777 | 0o700)
        return below

    def _forget(self) -> None:
        if self._last[1] >= 0:
            os.close(self._last[1])
        self._last = ((), -1)

    def _file(self, parent: int, name: bytes, entry: Entry, reader: TarReader) -> None:
        _make_room(parent, name)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name, flags, 0o600, dir_fd=parent)
        try:
            if entry.extents is None:
                for view in reader.data():
                    _write_all(fd, view)
            else:
                _write_sparse(fd, entry, reader)
            os.fchmod(fd, entry.mode & 0o777)
            with contextlib.suppress(OverflowError, OSError):
                os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
        finally:
            os.close(fd)

    def _link(self, parent: int, name: bytes, target: Sequence[bytes]) -> None:
        if not target:
            raise UnpackError("a hard link to a directory")
        held = os.dup(parent)  # finding the target's directory may close it
        try:
            source = self._directory(target[:-1])
            if not stat.S_ISREG(os.lstat(target[-1], dir_fd=source).st_mode):
                raise UnpackError(f"a hard link to {os.fsdecode(target[-1])}, which is no file")
            _make_room(held, name)
            os.link(target[-1], name, src_dir_fd=source, dst_dir_fd=held, follow_symlinks=False)
        finally:
            os.close(held)


def _make_room(parent: int, name: bytes) -> None:
    """Remove a file or link that is to be replaced: writing into it could reach what it is linked to."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=parent)


def _write_sparse(fd: int, entry: Entry, reader: TarReader) -> None:
    extents = iter(entry.extents or ())
    offset, room = next(extents, (0, 0))
    for view in reader.data():
        while view:
            if not room:
                offset, room = next(extents, (0, 0))
            written = os.pwrite(fd, view[: max(room, 1)], offset)
            view, offset, room = view[written:], offset + written, room - written
    os.ftruncate(fd, entry.size)


def _write_all(fd: int, view: memoryview) -> None:
    while view:
        view = view[os.write(fd, view) :]
