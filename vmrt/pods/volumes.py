"""A pod's volumes: host paths bound into the directory that the pod's virtiofsd serves.

    <root>/share/<vm id>/files/<volume>             an empty directory or file: where a volume is mounted
    <root>/share/<vm id>/users/<container>/<volume> says that a container uses a volume

files/ is virtiofsd's root, and the volumes are mounted in virtiofsd's mount namespace only (share_namespace.py): the
host's mount table shows nothing of them, and a directory of the host is as free to be removed as before. Mount points
are made and removed by way of files/, where no volume is visible: clean-up cannot reach a volume's content. The guest's
root may do to virtiofsd's root what it likes: there it is read-only, so nobody can put a symbolic link where the next
volume is to be mounted.

A volume is bound once for all containers of a pod that mount it the same way, so that they see one file system and one
inode: Unix sockets and FIFOs in it connect them. Its name says what it is (`_identity`), so the second one finds it.

All paths follow from ids, so that recovery can undo what a killed daemon left.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import stat
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmrt.agent import layout
from vmrt.errors import (
    ExhaustedError,
    FailedPreconditionError,
    InvalidArgumentError,
    UnsupportedError,
    VmGoneError,
    VmrtError,
)
from vmrt.model import Mount, Propagation
from vmrt.pods import host_paths, idmap, mount_tree, share_namespace
from vmrt.pods.oci import BoundMount
from vmrt.pods.share_namespace import ShareNamespace
from vmrt.spawn import ProcessId

log = logging.getLogger(__name__)

# kubelet's pods have a few tens. Each costs a mount in virtiofsd's namespace and one in the guest.
MAX_MOUNTS = 256
# Host mounts below one volume: an rbind of a node's root brings all of the node's.
MAX_SUBMOUNTS = 4096
_PHASE = "volumes"
_locks: dict[str, threading.Lock] = {}
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
    return directory(root, vm_id) / "files"


def vm_ids(root: Path) -> list[str]:
    """Return the VMs that have a share on disk."""
    with contextlib.suppress(FileNotFoundError):
        return [entry.name for entry in (root / "share").iterdir()]
    return []


def make(root: Path, vm_id: str) -> Path:
    """Make a VM's share and return the directory for virtiofsd. The caller undoes with `remove`."""
    files = served(root, vm_id)
    try:
        # Volumes may be secrets: nobody but root passes here.
        directory(root, vm_id).parent.mkdir(mode=0o700, exist_ok=True)
        directory(root, vm_id).mkdir(mode=0o700)
        files.mkdir(mode=0o755)
    except OSError as e:
        kind = ExhaustedError if e.errno in (errno.ENOSPC, errno.EDQUOT) else VmrtError
        raise kind(f"cannot make the share: {e.strerror}", phase=_PHASE, resource=str(files)) from e
    return files


def seal(share: ProcessId) -> None:
    """Take from the guest what it could do to the share's root; before anything is bound. Raises `VmrtError`."""
    try:
        with share_namespace.of(share) as namespace:
            namespace.seal()
    except OSError as e:
        raise VmrtError(f"cannot make the share's root read-only: {e.strerror}", phase=_PHASE) from e


def bind(
    root: Path,
    vm_id: str,
    container_id: str,
    mounts: Sequence[Mount],
    share: ProcessId | None,
    *,
    elsewhere: Collection[int] = (),
) -> tuple[BoundMount, ...]:
    """Bind a container's volumes into its sandbox's share; the guest paths come back with them.

    `share` is the VM's virtiofsd, None for a VM without one. `elsewhere` are the indices of mounts that are not the
    share's; nor are images, which image_volumes.py has.

    Each host path is looked up once, symbolic links followed, by opening it; everything after acts on the descriptor.
    A path that does not exist is an error (`Mount.host_path` in CRI). The caller undoes with `unbind`, also after a
    failure. Raises `InvalidArgumentError`, `UnsupportedError` naming the field.
    """
    if all(mount.image or index in elsewhere for index, mount in enumerate(mounts)):
        return ()
    if len(mounts) > MAX_MOUNTS:
        raise InvalidArgumentError(f"config.mounts has {len(mounts)} entries; vmrt takes {MAX_MOUNTS}", phase=_PHASE)
    if share is None:
        raise FailedPreconditionError(
            "this sandbox has no file share, so its containers can have no config.mounts",
            phase=_PHASE,
            resource=f"VM {vm_id}",
            hint="it was started with hypervisor.share = false or by an earlier version",
        )
    _users(root, vm_id, container_id).mkdir(mode=0o700, parents=True)
    with idmap.UserNamespaces() as mappings, share_namespace.of(share) as namespace:
        binder = _Binder(root, vm_id, container_id, namespace, mappings)
        return tuple(
            binder.bind(mount, f"config.mounts[{index}]")
            for index, mount in enumerate(mounts)
            if not mount.image and index not in elsewhere
        )


def _users(root: Path, vm_id: str, container_id: str) -> Path:
    return directory(root, vm_id) / "users" / container_id


def _lock(vm_id: str) -> threading.Lock:
    """Return what keeps the volumes of one VM from being bound and unbound at the same time."""
    return _locks.setdefault(vm_id, threading.Lock())


@dataclass(frozen=True, slots=True)
class _Binder:
    """Binds the volumes of one container."""

    root: Path
    vm_id: str
    container_id: str
    namespace: ShareNamespace
    mappings: idmap.UserNamespaces

    def bind(self, mount: Mount, field: str) -> BoundMount:
        what = f"{field}: host path {mount.host_path!r}"
        if mount.propagation is Propagation.BIDIRECTIONAL:
            raise UnsupportedError(
                f"{field}.propagation: a mount made in the guest's kernel cannot appear on the host", phase=_PHASE
            )
        try:
            source = host_paths.open_path(mount.host_path)
        except OSError as e:
            raise InvalidArgumentError(f"{what}: {e.strerror}", phase=_PHASE) from e
        # An emptyDir is its pod's own. Who of the pod may write to it is the guest's affair: held by the host, a
        # container that reads and one that writes would have a file system each.
        kept = mount.readonly and not host_paths.is_empty_dir(mount.host_path)
        try:
            mode = os.fstat(source).st_mode
            if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
                raise UnsupportedError(f"{what} is {_KINDS.get(stat.S_IFMT(mode), 'a special file')}", phase=_PHASE)
            name = _identity(source, mount, readonly=kept)
            userns_fd = self.mappings.get(mount.uids, mount.gids) if mount.uids else -1
            with _lock(self.vm_id):
                (_users(self.root, self.vm_id, self.container_id) / name).touch(mode=0o600)
                if not self.namespace.mounts_at(name):
                    point = served(self.root, self.vm_id) / name
                    if stat.S_ISDIR(mode):
                        point.mkdir(mode=0o755, exist_ok=True)
                    else:
                        point.touch(mode=0o644)
                    self._attach(source, name, mount, userns_fd, what, readonly=kept)
                submounts = self.namespace.mounts_at(name) - 1
        except OSError as e:
            raise VmrtError(f"{what}: {e.filename or 'bind'}: {e.strerror}", phase=_PHASE) from e
        finally:
            os.close(source)
        if submounts > MAX_SUBMOUNTS:
            raise InvalidArgumentError(
                f"{what} has {submounts} mounts below it; {MAX_SUBMOUNTS} are allowed", phase=_PHASE
            )
        # The guest mounts a submount when it is first walked to, with its parent's read-only flag. A read-only volume
        # whose submounts stay writable (not recursive_read_only) is therefore held read-only by the host alone.
        guest_readonly = mount.recursive_read_only or not submounts or not kept
        return BoundMount(mount, f"{layout.SHARE}/{name}", guest_readonly=guest_readonly)

    def _attach(self, source: int, name: str, mount: Mount, userns_fd: int, what: str, *, readonly: bool) -> None:
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
            if readonly:
                mount_tree.change(tree, attributes=mount_tree.RDONLY, recursive=mount.recursive_read_only)
            self.namespace.attach(tree, name)
        finally:
            os.close(tree)


def _identity(source: int, mount: Mount, *, readonly: bool) -> str:
    """Return a name that two mounts share exactly when one bind can serve both.

    They must name one file of one file system, seen through the same mount flags, with the same mounts below it, and
    want the same of the bind. While it is bound, its device and inode numbers are not given to anything else.
    """
    info = os.fstat(source)
    path = Path(f"/proc/self/fd/{source}").readlink()
    below = []
    if stat.S_ISDIR(info.st_mode):
        below = [(entry.id, entry.place) for entry in mount_tree.entries(path) if entry.place != str(path)]
    follows = mount.propagation is Propagation.HOST_TO_CONTAINER
    what = (
        info.st_dev,
        info.st_ino,
        os.statvfs(source).f_flag,
        readonly,
        mount.recursive_read_only,
        follows,
        mount.uids,
        mount.gids,
        # Only where they matter: a sub-path has a path of its own for each container that mounts it.
        str(path) if follows or below else "",
        below,
    )
    return hashlib.sha256(repr(what).encode(errors="surrogateescape")).hexdigest()[:24]


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


def unbind(root: Path, vm_id: str, container_id: str, share: ProcessId | None) -> None:
    """Let go of a container's volumes and unmount those that no other one uses; what is not there is no error.

    `share` is the VM's virtiofsd, None when it is gone and all mounts with it. Raises `VmrtError`.
    """
    users = _users(root, vm_id, container_id)
    with _lock(vm_id), contextlib.suppress(FileNotFoundError):
        others = {
            volume.name
            for container in users.parent.iterdir()
            if container.name != container_id
            for volume in container.iterdir()
        }
        for volume in list(users.iterdir()):
            if volume.name not in others:
                if share is not None:
                    _unmount(share, volume.name)
                _remove_point(served(root, vm_id) / volume.name)
            # Last: as long as it is there, an interrupted undo is found again.
            volume.unlink()
        users.rmdir()


def remove(root: Path, vm_id: str) -> None:
    """Remove a sandbox's share, its virtiofsd being gone; what is not there is no error. Raises `VmrtError`."""
    share = directory(root, vm_id)
    with _lock(vm_id):
        with contextlib.suppress(FileNotFoundError):
            for point in list(served(root, vm_id).iterdir()):
                _remove_point(point)
        try:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(share / "users")
            for path in (served(root, vm_id), share):
                with contextlib.suppress(FileNotFoundError):
                    path.rmdir()
        except OSError as e:
            raise VmrtError(f"cannot remove the share: {e.strerror}", phase=_PHASE, resource=str(share)) from e
    _locks.pop(vm_id, None)


def _unmount(share: ProcessId, name: str) -> None:
    try:
        with share_namespace.of(share) as namespace:
            namespace.detach(name)
    except VmGoneError:
        pass  # and the mounts with it
    except OSError as e:
        raise VmrtError(f"a volume could not be unmounted: {e.strerror}", phase=_PHASE, resource=name) from e


def _remove_point(point: Path) -> None:
    """Remove a mount point: never more than an empty directory or an empty file of our own making."""
    try:
        if point.is_dir() and not point.is_symlink():
            point.rmdir()
        else:
            point.unlink(missing_ok=True)
    except OSError as e:
        raise VmrtError(f"cannot remove a mount point: {e.strerror}", phase=_PHASE, resource=str(point)) from e
