"""Recovery: a daemon that starts on what any earlier one left, at any step, finds or removes it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
from pods_world import CONTAINER, SANDBOX, Fault, World, use

from vmrt.agent import agent_pb2 as pb
from vmrt.errors import NotFoundError, VmrtError
from vmrt.pods import recovery
from vmrt.pods.records import ContainerState, SandboxState

T = TypeVar("T")

RUN_STEPS = ("scratch", "tap", "boot", "setup", "join", "configure")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[World], Awaitable[None]]], None]:
    """Run a test in a fresh world; at its end everything can be removed, and nothing is left."""

    def run_in_world(test: Callable[[World], Awaitable[None]]) -> None:
        async def main() -> None:
            async with asyncio.timeout(20):
                world = World(tmp_path)
                use(world, monkeypatch)
                await world.restart()
                await test(world)
                for record in world.service.sandboxes():
                    await world.service.remove_sandbox(record.id)
                assert world.left() == {}
                await world.service.close()
                world.store.close()

        asyncio.run(main())

    return run_in_world


Run = Callable[[Callable[[World], Awaitable[None]]], None]


async def killed_at(world: World, step: str, work: Awaitable[object]) -> None:
    """Begin a call, kill the daemon when the step has had its effect, and start another."""
    gate = world.gates[step] = asyncio.Event()
    world.steps.clear()
    call = asyncio.ensure_future(work)
    await world.reached(step)
    for _ in range(20):  # what runs beside it goes as far as it can
        await asyncio.sleep(0)
    await end_without_a_trace(world, step, gate, call)
    await world.restart()


async def end_without_a_trace(world: World, step: str, gate: asyncio.Event, call: asyncio.Future[T]) -> None:
    """Let a call of the dead daemon end, which neither does nor undoes anything more."""
    world.frozen = True
    del world.gates[step]
    gate.set()
    await asyncio.gather(call, return_exceptions=True)
    world.frozen = False


@pytest.mark.parametrize("step", RUN_STEPS)
def test_killed_during_run_pod_sandbox(step: str, run: Run) -> None:
    async def test(world: World) -> None:
        await killed_at(world, step, world.service.run_sandbox(SANDBOX))
        assert world.left() == {}
        await world.service.run_sandbox(SANDBOX)

    run(test)


@pytest.mark.parametrize("step", ["attach", "agent create"])
def test_killed_during_create_container(step: str, run: Run) -> None:
    async def test(world: World) -> None:
        sandbox = await world.service.run_sandbox(SANDBOX)
        before = world.left()
        await killed_at(world, step, world.service.create_container(sandbox, CONTAINER))
        assert world.left() == before
        assert world.guest_of(sandbox).containers == {}
        container = await world.service.create_container(sandbox, CONTAINER)
        await world.service.start_container(container)

    run(test)


def test_killed_between_the_start_and_its_record(run: Run) -> None:
    async def test(world: World) -> None:
        sandbox = await world.service.run_sandbox(SANDBOX)
        container = await world.service.create_container(sandbox, CONTAINER)
        await killed_at(world, "agent start", world.service.start_container(container))
        assert world.service.container(container).state is ContainerState.RUNNING
        assert world.service.container(container).started_ns > 0

    run(test)


@pytest.mark.parametrize("step", ["shutdown", "destroy", "teardown"])
def test_killed_during_stop_pod_sandbox(step: str, run: Run) -> None:
    async def test(world: World) -> None:
        sandbox, container = await world.started()
        await killed_at(world, step, world.service.stop_sandbox(sandbox))
        if step != "shutdown":
            assert world.vm_host.vms == {}
            assert world.service.sandbox(sandbox).state is SandboxState.NOT_READY
        await world.service.stop_sandbox(sandbox)
        assert world.service.container(container).state is ContainerState.EXITED
        assert (world.vm_host.vms, world.net_host.pods, world.net_host.taps) == ({}, {}, {})

    run(test)


@pytest.mark.parametrize("step", ["agent remove", "agent signal"])
def test_killed_during_remove_container(step: str, run: Run) -> None:
    async def test(world: World) -> None:
        sandbox, container = await world.started()
        await killed_at(world, step, world.service.remove_container(container))
        await world.service.remove_container(container)
        assert world.guest_of(sandbox).containers == {}
        with pytest.raises(NotFoundError):
            world.service.container(container)
        assert await world.service.create_container(sandbox, CONTAINER)

    run(test)


def test_running_pods_are_adopted_and_new_containers_join_them(run: Run) -> None:
    async def test(world: World) -> None:
        sandbox, container = await world.started()
        before = world.service.sandbox(sandbox), world.service.container(container)
        await world.restart()
        assert (world.service.sandbox(sandbox), world.service.container(container)) == before
        assert world.images.retained.keys() == {container}
        # Its layer is in the VM already.
        other = await world.service.create_container(sandbox, replace(CONTAINER, name="other"))
        await world.service.start_container(other)
        world.guest_of(sandbox).exit(container, 5)
        await world.table.containers[container].exited.wait()
        assert world.service.container(container).exit_code == 5
        await world.service.stop_container(other, 0)
        assert world.service.container(other).exit_code == 137

    run(test)


def test_an_exit_that_nobody_saw_is_dated_by_its_age(run: Run) -> None:
    async def test(world: World) -> None:
        sandbox, container = await world.started()
        started_ns = world.service.container(container).started_ns
        world.hung = True  # the old daemon hears nothing
        world.guest_of(sandbox).exit(container, 9, age_us=0)
        world.hung = False
        ended_ns = time.time_ns()
        await asyncio.sleep(0.02)
        world.guest_of(sandbox).containers[container].exit.age_us = (time.time_ns() - ended_ns) // 1000
        await world.restart()
        await world.table.containers[container].exited.wait()
        record = world.service.container(container)
        assert (record.state, record.exit_code, record.reason) == (ContainerState.EXITED, 9, "Error")
        assert started_ns <= record.finished_ns <= time.time_ns()

    run(test)


def test_a_vm_that_went_meanwhile(run: Run) -> None:
    async def test(world: World) -> None:
        sandbox, container = await world.started()
        vm = world.vm_host.vms.pop(world.service.sandbox(sandbox).vm_id)
        assert vm
        await world.restart()
        assert world.service.sandbox(sandbox).state is SandboxState.NOT_READY
        assert "while the daemon was down" in world.service.sandbox(sandbox).reason
        assert world.service.container(container).exit_code == recovery.UNSEEN_CODE
        await world.service.stop_sandbox(sandbox)
        assert world.net_host.pods == {}

    run(test)


def test_a_container_that_the_guest_does_not_know_has_ended(run: Run) -> None:
    async def test(world: World) -> None:
        sandbox, container = await world.started()
        world.guest_of(sandbox).containers.clear()
        await world.restart()
        record = world.service.container(container)
        assert (record.state, record.exit_code) == (ContainerState.EXITED, recovery.UNSEEN_CODE)

    run(test)


def test_a_container_that_no_record_knows_is_removed(run: Run) -> None:
    async def test(world: World) -> None:
        sandbox, container = await world.started()
        guest = world.guest_of(sandbox)
        guest.containers["f" * 64] = pb.ContainerInfo(container_id="f" * 64, state=pb.ContainerInfo.RUNNING)
        await world.restart()
        assert [*guest.containers] == [container]

    run(test)


def test_an_agent_that_does_not_answer_is_adopted_when_it_does(run: Run) -> None:
    async def test(world: World) -> None:
        sandbox, container = await world.started()
        world.hung = True
        await world.restart()
        assert world.service.sandbox(sandbox).state is SandboxState.READY
        with pytest.raises(VmrtError):
            await world.service.remove_container(container)
        world.hung = False
        world.guest_of(sandbox).exit(container, 4)
        async with asyncio.timeout(5):
            while world.service.sandbox(sandbox).state is SandboxState.READY and container in world.table.containers:
                if world.table.sandboxes[sandbox].events is not None:
                    break
                await asyncio.sleep(0)
        # The removal that failed is taken up.
        assert container not in world.table.containers
        assert world.guest_of(sandbox).containers == {}

    run(test)


def test_a_hung_agent_does_not_keep_its_sandbox_from_being_removed(run: Run) -> None:
    async def test(world: World) -> None:
        sandbox, _ = await world.started()
        world.hung = True
        await world.restart()
        await world.service.remove_sandbox(sandbox)
        assert world.left() == {}

    run(test)


def test_an_image_store_that_lost_its_files_keeps_no_daemon_from_starting(run: Run) -> None:
    async def test(world: World) -> None:
        sandbox, container = await world.started()
        world.image_present = False
        await world.restart()
        assert world.service.container(container).state is ContainerState.RUNNING
        with pytest.raises(NotFoundError):
            await world.service.create_container(sandbox, replace(CONTAINER, name="other"))
        await world.service.remove_container(container)

    run(test)


@pytest.mark.parametrize("step", ["destroy", "teardown", "check", "agent list"])
def test_a_step_of_recovery_that_fails_is_repeated(step: str, run: Run) -> None:
    async def test(world: World) -> None:
        sandbox, container = await world.started()
        gate = world.gates["boot"] = asyncio.Event()
        world.steps.clear()
        call = asyncio.ensure_future(world.service.run_sandbox(replace(SANDBOX, name="half")))
        await world.reached("boot")
        await asyncio.sleep(0.01)
        await end_without_a_trace(world, "boot", gate, call)
        world.faults = [Fault(step, True, RuntimeError("injected") if step != "agent list" else VmrtError("injected"))]
        await world.restart()
        assert world.faults[0].left == 0
        await recovery.sweep(world.table)
        assert world.left()["sandbox records"] == [sandbox]
        assert [*world.vm_host.vms] == [world.service.sandbox(sandbox).vm_id]
        async with asyncio.timeout(5):
            while world.table.sandboxes[sandbox].events is None:
                await asyncio.sleep(0)
        assert world.service.container(container).state is ContainerState.RUNNING

    run(test)
