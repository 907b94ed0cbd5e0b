"""Which devices a container can have: those of the guest's own kernel by name, block devices of the host by hot-plug.

A character device belongs to the kernel that drives it. The guest's kernel has its own of some, with the same name and
meaning; any other one of the host is refused by name: a node with its number would be another device in the guest.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence

from vmrt.agent import agent_pb2 as pb
from vmrt.errors import InvalidArgumentError, UnsupportedError
from vmrt.model import Device

_PHASE = "devices"
# Devices that a kernel makes without hardware; whether the guest's has one, the agent finds out.
_NAMES = """
    null zero full random urandom tty fuse net/tun kvm loop-control kmsg uinput
    vhost-net vhost-vsock vsock cuse ppp mapper/control hwrng rtc0 ptp0
"""
GUEST_DEVICES = frozenset(f"/dev/{name}" for name in _NAMES.split())


def guest_node(device: Device, field: str) -> pb.DeviceNode:
    """Return the guest's node for a device of the host that the guest's kernel has as well.

    Raises `UnsupportedError` or `InvalidArgumentError`, naming the field, for every other path.
    """
    if device.host_path in GUEST_DEVICES:
        return pb.DeviceNode(path=device.container_path, guest_path=device.host_path, permissions=device.permissions)
    what = f"{field}.host_path is {device.host_path!r}"
    try:
        mode = os.stat(device.host_path).st_mode  # noqa: PTH116
    except OSError as e:
        raise InvalidArgumentError(f"{what}: {e.strerror}", phase=_PHASE) from e
    if stat.S_ISCHR(mode):
        raise UnsupportedError(
            f"{what}, a character device of the host's kernel, which a virtual machine does not have",
            phase=_PHASE,
            hint=f"the guest's own: {' '.join(sorted(GUEST_DEVICES))}",
        )
    raise InvalidArgumentError(f"{what}, which is no device", phase=_PHASE)


def nodes(devices: Sequence[Device], serials: Mapping[int, str] | None = None) -> list[pb.DeviceNode]:
    """Return the guest's nodes for `config.devices`; errors as of `guest_node`.

    `serials` has the disks of those that are block devices of the host, by index.
    """
    blocks = serials or {}
    return [
        pb.DeviceNode(path=device.container_path, disk_serial=blocks[index], permissions=device.permissions)
        if index in blocks
        else guest_node(device, f"config.devices[{index}]")
        for index, device in enumerate(devices)
    ]
