"""The table of live pods: records in memory and on disk, the drivers, and what belongs to a running pod.

Rules: a record is written before the side effect that it announces; reads (List, Status) touch this table only, never a
VM; verbs on one sandbox or container hold its lock, verbs on different ones never wait for each other.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import secrets
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from vmrt.agent_client import AgentClient
from vmrt.config import Config, HandlerConfig
from vmrt.errors import AlreadyExistsError, InvalidArgumentError, NotFoundError, VmGoneError
from vmrt.model import GuestImage
from vmrt.pods import lifecycle
from vmrt.pods.drivers import Hypervisor, ImageStore, Network
from vmrt.pods.log_pump import LogPump
from vmrt.pods.mirrors import Mirrors
from vmrt.pods.pool import Pool
from vmrt.pods.records import ContainerRecord, ContainerState, SandboxRecord, SandboxState
from vmrt.store import Store

log = logging.getLogger(__name__)

T = TypeVar("T")

_HIDDEN_SANDBOXES = (SandboxState.CREATING, SandboxState.REMOVING)
_LIVING = (ContainerState.CREATING, ContainerState.CREATED, ContainerState.RUNNING)
_HIDDEN_CONTAINERS = (ContainerState.CREATING, ContainerState.REMOVING)


@dataclass(slots=True, eq=False)
class LiveSandbox:
    """A sandbox's record and what runs for it in this daemon."""

    record: SandboxRecord
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    # Who changes the VM's size; the innermost lock, since a container's update may come to it while it holds its own.
    size_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    # Who changes how the host treats the VM (vmrt/pods/cpusets.py, oom_scores.py).
    confine_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    # What the VM's processes have, as far as this daemon has set it (vmrt/pods/oom_scores.py).
    oom_score_adj: int | None = None
    agent: AgentClient | None = None
    events: asyncio.Task[None] | None = None
    # Layer disks by serial: a future that ends when the disk is in the VM.
    disks: dict[str, asyncio.Future[None]] = field(default_factory=dict)
    # Host block devices in the VM, by serial: their number, and the size that the guest knows. Plugged and unplugged
    # under the lock.
    blocks: dict[str, tuple[tuple[int, int], int]] = field(default_factory=dict)
    block_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    # A start whose undo did not succeed: its name is free, and the sweep comes back for the rest.
    undo_failed: bool = False

    @property
    def id(self) -> str:
        """The sandbox's id."""
        return self.record.id

    def need_agent(self) -> AgentClient:
        """Return the agent's client, or fail fast when the VM is gone."""
        if self.agent is None or self.record.state is not SandboxState.READY:
            raise VmGoneError(
                f"the sandbox is not ready ({self.record.reason or self.record.state.value})",
                resource=f"sandbox {self.id}",
            )
        return self.agent


@dataclass(slots=True, eq=False)
class LiveContainer:
    """A container's record and what runs for it in this daemon."""

    record: ContainerRecord
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    exited: asyncio.Event = field(default_factory=asyncio.Event)
    pump: LogPump | None = None
    # When its start was asked for: its exit may be told before the answer to that.
    starting_ns: int = 0
    # (exit code, reason, when in ns) as the agent told it; recorded once the log is whole.
    ended: tuple[int, str, int] | None = None
    # A creation whose undo did not succeed: its name is free, and the sweep comes back for the rest.
    undo_failed: bool = False

    @property
    def id(self) -> str:
        """The container's id."""
        return self.record.id

    @property
    def counts(self) -> bool:
        """Whether its limits count for its pod's VM: it is made or being made, and neither ended nor given up."""
        return self.record.state in _LIVING and not self.undo_failed


class PodTable:
    """All live sandboxes and containers, with the drivers that act on them."""

    def __init__(
        self,
        config: Config,
        store: Store,
        hypervisor: Hypervisor,
        network: Network,
        images: ImageStore,
        guest: Callable[[str], GuestImage],
    ) -> None:
        """`guest` loads the guest image of a handler by name; called for every boot, so an update needs no restart."""
        self.config = config
        self.store = store
        self.hypervisor = hypervisor
        self.network = network
        self.images = images
        self.guest = guest
        self.instance = instance_tag(config.root)
        self.sandboxes: dict[str, LiveSandbox] = {}
        self.containers: dict[str, LiveContainer] = {}
        # Counts the changes of records, so that answers made of them can be kept until the next one.
        self.generation = 0
        # Booting is the processors' work: more at once would only make each of them late, up to its deadline.
        self.boots = asyncio.Semaphore(config.hypervisor.boots_at_once or 2 * (os.cpu_count() or 1))
        self.lifecycle = lifecycle.Lifecycle()
        self._sandbox_names: dict[str, str] = {}
        self.pool = Pool(self)
        self.mirrors = Mirrors(config.volumes.mirror_limit_bytes)
        self._background: set[asyncio.Task[Any]] = set()

    # --- names and ids ---

    def new_vm_id(self) -> str:
        """Return a fresh VM id: 4 hex digits of the instance, 8 random ones."""
        return self.instance[:4] + secrets.token_hex(4)

    def handler(self, name: str) -> tuple[str, HandlerConfig]:
        """Return a handler by its RuntimeClass name; "" is the default, the first one configured."""
        handlers = self.config.handlers
        if not name:
            return next(iter(handlers.items()))
        if name not in handlers:
            raise InvalidArgumentError(
                f"unknown runtime_handler {name!r}", hint=f"configured: {', '.join(handlers)}; see [handlers] in config"
            )
        return name, handlers[name]

    def sandbox(self, sandbox_id: str) -> LiveSandbox:
        """Find a listed sandbox by id or unique id prefix."""
        return self._find(self.sandboxes, sandbox_id, "sandbox", lambda s: s.record.state not in _HIDDEN_SANDBOXES)

    def container(self, container_id: str) -> LiveContainer:
        """Find a listed container by id or unique id prefix."""
        return self._find(self.containers, container_id, "container", self._listed)

    @staticmethod
    def _find(table: dict[str, T], wanted: str, kind: str, listed: Callable[[T], bool]) -> T:
        found = table.get(wanted)
        if found is None and wanted:
            matches = [value for key, value in table.items() if key.startswith(wanted) and listed(value)]
            if len(matches) > 1:
                raise InvalidArgumentError(f"{kind} id {wanted!r} is ambiguous: {len(matches)} begin with it")
            found = matches[0] if matches else None
        if found is None or not listed(found):
            raise NotFoundError(f"no {kind} with id {wanted!r}")
        return found

    @staticmethod
    def _listed(container: LiveContainer) -> bool:
        return container.record.state not in _HIDDEN_CONTAINERS

    def listed_sandboxes(self) -> list[SandboxRecord]:
        """Return the records that clients may see."""
        return [s.record for s in self.sandboxes.values() if s.record.state not in _HIDDEN_SANDBOXES]

    def listed_containers(self) -> list[ContainerRecord]:
        """Return the records that clients may see."""
        return [c.record for c in self.containers.values() if self._listed(c)]

    def containers_of(self, sandbox_id: str) -> list[LiveContainer]:
        """Return a sandbox's containers, whatever their state."""
        return [c for c in self.containers.values() if c.record.sandbox_id == sandbox_id]

    def sandbox_of_vm(self, vm_id: str) -> LiveSandbox | None:
        """Return the sandbox that a VM belongs to."""
        return next((s for s in self.sandboxes.values() if s.record.vm_id == vm_id), None)

    # --- records ---

    def add_sandbox(self, record: SandboxRecord, *, recorded: bool = False) -> LiveSandbox:
        """Reserve the name and write the record; `AlreadyExistsError` when the name is taken.

        `recorded` is for what an earlier daemon wrote: it is taken as it is, and a start that was interrupted has no
        claim to its name.
        """
        if not recorded:
            holder = self._sandbox_names.get(record.key)
            if holder is not None:
                raise AlreadyExistsError(f"the sandbox name {record.key!r} is taken", resource=f"sandbox {holder}")
            self.store.put("sandbox", record.id, record)
        live = self.sandboxes[record.id] = LiveSandbox(record)
        self.generation += 1
        if recorded and record.state is SandboxState.CREATING:
            live.undo_failed = True
        else:
            self._sandbox_names.setdefault(record.key, record.id)
        return live

    def abandon_sandbox(self, live: LiveSandbox) -> None:
        """Leave a start that could not be undone yet to the sweep; the name may be used again."""
        live.undo_failed = True
        if self._sandbox_names.get(live.record.key) == live.id:
            del self._sandbox_names[live.record.key]

    def save_sandbox(self, live: LiveSandbox, record: SandboxRecord) -> None:
        """Write a sandbox's new record, then show it."""
        self.store.put("sandbox", record.id, record)
        changes = lifecycle.sandbox_changes(live.record.state, record.state)
        live.record = record
        self.generation += 1
        self._tell(live.id, changes, live.id)

    def forget_sandbox(self, live: LiveSandbox) -> None:
        """Drop a sandbox whose resources are gone."""
        self.mirrors.forget(live.id)
        self.store.delete("sandbox", live.id)
        self.sandboxes.pop(live.id, None)
        self.generation += 1
        if self._sandbox_names.get(live.record.key) == live.id:
            del self._sandbox_names[live.record.key]
        if live.record.state is SandboxState.REMOVING:
            self.lifecycle.publish(live.id, (lifecycle.Change.DELETED,), lambda: (live.record, ()))

    def add_container(self, record: ContainerRecord, *, recorded: bool = False) -> LiveContainer:
        """Reserve the name within its sandbox and write the record; `AlreadyExistsError` when the name is taken."""
        if not recorded:
            for other in self.containers_of(record.sandbox_id):
                if other.record.key == record.key and not other.undo_failed:
                    raise AlreadyExistsError(
                        f"the container name {record.key!r} is taken", resource=f"container {other.id}"
                    )
            self.store.put("container", record.id, record)
        live = self.containers[record.id] = LiveContainer(record)
        self.generation += 1
        live.undo_failed = recorded and record.state is ContainerState.CREATING
        if record.state in (ContainerState.EXITED, ContainerState.UNKNOWN):
            live.exited.set()
        return live

    def save_container(self, live: LiveContainer, record: ContainerRecord) -> None:
        """Write a container's new record, then show it."""
        self.store.put("container", record.id, record)
        changes = lifecycle.container_changes(live.record.state, record.state)
        live.record = record
        self.generation += 1
        self._tell(live.id, changes, record.sandbox_id)
        if record.state not in (ContainerState.CREATING, ContainerState.CREATED, ContainerState.RUNNING):
            live.exited.set()

    def forget_container(self, live: LiveContainer) -> None:
        """Drop a container whose resources are gone."""
        self.store.delete("container", live.id)
        self.containers.pop(live.id, None)
        self.generation += 1
        if live.record.state is ContainerState.REMOVING:
            self._tell(live.id, (lifecycle.Change.DELETED,), live.record.sandbox_id)

    def _tell(self, subject: str, changes: Sequence[lifecycle.Change], sandbox_id: str) -> None:
        def picture() -> tuple[SandboxRecord | None, list[ContainerRecord]]:
            sandbox = self.sandboxes.get(sandbox_id)
            containers = [c.record for c in self.containers_of(sandbox_id) if self._listed(c)]
            return (None if sandbox is None else sandbox.record), containers

        self.lifecycle.publish(subject, changes, picture)

    # --- background work ---

    def background(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run something on; its failure is logged, never lost."""
        task = asyncio.create_task(work, name=name)
        self._background.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("background work %s failed: %s", task.get_name(), error, exc_info=error)

    async def close(self) -> None:
        """Stop what runs in this daemon for the pods; the pods themselves go on."""
        for task in list(self._background):
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self.mirrors.close()
        stops = [c.pump.stop() for c in self.containers.values() if c.pump is not None]
        closes = [s.agent.close() for s in self.sandboxes.values() if s.agent is not None]
        for outcome in [
            *await asyncio.gather(*stops, return_exceptions=True),
            *await asyncio.gather(*closes, return_exceptions=True),
        ]:
            if isinstance(outcome, Exception):
                log.error("closing: %s", outcome, exc_info=outcome)


def instance_tag(root: Path) -> str:
    """Return 8 hex digits that tell the daemons of one machine apart: a hash of the root's real path."""
    return hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:8]
