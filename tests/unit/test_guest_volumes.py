"""Volumes of the guest: which mounts are, direct-assigned ones, and who holds which block device."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vmrt.config import VolumesConfig
from vmrt.errors import InvalidArgumentError, VmError, VmrtError
from vmrt.model import Device, Disk, Mount, Propagation
from vmrt.pods import (
    block_device,
    block_devices,
    direct_volumes,
    empty_dir_disks,
    guest_volumes,
    loop_device,
    mount_tree,
)
from vmrt.pods.block_device import BlockDevice
from vmrt.pods.guest_volumes import Memory, Mirrored
from vmrt.pods.table import LiveContainer, LiveSandbox, PodTable

CONFIG = VolumesConfig()
DEVICE = BlockDevice("field", "/dev/x", (7, 3), False)


def volume(root: Path, plugin: str) -> Path:
    path = root / "pods/uid/volumes" / f"kubernetes.io~{plugin}" / "v"
    path.mkdir(parents=True)
    return path


@pytest.fixture
def tmpfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An emptyDir that looks like a mounted tmpfs, and a sub-path of it bound elsewhere."""
    place = volume(tmp_path, "empty-dir")
    (tmp_path / "part").mkdir()
    mounts = [
        mount_tree.Entry(1, "8:1", "/", "/", "ext4"),
        mount_tree.Entry(2, "0:77", "/", str(place), "tmpfs"),
        mount_tree.Entry(3, "0:77", "/sub", str(tmp_path / "part"), "tmpfs"),
    ]

    def entry_of(fd: int) -> mount_tree.Entry:
        path = os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115
        return next(entry for entry in reversed(mounts) if path.startswith(entry.place))

    monkeypatch.setattr(mount_tree, "mounts", lambda: mounts)
    monkeypatch.setattr(mount_tree, "entry_of", entry_of)
    return place


def plan_one(mount: Mount, config: VolumesConfig = CONFIG) -> guest_volumes.Place:
    (where,) = guest_volumes.plan([mount], config)
    return where


def test_an_empty_dir_in_memory_is_found_whole_and_in_part(tmpfs: Path, tmp_path: Path) -> None:
    tmpfs.chmod(0o2770)
    whole = plan_one(Mount("/m", str(tmpfs)))
    assert isinstance(whole, Memory)
    assert (whole.sub_path, whole.root.mode) == ("", 0o2770)
    assert whole.size_bytes > 0
    (tmpfs / "deep").mkdir()
    fd = os.open(tmp_path / "part", os.O_PATH)
    try:
        for path, way in (
            (str(tmp_path / "part"), "sub"),
            (f"/proc/self/fd/{fd}", "sub"),
            (str(tmpfs / "deep"), "deep"),
        ):
            part = plan_one(Mount("/m", path))
            if "/pods/" not in path and not path.startswith("/proc/"):
                assert part is None  # only kubelet's paths and descriptors are looked at
                continue
            assert isinstance(part, Memory), path
            assert (part.name, part.sub_path) == (whole.name, way)
            assert guest_volumes.storage(part, 4, readonly=True).volume_path == f"{whole.name}/{way}"
    finally:
        os.close(fd)
    assert plan_one(Mount("/m", str(tmpfs)), replace(CONFIG, memory_empty_dir="share")) is None
    assert plan_one(Mount("/m", str(tmpfs), propagation=Propagation.BIDIRECTIONAL)) is None
    assert plan_one(Mount("/m", "", image="i")) is None


def test_huge_pages_are_the_guests(tmpfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = mount_tree.Entry(2, "0:77", "/", str(tmpfs), "hugetlbfs")
    monkeypatch.setattr(mount_tree, "entry_of", lambda fd: entry)
    for config in (CONFIG, replace(CONFIG, memory_empty_dir="share")):
        whole = plan_one(Mount("/m", str(tmpfs)), config)
        assert isinstance(whole, Memory)
        request = whole.request()
        # A hugetlbfs's block is its page; the size is what the containers have had set apart.
        assert (request.page_size_bytes, request.size_bytes) == (os.statvfs(tmpfs).f_bsize, 0)


def test_only_whole_read_only_volumes_are_mirrored(tmp_path: Path) -> None:
    path = volume(tmp_path, "secret")
    (path / "sub").mkdir()
    assert plan_one(Mount("/s", str(path), readonly=True)) == Mirrored(str(path))
    assert plan_one(Mount("/s", str(path))) is None
    assert plan_one(Mount("/s", str(path / "sub"), readonly=True)) is None
    assert plan_one(Mount("/s", str(path), readonly=True), replace(CONFIG, files="share")) is None
    assert plan_one(Mount("/s", str(volume(tmp_path, "csi")), readonly=True)) is None


# --- direct-assigned volumes ------------------------------------------------------------------------------------------


def info(**fields: object) -> bytes:
    return json.dumps({"volume-type": "block", "device": "/dev/x", "fstype": "ext4", **fields}).encode()


def test_a_direct_volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(path: str, field: str, *, readonly: bool) -> BlockDevice:
        return replace(DEVICE, readonly=readonly)

    monkeypatch.setattr(direct_volumes, "block_device", found)
    config = replace(CONFIG, direct_dir=str(tmp_path))
    path = "/var/lib/kubelet/pods/u/volumes/kubernetes.io~csi/pv/mount"
    assert plan_one(Mount("/d", path), config) is None
    directory = tmp_path / base64.urlsafe_b64encode(path.encode()).decode()
    directory.mkdir()
    metadata = {"fsGroup": "2000", "fsGroupChangePolicy": "OnRootMismatch"}
    (directory / "mountInfo.json").write_bytes(info(options=["noatime"], metadata=metadata))
    where = plan_one(Mount("/d", path, readonly=True), config)
    assert isinstance(where, direct_volumes.Direct)
    # Whether one container only reads does not matter: a file system is mounted once.
    disk = where.request().disk
    assert (disk.serial, disk.fstype, disk.readonly, list(disk.options)) == (DEVICE.serial, "ext4", False, ["noatime"])
    assert (disk.fs_group, disk.on_root_mismatch) == (2000, True)
    (directory / "mountInfo.json").write_bytes(info(options=["ro"]))
    where = plan_one(Mount("/d", path), config)
    assert isinstance(where, direct_volumes.Direct)
    assert where.request().disk.readonly
    assert not where.request().disk.HasField("fs_group")
    assert plan_one(Mount("/d", path), CONFIG) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "no JSON object"),
        (b"[]", "no JSON object"),
        (b"{", "no JSON object"),
        (b" " * 70000, "octets"),
        (info(device="x"), "device and fstype"),
        (info(fstype=""), "device and fstype"),
        (info(fstype=3), "device and fstype"),
        (info(options="ro"), "options"),
        (info(options=[1]), "options"),
        (info(metadata=[1]), "metadata"),
        (info(metadata={"fsGroup": "x"}), "fsGroup"),
        (info(metadata={"fsGroup": str(2**32)}), "fsGroup"),
        (info(**{"volume-type": "vfio"}), "volume-type"),
        (info(device="/dev/null"), "no block device"),
    ],
)
def test_what_a_driver_tells_is_checked(text: bytes, message: str) -> None:
    with pytest.raises(VmrtError, match=message) as caught:
        direct_volumes.parse(text, "config.mounts[3]: /x")
    assert "config.mounts[3]: /x" in str(caught.value)


# --- block devices ----------------------------------------------------------------------------------------------------


class Vm:
    """Records plugs; both ends of a disk."""

    def __init__(self) -> None:
        self.disks: list[str] = []
        self.calls: list[str] = []
        self.fails = ""

    def _call(self, name: str, serial: str) -> None:
        self.calls.append(name)
        if self.fails == name:
            raise VmError("it will not")

    async def attach_disk(self, vm_id: str, disk: Disk) -> None:
        self._call("attach", disk.serial)
        self.disks.append(disk.serial)

    async def detach_disk(self, vm_id: str, serial: str) -> None:
        self._call("detach", serial)
        self.disks.remove(serial)

    async def release_disk(self, serial: str, *, timeout_s: float) -> None:
        self._call("release", serial)

    async def release_volume(self, name: str, *, timeout_s: float) -> None:
        self._call("unmount", name)


def world(vm: Vm, *users: tuple[str, ...]) -> tuple[PodTable, LiveSandbox, list[LiveContainer]]:
    sandbox = LiveSandbox(cast(Any, SimpleNamespace(id="s", vm_id="v")), agent=cast(Any, vm))
    containers = [
        cast(LiveContainer, SimpleNamespace(id=str(n), record=SimpleNamespace(block_serials=serials)))
        for n, serials in enumerate(users)
    ]
    table = SimpleNamespace(hypervisor=vm, containers_of=lambda sandbox_id: containers)
    return cast(PodTable, table), sandbox, containers


async def test_a_device_is_plugged_once_and_goes_with_its_last_user() -> None:
    vm = Vm()
    serial = DEVICE.serial
    table, sandbox, containers = world(vm, (serial,), (serial,))
    await asyncio.gather(*(block_devices.attach(table, sandbox, [DEVICE]) for _ in range(2)))
    assert vm.calls == ["attach"]
    first, second = containers
    await block_devices.detach(table, sandbox, first)
    assert vm.disks == [serial]
    containers.remove(first)
    await block_devices.detach(table, sandbox, second)
    assert vm.disks == []
    assert vm.calls == ["attach", "unmount", "release", "detach"]
    await block_devices.attach(table, sandbox, [DEVICE])
    assert vm.disks == [serial]


async def test_a_plug_that_fails_names_the_field_and_can_be_tried_again() -> None:
    vm = Vm()
    vm.fails = "attach"
    table, sandbox, _ = world(vm, (DEVICE.serial,))
    with pytest.raises(VmError, match="field: it will not"):
        await block_devices.attach(table, sandbox, [DEVICE])
    assert sandbox.blocks == {}
    vm.fails = ""
    await block_devices.attach(table, sandbox, [DEVICE])
    assert vm.disks == [DEVICE.serial]


def test_devices_of_the_guest_are_no_block_devices_of_the_host() -> None:
    assert block_devices.plan([Device("/dev/x", "/dev/null", "rw"), Device("/dev/y", "/no/such", "r")]) == ()
    serials = {
        replace(DEVICE, readonly=ro, number=number).serial for ro in (True, False) for number in ((7, 1), (7, 2))
    }
    assert len(serials) == 4
    assert all(len(serial) <= 36 and serial.startswith("b-") for serial in serials)


def test_a_device_without_a_medium(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stat, "S_ISBLK", lambda mode: True)
    monkeypatch.setattr(block_device, "size_bytes", lambda number: 0)
    with pytest.raises(InvalidArgumentError, match=r"config.devices\[0\].host_path.*without a medium"):
        block_devices.plan([Device("/dev/x", str(tmp_path), "rw")])
    monkeypatch.setattr(block_device, "size_bytes", lambda number: 512)
    (block,) = block_devices.plan([Device("/dev/x", str(tmp_path), "r")])
    assert block.readonly
    assert block.index == 0


# --- emptyDirs on disks -----------------------------------------------------------------------------------------------


def test_an_empty_dir_is_found_by_its_path_and_by_a_bind_of_a_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The file system is mounted at tmp_path/lib; the kernel tells a bind's root by the path in that file system.
    base = tmp_path / "lib"
    place = volume(base, "empty-dir")
    (place / "a/b").mkdir(parents=True)
    part = tmp_path / "part"
    part.mkdir()
    whole_fs = mount_tree.Entry(1, "8:1", "/", str(base), "ext4")
    bind = mount_tree.Entry(2, "8:1", f"/{place.relative_to(base)}/a/b", str(part), "ext4")
    monkeypatch.setattr(mount_tree, "mounts", lambda: [whole_fs, bind])
    config = replace(CONFIG, empty_dir="disk")

    def at(path: Path, own: mount_tree.Entry) -> guest_volumes.Place:
        monkeypatch.setattr(mount_tree, "entry_of", lambda fd: own)
        fd = os.open(path, os.O_PATH)
        try:
            return plan_one(Mount("/e", f"/proc/self/fd/{fd}"), config)
        finally:
            os.close(fd)

    place.chmod(0o2775)
    whole = plan_one_at(place, config, monkeypatch, whole_fs)
    assert whole.device.path == f"{place}/.vmrt-disk"
    assert (whole.sub_path, whole.root.mode) == ("", 0o2775)
    for path, own in ((place / "a/b", whole_fs), (part, bind)):
        found = at(path, own)
        assert isinstance(found, empty_dir_disks.EmptyDirDisk)
        assert (found.name, found.sub_path) == (whole.name, "a/b")
        request = found.request()
        assert (request.sub_path, request.disk.fstype, request.root.mode) == ("a/b", "ext4", 0o2775)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert at(elsewhere, mount_tree.Entry(3, "8:2", "/", str(tmp_path), "ext4")) is None
    # Known by its name in a file system of which that part is mounted nowhere here: left to the share.
    lost = mount_tree.Entry(4, "8:9", "/x/pods/u/volumes/kubernetes.io~empty-dir/v/a", str(part), "ext4")
    assert at(part, lost) is None


def plan_one_at(
    path: Path, config: VolumesConfig, monkeypatch: pytest.MonkeyPatch, own: mount_tree.Entry
) -> empty_dir_disks.EmptyDirDisk:
    monkeypatch.setattr(mount_tree, "entry_of", lambda fd: own)
    found = plan_one(Mount("/e", str(path)), config)
    assert isinstance(found, empty_dir_disks.EmptyDirDisk)
    return found


def test_a_link_in_the_place_of_a_disk_is_not_followed(tmp_path: Path) -> None:
    secret, link, fifo = tmp_path / "secret", tmp_path / "link", tmp_path / "fifo"
    secret.write_bytes(b"secret")
    link.symlink_to(secret)
    os.mkfifo(fifo)
    for path in (link, fifo):
        with pytest.raises(OSError, match=r"symbolic link|regular file"), loop_device.opened(path):
            pass
    template = tmp_path / "template"
    template.write_bytes(b"new")
    empty_dir_disks._make(template, link)
    assert secret.read_bytes() == b"secret"
