"""What a network namespace has: links, addresses, routes and permanent neighbours, read by rtnetlink(7).

pyroute2 does what changes something. It is not used here because every pod's start reads these tables: opening its
socket takes 2 ms of a processor and each message of a table 0.2, which together was as much as a plugin of the chain.

Everything is about the calling thread's namespace, blocks, and raises `OSError`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

# linux/netlink.h, linux/rtnetlink.h
_HEADER = struct.Struct("=IHHII")
_REQUEST_DUMP = 0x0301
_ERROR, _DONE, _INTERRUPTED = 2, 3, 0x10
_SOL_NETLINK, _GET_STRICT_CHK = 270, 12
_GETLINK, _GETADDR, _GETROUTE, _GETNEIGH = 18, 22, 26, 30
_LINK, _ADDR, _ROUTE = struct.Struct("=BxHiII"), struct.Struct("=BBBBI"), struct.Struct("=BBBBBBBBI")
_NEIGH, _HOP = struct.Struct("=BxxxiHBB"), struct.Struct("=HBBi")
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_MASTER, _IFLA_LINKINFO, _INFO_KIND = 1, 3, 4, 10, 18, 1
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC, _RTA_MULTIPATH, _RTA_VIA = 1, 4, 5, 6, 7, 9, 18
_NDA_DST, _NDA_LLADDR = 1, 2
_RT_TABLE_MAIN, _RTN_UNICAST, _RTPROT_KERNEL, _NUD_PERMANENT = 254, 1, 2, 0x80
_ARPHRD_ETHER, _IFF_UP = 1, 1
# netdevice(7)
_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914
_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_ATTEMPTS = 5

Attributes = dict[int, bytes]


@dataclass(frozen=True, slots=True)
class KernelRoute:
    """A unicast route of the main table. `connected` means that the kernel made it for an address."""

    destination: str
    gateway: str = ""
    source: str = ""
    scope: int = 0
    metric: int = 0
    connected: bool = False


@dataclass(frozen=True, slots=True)
class InterfaceState:
    """What a namespace says of one of its interfaces; addresses are CIDRs without IPv6's link-local ones."""

    name: str
    mac: str
    mtu: int
    addresses: tuple[str, ...]
    routes: tuple[KernelRoute, ...]
    neighbours: tuple[tuple[str, str], ...]  # (address, MAC), permanent ones


@dataclass(frozen=True, slots=True)
class Link:
    """One network device; `kind` is its driver's name ("veth"), "" for hardware and loopback."""

    index: int
    name: str
    kind: str
    mac: str
    mtu: int
    ethernet: bool
    up: bool
    master: bool

    @property
    def serves_a_vm(self) -> bool:
        """Whether a VM's network card can stand for it: an Ethernet device of the pod's own that is up.

        An ipvlan has its parent's MAC, so frames to another one never reach it; the others lead nowhere, or are ours.
        """
        others = ("bridge", "ipvlan", "dummy", "ifb", "tun")
        return self.ethernet and self.up and not self.master and self.kind not in others


def read(ifname: str) -> tuple[InterfaceState, ...]:
    """Return what CNI made: the pod's interface, and after it the others that a VM can be given."""
    found = {link.name: link for link in links()}
    if ifname not in found:
        raise OSError(errno.ENODEV, f"CNI succeeded, but there is no interface {ifname}")
    wanted = [found.pop(ifname), *(link for link in found.values() if link.serves_a_vm)]
    cidrs = list(_addresses())
    routes = [route for family in _FAMILIES for route in _routes(family)]
    neighbours = [entry for family in _FAMILIES for entry in _neighbours(family)]
    return tuple(
        InterfaceState(
            link.name,
            link.mac,
            link.mtu,
            tuple(str(cidr) for index, cidr in cidrs if index == link.index and not _link_local(cidr)),
            tuple(route for index, route in routes if index == link.index),
            tuple((address, mac) for index, address, mac in neighbours if index == link.index),
        )
        for link in wanted
    )


def links() -> list[Link]:
    """Return all network devices."""
    found = []
    for (_, kind, index, flags, _), attributes in _dump(_GETLINK, _LINK, _LINK.pack(0, 0, 0, 0, 0)):
        info = _parse(attributes.get(_IFLA_LINKINFO, b""))
        found.append(
            Link(
                index,
                _text(attributes.get(_IFLA_IFNAME, b"")),
                _text(info.get(_INFO_KIND, b"")),
                _mac(attributes.get(_IFLA_ADDRESS, b"")),
                _number(attributes.get(_IFLA_MTU, b"")),
                ethernet=kind == _ARPHRD_ETHER,
                up=bool(flags & _IFF_UP),
                master=_IFLA_MASTER in attributes,
            )
        )
    return found


def addresses(ifname: str) -> set[str] | None:
    """Return the addresses of an interface, without prefix lengths; None when there is no such interface."""
    try:
        index = socket.if_nametoindex(ifname)
    except OSError:
        return None
    return {str(cidr.ip) for at, cidr in _addresses() if at == index}


def bring_up(ifname: str) -> None:
    """Set an interface up."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        request = struct.pack("16sH22x", ifname.encode(), 0)
        (flags,) = struct.unpack_from("=H", fcntl.ioctl(control, _SIOCGIFFLAGS, request), 16)
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH22x", ifname.encode(), flags | _IFF_UP))


# --- messages ---------------------------------------------------------------------------------------------------------


def _addresses() -> Iterator[tuple[int, ipaddress.IPv4Interface | ipaddress.IPv6Interface]]:
    for (_, prefix, _, _, index), attributes in _dump(_GETADDR, _ADDR, _ADDR.pack(0, 0, 0, 0, 0)):
        # Of a point-to-point link _ADDRESS is the other end's.
        octets = attributes.get(_IFA_LOCAL) or attributes.get(_IFA_ADDRESS)
        if octets:
            yield index, ipaddress.ip_interface((octets, prefix))


def _link_local(cidr: ipaddress.IPv4Interface | ipaddress.IPv6Interface) -> bool:
    return cidr.version == 6 and cidr.is_link_local


def _routes(family: int) -> Iterator[tuple[int, KernelRoute]]:
    wanted = _ROUTE.pack(family, 0, 0, 0, _RT_TABLE_MAIN, 0, 0, 0, 0)
    for header, attributes in _dump(_GETROUTE, _ROUTE, wanted):
        yield from routes_of(header, attributes)


def routes_of(header: tuple[int, ...], attributes: Attributes) -> Iterator[tuple[int, KernelRoute]]:
    """Read one RTM_NEWROUTE message: a route for each interface that it leads over, with that one's index.

    Of several next hops over an interface the first counts. Nothing of what is no unicast route of the main table.
    """
    family, length, _, _, table, protocol, scope, kind, _ = header
    if table != _RT_TABLE_MAIN or kind != _RTN_UNICAST:
        return
    destination = attributes.get(_RTA_DST, bytes(4 if family == socket.AF_INET else 16))
    hops = [(_number(attributes[_RTA_OIF]), attributes)] if _RTA_OIF in attributes else []
    rest = attributes.get(_RTA_MULTIPATH, b"")
    while len(rest) >= _HOP.size:
        size, _, _, index = _HOP.unpack_from(rest)
        hops.append((index, _parse(rest[_HOP.size : size])))
        rest = rest[max(size, _HOP.size) :]
    for index, hop in dict(reversed(hops)).items():
        # RTA_VIA: an address of the other family, after two octets that name it.
        gateway = hop.get(_RTA_GATEWAY) or hop.get(_RTA_VIA, b"")[2:]
        yield (
            index,
            KernelRoute(
                destination=f"{ipaddress.ip_address(destination)}/{length}",
                gateway=str(ipaddress.ip_address(gateway)) if gateway else "",
                source=str(ipaddress.ip_address(attributes[_RTA_PREFSRC])) if _RTA_PREFSRC in attributes else "",
                scope=scope,
                metric=_number(attributes.get(_RTA_PRIORITY, b"")),
                connected=protocol == _RTPROT_KERNEL and not gateway,
            ),
        )


def _neighbours(family: int) -> Iterator[tuple[int, str, str]]:
    for (_, index, state, _, _), attributes in _dump(_GETNEIGH, _NEIGH, _NEIGH.pack(family, 0, 0, 0, 0)):
        if state & _NUD_PERMANENT and attributes.get(_NDA_LLADDR) and _NDA_DST in attributes:
            yield index, str(ipaddress.ip_address(attributes[_NDA_DST])), _mac(attributes[_NDA_LLADDR])


def _dump(kind: int, header: struct.Struct, wanted: bytes) -> list[tuple[tuple[int, ...], Attributes]]:
    """Return a table's messages. One that changes while it is read is read again."""
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(InterruptedError):
            return list(_read(kind, header, wanted))
    raise OSError(errno.EBUSY, "a table of the namespace keeps changing while it is read")


def _read(kind: int, header: struct.Struct, wanted: bytes) -> Iterator[tuple[tuple[int, ...], Attributes]]:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as kernel:
        # Or fields of the request, such as a route's table, would be passed over.
        kernel.setsockopt(_SOL_NETLINK, _GET_STRICT_CHK, 1)
        kernel.send(_HEADER.pack(_HEADER.size + len(wanted), kind, _REQUEST_DUMP, 1, 0) + wanted)
        while True:
            rest = kernel.recv(1 << 16)
            while len(rest) >= _HEADER.size:
                size, reply, flags, _, _ = _HEADER.unpack_from(rest)
                if flags & _INTERRUPTED:
                    raise InterruptedError(errno.EINTR, "the table changed")
                body, rest = rest[_HEADER.size : size], rest[_aligned(max(size, _HEADER.size)) :]
                if reply == _ERROR:
                    number = -struct.unpack_from("=i", body)[0]
                    raise OSError(number, f"rtnetlink: {os.strerror(number)}")
                if reply == _DONE:
                    return
                yield header.unpack_from(body), _parse(body[_aligned(header.size) :])


def _parse(octets: bytes) -> Attributes:
    found: Attributes = {}
    while len(octets) >= 4:
        size, kind = struct.unpack_from("=HH", octets)
        if size < 4:
            break
        found[kind & 0x3FFF] = octets[4:size]
        octets = octets[_aligned(size) :]
    return found


def _aligned(size: int) -> int:
    return (size + 3) & ~3


def _number(octets: bytes) -> int:
    return int.from_bytes(octets, "little")


def _text(octets: bytes) -> str:
    return octets.rstrip(b"\0").decode(errors="replace")


def _mac(octets: bytes) -> str:
    return octets.hex(":")
