"""libvirt domain XML from a `VmSpec`: pure functions, no I/O, no libvirt.

Source: libvirt's "Domain XML format" (formatdomain), QEMU's documentation of the q35 machine and vhost-user devices.

The machine has what a pod needs and nothing else: no video, USB, RTC extras or option ROMs. Devices sit on the root
complex itself (bus 0) at fixed slots: every PCIe root port that libvirt would otherwise add costs the guest kernel a
bus to enumerate. The only PCI devices that are hot-plugged are NICs beyond the first, for which there are empty ports.
Disks are SCSI LUNs, memory is what a virtio-mem device that is there from the start gives and takes, CPUs come by ACPI.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

from vmrt.model import Disk, VmSize, VmSpec

METADATA_URI = "urn:vmrt:domain:1"
QEMU_URI = "http://libvirt.org/schemas/domain/qemu/1.0"
ROOT_SERIAL = "vmrt-root"
SHARE_TAG = "share"
QBOOT = Path("/usr/share/qemu/qboot.rom")

# Slots on pcie.0. 0x00 is the host bridge, 0x01 what libvirt keeps for a display, 0x1f the ICH9.
_SLOT_ROOT, _SLOT_SCSI, _SLOT_RNG, _SLOT_NIC, _SLOT_VSOCK, _SLOT_SHARE, _SLOT_MEMORY, _SLOT_BALLOON = range(0x02, 0x0A)
_SLOT_PORTS = 0x10

# QEMU gives memory in pieces of a huge page; Linux takes it in pieces of two (mm: MAX_ORDER_NR_PAGES).
_PLUG_BLOCK_BYTES = 2 * 1024**2
PLUG_UNIT_BYTES = 4 * 1024**2
# Zones for what is plugged: as much of it as the kernel's own share allows is made movable, so that it can go again.
_HOTPLUG_CMDLINE = ("memhp_default_state=online", "memory_hotplug.online_policy=auto-movable")

# What an emulated CPU is better without. Five-level paging only makes every table walk longer. QEMU's TCG runs string
# instructions (rep movsb, rep stosq, ...) an element at a time, several times as slow as a loop; "enhanced" and
# "fast short" ones make the guest's kernel and its C library take them for every copy.
EMULATED_CPU_WITHOUT = ("la57", "erms", "fsrm")
# The kernel has two more reasons to do so. rep_good it gives itself by the CPU's family (arch/x86/kernel/cpu/amd.c).
# 395 is "fast short rep stosb" (asm/cpufeatures.h: X86_FEATURE_FSRS, 12 * 32 + 11, which has no name); QEMU 10 offers
# it, Linux 6.12 takes it, and libvirt 9 would refuse a domain that names it. A kernel that does not know it ignores it.
EMULATED_CMDLINE = ("clearcpuid=rep_good,395",)

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
    owner: tuple[int, int] | None = None
    nic_queues: int = 1
    extra_nics: int = 0


@dataclass(frozen=True, slots=True)
class DomainIdentity:
    """What a domain's metadata says about it."""

    instance: str
    vm_id: str


def domain_name(instance: str, vm_id: str) -> str:
    """Return the domain's name: our tag, the daemon's instance, the VM."""
    return f"vmrt-{instance}-{vm_id}"[:_NAME_LIMIT]


def kernel_cmdline(spec: VmSpec, accelerator: str) -> str:
    """Return the guest's kernel command line: the image's own, plus what this machine and its devices need.

    A panic ends the VM at once (`panic=-1` resets, and a reset ends QEMU), so that it is an event and not a hang. An
    image that says otherwise is left its say.
    """
    given = spec.guest.cmdline.split()
    keys = {word.partition("=")[0] for word in given}
    plugging = _HOTPLUG_CMDLINE if pluggable_bytes(spec) else ()
    wanted = ("console=ttyS0", "panic=-1", *plugging, *(EMULATED_CMDLINE if accelerator != "kvm" else ()))
    return " ".join([*given, *(word for word in wanted if word.partition("=")[0] not in keys)])


def pluggable_bytes(spec: VmSpec) -> int:
    """Return how much memory can be plugged into the VM, in whole units."""
    return max(0, spec.max_memory_bytes - spec.memory_bytes) // PLUG_UNIT_BYTES * PLUG_UNIT_BYTES


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
    most = max(spec.vcpus, spec.max_vcpus)
    if extra := pluggable_bytes(spec):
        _text(domain, "maxMemory", str(spec.memory_bytes + extra), unit="b", slots="1")
    _text(domain, "memory", str(spec.memory_bytes + extra), unit="b")
    _text(domain, "vcpu", str(most), **({"current": str(spec.vcpus)} if most > spec.vcpus else {}))
    shared = wiring.vsock.vhost_user_socket is not None or wiring.share_socket is not None
    if shared:
        # A vhost-user process maps the guest's memory: it must be a file descriptor that can be passed on.
        backing = ET.SubElement(domain, "memoryBacking")
        ET.SubElement(backing, "source", type="memfd")
        ET.SubElement(backing, "access", mode="shared")
    _boot(domain, spec, wiring.accelerator)
    cpu = _processor(domain, wiring.accelerator)
    if extra:
        # Memory can be plugged into a NUMA node only: the one that there is.
        cell = {"id": "0", "cpus": f"0-{most - 1}", "memory": str(spec.memory_bytes), "unit": "b"}
        ET.SubElement(ET.SubElement(cpu, "numa"), "cell", cell | ({"memAccess": "shared"} if shared else {}))
    for event in ("on_poweroff", "on_reboot", "on_crash"):
        _text(domain, event, "destroy")
    _devices(domain, spec, wiring)
    if wiring.owner is not None:
        # relabel: what QEMU opens is given to it by us, no file of the host changes hands behind our back.
        label = ET.SubElement(domain, "seclabel", type="static", model="dac", relabel="no")
        _text(label, "label", "+{}:+{}".format(*wiring.owner))
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


def _boot(domain: ET.Element, spec: VmSpec, accelerator: str) -> None:
    """Direct kernel boot: qboot hands the PVH kernel its control without a BIOS in between."""
    os = ET.SubElement(domain, "os")
    _text(os, "type", "hvm", arch="x86_64", machine="q35")
    _text(os, "loader", str(QBOOT), readonly="yes", type="rom")
    _text(os, "kernel", str(spec.guest.kernel))
    if spec.guest.initramfs is not None:
        _text(os, "initrd", str(spec.guest.initramfs))
    _text(os, "cmdline", kernel_cmdline(spec, accelerator))


def _processor(domain: ET.Element, accelerator: str) -> ET.Element:
    features = ET.SubElement(domain, "features")
    ET.SubElement(features, "acpi")
    ET.SubElement(features, "vmport", state="off")
    if accelerator == "kvm":
        cpu = ET.SubElement(domain, "cpu", mode="host-passthrough", check="none", migratable="off")
    else:
        cpu = ET.SubElement(domain, "cpu", mode="maximum", check="none")
        for name in EMULATED_CPU_WITHOUT:
            ET.SubElement(cpu, "feature", policy="disable", name=name)
    # KVM has a clock of its own. An emulated CPU's TSC is measured against the HPET: without one the kernel is left
    # with counting ticks, of which a busy host takes some away, and the guest's time stands still and jumps.
    clock = ET.SubElement(domain, "clock", offset="utc")
    ET.SubElement(clock, "timer", name="hpet", present="no" if accelerator == "kvm" else "yes")
    return cpu


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
        nic = _nic(spec.tap, spec.mac, wiring.nic_queues)
        _pci(nic, _SLOT_NIC)
        devices.append(nic)
    for number in range(wiring.extra_nics):
        port = ET.SubElement(devices, "controller", type="pci", index=str(number + 1), model="pcie-root-port")
        _pci(port, _SLOT_PORTS + number)
    serial = ET.SubElement(devices, "serial", type="unix")
    source = ET.SubElement(serial, "source", mode="connect", path=str(wiring.console_socket))
    # A restarted daemon listens again at the same path, and QEMU comes back to it.
    ET.SubElement(source, "reconnect", enabled="yes", timeout="1")
    ET.SubElement(serial, "target", type="isa-serial", port="0")
    # Never inflated: it is there to tell the host which pages the guest has freed (free page reporting).
    balloon = ET.SubElement(devices, "memballoon", model="virtio", freePageReporting="on", autodeflate="off")
    _pci(balloon, _SLOT_BALLOON)
    if extra := pluggable_bytes(spec):
        devices.append(_pluggable_memory(extra))
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


def _pluggable_memory(size_bytes: int) -> ET.Element:
    memory = ET.Element("memory", model="virtio-mem")
    target = ET.SubElement(memory, "target")
    _text(target, "size", str(size_bytes), unit="b")
    _text(target, "node", "0")
    _text(target, "block", str(_PLUG_BLOCK_BYTES), unit="b")
    _text(target, "requested", "0", unit="b")
    _pci(memory, _SLOT_MEMORY)
    return memory


def size_in(xml: str) -> VmSize:
    """Return the size of a live domain: what the guest has, and what it can be given."""
    root = ET.fromstring(xml)
    most = int(root.findtext("vcpu", "1"))
    element = root.find("vcpu")
    vcpus = most if element is None else int(element.get("current", most))
    target = root.find("./devices/memory[@model='virtio-mem']/target")
    if target is None:
        memory = _bytes(root.find("memory"))
        return VmSize(vcpus, memory, most, memory, memory)
    base = sum(_bytes(cell, "memory") for cell in root.iterfind("./cpu/numa/cell"))
    return VmSize(vcpus, base + _bytes(target.find("current")), most, base + _bytes(target.find("size")), base)


def memory_request_xml(xml: str, memory_bytes: int) -> str | None:
    """Return a live domain's memory device, changed so that it comes to `memory_bytes` in all; None without one.

    What the guest is asked to plug is rounded up to whole units.
    """
    root = ET.fromstring(xml)
    device = root.find("./devices/memory[@model='virtio-mem']")
    requested = None if device is None else device.find("./target/requested")
    if device is None or requested is None:
        return None
    base = sum(_bytes(cell, "memory") for cell in root.iterfind("./cpu/numa/cell"))
    plugged = -(-max(0, memory_bytes - base) // PLUG_UNIT_BYTES) * PLUG_UNIT_BYTES
    requested.text = str(plugged)
    requested.set("unit", "b")
    return ET.tostring(device, encoding="unicode")


_UNITS = {"b": 1, "bytes": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}


def _bytes(element: ET.Element | None, attribute: str = "") -> int:
    """Return a size of libvirt's: an element's text, or the attribute of one, with the unit beside it."""
    if element is None:
        return 0
    text = element.get(attribute, "0") if attribute else element.text or "0"
    return int(text) * _UNITS[element.get("unit", "KiB")]


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


def nic_xml(tap: str, mac: str, queues: int, bus: int) -> str:
    """Return a NIC to hot-plug on a tap, at the root port that makes PCI bus `bus`."""
    nic = _nic(tap, mac, queues)
    _pci(nic, 0, bus)
    return ET.tostring(nic, encoding="unicode")


def nics_in(xml: str) -> tuple[dict[str, int], list[int]]:
    """Return the NICs of a live domain, by tap, with the PCI bus of each, and the buses of the ports that are free."""
    root = ET.fromstring(xml)
    nics = {}
    for element in root.iterfind("./devices/interface"):
        target, address = element.find("target"), element.find("./address[@type='pci']")
        if target is not None and address is not None:
            nics[target.get("dev", "")] = int(address.get("bus", "0"), 16)
    ports = root.iterfind("./devices/controller[@type='pci'][@model='pcie-root-port']")
    free = {int(port.get("index", "0")) for port in ports} - set(nics.values())
    return nics, sorted(free)


def _nic(tap: str, mac: str, queues: int) -> ET.Element:
    """Return a NIC on an existing tap: libvirt opens it, and leaves it alone when it has moved to another netns.

    A tap that was made for several queues has to be opened for several, and only then.
    """
    nic = ET.Element("interface", type="ethernet")
    ET.SubElement(nic, "mac", address=mac)
    ET.SubElement(nic, "target", dev=tap, managed="no")
    ET.SubElement(nic, "model", type="virtio")
    # No <mtu>: it would be the most that the guest may set, and a VM of the pool does not know its network's yet.
    if queues > 1:
        ET.SubElement(nic, "driver", queues=str(queues))
    ET.SubElement(nic, "rom", enabled="no")
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


def _pci(parent: ET.Element, slot: int, bus: int = 0) -> None:
    place = {"type": "pci", "domain": "0x0000", "bus": f"{bus:#04x}", "slot": f"{slot:#04x}", "function": "0x0"}
    ET.SubElement(parent, "address", place)


def _text(parent: ET.Element, tag: str, text: str, **attributes: str) -> None:
    ET.SubElement(parent, tag, attributes).text = text
