"""Volumes that kubelet's atomic writer fills: ConfigMaps, Secrets, projected and downward API volumes.

    ..2026_01_01_00_00_00.123/   one version, with all files
    ..data                       a symbolic link to it: renaming another over it is the update
    key, dir                     symbolic links to ..data/key, ..data/dir

Source: k8s.io/kubernetes, pkg/volume/util/atomic_writer.go. A version never changes once ..data leads to it. Reading
takes no path twice: names are opened in the directories that hold them, and no link but ..data is followed.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from vmrt.agent import agent_pb2 as pb
from vmrt.errors import ExhaustedError

# Well below the agent's bound of a message.
_PART_BYTES = 1024 * 1024
# What an entry costs beside its content.
_ENTRY_BYTES = 256
_CURRENT = "..data"
# A version that goes while it is being read: kubelet has made a newer one.
_ATTEMPTS = 10


@dataclass(frozen=True, slots=True)
class Owner:
    """Permission bits and owner."""

    mode: int
    uid: int
    gid: int

    def message(self) -> pb.FileOwner:
        """Return it as the agent takes it."""
        return pb.FileOwner(mode=self.mode, uid=self.uid, gid=self.gid)


def owner_of(info: os.stat_result) -> Owner:
    """Return permission bits and owner from a stat result."""
    return Owner(stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid)


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a version, or (`data` None) a directory; parents come before what they hold."""

    path: str
    owner: Owner
    data: bytes | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A volume at one moment: the name of its current version, that version's entries, and the visible links."""

    root: Owner
    version: str
    directory: Owner
    entries: tuple[Entry, ...]
    links: tuple[tuple[str, str], ...]
    # Other versions that are still there: kubelet takes the old one away last.
    others: tuple[str, ...] = ()


def read(root: int, limit_bytes: int) -> Snapshot | None:
    """Read the volume whose directory `root` (a descriptor) names; None when no atomic writer has filled it.

    Raises `ExhaustedError` for one larger than `limit_bytes`, `OSError`.
    """
    for attempt in range(_ATTEMPTS):
        try:
            return _read(root, limit_bytes)
        except FileNotFoundError:
            if attempt + 1 == _ATTEMPTS:
                raise
    return None


def _read(root: int, limit_bytes: int) -> Snapshot | None:
    links: dict[str, str] = {}
    versions = set()
    here = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root)
    try:
        for name in os.listdir(here):  # noqa: PTH208
            mode = os.stat(name, dir_fd=here, follow_symlinks=False).st_mode
            if stat.S_ISLNK(mode):
                links[name] = os.readlink(name, dir_fd=here)
            elif stat.S_ISDIR(mode) and name.startswith(".."):
                versions.add(name)
            else:
                return None
        version = links.pop(_CURRENT, "")
        links.pop("..data_tmp", None)
        if not version.startswith("..") or "/" in version or version in ("..", _CURRENT):
            return None
        if any(not target.startswith(f"{_CURRENT}/") for target in links.values()):
            return None
        directory = os.open(version, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
        try:
            entries: list[Entry] = []
            _walk(directory, "", entries, limit_bytes)
            owner = owner_of(os.fstat(directory))
        finally:
            os.close(directory)
        others = tuple(sorted(versions - {version}))
        return Snapshot(owner_of(os.fstat(here)), version, owner, tuple(entries), tuple(sorted(links.items())), others)
    finally:
        os.close(here)


def _walk(directory: int, prefix: str, entries: list[Entry], left: int) -> int:
    """Add what a directory holds to `entries`; return how many octets are left of the bound."""
    for name in sorted(os.listdir(directory)):
        # O_NONBLOCK: a FIFO must not hold us up.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(name, flags, dir_fd=directory)
        try:
            info = os.fstat(fd)
            left -= _ENTRY_BYTES + (info.st_size if stat.S_ISREG(info.st_mode) else 0)
            if left < 0:
                raise ExhaustedError("its files take more than volumes.mirror_limit_bytes", phase="volumes")
            if stat.S_ISDIR(info.st_mode):
                entries.append(Entry(prefix + name, owner_of(info), None))
                left = _walk(fd, f"{prefix}{name}/", entries, left)
            elif stat.S_ISREG(info.st_mode):
                entries.append(Entry(prefix + name, owner_of(info), _content(fd, info.st_size)))
        finally:
            os.close(fd)
    return left


def _content(fd: int, size_bytes: int) -> bytes:
    parts = []
    while size_bytes > 0 and (part := os.read(fd, size_bytes)):
        parts.append(part)
        size_bytes -= len(part)
    return b"".join(parts)


def requests(name: str, snapshot: Snapshot, *, files: bool = True) -> Iterator[pb.PublishFilesRequest]:
    """Yield what makes the guest's volume `name` show a snapshot; without `files`, only its links are new."""
    request = pb.PublishFilesRequest(name=name, version=snapshot.version, begin=True)
    room = _PART_BYTES
    for entry in snapshot.entries if files else ():
        owner = entry.owner.message()
        if entry.data is None:
            request.files.append(pb.VolumeFile(path=entry.path, owner=owner, directory=True))
            room -= _ENTRY_BYTES
            continue
        at = 0
        while True:
            if room <= _ENTRY_BYTES + len(entry.path):
                yield request
                request = pb.PublishFilesRequest(name=name, version=snapshot.version)
                room = _PART_BYTES
            data = entry.data[at : at + room]
            request.files.append(pb.VolumeFile(path=entry.path, owner=owner, data=data))
            at += len(data)
            room -= len(data) + _ENTRY_BYTES + len(entry.path)
            if at >= len(entry.data):
                break
    request.commit = True
    request.directory.CopyFrom(snapshot.directory.message())
    for link, target in snapshot.links:
        request.links[link] = target
    request.keep.extend(snapshot.others)
    yield request
