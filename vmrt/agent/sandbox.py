"""ConfigureSandbox: makes a booted guest into one pod's guest. Called once; a guest that failed half-way is destroyed.

The network, UTS and IPC namespaces of the guest's root are the pod's: whatever is set here is what containers see. A
pod with a user namespace has its own, which belong to that (`namespaces.py`); the agent itself stays outside.
"""

from __future__ import annotations

import _socket
import contextlib
import os
import threading
import time

from vmrt.agent import agent_pb2 as pb
from vmrt.agent import console, disks, kernel, layout, namespaces, rtnetlink, status

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmrt.agent.process import Child, Reaper

# An emulated guest on a busy host takes its time.
_NIC_PATIENCE_S = 30.0
# linux/random.h
_RNDADDENTROPY = 0x40085203
_RNDRESEEDCRNG = 0x5207
_SYSCTL_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./:@")


def sysctl_path(name: str) -> str:
    """Return the file of a sysctl below /proc/sys, with sysctl(8)'s rule for names.

    When the first separator is a slash, dots are part of names ("net/ipv4/conf/eth0.1/forwarding"); else they are
    separators and slashes stand for dots. Raises `AgentError` (INVALID_ARGUMENT) for anything that is no such name.
    """
    first = next((c for c in name if c in "./"), "")
    path = name if first == "/" else name.translate(str.maketrans("./", "/."))
    parts = path.split("/")
    if not set(name) <= _SYSCTL_CHARACTERS or any(part in ("", ".", "..") for part in parts) or len(parts) < 2:
        raise status.AgentError(status.INVALID_ARGUMENT, f"sysctl {name[:100]!r}: not a sysctl's name")
    return "/proc/sys/" + path


class Sandbox:
    """The pod this guest serves."""

    def __init__(self, reaper: Reaper, layers: disks.Layers) -> None:
        self._reaper = reaper
        self._layers = layers
        self._lock = threading.Lock()
        self._preparing = threading.Lock()
        self._asked_for = ""
        self._pid_namespace: Child | None = None
        self._scratch = ""
        self._loopback = False
        self.configured = False
        self.settled = threading.Event()  # configure has ended, well or badly
        self.shared = False

    @property
    def asked_for(self) -> str:
        """The sandbox that this VM is, or failed to become; "" for none yet."""
        return self._asked_for

    def require(self) -> None:
        """Raise `AgentError` (FAILED_PRECONDITION) unless the sandbox is configured."""
        if not self.configured:
            raise status.AgentError(status.FAILED_PRECONDITION, "ConfigureSandbox has not been called in this VM")

    def prepare(self) -> None:
        """Do what is the same for every pod: while nobody waits, or at the beginning of `configure`. Repeatable.

        Half of configure's time under emulation: the PID namespace's holder, the mounts of the share and the scratch
        disk, and the loopback with which the netlink code and the kernel's side of it run for the first time.
        """
        with self._preparing:
            if not self._loopback:
                with _phase("loopback"):
                    netlink = rtnetlink.Netlink()
                    try:
                        netlink.ask(rtnetlink.link(1, up=True), "lo up")
                    finally:
                        netlink.close()
                self._loopback = True
            if self._pid_namespace is None:
                with _phase("shared PID namespace"):
                    self._pid_namespace = _hold_pid_namespace(self._reaper)
            if not self.shared:
                # A VM without a share has no device of that name.
                with contextlib.suppress(OSError):
                    self._mount_share()
            if not self._scratch and disks.find(layout.SCRATCH_SERIAL):
                disks.mount_scratch(layout.SCRATCH_SERIAL, time.monotonic())
                self._scratch = layout.SCRATCH_SERIAL

    def configure(self, request: pb.ConfigureSandboxRequest, deadline: float) -> None:
        """Do all that the request asks. Raises `AgentError`, each naming its phase."""
        with self._lock:
            if self._asked_for:
                outcome = "is configured" if self.configured else "failed to become configured"
                raise status.AgentError(
                    status.FAILED_PRECONDITION, f"this VM {outcome} as sandbox {self._asked_for}; it takes one"
                )
            self._asked_for = request.sandbox_id or "(unnamed)"
        try:
            self._configure(request, deadline)
        finally:
            self.settled.set()

    def _configure(self, request: pb.ConfigureSandboxRequest, deadline: float) -> None:
        with _phase("clock"):
            if request.realtime_ns:
                time.clock_settime_ns(time.CLOCK_REALTIME, request.realtime_ns)
        with _phase("entropy"):
            if request.entropy:
                _credit_entropy(request.entropy)
        self.prepare()
        found = _links(_macs(request), deadline) if request.interfaces else {}
        if request.HasField("user_namespace"):
            with _phase("user namespace"):
                self._make_namespaces(request.user_namespace)
                move_links([found[mac] for mac in _macs(request) if mac in found])
        with _phase("files"):
            write_files(layout.SANDBOX, request, self._layers.owner)
        if request.scratch_serial and request.scratch_serial != self._scratch:
            disks.mount_scratch(request.scratch_serial, deadline)
        with _phase("mount the virtiofs share"):
            if request.share:
                if not self.shared:
                    self._mount_share()
                kernel.mount("", layout.SHARE, "", kernel.MS_SHARED)
        with namespaces.entered():
            _socket.sethostname(request.hostname or "localhost")
            with _phase("network"):
                configure_network(request, found)
            for name, value in sorted(request.sysctls.items()):
                path = sysctl_path(name)
                with _phase(f"sysctl {name}={value}"):
                    _write_sysctl(path, value.encode(), self._layers.owner[0])
        if not request.shared_pid_namespace:
            self._drop_pid_namespace()
        self.configured = True
        console.log(f"sandbox {self._asked_for} configured")

    def _mount_share(self) -> None:
        _mkdir(layout.SHARE)
        kernel.mount("share", layout.SHARE, "virtiofs")
        self.shared = True

    def _make_namespaces(self, mapping: pb.UserNamespace) -> None:
        import signal  # noqa: F401 - for the fork, see _sleep_as_init

        # The PID namespace that was made ahead belongs to the guest's user namespace.
        self._drop_pid_namespace()
        self._pid_namespace = namespaces.make(self._reaper, mapping, _sleep_as_init)
        self._layers.owner = (mapping.first_uid, mapping.first_gid)
        self._layers.userns_fd = os.open(layout.POD_USER_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)

    def _drop_pid_namespace(self) -> None:
        if self._pid_namespace is not None:
            kernel.umount(layout.POD_PID_NAMESPACE)
            self._reaper.signal(self._pid_namespace, 9)


def write_files(directory: str, request: pb.ConfigureSandboxRequest, owner: tuple[int, int]) -> None:
    """Make the files that the pod's containers mount, and their shared memory, in a directory."""
    _mkdir(directory)
    hostname = request.hostname or "localhost"
    for name, content in (
        ("hostname", hostname.encode() + b"\n"),
        ("hosts", request.hosts),
        ("resolv.conf", request.resolv_conf),
    ):
        _write(f"{directory}/{name}", content)
        os.chown(f"{directory}/{name}", *owner)
    if request.machine_id:
        _write(f"{directory}/machine-id", request.machine_id.encode() + b"\n")
        with contextlib.suppress(OSError):  # the root image need not have the file
            kernel.mount(f"{directory}/machine-id", "/etc/machine-id", "", kernel.MS_BIND)
    shm = f"{directory}/shm"
    _mkdir(shm)
    size = f",size={request.shm_bytes}" if request.shm_bytes else ""
    options = f"mode=1777,uid={owner[0]},gid={owner[1]}{size}"
    kernel.mount("shm", shm, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC, options)


@contextlib.contextmanager
def _phase(name: str) -> Iterator[None]:
    """Turn an `OSError` or `ValueError` of the block into an `AgentError` that names the phase."""
    try:
        yield
    except OSError as e:
        raise status.from_os_error(e, f"configure sandbox: {name}") from e
    except ValueError as e:
        raise status.AgentError(status.INVALID_ARGUMENT, f"configure sandbox: {name}: {e}") from e


def _mkdir(path: str) -> None:
    os.makedirs(path, exist_ok=True)  # noqa: PTH103


def _write_sysctl(path: str, value: bytes, root: int) -> None:
    """Write a sysctl of the pod's namespaces; those of IPC are their `root`'s alone (kernel 6.1, ipc_permissions)."""
    try:
        _write(path, value, create=False)
    except PermissionError:
        if not root:
            raise
        kernel.set_thread_euid(root)
        try:
            _write(path, value, create=False)
        finally:
            kernel.set_thread_euid(0)


def _write(path: str, content: bytes, *, create: bool = True) -> None:
    flags = os.O_WRONLY | os.O_CLOEXEC | (os.O_CREAT | os.O_TRUNC if create else 0)
    try:
        fd = os.open(path, flags, 0o644)
        try:
            os.write(fd, content)
        finally:
            os.close(fd)
    except OSError as e:
        e.filename = path
        raise


def _credit_entropy(seed: bytes) -> None:
    import fcntl
    import struct

    # struct rand_pool_info: bits credited, octets, the octets (random(4)).
    pool = struct.pack("=ii", len(seed) * 8, len(seed)) + seed
    fd = os.open("/dev/urandom", os.O_WRONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _RNDADDENTROPY, bytearray(pool))
        fcntl.ioctl(fd, _RNDRESEEDCRNG)
    finally:
        os.close(fd)


def move_links(links: list[tuple[str, int]]) -> None:
    """Move interfaces, (name, index), into the pod's network namespace, which gets a loopback that is up."""
    netlink = rtnetlink.Netlink()
    netns = os.open(layout.POD_NETWORK_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for name, index in links:
            netlink.ask(rtnetlink.move_link(index, netns), f"{name}: move it into the pod's network namespace")
    finally:
        os.close(netns)
        netlink.close()
    with namespaces.entered():
        netlink = rtnetlink.Netlink()
        try:
            netlink.ask(rtnetlink.link(1, up=True), "lo up")
        finally:
            netlink.close()


def _macs(request: pb.ConfigureSandboxRequest) -> list[str]:
    return [interface.device_mac.lower() for interface in request.interfaces]


def _links(wanted: list[str], deadline: float) -> dict[str, tuple[str, int]]:
    """Return the VM's network cards; wait for those that were plugged a moment ago, whose driver is at work still."""
    deadline = min(deadline, time.monotonic() + _NIC_PATIENCE_S)
    while True:
        found = rtnetlink.links()
        if found.keys() >= set(wanted) or time.monotonic() > deadline:
            return found  # what is missing is told where it is configured
        time.sleep(0.01)


def configure_network(request: pb.ConfigureSandboxRequest, found: dict[str, tuple[str, int]]) -> None:
    """Configure interfaces (`found`: MAC address -> name, index), routes and neighbours in the present namespace."""
    netlink = rtnetlink.Netlink()
    try:
        indexes = {"lo": 1}
        for interface in request.interfaces:
            indexes[interface.name] = _configure_interface(netlink, interface, found)
        for position in rtnetlink.message_order([route.gateway for route in request.routes]):
            route = request.routes[position]
            index = _index_of(indexes, route.interface, f"route {route.destination}")
            message = rtnetlink.route(index, route.destination, route.gateway, route.source, route.scope, route.metric)
            netlink.ask(message, f"route {route.destination} via {route.gateway or 'link'}")
        for entry in request.neighbours:
            index = _index_of(indexes, entry.interface, f"neighbour {entry.address}")
            netlink.ask(rtnetlink.neighbour(index, entry.address, entry.mac), f"neighbour {entry.address}")
    finally:
        netlink.close()


def _index_of(indexes: dict[str, int], name: str, what: str) -> int:
    if name not in indexes:
        raise ValueError(f"{what} names interface {name!r}, which the request does not configure")
    return indexes[name]


def _configure_interface(netlink: rtnetlink.Netlink, interface: pb.Interface, found: dict[str, tuple[str, int]]) -> int:
    if not interface.name or len(interface.name.encode()) > 15 or "/" in interface.name:
        raise ValueError(f"{interface.name!r} is no interface name")
    device = found.get(interface.device_mac.lower())
    if device is None:
        raise ValueError(f"the VM has no NIC with MAC address {interface.device_mac}; it has {sorted(found)}")
    name, index = device
    mac = interface.mac if interface.mac.lower() != interface.device_mac.lower() else ""
    change = rtnetlink.link(
        index, up=False, mac=mac, mtu=interface.mtu, name=interface.name if name != interface.name else ""
    )
    netlink.ask(change, f"{interface.name}: MAC address, MTU, name")
    # Before it comes up: the kernel would else probe its link-local address and ask for routers.
    for knob in ("accept_dad", "accept_ra", "router_solicitations"):
        with contextlib.suppress(OSError):  # a kernel without IPv6
            _write(f"/proc/sys/net/ipv6/conf/{interface.name}/{knob}", b"0", create=False)
    netlink.ask(rtnetlink.link(index, up=True), f"{interface.name} up")
    for cidr in interface.addresses:
        netlink.ask(rtnetlink.address(index, cidr), f"{interface.name}: address {cidr}")
    return index


def _hold_pid_namespace(reaper: Reaper) -> Child:
    """Make the PID namespace that the pod's containers share, its PID 1, and the bind mount that names it.

    unshare(CLONE_NEWPID) changes where the calling thread's children go, so a thread of its own calls it and starts one
    program (vmrt/guest_image/pause.c): that is PID 1 there.
    """
    outcome: list[Child | BaseException] = []

    def hold() -> None:
        try:
            kernel.unshare(kernel.CLONE_NEWPID)
            outcome.append(reaper.spawn([layout.PAUSE_PROGRAM]))
        except BaseException as e:
            outcome.append(e)

    thread = threading.Thread(target=hold, name="pidns")
    thread.start()
    thread.join()
    child = outcome[0]
    if isinstance(child, BaseException):
        raise child
    _mkdir(layout.SANDBOX)
    _write(layout.POD_PID_NAMESPACE, b"")
    kernel.mount(f"/proc/{child.pid}/ns/pid", layout.POD_PID_NAMESPACE, "", kernel.MS_BIND)
    return child


def _sleep_as_init() -> None:
    """Be the shared namespace's PID 1; runs in the forked child, where no other thread of the agent exists."""
    import signal  # imported before the fork: no import lock can be held by a thread that is gone

    try:
        for number in (signal.SIGINT, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        kernel.set_process_name("pause")
        os.setsid()
        os.closerange(0, 65536)
        while True:
            signal.pause()
    finally:
        os._exit(1)
