"""UpdateContainerResources and UpdatePodSandboxResources: all of a change or nothing of it.

What a request does not set stays. A pod's VM grows before its containers may use more, and gives back after they use
less. What it cannot grow to, or what is in use, is refused by name before anything has changed.
"""

from __future__ import annotations

import contextlib
import json
import logging
from dataclasses import replace
from typing import Any

from vmrt.agent_client import AgentClient
from vmrt.errors import ExhaustedError, FailedPreconditionError, InvalidArgumentError, VmGoneError, VmrtError
from vmrt.model import LinuxResources, SandboxSpec
from vmrt.pods import cpusets, oci, sizing
from vmrt.pods.cancellation import uncancelled
from vmrt.pods.records import ContainerState, SandboxRecord, SandboxState
from vmrt.pods.table import LiveContainer, LiveSandbox, PodTable

log = logging.getLogger(__name__)

_MIB = 1024**2
_HINT = "the pod's own sums come first (UpdatePodSandboxResources): they say how large its VM is"
# What the guest itself has to keep when a VM shrinks.
_SPARE_BYTES = 32 * _MIB
_PLUG_TIMEOUT_S = 60.0


def merged(old: LinuxResources, change: LinuxResources) -> LinuxResources:
    """Return the limits after a change. oom_score_adj stays: it is a property of processes that run already.

    Where swap was limited to nothing (limit and memory limit equal) it stays so under a new memory limit.
    """
    swap = change.memory_swap_limit_bytes or old.memory_swap_limit_bytes
    no_swap = old.memory_swap_limit_bytes > 0 and old.memory_swap_limit_bytes == old.memory_limit_bytes
    if change.memory_limit_bytes and not change.memory_swap_limit_bytes and no_swap:
        swap = change.memory_limit_bytes
    return LinuxResources(
        cpu_period_us=change.cpu_period_us or old.cpu_period_us,
        cpu_quota_us=change.cpu_quota_us or old.cpu_quota_us,
        cpu_shares=change.cpu_shares or old.cpu_shares,
        memory_limit_bytes=change.memory_limit_bytes or old.memory_limit_bytes,
        oom_score_adj=old.oom_score_adj,
        cpuset_cpus=change.cpuset_cpus or old.cpuset_cpus,
        cpuset_mems=change.cpuset_mems or old.cpuset_mems,
        hugepage_limits=change.hugepage_limits or old.hugepage_limits,
        unified=old.unified | change.unified,
        memory_swap_limit_bytes=swap,
    )


def restoring(old: LinuxResources, tried: LinuxResources) -> dict[str, Any]:
    """Return the OCI resources that bring `old` back: what was not limited then is said to be unlimited."""
    result = oci.resources(old)
    unlimited: dict[str, str] = {}
    if tried.memory_limit_bytes and not old.memory_limit_bytes:
        unlimited["memory.max"] = "max"
    if tried.memory_swap_limit_bytes and not old.memory_swap_limit_bytes:
        unlimited["memory.swap.max"] = "max"
    if tried.cpu_quota_us and not old.cpu_quota_us:
        unlimited["cpu.max"] = "max"
    if tried.cpu_shares and not old.cpu_shares:
        unlimited["cpu.weight"] = "100"  # the kernel's default
    if unlimited:
        result["unified"] = unlimited | result.get("unified", {})
    return result


def check(wanted: LinuxResources, old: LinuxResources, vcpus: int, memory_bytes: int) -> None:
    """Refuse container limits that cannot be: more than the VM has, or swap below memory. Lower ones always fit."""
    memory = wanted.memory_limit_bytes
    if memory > max(old.memory_limit_bytes, memory_bytes):
        raise ExhaustedError(
            f"linux.memory_limit_in_bytes is {_mib(memory)}, the pod's VM has {_mib(memory_bytes)}", hint=_HINT
        )
    if _pages(wanted) != _pages(old):
        raise InvalidArgumentError("linux.hugepage_limits: huge pages are set apart when a container is created")
    if 0 < wanted.memory_swap_limit_bytes < memory:
        raise InvalidArgumentError(
            f"linux.memory_swap_limit_in_bytes is {wanted.memory_swap_limit_bytes}, below memory {memory}:"
            " it limits both together"
        )
    if wanted.cpu_quota_us > max(vcpus * (wanted.cpu_period_us or 100_000), old.cpu_quota_us):
        cpus = wanted.cpu_quota_us / (wanted.cpu_period_us or 100_000)
        raise ExhaustedError(f"linux.cpu_quota is worth {cpus:g} CPUs, the pod's VM has {vcpus}", hint=_HINT)


def _pages(limits: LinuxResources) -> dict[str, int]:
    return {limit.page_size: limit.limit_bytes for limit in limits.hugepage_limits if limit.limit_bytes}


async def update_container(table: PodTable, live: LiveContainer, change: LinuxResources) -> None:
    """Change a created or running container's limits; on any failure the old ones are in force."""
    async with live.lock:
        record = live.record
        if record.state not in (ContainerState.CREATED, ContainerState.RUNNING):
            raise FailedPreconditionError(
                f"the container is {record.state.value}; limits are those of a created or running one",
                phase="update",
                resource=f"container {live.id}",
            )
        sandbox = table.sandboxes[record.sandbox_id]
        old = record.spec.resources
        wanted = merged(old, change)
        try:
            cpusets.require_present(wanted)
            async with sandbox.size_lock:
                # More than there can be is compared with what there is, and refused by name, next.
                with contextlib.suppress(ExhaustedError):
                    await _enlarge(table, sandbox, *_needed(table, sandbox.record.spec, sandbox.id, (live.id, wanted)))
            check(wanted, old, *vm_size(table, sandbox.record))
            if wanted != old:
                await _check_usage(sandbox, live, wanted, old)
                await _apply(table, sandbox, live, wanted, old)
        except VmrtError as e:
            e.phase, e.resource = e.phase or "update", e.resource or f"container {live.id}"
            raise
        # The container may have ended meanwhile: its state is not ours to write.
        table.save_container(live, replace(live.record, spec=replace(record.spec, resources=wanted)))
        cpusets.settle_later(table, sandbox.id)  # whoever settled meanwhile did not know of the change


async def _check_usage(sandbox: LiveSandbox, live: LiveContainer, wanted: LinuxResources, old: LinuxResources) -> None:
    limit = wanted.memory_limit_bytes
    if not limit or 0 < old.memory_limit_bytes <= limit:
        return
    said = await sandbox.need_agent().container_stats([live.id])
    used = next((stat.memory_working_set_bytes for stat in said.stats if stat.container_id == live.id), 0)
    if used > limit:
        raise FailedPreconditionError(
            f"linux.memory_limit_in_bytes is {_mib(limit)}, the container uses {_mib(used)}: it would be killed"
        )


async def _apply(
    table: PodTable, sandbox: LiveSandbox, live: LiveContainer, wanted: LinuxResources, old: LinuxResources
) -> None:
    agent = sandbox.need_agent()

    async def restore() -> None:
        try:
            await agent.update_container(live.id, json.dumps(restoring(old, wanted)).encode())
        except VmGoneError:
            pass  # and its limits with it
        except VmrtError as e:
            log.error("container %s: could not restore its limits after a failed update: %s", live.id[:13], e)
        cpusets.settle_later(table, sandbox.id)

    try:
        if (wanted.cpuset_cpus, wanted.cpuset_mems) != (old.cpuset_cpus, old.cpuset_mems):
            await cpusets.settle(table, sandbox, container=(live.id, wanted))
        await agent.update_container(live.id, json.dumps(oci.resources(wanted)).encode())
    except BaseException:
        await uncancelled(restore())
        raise


async def make_room(table: PodTable, sandbox: LiveSandbox, limits: LinuxResources) -> None:
    """Enlarge a VM for a container that is being made: for its huge pages and, in a pod without sums, its `limits`.

    Limits as far as the host and the operator let us, and the guest goes along: they are no promise. Huge pages are
    one: `ExhaustedError` for more than the VM can be enlarged to, and the agent refuses what there is no room for then.
    """
    async with sandbox.size_lock:
        vcpus, memory_bytes = _needed(table, sandbox.record.spec, sandbox.id)
        has_vcpus, has_bytes = vm_size(table, sandbox.record)
        if vcpus <= has_vcpus and memory_bytes <= has_bytes:
            return
        try:
            most = await table.hypervisor.size(sandbox.record.vm_id)
            if memory_bytes > most.max_memory_bytes and sizing.hugepage_bytes(limits):
                raise ExhaustedError(
                    f"linux.hugepage_limits: the pod's VM would need {_mib(memory_bytes)} of memory, it may have"
                    f" {_mib(most.max_memory_bytes)}"
                )
            await _enlarge(table, sandbox, min(vcpus, most.max_vcpus), min(memory_bytes, most.max_memory_bytes))
        except (VmGoneError, ExhaustedError):
            raise
        except VmrtError as e:
            log.warning("sandbox %s: its VM is smaller than its containers' limits: %s", sandbox.id[:13], e)


async def _enlarge(table: PodTable, sandbox: LiveSandbox, vcpus: int, memory_bytes: int) -> None:
    """Give a VM at least this size and record it; call under the size lock."""
    has = vm_size(table, sandbox.record)
    vcpus, memory_bytes = max(vcpus, has[0]), max(memory_bytes, has[1])
    if (vcpus, memory_bytes) != has:
        memory_bytes = await fit(table, sandbox, sandbox.need_agent(), vcpus, memory_bytes)
        table.save_sandbox(sandbox, replace(sandbox.record, vcpus=vcpus, memory_bytes=memory_bytes))


def give_back_later(table: PodTable, live: LiveContainer) -> None:
    """Give back, in the background, what a VM was enlarged by for a container that is gone."""
    sandbox = table.sandboxes.get(live.record.sandbox_id)
    if (
        sandbox is not None
        and sandbox.record.state is SandboxState.READY
        and sizing.hugepage_bytes(live.record.spec.resources)
    ):
        table.background(_give_back(table, sandbox), f"size {sandbox.id[:13]}")


async def _give_back(table: PodTable, sandbox: LiveSandbox) -> None:
    try:
        async with sandbox.size_lock:
            if sandbox.record.state is not SandboxState.READY:
                return
            has_vcpus, has_bytes = vm_size(table, sandbox.record)
            _, memory_bytes = _needed(table, sandbox.record.spec, sandbox.id)
            if memory_bytes < has_bytes:
                await _check_vm_usage(sandbox, memory_bytes)
                memory_bytes = await fit(table, sandbox, sandbox.need_agent(), has_vcpus, memory_bytes)
                table.save_sandbox(sandbox, replace(sandbox.record, memory_bytes=memory_bytes))
    except VmGoneError:
        pass
    except VmrtError as e:
        log.info("sandbox %s: its VM stays as large as it is: %s", sandbox.id[:13], e)


def _needed(
    table: PodTable, spec: SandboxSpec, sandbox_id: str, container: tuple[str, LinuxResources] | None = None
) -> tuple[int, int]:
    """Return the size that a sandbox's VM needs for `spec` and its containers; `container` is to have these limits."""
    limits = {live.id: live.record.spec.resources for live in table.containers_of(sandbox_id) if not live.undo_failed}
    if container is not None:
        limits[container[0]] = container[1]
    living = [limits[live.id] for live in table.containers_of(sandbox_id) if live.id in limits and live.counts]
    _, handler = table.handler(spec.runtime_handler)
    return sizing.needed(spec, table.config.hypervisor, handler, living, limits.values())


async def update_sandbox(
    table: PodTable, live: LiveSandbox, overhead: LinuxResources | None, resources: LinuxResources | None
) -> None:
    """Give a pod's VM the size of the pod's new sums, and record them; on any failure nothing has changed."""
    async with live.lock, live.size_lock:
        record = live.record
        if record.state is not SandboxState.READY:
            raise FailedPreconditionError(
                f"the sandbox is {record.state.value}, only a ready one can be resized",
                phase="resize",
                resource=f"sandbox {live.id}",
                hint=record.reason,
            )
        spec = replace(
            record.spec, overhead=overhead or record.spec.overhead, resources=resources or record.spec.resources
        )
        config = table.config.hypervisor
        vcpus, memory_bytes = _needed(table, spec, live.id)
        has_vcpus, has_bytes = vm_size(table, record)
        try:
            for name, wanted, most, unit in (
                ("resources.memory_limit_in_bytes", memory_bytes // _MIB, sizing.most(config)[1] // _MIB, "MiB"),
                ("resources.cpu_quota", vcpus, sizing.most(config)[0], "CPUs"),
            ):
                if wanted > most:
                    raise ExhaustedError(f"{name}: the pod's VM would need {wanted} {unit}, it may have {most} {unit}")
            if memory_bytes < has_bytes:
                await _check_vm_usage(live, memory_bytes)
            if resources is not None:
                cpusets.require_present(resources, "resources")
                await cpusets.settle(table, live, pod=resources)
            if (vcpus, memory_bytes) != (has_vcpus, has_bytes):
                memory_bytes = await fit(table, live, live.need_agent(), vcpus, memory_bytes)
        except VmrtError as e:
            cpusets.settle_later(table, live.id)
            e.phase, e.resource = "resize", f"sandbox {live.id}"
            raise
        table.save_sandbox(live, replace(live.record, spec=spec, vcpus=vcpus, memory_bytes=memory_bytes))
        cpusets.settle_later(table, live.id)  # as above


async def _check_vm_usage(live: LiveSandbox, memory_bytes: int) -> None:
    said = await live.need_agent().container_stats()
    used = said.sandbox.usage.memory_working_set_bytes + _SPARE_BYTES
    if used > memory_bytes:
        raise FailedPreconditionError(
            f"resources.memory_limit_in_bytes: the pod's VM would shrink to {_mib(memory_bytes)}, it uses {_mib(used)}"
        )


async def fit(table: PodTable, live: LiveSandbox, agent: AgentClient, vcpus: int, memory_bytes: int) -> int:
    """Plug what a running VM lacks and give back what it has too much; on failure it is as it was.

    Return the octets of memory that it comes to, not less than it was booted with. Memory that the guest does not let
    go of at once goes later. CPUs too many stay plugged, and offline.
    """
    vm_id, (has_vcpus, has_bytes) = live.record.vm_id, vm_size(table, live.record)
    has = await table.hypervisor.size(vm_id)
    try:
        # Up before the guest is told of new CPUs, down after it has let go of them.
        if vcpus < has_vcpus:
            await agent.set_cpus(vcpus, timeout_s=_PLUG_TIMEOUT_S)
        if vcpus > has.vcpus or memory_bytes != has.memory_bytes:
            await table.hypervisor.resize(vm_id, vcpus, memory_bytes)
        if vcpus > has_vcpus:
            await agent.set_cpus(vcpus, timeout_s=_PLUG_TIMEOUT_S)
        return max(memory_bytes, has.min_memory_bytes)
    except BaseException:
        await uncancelled(_as_before(table, vm_id, agent, has_vcpus, has_bytes))
        raise


async def _as_before(table: PodTable, vm_id: str, agent: AgentClient, vcpus: int, memory_bytes: int) -> None:
    try:
        await table.hypervisor.resize(vm_id, vcpus, memory_bytes)
        await agent.set_cpus(vcpus, timeout_s=_PLUG_TIMEOUT_S)
    except VmGoneError:
        pass
    except VmrtError as e:
        log.error("vm %s: not back at its size after a failed resize: %s", vm_id, e)


def vm_size(table: PodTable, record: SandboxRecord) -> tuple[int, int]:
    """Return (vcpus, octets of memory) that the sandbox's VM was given."""
    if record.vcpus and record.memory_bytes:
        return record.vcpus, record.memory_bytes
    _, handler = table.handler(record.spec.runtime_handler)
    return sizing.size(record.spec, table.config.hypervisor, handler)


def _mib(octets: int) -> str:
    return f"{octets / _MIB:.0f} MiB"
