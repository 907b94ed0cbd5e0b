"""A container's file systems: the overlay over its image layers, and the storages mounted beside it.

Everything that is mounted is registered with an undo on the caller's `ExitStack` before the next step. The overlay is
`volatile` (kernel Documentation/filesystems/overlayfs.rst): a writable layer dies with its VM, so syncing it to the
scratch disk would buy nothing. In a pod with a user namespace the layers below are mounted id-mapped (`disks.py`), and
what is written above carries the guest's ids as it is.
"""

from __future__ import annotations

import contextlib
import os

from vmrt.agent import kernel, layout, status

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmrt.agent import agent_pb2 as pb
    from vmrt.agent.disks import Layers

# mount(2) takes one page of options.
MAX_OPTIONS = 4095


def overlay_options(lowers: Sequence[str], upper: str = "", work: str = "") -> str:
    """Return overlayfs' option string; `lowers` are base first. Raises `AgentError` when it exceeds a page."""
    options = "lowerdir=" + ":".join(reversed(lowers))
    if upper:
        options += f",upperdir={upper},workdir={work},volatile"
    if len(options) > MAX_OPTIONS:
        raise status.AgentError(
            status.INVALID_ARGUMENT,
            f"{len(lowers)} layers are too many: overlayfs takes {MAX_OPTIONS} octets of options",
        )
    return options


def mount_overlay(
    layers: Layers, serials: Sequence[str], target: str, stack: contextlib.ExitStack, deadline: float, scratch: str = ""
) -> None:
    """Mount layers (base first) on `target`; writable in `scratch`, a directory to make, or read-only without one."""
    if not serials:
        raise status.AgentError(status.INVALID_ARGUMENT, "the image has no layers")
    lowers = []
    for serial in serials:
        lowers.append(layers.acquire(serial, deadline))
        stack.callback(layers.release, serial)
    make_directory(target)
    # An image may name a layer twice (an empty one); overlayfs refuses that.
    lowers = list(dict.fromkeys(reversed(lowers)))[::-1]
    if scratch:
        stack.callback(remove_tree, scratch)
        upper, work = f"{scratch}/u", f"{scratch}/w"
        make_directory(upper)
        make_directory(work)
        # The upper directory is the root directory that the container sees: it gets the image's owner and mode.
        _copy_attributes(lowers[-1], upper)
        mount("overlay", target, "overlay", 0, stack, overlay_options(lowers, upper, work))
    elif len(lowers) == 1:
        mount(lowers[0], target, "", kernel.MS_BIND, stack)
    else:
        mount("overlay", target, "overlay", kernel.MS_RDONLY, stack, overlay_options(lowers))


def mount_storage(
    storage: pb.Storage, directory: str, layers: Layers, stack: contextlib.ExitStack, deadline: float
) -> None:
    """Mount one storage at `directory`/<name>."""
    name = storage.name
    if not name or "/" in name or name in (".", "..") or len(name) > 128:
        raise status.AgentError(status.INVALID_ARGUMENT, f"storage {name[:64]!r}: not a file name")
    target = f"{directory}/{name}"
    make_directory(target)
    readonly = kernel.MS_RDONLY if storage.readonly else 0
    kind = storage.WhichOneof("source")
    if kind == "tmpfs_bytes":
        size = f",size={storage.tmpfs_bytes}" if storage.tmpfs_bytes else ""
        options = f"mode=1777,uid={layers.owner[0]},gid={layers.owner[1]}{size}"
        mount("tmpfs", target, "tmpfs", readonly | kernel.MS_NODEV | kernel.MS_NOSUID, stack, options)
    elif kind == "share_path":
        _bind_beneath(layout.SHARE, storage.share_path, target, stack, readonly=storage.readonly)
    elif kind == "volume_path":
        _bind_beneath(layout.VOLUMES, storage.volume_path, target, stack, readonly=storage.readonly)
    elif kind == "disk_serial":
        from vmrt.agent import disks

        disks.check_serial(storage.disk_serial)
        device = disks.wait_for(storage.disk_serial, deadline)
        mount(device, target, storage.fstype or "ext4", readonly | kernel.MS_NODEV, stack)
    elif kind == "image":
        try:
            _mount_image(storage, directory, layers, stack, deadline)
        except status.AgentError as e:
            raise status.AgentError(status.IMAGE_STORAGE, f"storage {name}: {e.message}") from e
    else:
        raise status.AgentError(status.INVALID_ARGUMENT, f"storage {name}: no source")


def _mount_image(
    storage: pb.Storage, directory: str, layers: Layers, stack: contextlib.ExitStack, deadline: float
) -> None:
    """Mount an image's layers, or the part of them that `sub_path` names; a link in it ends within the image."""
    target = f"{directory}/{storage.name}"
    sub_path = storage.image.sub_path
    # A name that no storage can have: those have no "/".
    whole = f"{directory}-whole/{storage.name}" if sub_path else target
    mount_overlay(layers, list(storage.image.layer_serials), whole, stack, deadline)
    if sub_path:
        _bind_beneath(whole, sub_path, target, stack, readonly=True)


def mount(source: str, target: str, fstype: str, flags: int, stack: contextlib.ExitStack, data: str = "") -> None:
    """Mount and register the unmount. Raises `AgentError` naming both sides."""
    try:
        kernel.mount(source, target, fstype, flags, data)
    except OSError as e:
        raise status.from_os_error(e, f"mount {fstype or 'bind'} {source}") from e
    stack.callback(unmount, target)


def unmount(target: str) -> None:
    """Unmount; a target that is not mounted is no error."""
    with contextlib.suppress(OSError):
        kernel.umount(target)


def unmount_tree(directory: str) -> None:
    """Unmount all that is mounted at and below `directory`."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:  # noqa: PTH123
        places = [line.split(" ", 5)[4] for line in file]
    for place in reversed(places):
        if place == directory or place.startswith(f"{directory}/"):
            unmount(place)


def forget_unused_files() -> None:
    """Drop the dentries that are only cached (sysctl/vm.rst, drop_caches).

    By way of virtiofsd, one would keep a file system of the host busy.
    """
    with contextlib.suppress(OSError), open("/proc/sys/vm/drop_caches", "w") as file:  # noqa: PTH123
        file.write("2")


def make_directory(path: str) -> None:
    """Make a directory and its parents."""
    os.makedirs(path, exist_ok=True)  # noqa: PTH103


def remove_tree(path: str) -> None:
    """Remove a directory with all in it, through directory descriptors: no symbolic link is followed."""
    # shutil would do the same, but brings bz2, lzma and zlib into PID 1.
    with contextlib.suppress(FileNotFoundError):
        for _, directories, files, fd in os.fwalk(path, topdown=False, follow_symlinks=False):
            for name in files:
                os.unlink(name, dir_fd=fd)
            for name in directories:
                try:
                    os.rmdir(name, dir_fd=fd)
                except NotADirectoryError:
                    os.unlink(name, dir_fd=fd)
        os.rmdir(path)  # noqa: PTH106


def usage(path: str, limit: int = 200_000) -> tuple[int, int]:
    """Return (octets allocated, inodes) below a directory; the walk ends after `limit` entries."""
    octets = inodes = 0
    pending = [path]
    while pending and inodes < limit:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    with contextlib.suppress(OSError):
                        octets += entry.stat(follow_symlinks=False).st_blocks * 512
                        inodes += 1
                        if entry.is_dir(follow_symlinks=False):
                            pending.append(entry.path)
        except OSError:
            continue
    return octets, inodes


def _copy_attributes(source: str, target: str) -> None:
    info = os.stat(source)  # noqa: PTH116
    os.chown(target, info.st_uid, info.st_gid)
    os.chmod(target, info.st_mode & 0o7777)  # noqa: PTH101


def _bind_beneath(root: str, path: str, target: str, stack: contextlib.ExitStack, *, readonly: bool) -> None:
    """Bind `root`/`path` on `target`, resolved so that no link leads out of `root`."""
    if path.startswith("/") or ".." in path.split("/"):
        raise status.AgentError(status.INVALID_ARGUMENT, f"path {path[:200]!r} must be relative and without '..'")
    import stat

    root_fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fd = kernel.open_in_root(root_fd, path, os.O_PATH)
        except OSError as e:
            raise status.AgentError(status.NOT_FOUND, f"path {path[:200]!r}: {e.strerror}") from e
    finally:
        os.close(root_fd)
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            os.rmdir(target)  # noqa: PTH106
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        mount(f"/proc/self/fd/{fd}", target, "", kernel.MS_BIND | kernel.MS_REC, stack)
    finally:
        os.close(fd)
    if readonly:
        flags = kernel.MS_BIND | kernel.MS_REMOUNT | kernel.MS_RDONLY
        try:
            kernel.mount("", target, "", flags)
        except OSError as e:
            raise status.from_os_error(e, "make a storage read-only") from e
