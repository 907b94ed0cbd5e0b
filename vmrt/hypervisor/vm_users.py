"""A user id for each VM: its QEMU and vsock helper run under one that nothing else on the machine has.

The ids are of a range without names (`hypervisor.vm_uid_base`, `vm_uid_count`). Which are taken is kept for the whole
machine, since several daemons may live on it: `/run/vmrt-uids` holds a file for each, named by the id, with the path of
the VM's directory. An entry whose directory is gone is free: a crash between the two leaves nothing to clean up, and
the machine's next boot, which no VM survives, empties /run. The VM's own record holds its id, too.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path

from vmrt.config import HypervisorConfig
from vmrt.errors import ExhaustedError
from vmrt.hypervisor.access import QemuUser, kvm_group, require_passable

log = logging.getLogger(__name__)

TAKEN = Path("/run/vmrt-uids")
_TRIES_BEFORE_SEARCH = 16


def mapped(base: int, count: int, uid_map: str) -> bool:
    """Say whether ids of the range exist in our user namespace, by /proc/self/uid_map (user_namespaces(7))."""
    for line in uid_map.splitlines():
        first, _, length = (int(field) for field in line.split())
        if first <= base and base + count <= first + length:
            return True
    return False


def choose(config: HypervisorConfig, vms: Path, accelerator: str) -> VmUsers | None:
    """Return who hands out the ids; None when all VMs are to run as one user, or cannot run as others."""
    base, count = config.vm_uid_base, config.vm_uid_count
    if not base:
        return None
    if not mapped(base, count, Path("/proc/self/uid_map").read_text()):
        log.warning(
            "this user namespace has no user ids from %d on: all VMs run as %s (hypervisor.vm_uid_base chooses others)",
            base,
            config.qemu_user,
        )
        return None
    require_passable(vms / "any", QemuUser(base, base, frozenset()), phase="start")
    return VmUsers(base, count, gid=kvm_group() if accelerator == "kvm" else None)


class VmUsers:
    """Hands out ids. `gid` is what QEMU's group is to be, None for one of the same number as the user id."""

    def __init__(self, base: int, count: int, *, gid: int | None = None, taken: Path = TAKEN) -> None:
        self._base = base
        self._count = count
        self._gid = gid
        self._taken = taken

    def take(self, directory: Path) -> QemuUser:
        """Reserve an id for the VM of this directory, which must exist. Raises `ExhaustedError`, `OSError`."""
        with self._locked():
            for uid in self._candidates():
                entry = self._taken / str(uid)
                with contextlib.suppress(FileNotFoundError):
                    if Path(os.fsdecode(entry.read_bytes())).is_dir():
                        continue
                # Written in one step: a torn entry would look free.
                part = self._taken / ".new"
                part.write_bytes(os.fsencode(directory))
                part.replace(entry)
                gid = uid if self._gid is None else self._gid
                return QemuUser(uid, gid, frozenset((gid,)))
        raise ExhaustedError(
            f"all {self._count} user ids for VMs are taken", hint="hypervisor.vm_uid_count says how many there are"
        )

    def give_back(self, uid: int, directory: Path) -> None:
        """Free an id; one that is not (or no longer) this directory's is left alone."""
        entry = self._taken / str(uid)
        with contextlib.suppress(FileNotFoundError), self._locked():
            if entry.read_bytes() == os.fsencode(directory):
                entry.unlink()

    def _candidates(self) -> Iterator[int]:
        """Yield ids, some at random first: an id just freed should rest, in case something of it was overlooked."""
        for _ in range(_TRIES_BEFORE_SEARCH):
            yield self._base + random.randrange(self._count)
        yield from range(self._base, self._base + self._count)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self._taken.mkdir(mode=0o755, exist_ok=True)
        fd = os.open(self._taken, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)
