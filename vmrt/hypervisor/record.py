"""What the driver keeps on disk about one VM: its directory and `vm.json`.

    <root>/vms/<vm_id>/            root, 0711
        vm.json                    this record, replaced atomically
        console, console.1         the bounded console (vmrt.hypervisor.console), root only
        console.sock               QEMU connects to it; bound by us
        s/                         owned by the VM's user: what unprivileged helpers bind
            vsock, vsock_1026      the hybrid vsock socket, and where the guest's ready notice arrives
            vhost, fs              vhost-user control sockets
        d/                         root's: device nodes of host block devices, one a disk, named by serial

Only what unprivileged processes must create lies in `s/`, so that a taken-over QEMU cannot plant a symbolic link where
root writes. Socket paths are checked against the kernel's limit before anything is created.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmrt.agent.layout import READY_PORT
from vmrt.errors import InvalidArgumentError, VmError
from vmrt.spawn import ProcessId

# sockaddr_un.sun_path has 108 octets with the terminating NUL (unix(7)).
SOCKET_PATH_LIMIT = 107
_VM_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")


class Helper(enum.Enum):
    """The processes a VM may have beside QEMU."""

    VHOST_VSOCK = "vhost-device-vsock"
    VIRTIOFSD = "virtiofsd"


@dataclass(frozen=True, slots=True)
class VmPaths:
    """Where the files of one VM are."""

    directory: Path

    @property
    def record(self) -> Path:
        """The record of this VM."""
        return self.directory / "vm.json"

    @property
    def console_socket(self) -> Path:
        """The socket QEMU writes the console to."""
        return self.directory / "console.sock"

    @property
    def sockets(self) -> Path:
        """The directory in which unprivileged helpers bind."""
        return self.directory / "s"

    @property
    def devices(self) -> Path:
        """The directory of this VM's own nodes of host devices."""
        return self.directory / "d"

    @property
    def vsock(self) -> Path:
        """The hybrid vsock socket."""
        return self.sockets / "vsock"

    @property
    def ready(self) -> Path:
        """Where a guest's connection to `READY_PORT` arrives."""
        return self.sockets / f"vsock_{READY_PORT}"

    @property
    def vhost_vsock(self) -> Path:
        """The vhost-user control socket of the vsock device."""
        return self.sockets / "vhost"

    @property
    def virtiofs(self) -> Path:
        """The vhost-user control socket of the file share."""
        return self.sockets / "fs"


def paths_of(vms: Path, vm_id: str) -> VmPaths:
    """Return the paths of a VM below `vms`; refuse an id that is no name or makes a socket path too long."""
    if not _VM_ID.fullmatch(vm_id):
        raise InvalidArgumentError(f"VM id {vm_id!r} is not 1 to 64 of [a-z0-9-]")
    paths = VmPaths(vms / vm_id)
    longest = max((paths.console_socket, paths.ready), key=lambda path: len(os.fsencode(path)))
    if (length := len(os.fsencode(longest))) > SOCKET_PATH_LIMIT:
        raise VmError(
            f"the socket path {longest} would have {length} octets, the kernel takes at most {SOCKET_PATH_LIMIT}",
            phase="boot",
            resource=f"vm {vm_id}",
            hint="choose a shorter root directory",
        )
    return paths


@dataclass(frozen=True, slots=True)
class VmRecord:
    """What adoption needs and libvirt does not know.

    `ready` turns true once the guest has reported: a record without it is a boot that a dead daemon left half-way.
    `helpers` is written before QEMU starts, so that a crash at any point leaves no helper unaccounted for. `owner` is
    the uid and gid that the VM has for itself, None for one that runs as the user that all share; `cgroups` are the
    directories of the host's cgroups that are made for it.
    """

    vm_id: str
    vsock: str
    ready: bool = False
    qemu: ProcessId | None = None
    helpers: dict[Helper, ProcessId] = dataclasses.field(default_factory=dict)
    owner: tuple[int, int] | None = None
    cgroups: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Return the text of `vm.json`."""
        return json.dumps(
            {
                "vm_id": self.vm_id,
                "vsock": self.vsock,
                "ready": self.ready,
                "qemu": _process_json(self.qemu),
                "owner": self.owner,
                "cgroups": self.cgroups,
                "helpers": {helper.value: _process_json(process) for helper, process in self.helpers.items()},
            },
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str) -> VmRecord:
        """Read what `to_json` wrote; `ValueError` for anything else."""
        try:
            raw = json.loads(text)
            return cls(
                vm_id=str(raw["vm_id"]),
                vsock=str(raw["vsock"]),
                ready=bool(raw["ready"]),
                qemu=_process(raw["qemu"]),
                owner=_owner(raw.get("owner")),
                cgroups=tuple(str(path) for path in raw.get("cgroups", ())),
                helpers={Helper(name): _must(_process(value)) for name, value in raw["helpers"].items()},
            )
        except (KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"not a VM record: {e!r}") from e


def _process_json(process: ProcessId | None) -> list[int] | None:
    return None if process is None else [process.pid, process.start_ticks]


def _process(raw: Any) -> ProcessId | None:
    if raw is None:
        return None
    pid, start_ticks = raw
    return ProcessId(int(pid), int(start_ticks))


def _owner(raw: Any) -> tuple[int, int] | None:
    if raw is None:
        return None
    uid, gid = raw
    return int(uid), int(gid)


def _must(process: ProcessId | None) -> ProcessId:
    if process is None:
        raise ValueError("not a VM record: a helper without a process")
    return process


def write(paths: VmPaths, record: VmRecord) -> None:
    """Replace `vm.json` in one step. Not synced: a power failure ends the VM it tells of as well."""
    temporary = paths.record.with_suffix(".tmp")
    temporary.write_text(record.to_json())
    temporary.replace(paths.record)


def read(paths: VmPaths) -> VmRecord | None:
    """Return the record; None when there is none or it cannot be understood (its VM is then not ours to keep)."""
    with contextlib.suppress(OSError, ValueError):
        return VmRecord.from_json(paths.record.read_text())
    return None
