"""The hypervisor driver: VMs as transient libvirt domains (vmrt.pods.drivers.Hypervisor).

Rules of the house: what is about to be made is on disk (`vm.json`) or follows from the VM's id before it is made; one
teardown, which copes with any half-made VM, is the undo of everything; QEMU is killed by us before libvirt is told,
since libvirt's own way waits more than a second for a guest under emulation.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path

from vmrt import spawn
from vmrt.config import HypervisorConfig
from vmrt.errors import AlreadyExistsError, VmError, VmGoneError, VmrtError
from vmrt.hypervisor import (
    access,
    cgroup,
    disks,
    domain,
    emulator,
    nics,
    oom,
    placement,
    priority,
    size,
    vhost_vsock,
    virtiofsd,
    vm_users,
)
from vmrt.hypervisor.accel import Accelerator, KvmProbe
from vmrt.hypervisor.access import ROOT_USER, QemuUser, require_passable, require_readable, require_short
from vmrt.hypervisor.boot_limit import BootLimit
from vmrt.hypervisor.console import Console, ConsoleRing
from vmrt.hypervisor.libvirt_host import DomainChange, LibvirtHost
from vmrt.hypervisor.record import Helper, VmPaths, VmRecord, paths_of, read, write
from vmrt.hypervisor.vm import Vm, VmState, until_ready, wait_gone
from vmrt.hypervisor.vsock import KERNEL_DEVICE, Connection, HybridVsock, KernelVsock, KernelVsockListener, Vsock
from vmrt.model import Confinement, Disk, VmEvent, VmEventKind, VmSize, VmSpec
from vmrt.spawn import ProcessId

log = logging.getLogger(__name__)

_KILL_TIMEOUT_S = 10.0
_CONSOLE_DRAIN_S = 1.0
_CLEAR_TIMEOUT_S = 5.0  # how long a start waits for the removal of what an earlier daemon left half-made
_CLEAR_PAUSES_S = (0, 1, 5, 20)
_END_TOLD_S = 1.0
_CONSOLE_IN_ERRORS_BYTES = 4096


class LibvirtHypervisor:
    """Runs VMs through libvirt. `instance` tells this daemon's domains from those of others on one libvirtd."""

    def __init__(self, config: HypervisorConfig, root: Path, instance: str) -> None:
        self._config = config
        self._instance = instance
        self._vms_directory = root / "vms"
        self._root = root
        self._host = LibvirtHost(config.uri, root, user=config.qemu_user, group=config.qemu_group)
        self._user = ROOT_USER
        self._users: vm_users.VmUsers | None = None  # None: all VMs share `_user`
        self._cgroups = cgroup.here(config.cgroup_driver)
        self._emulator = config.qemu_binary
        probe = KvmProbe(config.qemu_binary, config.qemu_user, config.qemu_group, root / "kvm.json")
        self._accelerator = Accelerator(config.accelerator, probe)
        self._listener: KernelVsockListener | None = None
        self._vms: dict[str, Vm] = {}
        self._events: asyncio.Queue[VmEvent] = asyncio.Queue()
        self._teardowns: set[asyncio.Task[None]] = set()
        # VMs whose QEMU is dead and whose domain libvirt has not forgotten yet, by domain name.
        self._lingering: dict[str, Vm] = {}

    # --- the connection ---------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect, learn the accelerator and vsock transport, adopt the VMs that run under our root."""
        require_short(self._root, self._config)
        self._user = QemuUser.lookup(self._config.qemu_user, self._config.qemu_group)
        access.make_directory(self._root, 0o711)
        require_passable(self._root, self._user, phase="start")
        access.make_directory(self._vms_directory, 0o711)
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(self.close)
            await self._accelerator.choose()
            self._users = vm_users.choose(self._config, self._vms_directory, self.accelerator)
            if self._config.vsock == "kernel" or (self._config.vsock == "auto" and os.access(KERNEL_DEVICE, os.W_OK)):
                self._listener = KernelVsockListener()
                self._listener.open()
            self._emulator = emulator.for_libvirt(self._config.qemu_binary, self._root / "libvirt", self._user)
            found = ((path.name, read(VmPaths(path))) for path in self._vms_directory.iterdir())
            half = [vm_id for vm_id, record in found if record is None or not record.ready]
            await self._host.forget([domain.domain_name(self._instance, vm_id) for vm_id in half])
            await self._host.open(self._on_change, self._emulator)
            await self._adopt()
            undo.pop_all()

    async def close(self) -> None:
        """Disconnect. Running VMs go on."""
        while self._teardowns:
            await asyncio.wait(self._teardowns)
        for vm in self._vms.values():
            vm.unwatch()
            await vm.vsock.close()
            await vm.console.close()
        self._vms.clear()
        if self._listener is not None:
            await self._listener.close()
            self._listener = None
        await self._host.close()

    @property
    def accelerator(self) -> str:
        """Return "kvm" or "tcg"."""
        return self._accelerator.name

    # --- boot and destroy -------------------------------------------------------------------------------------------

    async def boot(self, spec: VmSpec) -> None:
        """Start a VM and return when its agent has sent the ready notice."""
        resource = f"vm {spec.vm_id}"
        while (earlier := self._lingering.get(domain.domain_name(self._instance, spec.vm_id))) is not None:
            await earlier.forgotten.wait()
        if spec.vm_id in self._vms:
            raise AlreadyExistsError("a VM with this id exists", phase="boot", resource=resource)
        vm = self._new_vm(self._new_record(spec.vm_id), paths_of(self._vms_directory, spec.vm_id))
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(self._tear_down, vm)
            self._vms[spec.vm_id] = vm
            limit = BootLimit(self._config.boot_timeout_s, lambda: vm.record.qemu.pid if vm.record.qemu else None)
            try:
                async with limit():
                    await self._start(vm, spec)
                    await until_ready(vm)
            except TimeoutError as e:
                message = f"the guest's agent did not report within {limit}"
                raise _boot_failed(vm, message, "hypervisor.boot_timeout_s bounds it") from e
            except VmError as e:
                await vm.console.drain(_CONSOLE_DRAIN_S if vm.end is not None else 0)
                raise _boot_failed(vm, e.message, e.hint) from e
            if spec.cgroup_parent:
                await placement.place(self._cgroups, vm, spec.cgroup_parent, cgroup.Part.LATE)
            if spec.background and vm.record.qemu is not None:
                await asyncio.to_thread(priority.set_nice, vm.record.qemu, priority.NORMAL)
            await asyncio.to_thread(oom.disinherit, vm.processes())
            vm.note(ready=True)
            vm.move(VmState.RUNNING)
            undo.pop_all()
        if vm.end is not None:
            # It ended between its notice and here: told like any other end.
            vm.move(VmState.ENDED)
            self._events.put_nowait(vm.end)

    async def _start(self, vm: Vm, spec: VmSpec) -> None:
        """Make the VM's directory, helpers and domain; the caller undoes."""
        for path in (spec.guest.kernel, spec.guest.initramfs, spec.guest.rootfs):
            if path is not None:
                require_readable(path, vm.user, resource=f"vm {vm.vm_id}")
        for disk in spec.disks:
            disks.prepare(disk, vm.user, resource=f"vm {vm.vm_id}")
        await self._accelerator.prove(spec.guest.kernel)
        vm.paths.sockets.mkdir(mode=0o700)
        os.chown(vm.paths.sockets, *vm.user.owner)
        write(vm.paths, vm.record)
        await vm.console.listen(vm.user.owner)
        await vm.vsock.listen()
        share_socket = None
        if spec.share_dir is not None:
            binary = virtiofsd.find(self._config.virtiofsd)
            process = await virtiofsd.start(binary, spec.share_dir, vm.paths.virtiofs, vm.user.owner)
            vm.note_helper(Helper.VIRTIOFSD, process)
            share_socket = vm.paths.virtiofs
        if vm.vsock.device.vhost_user_socket is not None:
            process = vhost_vsock.start(self._config.vhost_device_vsock, vm.paths, vm.user.owner)
            vm.note_helper(Helper.VHOST_VSOCK, process)
            await vhost_vsock.wait_listening(process, self._config.vhost_device_vsock, vm.paths)
        wiring = domain.Wiring(
            instance=self._instance,
            accelerator=self._accelerator.name,
            emulator=self._emulator,
            console_socket=vm.paths.console_socket,
            vsock=vm.vsock.device,
            share_socket=share_socket,
            owner=vm.record.owner,
            nic_queues=self._config.nic_queues,
            extra_nics=self._config.extra_nics,
        )
        xml, placed = domain.domain_xml(spec, wiring), bool(spec.cgroup_parent)
        live = await self._host.create(xml, resource=f"vm {vm.vm_id}", paused=placed)
        vm.disks = domain.units_of(spec)
        self._take_qemu(vm)
        if placed:
            await placement.place(self._cgroups, vm, spec.cgroup_parent, cgroup.Part.EARLY)
            await self._host.resume(vm.domain)
        if spec.background and vm.record.qemu is not None:
            await asyncio.to_thread(priority.set_nice, vm.record.qemu, priority.BACKGROUND)
        vm.vsock.started(domain.cid_in(live))
        vm.watch(self._on_end)

    async def destroy(self, vm_id: str) -> None:
        """Kill a VM and remove all that belongs to it on the host; a VM that does not exist is no error."""
        if (vm := self._vms.get(vm_id)) is not None:
            await self._tear_down(vm)

    async def _tear_down(self, vm: Vm) -> None:
        """Undo everything, once, whatever has been made; callers that come later wait for the same end.

        It goes on when a caller is cancelled: half an undo is worth nothing.
        """
        task = vm.teardown
        if task is None:
            task = vm.teardown = self._to_the_end(self._remove(vm))
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.wait([task])
            raise

    async def _remove(self, vm: Vm) -> None:
        was_running = vm.state is VmState.RUNNING
        if vm.state is not VmState.DESTROYED:  # it is when an earlier teardown failed
            vm.move(VmState.DESTROYED)
        if vm.set_end(VmEventKind.STOPPED, "destroyed") and was_running:
            self._events.put_nowait(VmEvent(vm.vm_id, VmEventKind.STOPPED, "destroyed"))
        vm.unwatch()
        if vm.record.qemu is None:
            self._take_qemu(vm)
        qemu = vm.record.qemu
        if qemu is not None:
            self._lingering[vm.domain] = vm
            self._to_the_end(self._let_go(vm))
        vm.kill_processes()
        for process in (qemu, *vm.record.helpers.values()):
            # Also reaps the helpers, which are our children unless an earlier daemon started them.
            if process is not None and not await wait_gone(process, _KILL_TIMEOUT_S):
                log.error("vm %s: process %d survives SIGKILL for %g s", vm.vm_id, process.pid, _KILL_TIMEOUT_S)
        if qemu is None:
            # No process that we know of: whatever libvirt has by this name goes its way.
            try:
                await self._host.destroy(vm.domain)
            except VmrtError:
                vm.teardown = None  # the next destroy tries again
                raise
            self._host.drop_log(vm.domain)
        cgroup.remove(Path(path) for path in vm.record.cgroups)
        await vm.vsock.close()
        await vm.console.close()
        await asyncio.to_thread(shutil.rmtree, vm.paths.directory, ignore_errors=True)
        if vm.record.owner is not None and self._users is not None:
            self._users.give_back(vm.record.owner[0], vm.paths.directory)
        if self._vms.get(vm.vm_id) is vm:
            del self._vms[vm.vm_id]

    async def _let_go(self, vm: Vm) -> None:
        """See to it that libvirt forgets the domain of a killed QEMU; only a boot with the same id waits for it."""
        try:
            await self._host.let_go(vm.domain, vm.stopped)
        finally:
            self._lingering.pop(vm.domain, None)
            vm.forgotten.set()

    # --- running VMs ------------------------------------------------------------------------------------------------

    def list(self) -> Sequence[str]:
        """Return the ids of the VMs that run under our root, adopted ones included. From memory."""
        return [vm_id for vm_id, vm in self._vms.items() if vm.state is VmState.RUNNING]

    async def dial(self, vm_id: str, port: int, *, timeout_s: float = 5.0) -> Connection:
        """Open a vsock connection to a port in the guest."""
        async with self._while_it_runs(vm_id, "dial") as vm:
            try:
                async with asyncio.timeout(timeout_s):
                    return await vm.vsock.dial(port)
            except TimeoutError as e:
                raise VmError(f"vsock port {port} did not answer within {timeout_s:g} s") from e

    async def attach_disk(self, vm_id: str, disk: Disk) -> None:
        """Hot-plug a disk; one that is attached already (same serial) is no error."""
        async with self._while_it_runs(vm_id, "attach disk") as vm:
            await disks.attach(self._host, vm, disk, vm.user)

    async def detach_disk(self, vm_id: str, serial: str) -> None:
        """Hot-unplug a disk; one that is not attached is no error."""
        async with self._while_it_runs(vm_id, "detach disk") as vm:
            await disks.detach(self._host, vm, serial)

    async def resize_disk(self, vm_id: str, serial: str) -> int:
        """Tell the guest the size that a host block device has now; return it in octets."""
        async with self._while_it_runs(vm_id, "resize disk") as vm:
            return await disks.resized(self._host, vm, serial)

    async def attach_nic(self, vm_id: str, tap: str, mac: str) -> None:
        """Hot-plug a NIC on an existing tap; one on a tap of that name is no error. `ExhaustedError` without a port."""
        async with self._while_it_runs(vm_id, "attach NIC") as vm:
            await nics.attach(self._host, vm, tap, mac, self._config.nic_queues)

    async def place(self, vm_id: str, cgroup_parent: str) -> None:
        """Put a VM's processes below a host cgroup."""
        async with self._while_it_runs(vm_id, "cgroup") as vm:
            await placement.place(self._cgroups, vm, cgroup_parent, *cgroup.Part)

    async def confine(self, vm_id: str, wanted: Confinement) -> None:
        """Keep a VM to CPUs and memory nodes of the host."""
        async with self._while_it_runs(vm_id, "cpuset") as vm:
            await placement.keep(vm, wanted)

    async def weigh(self, vm_id: str, oom_score_adj: int) -> None:
        """Say how readily the host's OOM killer takes a VM."""
        async with self._while_it_runs(vm_id, "OOM score") as vm:
            await asyncio.to_thread(oom.weigh, vm.processes(), oom_score_adj)

    async def resize(self, vm_id: str, vcpus: int, memory_bytes: int) -> VmSize:
        """Enlarge a VM to at least this size, or ask it to give memory back; return what it has then."""
        async with self._while_it_runs(vm_id, "resize") as vm:
            try:
                return await size.resize(self._host, vm, vcpus, memory_bytes)
            finally:
                await placement.keep_new(vm)

    async def size(self, vm_id: str) -> VmSize:
        """Return what a VM has, and what it can be enlarged to."""
        async with self._while_it_runs(vm_id, "inspect") as vm:
            return domain.size_in(await self._host.live_xml(vm.domain))

    async def events(self) -> AsyncIterator[VmEvent]:
        """Yield the ends of VMs, each once, also of those that ended while nobody listened since `open`."""
        while True:
            yield await self._events.get()

    def console_tail(self, vm_id: str, limit_bytes: int = 8192) -> str:
        """Return the end of the console; also of a VM that has ended and is not destroyed yet."""
        if (vm := self._vms.get(vm_id)) is None:
            raise VmGoneError("the VM does not exist", phase="console", resource=f"vm {vm_id}")
        return vm.console.tail(limit_bytes)

    def share_process(self, vm_id: str) -> ProcessId | None:
        """Return virtiofsd, in whose mount namespace the VM's volumes are; None for a VM without a share."""
        return self._running(vm_id, "share").record.helpers.get(Helper.VIRTIOFSD)

    def processes(self, vm_id: str) -> Sequence[ProcessId]:
        """Return QEMU and its helpers."""
        return self._running(vm_id, "processes").processes()

    # --- ends -------------------------------------------------------------------------------------------------------

    def _on_change(self, name: str, change: DomainChange) -> None:
        """Hear of a domain's end from libvirt."""
        if (dying := self._lingering.get(name)) is not None:
            if change is not DomainChange.SHUTTING_DOWN:
                dying.stopped.set()
            return
        for vm in self._vms.values():
            if vm.domain != name:
                continue
            if change is DomainChange.SHUTTING_DOWN:
                vm.shutting_down = True
                continue
            vm.shutting_down |= change is not DomainChange.FAILED
            vm.stopped.set()
            self._on_end(vm, *vm.verdict())

    def _on_end(self, vm: Vm, kind: VmEventKind, detail: str) -> None:
        """Keep and tell a VM's end; its processes go at once, its console stays until destroy."""
        if not vm.set_end(kind, detail):
            return
        vm.unwatch()
        vm.kill_processes()
        if vm.state is VmState.RUNNING:
            vm.move(VmState.ENDED)
            self._events.put_nowait(VmEvent(vm.vm_id, kind, detail))

    # --- adoption ---------------------------------------------------------------------------------------------------

    async def _adopt(self) -> None:
        """Take over running VMs; destroy and remove what is half-made, broken or without a domain."""
        for name, identity in await self._host.ours(self._instance):
            paths = paths_of(self._vms_directory, identity.vm_id)
            record = read(paths)
            vm = self._new_vm(record or VmRecord(identity.vm_id, "vhost-user"), paths)
            vm.domain = name
            self._vms[vm.vm_id] = vm
            if not await self._take_over(vm):
                await self._clear_away(vm)
        for directory in sorted(self._vms_directory.iterdir()):
            if directory.name not in self._vms:
                log.warning("vm %s: no domain, removing what is left of it", directory.name)
                paths = VmPaths(directory)
                vm = self._new_vm(read(paths) or VmRecord(directory.name, "vhost-user"), paths)
                await self._clear_away(vm)

    async def _clear_away(self, vm: Vm) -> None:
        """Tear down what cannot be adopted. One that resists, or takes long, keeps no daemon from starting."""
        task = self._to_the_end(self._persist(vm))
        await asyncio.wait([task], timeout=_CLEAR_TIMEOUT_S)

    async def _persist(self, vm: Vm) -> None:
        for pause_s in _CLEAR_PAUSES_S:
            await asyncio.sleep(pause_s)
            try:
                await self._tear_down(vm)
                return
            except VmrtError as e:
                log.warning("vm %s: not removed yet: %s", vm.vm_id, e)

    async def _take_over(self, vm: Vm) -> bool:
        """Make a found VM ours again; False when it must go."""
        record = vm.record
        if not record.ready:
            log.warning("vm %s: its boot was interrupted, destroying it", vm.vm_id)
            return False
        lost = [helper.value for helper, process in record.helpers.items() if not spawn.alive(process)]
        if lost or record.qemu is None or not spawn.alive(record.qemu):
            log.warning("vm %s: %s gone, destroying it", vm.vm_id, " and ".join(lost) or "QEMU")
            return False
        if record.vsock == "kernel" and self._listener is None:
            log.warning("vm %s: it uses the kernel's vsock, which is turned off now, destroying it", vm.vm_id)
            return False
        live = await self._host.live_xml(vm.domain)
        vm.disks = domain.disks_in(live)
        vm.vsock.started(domain.cid_in(live))
        await vm.console.listen(vm.user.owner)
        vm.move(VmState.RUNNING)
        vm.watch(self._on_end)
        return True

    # --- small things -----------------------------------------------------------------------------------------------

    def _new_record(self, vm_id: str) -> VmRecord:
        """Make a VM's directory, empty, and find it a user."""
        directory = paths_of(self._vms_directory, vm_id).directory
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(mode=0o711)
        directory.chmod(0o711)
        vsock = "kernel" if self._listener else "vhost-user"
        try:
            return VmRecord(vm_id, vsock, owner=None if self._users is None else self._users.take(directory).owner)
        except (OSError, VmrtError) as e:
            directory.rmdir()
            raise VmError(f"no user id for the VM: {e}", phase="boot", resource=f"vm {vm_id}") from e

    def _new_vm(self, record: VmRecord, paths: VmPaths) -> Vm:
        user = self._user if record.owner is None else QemuUser(*record.owner, frozenset((record.owner[1],)))
        ring = ConsoleRing(paths.directory / "console", self._config.console_limit_bytes)
        ring.load()
        vsock: Vsock
        if record.vsock == "kernel" and self._listener is not None:
            vsock = KernelVsock(self._listener)
        else:
            vsock = HybridVsock(paths.vsock, paths.ready, paths.vhost_vsock, user.owner)
        name = domain.domain_name(self._instance, record.vm_id)
        return Vm(record, paths, Console(paths.console_socket, ring), vsock, name, user)

    def _take_qemu(self, vm: Vm) -> None:
        """Learn QEMU's identity from libvirt's pid file and record it."""
        pid = self._host.pid(vm.domain)
        process = None if pid is None else spawn.identify(pid)
        if process is not None and vm.paths.directory.is_dir():
            vm.note(qemu=process)

    def _running(self, vm_id: str, phase: str) -> Vm:
        vm = self._vms.get(vm_id)
        if vm is None:
            raise VmGoneError("the VM does not exist", phase=phase, resource=f"vm {vm_id}")
        if vm.state is not VmState.RUNNING:
            detail = vm.end.detail if vm.end is not None else vm.state.value
            raise VmGoneError(f"the VM does not run: {detail}", phase=phase, resource=f"vm {vm_id}")
        return vm

    @contextlib.asynccontextmanager
    async def _while_it_runs(self, vm_id: str, phase: str) -> AsyncIterator[Vm]:
        """Give a running VM; after a failure say `VmGoneError` when its cause is the VM's end, told a moment later."""
        vm = self._running(vm_id, phase)
        try:
            yield vm
        except VmrtError as e:
            if not vm.processes_alive():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_END_TOLD_S):
                        await vm.ended.wait()
            self._running(vm_id, phase)
            e.phase, e.resource = phase, f"vm {vm_id}"
            raise

    def _to_the_end(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Run what no caller's cancellation may stop; `close` waits for it."""
        task = asyncio.create_task(work)
        self._teardowns.add(task)
        task.add_done_callback(self._teardowns.discard)
        return task


def _boot_failed(vm: Vm, message: str, hint: str) -> VmError:
    tail = vm.console.tail(_CONSOLE_IN_ERRORS_BYTES)
    return VmError(message, phase="boot", resource=f"vm {vm.vm_id}", hint=hint, console=tail)
