"""The kernel's side of a pod's network: namespaces, taps, and joining the two by traffic control.

Every function but `in_thread` and `to_the_end` blocks, for some milliseconds at most: call it through `in_thread`. Work
inside a namespace is done by a thread of its own that is thrown away afterwards, so no thread of a pool ever comes back
in the wrong namespace, and no process is needed to hold one: a bind mount of the namespace's file does
(network_namespaces(7)).

How a guest's frames travel (tc-mirred(8)): what arrives at the CNI interface is redirected to the tap, and what the
guest sends into the tap is redirected to the CNI interface, both at ingress. The namespace's own stack, which still
has the pod's addresses, therefore sees none of it: it answers no ARP and resets no connection. The addresses stay,
because the reference plugins read them from the interface at DEL to find the masquerading rules to remove.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import errno
import fcntl
import functools
import os
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from vmrt import interfaces, realtime
from vmrt.errors import NetworkError
from vmrt.interfaces import InterfaceState
from vmrt.libc import check, libc

T = TypeVar("T")

CLONE_NEWNET = 0x40000000
MS_BIND = 0x1000
MNT_DETACH = 2
NS_GET_NSTYPE = 0xB703  # ioctl_ns(2)

TUNSETIFF = 0x400454CA
TUNSETPERSIST = 0x400454CB
TUNSETOWNER = 0x400454CC
IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
IFF_MULTI_QUEUE = 0x0100
IFF_VNET_HDR = 0x4000

ETH_P_ALL = 3
INGRESS = 0xFFFF0000
IFNAMSIZ = 15
BRIDGE = "vmrt{}"  # inside a pod's namespace, where tc cannot redirect; the interface's index


class Joint(enum.Enum):
    """What joins tap and CNI interface, best first."""

    MATCHALL = "tc matchall"
    U32 = "tc u32"
    BRIDGE = "bridge"


# --- from the event loop ----------------------------------------------------------------------------------------------


async def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Await `work` to its end even when cancelled; the cancellation goes on afterwards."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as e:
            cancelled = e
    if cancelled is None:
        return task.result()
    error = None if task.cancelled() else task.exception()
    raise cancelled from error


async def in_thread(work: Callable[..., T], *args: object) -> T:
    """Run blocking work in a thread; when cancelled, wait for it: its effects are then certain and can be undone."""
    return await to_the_end(asyncio.to_thread(work, *args))


# --- namespaces -------------------------------------------------------------------------------------------------------


def inside(netns: Path | None, work: Callable[[], T]) -> T:
    """Run `work` in the namespace at `netns` (None: a new one), in a thread that ends with it."""

    def body() -> T:
        if netns is None:
            _call("unshare", CLONE_NEWNET)
        else:
            fd = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
            try:
                _call("setns", fd, CLONE_NEWNET)
            finally:
                os.close(fd)
        return work()

    return realtime.in_own_thread("vmrt-netns", body)


def create(path: Path) -> None:
    """Make a network namespace with its loopback up, held by a bind mount at `path`, which must not exist."""
    with _translated("netns", f"netns {path}"):
        os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))

        def hold() -> None:
            interfaces.bring_up("lo")
            own = f"/proc/self/task/{threading.get_native_id()}/ns/net"
            _call("mount", own.encode(), os.fsencode(path), None, MS_BIND, None)

        try:
            inside(None, hold)
        except BaseException:
            remove(path)
            raise


def exists(path: Path) -> bool:
    """Say whether `path` holds a network namespace (and is not just the file that a reboot leaves)."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return fcntl.ioctl(fd, NS_GET_NSTYPE) == CLONE_NEWNET
    except OSError:
        return False
    finally:
        os.close(fd)


def remove(path: Path) -> None:
    """Let go of the namespace at `path`; one that is gone is no error. The kernel then deletes what is in it."""
    with _translated("netns", f"netns {path}"):
        while exists(path):  # someone may have mounted it twice
            _call("umount2", os.fsencode(path), MNT_DETACH)
        path.unlink(missing_ok=True)


def _call(name: str, *args: Any) -> None:
    check(getattr(libc(), name)(*args), name)


@contextlib.contextmanager
def _translated(phase: str, resource: str) -> Iterator[None]:
    """Turn what the kernel refuses into our error: the seam to pyroute2 and the system."""
    try:
        yield
    except NetlinkError as e:
        text = e.args[1] if len(e.args) > 1 else str(e)
        raise NetworkError(f"the kernel refused: {text}", phase=phase, resource=resource) from e
    except OSError as e:
        text = e.strerror or str(e)
        raise NetworkError(f"{e.filename}: {text}" if e.filename else text, phase=phase, resource=resource) from e


# --- taps -------------------------------------------------------------------------------------------------------------


def create_tap(name: str, owner: int | None = None, queues: int = 1) -> None:
    """Create a persistent tap in this namespace, down, that `owner` (a uid) may open; an existing one is no error.

    With `queues` above 1 it has to be opened for as many; the kernel makes them as they are opened.

    It stays down until `join`: until then no frame can pass between the guest and the host's own stack, which would
    answer on any interface that is up, addresses or not.
    """
    if not 0 < len(name) <= IFNAMSIZ or any(c in "/ :%" for c in name):
        raise NetworkError(f"{name!r} is no interface name: 1 to {IFNAMSIZ} characters", phase="tap")
    with _translated("tap", f"tap {name}"), IPRoute() as ipr:
        found = _find(ipr, name)
        if found is not None:
            if _kind(ipr, found) != "tun":
                raise NetworkError(
                    "an interface of this name exists and is no tap", phase="tap", resource=f"tap {name}"
                )
            return
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        try:
            flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | (IFF_MULTI_QUEUE if queues > 1 else 0)
            request = struct.pack("16sH22x", name.encode(), flags)
            fcntl.ioctl(fd, TUNSETIFF, request)
            if owner is not None:
                fcntl.ioctl(fd, TUNSETOWNER, owner)
            fcntl.ioctl(fd, TUNSETPERSIST, 1)
        finally:
            os.close(fd)


def delete_links(names: Sequence[str]) -> None:
    """Delete taps in this namespace; absent ones are no error."""
    present = {name for _, name in socket.if_nameindex()}
    for name in names:
        if name in present:
            delete_link(name)


def delete_link(name: str, kind: str = "tun") -> None:
    """Delete a link of this kind in this namespace; an absent one is no error, another kind's is left alone."""
    with _translated("tap" if kind == "tun" else "link", name), IPRoute() as ipr:
        index = _find(ipr, name)
        if index is not None and _kind(ipr, index) == kind:
            ipr.link("del", index=index)


def used_networks(except_link: str) -> tuple[str, ...]:
    """Return the destinations of this namespace's routes, but defaults and those over `except_link`."""
    with _translated("routes", "host"), IPRoute() as ipr:
        own = _find(ipr, except_link)
        return tuple(
            f"{route.get_attr('RTA_DST')}/{route['dst_len']}"
            for route in (*ipr.get_routes(family=socket.AF_INET), *ipr.get_routes(family=socket.AF_INET6))
            if route.get_attr("RTA_DST") and route["dst_len"] and route.get_attr("RTA_OIF") != own
        )


def _find(ipr: Any, name: str) -> int | None:
    indexes = ipr.link_lookup(ifname=name)
    return indexes[0] if indexes else None


def _kind(ipr: Any, index: int) -> str:
    info = ipr.get_links(index)[0].get_attr("IFLA_LINKINFO")
    return (info.get_attr("IFLA_INFO_KIND") or "") if info else ""


# --- the CNI interface ------------------------------------------------------------------------------------------------


def read_interfaces(netns: Path, ifname: str) -> tuple[InterfaceState, ...]:
    """Read what CNI made in the namespace: the pod's interface, and after it the others that a VM can be given."""
    with _translated("netns read", f"{ifname} in {netns}"):
        return inside(netns, functools.partial(interfaces.read, ifname))


def has_addresses(netns: Path, ifname: str, addresses: tuple[str, ...]) -> bool:
    """Say whether the namespace and the interface in it are there, with these addresses."""
    if not exists(netns):
        return False

    def work() -> bool:
        have = interfaces.addresses(ifname)
        return have is not None and {cidr.partition("/")[0] for cidr in addresses} <= have

    with _translated("netns read", f"{ifname} in {netns}"):
        return inside(netns, work)


def stand_in(netns: Path, ifname: str, addresses: tuple[str, ...]) -> None:
    """Put addresses (CIDR) back on an interface, making a dummy of one that is gone, for DEL to find."""

    def work() -> None:
        with IPRoute() as ipr:
            index = _find(ipr, ifname)
            if index is None:
                # A bridge, because the kernels of pods' hosts have it where they lack the dummy driver.
                ipr.link("add", ifname=ifname, kind="bridge")
                index = _find(ipr, ifname)
            have = interfaces.addresses(ifname) or set()
            for cidr in addresses:
                address, _, prefix = cidr.partition("/")
                if address not in have:
                    ipr.addr("add", index=index, address=address, prefixlen=int(prefix))

    with _translated("netns restore", f"{ifname} in {netns}"):
        inside(netns, work)


# --- joining ----------------------------------------------------------------------------------------------------------


def redirect_plan(joint: Joint, interface: int, tap: int) -> tuple[dict[str, Any], ...]:
    """Return the arguments of the traffic-control requests that join two links (by index) for MATCHALL and U32."""
    requests: list[dict[str, Any]] = []
    for source, target in ((interface, tap), (tap, interface)):
        match: dict[str, Any] = {"kind": "matchall"}
        if joint is Joint.U32:
            # "u32 match u8 0 0": the first octet under the mask 0 equals 0. A class is asked for, and never used.
            match = {"kind": "u32", "keys": ["0x0/0x0+0"], "target": 0x10001}
        action = {"kind": "mirred", "direction": "egress", "action": "redirect", "ifindex": target}
        requests += [
            {"command": "add", "kind": "ingress", "index": source, "handle": "ffff:"},
            {
                "command": "add-filter",
                "index": source,
                "parent": INGRESS,
                "prio": 1,
                "protocol": ETH_P_ALL,
                "action": [action],
                **match,
            },
        ]
    return tuple(requests)


def join(netns: Path, ifname: str, tap: str, preferred: Joint | None = None) -> Joint:
    """Move the tap into the namespace (unless it is there) and join it to the interface; return what joined them.

    Without `preferred` each way is tried in turn. Doing it twice is no error. After a failure the namespace is to be
    thrown away: the tap may be in it.
    """
    with _translated("tap join", f"tap {tap}"):
        with IPRoute() as ipr:
            index = _find(ipr, tap)
            if index is not None:
                fd = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    ipr.link("set", index=index, net_ns_fd=fd)
                finally:
                    os.close(fd)
        return inside(netns, functools.partial(_join, ifname, tap, preferred))


def _join(ifname: str, tap: str, preferred: Joint | None) -> Joint:
    with IPRoute() as ipr:
        interface, end = _find(ipr, ifname), _find(ipr, tap)
        if interface is None or end is None:
            raise OSError(errno.ENODEV, f"there is no {ifname if interface is None else tap} in the pod's namespace")
        # The kernel would send router solicitations and its own address's traces to the guest.
        _sysctl(f"ipv6/conf/{tap}/disable_ipv6", "1")
        ipr.link("set", index=end, mtu=ipr.get_links(interface)[0].get_attr("IFLA_MTU"))
        refusals = []
        for joint in (preferred,) if preferred else tuple(Joint):
            try:
                if joint is Joint.BRIDGE:
                    _join_by_bridge(ipr, interface, end)
                else:
                    _join_by_redirect(ipr, joint, interface, end)
                ipr.link("set", index=end, state="up")
                return joint
            except NetlinkError as e:
                refusals.append(f"{joint.value}: {e.args[-1]}")
        raise OSError(errno.EOPNOTSUPP, "; ".join(refusals))


def _join_by_redirect(ipr: Any, joint: Joint, interface: int, tap: int) -> None:
    for index in (interface, tap):
        with contextlib.suppress(NetlinkError):  # absent the first time
            ipr.tc("del", "ingress", index=index, handle="ffff:")
    for request in redirect_plan(joint, interface, tap):
        ipr.tc(**request)


def _join_by_bridge(ipr: Any, interface: int, tap: int) -> None:
    """Make interface and tap ports of a bridge.

    The guest has the interface's MAC, and a bridge keeps frames for a port's own MAC to itself, so the port gets
    another one; and the addresses are taken off it, or the namespace would answer for them.
    """
    name = BRIDGE.format(interface)
    bridge = _find(ipr, name)
    if bridge is None:
        ipr.link("add", ifname=name, kind="bridge", br_stp_state=0, br_forward_delay=0)
        bridge = _find(ipr, name)
        _sysctl(f"ipv6/conf/{name}/disable_ipv6", "1")
        ipr.flush_addr(index=interface)
        ipr.link("set", index=interface, address="02:" + ":".join(f"{octet:02x}" for octet in secrets.token_bytes(5)))
    for index in (interface, tap):
        ipr.link("set", index=index, master=bridge)
    ipr.link("set", index=bridge, state="up")


def _sysctl(name: str, value: str) -> None:
    """Set a sysctl below net/, which shows the calling thread's namespace; an absent one (no IPv6) is no error."""
    with contextlib.suppress(FileNotFoundError):
        Path("/proc/sys/net", name).write_text(value)
