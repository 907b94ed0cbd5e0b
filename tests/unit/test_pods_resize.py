"""Changes of limits: what a request leaves alone, what is refused, and what brings the old limits back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from pods_world import CONTAINER, SANDBOX, Fault, World
from test_pods_service import run

from vmrt.errors import ExhaustedError, FailedPreconditionError, InvalidArgumentError, VmError
from vmrt.model import ContainerSpec, HugepageLimit, LinuxResources
from vmrt.pods import resize

MIB = 1024**2
OLD = LinuxResources(
    cpu_period_us=100_000,
    cpu_quota_us=50_000,
    cpu_shares=512,
    memory_limit_bytes=64 * MIB,
    memory_swap_limit_bytes=64 * MIB,
    oom_score_adj=10,
    unified={"memory.high": "max"},
)


def test_what_is_not_set_stays() -> None:
    assert resize.merged(OLD, LinuxResources()) == OLD
    new = resize.merged(OLD, LinuxResources(cpu_quota_us=70_000, oom_score_adj=99, unified={"memory.min": "1"}))
    assert (new.cpu_quota_us, new.cpu_shares, new.oom_score_adj) == (70_000, 512, 10)
    assert new.unified == {"memory.high": "max", "memory.min": "1"}


def test_no_swap_stays_no_swap_under_a_new_memory_limit() -> None:
    new = resize.merged(OLD, LinuxResources(memory_limit_bytes=128 * MIB))
    assert (new.memory_limit_bytes, new.memory_swap_limit_bytes) == (128 * MIB, 128 * MIB)


def test_more_than_the_vm_has_is_refused_by_name() -> None:
    with pytest.raises(ExhaustedError, match=r"linux\.memory_limit_in_bytes is 600 MiB.*512 MiB"):
        resize.check(LinuxResources(memory_limit_bytes=600 * MIB), OLD, 1, 512 * MIB)
    with pytest.raises(ExhaustedError, match=r"linux\.cpu_quota is worth 1\.5 CPUs.*has 1"):
        resize.check(LinuxResources(cpu_quota_us=150_000, cpu_period_us=100_000), OLD, 1, 512 * MIB)
    with pytest.raises(InvalidArgumentError, match="memory_swap_limit_in_bytes"):
        resize.check(LinuxResources(memory_limit_bytes=2 * MIB, memory_swap_limit_bytes=MIB), OLD, 1, 512 * MIB)
    with pytest.raises(InvalidArgumentError, match="hugepage_limits"):
        resize.check(huge(2), OLD, 1, 512 * MIB)
    resize.check(LinuxResources(cpu_quota_us=-1, memory_limit_bytes=512 * MIB), OLD, 1, 512 * MIB)
    # kubelet names every size of page each time, most with 0.
    resize.check(LinuxResources(hugepage_limits=(*huge(0).hugepage_limits, *huge(2).hugepage_limits)), huge(2), 1, MIB)


def test_what_was_unlimited_becomes_so_again() -> None:
    tried = LinuxResources(cpu_quota_us=1, cpu_shares=2, memory_limit_bytes=3, memory_swap_limit_bytes=3)
    assert resize.restoring(LinuxResources(), tried)["unified"] == {
        "memory.max": "max",
        "memory.swap.max": "max",
        "cpu.max": "max",
        "cpu.weight": "100",
    }
    assert resize.restoring(OLD, OLD)["memory"]["limit"] == 64 * MIB


def sums(memory: int = 0, cpus: float = 0) -> LinuxResources:
    return LinuxResources(
        memory_limit_bytes=memory, cpu_quota_us=int(cpus * 100_000), cpu_period_us=100_000 if cpus else 0
    )


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host of 4 CPUs and 8 GiB."""
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("os.sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else 2 * 1024**2)


async def until(what: Callable[[], bool]) -> None:
    """Wait for what goes on in the background."""
    async with asyncio.timeout(10):
        while not what():
            await asyncio.sleep(0)


def size_of(world: World) -> tuple[int, int, int]:
    """Return the VM's CPUs, those of them that are online, and its memory in MiB."""
    (vm,) = world.vm_host.vms.values()
    (guest,) = world.guests.values()
    return vm.spec.vcpus, guest.cpus, vm.spec.memory_bytes // MIB


@pytest.mark.usefixtures("host")
def test_a_pods_vm_follows_its_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        sandbox = await world.service.run_sandbox(SANDBOX)
        assert size_of(world) == (1, 1, 512)
        await world.service.update_sandbox(sandbox, None, sums(1024 * MIB, 2.5))
        assert size_of(world) == (3, 3, 1174)
        record = world.table.sandboxes[sandbox].record
        assert (record.vcpus, record.memory_bytes) == (3, 1174 * MIB)
        # Down: memory to no less than it booted with, CPUs offline and not unplugged.
        await world.service.update_sandbox(sandbox, None, sums(64 * MIB, 1))
        assert size_of(world) == (3, 1, 512)
        assert world.table.sandboxes[sandbox].record.memory_bytes == 512 * MIB
        # Up again: they are there already.
        await world.service.update_sandbox(sandbox, None, sums(64 * MIB, 2))
        assert size_of(world) == (3, 2, 512)

    run(tmp_path, monkeypatch, test)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize(
    ("asked", "error", "text"),
    [
        (sums(16 * 1024 * MIB), ExhaustedError, r"resources\.memory_limit_in_bytes.*8192 MiB"),
        (sums(64 * MIB, 5), ExhaustedError, r"resources\.cpu_quota.*4"),
    ],
)
def test_a_resize_that_cannot_be_met(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: LinuxResources, error: type[Exception], text: str
) -> None:
    async def test(world: World) -> None:
        sandbox = await world.service.run_sandbox(SANDBOX)
        before = world.table.sandboxes[sandbox].record
        with pytest.raises(error, match=text):
            await world.service.update_sandbox(sandbox, None, asked)
        assert world.table.sandboxes[sandbox].record == before
        assert size_of(world) == (1, 1, 512)

    run(tmp_path, monkeypatch, test)


@pytest.mark.usefixtures("host")
def test_a_resize_that_fails_half_way_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        sandbox = await world.service.run_sandbox(SANDBOX)
        before = world.table.sandboxes[sandbox].record
        world.faults = [Fault("agent cpus", before=True, error=VmError("the guest has 1 CPU"))]
        with pytest.raises(VmError, match="the guest has 1 CPU"):
            await world.service.update_sandbox(sandbox, None, sums(1024 * MIB, 2))
        assert world.table.sandboxes[sandbox].record == before
        assert size_of(world)[1:] == (1, 512)

    run(tmp_path, monkeypatch, test)


@pytest.mark.usefixtures("host")
def test_memory_in_use_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        sandbox = await world.service.run_sandbox(SANDBOX)
        await world.service.update_sandbox(sandbox, None, sums(2048 * MIB))
        (guest,) = world.guests.values()
        guest.used_bytes = 1800 * MIB
        with pytest.raises(FailedPreconditionError, match="it uses 1832 MiB"):
            await world.service.update_sandbox(sandbox, None, sums(1024 * MIB))
        assert size_of(world) == (1, 1, 2220)

    run(tmp_path, monkeypatch, test)


def container(name: str, limits: LinuxResources) -> ContainerSpec:
    return replace(CONTAINER, name=name, resources=limits)


@pytest.mark.usefixtures("host")
def test_a_pod_without_sums_is_enlarged_for_its_containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        sandbox = await world.service.run_sandbox(SANDBOX)
        await world.service.create_container(sandbox, container("a", sums(300 * MIB, 0.5)))
        assert size_of(world) == (1, 1, 512)
        await world.service.create_container(sandbox, container("b", sums(400 * MIB, 1)))
        assert size_of(world) == (2, 2, 844)
        # A limit is no promise: what the host has is what there is, and a guest that does not plug is no failure.
        await world.service.create_container(sandbox, container("c", sums(2**40, 100)))
        assert size_of(world) == (4, 4, 8192)
        world.hypervisor.failures["size"] = [VmError("not now")]
        await world.service.create_container(sandbox, container("d", sums(300 * MIB)))

    run(tmp_path, monkeypatch, test)


def huge(mib: int) -> LinuxResources:
    return LinuxResources(hugepage_limits=(HugepageLimit("2MB", mib * MIB),))


@pytest.mark.usefixtures("host")
def test_huge_pages_enlarge_a_vm_and_give_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        sandbox = await world.service.run_sandbox(replace(SANDBOX, resources=sums(376 * MIB, 1)))
        assert size_of(world) == (1, 1, 512)
        first = await world.service.create_container(sandbox, container("a", huge(96)))
        second = await world.service.create_container(sandbox, container("b", huge(192)))
        assert size_of(world) == (1, 1, 806)
        # The pod's new sums take nothing of it away.
        await world.service.update_sandbox(sandbox, None, sums(572 * MIB, 1))
        assert size_of(world) == (1, 1, 1006)
        with pytest.raises(ExhaustedError, match=r"hugepage_limits: the pod's VM would need .* MiB.* 8192 MiB"):
            await world.service.create_container(sandbox, container("c", huge(2**20)))
        await until(lambda: size_of(world) == (1, 1, 1006))
        # An ended container keeps them until it is removed.
        await world.service.stop_container(second, 0)
        await world.service.remove_container(first)
        await until(lambda: size_of(world) == (1, 1, 908))
        await world.service.remove_container(second)
        await until(lambda: size_of(world) == (1, 1, 712))

    run(tmp_path, monkeypatch, test)


@pytest.mark.usefixtures("host")
def test_what_is_in_use_is_not_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        sandbox = await world.service.run_sandbox(SANDBOX)
        first = await world.service.create_container(sandbox, container("a", huge(96)))
        before = size_of(world)
        world.guest_of(sandbox).used_bytes = 600 * MIB
        await world.service.remove_container(first)
        while any(task.get_name().startswith("size ") for task in asyncio.all_tasks()):
            await asyncio.sleep(0)
        assert size_of(world) == before
        assert "agent stats" in world.steps

    run(tmp_path, monkeypatch, test)


@pytest.mark.usefixtures("host")
def test_a_container_of_a_pod_without_sums_has_its_vm_enlarged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        sandbox, container = await world.started()
        for asked, name in ((sums(2**40), "memory_limit_in_bytes"), (sums(64 * MIB, 100), "cpu_quota")):
            with pytest.raises(ExhaustedError, match=name):
                await world.service.update_container(container, asked)
        assert size_of(world) == (1, 1, 512)
        await world.service.update_container(container, sums(800 * MIB, 2))
        assert size_of(world) == (2, 2, 946)
        # With sums the pod's own size comes first.
        await world.service.update_sandbox(sandbox, None, sums(800 * MIB, 2))
        with pytest.raises(ExhaustedError, match="memory_limit_in_bytes"):
            await world.service.update_container(container, sums(2000 * MIB))
        assert size_of(world) == (2, 2, 946)

    run(tmp_path, monkeypatch, test)
