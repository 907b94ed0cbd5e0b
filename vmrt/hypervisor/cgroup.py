"""The host's cgroup of one VM: QEMU and its helpers live in a cgroup below the pod's own (CRI cgroup_parent).

kubelet makes the pod's cgroup and its limits; what runs in it is accounted and limited there. Sources: Linux,
Documentation/admin-guide/cgroup-v1 and cgroup-v2.rst; systemd, docs/CONTROL_GROUP_INTERFACE.md; systemd.slice(5) for
the names of slices.

Two kinds of host: one unified hierarchy (v2), or one for each controller (v1), perhaps with an empty unified one beside
them. Two drivers: with cgroupfs we make the directories; where systemd owns the tree (the parent is a slice), it makes
a scope for us.
"""

from __future__ import annotations

import contextlib
import enum
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vmrt import spawn
from vmrt.errors import InvalidArgumentError, VmrtError
from vmrt.spawn import ProcessId

log = logging.getLogger(__name__)

# v1 controllers that account or limit a pod; others have nothing to say about a VM's processes.
_CONTROLLERS = ("memory", "cpu", "cpuacct", "cpuset", "blkio", "pids", "hugetlb")
# Those whose limits would only slow the boot down. A VM is put under them when its agent is ready.
_LATE = frozenset(("cpu", "cpuacct"))
_PARENT_LIMIT = 1024


class Part(enum.Enum):
    """When a VM comes under which limits."""

    EARLY = "early"  # before the guest runs: memory that is charged elsewhere stays charged there
    LATE = "late"  # when its agent is ready: a quota must not starve the boot


@dataclass(frozen=True, slots=True)
class Tree:
    """The cgroup hierarchies of this host: mount point by v1 controller, or `unified` for v2 alone."""

    controllers: Mapping[str, Path]
    unified: Path | None = None

    @classmethod
    def of(cls, mountinfo: str) -> Tree:
        """Read /proc/self/mountinfo (proc_pid_mountinfo(5)). A unified hierarchy beside v1's is of no use here."""
        controllers: dict[str, Path] = {}
        unified = None
        for line in mountinfo.splitlines():
            fields, _, source = line.partition(" - ")
            kind, _, options = source.partition(" ")
            point = Path(fields.split()[4])
            if kind == "cgroup2":
                unified = unified or point
            elif kind == "cgroup":
                for option in options.split()[-1].split(","):
                    if option in _CONTROLLERS:
                        controllers.setdefault(option, point)
        return cls(controllers, None if controllers else unified)

    def hierarchies(self, part: Part, *, throttled: bool = False) -> list[Path]:
        """Return the mount points in which a VM is placed at a time.

        With v2 it is one place for everything: early, unless the pod is `throttled` to less than a CPU.
        """
        if self.unified is not None:
            return [self.unified] if throttled == (part is Part.LATE) else []
        chosen = (point for name, point in self.controllers.items() if (name in _LATE) == (part is Part.LATE))
        return list(dict.fromkeys(chosen))


def slice_path(name: str) -> str:
    """Return where systemd keeps a slice: "a-b.slice" is "a.slice/a-b.slice" (systemd.slice(5))."""
    stem = name.removesuffix(".slice")
    if stem == "-":
        return ""
    parts = stem.split("-")
    if not all(parts):
        raise InvalidArgumentError(f"config.linux.cgroup_parent: {name!r} is no name of a slice (systemd.slice(5))")
    return "/".join("-".join(parts[: length + 1]) + ".slice" for length in range(len(parts)))


def is_slice(parent: str) -> bool:
    """Say whether a cgroup_parent is in systemd's spelling: the name of a slice, perhaps with one slash before it."""
    return parent.endswith(".slice") and "/" not in parent.removeprefix("/")


def directory_of(parent: str, *, systemd: bool) -> PurePosixPath:
    """Return the path of a cgroup_parent below a hierarchy's mount point.

    Raises `InvalidArgumentError` for one that leads elsewhere.
    """
    if systemd and is_slice(parent):
        return PurePosixPath(slice_path(parent.removeprefix("/")))
    path = PurePosixPath(parent.strip("/"))
    if ".." in path.parts or "\0" in parent or len(parent) > _PARENT_LIMIT:
        raise InvalidArgumentError(f"config.linux.cgroup_parent: {parent[:100]!r} is no path of a cgroup")
    return path


def leaf_of(vm_id: str) -> str:
    """Return the name of a VM's own cgroup."""
    return f"vmrt-{vm_id}"


def scope_command(vm_id: str, parent: str, pids: Sequence[int]) -> tuple[str, ...]:
    """Return the call that has systemd make a scope of processes in a slice; it goes with the last of them."""
    return (
        *("busctl", "--quiet", "call", "org.freedesktop.systemd1", "/org/freedesktop/systemd1"),
        *("org.freedesktop.systemd1.Manager", "StartTransientUnit", "ssa(sv)a(sa(sv))"),
        *(f"{leaf_of(vm_id)}.scope", "fail", "4"),
        *("Description", "s", f"vmrt VM {vm_id}"),
        *("Slice", "s", parent.removeprefix("/")),
        *("CollectMode", "s", "inactive-or-failed"),
        *("PIDs", "au", str(len(pids)), *(str(pid) for pid in pids)),
        "0",
    )


def throttled(directory: Path) -> bool:
    """Say whether a v2 cgroup, or one above it, has less than one CPU (cpu.max)."""
    for level in (directory, *directory.parents):
        try:
            quota, period = (level / "cpu.max").read_text().split()
        except (OSError, ValueError):
            continue
        if quota != "max" and int(quota) < int(period):
            return True
    return False


class HostCgroups:
    """Places VMs. `systemd` says how cgroup_parent is spelt, and who makes cgroups below it."""

    def __init__(self, tree: Tree, *, systemd: bool) -> None:
        self._tree = tree
        self._systemd = systemd
        self._warned: set[str] = set()

    def leaves(self, vm_id: str, parent: str) -> list[Path]:
        """Return where a VM's own cgroups are, or would be. Raises `InvalidArgumentError` for a parent that is none."""
        below = directory_of(parent, systemd=self._systemd)
        name = f"{leaf_of(vm_id)}.scope" if self._systemd and is_slice(parent) else leaf_of(vm_id)
        points = [self._tree.unified] if self._tree.unified is not None else [*self._tree.controllers.values()]
        return [point / below / name for point in dict.fromkeys(points)]

    async def place(self, vm_id: str, parent: str, part: Part, processes: Sequence[ProcessId]) -> list[Path]:
        """Put processes below `parent`; return the directories that were made, the outer ones first.

        What the host does not let us do is told once, as a warning, and keeps no pod from running.
        """
        below = directory_of(parent, systemd=self._systemd)
        unified = self._tree.unified
        slow = unified is not None and throttled(unified / below)
        points = self._tree.hierarchies(part, throttled=slow)
        pids = [pid for process in processes for pid in family(process.pid)]
        if self._systemd and is_slice(parent):
            # One call makes the scope in every hierarchy.
            if bool(points) and (unified is not None or part is Part.LATE):
                try:
                    await spawn.run(scope_command(vm_id, parent, pids), timeout_s=10.0, phase="cgroup")
                except VmrtError as e:
                    self._warn("systemd", f"systemd made no scope below {parent}: {e}")
            return []
        made: list[Path] = []
        for point in points:
            made += self._join(point, below / leaf_of(vm_id), pids)
        if not self._tree.controllers and unified is None:
            self._warn("none", "this host has no cgroups mounted: pods' VMs are in none")
        return made

    def _join(self, point: Path, below: PurePosixPath, pids: Iterable[int]) -> list[Path]:
        made: list[Path] = []
        try:
            directory = point
            for name in below.parts:
                directory /= name
                if not directory.is_dir():
                    directory.mkdir(exist_ok=True)
                    made.append(directory)
                    _inherit_cpuset(directory)
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    (directory / "cgroup.procs").write_text(str(pid))
        except OSError as e:
            self._warn(str(point), f"VMs cannot be put into their pods' cgroups in {point}: {e.strerror}: {below}")
        return made

    def _warn(self, key: str, text: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            log.warning("%s", text)


def family(pid: int) -> list[int]:
    """Return a process and all below it: virtiofsd serves from a child (proc_pid_task(5): children)."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError, ValueError):
            found.extend(map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split()))
    return found


def _inherit_cpuset(directory: Path) -> None:
    """Give a new cpuset of v1 what its parent has: with none, no process may enter it."""
    for name in ("cpuset.cpus", "cpuset.mems"):
        if (directory / name).exists() and not (directory / "cgroup.controllers").exists():
            (directory / name).write_text((directory.parent / name).read_text())


def remove(directories: Iterable[Path]) -> None:
    """Remove cgroups that `place` made, the inner ones first; one that others use by now stays."""
    for directory in sorted(directories, key=lambda path: len(path.parts), reverse=True):
        with contextlib.suppress(OSError):
            directory.rmdir()


def oom_kills(directories: Iterable[Path]) -> int:
    """Return how many processes of a VM's own cgroups were killed for memory."""
    kills = 0
    for directory in directories:
        for name in ("memory.oom_control", "memory.events"):
            with contextlib.suppress(OSError, ValueError):
                for line in (directory / name).read_text().splitlines():
                    key, _, value = line.partition(" ")
                    if key == "oom_kill":
                        kills += int(value)
    return kills


def systemd_runs(mark: Path = Path("/run/systemd/system")) -> bool:
    """Say whether systemd is this host's init (sd_booted(3))."""
    return mark.is_dir()


def here(setting: str) -> HostCgroups:
    """Return what this host has; `setting` is hypervisor.cgroup_driver."""
    systemd = setting == "systemd" or (setting == "auto" and systemd_runs())
    try:
        mountinfo = Path("/proc/self/mountinfo").read_text()
    except OSError:
        mountinfo = ""
    return HostCgroups(Tree.of(mountinfo), systemd=systemd)
