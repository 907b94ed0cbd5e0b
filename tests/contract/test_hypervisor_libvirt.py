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
from vmrt import spawn
from vmrt.errors import InvalidArgumentError, VmError, VmGoneError
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
    for vm_id in ("one", "two"):
        await hypervisor.destroy(vm_id)
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
    share_process = hypervisor.share_process("one")
    assert share_process in helpers
    # Where volumes are mounted: in its own namespace, which has nothing but the share in it.
    (mounted,) = Path(f"/proc/{share_process.pid}/mountinfo").read_text().splitlines()
    assert mounted.split()[3].endswith("/share")
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


# Run as one VM's user: everything of another VM that a taken-over QEMU would try. Prints what worked.
INTRUDER = """
import ctypes, os, signal, socket, sys
from pathlib import Path

pid, directory, scratch = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
ctypes.CDLL(None)  # ptrace(2) comes from libc

def connect(path):
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(path))

def attach():
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ptrace(16, pid, 0, 0):  # PTRACE_ATTACH
        raise OSError(ctypes.get_errno(), "ptrace")

attempts = {
    "kill": lambda: os.kill(pid, 0),
    "ptrace": attach,
    "memory": lambda: open(f"/proc/{pid}/mem", "rb").close(),
    "environment": lambda: open(f"/proc/{pid}/environ", "rb").read(),
    "descriptors": lambda: os.listdir(f"/proc/{pid}/fd"),
    "root": lambda: os.listdir(f"/proc/{pid}/root/dev"),
    "read the scratch disk": lambda: open(scratch, "rb").close(),
    "write the scratch disk": lambda: open(scratch, "ab").close(),
    "sockets": lambda: os.listdir(directory / "s"),
    "vsock": lambda: connect(directory / "s" / "vsock"),
    "console socket": lambda: connect(directory / "console.sock"),
    "console": lambda: open(directory / "console", "rb").close(),
    "make a file": lambda: open(directory / "new", "wb").close(),
    "host device": lambda: open(directory / "d" / "volume", "rb").close(),
}
monitors = [path for path in sys.argv[4:]]
for path in monitors:
    attempts[path] = lambda path=path: connect(path)
for what, attempt in attempts.items():
    try:
        attempt()
    except OSError:
        continue
    print(what, flush=True)
"""


async def test_no_vm_reaches_another(hypervisor: LibvirtHypervisor) -> None:
    scratches = {vm_id: real.small_disk(f"scratch-{vm_id}", readonly=False) for vm_id in ("one", "two")}
    with real.loop_device(1024**2) as (device, _):
        for vm_id, scratch in scratches.items():
            await hypervisor.boot(real.spec(vm_id, real.real_guest(), disks=(scratch,)))
            await hypervisor.attach_disk(vm_id, Disk("volume", device, readonly=False))
        users = {}
        for vm_id in scratches:
            ids = {(status_of(process)["Uid"], status_of(process)["Gid"]) for process in hypervisor.processes(vm_id)}
            ((uids, gids),) = ids
            users[vm_id] = uids.split()[0], gids.split()[0]
            assert status_of(hypervisor.processes(vm_id)[0])["Groups"] in ("", users[vm_id][1])
        assert users["one"] != users["two"]
        for vm_id, other in (("one", "two"), ("two", "one")):
            monitors = [str(path) for path in (real.root() / "libvirt" / "lib" / "qemu").glob(f"*{other}*/*.sock")]
            for process in hypervisor.processes(other):
                directory = real.root() / "vms" / other
                arguments = (str(process.pid), str(directory), str(scratches[other].path), *monitors)
                tried = await as_user(users[vm_id], arguments)
                assert tried == [], f"{vm_id} reaches of {other}: {tried}"
            # The same attempts, by the other VM's own user: what they try is there.
            qemu = hypervisor.processes(other)[0]
            own = await as_user(users[other], (str(qemu.pid), str(directory), str(scratches[other].path)))
            assert {"kill", "read the scratch disk", "write the scratch disk", "sockets", "vsock", "host device"} <= {
                *own
            }
        await hypervisor.destroy("two")
        await hypervisor.destroy("one")
    assert not any(Path("/run/vmrt-uids", uid).exists() for uid, _ in users.values())


async def as_user(user: tuple[str, str], arguments: tuple[str, ...]) -> list[str]:
    """Run INTRUDER as a VM's user; return what worked."""
    setpriv = ("setpriv", f"--reuid={user[0]}", f"--regid={user[1]}", "--clear-groups", "--no-new-privs")
    done = await spawn.run((*setpriv, "/usr/bin/python3", "-I", "-c", INTRUDER, *arguments))
    return done.text().splitlines()


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


PARENT = f"vmrt-contract-{real.INSTANCE}/pod"


async def test_a_vm_lives_in_its_pods_cgroup_and_an_out_of_memory_kill_is_told(hypervisor: LibvirtHypervisor) -> None:
    await hypervisor.boot(real.spec("one", real.real_guest(), cgroup_parent=PARENT))
    cgroups = [cgroups_of(process) for process in hypervisor.processes("one")]
    if not cgroups[0]:
        pytest.skip("this host has no cgroup controllers")
    # All of the VM, under every controller that there is.
    assert all(found == cgroups[0] for found in cgroups)
    memory = next(
        (path for path in cgroups[0] if (path / MEMORY_LIMITS[0]).exists() or (path / MEMORY_LIMITS[1]).exists()), None
    )
    assert memory is not None
    limit = next(memory / name for name in MEMORY_LIMITS if (memory / name).exists())
    used = int((memory / limit.name.replace("limit", "usage").replace("max", "current")).read_text())
    limit.write_text(str(used + 1024**2))
    with pytest.raises(VmGoneError):
        for number in range(100):
            await hypervisor.attach_disk("one", real.small_disk(f"layer-{number}"))
    async with asyncio.timeout(60):
        assert (await anext(hypervisor.events())).kind is VmEventKind.OOM_KILLED
    await hypervisor.destroy("one")
    assert not [path for path in cgroups[0] if path.parents[1].exists()]


async def test_a_waiting_vm_is_placed_later(hypervisor: LibvirtHypervisor) -> None:
    await hypervisor.boot(real.spec("one", real.real_guest()))
    assert cgroups_of(hypervisor.processes("one")[0]) == []
    for parent in ("../../x", "a/../b"):
        with pytest.raises(InvalidArgumentError):
            await hypervisor.place("one", parent)
    await hypervisor.place("one", PARENT)
    placed = [cgroups_of(process) for process in hypervisor.processes("one")]
    if not placed[0]:
        pytest.skip("this host has no cgroup controllers")
    assert all(found == placed[0] for found in placed)
    await hypervisor.destroy("one")
    assert not [path for path in placed[0] if path.parents[1].exists()]


MEMORY_LIMITS = ("memory.limit_in_bytes", "memory.max")


def cgroups_of(process: ProcessId) -> list[Path]:
    """Return the directories of the cgroups below PARENT that a process is in."""
    found = []
    mounts = {
        tuple(line.split(" - ")[1].split()[-1].split(",")[1:]): Path(line.split()[4])
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
        if " - cgroup" in line
    }
    for line in Path(f"/proc/{process.pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if PARENT in path:
            point = mounts.get(tuple(controllers.split(",")), Path("/sys/fs/cgroup"))
            found.append(point / path.lstrip("/"))
    return found


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
