"""emptyDirs as disks: an ext4 file system in a sparse file inside kubelet's directory, mounted in the guest.

As fast as the VM's own disk, and kubelet still counts it: its blocks are the directory's, and what is deleted is given
back. It has a journal, since it outlives its VM: when a pod gets another sandbox its emptyDirs stay.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vmrt.agent import agent_pb2 as pb
from vmrt.config import Config
from vmrt.errors import ExhaustedError, VmrtError
from vmrt.pods import host_paths, loop_device, mount_tree, scratch
from vmrt.pods.atomic_writer import Owner, owner_of
from vmrt.pods.block_device import BlockDevice
from vmrt.pods.cancellation import uncancelled

_PHASE = "emptyDir"
_IMAGE = ".vmrt-disk"
_FSTYPE = "ext4"


@dataclass(frozen=True, slots=True)
class EmptyDirDisk:
    """An emptyDir, or a part of one, on a disk of its own; `root` is whose the directory on the host is."""

    device: BlockDevice
    root: Owner
    sub_path: str = ""
    sub_path_owner: Owner | None = None

    @property
    def name(self) -> str:
        """The guest's name of the volume."""
        return self.device.volume_name

    def request(self) -> pb.MakeVolumeRequest:
        """Return the call that has the agent mount it."""
        disk = pb.DiskVolume(serial=self.device.serial, fstype=_FSTYPE, options=["discard", "noatime"])
        request = pb.MakeVolumeRequest(name=self.name, root=self.root.message(), disk=disk)
        if self.sub_path and self.sub_path_owner is not None:
            request.sub_path = self.sub_path
            request.sub_path_owner.CopyFrom(self.sub_path_owner.message())
        return request


def find(fd: int, path: str, own: mount_tree.Entry, field: str) -> EmptyDirDisk | None:
    """Return the emptyDir that an open file of the host lies in; None for what is in none.

    A sub-path comes as a bind mount: the root of that in its file system tells the same as a path.
    """
    here = str(Path(f"/proc/self/fd/{fd}").readlink())
    way = Path(own.root) / Path(here).relative_to(own.place)
    for candidate in (path, here, str(way)):
        volume = host_paths.pod_volume(candidate)
        if volume is not None and host_paths.is_empty_dir(candidate):
            break
    else:
        return None
    info = os.fstat(fd)
    # The file system's own name of the directory need not be a path here: the emptyDir is where it is by its inode.
    directory = _directory(volume.directory, own)
    if directory is None:
        return None
    device = BlockDevice(field, str(directory / _IMAGE), (0, 0), readonly=False, image=True)
    if not volume.rest:
        return EmptyDirDisk(device, owner_of(info))
    return EmptyDirDisk(device, owner_of(directory.stat()), volume.rest, owner_of(info))


def _directory(name: str, own: mount_tree.Entry) -> Path | None:
    """Return where in this namespace an emptyDir is of which only the name in its file system may be known."""
    candidates = [Path(name)]
    for entry in mount_tree.mounts():
        if entry.device == own.device and (name == entry.root or name.startswith(entry.root.rstrip("/") + "/")):
            candidates.append(Path(entry.place) / Path(name).relative_to(entry.root))
    return next((candidate for candidate in candidates if candidate.is_dir()), None)


async def make(config: Config, device: BlockDevice) -> Path:
    """Return the file of an emptyDir's disk, made unless it is there. Raises `ExhaustedError`, `VmrtError`."""
    image = Path(device.path)
    template = await scratch.template_of(config.root, config.volumes.empty_dir_bytes, journal=True)
    try:
        await uncancelled(asyncio.to_thread(_make, template, image))
    except OSError as e:
        kind = ExhaustedError if e.errno in (errno.ENOSPC, errno.EDQUOT) else VmrtError
        raise kind(f"cannot make its disk: {e.strerror}", phase=_PHASE, resource=str(image)) from e
    return image


def _make(template: Path, image: Path) -> None:
    if os.path.lexists(image):
        return
    part = image.with_suffix(".part")
    scratch.copy_sparse(template, part, "root")
    part.replace(image)


@contextlib.contextmanager
def as_block_device(image: Path) -> Iterator[Path]:
    """Give a block device for QEMU to open; it goes when QEMU closes it. Raises `VmrtError`."""
    with contextlib.ExitStack() as stack:
        try:
            yield stack.enter_context(loop_device.opened(image))
        except OSError as e:
            raise VmrtError(f"no loop device: {e.strerror}", phase=_PHASE, resource=str(image)) from e
