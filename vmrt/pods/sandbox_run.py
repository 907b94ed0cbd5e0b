"""RunPodSandbox: a VM and a network, made side by side and joined; all of it or nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeVar

from vmrt.agent import agent_pb2 as pb
from vmrt.agent_client import AgentClient
from vmrt.config import MAX_EXTRA_NICS
from vmrt.errors import DeadlineError, UnavailableError, UnsupportedError, VmError, VmGoneError, VmrtError
from vmrt.model import DnsConfig, NamespaceMode, NamespaceOptions, PodNetwork, SandboxSpec, VmSpec
from vmrt.pods import cpusets, pod_vm, resize, resolv, scratch, sizing
from vmrt.pods.cancellation import uncancelled
from vmrt.pods.container_events import watch
from vmrt.pods.records import SandboxRecord, SandboxState
from vmrt.pods.release import release, remove_state, state_dir
from vmrt.pods.table import LiveSandbox, PodTable

log = logging.getLogger(__name__)

T = TypeVar("T")

SHM_BYTES = 64 * 1024**2
CONFIGURE_TIMEOUT_S = 30.0
_CONSOLE_SETTLE_S = 0.2
_CONSOLE_BYTES = 4096


@dataclass(slots=True)
class Phases:
    """How long each part of a start took, in milliseconds, for `vmrt inspect`."""

    ms: dict[str, float] = field(default_factory=dict)
    _began: float = field(default_factory=time.monotonic)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time one part."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.ms[name] = round((time.monotonic() - began) * 1000, 3)

    def finish(self) -> dict[str, float]:
        """Return all parts, with the total since construction."""
        self.ms["total"] = round((time.monotonic() - self._began) * 1000, 3)
        return self.ms


async def run_sandbox(table: PodTable, spec: SandboxSpec) -> str:
    """Start a sandbox and return its id; READY, with its addresses known. On any failure nothing is left."""
    handler_name, handler = table.handler(spec.runtime_handler)
    guest = table.guest(handler_name)
    if spec.resources is not None:
        cpusets.require_present(spec.resources, "config.linux.resources")
    vcpus, memory_bytes = sizing.size(spec, table.config.hypervisor, handler)
    phases = Phases()
    sandbox_id = secrets.token_hex(32)
    # Nothing is awaited from here to the claim, so the VM found is still there.
    pooled = table.pool.find(handler_name, guest.version, vcpus, memory_bytes)
    vm_id = table.new_vm_id() if pooled is None else pooled.record.vm_id
    # What a VM of the pool has more than is needed stays; what it has less is plugged.
    has = (vcpus, memory_bytes) if pooled is None else (pooled.record.vcpus, pooled.record.memory_bytes)
    live = table.add_sandbox(
        SandboxRecord(
            id=sandbox_id,
            spec=spec,
            state=SandboxState.CREATING,
            created_ns=time.time_ns(),
            vm_id=vm_id,
            tap=pod_vm.tap_of(vm_id),
            guest_version=guest.version,
            vcpus=has[0],
            memory_bytes=has[1],
        )
    )
    try:
        if pooled is not None:
            live.agent = pooled.agent
            table.pool.claim(pooled)
        with table.pool.starting():
            if pooled is not None:
                fitted = _fit(table, live, max(vcpus, has[0]), max(memory_bytes, has[1]), phases)
                _, network = await both(fitted, _network(table, live, pooled.record.mac, phases))
            else:
                max_vcpus, max_memory_bytes = sizing.reach(vcpus, memory_bytes, table.config.hypervisor)
                vm = VmSpec(
                    vm_id=vm_id,
                    guest=guest,
                    vcpus=vcpus,
                    memory_bytes=memory_bytes,
                    tap=live.record.tap,
                    mac=pod_vm.device_mac(),
                    max_vcpus=max_vcpus,
                    max_memory_bytes=max_memory_bytes,
                    cgroup_parent=spec.cgroup_parent,
                )
                network = await _vm_and_network(table, live, vm, phases)
            if len(network.interfaces) > 1:
                await _plug_nics(table, live, network, phases)
            await both(_join(table, live, network, phases), _configure(table, live, network, phases))
        await cpusets.settle(table, live)
        state_dir(table, sandbox_id).mkdir(parents=True, exist_ok=True)
        if vm_id not in table.hypervisor.list():
            # The event of its end has come while there was nothing READY that it could change.
            raise VmGoneError("the virtual machine ended while the sandbox was being started", phase="configure")
        ready = live.record.moved(SandboxState.READY, ips=network.ips, phases_ms=phases.finish())
        table.save_sandbox(live, ready)
        live.events = table.background(watch(table, live), f"events {sandbox_id[:13]}")
    except BaseException as e:
        await uncancelled(_undo(table, live))
        if isinstance(e, VmrtError) and not e.resource:
            e.resource = f"sandbox {sandbox_id}"
        raise
    how = "cold" if pooled is None else "from the pool"
    log.info("sandbox %s (%s) is ready after %.0f ms, %s", sandbox_id[:13], ready.key, phases.ms["total"], how)
    return sandbox_id


async def connect(table: PodTable, live: LiveSandbox) -> AgentClient:
    """Connect to the agent of a booted VM and check that it speaks our protocol."""
    live.agent = agent = pod_vm.agent_of(table.hypervisor, live.record.vm_id)
    await agent.check()
    return agent


async def _plug_nics(table: PodTable, live: LiveSandbox, network: PodNetwork, phases: Phases) -> None:
    """Give the VM a NIC for each interface of the pod beyond its own. Taps and NICs go with the VM."""
    with phases.phase("NICs"):
        for number, interface in enumerate(network.interfaces[1:], start=1):
            if number > MAX_EXTRA_NICS:
                raise UnsupportedError(
                    f"the network has {len(network.interfaces)} interfaces; a VM has at most {MAX_EXTRA_NICS + 1}",
                    phase="attach NIC",
                )
            tap = pod_vm.extra_tap(live.record.vm_id, number)
            await table.network.create_tap(tap)
            await table.hypervisor.attach_nic(live.record.vm_id, tap, interface.device_mac)


async def _join(table: PodTable, live: LiveSandbox, network: PodNetwork, phases: Phases) -> None:
    with phases.phase("join"):
        await table.network.join(live.id, live.record.tap)
        for number, interface in enumerate(network.interfaces[1:], start=1):
            await table.network.join(live.id, pod_vm.extra_tap(live.record.vm_id, number), interface.name)


async def _configure(table: PodTable, live: LiveSandbox, network: PodNetwork, phases: Phases) -> None:
    """Make the guest this pod's. It sends no frame before the tap is joined: the tap is down until then.

    When it does not answer, the error carries its console.
    """
    try:
        with phases.phase("configure"):
            if live.agent is None:
                # Not checked first: the ready notice has named the protocol.
                live.agent = pod_vm.agent_of(table.hypervisor, live.record.vm_id)
            request = configure_request(live.record, network, share=table.config.hypervisor.share)
            await live.agent.configure_sandbox(request, timeout_s=CONFIGURE_TIMEOUT_S)
    except (UnavailableError, DeadlineError) as e:
        # What a dying guest wrote last is still on its way to us.
        await asyncio.sleep(_CONSOLE_SETTLE_S)
        raise VmError(
            f"the guest did not take its configuration: {e.message}",
            phase="configure",
            resource=f"sandbox {live.id}",
            console=table.hypervisor.console_tail(live.record.vm_id, _CONSOLE_BYTES),
        ) from e


async def _fit(table: PodTable, live: LiveSandbox, vcpus: int, memory_bytes: int, phases: Phases) -> None:
    """Put a VM of the pool below the pod's cgroup, and plug what it lacks for this pod."""
    if parent := live.record.spec.cgroup_parent:
        with phases.phase("cgroup"):
            await table.hypervisor.place(live.record.vm_id, parent)
    if (vcpus, memory_bytes) == (live.record.vcpus, live.record.memory_bytes):
        return
    if live.agent is None:
        raise VmGoneError("the virtual machine has no agent", phase="plug")
    with phases.phase("plug"):
        memory_bytes = await resize.fit(table, live, live.agent, vcpus, memory_bytes)
    table.save_sandbox(live, replace(live.record, vcpus=vcpus, memory_bytes=memory_bytes))


async def _network(table: PodTable, live: LiveSandbox, mac: str, phases: Phases) -> PodNetwork:
    with phases.phase("network"):
        return await table.network.setup(live.id, live.record.spec, device_mac=mac)


async def _vm_and_network(table: PodTable, live: LiveSandbox, vm: VmSpec, phases: Phases) -> PodNetwork:
    async with contextlib.AsyncExitStack() as turn:
        with phases.phase("turn"):
            await turn.enter_async_context(table.boots)
        boot = pod_vm.make(table.config, table.hypervisor, table.network, vm, phases.phase)
        _, made = await both(boot, _network(table, live, vm.mac, phases))
        return made


async def both(first: Awaitable[None], second: Awaitable[T]) -> tuple[None, T]:
    """Run two things at once; when one fails the other is cancelled, awaited, and the first error raised plainly."""

    async def run(work: Awaitable[T]) -> T:
        return await work

    async def run_none(work: Awaitable[None]) -> None:
        await work

    try:
        async with asyncio.TaskGroup() as group:
            a = group.create_task(run_none(first))
            b = group.create_task(run(second))
    except BaseExceptionGroup as e:
        raise e.exceptions[0] from e.exceptions[0].__cause__
    return a.result(), b.result()


async def _undo(table: PodTable, live: LiveSandbox) -> None:
    try:
        await close_agent(live)
        await release(table, live.record)
        remove_state(table, live.id)
        table.forget_sandbox(live)
    except Exception as e:
        # The record stays, hidden: the sweep tries again until nothing is left.
        log.error(
            "sandbox %s: could not undo its start yet: %s", live.id[:13], e, exc_info=not isinstance(e, VmrtError)
        )
        table.abandon_sandbox(live)


async def close_agent(live: LiveSandbox) -> None:
    """Let go of the agent; what waits for it fails with `VmGoneError`. Never fails itself: undos come after it."""
    agent, live.agent = live.agent, None
    if agent is not None:
        try:
            await agent.close()
        except (VmrtError, OSError) as e:
            log.warning("sandbox %s: closing the connections to its agent: %s", live.id[:13], e)


def hostname_of(spec: SandboxSpec) -> str:
    """Return the pod's hostname: what was asked, else a valid one from its name."""
    return spec.hostname or spec.name[:63].rstrip("-.") or "pod"


def configure_request(record: SandboxRecord, network: PodNetwork, *, share: bool) -> pb.ConfigureSandboxRequest:
    """Return the one call that makes a booted guest this pod's guest."""
    spec = record.spec
    hostname = hostname_of(spec)
    dns: DnsConfig | None = spec.dns or network.dns
    return pb.ConfigureSandboxRequest(
        sandbox_id=record.id,
        hostname=hostname,
        resolv_conf=resolv.resolv_conf(dns),
        hosts=resolv.hosts(hostname, network.ips),
        interfaces=[
            pb.Interface(name=i.name, device_mac=i.device_mac, mac=i.mac, mtu=i.mtu, addresses=i.addresses)
            for i in network.interfaces
        ],
        routes=[
            pb.Route(
                destination=r.destination,
                gateway=r.gateway,
                interface=r.interface,
                source=r.source,
                scope=r.scope,
                metric=r.metric,
            )
            for r in network.routes
        ],
        neighbours=[pb.Neighbour(address=n.address, mac=n.mac, interface=n.interface) for n in network.neighbours],
        sysctls=spec.sysctls,
        shm_bytes=SHM_BYTES,
        scratch_serial=scratch.SERIAL,
        realtime_ns=time.time_ns(),
        entropy=secrets.token_bytes(64),
        machine_id=record.id[:32],
        shared_pid_namespace=True,
        share=share,
        user_namespace=_user_namespace(spec.security.namespaces),
    )


def _user_namespace(options: NamespaceOptions) -> pb.UserNamespace | None:
    if options.userns is not NamespaceMode.POD:
        return None
    (uids,), (gids,) = options.uids, options.gids
    return pb.UserNamespace(first_uid=uids.host_id, uids=uids.length, first_gid=gids.host_id, gids=gids.length)
