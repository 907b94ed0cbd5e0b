"""What the tests of the libvirt driver share: where its guest is, its root, and what it may not leave behind.

The embedded libvirt driver takes one root per process, so all tests of a session share one.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmrt import guest_image
from vmrt.agent.layout import CALL_PORT
from vmrt.config import HypervisorConfig
from vmrt.hypervisor import cgroup
from vmrt.hypervisor.libvirt_driver import LibvirtHypervisor
from vmrt.model import Disk, GuestImage, VmSpec
from vmrt.pods.drivers import Hypervisor

GUEST = Path(__file__).parents[2] / ".cache" / "guest"
MEMORY_BYTES = 256 * 1024**2
INSTANCE = secrets.token_hex(4)

__all__ = [
    "CALL_PORT",
    "INSTANCE",
    "cpus_of",
    "leftovers",
    "loop_device",
    "make",
    "need_real",
    "oom_scores_of",
    "opened",
    "real_guest",
    "root",
    "runs",
    "small_disk",
    "spec",
]


def need_real() -> None:
    """Skip where VMs cannot run; under CI that fails."""
    if os.geteuid() == 0 and shutil.which("qemu-system-x86_64") and GUEST.exists():
        return
    reason = "the libvirt driver needs root, QEMU and the guest image (make setup)"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@functools.cache
def root() -> Path:
    """Make the root: short, for its sockets, and passable for QEMU's user, which pytest's directories are not."""
    path = Path(tempfile.mkdtemp(prefix="vmrt-hv-"))
    path.chmod(0o711)
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def real_guest() -> GuestImage:
    return guest_image.load(GUEST.resolve())


def make(**settings: object) -> LibvirtHypervisor:
    """Return a driver on the root: each is a daemon of its own."""
    return LibvirtHypervisor(HypervisorConfig(**settings), root(), INSTANCE)  # type: ignore[arg-type]


def oom_scores_of(hypervisor: Hypervisor, vm_id: str) -> set[int]:
    """Return what QEMU, its helpers and their children have."""
    pids = [pid for process in hypervisor.processes(vm_id) for pid in cgroup.family(process.pid)]
    return {int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in pids}


def cpus_of(hypervisor: Hypervisor, vm_id: str) -> set[frozenset[int]]:
    """Return what each thread of a VM's processes may run on."""
    return {
        frozenset(os.sched_getaffinity(int(thread.name)))
        for process in hypervisor.processes(vm_id)
        for pid in cgroup.family(process.pid)
        for thread in Path(f"/proc/{pid}/task").iterdir()
    }


async def opened(**settings: object) -> LibvirtHypervisor:
    """Return an open driver."""
    hypervisor = make(**settings)
    await hypervisor.open()
    return hypervisor


def spec(vm_id: str, guest: GuestImage, **fields: object) -> VmSpec:
    return VmSpec(vm_id, guest, vcpus=1, memory_bytes=MEMORY_BYTES, **fields)  # type: ignore[arg-type]


def small_disk(serial: str, *, readonly: bool = True) -> Disk:
    path = root() / f"{serial}.img"
    path.write_bytes(bytes(1024**2))
    return Disk(serial, path, readonly=readonly)


@contextlib.contextmanager
def loop_device(size_bytes: int) -> Iterator[tuple[Path, Path]]:
    """Give a block device of the host and the file behind it; skip where there is none to be had."""
    backing = root() / f"loop-{secrets.token_hex(4)}"
    with backing.open("wb") as file:
        file.truncate(size_bytes)
    made = subprocess.run(["losetup", "--find", "--show", backing], capture_output=True, text=True)
    if made.returncode != 0:
        backing.unlink()
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    try:
        yield Path(made.stdout.strip()), backing
    finally:
        subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)
        backing.unlink()


def runs(vm_id: str) -> bool:
    """Say whether a VM's QEMU runs, known by the directory in its command line; a quiet guest shows nothing else."""
    directory = os.fsencode(root() / "vms" / vm_id)
    return any(b"qemu-system" in command and directory in command for _, command in _commands())


def _commands() -> Iterator[tuple[str, bytes]]:
    """Yield the pid and command line of every process."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            yield path.parent.name, path.read_bytes()


def leftovers() -> list[str]:
    """Return the processes that name our root in their command line, and the files of VMs below it."""
    found = [str(path) for path in (root() / "vms").glob("*")]
    found += [str(path) for path in (root() / "libvirt" / "log" / "qemu").glob("*.log")]
    found += [
        command.replace(b"\0", b" ").decode(errors="replace")
        for pid, command in _commands()
        if os.fsencode(root()) in command and pid != str(os.getpid())
    ]
    return found
