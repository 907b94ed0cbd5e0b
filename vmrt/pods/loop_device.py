"""Loop devices that free themselves: a file as a block device for as long as somebody has it open (loop(4)).

`LOOP_CONFIGURE` (Linux 5.8) makes one in a single step, with LO_FLAGS_AUTOCLEAR: the kernel detaches the file when the
last opener closes the device. So nothing has to be undone, not after a crash either.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

_CONTROL = Path("/dev/loop-control")
_LOOP_CTL_GET_FREE, _LOOP_CONFIGURE = 0x4C82, 0x4C0A
_LO_FLAGS_AUTOCLEAR = 4
# linux/loop.h: struct loop_config is fd, block size, loop_info64 (flags behind five u64 and three u32), reserved.
_CONFIG = struct.Struct("=II40x12xI64s64s32x16x64x")
_ATTEMPTS = 20


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Path]:
    """Give a block device that shows the file; whoever has it open at the end keeps it. Raises `OSError`.

    A symbolic link, and what is no regular file, is refused: the directory may have been a container's once.
    """
    backing = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(backing).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        device, fd = _configure(backing, path.name)
    finally:
        os.close(backing)
    try:
        yield device
    finally:
        os.close(fd)


def _configure(backing: int, name: str) -> tuple[Path, int]:
    control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_ATTEMPTS):
            device = Path(f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}")
            fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
            try:
                config = _CONFIG.pack(backing, 512, _LO_FLAGS_AUTOCLEAR, os.fsencode(name)[:63], b"")
                fcntl.ioctl(fd, _LOOP_CONFIGURE, config)
            except OSError as e:
                os.close(fd)
                # Somebody else was faster with this one.
                if e.errno != errno.EBUSY:
                    raise
                continue
            return device, fd
    finally:
        os.close(control)
    raise OSError(errno.EBUSY, "no loop device stays free")
