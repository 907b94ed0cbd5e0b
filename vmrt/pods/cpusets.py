"""cpuset_cpus and cpuset_mems: which of the host's CPUs and memory nodes a pod's VM may use.

Their numbers are the host's, and kubelet's CPU and memory managers send them for every container. A guest has other
CPUs, so nothing of them reaches its cgroups: they act on the VM, which is all that the host sees of a pod. It may use
what any of its living containers may, and everything while one of them has no limit; beyond what the pod itself was
limited to no container gets it. Containers of one pod are not kept apart by them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vmrt import number_list
from vmrt.errors import InvalidArgumentError, VmGoneError, VmrtError
from vmrt.model import Confinement, LinuxResources
from vmrt.pods.cancellation import uncancelled
from vmrt.pods.records import SandboxState
from vmrt.pods.table import LiveSandbox, PodTable

log = logging.getLogger(__name__)

_SYSTEM = Path("/sys/devices/system")


@dataclass(frozen=True, slots=True)
class Host:
    """The CPUs and memory nodes that the host has online."""

    cpus: frozenset[int]
    nodes: frozenset[int]

    @classmethod
    def read(cls, system: Path = _SYSTEM) -> Host:
        """Ask the kernel (Documentation/ABI: sysfs-devices-system-cpu, sysfs-devices-node)."""
        return cls(number_list.read(system / "cpu/online"), number_list.read(system / "node/online"))


def require_present(limits: LinuxResources, path: str = "linux", host: Host | None = None) -> None:
    """Refuse a CPU or memory node that the host does not have, by name."""
    if not _limited(limits):
        return
    host = host or Host.read()
    for key, text, has, what in (
        ("cpuset_cpus", limits.cpuset_cpus, host.cpus, "CPUs"),
        ("cpuset_mems", limits.cpuset_mems, host.nodes, "memory nodes"),
    ):
        if text and (missing := number_list.parse(text) - has):
            raise InvalidArgumentError(
                f"{path}.{key} {text!r}: the host's {what} are {number_list.spelt(has)}, it has no"
                f" {number_list.spelt(missing)}"
            )


def union(pod: str, containers: Iterable[str]) -> frozenset[int] | None:
    """Return what a VM may use: `pod` limits the pod, `containers` each living one; "" is no limit, None anything."""
    most = number_list.parse(pod) if pod else None
    found: set[int] = set()
    for text in (texts := list(containers)):
        if not text:
            return most
        found |= number_list.parse(text)
    if not texts:
        return most
    return frozenset(found) if most is None else (frozenset(found) & most or most)


def wanted(pod: LinuxResources, containers: Sequence[LinuxResources]) -> Confinement:
    """Return where the VM of a pod with these living containers may be."""
    return Confinement(
        cpus=union(pod.cpuset_cpus, (limits.cpuset_cpus for limits in containers)),
        mems=union(pod.cpuset_mems, (limits.cpuset_mems for limits in containers)),
    )


async def settle(
    table: PodTable,
    sandbox: LiveSandbox,
    *,
    pod: LinuxResources | None = None,
    container: tuple[str, LinuxResources] | None = None,
) -> None:
    """Keep a pod's VM to what its containers may use now.

    `pod` and `container` (by id) are limits that are about to be recorded. Goes on to its end when it is cancelled. A
    pod without such limits costs nothing. Raises `VmrtError` when the host does not have it; the VM is then where it
    was.
    """
    pod = pod or sandbox.record.spec.resources or LinuxResources()
    if _concerned(sandbox, (pod, *_living(table, sandbox, container))):
        await uncancelled(_settle(table, sandbox, pod, container))


def _concerned(sandbox: LiveSandbox, limits: Iterable[LinuxResources]) -> bool:
    return sandbox.record.confined or any(_limited(each) for each in limits)


def _limited(limits: LinuxResources) -> bool:
    return bool(limits.cpuset_cpus or limits.cpuset_mems)


async def _settle(
    table: PodTable, sandbox: LiveSandbox, pod: LinuxResources, container: tuple[str, LinuxResources] | None
) -> None:
    async with sandbox.confine_lock:
        if sandbox.record.state in (SandboxState.CREATING, SandboxState.READY):
            place = wanted(pod, _living(table, sandbox, container))
            confined = place != Confinement()
            # On record for as long as there may be something to take back.
            if confined and not sandbox.record.confined:
                table.save_sandbox(sandbox, replace(sandbox.record, confined=True))
            await table.hypervisor.confine(sandbox.record.vm_id, place)
            if not confined and sandbox.record.confined:
                table.save_sandbox(sandbox, replace(sandbox.record, confined=False))


def settle_later(table: PodTable, sandbox_id: str) -> None:
    """Settle in the background: after a container's end it is the others' limits that count."""
    sandbox = table.sandboxes.get(sandbox_id)
    if sandbox is None or sandbox.record.state is not SandboxState.READY:
        return
    if _concerned(sandbox, (sandbox.record.spec.resources or LinuxResources(), *_living(table, sandbox, None))):
        table.background(settle_again(table, sandbox), f"cpuset {sandbox_id[:13]}")


async def settle_again(table: PodTable, sandbox: LiveSandbox) -> None:
    """Settle what the host allowed before; where it no longer does (a CPU went offline) the VM stays where it was."""
    try:
        await settle(table, sandbox)
    except VmGoneError:
        pass
    except VmrtError as e:
        log.warning("sandbox %s: its VM stays on the CPUs that it has: %s", sandbox.id[:13], e)


def _living(
    table: PodTable, sandbox: LiveSandbox, container: tuple[str, LinuxResources] | None
) -> list[LinuxResources]:
    """Return the limits of the containers that count."""
    return [
        container[1] if container is not None and container[0] == live.id else live.record.spec.resources
        for live in table.containers_of(sandbox.id)
        if live.counts
    ]
