"""Keeping a VM to CPUs: real threads of a real process; plain directories stand in for cgroups."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmrt import number_list
from vmrt.errors import UnsupportedError, VmError
from vmrt.hypervisor import cgroup, confine
from vmrt.model import Confinement

NOWHERE = Confinement()
# A process with a second thread and a child, which makes a third thread when it is told to.
PROGRAM = """
import os, signal, sys, threading
def wait(): threading.Thread(target=threading.Event().wait, daemon=True).start()
wait()
if os.fork() == 0:
    signal.pause()
print(flush=True)
sys.stdin.readline()
wait()
print(flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def process() -> Iterator[subprocess.Popen[str]]:
    """A process that runs; its stdin drives it."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        family = cgroup.family(process.pid)
        yield process
        for pid in family:
            os.kill(pid, signal.SIGKILL)


def allowed(pid: int) -> list[str]:
    """Return Cpus_allowed_list of every thread of a process and its children (proc_pid_status(5))."""
    found = []
    for each in cgroup.family(pid):
        for status in Path(f"/proc/{each}/task").glob("*/status"):
            (line,) = [line for line in status.read_text().splitlines() if line.startswith("Cpus_allowed_list")]
            found.append(line.split()[1])
    return found


def test_every_thread_is_kept_and_let_go(process: subprocess.Popen[str]) -> None:
    mine = os.sched_getaffinity(0)
    cpu = max(mine)
    confine.confine("v", [], [process.pid], Confinement(cpus=frozenset((cpu,))))
    assert allowed(process.pid) == [str(cpu)] * 3
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    process.stdout.readline()
    # One made later has its maker's.
    assert allowed(process.pid) == [str(cpu)] * 4
    confine.confine("v", [], [process.pid], NOWHERE)
    assert len(allowed(process.pid)) == 4
    assert all(number_list.parse(text) >= mine for text in allowed(process.pid))


def test_cpus_that_are_not_there(process: subprocess.Popen[str]) -> None:
    before = allowed(process.pid)
    with pytest.raises(VmError, match=r"CPUs 8190-8191: Invalid argument"):
        confine.confine("v", [], [process.pid], Confinement(cpus=frozenset((8190, 8191))))
    assert allowed(process.pid) == before


def cgroup_v1(directory: Path) -> Path:
    """A pod's cpuset cgroup with a VM's own below it."""
    leaf = directory / "pod" / "vmrt-v"
    leaf.mkdir(parents=True)
    for each in (leaf.parent, leaf):
        (each / "cpuset.cpus").write_text("0-3")
        (each / "cpuset.mems").write_text("0-1")
        (each / "cpuset.memory_migrate").write_text("0")
    return leaf


def test_a_cpuset_of_v1(tmp_path: Path) -> None:
    leaf = cgroup_v1(tmp_path)
    confine.confine("v", [leaf.parent, leaf], [], Confinement(frozenset((1, 2)), frozenset((1,))))
    assert [(leaf / name).read_text() for name in ("cpuset.cpus", "cpuset.mems")] == ["1-2", "1"]
    assert (leaf / "cpuset.memory_migrate").read_text() == "1"
    assert (leaf.parent / "cpuset.cpus").read_text() == "0-3"
    confine.confine("v", [leaf.parent, leaf], [], NOWHERE)
    assert [(leaf / name).read_text() for name in ("cpuset.cpus", "cpuset.mems")] == ["0-3", "0-1"]


def test_a_cpuset_of_v2(tmp_path: Path) -> None:
    leaf = tmp_path / "pod" / "vmrt-v"
    leaf.mkdir(parents=True)
    (leaf / "cgroup.controllers").touch()
    # The controller is asked for; here nobody hands it down.
    assert confine.own_cpuset([leaf], "v") is None
    assert (leaf.parent / "cgroup.subtree_control").read_text() == "+cpuset"
    for name in ("cpuset.cpus", "cpuset.mems"):
        (leaf / name).touch()
    confine.confine("v", [leaf], [], Confinement(cpus=frozenset((3,))))
    assert [(leaf / name).read_text() for name in ("cpuset.cpus", "cpuset.mems")] == ["3", ""]
    confine.confine("v", [leaf], [], NOWHERE)
    # v2 refuses an empty list where there are processes.
    possible = number_list.spelt(number_list.read(Path("/sys/devices/system/cpu/possible")))
    assert [(leaf / name).read_text() for name in ("cpuset.cpus", "cpuset.mems")] == [possible, ""]


def test_a_vm_of_the_pool_is_where_it_was_put_last(tmp_path: Path) -> None:
    waited, pod = cgroup_v1(tmp_path / "pool"), cgroup_v1(tmp_path / "claimed")
    assert confine.own_cpuset([waited, pod], "v") == pod


def test_only_the_vms_own_cgroup_is_written(tmp_path: Path) -> None:
    for name in ("vmrt-other", "vmrt-v.scope", "pod"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cpuset.cpus").touch()
    assert confine.own_cpuset([*tmp_path.iterdir(), tmp_path / "gone" / "vmrt-v"], "v") is None


def test_what_the_host_refuses_is_told(tmp_path: Path) -> None:
    leaf = cgroup_v1(tmp_path)
    (leaf / "cpuset.cpus").unlink()
    (leaf / "cpuset.cpus").mkdir()
    with pytest.raises(VmError, match=r"cpuset_cpus 2: Is a directory") as caught:
        confine.confine("v", [leaf], [], Confinement(cpus=frozenset((2,))))
    assert caught.value.resource == str(leaf / "cpuset.cpus")


def test_memory_nodes_without_a_cgroup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confine, "host_nodes", lambda: frozenset((0, 1)))
    confine.confine("v", [], [], Confinement(mems=frozenset((0, 1))))
    with pytest.raises(UnsupportedError, match=r"cpuset_mems 1 of the host's nodes 0-1: the VM has no cpuset cgroup"):
        confine.confine("v", [], [], Confinement(mems=frozenset((1,))))


def test_this_host_has_memory() -> None:
    assert confine.host_nodes()
