"""Hot-plug of a running VM's disks: layer images, and block devices of the host.

The caller has seen that the VM runs and looks again when something here fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import os

from vmrt.errors import VmError, VmrtError
from vmrt.hypervisor import devices, domain
from vmrt.hypervisor.access import QemuUser, require_passable, require_readable
from vmrt.hypervisor.libvirt_host import LibvirtHost
from vmrt.hypervisor.vm import Vm
from vmrt.model import Disk


def prepare(disk: Disk, user: QemuUser, *, resource: str) -> None:
    """Check that QEMU's user will be able to open a disk, and give it the one that is its own. Raises `VmError`."""
    require_readable(disk.path, user, resource=resource, readonly=disk.readonly)
    if not disk.readonly:
        disk.path.chmod(0o600)
        os.chown(disk.path, *user.owner)


async def attach(host: LibvirtHost, vm: Vm, disk: Disk, user: QemuUser) -> None:
    """Hot-plug a disk; one with this serial that is there already stays."""
    resource = f"vm {vm.vm_id}"
    async with vm.disks_lock:
        if disk.serial in vm.disks:
            return
        unit = domain.free_unit(vm.disks)
        if devices.is_block_device(disk.path):
            require_passable(vm.paths.directory, user, phase="attach disk", resource=resource)
            try:
                node = devices.make_node(vm.paths, disk, user)
            except OSError as e:
                raise VmError(f"no node for {disk.path}: {e.strerror}", phase="attach disk", resource=resource) from e
        else:
            node = None
            prepare(disk, user, resource=resource)
        xml = domain.disk_xml(disk, unit, node)
        try:
            await host.attach(vm.domain, xml)
        except BaseException as e:
            if isinstance(e, asyncio.CancelledError):
                # The call itself went through (LibvirtHost.call): take the disk out again.
                with contextlib.suppress(VmrtError):
                    await host.detach(vm.domain, xml)
            devices.drop_node(vm.paths, disk.serial)
            raise
        vm.disks[disk.serial] = unit


async def detach(host: LibvirtHost, vm: Vm, serial: str) -> None:
    """Hot-unplug a disk; one that is not there is no error."""
    async with vm.disks_lock:
        unit = vm.disks.get(serial)
        if unit is None:
            return
        await host.detach(vm.domain, domain.disk_xml(Disk(serial, vm.paths.directory), unit))
        # libvirt itself waits some seconds for QEMU's word, then returns all the same.
        if serial in domain.disks_in(await host.live_xml(vm.domain)):
            raise VmError(f"the guest did not let go of disk {serial}", phase="detach disk", resource=f"vm {vm.vm_id}")
        devices.drop_node(vm.paths, serial)
        del vm.disks[serial]


async def resized(host: LibvirtHost, vm: Vm, serial: str) -> int:
    """Tell the guest the size that a host block device has now; return it in octets."""
    resource = f"vm {vm.vm_id}"
    async with vm.disks_lock:
        unit = vm.disks.get(serial)
        node = devices.node_of(vm.paths, serial)
        if unit is None or not devices.is_block_device(node):
            raise VmError(f"{serial} is no host block device of this VM", phase="resize disk", resource=resource)
        try:
            size_bytes = devices.size_bytes(node)
        except OSError as e:
            raise VmError(f"{serial}: {e.strerror}", phase="resize disk", resource=resource) from e
        await host.resize_disk(vm.domain, domain.target_name(unit), size_bytes)
        return size_bytes
