"""What a block device of the host is to a VM: its number, whether it may write, and the serial that follows."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from vmrt.errors import InvalidArgumentError

SERIAL_PREFIX = "b-"
# sysfs counts in sectors of 512 octets, whatever the device's (Documentation/ABI/stable/sysfs-block).
_SECTOR_BYTES = 512


@dataclass(frozen=True, slots=True)
class BlockDevice:
    """A host block device; `field` is where the client named it."""

    field: str
    path: str
    number: tuple[int, int]
    readonly: bool
    index: int = -1  # in config.devices
    # For a file that becomes a block device when it is plugged in: its path is what it is known by.
    image: bool = False

    @property
    def serial(self) -> str:
        """The serial of its disk in the VM."""
        return SERIAL_PREFIX + self.volume_name

    @property
    def volume_name(self) -> str:
        """The guest's name of the volume, where its file system is mounted there."""
        access = "r" if self.readonly else "rw"
        what = self.path if self.image else f"{self.number[0]}:{self.number[1]}:{access}"
        return hashlib.sha256(what.encode()).hexdigest()[:20]


def block_device(path: str, field: str, *, readonly: bool) -> BlockDevice | None:
    """Return the block device at a path, links followed: CSI drivers publish links. None when it is none."""
    try:
        info = Path(path).stat()
    except OSError:
        return None
    if not stat.S_ISBLK(info.st_mode):
        return None
    number = (os.major(info.st_rdev), os.minor(info.st_rdev))
    if size_bytes(number) == 0:
        raise InvalidArgumentError(f"{field} is {path!r}, a block device without a medium", phase="devices")
    return BlockDevice(field, path, number, readonly)


def size_bytes(number: tuple[int, int]) -> int:
    """Return how large a block device is now, 0 for one that is not there."""
    with contextlib.suppress(OSError, ValueError):
        return int(Path(f"/sys/dev/block/{number[0]}:{number[1]}/size").read_text()) * _SECTOR_BYTES
    return 0
