"""libvirt domain XML from a `VmSpec`: pure functions, no I/O, no libvirt.

Source: libvirt's "Domain XML format" (formatdomain), QEMU's documentation of the q35 machine and vhost-user devices.

The machine has what a pod needs and nothing else: no video, USB, balloon, RTC extras or option ROMs. Devices sit on the
root complex itself (bus 0) at fixed slots: every PCIe root port that libvirt would otherwise add costs the guest kernel
a bus to enumerate, and nothing but SCSI LUNs is hot-plugged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

from vmrt.model import Disk, VmSpec

METADATA_URI = "urn:vmrt:domain:1"
QEMU_URI = "http://libvirt.org/schemas/domain/qemu/1.0"
ROOT_SERIAL = "vmrt-root"
SHARE_TAG = "share"
QBOOT = Path("/usr/share/qemu/qboot.rom")

# Slots on pcie.0. 0x00 is the host bridge, 0x01 what libvirt keeps for a display, 0x1f the ICH9.
_SLOT_ROOT, _SLOT_SCSI, _SLOT_RNG, _SLOT_NIC, _SLOT_VSOCK, _SLOT_SHARE = range(0x02, 0x08)

# libvirt's domain names end in file names with a prefix of their own; NAME_MAX is 255.
_NAME_LIMIT = 200


@dataclass(frozen=True, slots=True)
class VsockDevice:
    """How the VM's vsock device is backed: by a vhost-user socket, or (None) by the kernel's vhost_vsock."""

    vhost_user_socket: Path | None


@dataclass(frozen=True, slots=True)
class Wiring:
    """What the host made ready for one VM before its domain is defined."""

    instance: str
    accelerator: str
    emulator: Path
    console_socket: Path
    vsock: VsockDevice
    share_socket: Path | None = None


@dataclass(frozen=True, slots=True)
class DomainIdentity:
    """What a domain's metadata says about it."""

    instance: str
    vm_id: str


def domain_name(instance: str, vm_id: str) -> str:
    """Return the domain's name: our tag, the daemon's instance, the VM."""
    return f"vmrt-{instance}-{vm_id}"[:_NAME_LIMIT]


def kernel_cmdline(spec: VmSpec) -> str:
    """Return the guest's kernel command line: the image's own, plus what this machine's devices need.

    A panic ends the VM at once (`panic=-1` resets, and a reset ends QEMU), so that it is an event and not a hang. An
    image that says otherwise is left its say.
    """
    given = spec.guest.cmdline.split()
    keys = {word.partition("=")[0] for word in given}
    wanted = ("console=ttyS0", "panic=-1")
    return " ".join([*given, *(word for word in wanted if word.partition("=")[0] not in keys)])


def units_of(spec: VmSpec) -> dict[str, int]:
    """Return the LUN of each disk attached at boot, by serial."""
    return {disk.serial: unit for unit, disk in enumerate(spec.disks)}


def free_unit(used: Mapping[str, int]) -> int:
    """Return the lowest LUN that no disk has."""
    taken = set(used.values())
    return next(unit for unit in range(len(taken) + 1) if unit not in taken)


def disk_xml(disk: Disk, unit: int, node: Path | None = None) -> str:
    """Return the XML of one virtio-scsi LUN, as it is hot-plugged and unplugged. `node` stands for a host device."""
    return ET.tostring(_scsi_disk(disk, unit, node), encoding="unicode")


def target_name(unit: int) -> str:
    """Return the name that libvirt knows a LUN by: sda, sdb, ... sdz, sdaa. The guest never sees it."""
    letters = ""
    number = unit + 1
    while number:
        number, digit = divmod(number - 1, 26)
        letters = chr(ord("a") + digit) + letters
    return f"sd{letters}"


def disks_in(xml: str) -> dict[str, int]:
    """Return the SCSI disks of a live domain's XML: LUN by serial."""
    disks: dict[str, int] = {}
    for element in ET.fromstring(xml).iterfind("./devices/disk"):
        address = element.find("./address[@type='drive']")
        serial = element.findtext("serial")
        if address is not None and serial:
            disks[serial] = int(address.get("unit", "0"))
    return disks


def cid_in(xml: str) -> int | None:
    """Return the vsock context identifier that libvirt gave a live domain."""
    cid = ET.fromstring(xml).find("./devices/vsock/cid")
    address = None if cid is None else cid.get("address")
    return None if address is None else int(address)


def identity_in(metadata_xml: str) -> DomainIdentity | None:
    """Read our metadata element; None when it is not one of ours."""
    try:
        element = ET.fromstring(metadata_xml)
    except ET.ParseError:
        return None
    instance, vm_id = element.get("instance"), element.get("id")
    return DomainIdentity(instance, vm_id) if instance is not None and vm_id else None


def domain_xml(spec: VmSpec, wiring: Wiring) -> str:
    """Return the whole domain."""
    ET.register_namespace("vmrt", METADATA_URI)
    ET.register_namespace("qemu", QEMU_URI)
    domain = ET.Element("domain", type="kvm" if wiring.accelerator == "kvm" else "qemu")
    _text(domain, "name", domain_name(wiring.instance, spec.vm_id))
    _metadata(domain, spec, wiring)
    _text(domain, "memory", str(spec.memory_bytes), unit="b")
    _text(domain, "vcpu", str(spec.vcpus))
    shared = wiring.vsock.vhost_user_socket is not None or wiring.share_socket is not None
    if shared:
        # A vhost-user process maps the guest's memory: it must be a file descriptor that can be passed on.
        backing = ET.SubElement(domain, "memoryBacking")
        ET.SubElement(backing, "source", type="memfd")
        ET.SubElement(backing, "access", mode="shared")
    _boot(domain, spec)
    _processor(domain, wiring.accelerator)
    for event in ("on_poweroff", "on_reboot", "on_crash"):
        _text(domain, event, "destroy")
    _devices(domain, spec, wiring)
    _command_line(domain, wiring)
    return ET.tostring(domain, encoding="unicode")


def _metadata(domain: ET.Element, spec: VmSpec, wiring: Wiring) -> None:
    """Say whose VM this is, to adoption (the first two) and to a person with `virsh dumpxml`."""
    metadata = ET.SubElement(domain, "metadata")
    ET.SubElement(
        metadata,
        f"{{{METADATA_URI}}}vm",
        {
            "instance": wiring.instance,
            "id": spec.vm_id,
            "guest": spec.guest.version,
            "tap": spec.tap,
            "share": str(spec.share_dir or ""),
        },
    )


def _boot(domain: ET.Element, spec: VmSpec) -> None:
    """Direct kernel boot: qboot hands the PVH kernel its control without a BIOS in between."""
    os = ET.SubElement(domain, "os")
    _text(os, "type", "hvm", arch="x86_64", machine="q35")
    _text(os, "loader", str(QBOOT), readonly="yes", type="rom")
    _text(os, "kernel", str(spec.guest.kernel))
    if spec.guest.initramfs is not None:
        _text(os, "initrd", str(spec.guest.initramfs))
    _text(os, "cmdline", kernel_cmdline(spec))


def _processor(domain: ET.Element, accelerator: str) -> None:
    features = ET.SubElement(domain, "features")
    ET.SubElement(features, "acpi")
    ET.SubElement(features, "vmport", state="off")
    if accelerator == "kvm":
        ET.SubElement(domain, "cpu", mode="host-passthrough", check="none", migratable="off")
    else:
        # Everything TCG can emulate, but not five-level paging, which only makes every table walk longer.
        cpu = ET.SubElement(domain, "cpu", mode="maximum", check="none")
        ET.SubElement(cpu, "feature", policy="disable", name="la57")
    clock = ET.SubElement(domain, "clock", offset="utc")
    ET.SubElement(clock, "timer", name="hpet", present="no")


def _devices(domain: ET.Element, spec: VmSpec, wiring: Wiring) -> None:
    devices = ET.SubElement(domain, "devices")
    _text(devices, "emulator", str(wiring.emulator))
    devices.append(_root_disk(spec.guest.rootfs))
    controller = ET.SubElement(devices, "controller", type="scsi", index="0", model="virtio-scsi")
    _pci(controller, _SLOT_SCSI)
    for unit, disk in enumerate(spec.disks):
        devices.append(_scsi_disk(disk, unit))
    ET.SubElement(devices, "controller", type="usb", model="none")
    if spec.tap:
        devices.append(_nic(spec))
    serial = ET.SubElement(devices, "serial", type="unix")
    source = ET.SubElement(serial, "source", mode="connect", path=str(wiring.console_socket))
    # A restarted daemon listens again at the same path, and QEMU comes back to it.
    ET.SubElement(source, "reconnect", enabled="yes", timeout="1")
    ET.SubElement(serial, "target", type="isa-serial", port="0")
    ET.SubElement(devices, "memballoon", model="none")
    rng = ET.SubElement(devices, "rng", model="virtio")
    ET.SubElement(rng, "backend", model="builtin")
    _pci(rng, _SLOT_RNG)
    if wiring.vsock.vhost_user_socket is None:
        vsock = ET.SubElement(devices, "vsock", model="virtio")
        ET.SubElement(vsock, "cid", auto="yes")
        _pci(vsock, _SLOT_VSOCK)
    if wiring.share_socket is not None:
        share = ET.SubElement(devices, "filesystem", type="mount")
        ET.SubElement(share, "driver", type="virtiofs", queue="1024")
        ET.SubElement(share, "source", socket=str(wiring.share_socket))
        ET.SubElement(share, "target", dir=SHARE_TAG)
        _pci(share, _SLOT_SHARE)


def _root_disk(rootfs: Path) -> ET.Element:
    disk = ET.Element("disk", type="file", device="disk")
    ET.SubElement(disk, "driver", name="qemu", type="raw")
    ET.SubElement(disk, "source", file=str(rootfs))
    ET.SubElement(disk, "target", dev="vda", bus="virtio")
    ET.SubElement(disk, "readonly")
    _text(disk, "serial", ROOT_SERIAL)
    _pci(disk, _SLOT_ROOT)
    return disk


def _scsi_disk(disk: Disk, unit: int, node: Path | None = None) -> ET.Element:
    element = ET.Element("disk", type="file" if node is None else "block", device="disk")
    driver = ET.SubElement(element, "driver", name="qemu", type="raw")
    if node is not None:
        # Somebody else's data: no cache of ours between the guest and the device, and flushes mean something.
        driver.set("cache", "none")
        driver.set("io", "threads")
    elif not disk.readonly:
        # A pod's writable disk dies with the pod: its flushes need not reach the platter.
        driver.set("cache", "unsafe")
    if not disk.readonly:
        driver.set("discard", "unmap")
    if node is None:
        ET.SubElement(element, "source", file=str(disk.path))
    else:
        ET.SubElement(element, "source", dev=str(node))
    ET.SubElement(element, "target", dev=target_name(unit), bus="scsi")
    if disk.readonly:
        ET.SubElement(element, "readonly")
    _text(element, "serial", disk.serial)
    ET.SubElement(element, "address", type="drive", controller="0", bus="0", target="0", unit=str(unit))
    return element


def _nic(spec: VmSpec) -> ET.Element:
    """Return a NIC on an existing tap: libvirt opens it, and leaves it alone when it has moved to another netns."""
    nic = ET.Element("interface", type="ethernet")
    ET.SubElement(nic, "mac", address=spec.mac)
    ET.SubElement(nic, "target", dev=spec.tap, managed="no")
    ET.SubElement(nic, "model", type="virtio")
    ET.SubElement(nic, "mtu", size=str(spec.mtu))
    ET.SubElement(nic, "rom", enabled="no")
    _pci(nic, _SLOT_NIC)
    return nic


def _command_line(domain: ET.Element, wiring: Wiring) -> None:
    """Add what libvirt has no element for."""
    socket = wiring.vsock.vhost_user_socket
    if socket is None:
        return
    # JSON, because QEMU creates key=value devices before JSON ones and would not find libvirt's buses.
    device = {
        "driver": "vhost-user-vsock-pci",
        "id": "vmrt-vsock",
        "chardev": "vmrt-vsock-chr",
        "bus": "pcie.0",
        "addr": hex(_SLOT_VSOCK),
    }
    chardev = f"socket,id=vmrt-vsock-chr,path={str(socket).replace(',', ',,')}"
    command = ET.SubElement(domain, f"{{{QEMU_URI}}}commandline")
    for argument in ("-chardev", chardev, "-device", json.dumps(device)):
        ET.SubElement(command, f"{{{QEMU_URI}}}arg", value=argument)


def _pci(parent: ET.Element, slot: int) -> None:
    ET.SubElement(parent, "address", type="pci", domain="0x0000", bus="0x00", slot=f"{slot:#04x}", function="0x0")


def _text(parent: ET.Element, tag: str, text: str, **attributes: str) -> None:
    ET.SubElement(parent, tag, attributes).text = text
