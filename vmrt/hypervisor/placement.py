"""Puts a VM's processes into the cgroups of its pod, and into its record what is made for that, before it is made."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from vmrt.errors import VmrtError
from vmrt.hypervisor import confine
from vmrt.hypervisor.cgroup import HostCgroups, Part
from vmrt.hypervisor.vm import Vm
from vmrt.model import Confinement


async def place(cgroups: HostCgroups, vm: Vm, parent: str, *parts: Part) -> None:
    """Place QEMU and the helpers. Raises `InvalidArgumentError` for a parent that is no name of a cgroup."""
    record = vm.record
    leaves = [str(path) for path in cgroups.leaves(vm.vm_id, parent)]
    vm.note(cgroups=tuple(dict.fromkeys((*record.cgroups, *leaves))))
    processes = vm.processes()
    for part in parts:
        made = await cgroups.place(vm.vm_id, parent, part, processes)
        vm.note(cgroups=tuple(dict.fromkeys((*vm.record.cgroups, *map(str, made)))))


async def keep(vm: Vm, wanted: Confinement) -> None:
    """Keep the VM to CPUs and memory nodes; on failure it is kept to what it was before, as far as the host lets us."""
    async with vm.confine_lock:
        before, vm.confinement = vm.confinement, wanted
        try:
            await _apply(vm)
        except VmrtError:
            vm.confinement = before
            with contextlib.suppress(VmrtError):
                await _apply(vm)
            raise


async def keep_new(vm: Vm) -> None:
    """Keep threads that libvirt has made to what the others are kept to."""
    async with vm.confine_lock:
        if vm.confinement != Confinement():
            await _apply(vm)


async def _apply(vm: Vm) -> None:
    cgroups = [Path(path) for path in vm.record.cgroups]
    pids = [process.pid for process in vm.processes()]
    await asyncio.to_thread(confine.confine, vm.vm_id, cgroups, pids, vm.confinement)
