"""A world of fakes around `PodService`: what a host and its guests keep across daemons, with a fault at any step.

Every step of the drivers and of the agent goes through `World.step`, which can fail or cancel the call under test
before or after the step has had its effect. What a guest holds dies with its VM.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest

from tests.contract.fake_hypervisor import FakeHypervisor, FakeVmHost
from tests.contract.fake_network import FakeHost, FakeNetwork
from vmrt.agent import agent_pb2 as pb
from vmrt.agent_client import AgentClient
from vmrt.config import Config, HypervisorConfig, PoolConfig
from vmrt.errors import FailedPreconditionError, NotFoundError, UnavailableError, VmGoneError, VmrtError
from vmrt.model import ContainerSpec, Disk, GuestImage, Image, ImageConfig, LayerImage, PodNetwork, SandboxSpec, VmSpec
from vmrt.pods import pod_vm, recovery, scratch
from vmrt.pods.drivers import Connection, ImageStore
from vmrt.pods.service import PodService
from vmrt.pods.table import PodTable
from vmrt.store import Store

T = TypeVar("T")

GUEST = GuestImage("v1", 1, Path("/kernel"), None, Path("/rootfs"), "", "6.1")
SANDBOX = SandboxSpec(name="pod", uid="u", namespace="ns")
CONTAINER = ContainerSpec(name="c", image="image", command=("true",))


@dataclass
class Fault:
    """At `step`, `before` or after its effect: raise `error`, or cancel the call under test."""

    step: str
    before: bool
    error: Exception | None  # None cancels
    left: int = 1

    def __str__(self) -> str:
        what = "cancel" if self.error is None else type(self.error).__name__
        return f"{what} {'before' if self.before else 'after'} {self.step}"


@dataclass
class Guest:
    """What runs in one VM."""

    containers: dict[str, pb.ContainerInfo] = field(default_factory=dict)
    events: list[pb.Event] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    cpus: int = 1  # online
    used_bytes: int = 0
    updates: list[tuple[str, bytes]] = field(default_factory=list)

    def exit(self, container_id: str, code: int = 0, age_us: int = 0) -> None:
        """Let a container end."""
        info = self.containers[container_id]
        if info.state == pb.ContainerInfo.EXITED:
            return
        info.state = pb.ContainerInfo.EXITED
        info.exit.CopyFrom(pb.ExitFrame(code=code, age_us=age_us))
        event = pb.Event(sequence=len(self.events) + 1)
        event.exit.container_id = container_id
        event.exit.exit.CopyFrom(info.exit)
        self.events.append(event)
        self.changed.set()


class World:
    """The host. `service` and `table` are the present daemon's; `restart` makes another one, as after kill -9."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.vm_host = FakeVmHost()
        self.net_host = FakeHost()
        self.guests: dict[str, Guest] = {}
        self.layer = root / "layer"
        self.layer.write_bytes(b"")
        self.image_present = True
        self.faults: list[Fault] = []
        self.gates: dict[str, asyncio.Event] = {}
        self.steps: list[str] = []
        self.created: list[pb.CreateContainerRequest] = []  # what the agents were asked for
        self.hung = False
        self.frozen = False  # the daemon is dead: whatever its code still does has no effect
        self.victim: asyncio.Task[Any] | None = None
        self.daemons: list[PodService] = []
        self._opened: FaultyStore | None = None

    async def restart(self) -> None:
        """Start a daemon on what there is; the one before, if any, is dead without a word."""
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0)
        # Every step is counted here: nothing may happen in the background.
        self.config = Config(root=self.root, pool=PoolConfig(size=0), hypervisor=HypervisorConfig(share=False))
        if self._opened is not None:
            self._opened.close()  # as the kernel does for a dead daemon
        self.store = self._opened = FaultyStore(self)
        self.hypervisor = Hypervisor(self)
        self.network = Network(self)
        self.images = Images(self)
        self.table = PodTable(
            self.config, self.store, self.hypervisor, self.network, cast("ImageStore", self.images), lambda _: GUEST
        )
        self.service = PodService(self.table)
        await self.service.open()

    @contextlib.contextmanager
    def sync_step(self, name: str) -> Iterator[None]:
        """Run one step of code that does not await."""
        self._thaw()
        self.steps.append(name)
        self._strike(name, before=True)
        yield
        self._strike(name, before=False)

    @contextlib.asynccontextmanager
    async def step(self, name: str) -> AsyncIterator[None]:
        """Run one step, with its gate and its fault."""
        self._thaw()
        self.steps.append(name)
        self._strike(name, before=True)
        await asyncio.sleep(0)
        yield
        if gate := self.gates.get(name):
            await gate.wait()
        self._strike(name, before=False)
        await asyncio.sleep(0)

    def _thaw(self) -> None:
        if self.frozen:
            raise VmrtError("the daemon is dead")

    def _strike(self, name: str, *, before: bool) -> None:
        for fault in self.faults:
            if fault.step == name and fault.before is before and fault.left:
                fault.left -= 1
                if fault.error is not None:
                    raise fault.error
                assert self.victim is not None
                self.victim.cancel()

    async def call(self, work: Awaitable[T]) -> T:
        """Make the call that faults of kind "cancel" cancel."""
        self.victim = asyncio.ensure_future(work)
        return await cast("asyncio.Task[T]", self.victim)

    async def reached(self, step: str) -> None:
        """Wait until a step has begun."""
        async with asyncio.timeout(5):
            while step not in self.steps:
                await asyncio.sleep(0)
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    def left(self) -> dict[str, object]:
        """What exists of any sandbox or container, by kind; empty when nothing does."""
        everything = {
            "vms": [*self.vm_host.vms],
            "taps": [*self.net_host.taps],
            "networks": [*self.net_host.pods],
            "scratch": [p.name for p in (self.root / "scratch").glob("*.img")],
            "state": [p.name for p in (self.root / "pods").glob("*")],
            "sandbox records": self.store.ids("sandbox"),
            "container records": self.store.ids("container"),
            "retained": dict(self.images.retained),
            "sandboxes": [*self.table.sandboxes],
            "containers": [*self.table.containers],
        }
        return {kind: found for kind, found in everything.items() if found}

    def guest_of(self, sandbox_id: str) -> Guest:
        """The guest of a sandbox."""
        return self.guests[self.table.sandboxes[sandbox_id].record.vm_id]

    async def started(self) -> tuple[str, str]:
        """Run a sandbox with one running container."""
        sandbox = await self.service.run_sandbox(SANDBOX)
        container = await self.service.create_container(sandbox, CONTAINER)
        await self.service.start_container(container)
        return sandbox, container


class FaultyStore(Store):
    def __init__(self, world: World) -> None:
        super().__init__(world.root / "state.db")
        self._world = world

    def put(self, kind: str, record_id: str, record: object) -> None:
        with self._world.sync_step(f"save {kind} {record.state.value}"):  # type: ignore[attr-defined]
            super().put(kind, record_id, record)

    def delete(self, kind: str, record_id: str) -> None:
        with self._world.sync_step(f"delete {kind}"):
            super().delete(kind, record_id)

    def ids(self, kind: str) -> list[str]:
        return [row[0] for row in self._db.execute("SELECT id FROM records WHERE kind = ?", (kind,))]


class Hypervisor(FakeHypervisor):
    def __init__(self, world: World) -> None:
        super().__init__(world.vm_host)
        self._world = world

    async def boot(self, spec: VmSpec) -> None:
        async with self._world.step("boot"):
            await super().boot(spec)
            self._world.guests[spec.vm_id] = Guest()

    async def destroy(self, vm_id: str) -> None:
        async with self._world.step("destroy"):
            await super().destroy(vm_id)

    async def attach_disk(self, vm_id: str, disk: Disk) -> None:
        async with self._world.step("attach"):
            await super().attach_disk(vm_id, disk)

    async def detach_disk(self, vm_id: str, serial: str) -> None:
        async with self._world.step("detach"):
            await super().detach_disk(vm_id, serial)

    async def attach_nic(self, vm_id: str, tap: str, mac: str) -> None:
        async with self._world.step("attach nic"):
            await super().attach_nic(vm_id, tap, mac)

    async def dial(self, vm_id: str, port: int, *, timeout_s: float = 5.0) -> Connection:
        raise AssertionError("the fake agent has no connections")


class Network(FakeNetwork):
    def __init__(self, world: World) -> None:
        super().__init__(world.net_host)
        self._world = world

    async def create_tap(self, name: str) -> None:
        async with self._world.step("tap" if len(name) == len(pod_vm.tap_of("0" * 12)) else "extra tap"):
            await super().create_tap(name)

    async def delete_taps(self, names: Sequence[str]) -> None:
        async with self._world.step("delete tap"):
            await super().delete_taps(names)

    async def setup(self, sandbox_id: str, spec: SandboxSpec, *, device_mac: str) -> PodNetwork:
        async with self._world.step("setup"):
            return await super().setup(sandbox_id, spec, device_mac=device_mac)

    async def join(self, sandbox_id: str, tap: str, interface: str = "") -> None:
        async with self._world.step("extra join" if interface else "join"):
            await super().join(sandbox_id, tap, interface)

    async def teardown(self, sandbox_id: str) -> None:
        async with self._world.step("teardown"):
            await super().teardown(sandbox_id)


class Images:
    """Images of one layer each; what is retained is forgotten by a restart, as the real store does."""

    KNOWN = ("image", "volume")

    def __init__(self, world: World) -> None:
        self._world = world
        self.retained: dict[str, set[str]] = {}

    def get(self, reference: str) -> Image | None:
        if reference not in self.KNOWN or not self._world.image_present:
            return None
        digit = f"{self.KNOWN.index(reference):x}"
        layer = LayerImage("sha256:" + digit + "a" * 63, self._world.layer, 1)
        return Image("sha256:" + digit + "b" * 63, (reference,), (), 1, ImageConfig(), (layer,))

    def retain(self, image_id: str, user: str) -> None:
        with self._world.sync_step("retain"):
            if not self._world.image_present:
                raise NotFoundError("no such image")
            self.retained.setdefault(user, set()).add(image_id)

    def release(self, user: str) -> None:
        with self._world.sync_step("release image"):
            self.retained.pop(user, None)


class Agent:
    """`AgentClient`, as far as these tests go."""

    def __init__(self, world: World, vm_id: str) -> None:
        self._world = world
        self._vm_id = vm_id
        self._closed = asyncio.Event()

    @contextlib.asynccontextmanager
    async def _call(self, name: str) -> AsyncIterator[Guest]:
        """A call that is in flight when the VM or the client goes fails; its effect in the guest stays."""
        self._alive()
        if self._world.hung:
            raise UnavailableError("it does not answer")
        async with self._world.step(name):
            self._alive()
            yield self._world.guests[self._vm_id]
        self._alive()

    def _alive(self) -> None:
        if self._closed.is_set() or self._vm_id not in self._world.vm_host.vms:
            raise VmGoneError("the VM is gone")

    async def close(self) -> None:
        self._closed.set()
        if self._vm_id in self._world.guests:
            self._world.guests[self._vm_id].changed.set()

    async def check(self) -> pb.CheckResponse:
        async with self._call("check"):
            return pb.CheckResponse(protocol=1)

    async def configure_sandbox(self, request: pb.ConfigureSandboxRequest, *, timeout_s: float) -> None:
        async with self._call("configure"):
            pass

    async def create_container(
        self, request: pb.CreateContainerRequest, *, timeout_s: float
    ) -> pb.CreateContainerResponse:
        async with self._call("agent create") as guest:
            self._world.created.append(request)
            guest.containers[request.container_id] = pb.ContainerInfo(
                container_id=request.container_id, state=pb.ContainerInfo.CREATED
            )
        return pb.CreateContainerResponse(uid=1)

    async def start_container(self, container_id: str, *, timeout_s: float) -> None:
        async with self._call("agent start") as guest:
            info = guest.containers[container_id]
            if info.state != pb.ContainerInfo.CREATED:
                raise FailedPreconditionError("not created")
            info.state = pb.ContainerInfo.RUNNING

    async def signal_container(self, container_id: str, number: int, everyone: bool = False) -> None:
        async with self._call("agent signal") as guest:
            if container_id not in guest.containers:
                raise NotFoundError("no such container")
            guest.exit(container_id, 128 + number)

    async def remove_container(self, container_id: str) -> None:
        async with self._call("agent remove") as guest:
            if container_id in guest.containers:
                guest.exit(container_id, 137)
                del guest.containers[container_id]

    async def list_containers(self) -> pb.ListContainersResponse:
        async with self._call("agent list") as guest:
            return pb.ListContainersResponse(containers=guest.containers.values())

    async def release_volume(self, name: str, *, timeout_s: float) -> None:
        async with self._call("release volume"):
            pass

    async def release_disk(self, serial: str, *, timeout_s: float) -> None:
        async with self._call("release disk"):
            pass

    async def set_cpus(self, online: int, *, timeout_s: float = 30.0) -> None:
        async with self._call("agent cpus") as guest:
            guest.cpus = online

    async def container_stats(self, container_ids: Sequence[str] = ()) -> pb.ContainerStatsResponse:
        async with self._call("agent stats") as guest:
            used = pb.ContainerStat(memory_working_set_bytes=guest.used_bytes)
            return pb.ContainerStatsResponse(sandbox=pb.SandboxStat(usage=used))

    async def update_container(self, container_id: str, oci_resources: bytes) -> None:
        async with self._call("agent update") as guest:
            guest.updates.append((container_id, oci_resources))

    async def shutdown(self, *, timeout_s: float) -> None:
        async with self._call("shutdown") as guest:
            for container_id in guest.containers:
                guest.exit(container_id, 137)

    async def events(self, after: int = 0) -> AsyncIterator[pb.Event]:
        while True:
            self._alive()
            if self._world.hung:
                raise UnavailableError("it does not answer")
            guest = self._world.guests[self._vm_id]
            for event in guest.events[after:]:
                after = event.sequence
                yield event
            guest.changed.clear()
            await guest.changed.wait()


async def make_disk(root: Path, vm_id: str, size_bytes: int, owner: str, *, world: World) -> Path:
    """`scratch.make` without mkfs."""
    async with world.step("scratch"):
        path = scratch.path(root, vm_id)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
        return path


def use(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the fakes that the service does not take as arguments in their places."""

    async def make(root: Path, vm_id: str, size_bytes: int, owner: str) -> Path:
        return await make_disk(root, vm_id, size_bytes, owner, world=world)

    def agent(dial: Callable[..., object], vm_id: str) -> AgentClient:
        return cast("AgentClient", Agent(world, vm_id))

    monkeypatch.setattr(scratch, "make", make)
    monkeypatch.setattr(pod_vm, "AgentClient", agent)
    monkeypatch.setattr(recovery, "_ADOPT_PAUSE_S", 0.0)


def faults(steps: Sequence[str], *, cancel: bool = True) -> list[Fault]:
    """Every fault at these steps: our errors, unforeseen ones, and cancellation, before and after the effect."""
    kinds: list[Exception | None] = [VmrtError("injected"), RuntimeError("injected")]
    return [
        Fault(step, before, error)
        for step in steps
        for before in (True, False)
        for error in ([*kinds, None] if cancel else kinds)
    ]
