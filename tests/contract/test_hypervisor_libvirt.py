"""What only the libvirt driver can show: confinement, helpers, evidence of how a VM ended, crashes of the daemon."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.contract import real_hypervisor as real
from vmrt.errors import VmError, VmGoneError
from vmrt.hypervisor.libvirt_driver import LibvirtHypervisor
from vmrt.model import Disk, VmEventKind
from vmrt.spawn import ProcessId


@pytest.fixture(autouse=True)
def real_machine() -> None:
    real.need_real()


@pytest.fixture
async def hypervisor() -> AsyncIterator[LibvirtHypervisor]:
    hypervisor = await real.opened()
    yield hypervisor
    await hypervisor.destroy("one")
    await hypervisor.close()
    assert real.leftovers() == []


def status_of(process: ProcessId) -> dict[str, str]:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


async def test_qemu_is_confined_and_the_share_is_served(hypervisor: LibvirtHypervisor) -> None:
    share = real.root() / "share"
    share.mkdir(exist_ok=True)
    scratch = real.small_disk("scratch", readonly=False)
    layer = real.small_disk("layer")
    await hypervisor.boot(real.spec("one", real.real_guest(), share_dir=share, disks=(scratch, layer)))
    qemu, *helpers = hypervisor.processes("one")
    assert helpers
    status = status_of(qemu)
    assert "0" not in status["Uid"].split()
    assert int(status["CapEff"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    command = Path(f"/proc/{qemu.pid}/cmdline").read_text()
    assert "vhost-user-fs-pci" in command
    # What pods share stays root's; what is this pod's own is QEMU's user's.
    assert layer.path.stat().st_uid == 0
    assert str(scratch.path.stat().st_uid) in status["Uid"].split()
    console = real.root() / "vms" / "one" / "console"
    assert stat.S_IMODE(console.stat().st_mode) == 0o600


async def test_a_host_device_is_opened_no_further_than_asked(hypervisor: LibvirtHypervisor) -> None:
    await hypervisor.boot(real.spec("one", real.real_guest()))
    qemu = hypervisor.processes("one")[0]
    node = real.root() / "vms" / "one" / "d" / "volume"
    with real.loop_device(1024**2) as (device, _):
        for readonly, mode in ((True, os.O_RDONLY), (False, os.O_RDWR)):
            await hypervisor.attach_disk("one", Disk("volume", device, readonly=readonly))
            assert node.stat().st_rdev == device.stat().st_rdev
            assert node.stat().st_uid == 0
            assert access_modes(qemu, node) == {mode}
            await hypervisor.detach_disk("one", "volume")
            assert not node.exists()
            assert access_modes(qemu, node) == set()
        await hypervisor.attach_disk("one", Disk("volume", device))
        await hypervisor.destroy("one")


def access_modes(process: ProcessId, path: Path) -> set[int]:
    """Return how a process has a file open: O_RDONLY, O_RDWR."""
    modes = set()
    for link in Path(f"/proc/{process.pid}/fd").iterdir():
        if str(link.readlink()).startswith(str(path)):
            flags = Path(f"/proc/{process.pid}/fdinfo/{link.name}").read_text().split("flags:")[1].split()[0]
            modes.add(int(flags, 8) & os.O_ACCMODE)
    return modes


async def test_a_helper_that_dies_ends_the_vm(hypervisor: LibvirtHypervisor) -> None:
    await hypervisor.boot(real.spec("one", real.real_guest()))
    qemu, *helpers = hypervisor.processes("one")
    if not helpers:
        pytest.skip("with the kernel's vsock there is no helper")
    os.kill(helpers[0].pid, signal.SIGKILL)
    async with asyncio.timeout(10):
        event = await anext(hypervisor.events())
    assert event.kind is VmEventKind.CRASHED
    assert "vhost-device-vsock" in event.detail
    async with asyncio.timeout(10):
        while Path(f"/proc/{qemu.pid}/fd").exists() and status_of(qemu)["State"][0] != "Z":
            await asyncio.sleep(0.01)


async def test_clients_that_hang_up_early_do_no_harm(hypervisor: LibvirtHypervisor) -> None:
    """A daemon may be killed at any point of a connection: the published vhost-device-vsock 0.3.0 dies of it."""
    await hypervisor.boot(real.spec("one", real.real_guest()))
    _, *helpers = hypervisor.processes("one")
    if not helpers:
        pytest.skip("with the kernel's vsock there is no helper")
    descriptors = Path(f"/proc/{helpers[0].pid}/fd")
    before = len(list(descriptors.iterdir()))
    # Before a port is named; before the guest has answered; before its answer is read.
    for line, pause_s in (
        (b"", 0.0),
        (b"CONNECT %d\n" % real.CALL_PORT, 0.0),
        (b"CONNECT %d\n" % real.CALL_PORT, 0.004),
    ):
        for number in range(40):
            client = socket.socket(socket.AF_UNIX)
            client.connect(str(real.root() / "vms" / "one" / "s" / "vsock"))
            client.sendall(line)
            await asyncio.sleep(pause_s * (number % 4))
            client.close()
    _, writer = await hypervisor.dial("one", real.CALL_PORT, timeout_s=60)
    writer.close()
    async with asyncio.timeout(60):
        while len(list(descriptors.iterdir())) > before:
            await asyncio.sleep(0.05)
    assert hypervisor.list() == ["one"]


async def test_an_out_of_memory_kill_is_told_as_such(hypervisor: LibvirtHypervisor) -> None:
    await hypervisor.boot(real.spec("one", real.real_guest()))
    qemu = hypervisor.processes("one")[0]
    limit = memory_limit_of(qemu)
    if limit is None:
        pytest.skip("QEMU is in no memory cgroup of its own here")
    limit_file, used = limit
    limit_file.write_text(str(used + 1024**2))
    with pytest.raises(VmGoneError):
        for number in range(100):
            await hypervisor.attach_disk("one", real.small_disk(f"layer-{number}"))
    async with asyncio.timeout(10):
        assert (await anext(hypervisor.events())).kind is VmEventKind.OOM_KILLED


def memory_limit_of(process: ProcessId) -> tuple[Path, int] | None:
    """Return the file that limits QEMU's own memory cgroup, and how much is used."""
    for line in Path(f"/proc/{process.pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "qemu" not in path:
            continue
        for base, limit, used in (
            (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
            (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
        ):
            directory = base / path.lstrip("/")
            if (controllers in ("memory", "")) and (directory / limit).exists():
                return directory / limit, int((directory / used).read_text())
    return None


async def test_a_disk_that_qemu_may_not_read(hypervisor: LibvirtHypervisor) -> None:
    closed = real.root() / "closed"
    closed.mkdir(mode=0o700, exist_ok=True)
    path = closed / "layer.img"
    path.write_bytes(bytes(4096))
    with pytest.raises(VmError, match="may not pass through") as failure:
        await hypervisor.boot(real.spec("one", real.real_guest(), disks=(Disk("layer", path),)))
    assert str(closed) in failure.value.hint


# The embedded driver holds its root for as long as the process lives, so each daemon of this test is one of its own.
# The first boots a VM, starts to boot another, and is killed; the second says what it found.
DAEMON = """
import asyncio, dataclasses, json, sys
from pathlib import Path
from tests.contract import real_hypervisor as real
from tests.contract.fake_hypervisor import MUTE
real.root = lambda: Path(sys.argv[1])

async def first(hypervisor):
    await hypervisor.boot(real.spec("one", real.real_guest()))
    mute = dataclasses.replace(real.real_guest(), cmdline=f"{real.real_guest().cmdline} {MUTE}")
    half = asyncio.create_task(hypervisor.boot(real.spec("two", mute)))
    while not real.runs("two"):
        await asyncio.sleep(0.1)
    print("booted", flush=True)
    await half

async def second(hypervisor):
    found = {"list": hypervisor.list(), "files": sorted(path.name for path in (real.root() / "vms").iterdir())}
    _, writer = await hypervisor.dial("one", real.CALL_PORT)
    writer.close()
    await hypervisor.destroy("one")
    await hypervisor.close()
    print(json.dumps(found | {"left": real.leftovers()}), flush=True)

async def main():
    real.INSTANCE = "kill-9"
    await globals()[sys.argv[2]](await real.opened())

asyncio.run(main())
"""


async def start_daemon(root: Path, which: str) -> tuple[asyncio.subprocess.Process, bytes]:
    """Start one and return the line it prints."""
    argv = [sys.executable, "-c", DAEMON, str(root), which]
    daemon = await asyncio.create_subprocess_exec(*argv, stdout=subprocess.PIPE)
    assert daemon.stdout is not None
    async with asyncio.timeout(110):  # the first one boots a VM, which may take a minute
        return daemon, await daemon.stdout.readline()


async def test_after_kill_9_of_the_daemon() -> None:
    """Running VMs are adopted, half-booted ones and what is left of dead ones removed."""
    with tempfile.TemporaryDirectory(prefix="vmrt-hv-") as name:
        root = Path(name)
        root.chmod(0o711)
        daemon, line = await start_daemon(root, "first")
        assert line == b"booted\n"
        daemon.kill()
        await daemon.communicate()
        assert json.loads((root / "vms" / "two" / "vm.json").read_text())["ready"] is False
        (root / "vms" / "dead").mkdir()

        daemon, line = await start_daemon(root, "second")
        await daemon.communicate()
        assert json.loads(line) == {"list": ["one"], "files": ["one"], "left": []}
