"""The warm pool over the drivers' fakes: claims, refilling, deaths, restarts."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from tests.contract.fake_hypervisor import FakeHypervisor, FakeVmHost
from tests.contract.fake_network import FakeHost, FakeNetwork
from vmrt.agent import agent_pb2 as pb
from vmrt.agent import layout, status, ttrpc
from vmrt.config import Config, HandlerConfig, HypervisorConfig, PoolConfig
from vmrt.errors import AlreadyExistsError, ExhaustedError, VmError
from vmrt.model import GuestImage, LinuxResources, SandboxSpec
from vmrt.pods import pool, recovery, scratch
from vmrt.pods.container_events import follow_vms
from vmrt.pods.pool import Pool, PoolRecord
from vmrt.pods.records import SandboxState
from vmrt.pods.sandbox_run import run_sandbox
from vmrt.pods.table import PodTable
from vmrt.store import Store

GIB = 1024**3


class Machine:
    """What outlives a daemon, and how a daemon is started on it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.vms = FakeVmHost(ports=(layout.CALL_PORT, layout.STREAM_PORT), agent=self.answer)
        self.network = FakeHost()
        self.configured: dict[str, pb.ConfigureSandboxRequest] = {}
        self.rehearsed: list[str] = []
        self.stage = asyncio.Event()  # rehearsals end
        self.stage.set()
        self.refusals: list[int] = []  # the codes of the next ones
        self.guest_version = "1"
        self.available = 64 * GIB
        self.hung: set[str] = set()

    async def answer(self, vm_id: str, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Be the agent: Check and ConfigureSandbox, and event streams on which nothing happens."""
        if port != layout.CALL_PORT:
            await reader.read()
            return
        decoder = ttrpc.ServerDecoder()
        while data := await reader.read(65536):
            for message in decoder.feed(data):
                if vm_id in self.hung:
                    continue
                call = ttrpc.parse_request(message)
                payload = pb.CheckResponse(protocol=layout.PROTOCOL_VERSION).SerializeToString()
                if call.method == "Rehearse":
                    self.rehearsed.append(vm_id)
                    await self.stage.wait()
                    payload = b""
                    if self.refusals:
                        writer.write(ttrpc.failure(message.stream_id, self.refusals.pop(), "left behind"))
                        continue
                if call.method == "ConfigureSandbox":
                    request = pb.ConfigureSandboxRequest.FromString(call.payload)
                    assert vm_id not in self.configured, "a guest is configured once"
                    self.configured[vm_id] = request
                    payload = b""
                writer.write(ttrpc.response(message.stream_id, payload))
                await writer.drain()

    def guest(self, handler: str) -> GuestImage:
        return GuestImage(self.guest_version, 1, Path("k"), None, Path("r"), "", "6.1")

    @contextlib.asynccontextmanager
    async def daemon(self, *, graceful: bool = True, **changes: Any) -> AsyncIterator[PodTable]:
        """Run the pods room; `graceful=False` leaves as a killed daemon does."""
        config = dataclasses.replace(
            Config(root=self.root, hypervisor=HypervisorConfig(scratch_bytes=64 * 1024**2, share=False)), **changes
        )
        store = Store(self.root / "state.db")
        hypervisor, network = FakeHypervisor(self.vms), FakeNetwork(self.network)
        table = PodTable(config, store, hypervisor, network, cast(Any, None), self.guest)
        table.pool = Pool(table, available=lambda: self.available)
        table.background(follow_vms(table), "events")
        await recovery.recover(table)
        table.pool.start()
        try:
            yield table
        finally:
            if graceful:
                await table.pool.close()
            for vm in table.pool._waiting:
                await vm.agent.close()
            await table.close()
            await hypervisor.close()
            store.close()


def sandbox(name: str = "p", *, memory: int = 0, handler: str = "") -> SandboxSpec:
    resources = LinuxResources(memory_limit_bytes=memory) if memory else None
    return SandboxSpec(name=name, uid=name, namespace="n", resources=resources, runtime_handler=handler)


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def hypervisor(table: PodTable) -> FakeHypervisor:
    return cast(FakeHypervisor, table.hypervisor)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    async def make(root: Path, vm_id: str, size_bytes: int, owner: str) -> Path:
        path = scratch.path(root, vm_id)
        path.parent.mkdir(exist_ok=True)
        path.touch()
        return path

    # mkfs.ext4 is the end-to-end tests' business.
    monkeypatch.setattr(scratch, "make", make)
    monkeypatch.setattr(pool, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(pool, "_SETTLE_S", 0.01)
    return Machine(tmp_path)


async def test_a_pod_takes_the_waiting_vm_and_another_one_is_booted(machine: Machine) -> None:
    async with machine.daemon() as table:
        await until(lambda: table.pool.waiting() == 1)
        (waiting,) = table.pool.vm_ids()
        first = table.sandboxes[await run_sandbox(table, sandbox())]
        assert first.record.vm_id == waiting
        assert first.record.state is SandboxState.READY
        assert machine.configured[waiting].sandbox_id == first.id
        # The guest finds its NIC by the address it was booted with.
        assert machine.configured[waiting].interfaces[0].device_mac == machine.vms.vms[waiting].spec.mac
        assert machine.network.taps[machine.vms.vms[waiting].spec.tap] == first.id
        await until(lambda: table.pool.waiting() == 1)
        second = table.sandboxes[await run_sandbox(table, sandbox("q"))]
        assert second.record.vm_id != waiting
        assert all(vm.spec.background for vm in machine.vms.vms.values())


async def test_a_vm_is_offered_after_its_rehearsal_only(machine: Machine) -> None:
    machine.stage.clear()
    async with machine.daemon() as table:
        await until(lambda: machine.rehearsed)
        (vm_id,) = machine.rehearsed
        cold = table.sandboxes[await run_sandbox(table, sandbox())]
        assert cold.record.vm_id != vm_id
        machine.stage.set()
        await until(lambda: table.pool.waiting() == 1)
        warm = table.sandboxes[await run_sandbox(table, sandbox("q"))]
        assert warm.record.vm_id == vm_id
        # A pod's own VM has no time for it.
        assert cold.record.vm_id not in machine.rehearsed


async def test_a_vm_whose_rehearsal_leaves_something_serves_nobody(machine: Machine) -> None:
    machine.refusals = [status.INTERNAL]
    async with machine.daemon() as table:
        await until(lambda: table.pool.waiting() == 1)
        bad, good = machine.rehearsed
        assert table.pool.vm_ids() == {good}
        assert bad not in machine.vms.vms


async def test_a_guest_that_knows_no_rehearsal_is_taken_without(machine: Machine) -> None:
    machine.refusals = [status.UNIMPLEMENTED]
    async with machine.daemon() as table:
        await until(lambda: table.pool.waiting() == 1)
        assert table.pool.vm_ids() == set(machine.rehearsed)


async def test_without_a_pool_nothing_is_booted_ahead(machine: Machine) -> None:
    async with machine.daemon(pool=PoolConfig(size=0)) as table:
        live = table.sandboxes[await run_sandbox(table, sandbox())]
        await asyncio.sleep(0.05)
        assert list(machine.vms.vms) == [live.record.vm_id]
        assert not machine.vms.vms[live.record.vm_id].spec.background


async def test_a_waiting_vm_is_enlarged_for_a_larger_pod(machine: Machine) -> None:
    async with machine.daemon() as table:
        await until(lambda: table.pool.waiting() == 1)
        (waiting,) = table.pool.vm_ids()
        large = table.sandboxes[await run_sandbox(table, sandbox("large", memory=600 * 1024**2))]
        assert large.record.vm_id == waiting
        assert large.record.memory_bytes == 742 * 1024**2
        assert machine.vms.vms[waiting].spec.memory_bytes == 742 * 1024**2
        assert "plug" in large.record.phases_ms
        await until(lambda: table.pool.waiting() == 1)
        small = table.sandboxes[await run_sandbox(table, sandbox("small", memory=64 * 1024**2))]
        assert small.record.memory_bytes == 512 * 1024**2
        assert "plug" not in small.record.phases_ms


async def test_a_pod_starts_not_at_all_when_its_vm_cannot_be_enlarged(machine: Machine) -> None:
    async with machine.daemon() as table:
        await until(lambda: table.pool.waiting() == 1)
        (waiting,) = table.pool.vm_ids()
        hypervisor(table).failures["resize"] = [VmError("the guest did not plug memory")]
        with pytest.raises(VmError, match="did not plug"):
            await run_sandbox(table, sandbox("large", memory=600 * 1024**2))
        assert not table.sandboxes
        assert waiting not in machine.vms.vms


async def test_a_vm_that_cannot_grow_serves_no_larger_pod(machine: Machine) -> None:
    async with machine.daemon() as table:
        await until(lambda: table.pool.waiting() == 1)
        (vm,) = table.pool._waiting
        # As a version left it that could not enlarge VMs.
        old = dataclasses.replace(vm.record, max_vcpus=0, max_memory_bytes=0)
        table.pool._waiting[:] = [dataclasses.replace(vm, record=old)]
        large = table.sandboxes[await run_sandbox(table, sandbox("large", memory=600 * 1024**2))]
        assert large.record.vm_id != old.vm_id
        small = table.sandboxes[await run_sandbox(table, sandbox("small"))]
        assert small.record.vm_id == old.vm_id


async def test_handlers_do_not_share(machine: Machine) -> None:
    handlers = {"vm": HandlerConfig(), "other": HandlerConfig()}
    async with machine.daemon(handlers=handlers) as table:
        await until(lambda: table.pool.waiting() == 2)
        records = {r.handler: r.vm_id for r in table.store.load("pool", PoolRecord)}
        other = table.sandboxes[await run_sandbox(table, sandbox(handler="other"))]
        assert other.record.vm_id == records["other"]
        assert records["vm"] in table.pool.vm_ids()


async def test_a_new_guest_image_replaces_the_waiting_vm(machine: Machine) -> None:
    async with machine.daemon() as table:
        await until(lambda: table.pool.waiting() == 1)
        (old,) = table.pool.vm_ids()
        machine.guest_version = "2"
        live = table.sandboxes[await run_sandbox(table, sandbox())]
        assert live.record.vm_id != old
        assert live.record.guest_version == "2"
        await until(lambda: old not in machine.vms.vms and table.pool.waiting() == 1)
        assert {r.guest_version for r in table.store.load("pool", PoolRecord)} == {"2"}


async def test_a_vm_that_dies_while_it_waits_is_replaced(machine: Machine) -> None:
    async with machine.daemon() as table:
        await until(lambda: table.pool.waiting() == 1)
        (dead,) = table.pool.vm_ids()
        hypervisor(table).end(dead)
        # Before its end is told: it is not handed out either.
        live = table.sandboxes[await run_sandbox(table, sandbox())]
        assert live.record.vm_id != dead
        await until(lambda: table.pool.waiting() == 1 and dead not in table.pool.vm_ids())
        assert not scratch.path(machine.root, dead).exists()
        assert f"vt{dead}" not in machine.network.taps


async def test_a_vm_that_does_not_answer_while_it_waits_is_replaced(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pool, "_LOOK_AGAIN_S", 0.05)
    # From the start: a question may be under way when its VM falls silent.
    monkeypatch.setattr(pool, "_PROBE_TIMEOUT_S", 3.0)
    async with machine.daemon(pool=PoolConfig(size=2)) as table:
        await until(lambda: table.pool.waiting() == 2)
        hung, well = sorted(table.pool.vm_ids())
        await asyncio.sleep(0.2)
        assert table.pool.vm_ids() == {hung, well}
        machine.hung.add(hung)
        await until(lambda: hung not in table.pool.vm_ids() and table.pool.waiting() == 2)
        assert well in table.pool.vm_ids()
        assert hung not in machine.vms.vms
    assert "does not answer while it waits" in caplog.text


async def test_a_taken_name_costs_no_vm(machine: Machine) -> None:
    async with machine.daemon() as table:
        await until(lambda: table.pool.waiting() == 1)
        await run_sandbox(table, sandbox())
        await until(lambda: table.pool.waiting() == 1)
        waiting = table.pool.vm_ids()
        with pytest.raises(AlreadyExistsError):
            await run_sandbox(table, sandbox())
        assert table.pool.vm_ids() == waiting


async def test_a_failed_start_destroys_the_claimed_vm(machine: Machine) -> None:
    async with machine.daemon() as table:
        await until(lambda: table.pool.waiting() == 1)
        (waiting,) = table.pool.vm_ids()
        cast(FakeNetwork, table.network).failures["join"] = [VmError("scripted")]
        with pytest.raises(VmError, match="scripted"):
            await run_sandbox(table, sandbox())
        assert waiting not in machine.vms.vms
        assert not table.sandboxes
        await until(lambda: table.pool.waiting() == 1)


async def test_a_claim_that_cannot_be_recorded_leaves_neither_vm_nor_name(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with machine.daemon() as table:
        await until(lambda: table.pool.waiting() == 1)
        (waiting,) = table.pool.vm_ids()
        delete = table.store.delete

        def full(kind: str, key: str) -> None:
            if kind == "pool":
                raise ExhaustedError("scripted: the disk is full")
            delete(kind, key)

        with monkeypatch.context() as patch, pytest.raises(ExhaustedError):
            patch.setattr(table.store, "delete", full)
            await run_sandbox(table, sandbox())
        assert waiting not in machine.vms.vms
        assert not table.sandboxes
        await until(lambda: table.pool.waiting() == 1)
        await run_sandbox(table, sandbox())


async def test_boots_that_fail_are_tried_again_and_leave_nothing(machine: Machine) -> None:
    async with machine.daemon(pool=PoolConfig(size=0)) as table:
        table.config = dataclasses.replace(table.config, pool=PoolConfig(size=1))
        hypervisor(table).failures["boot"] = [VmError("one"), VmError("two")]
        table.pool.start()
        await until(lambda: table.pool.waiting() == 1)
        assert [call[0] for call in hypervisor(table).calls].count("boot") == 3
        assert {f"vt{vm_id}" for vm_id in table.pool.vm_ids()} == set(machine.network.taps)
        assert set(scratch.vm_ids(machine.root)) == table.pool.vm_ids()


async def test_no_vm_is_booted_ahead_while_memory_is_short(machine: Machine) -> None:
    machine.available = 1 * GIB
    async with machine.daemon() as table:
        await asyncio.sleep(0.1)
        assert not machine.vms.vms
        machine.available = 64 * GIB
        await until(lambda: table.pool.waiting() == 1)


async def test_refilling_waits_while_a_pod_is_being_started(machine: Machine) -> None:
    async with machine.daemon() as table:
        await until(lambda: table.pool.waiting() == 1)
        network = cast(FakeNetwork, table.network)
        network.gate.clear()
        start = asyncio.create_task(run_sandbox(table, sandbox()))
        await until(lambda: table.pool.waiting() == 0)
        await asyncio.sleep(0.05)
        assert len(machine.vms.vms) == 1
        network.gate.set()
        await start
        await until(lambda: table.pool.waiting() == 1)


@pytest.mark.parametrize("limit_s", [1000.0, 0.05])
async def test_refilling_leaves_a_pod_that_was_just_started_alone_but_not_for_ever(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, limit_s: float
) -> None:
    monkeypatch.setattr(pool, "_SETTLE_S", 1000.0)
    monkeypatch.setattr(pool, "_QUIET_LIMIT_S", limit_s)
    async with machine.daemon() as table:
        await until(lambda: table.pool.waiting() == 1)  # nothing has been started yet
        await run_sandbox(table, sandbox())
        if limit_s < 1:
            await until(lambda: table.pool.waiting() == 1)
        else:
            await asyncio.sleep(0.1)
            assert len(machine.vms.vms) == 1


async def test_a_daemon_that_stops_takes_the_waiting_vms_away(machine: Machine) -> None:
    async with machine.daemon() as table:
        await until(lambda: table.pool.waiting() == 1)
        live = table.sandboxes[await run_sandbox(table, sandbox())]
        await until(lambda: table.pool.waiting() == 1)
    assert list(machine.vms.vms) == [live.record.vm_id]
    assert list(machine.network.taps) == [live.record.tap]
    assert scratch.vm_ids(machine.root) == [live.record.vm_id]


async def test_stopping_undoes_a_boot_that_is_under_way(machine: Machine) -> None:
    async with machine.daemon() as table:
        hypervisor(table).gate.clear()
        await until(lambda: table.pool.vm_ids())
    assert not machine.vms.vms
    assert not machine.network.taps
    store = Store(machine.root / "state.db")
    assert store.load("pool", PoolRecord) == []
    store.close()


async def test_the_next_daemon_uses_what_a_killed_one_left(machine: Machine) -> None:
    async with machine.daemon(graceful=False) as table:
        await until(lambda: table.pool.waiting() == 1)
        waiting = table.pool.vm_ids()
    async with machine.daemon() as table:
        assert table.pool.vm_ids() == waiting
        live = table.sandboxes[await run_sandbox(table, sandbox())]
        assert {live.record.vm_id} == waiting


@pytest.mark.parametrize("change", ["outdated", "settings", "off", "half-made", "dead"])
async def test_the_next_daemon_removes_what_it_cannot_use(machine: Machine, change: str) -> None:
    async with machine.daemon(graceful=False) as table:
        await until(lambda: table.pool.waiting() == 1)
        (old,) = table.pool.vm_ids()
        if change == "half-made":
            (record,) = table.store.load("pool", PoolRecord)
            table.store.put("pool", old, dataclasses.replace(record, ready=False))
    if change == "outdated":
        machine.guest_version = "2"
    if change == "dead":
        del machine.vms.vms[old]
    changes: dict[str, Any] = {"pool": PoolConfig(size=0 if change == "off" else 1)}
    if change == "settings":
        changes["hypervisor"] = HypervisorConfig(scratch_bytes=128 * 1024**2, share=False)
    async with machine.daemon(**changes) as table:
        assert old not in table.pool.vm_ids()
        assert old not in machine.vms.vms
        assert old not in scratch.vm_ids(machine.root)
        assert f"vt{old}" not in machine.network.taps


async def test_a_vm_claimed_just_before_the_kill_stays_the_sandboxs(machine: Machine) -> None:
    async with machine.daemon(graceful=False) as table:
        await until(lambda: table.pool.waiting() == 1)
        (record,) = table.store.load("pool", PoolRecord)
        live = table.sandboxes[await run_sandbox(table, sandbox())]
        # As if the daemon had died between the sandbox's record and the end of the claim.
        table.store.put("pool", record.vm_id, record)
    async with machine.daemon() as table:
        assert table.sandboxes[live.id].record.state is SandboxState.READY
        assert record.vm_id in machine.vms.vms
        assert record.vm_id not in table.pool.vm_ids()


async def test_the_sweep_leaves_the_pool_alone(machine: Machine) -> None:
    async with machine.daemon() as table:
        await until(lambda: table.pool.waiting() == 1)
        await recovery.sweep(table)
        assert set(machine.vms.vms) == table.pool.vm_ids()
        assert set(scratch.vm_ids(machine.root)) == table.pool.vm_ids()
