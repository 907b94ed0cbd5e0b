"""May QEMU's unprivileged user read a file? Asked before the boot, since QEMU only says "Permission denied"."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from pathlib import Path

from vmrt.errors import VmError


def permits(status: os.stat_result, uid: int, groups: Collection[int], need: int) -> bool:
    """Say whether the mode bits grant `need` (of R_OK, W_OK, X_OK) to this user (path_resolution(7); ACLs aside)."""
    if uid == 0:
        return True
    mode = stat.S_IMODE(status.st_mode)
    if status.st_uid == uid:
        granted = mode >> 6
    elif status.st_gid in groups:
        granted = mode >> 3
    else:
        granted = mode
    return granted & need == need


def require_readable(path: Path, uid: int, groups: Collection[int], *, resource: str, readonly: bool = True) -> None:
    """Raise `VmError` naming the file or directory that is absent or in the way, and what would mend it.

    A file that is not `readonly` is given to the user later: only the way to it is looked at.
    """
    real = Path(os.path.realpath(path))
    try:
        for directory in reversed(real.parents):
            if not permits(directory.stat(), uid, groups, os.X_OK) and not _has_acl(directory):
                raise VmError(
                    f"QEMU's user may not pass through {directory} on the way to {path}",
                    phase="boot",
                    resource=resource,
                    hint=f"chmod o+x {directory}, or choose another root",
                )
        if not permits(real.stat(), uid, groups, os.R_OK) and readonly and not _has_acl(real):
            raise VmError(f"QEMU's user may not read {path}", phase="boot", resource=resource, hint=f"chmod o+r {path}")
    except FileNotFoundError as e:
        raise VmError(f"{path} does not exist", phase="boot", resource=resource) from e


def _has_acl(path: Path) -> bool:
    """Say whether an access control list may say more than the mode bits."""
    try:
        return "system.posix_acl_access" in os.listxattr(path)
    except OSError:
        return False
