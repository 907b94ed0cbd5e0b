"""The verbs of `PodService` over fakes: a fault at each of their steps, and verbs that meet each other."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from pods_world import CONTAINER, SANDBOX, Fault, World, faults, use

from tests.contract import fake_hypervisor
from vmrt.agent import agent_pb2 as pb
from vmrt.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    NotFoundError,
    UnavailableError,
    VmGoneError,
    VmrtError,
)
from vmrt.model import Mount, VmEventKind
from vmrt.pods import recovery
from vmrt.pods.records import ContainerState, SandboxState

RUN_STEPS = ("scratch", "tap", "boot", "setup", "join", "configure")
NIC_STEPS = ("extra tap", "attach nic", "extra join", "configure")
CREATE_STEPS = ("attach", "agent create")
STOP_STEPS = ("destroy", "delete tap", "teardown", "save sandbox not-ready")


def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, test: Callable[[World], Awaitable[None]], *, clean: bool = True
) -> None:
    """Run a test in a fresh world; at its end everything can be removed, and nothing is left."""

    async def main() -> None:
        async with asyncio.timeout(20):
            world = World(tmp_path)
            use(world, monkeypatch)
            await world.restart()
            await test(world)
            if clean:
                for record in world.service.sandboxes():
                    await world.service.remove_sandbox(record.id)
                await recovery.sweep(world.table)
                assert world.left() == {}
            await world.service.close()
            world.store.close()

    asyncio.run(main())


async def spoiled(world: World, fault: Fault, work: Awaitable[object]) -> None:
    """Make a call that the fault must spoil, and check that it was struck."""
    fault = replace(fault)
    world.faults = [fault]
    expected = asyncio.CancelledError if fault.error is None else type(fault.error)
    with pytest.raises(expected):
        await world.call(work)
    assert fault.left == 0
    world.faults = []


# --- RunPodSandbox ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        *faults(RUN_STEPS),
        # (A record that was written and reported as not written is the next start's to remove.)
        Fault("save sandbox creating", True, VmrtError("injected")),
        *faults(["save sandbox ready"], cancel=False),
    ],
    ids=str,
)
def test_a_spoiled_start_leaves_nothing(fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        await spoiled(world, fault, world.service.run_sandbox(SANDBOX))
        assert world.left() == {}
        sandbox = await world.service.run_sandbox(SANDBOX)
        assert world.service.sandbox(sandbox).state is SandboxState.READY

    run(tmp_path, monkeypatch, test)


@pytest.mark.parametrize("fault", faults(NIC_STEPS), ids=str)
def test_a_spoiled_start_with_several_interfaces_leaves_nothing(
    fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(world: World) -> None:
        world.network.extra_interfaces = 2
        await spoiled(world, fault, world.service.run_sandbox(SANDBOX))
        assert world.left() == {}
        sandbox = world.service.sandbox(await world.service.run_sandbox(SANDBOX))
        taps = [sandbox.tap, f"{sandbox.tap}1", f"{sandbox.tap}2"]
        assert world.net_host.taps == dict.fromkeys(taps, sandbox.id)
        number = world.net_host.pods[sandbox.id]
        nics = {taps[1]: f"0a:58:0a:58:01:{number:02x}", taps[2]: f"0a:58:0a:58:02:{number:02x}"}
        assert world.vm_host.vms[sandbox.vm_id].nics == nics
        joins = [call[2:] for call in world.network.calls if call[0] == "join" and call[1] == sandbox.id]
        assert joins == [(taps[0], ""), (taps[1], "net1"), (taps[2], "net2")]
        await world.service.stop_sandbox(sandbox.id)
        assert world.net_host.taps == {}

    run(tmp_path, monkeypatch, test)


def test_more_interfaces_than_a_vm_has_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        for extra, words in ((4, "no place for another network card"), (10, "has 11 interfaces; a VM has at most 10")):
            world.network.extra_interfaces = extra
            monkeypatch.setattr(fake_hypervisor, "EXTRA_NICS", 3 if extra == 4 else 20)
            with pytest.raises(VmrtError, match=words):
                await world.service.run_sandbox(SANDBOX)
            assert world.left() == {}

    run(tmp_path, monkeypatch, test)


@pytest.mark.parametrize("undo", ["destroy", "teardown", "delete tap", "delete sandbox"])
@pytest.mark.parametrize("later", ["sweep", "restart"])
def test_a_start_whose_undo_fails_frees_its_name_and_is_undone_later(
    undo: str, later: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(world: World) -> None:
        world.faults = [Fault("configure", False, VmrtError("first")), Fault(undo, True, VmrtError("second"), left=1)]
        with pytest.raises(VmrtError, match="first"):
            await world.service.run_sandbox(SANDBOX)
        assert world.left()["sandbox records"]
        assert world.service.sandboxes() == []
        sandbox = await world.service.run_sandbox(SANDBOX)
        if later == "sweep":
            await recovery.sweep(world.table)
        else:
            await world.restart()
        assert world.left()["sandbox records"] == [sandbox]
        assert [*world.vm_host.vms] == [world.service.sandbox(sandbox).vm_id]
        with pytest.raises(AlreadyExistsError):
            await world.service.run_sandbox(SANDBOX)

    run(tmp_path, monkeypatch, test)


def test_one_of_two_starts_with_a_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        outcomes = await asyncio.gather(*(world.service.run_sandbox(SANDBOX) for _ in range(2)), return_exceptions=True)
        assert [type(o) for o in outcomes] == [str, AlreadyExistsError]

    run(tmp_path, monkeypatch, test)


@pytest.mark.parametrize("step", ["join", "configure"])
def test_a_vm_that_dies_during_the_start_is_no_ready_sandbox(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(world: World) -> None:
        world.gates[step] = asyncio.Event()
        call = asyncio.ensure_future(world.service.run_sandbox(SANDBOX))
        await world.reached(step)
        world.hypervisor.end(next(iter(world.vm_host.vms)))
        await asyncio.sleep(0.01)  # the event is told, to nobody
        world.gates.pop(step).set()
        with pytest.raises(VmrtError, match=r"VM|virtual machine|tap"):
            await call
        assert world.left() == {}

    run(tmp_path, monkeypatch, test)


def test_a_vm_that_dies_behind_the_last_answer_is_no_ready_sandbox(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(world: World) -> None:
        answer = sandbox_answer = world.table.hypervisor.list
        monkeypatch.setattr(world.hypervisor, "list", lambda: [] if "configure" in world.steps else sandbox_answer())
        with pytest.raises(VmGoneError, match="while the sandbox was being started"):
            await world.service.run_sandbox(SANDBOX)
        monkeypatch.setattr(world.hypervisor, "list", answer)
        assert world.left() == {}

    run(tmp_path, monkeypatch, test)


def test_the_sweep_leaves_a_starting_pod_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        stray = await world.service.run_sandbox(SANDBOX)
        live = world.table.sandboxes[stray]
        world.store.delete("sandbox", stray)
        del world.table.sandboxes[stray], world.table._sandbox_names[live.record.key]
        # The sweep is at the stray VM when a pod comes that it did not know when it began.
        world.gates["destroy"] = asyncio.Event()
        sweep = asyncio.ensure_future(recovery.sweep(world.table))
        await world.reached("destroy")
        world.gates["boot"] = asyncio.Event()
        world.steps.clear()
        call = asyncio.ensure_future(world.service.run_sandbox(replace(SANDBOX, name="other")))
        await world.reached("boot")
        world.gates.pop("destroy").set()
        await sweep
        starting = next(iter(world.table.sandboxes.values()))
        assert (tmp_path / "scratch" / f"{starting.record.vm_id}.img").exists()
        assert world.net_host.taps.keys() >= {starting.record.tap}
        world.gates.pop("boot").set()
        assert await call == starting.id
        assert [*world.vm_host.vms] == [starting.record.vm_id]
        assert [*world.net_host.pods] == [starting.id]

    run(tmp_path, monkeypatch, test)


def test_a_starting_sandbox_is_not_there_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        world.gates["boot"] = asyncio.Event()
        call = asyncio.ensure_future(world.service.run_sandbox(SANDBOX))
        await world.reached("boot")
        sandbox = next(iter(world.table.sandboxes))
        assert world.service.sandboxes() == []
        await world.service.stop_sandbox(sandbox)
        await world.service.remove_sandbox(sandbox)
        with pytest.raises(NotFoundError):
            world.service.sandbox(sandbox)
        world.gates.pop("boot").set()
        assert await call == sandbox

    run(tmp_path, monkeypatch, test)


# --- CreateContainer and StartContainer -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [*faults(CREATE_STEPS), *faults(["retain", "save container created"], cancel=False)],
    ids=str,
)
def test_a_spoiled_create_leaves_nothing(fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        sandbox = await world.service.run_sandbox(SANDBOX)
        before = world.left()
        await spoiled(world, fault, world.service.create_container(sandbox, CONTAINER))
        assert world.left() == before
        assert world.guest_of(sandbox).containers == {}
        container = await world.service.create_container(sandbox, CONTAINER)
        await world.service.start_container(container)
        assert world.service.container(container).state is ContainerState.RUNNING

    run(tmp_path, monkeypatch, test)


@pytest.mark.parametrize(
    "fault",
    [
        *faults(["agent create"]),
        *faults(["retain", "save container created"], cancel=False),
        Fault("save container creating", True, VmrtError("injected")),
    ],
    ids=str,
)
def test_a_spoiled_create_with_an_image_volume_leaves_nothing(
    fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(world: World) -> None:
        spec = replace(CONTAINER, mounts=(Mount("/data", readonly=True, image="volume"),))
        sandbox = await world.service.run_sandbox(SANDBOX)
        # Another one, which must keep what the spoiled one shares with it.
        other = await world.service.create_container(sandbox, replace(spec, name="other"))
        before = world.left()
        await spoiled(world, fault, world.service.create_container(sandbox, spec))
        assert world.left() == before
        assert [*world.guest_of(sandbox).containers] == [other]
        container = await world.service.create_container(sandbox, spec)
        await world.service.start_container(container)
        assert world.service.container(container).state is ContainerState.RUNNING

    run(tmp_path, monkeypatch, test)


def test_a_create_whose_undo_fails_frees_its_name_and_is_undone_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(world: World) -> None:
        sandbox = await world.service.run_sandbox(SANDBOX)
        world.faults = [
            Fault("agent create", False, VmrtError("first")),
            Fault("agent remove", True, VmrtError("second")),
        ]
        with pytest.raises(VmrtError, match="first"):
            await world.service.create_container(sandbox, CONTAINER)
        assert len(world.guest_of(sandbox).containers) == 1
        assert world.service.containers() == []
        container = await world.service.create_container(sandbox, CONTAINER)
        await recovery.sweep(world.table)
        assert [*world.guest_of(sandbox).containers] == [container] == world.left()["container records"]

    run(tmp_path, monkeypatch, test)


def test_a_broken_connection_is_tried_again_before_a_removal_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(world: World) -> None:
        sandbox, container = await world.started()
        world.faults = [Fault("agent remove", True, UnavailableError("broken"))]
        await world.service.remove_container(container)
        assert world.guest_of(sandbox).containers == {}

    run(tmp_path, monkeypatch, test)


@pytest.mark.parametrize("verb", ["stop_sandbox", "remove_sandbox"])
@pytest.mark.parametrize("step", CREATE_STEPS)
def test_a_create_that_meets_the_end_of_its_sandbox(
    verb: str, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(world: World) -> None:
        sandbox = await world.service.run_sandbox(SANDBOX)
        world.gates[step] = asyncio.Event()
        create = asyncio.ensure_future(world.service.create_container(sandbox, CONTAINER))
        await world.reached(step)
        end = asyncio.ensure_future(getattr(world.service, verb)(sandbox))
        await world.reached("teardown")
        world.gates.pop(step).set()
        with pytest.raises(VmGoneError):
            await create
        await end
        assert world.service.containers() == []
        assert world.left().keys() <= {"sandbox records", "sandboxes", "state"}

    run(tmp_path, monkeypatch, test)


def test_a_removal_during_the_create_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        sandbox = await world.service.run_sandbox(SANDBOX)
        world.gates["agent create"] = asyncio.Event()
        create = asyncio.ensure_future(world.service.create_container(sandbox, CONTAINER))
        await world.reached("agent create")
        remove = asyncio.ensure_future(world.service.remove_container(next(iter(world.table.containers))))
        await asyncio.sleep(0.01)
        assert not remove.done()
        world.gates.pop("agent create").set()
        await create
        await remove
        assert world.service.containers() == []
        assert world.guest_of(sandbox).containers == {}

    run(tmp_path, monkeypatch, test)


def test_the_exit_of_a_short_command_may_come_before_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(world: World) -> None:
        sandbox = await world.service.run_sandbox(SANDBOX)
        container = await world.service.create_container(sandbox, CONTAINER)
        world.gates["agent start"] = asyncio.Event()
        start = asyncio.ensure_future(world.service.start_container(container))
        await world.reached("agent start")
        world.guest_of(sandbox).exit(container, 3)
        await world.table.containers[container].exited.wait()
        world.gates.pop("agent start").set()
        await start
        record = world.service.container(container)
        assert (record.state, record.exit_code) == (ContainerState.EXITED, 3)
        assert record.created_ns <= record.started_ns <= record.finished_ns

    run(tmp_path, monkeypatch, test)


def test_a_cancelled_start_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        sandbox = await world.service.run_sandbox(SANDBOX)
        container = await world.service.create_container(sandbox, CONTAINER)
        await spoiled(world, Fault("agent start", True, None), world.service.start_container(container))
        assert world.service.container(container).state is ContainerState.RUNNING

    run(tmp_path, monkeypatch, test)


@pytest.mark.parametrize("fault", faults(["agent start"], cancel=False), ids=str)
def test_a_container_whose_start_failed_does_not_run(
    fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(world: World) -> None:
        sandbox = await world.service.run_sandbox(SANDBOX)
        container = await world.service.create_container(sandbox, CONTAINER)
        await spoiled(world, fault, world.service.start_container(container))
        record = world.service.container(container)
        assert (record.state, record.exit_code, record.reason) == (ContainerState.EXITED, 128, "StartError")
        assert world.guest_of(sandbox).containers[container].state == pb.ContainerInfo.EXITED
        with pytest.raises(FailedPreconditionError):
            await world.service.start_container(container)

    run(tmp_path, monkeypatch, test)


# --- StopPodSandbox, RemovePodSandbox, RemoveContainer ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "fault"),
    [
        *(("stop_sandbox", fault) for fault in faults(STOP_STEPS)),
        *(("remove_sandbox", fault) for fault in faults([*STOP_STEPS, "save sandbox removing", "release image"])),
    ],
    ids=str,
)
def test_a_spoiled_end_is_repeated_with_success(
    verb: str, fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(world: World) -> None:
        sandbox, container = await world.started()
        struck = replace(fault)
        world.faults = [struck]
        work = getattr(world.service, verb)
        if fault.error is None:
            with pytest.raises(asyncio.CancelledError):
                await world.call(work(sandbox))
        else:
            with pytest.raises(VmrtError if fault.step in ("destroy", "delete tap", "teardown") else type(fault.error)):
                await world.call(work(sandbox))
            await work(sandbox)
        assert struck.left == 0
        await work(sandbox)
        if verb == "stop_sandbox":
            assert world.service.sandbox(sandbox).state is SandboxState.NOT_READY
            assert world.service.container(container).state is ContainerState.EXITED
            assert world.left().keys() <= {
                "sandbox records",
                "container records",
                "sandboxes",
                "containers",
                "retained",
                "state",
            }
        else:
            assert world.left() == {}

    run(tmp_path, monkeypatch, test)


def test_a_guest_with_disks_of_the_host_is_shut_down_when_no_container_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(world: World) -> None:
        for disks in (False, True):
            sandbox = await world.service.run_sandbox(replace(SANDBOX, attempt=int(disks)))
            if disks:
                world.table.sandboxes[sandbox].blocks["b-1"] = ((7, 0), 1)
            world.steps.clear()
            await world.service.stop_sandbox(sandbox)
            assert ("shutdown" in world.steps) == disks

    run(tmp_path, monkeypatch, test)


def test_stops_publish_first_and_do_not_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        sandboxes = [await world.service.run_sandbox(replace(SANDBOX, uid=f"u{number}")) for number in range(12)]
        for step in ("destroy", "teardown"):
            world.gates[step] = asyncio.Event()
        stops = [asyncio.create_task(world.service.stop_sandbox(sandbox)) for sandbox in sandboxes]
        # Every stop is at both of its long steps at the same time.
        for step in ("destroy", "teardown"):
            while world.steps.count(step) < len(sandboxes):
                await asyncio.sleep(0)
        assert {record.state for record in world.service.sandboxes()} == {SandboxState.NOT_READY}
        world.gates.pop("destroy").set()
        for _ in range(200):
            await asyncio.sleep(0)
        assert not any(stop.done() for stop in stops), "the addresses are given back before a stop returns"
        world.gates.pop("teardown").set()
        await asyncio.gather(*stops)
        assert world.net_host.pods == {}

    run(tmp_path, monkeypatch, test)


def test_boots_take_turns_and_stops_take_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        running = await world.service.run_sandbox(SANDBOX)
        world.table.boots = asyncio.Semaphore(2)
        world.gates["boot"] = asyncio.Event()
        world.steps.clear()
        specs = [replace(SANDBOX, uid=f"u{number}") for number in range(5)]
        starts = [asyncio.create_task(world.service.run_sandbox(spec)) for spec in specs]
        for _ in range(500):
            await asyncio.sleep(0)
        assert world.steps.count("boot") == 2
        # One that waits can be given up, and leaves nothing; who waits keeps nobody else.
        starts[-1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await starts.pop()
        await world.service.remove_sandbox(running)
        world.gates.pop("boot").set()
        assert len(set(await asyncio.gather(*starts))) == 4
        assert len(world.vm_host.vms) == 4

    run(tmp_path, monkeypatch, test)


def test_an_unforeseen_failure_of_the_guest_does_not_keep_a_sandbox_from_stopping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(world: World) -> None:
        sandbox, container = await world.started()
        world.faults = [Fault("shutdown", True, VmrtError("it will not"))]
        await world.service.stop_sandbox(sandbox)
        record = world.service.container(container)
        assert (record.state, record.exit_code) == (ContainerState.EXITED, 137)
        assert world.vm_host.vms == {}

    run(tmp_path, monkeypatch, test)


@pytest.mark.parametrize(
    "fault",
    [
        *faults(["agent remove"]),
        *faults(["release image", "delete container", "save container removing"], cancel=False),
    ],
    ids=str,
)
def test_a_spoiled_removal_of_a_container_is_repeated_with_success(
    fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(world: World) -> None:
        sandbox, container = await world.started()
        await spoiled(world, fault, world.service.remove_container(container))
        await world.service.remove_container(container)
        assert world.guest_of(sandbox).containers == {}
        assert world.left().keys() & {"container records", "containers", "retained"} == set()
        assert await world.service.create_container(sandbox, CONTAINER)

    run(tmp_path, monkeypatch, test)


def test_removals_that_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        sandbox, container = await world.started()
        service = world.service
        await asyncio.gather(
            service.remove_container(container),
            service.stop_container(container, 5),
            service.remove_sandbox(sandbox),
            service.stop_sandbox(sandbox),
            service.remove_container(container),
            service.remove_sandbox(sandbox),
        )
        assert world.left() == {}

    run(tmp_path, monkeypatch, test)


def test_a_start_and_the_removal_of_the_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        sandbox = await world.service.run_sandbox(SANDBOX)
        container = await world.service.create_container(sandbox, CONTAINER)
        world.gates["agent start"] = asyncio.Event()
        start = asyncio.ensure_future(world.service.start_container(container))
        await world.reached("agent start")
        remove = asyncio.ensure_future(world.service.remove_sandbox(sandbox))
        await world.reached("teardown")
        world.gates.pop("agent start").set()
        with pytest.raises(VmGoneError):
            await start
        await remove
        assert world.left() == {}

    run(tmp_path, monkeypatch, test)


def test_the_end_of_a_vm_is_told_and_one_that_cannot_be_recorded_does_not_deafen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(world: World) -> None:
        first = await world.service.run_sandbox(SANDBOX)
        second = await world.service.run_sandbox(replace(SANDBOX, name="second"))
        container = await world.service.create_container(second, CONTAINER)
        world.faults = [Fault("save sandbox not-ready", True, VmrtError("disk full"))]
        world.hypervisor.end(world.service.sandbox(first).vm_id)
        world.hypervisor.end(world.service.sandbox(second).vm_id, VmEventKind.OOM_KILLED)
        await world.table.containers[container].exited.wait()
        assert world.service.sandbox(second).state is SandboxState.NOT_READY
        assert world.service.container(container).reason == "OOMKilled"
        assert world.service.sandbox(first).state is SandboxState.READY
        await recovery.sweep(world.table)
        assert world.service.sandbox(first).state is SandboxState.NOT_READY
        assert "gone" in world.service.sandbox(first).reason

    run(tmp_path, monkeypatch, test)


def test_a_daemon_that_stops_waits_for_the_undo_of_what_it_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(world: World) -> None:
        world.gates["boot"] = asyncio.Event()
        world.gates["teardown"] = asyncio.Event()
        call = asyncio.ensure_future(world.service.run_sandbox(SANDBOX))
        await world.reached("boot")
        call.cancel()
        await world.reached("teardown")
        close = asyncio.ensure_future(world.service.close())
        await asyncio.sleep(0.01)
        assert not close.done()
        world.gates.pop("teardown").set()
        await close
        assert world.left() == {}
        with pytest.raises(asyncio.CancelledError):
            await call
        with pytest.raises(UnavailableError):
            await world.service.run_sandbox(SANDBOX)

    run(tmp_path, monkeypatch, test)
