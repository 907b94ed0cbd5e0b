"""The one fake of `vmrt.pods.drivers.Hypervisor`: VMs in memory, for tests of what is built on the Protocol.

`FakeVmHost` is the machine, so a second `FakeHypervisor` on it is a restarted daemon. Failures are scripted:
``hypervisor.failures["boot"] = [VmError("...")]`` makes the next call fail; ``hypervisor.gate`` holds `boot` back
half-way until it is set, for tests of races. A guest whose kernel command line has the words of `PANIC` dies at boot,
one with those of `MUTE` never answers. `FakeVmHost.agent` answers on the ports in `ports`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from vmrt import spawn
from vmrt.config import HypervisorConfig
from vmrt.errors import AlreadyExistsError, ExhaustedError, VmError, VmGoneError
from vmrt.hypervisor import cgroup, devices
from vmrt.model import Confinement, Disk, VmEvent, VmEventKind, VmSize, VmSpec
from vmrt.pods.drivers import Connection
from vmrt.spawn import ProcessId

# Real kernels do so, with an initramfs and without: of a word that comes twice the last counts.
_NO_ROOT = "rdinit=/nonexistent root=/dev/nonexistent"
PANIC = f"{_NO_ROOT} panic=-1"
MUTE = f"{_NO_ROOT} rootwait"

EXTRA_NICS = HypervisorConfig().extra_nics

Agent = Callable[[str, int, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def echo(vm_id: str, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send back what comes."""
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


@dataclass
class FakeVm:
    """A VM that runs; `disks` by serial."""

    spec: VmSpec
    disks: dict[str, Disk]
    console: str = "fake kernel\nvmrt-agent: ready\n"
    booted_bytes: int = field(init=False)
    confinement: Confinement = field(default_factory=Confinement)
    oom_score_adj: int = 0
    nics: dict[str, str] = field(default_factory=dict)  # those beyond the first, by tap

    def __post_init__(self) -> None:
        self.booted_bytes = self.spec.memory_bytes


@dataclass
class FakeVmHost:
    """What survives a daemon."""

    vms: dict[str, FakeVm] = field(default_factory=dict)
    ports: tuple[int, ...] = (1024, 1025)
    agent: Agent = echo


class FakeHypervisor:
    """`calls` lists what was asked, in order."""

    def __init__(self, host: FakeVmHost | None = None, *, boot_timeout_s: float = 60.0) -> None:
        self.host = host or FakeVmHost()
        self.failures: dict[str, list[Exception]] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.calls: list[tuple[str, ...]] = []
        self._boot_timeout_s = boot_timeout_s
        self._booting: set[str] = set()
        self._ended: dict[str, tuple[FakeVm, VmEvent]] = {}
        self._queue: asyncio.Queue[VmEvent] = asyncio.Queue()
        self._served: set[asyncio.Task[None]] = set()

    def _call(self, *call: str) -> None:
        self.calls.append(call)
        if self.failures.get(call[0]):
            raise self.failures[call[0]].pop(0)

    async def open(self) -> None:
        self._call("open")

    async def close(self) -> None:
        self._call("close")
        for task in self._served:
            task.cancel()
        await asyncio.gather(*self._served, return_exceptions=True)

    @property
    def accelerator(self) -> str:
        return "tcg"

    async def boot(self, spec: VmSpec) -> None:
        self._call("boot", spec.vm_id)
        resource = f"vm {spec.vm_id}"
        if spec.vm_id in self.host.vms or spec.vm_id in self._booting or spec.vm_id in self._ended:
            raise AlreadyExistsError("a VM with this id exists", phase="boot", resource=resource)
        vm = FakeVm(spec, {disk.serial: disk for disk in spec.disks})
        self._booting.add(spec.vm_id)
        try:
            async with asyncio.timeout(self._boot_timeout_s):
                await asyncio.sleep(0)
                await self.gate.wait()
                if MUTE in spec.guest.cmdline:
                    await asyncio.Event().wait()
        except TimeoutError as e:
            raise VmError("the guest's agent did not report", phase="boot", resource=resource, console="fake") from e
        finally:
            self._booting.discard(spec.vm_id)
        if PANIC in spec.guest.cmdline:
            raise VmError("the VM ended", phase="boot", resource=resource, console="Kernel panic - not syncing")
        self.host.vms[spec.vm_id] = vm

    async def destroy(self, vm_id: str) -> None:
        self._call("destroy", vm_id)
        await asyncio.sleep(0)
        self._ended.pop(vm_id, None)
        if self.host.vms.pop(vm_id, None) is not None:
            self._queue.put_nowait(VmEvent(vm_id, VmEventKind.STOPPED, "destroyed"))

    def end(self, vm_id: str, kind: VmEventKind = VmEventKind.CRASHED) -> None:
        """Let a VM end without our asking."""
        event = VmEvent(vm_id, kind, "scripted")
        self._ended[vm_id] = (self.host.vms.pop(vm_id), event)
        self._queue.put_nowait(event)

    def list(self) -> Sequence[str]:
        return [*self.host.vms]

    async def dial(self, vm_id: str, port: int, *, timeout_s: float = 5.0) -> Connection:
        self._call("dial", vm_id, str(port))
        self._running(vm_id)
        if port not in self.host.ports:
            raise VmError(f"nobody listens on vsock port {port}", phase="dial", resource=f"vm {vm_id}")
        ours, theirs = socket.socketpair()
        task = asyncio.create_task(self._serve(vm_id, port, theirs))
        self._served.add(task)
        task.add_done_callback(self._served.discard)
        # Also of a task that is cancelled before it has begun.
        task.add_done_callback(lambda _: theirs.close())
        try:
            return await asyncio.open_connection(sock=ours)
        except BaseException:
            ours.close()
            raise

    async def _serve(self, vm_id: str, port: int, theirs: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=theirs)
        try:
            await self.host.agent(vm_id, port, reader, writer)
        finally:
            writer.close()

    async def attach_disk(self, vm_id: str, disk: Disk) -> None:
        self._call("attach_disk", vm_id, disk.serial)
        vm = self._running(vm_id)
        if disk.serial not in vm.disks and not disk.path.exists():
            raise VmError(f"{disk.path} does not exist", phase="attach disk", resource=f"vm {vm_id}")
        vm.disks.setdefault(disk.serial, disk)

    async def detach_disk(self, vm_id: str, serial: str) -> None:
        self._call("detach_disk", vm_id, serial)
        self._running(vm_id).disks.pop(serial, None)

    async def resize_disk(self, vm_id: str, serial: str) -> int:
        self._call("resize_disk", vm_id, serial)
        disk = self._running(vm_id).disks.get(serial)
        if disk is None or not devices.is_block_device(disk.path):
            raise VmError(f"{serial} is no host block device of this VM", phase="resize disk", resource=f"vm {vm_id}")
        return devices.size_bytes(disk.path)

    async def attach_nic(self, vm_id: str, tap: str, mac: str) -> None:
        self._call("attach_nic", vm_id, tap, mac)
        vm = self._running(vm_id)
        if tap not in vm.nics and len(vm.nics) == EXTRA_NICS:
            raise ExhaustedError("no place for another network card", phase="attach NIC", resource=f"vm {vm_id}")
        vm.nics.setdefault(tap, mac)

    async def place(self, vm_id: str, cgroup_parent: str) -> None:
        self._call("place", vm_id, cgroup_parent)
        vm = self._running(vm_id)
        cgroup.directory_of(cgroup_parent, systemd=False)
        vm.spec = dataclasses.replace(vm.spec, cgroup_parent=cgroup_parent)

    async def confine(self, vm_id: str, wanted: Confinement) -> None:
        self._call("confine", vm_id)
        vm = self._running(vm_id)
        if wanted.cpus is not None and max(wanted.cpus) >= 1000:
            raise VmError("the host has no such CPUs", phase="cpuset", resource=f"vm {vm_id}")
        vm.confinement = wanted

    async def weigh(self, vm_id: str, oom_score_adj: int) -> None:
        self._call("weigh", vm_id, str(oom_score_adj))
        self._running(vm_id).oom_score_adj = oom_score_adj

    async def resize(self, vm_id: str, vcpus: int, memory_bytes: int) -> VmSize:
        self._call("resize", vm_id, str(vcpus), str(memory_bytes))
        vm = self._running(vm_id)
        most = await self.size(vm_id)
        if vcpus > most.max_vcpus or memory_bytes > most.max_memory_bytes:
            raise ExhaustedError("the VM cannot have so much", phase="resize", resource=f"vm {vm_id}")
        vm.spec = dataclasses.replace(
            vm.spec,
            vcpus=max(vcpus, most.vcpus),
            memory_bytes=max(memory_bytes, vm.booted_bytes),
            max_vcpus=most.max_vcpus,
            max_memory_bytes=most.max_memory_bytes,
        )
        return await self.size(vm_id)

    async def size(self, vm_id: str) -> VmSize:
        self._call("size", vm_id)
        vm = self._running(vm_id)
        most = max(vm.spec.vcpus, vm.spec.max_vcpus), max(vm.spec.memory_bytes, vm.spec.max_memory_bytes)
        return VmSize(vm.spec.vcpus, vm.spec.memory_bytes, *most, vm.booted_bytes)

    async def events(self) -> AsyncIterator[VmEvent]:
        while True:
            yield await self._queue.get()

    def console_tail(self, vm_id: str, limit_bytes: int = 8192) -> str:
        console = self._ended[vm_id][0].console if vm_id in self._ended else self._running(vm_id).console
        return console[-limit_bytes:] if limit_bytes > 0 else ""

    def share_process(self, vm_id: str) -> ProcessId | None:
        return None if self._running(vm_id).spec.share_dir is None else spawn.identify(os.getpid())

    def processes(self, vm_id: str) -> Sequence[ProcessId]:
        self._running(vm_id)
        process = spawn.identify(os.getpid())
        assert process is not None
        return [process]

    def _running(self, vm_id: str) -> FakeVm:
        if vm_id not in self.host.vms:
            raise VmGoneError("the VM does not exist", resource=f"vm {vm_id}")
        return self.host.vms[vm_id]
