"""Keeps a VM to CPUs and memory nodes of the host: its processes' threads, those that come later too.

Two means, used together. The VM's own cgroup, where we make it and its hierarchy has cpusets, holds every thread that
is ever made in it, and its memory. The affinity of each thread holds where there is no such cgroup; a new thread has
its maker's, but libvirt gives a plugged CPU's thread all CPUs, so what is wanted is done again after a plug.

No virtual CPU is tied to one of the host's: who sends the list does not say whether it is this pod's alone, and tied
CPUs of two VMs that share it would wait for each other while another idles.

Sources: cpuset(7); Linux, Documentation/admin-guide/cgroup-v1/cpusets.rst and cgroup-v2.rst; sched_setaffinity(2).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from vmrt import number_list
from vmrt.errors import UnsupportedError, VmError
from vmrt.hypervisor.cgroup import family, leaf_of
from vmrt.model import Confinement

_EVERYWHERE = range(number_list.LIMIT)
# A thread that is made while we look is found by looking again; one that makes threads without end is not waited for.
_LOOKS = 8
_ONLINE_NODES = Path("/sys/devices/system/node/online")
_POSSIBLE = {"cpus": Path("/sys/devices/system/cpu/possible"), "mems": Path("/sys/devices/system/node/possible")}


def own_cpuset(directories: Sequence[Path], vm_id: str) -> Path | None:
    """Return the cpuset cgroup of this VM's own among those of its record; None where there is none.

    The last one is where it is: a VM of the pool had another one before. With v2 the controller has to be handed down
    to it; systemd's scopes are systemd's to write.
    """
    for directory in reversed(directories):
        if directory.name != leaf_of(vm_id) or not directory.is_dir():
            continue
        if not (directory / "cpuset.cpus").exists() and (directory / "cgroup.controllers").exists():
            with contextlib.suppress(OSError):
                (directory.parent / "cgroup.subtree_control").write_text("+cpuset")
        if (directory / "cpuset.cpus").exists():
            return directory
    return None


def confine(vm_id: str, cgroups: Sequence[Path], pids: Sequence[int], wanted: Confinement) -> None:
    """Let these processes run on `wanted` alone; None in it takes an earlier confinement back.

    Raises `UnsupportedError` for memory nodes that nothing here can keep to, `VmError` for what the host refuses.
    Blocks for a few system calls a thread.
    """
    directory = own_cpuset(cgroups, vm_id)
    if directory is not None:
        _write(directory, wanted)
    elif wanted.mems is not None and not wanted.mems >= host_nodes():
        raise UnsupportedError(
            f"cpuset_mems {number_list.spelt(wanted.mems)} of the host's nodes {number_list.spelt(host_nodes())}:"
            " the VM has no cpuset cgroup of its own",
            hint="needs cgroup_parent, hypervisor.cgroup_driver = cgroupfs and the cpuset controller",
        )
    _set_affinity([pid for each in pids for pid in family(each)], wanted.cpus)


def host_nodes() -> frozenset[int]:
    """Return the host's memory nodes; a kernel without NUMA has node 0."""
    return number_list.read(_ONLINE_NODES)


def _write(directory: Path, wanted: Confinement) -> None:
    v2 = (directory / "cgroup.controllers").exists()
    for name, numbers in (("cpus", wanted.cpus), ("mems", wanted.mems)):
        file = directory / f"cpuset.{name}"
        text = ""
        try:
            if numbers is not None:
                text = number_list.spelt(numbers)
            elif not v2:
                text = (directory.parent / file.name).read_text()
            elif file.read_text().strip():
                # Not "nothing", which v2 refuses of a cgroup with processes: all that can be, within the parent's.
                text = number_list.spelt(number_list.read(_POSSIBLE[name]))
            else:
                continue
            if name == "mems" and not v2:
                (directory / "cpuset.memory_migrate").write_text("1")
            file.write_text(text)
        except OSError as e:
            raise VmError(
                f"the host does not let the VM be kept to cpuset_{name} {text.strip() or '(all)'}: {e.strerror}",
                phase="cpuset",
                resource=str(file),
                hint=f"{directory.parent}/{file.name} has what the pod may use",
            ) from e


def _set_affinity(pids: Sequence[int], cpus: frozenset[int] | None) -> None:
    mask = frozenset(_EVERYWHERE) if cpus is None else cpus
    done: set[int] = set()
    for _ in range(_LOOKS):
        due = {thread for pid in pids for thread in _threads(pid)} - done
        if not due:
            return
        for thread in due:
            try:
                os.sched_setaffinity(thread, mask)
            except ProcessLookupError:
                pass
            except OSError as e:
                raise VmError(
                    f"the host does not let the VM be kept to CPUs {number_list.spelt(mask)}: {e.strerror}",
                    phase="cpuset",
                    hint="vmrt's own cgroup may have fewer CPUs than the host",
                ) from e
        done |= due


def _threads(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir()]
    return []
