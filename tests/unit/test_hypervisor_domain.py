import json
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmrt.hypervisor import domain
from vmrt.model import Disk, GuestImage, VmSize, VmSpec

GUEST = GuestImage("v1", 1, Path("/g/vmlinux"), Path("/g/initramfs"), Path("/g/root"), "quiet root=/dev/vda", "6.1")
QEMU_ARG = f"{{{domain.QEMU_URI}}}commandline/{{{domain.QEMU_URI}}}arg"


def spec(**fields: object) -> VmSpec:
    return VmSpec(**({"vm_id": "abc", "guest": GUEST, "vcpus": 2, "memory_bytes": 256 << 20} | fields))  # type: ignore[arg-type]


def wiring(**fields: object) -> domain.Wiring:
    defaults: dict[str, object] = {
        "instance": "i1",
        "accelerator": "tcg",
        "emulator": Path("/usr/bin/qemu-system-x86_64"),
        "console_socket": Path("/r/vms/abc/console.sock"),
        "vsock": domain.VsockDevice(Path("/r/vms/abc/s/vhost")),
    }
    return domain.Wiring(**(defaults | fields))  # type: ignore[arg-type]


def parsed(spec: VmSpec, wiring: domain.Wiring) -> ET.Element:
    return ET.fromstring(domain.domain_xml(spec, wiring))


def attributes(root: ET.Element, path: str) -> dict[str, str]:
    element = root.find(path)
    assert element is not None, path
    return element.attrib


def test_direct_kernel_boot_by_qboot() -> None:
    root = parsed(spec(), wiring())
    assert root.findtext("os/loader") == "/usr/share/qemu/qboot.rom"
    assert root.findtext("os/kernel") == "/g/vmlinux"
    assert root.findtext("os/initrd") == "/g/initramfs"
    assert attributes(root, "os/type")["machine"] == "q35"
    assert root.findtext("memory") == str(256 << 20)
    assert root.findtext("vcpu") == "2"


@pytest.mark.parametrize(
    ("given_line", "line"),
    [
        ("quiet", "quiet console=ttyS0 panic=-1"),
        ("panic=5 quiet", "panic=5 quiet console=ttyS0"),
        ("console=hvc0 panic=-1", "console=hvc0 panic=-1"),
    ],
)
def test_an_image_keeps_its_say_on_the_command_line(given_line: str, line: str) -> None:
    guest = GuestImage("v1", 1, Path("/k"), None, Path("/r"), given_line, "6.1")
    assert domain.kernel_cmdline(spec(guest=guest), "kvm") == line
    assert parsed(spec(guest=guest), wiring()).find("os/initrd") is None


def test_an_emulated_cpu_takes_no_string_instructions() -> None:
    tcg, kvm = parsed(spec(), wiring()), parsed(spec(), wiring(accelerator="kvm"))
    off = {feature.get("name") for feature in tcg.findall("cpu/feature[@policy='disable']")}
    assert {"erms", "fsrm"} <= off
    assert (tcg.findtext("os/cmdline") or "").split()[-1] == "clearcpuid=rep_good,395"
    assert kvm.find("cpu/feature") is None
    assert "clearcpuid" not in (kvm.findtext("os/cmdline") or "")
    own = GuestImage("v1", 1, Path("/k"), None, Path("/r"), "clearcpuid=0", "6.1")
    assert domain.kernel_cmdline(spec(guest=own), "tcg").count("clearcpuid") == 1


def test_accelerators() -> None:
    tcg, kvm = parsed(spec(), wiring()), parsed(spec(), wiring(accelerator="kvm"))
    assert (tcg.get("type"), attributes(tcg, "cpu")["mode"]) == ("qemu", "maximum")
    assert (kvm.get("type"), attributes(kvm, "cpu")["mode"]) == ("kvm", "host-passthrough")


def test_ports_for_nics_to_come() -> None:
    root = parsed(spec(tap="vt0", mac="02:00:00:00:00:01"), wiring(extra_nics=2))
    ports = root.findall("devices/controller[@model='pcie-root-port']")
    assert [(port.get("index"), attributes(port, "address")["slot"]) for port in ports] == [
        ("1", "0x10"),
        ("2", "0x11"),
    ]
    assert parsed(spec(), wiring()).find("devices/controller[@model='pcie-root-port']") is None
    text = ET.tostring(root, encoding="unicode")
    nics, free = domain.nics_in(text)
    assert (nics, free) == ({"vt0": 0}, [1, 2])
    nic = ET.fromstring(domain.nic_xml("vt01", "0a:00:00:00:00:01", 4, 1))
    assert attributes(nic, "mac") == {"address": "0a:00:00:00:00:01"}
    assert attributes(nic, "target") == {"dev": "vt01", "managed": "no"}
    assert attributes(nic, "driver") == {"queues": "4"}
    assert attributes(nic, "address")["bus"] == "0x01"
    devices = root.find("devices")
    assert devices is not None
    devices.append(nic)
    assert domain.nics_in(ET.tostring(root, encoding="unicode")) == ({"vt0": 0, "vt01": 1}, [2])


def test_every_end_ends_the_domain() -> None:
    root = parsed(spec(), wiring())
    assert [root.findtext(event) for event in ("on_poweroff", "on_reboot", "on_crash")] == ["destroy"] * 3


def test_a_vhost_user_device_is_json_and_needs_shared_memory() -> None:
    root = parsed(spec(), wiring(vsock=domain.VsockDevice(Path("/r/a,b/vhost"))))
    arguments = [element.get("value", "") for element in root.findall(QEMU_ARG)]
    assert arguments[0::2] == ["-chardev", "-device"]
    assert arguments[1] == "socket,id=vmrt-vsock-chr,path=/r/a,,b/vhost"
    assert json.loads(arguments[3])["driver"] == "vhost-user-vsock-pci"
    assert attributes(root, "memoryBacking/source")["type"] == "memfd"
    assert attributes(root, "memoryBacking/access")["mode"] == "shared"
    assert root.find("devices/vsock") is None


def test_the_kernels_vsock_needs_neither() -> None:
    root = parsed(spec(), wiring(vsock=domain.VsockDevice(None)))
    assert root.findall(QEMU_ARG) == []
    assert root.find("memoryBacking") is None
    assert attributes(root, "devices/vsock/cid")["auto"] == "yes"


def test_a_share_is_a_vhost_user_device_too() -> None:
    root = parsed(spec(), wiring(vsock=domain.VsockDevice(None), share_socket=Path("/r/fs")))
    assert attributes(root, "devices/filesystem/source")["socket"] == "/r/fs"
    assert attributes(root, "devices/filesystem/target")["dir"] == domain.SHARE_TAG
    assert root.find("memoryBacking") is not None


def test_nic_is_an_existing_tap_that_libvirt_leaves_alone() -> None:
    root = parsed(spec(tap="vt0", mac="02:00:00:00:00:07"), wiring())
    assert attributes(root, "devices/interface/target") == {"dev": "vt0", "managed": "no"}
    assert attributes(root, "devices/interface/mac")["address"] == "02:00:00:00:00:07"
    assert root.find("devices/interface/mtu") is None
    assert root.find("devices/interface/driver") is None
    several = parsed(spec(tap="vt0", mac="02:00:00:00:00:07"), wiring(nic_queues=4))
    assert attributes(several, "devices/interface/driver") == {"queues": "4"}
    assert parsed(spec(), wiring()).find("devices/interface") is None


def test_no_needless_devices() -> None:
    devices = parsed(spec(), wiring()).find("devices")
    assert devices is not None
    assert {element.tag for element in devices} == {"emulator", "disk", "controller", "serial", "memballoon", "rng"}
    assert attributes(devices, "memballoon")["freePageReporting"] == "on"
    assert attributes(devices, "controller[@type='usb']")["model"] == "none"


MIB = 1024**2


def test_a_vm_that_can_grow() -> None:
    grown = spec(vcpus=2, memory_bytes=256 * MIB, max_vcpus=4, max_memory_bytes=1023 * MIB)
    root = parsed(grown, wiring())
    # In pieces that the guest can take: 1023 MiB are not.
    extra = 764 * MIB
    assert attributes(root, "vcpu") == {"current": "2"}
    assert root.findtext("vcpu") == "4"
    assert root.findtext("maxMemory") == root.findtext("memory") == str(256 * MIB + extra)
    cell = {"id": "0", "cpus": "0-3", "memory": str(256 * MIB), "unit": "b", "memAccess": "shared"}
    assert attributes(root, "cpu/numa/cell") == cell
    target = root.find("devices/memory[@model='virtio-mem']/target")
    assert target is not None
    assert (target.findtext("size"), target.findtext("requested")) == (str(extra), "0")
    assert "memory_hotplug.online_policy=auto-movable" in (root.findtext("os/cmdline") or "")


def test_a_vm_that_cannot_grow_has_nothing_for_it() -> None:
    root = parsed(spec(vcpus=2, memory_bytes=256 * MIB, max_vcpus=1, max_memory_bytes=257 * MIB), wiring())
    assert (root.findtext("vcpu"), attributes(root, "vcpu")) == ("2", {})
    assert root.find("maxMemory") is None
    assert root.find("cpu/numa") is None
    assert root.find("devices/memory") is None
    assert "memory_hotplug" not in (root.findtext("os/cmdline") or "")


LIVE = """
<domain><memory unit='KiB'>1044480</memory><vcpu current='{current}'>4</vcpu>
<cpu><numa><cell id='0' cpus='0-3' memory='262144' unit='KiB' memAccess='shared'/></numa></cpu>
<devices><memory model='virtio-mem'><target><size unit='KiB'>782336</size><node>0</node><block unit='KiB'>2048</block>
<requested unit='KiB'>8192</requested><current unit='KiB'>4096</current></target><alias name='virtiomem0'/></memory>
</devices></domain>
"""


def test_the_size_of_a_live_domain() -> None:
    live = LIVE.format(current=2)
    assert domain.size_in(live) == VmSize(2, 260 * MIB, 4, 1020 * MIB, 256 * MIB)
    fixed = "<domain><memory unit='KiB'>262144</memory><vcpu>3</vcpu><devices/></domain>"
    assert domain.size_in(fixed) == VmSize(3, 256 * MIB, 3, 256 * MIB, 256 * MIB)
    assert domain.memory_request_xml(fixed, 300 * MIB) is None


@pytest.mark.parametrize(("memory", "plugged"), [(100, 0), (256, 0), (257, 4), (260, 4), (1020, 764)])
def test_what_the_guest_is_asked_to_plug(memory: int, plugged: int) -> None:
    xml = domain.memory_request_xml(LIVE.format(current=2), memory * MIB)
    assert xml is not None
    assert ET.fromstring(xml).findtext("target/requested") == str(plugged * MIB)


def test_a_user_of_its_own() -> None:
    assert parsed(spec(), wiring()).find("seclabel") is None
    root = parsed(spec(), wiring(owner=(70000, 36)))
    assert attributes(root, "seclabel") == {"type": "static", "model": "dac", "relabel": "no"}
    assert root.findtext("seclabel/label") == "+70000:+36"


def test_a_host_device_is_not_cached_and_its_flushes_count() -> None:
    own = ET.fromstring(domain.disk_xml(Disk("a", Path("/f"), readonly=False), 0))
    host = ET.fromstring(domain.disk_xml(Disk("b", Path("/dev/x"), readonly=False), 1, Path("/r/d/b")))
    assert (own.get("type"), host.get("type")) == ("file", "block")
    assert (attributes(own, "driver")["cache"], attributes(host, "driver")["cache"]) == ("unsafe", "none")
    assert attributes(host, "source") == {"dev": "/r/d/b"}


def test_pci_slots_are_used_once() -> None:
    grown = spec(tap="vt0", mac="02:00:00:00:00:07", max_memory_bytes=2**40)
    root = parsed(grown, wiring(share_socket=Path("/r/fs")))
    slots = [element.get("slot") for element in root.iterfind(".//address[@type='pci']")]
    device = json.loads(root.findall(QEMU_ARG)[3].get("value", ""))
    slots.append(f"{int(device['addr'], 16):#04x}")
    assert len(slots) == len(set(slots)) == 8


def test_disks_are_luns_found_by_serial() -> None:
    disks = (Disk("scratch-1", Path("/d/s"), readonly=False), Disk("layer-1", Path("/d/l")))
    xml = domain.domain_xml(spec(disks=disks), wiring())
    assert domain.disks_in(xml) == domain.units_of(spec(disks=disks)) == {"scratch-1": 0, "layer-1": 1}
    root = ET.fromstring(xml)
    scratch, layer = root.findall("devices/disk")[1:]
    assert scratch.find("readonly") is None
    assert attributes(scratch, "driver")["discard"] == "unmap"
    assert layer.find("readonly") is not None
    assert attributes(root, "devices/disk/target") == {"dev": "vda", "bus": "virtio"}
    assert root.findtext("devices/disk/serial") == domain.ROOT_SERIAL


def test_a_hot_plugged_disk_takes_the_lowest_free_lun() -> None:
    assert domain.free_unit({}) == 0
    assert domain.free_unit({"a": 0, "c": 2}) == 1
    disk = ET.fromstring(domain.disk_xml(Disk("layer-9", Path("/d/l")), 27))
    assert attributes(disk, "target") == {"dev": "sdab", "bus": "scsi"}
    assert attributes(disk, "address")["unit"] == "27"


@given(st.sets(st.integers(0, 5000), min_size=2, max_size=2))
def test_disk_names_differ(units: set[int]) -> None:
    names = {attributes(ET.fromstring(domain.disk_xml(Disk("s", Path("/d")), unit)), "target")["dev"] for unit in units}
    assert len(names) == 2


def test_metadata_names_the_owner() -> None:
    root = parsed(spec(), wiring())
    element = root.find(f"metadata/{{{domain.METADATA_URI}}}vm")
    assert element is not None
    assert domain.identity_in(ET.tostring(element, encoding="unicode")) == domain.DomainIdentity("i1", "abc")
    assert root.findtext("name") == domain.domain_name("i1", "abc") == "vmrt-i1-abc"


@pytest.mark.parametrize("metadata", ["", "<a", "<vm/>", "<vm instance='i'/>", "<vm instance='i' id=''/>"])
def test_foreign_metadata_is_nobodys(metadata: str) -> None:
    assert domain.identity_in(metadata) is None


def test_text_from_the_outside_cannot_leave_its_place() -> None:
    hostile = "</cmdline></os><evil/>\"'&"
    guest = GuestImage("v1", 1, Path("/k"), None, Path(f"/r{hostile}"), hostile, "6.1")
    root = parsed(spec(guest=guest, disks=(Disk("s", Path(f"/d{hostile}")),)), wiring())
    assert root.find(".//evil") is None
    assert attributes(root, "devices/disk/source")["file"] == f"/r{hostile}"


def test_cid_of_a_live_domain() -> None:
    xml = "<domain><devices><vsock model='virtio'><cid auto='yes' address='17'/></vsock></devices></domain>"
    assert domain.cid_in(xml) == 17
    assert domain.cid_in("<domain><devices/></domain>") is None
