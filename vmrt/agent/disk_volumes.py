"""Volumes on disks of the host: their file systems mounted in the guest, and the group that an fsGroup gives them."""

from __future__ import annotations

import contextlib
import os
import stat

from vmrt.agent import disks, kernel, status

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmrt.agent import agent_pb2 as pb

# mount(8)'s options that are flags to mount(2); the others go to the file system.
_FLAGS = {
    "ro": kernel.MS_RDONLY,
    "rw": 0,
    "nosuid": kernel.MS_NOSUID,
    "nodev": kernel.MS_NODEV,
    "noexec": kernel.MS_NOEXEC,
    "sync": 0x10,
    "dirsync": 0x80,
    "noatime": 0x400,
    "nodiratime": 0x800,
    "relatime": 1 << 21,
    "strictatime": 1 << 24,
    "defaults": 0,
}
_FILE_SYSTEMS = frozenset(("ext2", "ext3", "ext4", "xfs", "btrfs", "erofs", "squashfs"))


def mount(path: str, disk: pb.DiskVolume, deadline: float) -> None:
    """Mount a disk's file system at `path` and give it its group. Raises `AgentError`, `OSError`, all undone."""
    if disk.fstype not in _FILE_SYSTEMS:
        raise status.AgentError(status.INVALID_ARGUMENT, f"file system {disk.fstype[:64]!r}: vmrt mounts {_names()}")
    disks.check_serial(disk.serial)
    device = disks.wait_for(disk.serial, deadline)
    flags = kernel.MS_NODEV | (kernel.MS_RDONLY if disk.readonly else 0)
    data = []
    for option in disk.options:
        if option in _FLAGS:
            flags |= _FLAGS[option]
        else:
            data.append(option)
    try:
        kernel.mount(device, path, disk.fstype, flags, ",".join(data))
    except OSError as e:
        raise status.from_os_error(e, f"mount {disk.fstype} of disk {disk.serial}") from e
    try:
        if disk.HasField("fs_group") and not flags & kernel.MS_RDONLY:
            own(path, disk.fs_group, on_root_mismatch=disk.on_root_mismatch)
    except BaseException:
        kernel.umount(path)
        raise


def own(path: str, group: int, *, on_root_mismatch: bool) -> None:
    """Give all of a volume to a group, as kubelet does (k8s.io/kubernetes, pkg/volume/volume_linux.go).

    Files become readable and writable for it, directories hand it on. Links are not followed.
    """
    info = os.stat(path)  # noqa: PTH116
    if on_root_mismatch and info.st_gid == group and info.st_mode & (stat.S_ISGID | 0o070) == stat.S_ISGID | 0o070:
        return
    for _, directories, files, fd in os.fwalk(path, topdown=False, follow_symlinks=False):
        for name in (*files, *directories):
            _own_one(name, fd, group)
    _own_one(path, None, group)


def make_empty_dir(path: str, owner: pb.FileOwner) -> None:
    """Make a new file system look like an empty directory of the host."""
    with contextlib.suppress(OSError):
        os.rmdir(f"{path}/lost+found")  # noqa: PTH106
    os.chown(path, owner.uid, owner.gid)
    os.chmod(path, owner.mode & 0o7777)  # noqa: PTH101


def _own_one(name: str, directory: int | None, group: int) -> None:
    info = os.stat(name, dir_fd=directory, follow_symlinks=False)
    os.chown(name, -1, group, dir_fd=directory, follow_symlinks=False)
    if stat.S_ISLNK(info.st_mode):
        return
    mode = stat.S_IMODE(info.st_mode) | 0o660
    if stat.S_ISDIR(info.st_mode):
        mode |= stat.S_ISGID | 0o110
    os.chmod(name, mode, dir_fd=directory)


def _names() -> str:
    return " ".join(sorted(_FILE_SYSTEMS))
