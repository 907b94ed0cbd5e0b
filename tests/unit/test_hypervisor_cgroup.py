"""Host cgroups: what mount tables and cgroup_parent mean, and what is made of them; plain directories stand in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmrt import spawn
from vmrt.errors import InvalidArgumentError
from vmrt.hypervisor import cgroup
from vmrt.hypervisor.cgroup import HostCgroups, Part, Tree

MIXED = """
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory
36 31 0:33 / /sys/fs/cgroup/devices rw,relatime - cgroup cgroup rw,devices
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
""".strip()
UNIFIED = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"


def test_a_host_with_a_hierarchy_for_each_controller() -> None:
    tree = Tree.of(MIXED)
    assert tree.unified is None
    assert tree.hierarchies(Part.EARLY) == [Path("/sys/fs/cgroup/memory")]
    assert tree.hierarchies(Part.LATE) == [Path("/sys/fs/cgroup/cpu,cpuacct")]


def test_a_host_with_one_hierarchy() -> None:
    tree = Tree.of(UNIFIED)
    everything = [Path("/sys/fs/cgroup")]
    assert (tree.hierarchies(Part.EARLY), tree.hierarchies(Part.LATE)) == (everything, [])
    # A pod with less than a CPU would boot for minutes.
    slow = tree.hierarchies(Part.EARLY, throttled=True), tree.hierarchies(Part.LATE, throttled=True)
    assert slow == ([], everything)
    assert Tree.of("").hierarchies(Part.EARLY) == []


@pytest.mark.parametrize(
    ("parent", "systemd", "path"),
    [
        ("/kubepods/burstable/pod1", False, "kubepods/burstable/pod1"),
        ("kubepods/pod1/", False, "kubepods/pod1"),
        (
            "kubepods-burstable-pod1_2.slice",
            True,
            "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice",
        ),
        ("/test.slice", True, "test.slice"),
        ("-.slice", True, "."),
        # A path stays a path, whoever drives; and so does a slice's name where systemd does not.
        ("/a/b.slice", True, "a/b.slice"),
        ("b.slice", False, "b.slice"),
    ],
)
def test_where_a_parent_is(parent: str, systemd: bool, path: str) -> None:
    assert str(cgroup.directory_of(parent, systemd=systemd)) == path


@pytest.mark.parametrize("parent", ["../x", "/a/../../etc", "a\0b", "x" * 2000, "a--b.slice", "-a.slice"])
def test_what_is_no_cgroup(parent: str) -> None:
    with pytest.raises(InvalidArgumentError, match="cgroup_parent"):
        cgroup.directory_of(parent, systemd=True)


def test_the_scope_that_systemd_is_asked_for() -> None:
    command = cgroup.scope_command("abc", "/a-b.slice", [7, 8])
    assert command[-6:] == ("PIDs", "au", "2", "7", "8", "0")
    assert "vmrt-abc.scope" in command
    assert command[command.index("Slice") + 2] == "a-b.slice"


def hierarchy(directory: Path, name: str) -> Path:
    """Return a hierarchy whose parent cgroup is there and whose leaf, when it is made, takes processes."""
    point = directory / name
    (point / "pod").mkdir(parents=True)
    return point


async def test_placing_and_removing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    memory, cpu = hierarchy(tmp_path, "memory"), hierarchy(tmp_path, "cpu")
    cgroups = HostCgroups(Tree({"memory": memory, "cpu": cpu}), systemd=False)
    me = spawn.identify(os.getpid())
    assert me is not None
    assert cgroups.leaves("v", "/pod") == [memory / "pod" / "vmrt-v", cpu / "pod" / "vmrt-v"]
    assert await cgroups.place("v", "/pod", Part.EARLY, [me]) == [memory / "pod" / "vmrt-v"]
    assert (memory / "pod" / "vmrt-v" / "cgroup.procs").read_text() == str(me.pid)
    assert not (cpu / "pod" / "vmrt-v").exists()
    # A parent that nobody has made is made, and goes again.
    made = await cgroups.place("v", "/new/pod", Part.LATE, [me])
    assert made == [cpu / "new", cpu / "new" / "pod", cpu / "new" / "pod" / "vmrt-v"]
    (cpu / "new" / "pod" / "vmrt-v" / "cgroup.procs").unlink()
    cgroup.remove(made)
    assert not (cpu / "new").exists()
    assert not caplog.records


async def test_a_host_that_refuses_is_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = tmp_path / "memory"
    blocked.write_text("no directory")
    cgroups = HostCgroups(Tree({"memory": blocked}), systemd=False)
    for _ in range(2):
        assert await cgroups.place("v", "/pod", Part.EARLY, []) == []
    assert len(caplog.records) == 1
    assert "cannot be put" in caplog.text
    bare = HostCgroups(Tree({}), systemd=False)
    for _ in range(2):
        await bare.place("v", "/pod", Part.EARLY, [])
    assert len(caplog.records) == 2


def test_an_empty_cpuset_is_filled(tmp_path: Path) -> None:
    (tmp_path / "cpuset.cpus").write_text("0-3")
    (tmp_path / "cpuset.mems").write_text("0")
    child = tmp_path / "child"
    child.mkdir()
    for name in ("cpuset.cpus", "cpuset.mems"):
        (child / name).touch()
    cgroup._inherit_cpuset(child)
    assert (child / "cpuset.cpus").read_text() == "0-3"


def test_a_throttled_pod(tmp_path: Path) -> None:
    pod = tmp_path / "kubepods" / "pod"
    pod.mkdir(parents=True)
    (pod / "cpu.max").write_text("max 100000")
    assert not cgroup.throttled(pod)
    (tmp_path / "kubepods" / "cpu.max").write_text("50000 100000")
    assert cgroup.throttled(pod)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n"),
        ("memory.events", "low 0\nhigh 0\nmax 4\noom 1\noom_kill 1\n"),
    ],
)
def test_the_kernels_count_of_oom_kills(tmp_path: Path, name: str, text: str) -> None:
    assert cgroup.oom_kills([tmp_path, tmp_path / "absent"]) == 0
    (tmp_path / name).write_text(text)
    assert cgroup.oom_kills([tmp_path, tmp_path / "absent"]) == 1
