"""The pods room's front: what the gRPC edge calls. Each verb has a file of its own; this one only finds and delegates.

Cancellation: a create that is cancelled is rolled back; a start, a removal, and the stop of a sandbox go on to their
end, since half of them serves nobody; a cancelled StopContainer kills nothing that its grace period still protects.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vmrt import __version__
from vmrt.errors import FailedPreconditionError, UnavailableError, VmGoneError, VmrtError
from vmrt.model import ContainerSpec, LinuxResources, SandboxSpec
from vmrt.pods import (
    block_devices,
    container_create,
    container_exec,
    container_stop,
    recovery,
    resize,
    sandbox_run,
    sandbox_stop,
)
from vmrt.pods.cancellation import uncancelled
from vmrt.pods.container_events import follow_vms
from vmrt.pods.container_exec import ExecResult
from vmrt.pods.lifecycle import Event
from vmrt.pods.records import ContainerRecord, ContainerState, SandboxRecord, SandboxState
from vmrt.pods.stats import Figures, Stats
from vmrt.pods.table import LiveSandbox, PodTable

log = logging.getLogger(__name__)

# How long a stop of the daemon waits for the undos of calls that it has cancelled; recovery would do the rest.
_CLOSE_S = 30.0


@dataclass(frozen=True, slots=True)
class RuntimeStatus:
    """CRI's two conditions, each with a CamelCase reason and a message; `info` has JSON values."""

    runtime_ready: bool
    runtime_reason: str
    runtime_message: str
    network_ready: bool
    network_reason: str
    network_message: str
    info: dict[str, str] = field(default_factory=dict)


class PodService:
    """Sandboxes and containers. Methods raise `VmrtError`; `NotFoundError` for an id that is not known."""

    def __init__(self, table: PodTable) -> None:
        self._table = table
        self._stats = Stats(table)
        self._closing = False
        self._working = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def open(self) -> None:
        """Recover what an earlier daemon left, then follow events. Drivers must be open."""
        table = self._table
        table.background(follow_vms(table), "VM events")
        await recovery.recover(table)
        table.background(recovery.sweep_forever(table), "sweep")
        table.background(block_devices.follow_sizes(table), "sizes of block devices")
        table.pool.start()

    async def close(self) -> None:
        """Refuse new pods and let go of the running ones; they go on without us, the warm pool does not."""
        self._closing = True
        try:
            async with asyncio.timeout(_CLOSE_S):
                await self._idle.wait()
        except TimeoutError:
            log.warning("%d calls have not ended; the next start settles what they leave", self._working)
        await self._table.pool.close()
        await self._table.close()

    @contextlib.contextmanager
    def _verb(self) -> Iterator[None]:
        """Count a call that changes something: the drivers it undoes with must stay open until its end."""
        if self._closing:
            raise UnavailableError("the daemon is stopping")
        self._working += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._working -= 1
            if not self._working:
                self._idle.set()

    def _started(self, sandbox_id: str) -> LiveSandbox | None:
        """Return a sandbox whose start has come to its end; one half-way is its starter's to undo."""
        live = self._table.sandboxes.get(sandbox_id)
        return None if live is None or live.record.state is SandboxState.CREATING else live

    # --- sandboxes ---

    async def run_sandbox(self, spec: SandboxSpec) -> str:
        """Start a sandbox and return its id; it is ready then, or nothing of it is left."""
        with self._verb():
            return await sandbox_run.run_sandbox(self._table, spec)

    async def stop_sandbox(self, sandbox_id: str) -> None:
        """Stop the containers and release VM and network; one that does not exist is no error."""
        live = self._started(sandbox_id)
        if live is not None:
            with self._verb():
                await uncancelled(sandbox_stop.stop_sandbox(self._table, live))

    async def remove_sandbox(self, sandbox_id: str) -> None:
        """Remove sandbox and containers by force; one that does not exist is no error."""
        live = self._started(sandbox_id)
        if live is not None:
            with self._verb():
                await uncancelled(sandbox_stop.remove_sandbox(self._table, live))

    @property
    def generation(self) -> int:
        """A number that changes with every change of a record."""
        return self._table.generation

    def sandbox(self, sandbox_id: str) -> SandboxRecord:
        """Find by id or unique prefix. From memory."""
        return self._table.sandbox(sandbox_id).record

    def sandboxes(self) -> Sequence[SandboxRecord]:
        """Return all records, oldest first. From memory."""
        return sorted(self._table.listed_sandboxes(), key=lambda r: r.created_ns)

    # --- containers ---

    async def create_container(self, sandbox_id: str, spec: ContainerSpec) -> str:
        """Create a container in a ready sandbox and return its id."""
        with self._verb():
            return await container_create.create_container(self._table, self._table.sandbox(sandbox_id), spec)

    async def start_container(self, container_id: str) -> None:
        """Start a created container."""
        live = self._table.container(container_id)
        with self._verb():
            await uncancelled(container_create.start_container(self._table, live))

    async def stop_container(self, container_id: str, timeout_s: float) -> None:
        """Send the stop signal, after `timeout_s` SIGKILL; return when it has ended. Absent is no error."""
        live = self._table.containers.get(container_id)
        if live is not None:
            with self._verb():
                await container_stop.stop_container(self._table, live, timeout_s)

    async def remove_container(self, container_id: str) -> None:
        """Remove by force; absent is no error."""
        live = self._table.containers.get(container_id)
        if live is not None:
            with self._verb():
                await uncancelled(container_stop.remove_container(self._table, live))

    def container(self, container_id: str) -> ContainerRecord:
        """Find by id or unique prefix. From memory."""
        return self._table.container(container_id).record

    def containers(self) -> Sequence[ContainerRecord]:
        """Return all records, oldest first. From memory."""
        return sorted(self._table.listed_containers(), key=lambda r: r.created_ns)

    async def exec_sync(self, container_id: str, args: Sequence[str], timeout_s: float) -> ExecResult:
        """Run a command to its end; 0 is no limit, else `DeadlineError` after `timeout_s` with the command killed."""
        return await container_exec.exec_sync(self._table, self._table.container(container_id), args, timeout_s)

    async def reopen_log(self, container_id: str) -> None:
        """Go over to a new log file; on return it exists and the old one gets no more octets."""
        live = self._table.container(container_id)
        if live.record.state is not ContainerState.RUNNING:
            raise FailedPreconditionError(
                f"the container is {live.record.state.value}, only a running one's log can be reopened",
                resource=f"container {live.id}",
            )
        if live.pump is not None:
            live.pump.reopen()

    async def update_container(self, container_id: str, change: LinuxResources) -> None:
        """Change limits, all or nothing; what `change` does not set stays."""
        await resize.update_container(self._table, self._table.container(container_id), change)

    async def update_sandbox(
        self, sandbox_id: str, overhead: LinuxResources | None, resources: LinuxResources | None
    ) -> None:
        """Take a pod's new sums; `ExhaustedError` when its VM is too small for them."""
        await resize.update_sandbox(self._table, self._table.sandbox(sandbox_id), overhead, resources)

    # --- figures and events ---

    async def figures(self, sandbox_ids: Iterable[str]) -> dict[str, Figures]:
        """Return what sandboxes use, at most a second old, or the last that was heard of one whose VM is gone."""
        return await self._stats.of(sandbox_ids)

    @property
    def writable_layers(self) -> Path:
        """The directory on the host whose file system holds the containers' writable layers."""
        return self._table.config.root

    def events(self) -> AsyncIterator[Event]:
        """Yield what happens to sandboxes and containers from now on."""
        return self._table.lifecycle.subscribe()

    # --- the runtime itself ---

    async def status(self) -> RuntimeStatus:
        """Say whether pods can be run."""
        table = self._table
        ready, reason, message = True, "", ""
        try:
            guest = table.guest(table.handler("")[0])
            guest_info = {"version": guest.version, "kernel": guest.kernel_release}
        except VmrtError as e:
            ready, reason, message, guest_info = False, "GuestImageNotReady", str(e), {}
        network = await table.network.status()
        config = {
            "vmrt": __version__,
            "root": str(table.config.root),
            "stateDir": str(table.config.root),
            "accelerator": table.hypervisor.accelerator,
            "guest": guest_info,
            "handlers": list(table.config.handlers),
            "pool": {"size": table.config.pool.size, "waiting": table.pool.waiting()},
        }
        return RuntimeStatus(ready, reason, message, *network, info={"config": json.dumps(config)})

    async def set_pod_ranges(self, cidrs: Sequence[str]) -> None:
        """Remember the node's pod CIDRs."""
        await self._table.network.set_pod_ranges(cidrs)

    async def sandbox_info(self, sandbox_id: str) -> dict[str, str]:
        """Return details for a person, JSON values: the VM, its processes, phase timings, the console's end."""
        table = self._table
        record = table.sandbox(sandbox_id).record
        vm: dict[str, object] = {
            "id": record.vm_id,
            "accelerator": table.hypervisor.accelerator,
            "guestVersion": record.guest_version,
            "running": record.vm_id in table.hypervisor.list(),
            "pids": [],
            "tap": record.tap,
        }
        console = ""
        # A dead VM has no processes, a destroyed one no console: people ask about such pods more than about others.
        with contextlib.suppress(VmGoneError):
            console = table.hypervisor.console_tail(record.vm_id)
            vm["pids"] = [p.pid for p in table.hypervisor.processes(record.vm_id)]
        agent = table.sandbox(sandbox_id).agent
        if agent is not None:
            try:
                async with asyncio.timeout(2):
                    check = await agent.check()
                vm |= {"kernel": check.kernel_release, "vcpus": check.vcpus, "memoryBytes": check.memory_bytes}
            except (VmrtError, TimeoutError) as e:
                vm["agent"] = f"does not answer: {e}"
        return {
            "vm": json.dumps(vm),
            "phasesMs": json.dumps(record.phases_ms),
            "reason": json.dumps(record.reason),
            "console": json.dumps(console),
        }

    async def container_info(self, container_id: str) -> dict[str, str]:
        """Return details for a person, JSON values."""
        record = self._table.container(container_id).record
        return {
            "sandboxID": json.dumps(record.sandbox_id),
            "layers": json.dumps(record.layer_serials),
            "user": json.dumps({"uid": record.uid, "gid": record.gid, "groups": record.supplemental_groups}),
        }
