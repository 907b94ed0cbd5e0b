"""Links, addresses, routes and neighbours through rtnetlink(7), with the standard library alone.

Messages are built by pure functions (struct nlmsghdr, then the family's header, then attributes padded to 4 octets);
`Netlink.ask` sends one and waits for its acknowledgement. Duplicate address detection is off: the addresses come from
CNI's IPAM, and a pod must not wait a second for a silence that proves nothing on a point-to-point tap.
"""

from __future__ import annotations

import _socket
import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_NETLINK_ROUTE = 0
# linux/netlink.h, linux/rtnetlink.h
_NLMSG_ERROR = 2
_F_REQUEST, _F_ACK, _F_REPLACE, _F_EXCL, _F_CREATE = 0x1, 0x4, 0x100, 0x200, 0x400
_RTM_NEWLINK, _RTM_NEWADDR, _RTM_NEWROUTE, _RTM_NEWNEIGH = 16, 20, 24, 28
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINKINFO, _IFLA_NET_NS_FD = 1, 3, 4, 18, 28
_IFLA_INFO_KIND = 1
_IFA_ADDRESS, _IFA_LOCAL, _IFA_BROADCAST, _IFA_FLAGS = 1, 2, 4, 8
_IFA_F_NODAD, _IFA_F_PERMANENT = 0x02, 0x80
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC = 1, 4, 5, 6, 7
_RT_TABLE_MAIN, _RTPROT_STATIC, _RTN_UNICAST = 254, 4, 1
_RT_SCOPE_UNIVERSE, _RT_SCOPE_LINK = 0, 253
_RTNH_F_ONLINK = 4
_NDA_DST, _NDA_LLADDR = 1, 2
_NUD_PERMANENT = 0x80
_IFF_UP = 1

_HEADER = struct.Struct("=IHHII")
_LINK = struct.Struct("=BxHiII")
_ADDRESS = struct.Struct("=BBBBI")
_ROUTE = struct.Struct("=BBBBBBBBI")
_NEIGHBOUR = struct.Struct("=BxxxiHBB")


def parse_mac(text: str) -> bytes:
    """Return the six octets of "02:00:00:00:00:01". Raises `ValueError`."""
    octets = bytes.fromhex(text.replace(":", ""))
    if len(octets) != 6 or text.count(":") != 5:
        raise ValueError(f"{text!r} is no MAC address")
    return octets


def parse_address(text: str) -> tuple[int, bytes]:
    """Return (address family, network-order octets) of an IPv4 or IPv6 address. Raises `ValueError`."""
    family = _socket.AF_INET6 if ":" in text else _socket.AF_INET
    try:
        return family, _socket.inet_pton(family, text)
    except (OSError, ValueError) as e:
        raise ValueError(f"{text!r} is no IP address") from e


def parse_cidr(text: str) -> tuple[int, bytes, int]:
    """Return (address family, octets, prefix length) of "10.0.0.2/24". Raises `ValueError`."""
    address, slash, prefix = text.partition("/")
    family, octets = parse_address(address)
    if not slash or not (prefix.isascii() and prefix.isdigit()) or int(prefix) > len(octets) * 8:
        raise ValueError(f"{text!r} is no address with a prefix length")
    return family, octets, int(prefix)


def attribute(type_: int, value: bytes) -> bytes:
    """Return one struct rtattr with its padding."""
    length = 4 + len(value)
    return struct.pack("=HH", length, type_) + value + b"\0" * (-length % 4)


def link(index: int, *, up: bool, mac: str = "", mtu: int = 0, name: str = "") -> tuple[int, int, bytes]:
    """Return (type, flags, body) of the message that changes a link."""
    body = _LINK.pack(0, 0, index, _IFF_UP if up else 0, _IFF_UP)
    if mac:
        body += attribute(_IFLA_ADDRESS, parse_mac(mac))
    if mtu:
        body += attribute(_IFLA_MTU, struct.pack("=I", mtu))
    if name:
        body += attribute(_IFLA_IFNAME, name.encode() + b"\0")
    return _RTM_NEWLINK, 0, body


def new_link(index: int, name: str, kind: str, mac: str) -> tuple[int, int, bytes]:
    """Return (type, flags, body) of the message that makes a link of a kind that needs no more, with this index."""
    body = _LINK.pack(0, 0, index, 0, 0) + attribute(_IFLA_IFNAME, name.encode() + b"\0")
    body += attribute(_IFLA_ADDRESS, parse_mac(mac))
    return (
        _RTM_NEWLINK,
        _F_CREATE | _F_EXCL,
        body + attribute(_IFLA_LINKINFO, attribute(_IFLA_INFO_KIND, kind.encode())),
    )


def move_link(index: int, netns_fd: int) -> tuple[int, int, bytes]:
    """Return (type, flags, body) of the message that moves a link into another network namespace."""
    body = _LINK.pack(0, 0, index, 0, 0) + attribute(_IFLA_NET_NS_FD, struct.pack("=I", netns_fd))
    return _RTM_NEWLINK, 0, body


def address(index: int, cidr: str) -> tuple[int, int, bytes]:
    """Return (type, flags, body) of the message that adds an address."""
    family, octets, prefix = parse_cidr(cidr)
    body = _ADDRESS.pack(family, prefix, _IFA_F_PERMANENT, _RT_SCOPE_UNIVERSE, index)
    body += attribute(_IFA_LOCAL, octets) + attribute(_IFA_ADDRESS, octets)
    if family == _socket.AF_INET and prefix < 31:
        host_bits = (1 << (32 - prefix)) - 1
        broadcast = int.from_bytes(octets, "big") | host_bits
        body += attribute(_IFA_BROADCAST, broadcast.to_bytes(4, "big"))
    if family == _socket.AF_INET6:
        body += attribute(_IFA_FLAGS, struct.pack("=I", _IFA_F_PERMANENT | _IFA_F_NODAD))
    return _RTM_NEWADDR, _F_CREATE | _F_REPLACE, body


def route(
    index: int, destination: str, gateway: str = "", source: str = "", scope: int = 0, metric: int = 0
) -> tuple[int, int, bytes]:
    """Return (type, flags, body) of the message that adds a route in the main table."""
    family, octets, prefix = parse_cidr(destination)
    if family == _socket.AF_INET and not gateway and scope == _RT_SCOPE_UNIVERSE:
        scope = _RT_SCOPE_LINK  # as ip-route(8) does for a route without a next hop
    # ONLINK: CNI plugins give gateways outside the address's prefix (169.254.1.1 with a /32).
    flags = _RTNH_F_ONLINK if gateway else 0
    body = _ROUTE.pack(family, prefix, 0, 0, _RT_TABLE_MAIN, _RTPROT_STATIC, scope, _RTN_UNICAST, flags)
    if prefix:
        body += attribute(_RTA_DST, octets)
    if gateway:
        gateway_family, gateway_octets = parse_address(gateway)
        if gateway_family != family:
            raise ValueError(f"route {destination}: gateway {gateway} is of the other IP version")
        body += attribute(_RTA_GATEWAY, gateway_octets)
    if source:
        body += attribute(_RTA_PREFSRC, parse_address(source)[1])
    if metric:
        body += attribute(_RTA_PRIORITY, struct.pack("=I", metric))
    return _RTM_NEWROUTE, _F_CREATE | _F_REPLACE, body + attribute(_RTA_OIF, struct.pack("=I", index))


def neighbour(index: int, ip: str, mac: str) -> tuple[int, int, bytes]:
    """Return (type, flags, body) of the message that adds a permanent neighbour entry."""
    family, octets = parse_address(ip)
    body = _NEIGHBOUR.pack(family, index, _NUD_PERMANENT, 0, 0)
    body += attribute(_NDA_DST, octets) + attribute(_NDA_LLADDR, parse_mac(mac))
    return _RTM_NEWNEIGH, _F_CREATE | _F_REPLACE, body


def parse_errors(datagram: bytes) -> list[tuple[int, int]]:
    """Return (sequence number, errno) of each acknowledgement in a datagram; errno 0 is success."""
    answers = []
    offset = 0
    while offset + _HEADER.size <= len(datagram):
        length, type_, _, sequence, _ = _HEADER.unpack_from(datagram, offset)
        if length < _HEADER.size or offset + length > len(datagram):
            break
        if type_ == _NLMSG_ERROR and length >= _HEADER.size + 4:
            (error,) = struct.unpack_from("=i", datagram, offset + _HEADER.size)
            answers.append((sequence, -error))
        offset += length + (-length % 4)
    return answers


class Netlink:
    """One rtnetlink socket in the current network namespace."""

    def __init__(self) -> None:
        self._socket = _socket.socket(_socket.AF_NETLINK, _socket.SOCK_RAW, _NETLINK_ROUTE)
        self._socket.settimeout(5.0)
        self._socket.bind((0, 0))
        self._sequence = 0

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def ask(self, message: tuple[int, int, bytes], what: str) -> None:
        """Send a message and wait until the kernel has done it. Raises `OSError` with `what` as its file name."""
        type_, flags, body = message
        self._sequence += 1
        length = _HEADER.size + len(body)
        self._socket.send(_HEADER.pack(length, type_, flags | _F_REQUEST | _F_ACK, self._sequence, 0) + body)
        while True:
            for sequence, errno in parse_errors(self._socket.recv(65536)):
                if sequence == self._sequence:
                    if errno:
                        raise OSError(errno, os.strerror(errno), what)
                    return


def links(sys_net: str = "/sys/class/net") -> dict[str, tuple[str, int]]:
    """Return the interfaces there are: MAC address in lower case -> (name, index). Loopback is left out."""
    found: dict[str, tuple[str, int]] = {}
    for name in sorted(os.listdir(sys_net)):  # noqa: PTH208
        if name == "lo":
            continue
        try:
            with open(f"{sys_net}/{name}/address") as mac, open(f"{sys_net}/{name}/ifindex") as index:  # noqa: PTH123
                found.setdefault(mac.read().strip().lower(), (name, int(index.read())))
        except (OSError, ValueError):
            continue  # it went away, or is no Ethernet device
    return found


def message_order(gateways: Sequence[str]) -> list[int]:
    """Return the positions of routes in the order to add them: on-link ones first, then those with a gateway."""
    return sorted(range(len(gateways)), key=lambda position: bool(gateways[position]))
