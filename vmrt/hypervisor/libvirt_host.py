"""The connection to libvirt: its blocking calls in a few threads, its events as asyncio callbacks, its errors as ours.

With the embedded URI the QEMU driver runs inside this process, below `<root>/libvirt`, and reads `etc/qemu.conf` there,
which we write. VMs are no children of libvirt: they go on when this process ends and are found again when it returns.

libvirt's event loop is one per process, for ever: it is started with the first connection, in a thread of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from vmrt import realtime
from vmrt.errors import VmError, VmGoneError, VmrtError
from vmrt.hypervisor.domain import METADATA_URI, DomainIdentity, identity_in

# Read once, when libvirt is loaded. All that it would log reaches us as exceptions and events; whoever hunts a bug in
# libvirt itself sets this variable to a file of his own.
os.environ.setdefault("LIBVIRT_LOG_OUTPUTS", "4:file:/dev/null")

import libvirt

T = TypeVar("T")

log = logging.getLogger(__name__)

# One thread a boot or attach at work: libvirt serialises per domain and parallelises between them.
_THREADS = 8
_KILL_TIMEOUT_S = 10.0
_LET_GO_TIMEOUT_S = 10.0
_MESSAGE_LIMIT = 1000
_MESSAGE_HEAD = 200
_GONE = (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID)


class DomainChange(enum.Enum):
    """What libvirt tells of a domain's end: first QEMU's own word, where it could give one, then one of the rest."""

    SHUTTING_DOWN = "shutting down"  # QEMU is about to end by itself or by a signal that it could handle
    SHUTDOWN = "shutdown"  # QEMU has ended by itself: power-off, reset or panic in the guest
    DESTROYED = "destroyed"  # somebody called destroy
    FAILED = "failed"  # QEMU was killed or failed


_ENDS = {
    libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN: DomainChange.SHUTDOWN,
    libvirt.VIR_DOMAIN_EVENT_STOPPED_DESTROYED: DomainChange.DESTROYED,
}

OnChange = Callable[[str, DomainChange], None]
"""Called in the event loop with the domain's name."""

_event_loop_lock = threading.Lock()
_event_loop_started = False


def qemu_conf(user: str, group: str) -> str:
    """Return qemu.conf for the embedded driver (libvirt, src/qemu/qemu.conf.in describes the keys)."""
    settings: dict[str, str | int | list[str]] = {
        "user": user,
        "group": group,
        # QEMU is confined by its own unprivileged user, an empty capability set, no_new_privs and its seccomp filter.
        # SELinux or AppArmor labels need a policy for <root>, which no distribution ships: docs/hypervisor.md.
        "security_driver": "none",
        # Layer images are shared by pods and stay root's: libvirt must not give them to QEMU's user.
        "dynamic_ownership": 0,
        "remember_owner": 0,
        "seccomp_sandbox": 1,
        "clear_emulator_capabilities": 1,
        # VMs go into their pods' cgroups (vmrt.hypervisor.cgroup); libvirt would take CPUs that it plugs out again.
        "cgroup_controllers": [],
        # No VM of ours has huge pages of the host; where it finds a hugetlbfs libvirt makes directories and opens it to
        # everybody, and that may be a pod's emptyDir.
        "hugetlbfs_mount": [],
        # virtlogd is a daemon; what QEMU itself says goes to a file, and the console never goes there.
        "stdio_handler": "file",
        "max_core": 0,
        "dump_guest_core": 0,
        # A private /dev per VM: QEMU sees null, urandom, ptmx, kvm and what its devices need.
        "namespaces": ["mount"],
        "set_process_name": 1,
    }
    return "".join(f"{key} = {_conf_value(value)}\n" for key, value in settings.items())


def shortened(message: str) -> str:
    """Return a message with its middle left out: libvirt quotes QEMU's whole command line, and the cause comes last."""
    if len(message) <= _MESSAGE_LIMIT:
        return message
    return f"{message[:_MESSAGE_HEAD]} [...] {message[_MESSAGE_HEAD - _MESSAGE_LIMIT :]}"


def _qemus(names: Sequence[str]) -> list[int]:
    """Return the pids of these domains' QEMUs, by their command lines: one just started has no pid file yet."""
    wanted = tuple(f"guest={name},".encode() for name in names)
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            arguments = (directory / "cmdline").read_bytes().split(b"\0")
            if b"qemu" in arguments[0] and any(argument.startswith(wanted) for argument in arguments):
                found.append(int(directory.name))
    return found


def _conf_value(value: str | int | list[str]) -> str:
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return f'"{value}"'
    return f"[{', '.join(_conf_value(item) for item in value)}]"


class LibvirtHost:
    """One connection. All methods are called in the asyncio loop."""

    def __init__(self, uri: str, root: Path, *, user: str, group: str) -> None:
        self.embedded = not uri
        self.uri = uri or f"qemu:///embed?root={root / 'libvirt'}"
        self._directory = root / "libvirt"
        self._user = user
        self._group = group
        self._threads: ThreadPoolExecutor | None = None
        self._connection: Any = None
        self._callback: int | None = None

    async def open(self, on_change: OnChange, emulator: Path) -> None:
        """Connect, subscribe to the ends of domains, and let libvirt learn the emulator's capabilities.

        The probe of a fresh root costs seconds: here, so that no pod pays for it.
        """
        self._threads = realtime.executor("libvirt", _THREADS)
        loop = asyncio.get_running_loop()

        def changed(_connection: Any, domain: Any, event: int, detail: int, _opaque: Any) -> None:
            if event == libvirt.VIR_DOMAIN_EVENT_SHUTDOWN:
                change = DomainChange.SHUTTING_DOWN
            elif event == libvirt.VIR_DOMAIN_EVENT_STOPPED:
                change = _ENDS.get(detail, DomainChange.FAILED)
            else:
                return
            # The loop may have been closed between libvirt's thread and ours.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(on_change, domain.name(), change)

        def connect() -> tuple[Any, int]:
            if self.embedded:
                self._prepare_directory()
            _start_event_loop()
            connection = libvirt.open(self.uri)
            callback = connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, changed, None)
            connection.getDomainCapabilities(str(emulator), "x86_64", "q35", "qemu")
            return connection, callback

        self._connection, self._callback = await self.call(connect, phase="open", resource=self.uri)

    async def close(self) -> None:
        """Disconnect. VMs go on."""
        connection, callback = self._connection, self._callback
        self._connection = None
        if connection is not None:

            def disconnect() -> None:
                with contextlib.suppress(libvirt.libvirtError):
                    connection.domainEventDeregisterAny(callback)
                connection.close()

            await self.call(disconnect, phase="close")
        if self._threads is not None:
            self._threads.shutdown(wait=False)
            self._threads = None

    async def call(self, function: Callable[[], T], *, phase: str, resource: str = "") -> T:
        """Run a blocking call in a thread; libvirt's errors become `VmError`, a missing domain `VmGoneError`.

        The call cannot be interrupted: a cancellation waits for it, so that what it made is known when undoing starts.
        """
        if self._threads is None:
            raise VmError("the hypervisor is not open", phase=phase, resource=resource)
        future = asyncio.get_running_loop().run_in_executor(self._threads, function)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            while not future.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([future])
            if not future.cancelled():
                future.exception()
            raise
        except libvirt.libvirtError as e:
            code = e.get_error_code()
            message = shortened((e.get_error_message() or str(e)).strip())
            kind = VmGoneError if code == libvirt.VIR_ERR_NO_DOMAIN else VmError
            raise kind(message, phase=phase, resource=resource) from e
        except OSError as e:
            raise VmError(str(e), phase=phase, resource=resource) from e

    async def create(self, xml: str, *, resource: str, paused: bool = False) -> str:
        """Start a transient domain; return its live XML. One that is `paused` runs no guest before `resume`."""

        def create() -> str:
            flags = libvirt.VIR_DOMAIN_START_PAUSED if paused else 0
            return str(self._connection.createXML(xml, flags).XMLDesc(0))

        return await self.call(create, phase="boot", resource=resource)

    async def resume(self, name: str) -> None:
        """Let the guest of a paused domain run."""
        await self.call(lambda: self._connection.lookupByName(name).resume(), phase="boot", resource=name)

    async def live_xml(self, name: str) -> str:
        """Return a running domain's XML."""
        return await self.call(
            lambda: str(self._connection.lookupByName(name).XMLDesc(0)), phase="inspect", resource=name
        )

    async def attach(self, name: str, device_xml: str, phase: str = "attach disk") -> None:
        """Hot-plug a device."""

        def attach() -> None:
            self._connection.lookupByName(name).attachDeviceFlags(device_xml, libvirt.VIR_DOMAIN_AFFECT_LIVE)

        await self.call(attach, phase=phase, resource=name)

    async def detach(self, name: str, device_xml: str) -> None:
        """Ask for a hot-unplug; whether the guest let go shows in the live XML."""

        def detach() -> None:
            self._connection.lookupByName(name).detachDeviceFlags(device_xml, libvirt.VIR_DOMAIN_AFFECT_LIVE)

        await self.call(detach, phase="detach disk", resource=name)

    async def resize_disk(self, name: str, target: str, size_bytes: int) -> None:
        """Have QEMU look at a disk's size again."""

        def resize() -> None:
            flags = libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES
            self._connection.lookupByName(name).blockResize(target, size_bytes, flags)

        await self.call(resize, phase="resize disk", resource=name)

    async def set_vcpus(self, name: str, vcpus: int) -> None:
        """Hot-plug CPUs."""

        def plug() -> None:
            self._connection.lookupByName(name).setVcpusFlags(vcpus, libvirt.VIR_DOMAIN_AFFECT_LIVE)

        await self.call(plug, phase="plug CPUs", resource=name)

    async def update(self, name: str, device_xml: str) -> None:
        """Change a device."""

        def update() -> None:
            self._connection.lookupByName(name).updateDeviceFlags(device_xml, libvirt.VIR_DOMAIN_AFFECT_LIVE)

        await self.call(update, phase="change device", resource=name)

    async def exists(self, name: str) -> bool:
        """Say whether libvirt still knows a domain."""
        try:
            await self.call(lambda: self._connection.lookupByName(name), phase="inspect", resource=name)
        except VmGoneError:
            return False
        return True

    async def destroy(self, name: str) -> None:
        """End a domain. Absent is fine."""

        def destroy() -> None:
            try:
                self._connection.lookupByName(name).destroy()
            except libvirt.libvirtError as e:
                if e.get_error_code() not in _GONE:
                    raise

        await self.call(destroy, phase="destroy", resource=name)

    async def ours(self, instance: str) -> list[tuple[str, DomainIdentity]]:
        """Return (name, identity) of the active domains that carry our metadata and this instance."""

        def ours() -> list[tuple[str, DomainIdentity]]:
            found = []
            for domain in self._connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
                with contextlib.suppress(libvirt.libvirtError):
                    metadata = domain.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, METADATA_URI)
                    identity = identity_in(metadata)
                    if identity is not None and identity.instance == instance:
                        found.append((domain.name(), identity))
            return found

        return await self.call(ours, phase="open", resource=self.uri)

    async def let_go(self, name: str, stopped: asyncio.Event) -> None:
        """See to it that libvirt forgets the domain of a killed QEMU; `stopped` is set when it has told of its end.

        It notices by itself, but only once the host's init has reaped QEMU, which takes seconds where that is no real
        init.
        """
        try:
            async with asyncio.timeout(_LET_GO_TIMEOUT_S):
                if await self.exists(name):
                    await stopped.wait()
                # The event comes a moment before the domain's name is free.
                while True:
                    if not await self.exists(name):
                        break
                    await asyncio.sleep(0.01)
        except TimeoutError:
            try:
                await self.destroy(name)
            except VmrtError as e:
                log.warning("%s: %s", name, e)
        finally:
            self.drop_log(name)

    def drop_log(self, name: str) -> None:
        """Remove what QEMU wrote to its log: libvirt keeps it for ever."""
        with contextlib.suppress(OSError):
            self._qemu_log(name).unlink()

    def pid(self, name: str) -> int | None:
        """Return QEMU's pid from libvirt's pid file."""
        try:
            return int((self._run_directory() / f"{name}.pid").read_text())
        except (OSError, ValueError):
            return None

    async def forget(self, names: Sequence[str]) -> None:
        """Before `open`: kill these domains' QEMUs and take the domains from the embedded driver's books.

        They are boots that a killed daemon left half-way. libvirt would wait half a minute for the monitor of a QEMU
        that it has recorded and not started yet, and let nobody end the domain meanwhile. Its books are the status
        files in its run directory (libvirt, qemuStateInitialize); no other driver reads this one.
        """
        if self.embedded and names:
            await asyncio.to_thread(self._forget, names)

    def _forget(self, names: Sequence[str]) -> None:
        for pid in _qemus(names):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + _KILL_TIMEOUT_S
        while _qemus(names) and time.monotonic() < deadline:
            time.sleep(0.01)
        for name in names:
            for suffix in (".xml", ".pid"):
                (self._run_directory() / f"{name}{suffix}").unlink(missing_ok=True)
            self.drop_log(name)

    def _run_directory(self) -> Path:
        return self._directory / "run" / "qemu" if self.embedded else Path("/run/libvirt/qemu")

    def _qemu_log(self, name: str) -> Path:
        base = self._directory / "log" / "qemu" if self.embedded else Path("/var/log/libvirt/qemu")
        return base / f"{name}.log"

    def _prepare_directory(self) -> None:
        """Write qemu.conf."""
        etc = self._directory / "etc"
        etc.mkdir(parents=True, exist_ok=True)
        # QEMU's user has to reach its monitor's directory below.
        self._directory.chmod(0o711)
        (etc / "qemu.conf").write_text(qemu_conf(self._user, self._group))


def _start_event_loop() -> None:
    global _event_loop_started
    with _event_loop_lock:
        if _event_loop_started:
            return
        libvirt.registerErrorHandler(lambda _context, _error: None, None)
        libvirt.virEventRegisterDefaultImpl()
        threading.Thread(target=_run_events, name=f"{realtime.WORKER}-libvirt-events", daemon=True).start()
        _event_loop_started = True


def _run_events() -> None:
    while True:
        libvirt.virEventRunDefaultImpl()
