"""Volumes that live in the guest instead of the share: which they are, and how they are made.

An emptyDir with medium Memory is a tmpfs that kubelet mounts with the volume's size: containers get one of that size in
their own kernel, so that it is counted as their memory. One with medium HugePages is a hugetlbfs, and so it is in the
guest, with pages of the same size. ConfigMaps and their like: `mirrors`. File systems on block
devices: `direct_volumes`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vmrt.agent import agent_pb2 as pb
from vmrt.agent import layout
from vmrt.config import VolumesConfig
from vmrt.errors import UnsupportedError
from vmrt.model import Mount, Propagation
from vmrt.pods import direct_volumes, empty_dir_disks, host_paths, mirrors, mount_tree
from vmrt.pods.atomic_writer import Owner, owner_of
from vmrt.pods.direct_volumes import Direct
from vmrt.pods.empty_dir_disks import EmptyDirDisk


@dataclass(frozen=True, slots=True)
class Memory:
    """An emptyDir with medium Memory or HugePages (then with a page size), or a part of one."""

    name: str
    size_bytes: int
    root: Owner
    sub_path: str = ""
    sub_path_owner: Owner | None = None
    page_size_bytes: int = 0

    def request(self) -> pb.MakeVolumeRequest:
        """Return the call that makes it."""
        request = pb.MakeVolumeRequest(
            name=self.name,
            size_bytes=self.size_bytes,
            root=self.root.message(),
            page_size_bytes=self.page_size_bytes,
        )
        if self.sub_path and self.sub_path_owner is not None:
            request.sub_path = self.sub_path
            request.sub_path_owner.CopyFrom(self.sub_path_owner.message())
        return request


@dataclass(frozen=True, slots=True)
class Mirrored:
    """A ConfigMap, Secret, projected or downward API volume."""

    path: str


def storage(where: Memory | EmptyDirDisk, index: int, *, readonly: bool) -> pb.Storage:
    """Return what has the agent bind a sub-path: the agent follows no link that a container made in the volume."""
    return pb.Storage(name=f"volume{index}", volume_path=f"{where.name}/{where.sub_path}", readonly=readonly)


def source(name: str) -> str:
    """Return where a volume is in the guest."""
    return f"{layout.VOLUMES}/{name}"


def storage_source(container_id: str, storage: pb.Storage) -> str:
    """Return where the agent mounts a container's storage."""
    return f"{layout.CONTAINERS}/{container_id}/storage/{storage.name}"


Place = Memory | Mirrored | Direct | EmptyDirDisk | None


def plan(mounts: Sequence[Mount], config: VolumesConfig) -> tuple[Place, ...]:
    """Say of each mount whether its volume is one of the guest's; None is the share's, also to be refused there."""
    return tuple(_plan_one(index, mount, config) for index, mount in enumerate(mounts))


def _plan_one(index: int, mount: Mount, config: VolumesConfig) -> Place:
    if mount.image or mount.propagation is Propagation.BIDIRECTIONAL:
        return None
    if direct := direct_volumes.find(config.direct_dir, mount.host_path, f"config.mounts[{index}]"):
        if mount.uids:
            raise UnsupportedError(
                f"config.mounts[{index}].uidMappings: a direct-assigned volume takes none", phase="volumes"
            )
        return direct
    if mount.uids:
        # The host maps the ids, on the share.
        return None
    volume = host_paths.pod_volume(mount.host_path)
    if volume is not None and volume.plugin in mirrors.PLUGINS:
        mirrored = mount.readonly and not volume.rest and config.files == "mirror"
        return Mirrored(mount.host_path) if mirrored else None
    if not mount.host_path.startswith("/proc/") and "/pods/" not in mount.host_path:
        return None
    try:
        fd = host_paths.open_path(mount.host_path)
    except OSError:
        return None
    try:
        return _empty_dir(fd, mount.host_path, f"config.mounts[{index}]", config)
    except OSError:
        return None
    finally:
        os.close(fd)


def _empty_dir(fd: int, path: str, field: str, config: VolumesConfig) -> Memory | EmptyDirDisk | None:
    own = mount_tree.entry_of(fd)
    if own is None:
        return None
    if own.fstype in ("tmpfs", "hugetlbfs") and (memory := _memory(fd, own, config)):
        return memory
    return empty_dir_disks.find(fd, path, own, field) if config.empty_dir == "disk" else None


def _memory(fd: int, own: mount_tree.Entry, config: VolumesConfig) -> Memory | None:
    """Return the emptyDir whose tmpfs or hugetlbfs an open file lies on, with the way from its root.

    kubelet sends a sub-path as a bind mount or a descriptor: what they have in common with the emptyDir is the device.
    """
    places = [
        entry.place
        for entry in mount_tree.mounts()
        if entry.device == own.device and entry.root == "/" and _is_whole_empty_dir(entry.place)
    ]
    if not places:
        return None
    huge = own.fstype == "hugetlbfs"
    info = os.fstat(fd)
    on_share = config.memory_empty_dir == "share" and not huge
    if on_share or not (stat.S_ISDIR(info.st_mode) or stat.S_ISREG(info.st_mode)):
        return None
    place = min(places)
    size = os.statvfs(fd)
    path = Path(f"/proc/self/fd/{fd}").readlink()
    way = Path(own.root) / path.relative_to(own.place)
    sub_path = str(way).strip("/")
    root = owner_of(Path(place).stat()) if sub_path else owner_of(info)
    return Memory(
        name=mirrors.name_of(place),
        size_bytes=0 if huge else size.f_blocks * size.f_frsize,
        root=root,
        sub_path=sub_path,
        sub_path_owner=owner_of(info) if sub_path else None,
        page_size_bytes=size.f_bsize if huge else 0,  # a hugetlbfs's block is its page
    )


def _is_whole_empty_dir(place: str) -> bool:
    volume = host_paths.pod_volume(place)
    return volume is not None and not volume.rest and host_paths.is_empty_dir(place)
