"""The pod's volumes as the guest has them.

A volume of the share is mounted by the kernel itself when somebody first walks into it (fuse's submounts), as a new
file system for each mount namespace where that happens. So it happens here, before crun makes the container's
namespace: all containers bind one file system, where they meet in one inode. It goes with the last of them, so that the
host may unmount what is behind it.

A volume in the guest's memory is a tmpfs that lives as long as the VM: an emptyDir with medium Memory (with HugePages
it is a hugetlbfs), or the copy of a ConfigMap, Secret or projected volume, whose changes raise inotify events because
they are made in this kernel. A volume on a disk is that disk's file system, until the host asks for the disk back.
"""

from __future__ import annotations

import contextlib
import os
import threading

from vmrt.agent import console, kernel, layout, rootfs, status, users

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmrt.agent import agent_pb2 as pb

# Pods have a few tens.
MAX_VOLUMES = 1024
_HUGE_PAGES = "/sys/kernel/mm/hugepages"
_CURRENT, _NEXT = "..data", "..data_tmp"


class Volumes:
    """The volumes of this guest."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users: dict[str, int] = {}
        self._disks: set[str] = set()

    # --- of the share -------------------------------------------------------------------------------------------------

    def hold(self, oci_spec: dict[str, Any]) -> frozenset[str]:
        """Count a user of each volume of the share that a container mounts; return them. Undo with `release`."""
        prefix = layout.SHARE + "/"
        sources = [str(mount.get("source", "")) for mount in oci_spec.get("mounts", [])]
        names = frozenset(s.removeprefix(prefix).partition("/")[0] for s in sources if s.startswith(prefix))
        with self._lock:
            for name in names:
                self._users[name] = self._users.get(name, 0) + 1
                if self._users[name] == 1:
                    _walk_into(f"{layout.SHARE}/{name}")
        return names

    def release(self, names: frozenset[str]) -> None:
        """Count a user less of each; a volume without users is unmounted."""
        with self._lock:
            for name in names:
                self._users[name] -= 1
                if not self._users[name]:
                    del self._users[name]
                    # Under the lock: a container that comes now must not bind what is about to go.
                    rootfs.unmount_tree(f"{layout.SHARE}/{name}")
        if names:
            rootfs.forget_unused_files()

    # --- of the guest -------------------------------------------------------------------------------------------------

    def make(self, request: pb.MakeVolumeRequest, deadline: float) -> None:
        """Mount a tmpfs or a disk; a volume that is there stays as it is. Raises `AgentError`."""
        path = _path(request.name)
        with self._lock, _told(f"volume {request.name}"):
            if not os.path.isdir(path):  # noqa: PTH112
                rootfs.make_directory(layout.VOLUMES)
                if len(os.listdir(layout.VOLUMES)) >= MAX_VOLUMES:  # noqa: PTH208
                    raise status.AgentError(status.RESOURCE_EXHAUSTED, f"this VM has {MAX_VOLUMES} volumes")
                os.mkdir(path)  # noqa: PTH102
                try:
                    if request.HasField("disk"):
                        from vmrt.agent import disk_volumes

                        disk_volumes.mount(path, request.disk, deadline)
                        if request.HasField("root"):
                            disk_volumes.make_empty_dir(path, request.root)
                        self._disks.add(request.name)
                    else:
                        _mount_memory(path, request)
                except BaseException:
                    with contextlib.suppress(OSError):
                        kernel.umount(path)
                    os.rmdir(path)  # noqa: PTH106
                    raise
            if request.sub_path:
                _make_sub_path(path, request)

    def unmake(self, name: str) -> None:
        """Write back and unmount a volume on a disk. Raises `AgentError` while something uses it."""
        path = _path(name)
        with self._lock, _told(f"volume {name}"):
            if name in self._disks:
                # Not lazily: all of it is on the disk when this returns.
                kernel.umount(path, 0)
                os.rmdir(path)  # noqa: PTH106
                self._disks.discard(name)

    def unmake_all(self) -> None:
        """Write back and unmount every volume on a disk, the containers being dead."""
        for name in sorted(self._disks):
            try:
                self.unmake(name)
            except status.AgentError as e:
                console.log(e.message)

    def publish(self, request: pb.PublishFilesRequest) -> None:
        """Take a part of a version of a volume's files. Raises `AgentError`."""
        root = _path(request.name)
        version = f"{root}/{_version(request.version)}"
        with self._lock, _told(f"volume {request.name}"):
            if not os.path.ismount(root):
                raise status.AgentError(status.NOT_FOUND, f"volume {request.name} was not made")
            before = _link(f"{root}/{_CURRENT}")
            if before != request.version:
                if request.begin:
                    rootfs.remove_tree(version)
                    os.mkdir(version)  # noqa: PTH102
                for file in request.files:
                    _write(version, file)
            if request.commit:
                _commit(root, request, before)


def _mount_memory(path: str, request: pb.MakeVolumeRequest) -> None:
    """Mount a tmpfs, or a hugetlbfs, whose pages are those that the pod's containers have had set apart."""
    if request.page_size_bytes:
        if not os.path.isdir(f"{_HUGE_PAGES}/hugepages-{request.page_size_bytes // 1024}kB"):  # noqa: PTH112
            raise status.AgentError(
                status.FAILED_PRECONDITION,
                f"volume {request.name}: the guest has no huge pages of {request.page_size_bytes // 1024} kB",
            )
        options = f"mode=0700,pagesize={request.page_size_bytes}"
        kernel.mount("hugetlbfs", path, "hugetlbfs", kernel.MS_NODEV, options)
    else:
        memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        size = f",size={min(request.size_bytes, memory_bytes)}" if request.size_bytes else ""
        kernel.mount("tmpfs", path, "tmpfs", kernel.MS_NODEV, f"mode=0700{size}")
    root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _own(root, request.root)
    finally:
        os.close(root)


def _commit(root: str, request: pb.PublishFilesRequest, before: str) -> None:
    """Make a version current: the swap first, then the names that lead through it, the old version last."""
    if before != request.version:
        directory = os.open(f"{root}/{request.version}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _own(directory, request.directory)
        finally:
            os.close(directory)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{root}/{_NEXT}")  # noqa: PTH108
        os.symlink(request.version, f"{root}/{_NEXT}")  # noqa: PTH211
        os.rename(f"{root}/{_NEXT}", f"{root}/{_CURRENT}")  # noqa: PTH104
    for name, target in sorted(request.links.items()):
        link = f"{root}/{_name(name)}"
        have = _link(link)
        if have != target:
            if have:
                os.unlink(link)  # noqa: PTH108
            os.symlink(target, link)  # noqa: PTH211
    names = sorted(os.listdir(root), key=lambda name: name.startswith(".."))  # noqa: PTH208 - versions last
    for name in names:
        path = f"{root}/{name}"
        if not name.startswith(".."):
            if name not in request.links:
                os.unlink(path)  # noqa: PTH108
        elif name not in (_CURRENT, request.version) and name not in request.keep:
            # kubelet gives versions such names, and nothing else.
            if _link(path):
                os.unlink(path)  # noqa: PTH108
            else:
                rootfs.remove_tree(path)


def _write(version: str, file: pb.VolumeFile) -> None:
    path = f"{version}/{_relative(file.path)}"
    if file.WhichOneof("kind") == "directory":
        os.mkdir(path)  # noqa: PTH102
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    else:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        left = memoryview(file.data)
        while left:
            left = left[os.write(fd, left) :]
        _own(fd, file.owner)
    finally:
        os.close(fd)


def _make_sub_path(path: str, request: pb.MakeVolumeRequest) -> None:
    root = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sub_path = _relative(request.sub_path)
        try:
            os.close(kernel.open_in_root(root, sub_path, os.O_PATH))
        except FileNotFoundError:
            users.make_directory(root, sub_path)
            fd = kernel.open_in_root(root, sub_path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                _own(fd, request.sub_path_owner)
            finally:
                os.close(fd)
    finally:
        os.close(root)


def _own(fd: int, owner: pb.FileOwner) -> None:
    os.fchown(fd, owner.uid, owner.gid)
    os.fchmod(fd, owner.mode & 0o7777)


def _link(path: str) -> str:
    """Return where a symbolic link leads, "" when there is none."""
    try:
        return os.readlink(path)  # noqa: PTH115
    except OSError:
        return ""


@contextlib.contextmanager
def _told(what: str) -> Any:
    try:
        yield
    except OSError as e:
        raise status.from_os_error(e, what) from e


def _path(name: str) -> str:
    if not 0 < len(name) <= 64 or not set(name) <= set("0123456789abcdef"):
        raise status.AgentError(status.INVALID_ARGUMENT, f"{name[:64]!r} is no volume's name")
    return f"{layout.VOLUMES}/{name}"


def _version(name: str) -> str:
    if not name.startswith("..") or name in ("..", _CURRENT, _NEXT):
        raise status.AgentError(status.INVALID_ARGUMENT, f"{name[:64]!r} is no version's name")
    return _name(name)


def _name(name: str) -> str:
    if not 0 < len(name) <= 255 or "/" in name or name in (".", ".."):
        raise status.AgentError(status.INVALID_ARGUMENT, f"{name[:64]!r} is no file name")
    return name


def _relative(path: str) -> str:
    if not path or any(part in ("", ".", "..") for part in path.split("/")):
        raise status.AgentError(status.INVALID_ARGUMENT, f"{path[:200]!r} is no path in a volume")
    return path


def _walk_into(path: str) -> None:
    # O_DIRECTORY, or O_PATH would stop in front of the mount point. A file, or a name that is not there (crun will
    # say so), is none.
    with contextlib.suppress(OSError):
        os.close(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
