"""cpuset_cpus and cpuset_mems: which CPUs a pod's VM may use, from its containers' limits and lives."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from pods_world import CONTAINER, SANDBOX, Fault, World
from test_pods_service import run

from vmrt import number_list
from vmrt.errors import InvalidArgumentError, VmError
from vmrt.model import Confinement, ContainerSpec, LinuxResources
from vmrt.pods import cpusets

HOST = cpusets.Host(frozenset(range(8)), frozenset((0, 1)))


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host of 8 CPUs and two memory nodes."""
    monkeypatch.setattr(cpusets.Host, "read", classmethod(lambda cls: HOST))


def limits(cpus: str = "", mems: str = "") -> LinuxResources:
    return LinuxResources(cpuset_cpus=cpus, cpuset_mems=mems)


def spec(name: str, cpus: str = "", mems: str = "") -> ContainerSpec:
    return dataclasses.replace(CONTAINER, name=name, resources=limits(cpus, mems))


@pytest.mark.parametrize(
    ("pod", "containers", "cpus"),
    [
        ("", [], None),
        ("", [""], None),
        ("", ["0-1"], {0, 1}),
        ("", ["0-1", "5"], {0, 1, 5}),
        ("", ["0-1", ""], None),
        ("2-3", [], {2, 3}),
        ("2-3", [""], {2, 3}),
        ("2-3", ["3", ""], {2, 3}),
        ("2-3", ["3"], {3}),
        # A container's that the pod does not have: the pod's word counts, as in nested cgroups.
        ("2-3", ["3-4"], {3}),
        ("2-3", ["7"], {2, 3}),
    ],
)
def test_what_a_vm_may_use(pod: str, containers: list[str], cpus: set[int] | None) -> None:
    assert cpusets.union(pod, containers) == cpus


def test_what_the_host_does_not_have_is_refused_by_name() -> None:
    cpusets.require_present(limits("0-7", "0-1"))
    with pytest.raises(InvalidArgumentError, match=r"linux\.cpuset_cpus '6-9': the host's CPUs are 0-7.* no 8-9"):
        cpusets.require_present(limits("6-9"))
    with pytest.raises(InvalidArgumentError, match=r"x\.cpuset_mems '2': the host's memory nodes are 0-1.* no 2"):
        cpusets.require_present(limits("0", "2"), "x")


def test_the_hosts_own_word(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "online").write_text("0-2,5\n")
    assert number_list.read(tmp_path / "cpu" / "online") == {0, 1, 2, 5}
    assert number_list.read(tmp_path / "node" / "online") == {0}  # a kernel without NUMA


def place(world: World) -> Confinement:
    """Return what the one VM is kept to."""
    (vm,) = world.vm_host.vms.values()
    return vm.confinement


async def until(what: Callable[[], bool]) -> None:
    """Wait for what goes on in the background."""
    async with asyncio.timeout(10):
        while not what():
            await asyncio.sleep(0)


def kept(*cpus: int) -> Confinement:
    return Confinement(cpus=frozenset(cpus))


def test_a_vm_follows_its_containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        async def settled(wanted: Confinement) -> None:
            await until(lambda: place(world) == wanted)

        sandbox = await world.service.run_sandbox(SANDBOX)
        first = await world.service.create_container(sandbox, spec("a", "1-2", "1"))
        # Before its process is made: it must not run anywhere else.
        assert place(world) == Confinement(frozenset((1, 2)), frozenset((1,)))
        await world.service.update_container(first, limits("1"))
        assert place(world) == Confinement(frozenset((1,)), frozenset((1,)))
        assert world.service.container(first).spec.resources == limits("1", "1")
        second = await world.service.create_container(sandbox, spec("b", "5", "0"))
        assert place(world) == Confinement(frozenset((1, 5)), frozenset((0, 1)))
        free = await world.service.create_container(sandbox, spec("c"))
        assert place(world) == Confinement()
        await world.service.remove_container(free)
        await settled(Confinement(frozenset((1, 5)), frozenset((0, 1))))
        await world.service.start_container(first)
        world.guest_of(sandbox).exit(first)
        await settled(Confinement(frozenset((5,)), frozenset((0,))))
        # Ended is as good as gone, and what is said of it changes nothing any more.
        await world.service.remove_container(first)
        await world.service.stop_container(second, 0)
        await settled(Confinement())

    run(tmp_path, monkeypatch, test)


def test_pods_without_limits_cost_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        _, container = await world.started()
        await world.service.update_container(container, LinuxResources(cpu_shares=5))
        await world.service.remove_container(container)
        assert "confine" not in {call[0] for call in world.hypervisor.calls}

    run(tmp_path, monkeypatch, test)


def test_a_pods_own_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        with pytest.raises(InvalidArgumentError, match=r"config\.linux\.resources\.cpuset_cpus '8'"):
            await world.service.run_sandbox(dataclasses.replace(SANDBOX, resources=limits("8")))
        assert world.left() == {}
        sandbox = await world.service.run_sandbox(dataclasses.replace(SANDBOX, resources=limits("0-3")))
        assert place(world) == kept(0, 1, 2, 3)
        await world.service.create_container(sandbox, spec("a", "3"))
        assert place(world) == kept(3)
        with pytest.raises(InvalidArgumentError, match=r"resources\.cpuset_cpus '9'"):
            await world.service.update_sandbox(sandbox, None, limits("9"))
        await world.service.update_sandbox(sandbox, None, limits("4-5"))
        await until(lambda: place(world) == kept(4, 5))

    run(tmp_path, monkeypatch, test)


def test_a_refusal_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        sandbox = await world.service.run_sandbox(SANDBOX)
        with pytest.raises(InvalidArgumentError, match="has no 8"):
            await world.service.create_container(sandbox, spec("a", "8"))
        first = await world.service.create_container(sandbox, spec("a", "1"))
        world.hypervisor.failures["confine"] = [VmError("the host does not let it")]
        with pytest.raises(VmError, match="does not let"):
            await world.service.create_container(sandbox, spec("b", "2"))
        assert [record.id for record in world.service.containers()] == [first]
        with pytest.raises(InvalidArgumentError, match="has no 9"):
            await world.service.update_container(first, limits("9"))
        # The guest refuses the other limits of an update: then the CPUs are the old ones, too.
        world.faults = [Fault("agent update", True, VmError("no"))]
        with pytest.raises(VmError):
            await world.service.update_container(first, dataclasses.replace(limits("2"), cpu_shares=5))
        await until(lambda: place(world) == kept(1))
        assert world.service.container(first).spec.resources.cpuset_cpus == "1"

    run(tmp_path, monkeypatch, test)


def test_a_restarted_daemon_knows_from_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        sandbox = await world.service.run_sandbox(SANDBOX)
        first = await world.service.create_container(sandbox, spec("a", "1"))
        second = await world.service.create_container(sandbox, spec("b", "2"))
        await world.service.start_container(second)
        world.guest_of(sandbox).exit(second)
        await until(lambda: place(world) == kept(1))
        (vm,) = world.vm_host.vms.values()
        vm.confinement = kept(7)  # whatever the daemon before was killed in the middle of
        await world.restart()
        await until(lambda: place(world) == kept(1))
        # One that could not be taken back is the next daemon's.
        world.hypervisor.failures["confine"] = [VmError("not now"), VmError("nor then")]
        await world.service.remove_container(first)
        await until(lambda: not world.hypervisor.failures["confine"])
        assert place(world) == kept(1)
        await world.restart()
        await until(lambda: place(world) == Confinement())
        # What was never kept is left alone: it may be an operator's doing.
        await until(lambda: not world.table.sandboxes[sandbox].record.confined)
        vm.confinement = kept(7)
        await world.restart()
        assert place(world) == kept(7)

    run(tmp_path, monkeypatch, test)
