"""Loads AppArmor policies, compiled on the host, into this guest's kernel: at the first container that needs one."""

from __future__ import annotations

import os
import threading

from vmrt.agent import kernel, status

_ENABLED = "/sys/module/apparmor/parameters/enabled"
_SECURITYFS = "/sys/kernel/security"
_REPLACE = f"{_SECURITYFS}/apparmor/.replace"

_lock = threading.Lock()
_loaded: dict[str, bytes] = {}


def load(profile: str, policy: bytes) -> None:
    """Have the kernel know `policy`, which defines `profile`; one that it knows already costs nothing.

    Raises `AgentError`: FAILED_PRECONDITION where the kernel runs without AppArmor.
    """
    with _lock:
        if _loaded.get(profile) == policy:
            return
        if not _enabled():
            raise status.AgentError(
                status.FAILED_PRECONDITION,
                f"AppArmor profile {profile}: the kernel of the guest, {os.uname().release}, runs without AppArmor",
            )
        try:
            if not os.path.exists(_REPLACE):  # noqa: PTH110
                kernel.mount("securityfs", _SECURITYFS, "securityfs", kernel.MS_NOSUID | kernel.MS_NODEV)
            fd = os.open(_REPLACE, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, policy)  # the kernel takes a policy in one write only
            finally:
                os.close(fd)
        except OSError as e:
            raise status.from_os_error(e, f"load AppArmor profile {profile}") from e
        _loaded[profile] = policy


def _enabled() -> bool:
    try:
        fd = os.open(_ENABLED, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.read(fd, 1) == b"Y"
    finally:
        os.close(fd)
