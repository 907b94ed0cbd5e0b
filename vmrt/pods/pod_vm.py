"""A VM for a pod: making one, reaching its agent, and taking it away with all that it holds on the host.

Used alike for a pod that boots its own VM and for the warm pool, so that both get the same machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from vmrt.agent_client import AgentClient
from vmrt.config import MAX_EXTRA_NICS, Config
from vmrt.errors import VmGoneError
from vmrt.model import Disk, VmSpec
from vmrt.pods import scratch, volumes
from vmrt.pods.cancellation import uncancelled
from vmrt.pods.drivers import Connection, Hypervisor, Network
from vmrt.spawn import ProcessId

Timer = Callable[[str], contextlib.AbstractContextManager[None]]


def tap_of(vm_id: str) -> str:
    """Return the name of a VM's tap: it fits IFNAMSIZ and follows from the id."""
    return f"vt{vm_id}"


def extra_tap(vm_id: str, number: int) -> str:
    """Return the name of the tap of a VM's NIC `number`, from 1 on, beyond its first one."""
    return f"{tap_of(vm_id)}{number}"


def device_mac() -> str:
    """Return a fresh address for a VM's NIC; the guest gives it the pod's own later."""
    # 02: locally administered, unicast (IEEE 802).
    return "02:" + ":".join(f"{octet:02x}" for octet in secrets.token_bytes(5))


async def make(config: Config, hypervisor: Hypervisor, network: Network, vm: VmSpec, phase: Timer) -> None:
    """Make scratch disk, tap and share, boot the VM; return when its agent is ready. After a failure call `unmake`."""
    with phase("disk and tap"):
        settings = config.hypervisor
        disk = await scratch.make(config.root, vm.vm_id, settings.scratch_bytes, settings.qemu_user)
        await network.create_tap(vm.tap)
        # For every VM: what volumes its containers will have is known only after the pod runs.
        share = await asyncio.to_thread(volumes.make, config.root, vm.vm_id) if settings.share else None
    with phase("boot"):
        await hypervisor.boot(replace(vm, disks=(Disk(scratch.SERIAL, disk, readonly=False),), share_dir=share))
    # Nothing of a container has been in the guest yet.
    if (process := hypervisor.share_process(vm.vm_id)) is not None:
        await uncancelled(asyncio.to_thread(volumes.seal, process))


def share_of(hypervisor: Hypervisor, vm_id: str) -> ProcessId | None:
    """Return a VM's virtiofsd; None when it has none, or has ended."""
    with contextlib.suppress(VmGoneError):
        return hypervisor.share_process(vm_id)
    return None


async def unmake(root: Path, hypervisor: Hypervisor, network: Network, vm_id: str, tap: str) -> None:
    """Remove VM, scratch disk, share and tap; idempotent, and complete whatever had been made."""
    await hypervisor.destroy(vm_id)
    # Only now: QEMU holds the scratch file, and the tap unless it has moved into a pod's netns; virtiofsd the share.
    await asyncio.to_thread(scratch.remove, root, vm_id)
    await asyncio.to_thread(volumes.remove, root, vm_id)
    if tap:
        await network.delete_taps([tap, *(extra_tap(vm_id, number) for number in range(1, MAX_EXTRA_NICS + 1))])


def agent_of(hypervisor: Hypervisor, vm_id: str) -> AgentClient:
    """Return a client for the agent of a VM; it connects at the first call."""

    async def dial(port: int) -> Connection:
        return await hypervisor.dial(vm_id, port)

    return AgentClient(dial, vm_id)
