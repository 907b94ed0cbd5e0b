"""Host block devices for one VM: a device node of the VM's own, below its directory, that its QEMU alone may open.

The host's node in /dev stays as its owner wants it, and QEMU's private /dev knows nothing of it. A node of ours goes
with the VM's directory, whatever happens to the daemon. It belongs to root and to QEMU's group, so that a taken-over
QEMU cannot give itself the right to write to what was attached read-only.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from vmrt.errors import VmError
from vmrt.hypervisor.access import QemuUser
from vmrt.hypervisor.record import VmPaths
from vmrt.model import Disk

_SERIAL = re.compile(r"[0-9A-Za-z][0-9A-Za-z_.-]{0,63}")


def is_block_device(path: Path) -> bool:
    """Say whether a path names a block device; an absent one does not."""
    try:
        return stat.S_ISBLK(path.stat().st_mode)
    except OSError:
        return False


def node_of(paths: VmPaths, serial: str) -> Path:
    """Return where the node of a disk is; `VmError` for a serial that is no file name."""
    if not _SERIAL.fullmatch(serial):
        raise VmError(f"{serial!r} cannot name a disk", phase="attach disk")
    return paths.devices / serial


def make_node(paths: VmPaths, disk: Disk, user: QemuUser) -> Path:
    """Make the node of a host block device; one that is there already is replaced. Raises `VmError`."""
    node = node_of(paths, disk.serial)
    paths.devices.mkdir(mode=0o711, exist_ok=True)
    paths.devices.chmod(0o711)
    if os.statvfs(paths.devices).f_flag & os.ST_NODEV:
        raise VmError(
            f"{paths.devices} is on a file system that is mounted nodev: QEMU could not open a device there",
            phase="attach disk",
            hint="choose a root on a file system without nodev",
        )
    status = disk.path.stat()
    node.unlink(missing_ok=True)
    os.mknod(node, stat.S_IFBLK | 0o600, status.st_rdev)
    os.chown(node, 0, user.gid, follow_symlinks=False)
    node.chmod(0o440 if disk.readonly else 0o660)
    return node


def drop_node(paths: VmPaths, serial: str) -> None:
    """Remove a node; an absent one is no error."""
    if _SERIAL.fullmatch(serial):
        (paths.devices / serial).unlink(missing_ok=True)


def size_bytes(device: Path) -> int:
    """Return the size that a block device has now. Raises `OSError`."""
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)
