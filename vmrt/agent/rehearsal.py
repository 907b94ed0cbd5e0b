"""Does ahead, in a VM that no pod has yet, what its first pod would be the first to do; nothing of it is left.

What runs for the first time costs more: an emulated guest translates each piece of code when it first gets there
(16,000 pieces in a first CreateContainer, 1500 in the next), a guest under KVM has its memory mapped then, and in both
Python imports and fills its caches. So a network is configured in namespaces that are thrown away, and a container of
the root image is made, started, watched, entered and removed. The host asks for it before it offers the VM to pods; a
pod that boots its own VM has no time for it, and does without.
"""

from __future__ import annotations

import _socket
import contextlib
import os
import threading
import time

from vmrt.agent import agent_pb2 as pb
from vmrt.agent import (
    cgroups,
    console,
    containers,
    disks,
    events,
    frames,
    kernel,
    layout,
    rootfs,
    rtnetlink,
    sandbox,
    status,
    streams,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from vmrt.agent.crun import Crun
    from vmrt.agent.process import Reaper

# No pod's container is named so: theirs have 64 hexadecimal digits.
NAME = "rehearsal"
DIRECTORY = f"{layout.RUN}/{NAME}"
_STEP_S = 30.0
_NIC_INDEX, _MAC = 100, "02:00:00:00:00:01"
_CAPABILITIES = ["CAP_CHOWN", "CAP_KILL", "CAP_SETGID", "CAP_SETUID", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE"]
_KERNEL = ["nosuid", "noexec", "nodev"]


def rehearse(reaper: Reaper, crun: Crun) -> None:
    """Do all of it. A part that fails is told to the console. Raises `AgentError` when something would be left."""
    with contextlib.ExitStack() as undo:
        undo.callback(rootfs.remove_tree, DIRECTORY)
        undo.callback(rootfs.unmount_tree, DIRECTORY)
        for part in (_files, _network, lambda: _container(reaper, crun)):
            try:
                part()
            except (OSError, ValueError, status.AgentError, frames.FrameError) as e:
                console.log(f"rehearsal: {type(e).__name__}: {getattr(e, 'message', e)}")
    left = [path for path in _traces() if os.path.lexists(path)]
    if left:
        raise status.AgentError(status.INTERNAL, f"rehearsal: left behind: {', '.join(left)}")


def _traces() -> list[str]:
    return [
        DIRECTORY,
        f"{layout.CONTAINERS}/{NAME}",
        f"{layout.SCRATCH}/{NAME}",
        cgroups.Cgroup(NAME).path,
    ]


def _request(nic: str, gateway: str, gateway6: str) -> pb.ConfigureSandboxRequest:
    """Return a configuration with documentation addresses (RFC 5737, RFC 3849), decoded as one from the host is."""
    addresses = ["192.0.2.2/24", "2001:db8::2/64"]
    wanted = pb.ConfigureSandboxRequest(
        hostname=NAME,
        interfaces=[pb.Interface(name=nic, device_mac=_MAC, mtu=1500, addresses=addresses)],
        routes=[
            pb.Route(destination="198.51.100.0/24", gateway=gateway, interface=nic),
            pb.Route(destination="2001:db8:1::/64", gateway=gateway6, interface=nic),
        ],
        neighbours=[pb.Neighbour(address="192.0.2.1", mac="02:00:00:00:00:02", interface=nic)],
    )
    request = pb.ConfigureSandboxRequest()
    request.ParseFromString(wanted.SerializeToString())
    return request


def _files() -> None:
    sandbox.write_files(DIRECTORY, _request("eth0", "", ""), (0, 0))


def _network() -> None:
    """Configure an interface as a pod's, in namespaces that end with the thread."""
    rtnetlink.links()
    failed: list[BaseException] = []

    def run() -> None:
        try:
            kernel.unshare(kernel.CLONE_NEWNET | kernel.CLONE_NEWUTS)
            _socket.sethostname(NAME)
            _interface()
        except BaseException as e:
            failed.append(e)

    thread = threading.Thread(target=run, name=NAME)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def _interface() -> None:
    # A module that is loaded for this would stay, and the dummy one makes an interface in the pod's namespace.
    dummy = os.path.exists("/sys/module/dummy")  # noqa: PTH110
    netlink = rtnetlink.Netlink()
    try:
        netlink.ask(rtnetlink.link(1, up=True), "lo up")
        if dummy:
            netlink.ask(rtnetlink.new_link(_NIC_INDEX, "dummy0", "dummy", _MAC), "dummy0")
    finally:
        netlink.close()
    if dummy:
        request = _request("eth0", "192.0.2.1", "2001:db8::1")
        sandbox.configure_network(request, {_MAC: ("dummy0", _NIC_INDEX)})
    else:
        sandbox.configure_network(_request("lo", "", ""), {_MAC: ("lo", 1)})


class _RootLayer(disks.Layers):
    """The root image in the place of an image's layers."""

    def acquire(self, serial: str, deadline: float) -> str:
        return layout.REHEARSAL_ROOT

    def release(self, serial: str) -> None:
        pass


def _specification() -> dict[str, Any]:
    """Return what the host would ask for an ordinary container (vmrt/pods/oci.py), with a small seccomp profile."""
    sets = {kind: _CAPABILITIES for kind in ("bounding", "effective", "permitted")}
    mounts = [
        ("/proc", "proc", "proc", _KERNEL),
        ("/dev", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
        ("/dev/pts", "devpts", "devpts", ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]),
        ("/dev/mqueue", "mqueue", "mqueue", _KERNEL),
        ("/sys", "sysfs", "sysfs", [*_KERNEL, "ro"]),
        ("/sys/fs/cgroup", "cgroup", "cgroup", [*_KERNEL, "relatime", "ro"]),
        ("/dev/shm", "bind", f"{DIRECTORY}/shm", ["rbind", "rw", *_KERNEL]),
        ("/etc/hostname", "bind", f"{DIRECTORY}/hostname", ["rbind", "rprivate", "rw"]),
    ]
    devices = [{"allow": False, "access": "rwm"}, {"allow": True, "type": "c", "access": "m"}]
    devices += [{"allow": True, "type": "c", "access": "rwm", "major": 1, "minor": n} for n in (3, 5, 7, 8, 9)]
    return {
        "ociVersion": "1.0.2",
        "process": {
            "args": ["busybox", "sh", "-c", "echo; exec busybox sleep 1000"],
            "env": ["PATH=/usr/bin:/bin"],
            "cwd": "/",
            "capabilities": {**sets, "inheritable": [], "ambient": []},
            "noNewPrivileges": True,
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1024, "hard": 4096}],
        },
        "root": {"readonly": False},
        "mounts": [dict(zip(("destination", "type", "source", "options"), mount, strict=True)) for mount in mounts],
        "linux": {
            "namespaces": [{"type": "mount"}, {"type": "cgroup"}, {"type": "pid"}],
            "resources": {"devices": devices, "cpu": {"shares": 1024}, "memory": {"limit": 64 * 1024 * 1024}},
            "maskedPaths": ["/proc/kcore", "/proc/keys"],
            "readonlyPaths": ["/proc/sys"],
            "seccomp": {
                "defaultAction": "SCMP_ACT_ALLOW",
                "architectures": ["SCMP_ARCH_X86_64"],
                "syscalls": [{"names": ["kexec_load", "reboot"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}],
            },
        },
    }


def _container(reaper: Reaper, crun: Crun) -> None:
    """Make a container of the root image, start it, read its output, run a command in it, remove it."""
    import json

    from vmrt.agent import stats

    what = events.Events()
    # A table of its own: the pod's never knows of it.
    table = containers.Containers(reaper, _RootLayer(), what, crun)
    served = streams.Streams(table, what, reaper)
    try:
        request = pb.CreateContainerRequest(
            container_id=NAME, layer_serials=["root"], oci_spec=json.dumps(_specification()).encode()
        )
        container = table.create(request, time.monotonic() + _STEP_S)
        with _stream(served, pb.StreamHello(output=pb.OutputStream(container_id=NAME))) as output:
            table.start(NAME, time.monotonic() + _STEP_S)
            output.until(pb.OUTPUT)
            output.send(pb.ACK, pb.OutputAck(stdout_offset=1).SerializeToString())
            hello = pb.StreamHello(exec=pb.ExecStream(container_id=NAME, args=["busybox", "true"], detach_kills=True))
            with _stream(served, hello) as execution:
                execution.until(pb.EXIT)
            stats.container_stat(container)
    finally:
        table.remove(NAME)


class _Peer:
    """The host's end of a stream."""

    def __init__(self, connection: _socket.socket) -> None:
        self._connection = connection
        self._decoder = frames.Decoder(frames.FROM_GUEST)

    def send(self, kind: int, payload: bytes) -> None:
        """Send a frame."""
        self._connection.sendall(frames.encode(kind, payload))

    def until(self, kind: int) -> None:
        """Wait for a frame of a kind. Raises `OSError` when the stream ends before."""
        while data := self._connection.recv(65536):
            if any(frame.type == kind for frame in self._decoder.feed(data)):
                return
        raise ConnectionResetError(f"a stream ended before a frame of type {kind}")


@contextlib.contextmanager
def _stream(served: streams.Streams, hello: pb.StreamHello) -> Iterator[_Peer]:
    ours, theirs = _socket.socketpair()
    serve: Callable[[_socket.socket], None] = served.serve
    thread = threading.Thread(target=serve, args=(theirs,), name=NAME)
    thread.start()
    try:
        ours.settimeout(_STEP_S)
        peer = _Peer(ours)
        peer.send(pb.HELLO, hello.SerializeToString())
        yield peer
    finally:
        ours.close()
        thread.join()
