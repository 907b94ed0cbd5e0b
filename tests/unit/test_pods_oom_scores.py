"""oom_score_adj: what a pod's VM has by its containers' values and lives."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pytest
from pods_world import CONTAINER, SANDBOX, World
from test_pods_service import run

from vmrt.errors import VmError
from vmrt.model import ContainerSpec, LinuxResources


def spec(name: str, oom_score_adj: int) -> ContainerSpec:
    return dataclasses.replace(CONTAINER, name=name, resources=LinuxResources(oom_score_adj=oom_score_adj))


def score(world: World) -> int:
    (vm,) = world.vm_host.vms.values()
    return vm.oom_score_adj


async def until(world: World, wanted: int) -> None:
    async with asyncio.timeout(10):
        while score(world) != wanted:
            await asyncio.sleep(0)


def test_a_vm_has_its_most_protected_containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        sandbox = await world.service.run_sandbox(SANDBOX)
        assert score(world) == 0
        first = await world.service.create_container(sandbox, spec("a", 1000))
        assert score(world) == 1000
        second = await world.service.create_container(sandbox, spec("b", -997))
        assert score(world) == -997
        third = await world.service.create_container(sandbox, spec("c", 500))
        assert score(world) == -997
        await world.service.remove_container(second)
        await until(world, 500)
        await world.service.start_container(third)
        world.guest_of(sandbox).exit(third)
        await until(world, 1000)
        # Between two containers it stays what it was.
        await world.service.remove_container(first)
        await world.service.remove_container(third)
        assert score(world) == 1000

    run(tmp_path, monkeypatch, test)


def test_what_the_host_refuses_fails_no_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(world: World) -> None:
        sandbox = await world.service.run_sandbox(SANDBOX)
        world.hypervisor.failures["weigh"] = [VmError("no")]
        await world.service.create_container(sandbox, spec("a", 900))
        assert score(world) == 0
        assert "the OOM score of its VM stays what it was: no" in caplog.text
        await world.service.create_container(sandbox, spec("b", 900))
        assert score(world) == 900

    run(tmp_path, monkeypatch, test)


def test_a_restarted_daemon_sets_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        sandbox = await world.service.run_sandbox(SANDBOX)
        await world.service.create_container(sandbox, spec("a", 900))
        (vm,) = world.vm_host.vms.values()
        vm.oom_score_adj = 0
        await world.restart()
        await until(world, 900)

    run(tmp_path, monkeypatch, test)


def test_one_value_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        sandbox = await world.service.run_sandbox(SANDBOX)
        for name in "abc":
            await world.service.create_container(sandbox, spec(name, 900))
        assert [call[2] for call in world.hypervisor.calls if call[0] == "weigh"] == ["900"]

    run(tmp_path, monkeypatch, test)
