"""Block devices of the host in containers, and what of a pod's data is on the host's disk when."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from demo.daemon import Daemon
from tests.e2e.conftest import Pod, run_pod
from tests.e2e.test_volumes import fails, inspected, mount, sh, until
from vmrt.proto.runtime.v1 import api_pb2 as cri

MIB = 1024**2


@contextmanager
def loop_device(backing: Path, size_mib: int) -> Iterator[Path]:
    """A block device of this host."""
    with backing.open("wb") as file:
        file.truncate(size_mib * MIB)
    command = ["losetup", "--find", "--show", str(backing)]
    device = Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def users(pod: Pod, device: Path) -> int:
    """How many descriptors the VM's processes have on a device."""
    number, count = device.stat().st_rdev, 0
    for pid in inspected(pod)["pids"]:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            count += fd.exists() and fd.stat().st_rdev == number
    return count


@pytest.fixture
def own_pod(daemon: Daemon, tmp_path: Path) -> Iterator[Pod]:
    """A pod that the test may stop."""
    pod = run_pod(daemon, tmp_path, "block")
    yield pod
    daemon.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod.id))
    daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod.id))


def test_block_devices(own_pod: Pod, tmp_path: Path) -> None:
    pod = own_pod
    backing, other = tmp_path / "backing", tmp_path / "other"
    with loop_device(backing, 32) as device, loop_device(other, 16) as read_only:
        other.write_bytes(b"read me".ljust(16 * MIB, b"."))
        owner = device.stat()
        link = tmp_path / "published"
        link.symlink_to(device)  # as a CSI driver's path is
        devices = [
            cri.Device(host_path=str(link), container_path="/dev/data", permissions="rwm"),
            cri.Device(host_path=str(read_only), container_path="/dev/other", permissions="r"),
        ]
        first = pod.run("sleep", "1000", devices=devices)
        second = pod.run("sleep", "1000", devices=devices[:1])
        sizes = sh(pod, first, "blockdev --getsize64 /dev/data; blockdev --getsize64 /dev/other")
        assert sizes.split() == [str(32 * MIB), str(16 * MIB)]
        # A flush reaches the device; both containers see one page cache.
        sh(pod, first, "echo from-the-guest | dd of=/dev/data bs=512 seek=8 conv=fsync,notrunc 2>/dev/null")
        assert backing.read_bytes()[4096:4110] == b"from-the-guest"
        assert sh(pod, second, "dd if=/dev/data bs=512 skip=8 count=1 2>/dev/null | head -c 14") == "from-the-guest"
        assert sh(pod, first, "head -c 7 /dev/other") == "read me"
        fails(pod, first, "echo x | dd of=/dev/other conv=fsync,notrunc")
        fails(pod, second, "mknod /tmp/sda b 8 0 && head -c 1 /tmp/sda")  # the scratch disk
        assert other.read_bytes()[:7] == b"read me"
        # It grows.
        os.truncate(backing, 48 * MIB)
        subprocess.run(["losetup", "--set-capacity", device], check=True)
        until(lambda: sh(pod, first, "blockdev --getsize64 /dev/data") == str(48 * MIB), "the device's new size")
        # It is in the VM as long as a container uses it, and whose it is on the host has not changed.
        pod.remove(first)
        assert users(pod, read_only) == 0
        assert users(pod, device) > 0
        assert sh(pod, second, "dd if=/dev/data bs=512 skip=8 count=1 2>/dev/null | head -c 14") == "from-the-guest"
        pod.remove(second)
        assert users(pod, device) == 0
        assert (device.stat().st_uid, device.stat().st_gid, device.stat().st_mode) == (
            owner.st_uid,
            owner.st_gid,
            owner.st_mode,
        )
        # What was written and not flushed reaches the device before the VM goes.
        script = "exec 3<>/dev/data; echo not-flushed >&3; echo written; sleep 1000"
        third = pod.run("sh", "-c", script, devices=devices[:1])
        until(lambda: "written" in Path(pod.status(third).log_path).read_text(), "the write")
        pod.daemon.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod.id))
        assert backing.read_bytes()[:11] == b"not-flushed"


def test_a_direct_volume_is_mounted_in_the_guest(pod: Pod, direct_dir: Path, tmp_path: Path) -> None:
    volume, point = tmp_path / "published", tmp_path / "mounted"
    volume.mkdir()
    point.mkdir()
    with loop_device(tmp_path / "image", 32) as device:
        subprocess.run(["mkfs.ext4", "-q", device], check=True)
        told = direct_dir / base64.urlsafe_b64encode(str(volume).encode()).decode()
        told.mkdir()
        info = {"volume-type": "block", "device": str(device), "fstype": "ext4", "options": ["noatime"]}
        (told / "mountInfo.json").write_text(json.dumps({**info, "metadata": {"fsGroup": "4321"}}))
        first = pod.run("sleep", "1000", mounts=[mount(volume, "/d")])
        second = pod.run("sleep", "1000", mounts=[mount(volume, "/d", readonly=True)])
        assert sh(pod, first, "grep ' /d ' /proc/mounts | cut -d' ' -f3; stat -c %g /d/lost+found") == "ext4\n4321"
        assert int(sh(pod, first, "stat -c %a /d"), 8) & 0o2770 == 0o2770
        sh(pod, first, "echo from-the-guest > /d/file")
        assert sh(pod, second, "cat /d/file") == "from-the-guest"
        assert "Read-only" in fails(pod, second, "touch /d/x")
        assert list(volume.iterdir()) == []
        pod.remove(first)
        assert users(pod, device) > 0
        pod.remove(second)
        assert users(pod, device) == 0
        subprocess.run(["mount", "-o", "ro,noload", device, point], check=True)
        try:
            assert (point / "file").read_text() == "from-the-guest\n"
        finally:
            subprocess.run(["umount", point], check=True)
        # One that cannot be mounted leaves nothing.
        (told / "mountInfo.json").write_text(json.dumps({**info, "fstype": "xfs"}))
        with pytest.raises(grpc.RpcError, match="xfs"):
            pod.create("true", mounts=[mount(volume, "/d")])
        assert users(pod, device) == 0


def test_a_device_without_a_medium_is_refused_by_name(pod: Pod, tmp_path: Path) -> None:
    with loop_device(tmp_path / "backing", 1) as device:
        pass
    with pytest.raises(grpc.RpcError, match=r"config.devices\[0\].host_path.*without a medium") as caught:
        pod.create("true", devices=[cri.Device(host_path=str(device), container_path="/dev/x", permissions="rw")])
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_fsync_in_a_volume_reaches_the_hosts_disk(pod: Pod, tmp_path: Path) -> None:
    """After it, a copy of the disk, as a power cut would leave it, has the data."""
    image, copy, point = tmp_path / "image", tmp_path / "copy", tmp_path / "mounted"
    point.mkdir()
    with loop_device(image, 32) as device:
        subprocess.run(["mkfs.ext4", "-q", device], check=True)
        subprocess.run(["mount", device, point], check=True)
        try:
            container = pod.run("sleep", "1000", mounts=[mount(point, "/data")])
            sh(pod, container, "echo kept | dd of=/data/file conv=fsync 2>/dev/null")
            copy.write_bytes(image.read_bytes())
            pod.remove(container)
        finally:
            subprocess.run(["umount", "-l", point], check=True)
    subprocess.run(["mount", "-o", "loop", copy, point], check=True)
    try:
        assert (point / "file").read_text() == "kept\n"
    finally:
        subprocess.run(["umount", point], check=True)


def test_deleted_files_give_the_scratch_disks_blocks_back(pod: Pod) -> None:
    disk = pod.daemon.root / "scratch" / f"{inspected(pod)['id']}.img"

    def used() -> int:
        return disk.stat().st_blocks * 512

    container = pod.run("sleep", "1000")
    sh(pod, container, "sync")  # what other containers have written
    before = used()
    assert before < disk.stat().st_size // 10  # sparse
    sh(pod, container, "dd if=/dev/zero of=/big bs=1M count=32 2>/dev/null; sync")
    assert used() >= before + 30 * MIB
    sh(pod, container, "rm /big; sync")
    until(lambda: used() < before + 8 * MIB, "the discarded blocks")
    pod.remove(container)
