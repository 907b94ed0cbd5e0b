"""Block devices of the host in containers: hot-plugged into the VM, seen there as the device itself.

What kubelet names in `devices` for a volume with volumeMode Block. A pod's containers that ask for one device with the
same access get one disk, and with it one page cache; its serial follows from the device. Which container uses which is
in the containers' records, before the plug: an undo needs nothing else. A device that grows is looked at every few
seconds, and its guest told.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vmrt.errors import VmGoneError, VmrtError
from vmrt.model import Device, Disk
from vmrt.pods import empty_dir_disks
from vmrt.pods.block_device import SERIAL_PREFIX, BlockDevice, block_device, size_bytes
from vmrt.pods.devices import GUEST_DEVICES
from vmrt.pods.records import SandboxState
from vmrt.pods.table import LiveContainer, LiveSandbox, PodTable

log = logging.getLogger(__name__)

_RELEASE_TIMEOUT_S = 10.0
_FLUSH_TIMEOUT_S = 60.0
RESIZE_INTERVAL_S = 5.0


def plan(devices: Sequence[Device]) -> tuple[BlockDevice, ...]:
    """Return the host block devices among `config.devices`. A path that does not exist is left to `devices.nodes`."""
    found = []
    for index, device in enumerate(devices):
        if device.host_path in GUEST_DEVICES:
            continue
        readonly = bool(device.permissions) and "w" not in device.permissions
        block = block_device(device.host_path, f"config.devices[{index}].host_path", readonly=readonly)
        if block is not None:
            found.append(replace(block, index=index))
    return tuple(found)


async def attach(table: PodTable, sandbox: LiveSandbox, devices: Sequence[BlockDevice]) -> None:
    """Plug in what the VM lacks. The container's record names the serials already; `detach` undoes."""
    for device in devices:
        async with sandbox.block_lock:
            if device.serial in sandbox.blocks:
                continue
            try:
                if device.image:
                    image = await empty_dir_disks.make(table.config, device)
                    with empty_dir_disks.as_block_device(image) as node:
                        disk = Disk(device.serial, node, readonly=device.readonly)
                        await table.hypervisor.attach_disk(sandbox.record.vm_id, disk)
                else:
                    disk = Disk(device.serial, Path(device.path), readonly=device.readonly)
                    await table.hypervisor.attach_disk(sandbox.record.vm_id, disk)
            except VmGoneError:
                raise
            except VmrtError as e:
                e.message = f"{device.field}: {e.message}"
                raise
            sandbox.blocks[device.serial] = (device.number, size_bytes(device.number))


async def detach(table: PodTable, sandbox: LiveSandbox, container: LiveContainer) -> None:
    """Take out the disks of a container that no other one of its pod uses; the container is gone from the guest.

    Idempotent. A disk that is not there is no error, nor is a VM that is gone.
    """
    for serial in container.record.block_serials:
        async with sandbox.block_lock:
            if any(
                serial in other.record.block_serials
                for other in table.containers_of(sandbox.id)
                if other.id != container.id
            ):
                continue
            with contextlib.suppress(VmGoneError):
                if sandbox.agent is not None:
                    # The guest flushes what it has and lets go; the device is the next pod's as soon as this returns.
                    await sandbox.agent.release_volume(serial.removeprefix(SERIAL_PREFIX), timeout_s=_FLUSH_TIMEOUT_S)
                    await sandbox.agent.release_disk(serial, timeout_s=_RELEASE_TIMEOUT_S)
                await table.hypervisor.detach_disk(sandbox.record.vm_id, serial)
            sandbox.blocks.pop(serial, None)


def remember(sandbox: LiveSandbox, container: LiveContainer, devices: Sequence[BlockDevice]) -> None:
    """After a restart: the VM has the devices of an adopted container. The guest is soon told their size."""
    for device in devices:
        if device.serial in container.record.block_serials:
            sandbox.blocks[device.serial] = (device.number, 0)


async def follow_sizes(table: PodTable) -> None:
    """Tell guests of devices that grow; runs as long as the daemon."""
    while True:
        await asyncio.sleep(RESIZE_INTERVAL_S)
        await tell_sizes(table)


async def tell_sizes(table: PodTable) -> None:
    """Tell guests of devices that have another size than they know."""
    for sandbox in list(table.sandboxes.values()):
        for serial, (number, known) in list(sandbox.blocks.items()):
            now = size_bytes(number)
            if now in (0, known) or sandbox.record.state is not SandboxState.READY:
                continue
            try:
                told = await table.hypervisor.resize_disk(sandbox.record.vm_id, serial)
            except VmrtError as e:
                log.warning("sandbox %s: disk %s keeps its size in the guest: %s", sandbox.id[:13], serial, e)
                told = now
            if serial in sandbox.blocks:
                sandbox.blocks[serial] = (number, told)
