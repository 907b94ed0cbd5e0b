"""Puts a VM's processes into the cgroups of its pod, and into its record what is made for that, before it is made."""

from __future__ import annotations

from vmrt.hypervisor.cgroup import HostCgroups, Part
from vmrt.hypervisor.vm import Vm


async def place(cgroups: HostCgroups, vm: Vm, parent: str, *parts: Part) -> None:
    """Place QEMU and the helpers. Raises `InvalidArgumentError` for a parent that is no name of a cgroup."""
    record = vm.record
    leaves = [str(path) for path in cgroups.leaves(vm.vm_id, parent)]
    vm.note(cgroups=tuple(dict.fromkeys((*record.cgroups, *leaves))))
    processes = [process for process in (record.qemu, *record.helpers.values()) if process is not None]
    for part in parts:
        made = await cgroups.place(vm.vm_id, parent, part, processes)
        vm.note(cgroups=tuple(dict.fromkeys((*vm.record.cgroups, *map(str, made)))))
