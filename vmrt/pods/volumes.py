"""A pod's volumes: host paths bound into the directory that the pod's virtiofsd serves.

    <root>/share/<vm id>/files/<container id>/<n>   an empty directory or file: where volume n is mounted
    <root>/share/<vm id>/guest/                     a bind mount of files/, read-only, shared; virtiofsd's root
    <root>/share/<vm id>/guest/<container id>/<n>   the volume

virtiofsd's mount namespace is a slave of ours, so a volume bound below guest/ appears in the guest. The guest's root
may do to virtiofsd's root what it likes: that mount is read-only, so it cannot put a symbolic link where the next
volume is to be mounted. Mount points are made and removed by way of files/, where no volume is ever visible: clean-up
cannot reach a volume's content.

All paths follow from ids, so that recovery can undo what a killed daemon left.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from vmrt.agent import layout
from vmrt.errors import ExhaustedError, FailedPreconditionError, InvalidArgumentError, UnsupportedError, VmrtError
from vmrt.model import Mount, Propagation
from vmrt.pods import idmap, mount_tree
from vmrt.pods.oci import BoundMount

log = logging.getLogger(__name__)

# kubelet's pods have a few tens. Each costs a mount here, one in virtiofsd's namespace and one in the guest.
MAX_MOUNTS = 256
# Host mounts below one volume: an rbind of a node's root brings all of the node's.
MAX_SUBMOUNTS = 4096
_PHASE = "volumes"
_KINDS = {
    stat.S_IFSOCK: "a socket: a Unix socket of the host's kernel cannot be reached from the guest's",
    stat.S_IFIFO: "a FIFO: its other end would be in another kernel",
    stat.S_IFCHR: "a character device: it belongs to the host's kernel",
    stat.S_IFBLK: "a block device: a file share carries files and directories only",
}


def directory(root: Path, vm_id: str) -> Path:
    """Return where all of a VM's share is."""
    return root / "share" / vm_id


def served(root: Path, vm_id: str) -> Path:
    """Return the directory that the VM's virtiofsd serves."""
    return directory(root, vm_id) / "guest"


def vm_ids(root: Path) -> list[str]:
    """Return the VMs that have a share on disk."""
    with contextlib.suppress(FileNotFoundError):
        return [entry.name for entry in (root / "share").iterdir()]
    return []


def make(root: Path, vm_id: str) -> Path:
    """Make a VM's share and return the directory for virtiofsd. The caller undoes with `remove`."""
    files, guest = directory(root, vm_id) / "files", served(root, vm_id)
    try:
        # Volumes may be secrets: nobody but root passes here.
        directory(root, vm_id).parent.mkdir(mode=0o700, exist_ok=True)
        directory(root, vm_id).mkdir(mode=0o700)
        files.mkdir(mode=0o755)
        guest.mkdir(mode=0o755)
        with _opened(files) as source, _opened(guest) as target:
            tree = mount_tree.clone(source)
            try:
                # Private first: a peer of the root's own mount would show the volumes below files/, too.
                read_only = mount_tree.RDONLY | mount_tree.NOSUID | mount_tree.NODEV
                mount_tree.change(tree, attributes=read_only, propagation=mount_tree.PRIVATE)
                mount_tree.attach(tree, target)
                mount_tree.change(tree, propagation=mount_tree.SHARED, recursive=False)
            finally:
                os.close(tree)
    except OSError as e:
        kind = ExhaustedError if e.errno in (errno.ENOSPC, errno.EDQUOT) else VmrtError
        raise kind(f"cannot make the share: {e.strerror}", phase=_PHASE, resource=str(guest)) from e
    return guest


def bind(root: Path, vm_id: str, container_id: str, mounts: Sequence[Mount]) -> tuple[BoundMount, ...]:
    """Bind a container's volumes into its sandbox's share; the guest paths come back with them.

    Each host path is looked up once, symbolic links followed, by opening it; everything after acts on the descriptor.
    A path that does not exist is an error (`Mount.host_path` in CRI). The caller undoes with `unbind`, also after a
    failure. Raises `InvalidArgumentError`, `UnsupportedError` naming the field.
    """
    if all(mount.image for mount in mounts):
        return ()  # image_volumes.py has those
    if len(mounts) > MAX_MOUNTS:
        raise InvalidArgumentError(f"config.mounts has {len(mounts)} entries; vmrt takes {MAX_MOUNTS}", phase=_PHASE)
    guest = served(root, vm_id)
    if str(guest) not in mount_tree.below(guest):
        raise FailedPreconditionError(
            "this sandbox has no file share, so its containers can have no config.mounts",
            phase=_PHASE,
            resource=f"VM {vm_id}",
            hint="it was started with hypervisor.share = false or by an earlier version",
        )
    (directory(root, vm_id) / "files" / container_id).mkdir(mode=0o755)
    with idmap.UserNamespaces() as namespaces:
        return tuple(
            _bind_one(root, vm_id, f"{container_id}/{index}", mount, f"config.mounts[{index}]", namespaces)
            for index, mount in enumerate(mounts)
            if not mount.image
        )


def _bind_one(
    root: Path, vm_id: str, name: str, mount: Mount, field: str, namespaces: idmap.UserNamespaces
) -> BoundMount:
    what = f"{field}: host path {mount.host_path!r}"
    if mount.propagation is Propagation.BIDIRECTIONAL:
        raise UnsupportedError(
            f"{field}.propagation: a mount made in the guest's kernel cannot appear on the host", phase=_PHASE
        )
    try:
        source = os.open(mount.host_path, os.O_PATH | os.O_CLOEXEC)
    except OSError as e:
        raise InvalidArgumentError(f"{what}: {e.strerror}", phase=_PHASE) from e
    try:
        mode = os.fstat(source).st_mode
        if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
            raise UnsupportedError(f"{what} is {_KINDS.get(stat.S_IFMT(mode), 'a special file')}", phase=_PHASE)
        point = directory(root, vm_id) / "files" / name
        if stat.S_ISDIR(mode):
            point.mkdir(mode=0o755)
        else:
            point.touch(mode=0o644, exist_ok=False)
        place = served(root, vm_id) / name
        _attach(source, place, mount, namespaces.get(mount.uids, mount.gids) if mount.uids else -1, what)
    except OSError as e:
        raise VmrtError(f"{what}: {e.filename or 'bind'}: {e.strerror}", phase=_PHASE) from e
    finally:
        os.close(source)
    submounts = len(mount_tree.below(place)) - 1
    if submounts > MAX_SUBMOUNTS:
        raise InvalidArgumentError(f"{what} has {submounts} mounts below it; {MAX_SUBMOUNTS} are allowed", phase=_PHASE)
    # The guest mounts a submount when it is first walked to, with its parent's read-only flag. A read-only volume whose
    # submounts stay writable (not recursive_read_only) is therefore held read-only by the host alone.
    return BoundMount(mount, f"{layout.SHARE}/{name}", guest_readonly=mount.recursive_read_only or not submounts)


def _attach(source: int, place: Path, mount: Mount, userns_fd: int, what: str) -> None:
    tree = mount_tree.clone(source)
    try:
        if userns_fd >= 0:
            _idmap(tree, userns_fd, what)
        follows = mount.propagation is Propagation.HOST_TO_CONTAINER
        mount_tree.change(
            tree,
            attributes=mount_tree.NODEV | mount_tree.NOSUID,
            propagation=mount_tree.SLAVE if follows else mount_tree.PRIVATE,
        )
        if mount.readonly:
            mount_tree.change(tree, attributes=mount_tree.RDONLY, recursive=mount.recursive_read_only)
        with _opened(place) as target:
            mount_tree.attach(tree, target)
    finally:
        os.close(tree)


def _idmap(tree: int, userns_fd: int, what: str) -> None:
    try:
        mount_tree.idmap(tree, userns_fd)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.EPERM):
            raise
        # EPERM: it is id-mapped already.
        raise UnsupportedError(
            f"{what} cannot be mounted with uidMappings: its file system, or one mounted below, takes none",
            phase=_PHASE,
            hint="mount_setattr(2): ext4, XFS, btrfs and others do, tmpfs from Linux 6.3 on",
        ) from e


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        yield fd
    finally:
        os.close(fd)


def unbind(root: Path, vm_id: str, container_id: str) -> None:
    """Unmount a container's volumes and remove their mount points; what is not there is no error."""
    _unmount(served(root, vm_id) / container_id)
    _remove_points(directory(root, vm_id) / "files" / container_id)


def remove(root: Path, vm_id: str) -> None:
    """Remove a sandbox's share, its virtiofsd being gone; what is not there is no error. Raises `VmrtError`."""
    share = directory(root, vm_id)
    _unmount(share)
    if not share.exists():
        return
    with contextlib.suppress(FileNotFoundError):
        for container in list((share / "files").iterdir()):
            _remove_points(container)
    try:
        for path in (share / "guest", share / "files", share):
            with contextlib.suppress(FileNotFoundError):
                path.rmdir()
    except OSError as e:
        raise VmrtError(f"cannot remove the share: {e.strerror}", phase=_PHASE, resource=str(share)) from e


def _unmount(path: Path) -> None:
    """Unmount everything at and below `path`, the newest and deepest first, lazily."""
    # Again until nothing is left: a mount that followed a host's may come in between.
    for _ in range(3):
        places = mount_tree.below(path)
        if not places:
            return
        for place in reversed(places):
            # EINVAL: it went with one above it, or a mount that it followed has gone.
            with contextlib.suppress(OSError):
                mount_tree.detach(place)
    left = mount_tree.below(path)
    if left:
        raise VmrtError(f"{len(left)} mounts could not be unmounted", phase=_PHASE, resource=left[0])


def _remove_points(points: Path) -> None:
    """Remove a container's mount points: never more than empty directories and empty files of our own making."""
    try:
        entries = list(points.iterdir())
        for entry in entries:
            if entry.is_dir() and not entry.is_symlink():
                entry.rmdir()
            else:
                entry.unlink()
        points.rmdir()
    except FileNotFoundError:
        return
    except OSError as e:
        raise VmrtError(f"cannot remove a mount point: {e.strerror}", phase=_PHASE, resource=str(points)) from e
