"""QEMU's unprivileged user, and whether it may read a file: QEMU itself would only say "Permission denied"."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from dataclasses import dataclass
from pathlib import Path

from vmrt.config import HypervisorConfig, longest_root_octets
from vmrt.errors import ConfigError, VmError


@dataclass(frozen=True, slots=True)
class QemuUser:
    """As whom QEMU and its helpers run; `groups` are all groups that the user is in."""

    uid: int
    gid: int
    groups: frozenset[int]

    @property
    def owner(self) -> tuple[int, int]:
        """What chown(2) takes."""
        return self.uid, self.gid

    @classmethod
    def lookup(cls, user: str, group: str) -> QemuUser:
        """Find the user and the group; `ConfigError` says how to make them."""
        try:
            uid, gid = pwd.getpwnam(user).pw_uid, grp.getgrnam(group).gr_gid
        except KeyError as e:
            raise ConfigError(
                f"hypervisor.qemu_user or qemu_group: {e.args[0]}",
                hint=f"`useradd --system --no-create-home --shell /usr/sbin/nologin {user}` makes them",
            ) from e
        return cls(uid, gid, frozenset((gid, *os.getgrouplist(user, gid))))


def kvm_group(device: Path = Path("/dev/kvm")) -> int | None:
    """Return the group that a user without a name needs in order to open KVM; None when everybody may, or no group."""
    try:
        status = device.stat()
    except OSError:
        return None
    open_to_all = status.st_mode & 0o006 == 0o006
    return None if open_to_all or status.st_mode & 0o060 != 0o060 else status.st_gid


ROOT_USER = QemuUser(0, 0, frozenset((0,)))


def permits(status: os.stat_result, user: QemuUser, need: int) -> bool:
    """Say whether the mode bits grant `need` (of R_OK, W_OK, X_OK) to this user (path_resolution(7); ACLs aside)."""
    if user.uid == 0:
        return True
    mode = stat.S_IMODE(status.st_mode)
    if status.st_uid == user.uid:
        granted = mode >> 6
    elif status.st_gid in user.groups:
        granted = mode >> 3
    else:
        granted = mode
    return granted & need == need


def require_readable(path: Path, user: QemuUser, *, resource: str, readonly: bool = True) -> None:
    """Raise `VmError` naming the file or directory that is absent or in the way, and what would mend it.

    A file that is not `readonly` is given to the user later: only the way to it is looked at.
    """
    real = Path(os.path.realpath(path))
    try:
        require_passable(path, user, phase="boot", resource=resource)
        if not permits(real.stat(), user, os.R_OK) and readonly and not _has_acl(real):
            raise VmError(f"QEMU's user may not read {path}", phase="boot", resource=resource, hint=f"chmod o+r {path}")
    except FileNotFoundError as e:
        raise VmError(f"{path} does not exist", phase="boot", resource=resource) from e


def require_passable(path: Path, user: QemuUser, *, phase: str, resource: str = "") -> None:
    """Raise `VmError` naming the directory above `path` that QEMU's user may not pass through."""
    for directory in reversed(Path(os.path.realpath(path)).parents):
        if not permits(directory.stat(), user, os.X_OK) and not _has_acl(directory):
            raise VmError(
                f"QEMU's user may not pass through {directory} on the way to {path}",
                phase=phase,
                resource=resource,
                hint=f"chmod o+x {directory}, or choose another root",
            )


def require_short(root: Path, config: HypervisorConfig) -> None:
    """Raise `ConfigError` for a root below which a socket's path would not fit into sun_path."""
    length, most = len(os.fsencode(root)), longest_root_octets(config)
    if length > most:
        raise ConfigError(
            f"root: the path is {length} octets long, the sockets below it leave {most}",
            resource=str(root),
            hint="choose a shorter path",
        )


def _has_acl(path: Path) -> bool:
    """Say whether an access control list may say more than the mode bits."""
    try:
        return "system.posix_acl_access" in os.listxattr(path)
    except OSError:
        return False


def make_directory(path: Path, mode: int) -> None:
    """Make a directory that QEMU's user may pass through, but not list."""
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(path.stat().st_mode & 0o7777 | mode)
