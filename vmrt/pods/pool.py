"""The warm pool: VMs booted ahead, up to their agent's ready notice, that wait for a pod.

A pool VM has what every pod's VM has: its vsock and agent connection, its scratch disk, a NIC on an open tap. Its guest
has done once, and undone, what the first pod would be the first to do there (vmrt/agent/rehearsal.py). What
makes it one pod's (addresses, hostname, machine id, clock, random seed) comes with ConfigureSandbox, as for a cold one.

Rules:
- one VM serves one pod, ever: a claim deletes the pool's record of it, and nothing puts a VM back;
- a pod gets a VM of its own handler and of the handler's present guest image, one that is as large as it needs or can
  be enlarged to that; a pod that needs still more boots cold;
- a claim neither waits nor fails: it is a look into memory. Recovery tells a claimed VM from a waiting one by the
  sandbox's record, which is written before the pool's is deleted;
- refilling is background work: one VM at a time, at low priority, when no pod is being started or was a moment ago, and
  the host has memory to spare;
- one that no longer answers, found by a look at each every minute, is replaced: a pod would wait for it in vain;
- VMs that wait survive the daemon's death and are adopted; a daemon that is told to stop takes them away, since nobody
  would use them.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vmrt.agent_client import AgentClient
from vmrt.config import HypervisorConfig
from vmrt.errors import UnimplementedError, VmrtError
from vmrt.model import GuestImage, VmSpec
from vmrt.pods import pod_vm, sizing

if TYPE_CHECKING:
    from vmrt.pods.table import PodTable

log = logging.getLogger(__name__)

# Pauses after a VM that could not be booted, and while memory is short: doubled up to the limit.
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0
# Look again even when nobody calls: a new guest image makes no noise.
_LOOK_AGAIN_S = 60.0
# A pod's containers are made right after it, and a booting VM would take their processor.
_SETTLE_S = 3.0
# An unbroken stream of starts must not keep the pool empty for ever.
_QUIET_LIMIT_S = 30.0
_ADOPT_TIMEOUT_S = 5.0
# Seconds of an emulated guest, many on a busy machine; nobody waits for it.
_REHEARSAL_TIMEOUT_S = 120.0
# Long: a host that boots many VMs keeps a healthy guest from its turn for seconds.
_PROBE_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class PoolRecord:
    """One VM of the pool, on disk before it is made. `ready` is False until it has booted."""

    vm_id: str
    handler: str
    guest_version: str
    vcpus: int
    memory_bytes: int
    tap: str
    mac: str
    created_ns: int
    ready: bool = False
    # What `hypervisor` of the configuration was when it was made: "" by a version that did not keep it.
    settings: str = ""
    # What it can be enlarged to; 0 in a record of a version that could not.
    max_vcpus: int = 0
    max_memory_bytes: int = 0

    def reaches(self, vcpus: int, memory_bytes: int) -> bool:
        """Say whether it has this size, or can be given it."""
        most = max(self.vcpus, self.max_vcpus), max(self.memory_bytes, self.max_memory_bytes)
        return most[0] >= vcpus and most[1] >= memory_bytes


@dataclass(frozen=True, slots=True)
class Kind:
    """What the VMs of one handler are like at present."""

    handler: str
    guest: GuestImage
    vcpus: int
    memory_bytes: int
    settings: str

    def covers(self, record: PoolRecord) -> bool:
        """Say whether a VM is of this kind."""
        mine = (self.handler, self.guest.version, self.vcpus, self.memory_bytes, self.settings)
        return mine == (record.handler, record.guest_version, record.vcpus, record.memory_bytes, record.settings)


@dataclass(frozen=True, slots=True)
class WaitingVm:
    """A VM that can be claimed."""

    record: PoolRecord
    agent: AgentClient


def settings_tag(config: HypervisorConfig) -> str:
    """Return a hash of what a VM is made by: one that was made by other settings serves no pod of ours."""
    return hashlib.sha256(repr(config).encode()).hexdigest()[:16]


def available_bytes() -> int:
    """Return what the host can give without swapping: MemAvailable of proc_meminfo(5)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


class Pool:
    """The VMs that wait, oldest first. `size` of them are kept for each handler."""

    def __init__(self, table: PodTable, *, available: Callable[[], int] = available_bytes) -> None:
        self._table = table
        self._available = available
        self._waiting: list[WaitingVm] = []
        # Being booted or taken away: not to be claimed, and not to be swept either.
        self._busy: set[str] = set()
        self._wake = asyncio.Event()
        self._starts = 0
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._settled_at = 0.0
        self._task: asyncio.Task[None] | None = None

    def vm_ids(self) -> set[str]:
        """Return every VM that is the pool's: waiting, being booted, being taken away."""
        return {vm.record.vm_id for vm in self._waiting} | self._busy

    def waiting(self) -> int:
        """Return how many VMs can be claimed."""
        return len(self._waiting)

    # --- claims -------------------------------------------------------------------------------------------------------

    def find(self, handler: str, guest_version: str, vcpus: int, memory_bytes: int) -> WaitingVm | None:
        """Return a VM that fits or can be made to, without claiming it; call `claim` before anything is awaited."""
        alive = set(self._table.hypervisor.list())
        for vm in self._waiting:
            record = vm.record
            if (
                (record.handler, record.guest_version) == (handler, guest_version)
                and record.reaches(vcpus, memory_bytes)
                and record.vm_id in alive
            ):
                return vm
        self._wake.set()
        return None

    def claim(self, vm: WaitingVm) -> None:
        """Hand a VM over to a sandbox whose record, naming it, has been written."""
        self._waiting.remove(vm)
        self._wake.set()
        self._table.store.delete("pool", vm.record.vm_id)

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Keep refilling out of the way while a pod is being started."""
        self._starts += 1
        self._quiet.clear()
        try:
            yield
        finally:
            self._starts -= 1
            if self._starts == 0:
                self._quiet.set()
                self._settled_at = time.monotonic() + _SETTLE_S

    # --- life ---------------------------------------------------------------------------------------------------------

    async def adopt(self) -> None:
        """Take over the VMs that an earlier daemon left waiting; what is half-made, dead or outdated goes.

        Sandboxes' records must be loaded.
        """
        claimed = {live.record.vm_id for live in self._table.sandboxes.values()}
        for record in self._table.store.load("pool", PoolRecord):
            if record.vm_id in claimed:
                # Killed between the sandbox's record and the end of the claim.
                self._table.store.delete("pool", record.vm_id)
            elif not await self._adopted(record):
                await self._discard(record)

    async def _adopted(self, record: PoolRecord) -> bool:
        if not record.ready or not self._room_for(record) or record.vm_id not in self._table.hypervisor.list():
            return False
        try:
            async with asyncio.timeout(_ADOPT_TIMEOUT_S):
                agent = await _connected(self._table, record.vm_id)
        except (VmrtError, TimeoutError) as e:
            log.warning("pool: VM %s does not answer after the restart, it is replaced: %s", record.vm_id, e)
            return False
        self._waiting.append(WaitingVm(record, agent))
        log.info("pool: VM %s waits on", record.vm_id)
        return True

    def _room_for(self, record: PoolRecord) -> bool:
        try:
            kind = next(kind for kind in self._kinds() if kind.covers(record))
        except (StopIteration, VmrtError):
            return False
        return sum(kind.covers(vm.record) for vm in self._waiting) < self._table.config.pool.size

    def start(self) -> None:
        """Begin to keep the pool full."""
        if self._table.config.pool.size > 0:
            self._task = self._table.background(self._keep_full(), "pool")

    async def close(self) -> None:
        """Stop refilling and take the waiting VMs away."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        results = await asyncio.gather(*(self._drop(vm) for vm in list(self._waiting)), return_exceptions=True)
        for error in results:
            if isinstance(error, BaseException):
                log.error("pool: %s", error)

    def vm_ended(self, vm_id: str) -> None:
        """Replace a VM that ended while it waited; another VM's end is not the pool's business."""
        for vm in self._waiting:
            if vm.record.vm_id == vm_id:
                log.warning("pool: VM %s ended while it waited, it is replaced", vm_id)
                self._table.background(self._drop(vm), f"pool {vm_id}")
                self._wake.set()

    # --- refilling ----------------------------------------------------------------------------------------------------

    def _kinds(self) -> list[Kind]:
        config = self._table.config
        settings = settings_tag(config.hypervisor)
        return [
            Kind(name, self._table.guest(name), *sizing.unasked(config.hypervisor, handler), settings)
            for name, handler in config.handlers.items()
        ]

    async def _keep_full(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_QUIET_LIMIT_S):
                    await self._settled()
            try:
                kinds = self._kinds()
                await self._drop_outdated(kinds)
                missing = self._missing(kinds)
                if missing is None:
                    pause_s = _FIRST_PAUSE_S
                    try:
                        async with asyncio.timeout(_LOOK_AGAIN_S):
                            await self._wake.wait()
                    except TimeoutError:
                        await self._drop_silent()
                    continue
                if self._available() >= missing.memory_bytes + self._table.config.pool.reserve_bytes:
                    await self._add(missing)
                    pause_s = _FIRST_PAUSE_S
                    continue
                log.info("pool: the host is short of memory, no VM is booted ahead for %g s", pause_s)
            except VmrtError as e:
                log.warning("pool: no VM could be booted ahead, next try in %g s: %s", pause_s, e)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _settled(self) -> None:
        """Wait until no pod is being started, nor has been a moment ago."""
        while True:
            await self._quiet.wait()
            left_s = self._settled_at - time.monotonic()
            if left_s <= 0 and self._quiet.is_set():
                return
            await asyncio.sleep(max(0.0, left_s))

    def _missing(self, kinds: list[Kind]) -> Kind | None:
        """Return the kind that most VMs are missing of."""
        have = {kind.handler: sum(kind.covers(vm.record) for vm in self._waiting) for kind in kinds}
        scarce = min(kinds, key=lambda kind: have[kind.handler])
        return scarce if have[scarce.handler] < self._table.config.pool.size else None

    async def _drop_outdated(self, kinds: list[Kind]) -> None:
        for vm in list(self._waiting):
            if not any(kind.covers(vm.record) for kind in kinds):
                log.info("pool: VM %s is of an earlier guest image, it is replaced", vm.record.vm_id)
                await self._drop(vm)

    async def _drop_silent(self) -> None:
        """Replace the VMs whose agents do not answer: a guest that hangs does not end, so no event tells of it."""
        for vm in list(self._waiting):
            try:
                await vm.agent.check(timeout_s=_PROBE_TIMEOUT_S)
            except VmrtError as e:
                if vm in self._waiting:
                    log.warning("pool: VM %s does not answer while it waits, it is replaced: %s", vm.record.vm_id, e)
                    await self._drop(vm)

    async def _add(self, kind: Kind) -> None:
        table = self._table
        vm_id = table.new_vm_id()
        max_vcpus, max_memory_bytes = sizing.reach(kind.vcpus, kind.memory_bytes, table.config.hypervisor)
        record = PoolRecord(
            vm_id=vm_id,
            handler=kind.handler,
            guest_version=kind.guest.version,
            vcpus=kind.vcpus,
            memory_bytes=kind.memory_bytes,
            tap=pod_vm.tap_of(vm_id),
            mac=pod_vm.device_mac(),
            created_ns=time.time_ns(),
            settings=kind.settings,
            max_vcpus=max_vcpus,
            max_memory_bytes=max_memory_bytes,
        )
        spec = VmSpec(
            vm_id=vm_id,
            guest=kind.guest,
            vcpus=kind.vcpus,
            memory_bytes=kind.memory_bytes,
            tap=record.tap,
            mac=record.mac,
            background=True,
            cgroup_parent=table.config.pool.cgroup_parent,
            max_vcpus=max_vcpus,
            max_memory_bytes=max_memory_bytes,
        )
        began = time.monotonic()
        self._busy.add(vm_id)
        try:
            table.store.put("pool", vm_id, record)
            try:
                async with table.boots:
                    await pod_vm.make(table.config, table.hypervisor, table.network, spec, _untimed)
                agent = await _connected(table, vm_id)
                await _rehearse(agent, record)
                ready = replace(record, ready=True)
                table.store.put("pool", vm_id, ready)
            except BaseException:
                # To the end also when we are cancelled: that is the daemon's stop.
                await asyncio.shield(asyncio.ensure_future(self._discard(record)))
                raise
            self._waiting.append(WaitingVm(ready, agent))
        finally:
            self._busy.discard(vm_id)
        log.info("pool: VM %s waits for a pod of %s after %.1f s", vm_id, kind.handler, time.monotonic() - began)

    async def _drop(self, vm: WaitingVm) -> None:
        if vm in self._waiting:
            self._waiting.remove(vm)
            self._busy.add(vm.record.vm_id)
            try:
                await vm.agent.close()
                await self._discard(vm.record)
            finally:
                self._busy.discard(vm.record.vm_id)

    async def _discard(self, record: PoolRecord) -> None:
        """Take a VM away. When that fails the record stays, and so the next daemon tries again."""
        table = self._table
        try:
            await pod_vm.unmake(table.config.root, table.hypervisor, table.network, record.vm_id, record.tap)
        except VmrtError as e:
            log.error("pool: VM %s: %s", record.vm_id, e)
        else:
            table.store.delete("pool", record.vm_id)


async def _rehearse(agent: AgentClient, record: PoolRecord) -> None:
    try:
        await agent.rehearse(timeout_s=_REHEARSAL_TIMEOUT_S)
    except UnimplementedError:
        log.info("pool: guest image %s cannot rehearse, its first pods start slower", record.guest_version)
    except BaseException:
        await agent.close()
        raise


def _untimed(_phase: str) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


async def _connected(table: PodTable, vm_id: str) -> AgentClient:
    agent = pod_vm.agent_of(table.hypervisor, vm_id)
    try:
        await agent.check()
    except BaseException:
        await agent.close()
        raise
    return agent
