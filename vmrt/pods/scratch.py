"""The pod's scratch disk: a sparse raw file with an ext4 file system for writable layers and local volumes.

mkfs runs once per size; each pod gets a sparse copy of that template (a few hundred KiB of metadata). The file system
has no journal: a pod's VM never boots twice, so there is nothing to replay; fsync reaches the host's file all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import pwd
import secrets
from pathlib import Path

from vmrt import spawn
from vmrt.agent.layout import SCRATCH_SERIAL
from vmrt.errors import ExhaustedError, ProcessError, VmrtError
from vmrt.pods.cancellation import uncancelled

SERIAL = SCRATCH_SERIAL
# A file system with less than this left is full.
_FULL_BYTES = 1024 * 1024
_JOURNAL_MIB = 4


def path(root: Path, vm_id: str) -> Path:
    """Return where a VM's scratch disk is: derived from ids alone, so that an undo can find it."""
    return root / "scratch" / f"{vm_id}.img"


async def make(root: Path, vm_id: str, size_bytes: int, owner: str) -> Path:
    """Create a VM's scratch disk, owned by the user QEMU runs as. Raises `ExhaustedError` when the disk is full."""
    template = await template_of(root, size_bytes)
    target = path(root, vm_id)
    try:
        # A thread cannot be cancelled: an undo must not run before it has ended.
        await uncancelled(asyncio.to_thread(copy_sparse, template, target, owner))
    except OSError as e:
        kind = ExhaustedError if e.errno in (errno.ENOSPC, errno.EDQUOT) else VmrtError
        raise kind(f"cannot create the scratch disk: {e.strerror}", phase="scratch disk", resource=str(target)) from e
    return target


async def template_of(root: Path, size_bytes: int, *, journal: bool = False) -> Path:
    """Return a file with an empty ext4 file system of this size, made by the first who asks."""
    template = root / "scratch" / f"template-{size_bytes}{'-journal' if journal else ''}.ext4"
    if not template.exists():
        await _make_template(template, size_bytes, journal=journal)
    return template


def remove(root: Path, vm_id: str) -> None:
    """Delete a VM's scratch disk; an absent one is no error."""
    path(root, vm_id).unlink(missing_ok=True)


def remove_parts(root: Path) -> None:
    """Delete templates that a killed daemon left unfinished; for use before the first pod is started."""
    for part in (root / "scratch").glob("*.part"):
        part.unlink(missing_ok=True)


def vm_ids(root: Path) -> list[str]:
    """Return the VMs that have a scratch disk on disk."""
    return [file.stem for file in (root / "scratch").glob("*.img")]


async def _make_template(template: Path, size_bytes: int, *, journal: bool) -> None:
    template.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: several pods may be the first ones.
    part = template.with_name(f"{template.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("wb") as file:
            file.truncate(size_bytes)
        options = "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0"
        features = f"{'' if journal else '^'}has_journal,^resize_inode,^metadata_csum"
        argv: list[str | Path] = ["mkfs.ext4", "-q", "-F", "-m", "0", "-O", features, "-E", options]
        argv += ["-J", f"size={_JOURNAL_MIB}", part] if journal else [part]
        try:
            await spawn.run(argv, phase="scratch disk", resource=str(template))
        except ProcessError as e:
            # mkfs says it in words only; its file still takes the room, so the file system itself can tell.
            left = os.statvfs(part)
            if left.f_bavail * left.f_frsize < _FULL_BYTES:
                raise ExhaustedError(
                    "no space left on device for the scratch disk's template",
                    phase="scratch disk",
                    resource=str(template),
                ) from e
            raise
        part.replace(template)
    finally:
        part.unlink(missing_ok=True)


def copy_sparse(source: Path, target: Path, owner: str) -> None:
    """Copy a file's data and leave its holes; the copy is `owner`'s alone. Raises `OSError`, nothing left."""
    fd_in = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fd_out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(fd_in).st_size
            os.ftruncate(fd_out, size)
            for start, end in _data_ranges(fd_in, size):
                at = start
                while at < end:
                    at += os.sendfile(fd_out, fd_in, at, end - at) if os.lseek(fd_out, at, os.SEEK_SET) >= 0 else 0
            with contextlib.suppress(KeyError):
                user = pwd.getpwnam(owner)
                os.fchown(fd_out, user.pw_uid, user.pw_gid)
        except BaseException:
            target.unlink()
            raise
        finally:
            os.close(fd_out)
    finally:
        os.close(fd_in)


def _data_ranges(fd: int, size: int) -> list[tuple[int, int]]:
    ranges = []
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as e:
            if e.errno == errno.ENXIO:
                break
            raise
        at = os.lseek(fd, start, os.SEEK_HOLE)
        ranges.append((start, at))
    return ranges
