"""A guest without a machine: the test holds a tap's file, as QEMU does, and speaks just enough of the protocols.

It answers ARP and neighbour solicitations for its addresses, echoes UDP to port 7, and serves one line over TCP on any
port. `ask` sends UDP of its own. Everything it saw is in `seen`.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import queue
import select
import struct
import threading
import time
from dataclasses import dataclass, field

from vmrt.model import PodNetwork

TUNSETIFF = 0x400454CA
IFF_TAP_NO_PI_VNET_HDR = 0x0002 | 0x1000 | 0x4000
VNET_HEADER = bytes(10)  # virtio_net_hdr: nothing left to do for the other end
ETH_ARP, ETH_IP4, ETH_IP6 = 0x0806, 0x0800, 0x86DD
FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
TCP, UDP, ICMP6 = 6, 17, 58
NEIGHBOUR_SOLICITATION, NEIGHBOUR_ADVERTISEMENT = 135, 136
LINE = b"hello from the guest\n"

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def octets(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def checksum(data: bytes) -> int:
    """RFC 1071."""
    total: int = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + b"\0" * (len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def sealed(source: Address, target: Address, protocol: int, segment: bytes, at: int) -> bytes:
    """Fill in the checksum (at offset `at`, 0 so far) over the pseudo header of RFC 9293 / RFC 8200."""
    pseudo = source.packed + target.packed + struct.pack("!II", len(segment), protocol)
    return segment[:at] + struct.pack("!H", checksum(pseudo + segment) or 0xFFFF) + segment[at + 2 :]


@dataclass
class TapGuest:
    """The guest of the tap `name`, which must exist in this namespace; `close` it."""

    name: str
    silent: bool = False
    seen: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.ioctl(self._fd, TUNSETIFF, struct.pack("16sH22x", self.name.encode(), IFF_TAP_NO_PI_VNET_HDR))
        self._stop_read, self._stop_write = os.pipe()
        self._mac = b""
        self._interfaces: list[ipaddress.IPv4Interface | ipaddress.IPv6Interface] = []
        self._gateways: dict[int, Address] = {}
        self._neighbours: dict[Address, bytes] = {}
        self._inbox: queue.Queue[bytes] = queue.Queue()
        self._thread = threading.Thread(target=self._serve, name=f"guest of {self.name}")
        self._thread.start()

    def configure(self, network: PodNetwork) -> None:
        """Be what the runtime tells a guest to be."""
        (interface,) = network.interfaces
        self._mac = octets(interface.mac)
        self._interfaces = [ipaddress.ip_interface(cidr) for cidr in interface.addresses]
        for route in network.routes:
            if ipaddress.ip_network(route.destination).prefixlen == 0 and route.gateway:
                gateway = ipaddress.ip_address(route.gateway)
                self._gateways[gateway.version] = gateway

    def close(self) -> None:
        os.write(self._stop_write, b".")
        self._thread.join()
        for fd in (self._fd, self._stop_read, self._stop_write):
            os.close(fd)

    def ask(self, target: str, payload: bytes, *, port: int = 7, patience_s: float = 15.0) -> bytes:
        """Send UDP until an answer comes; raise `TimeoutError` when none does."""
        address = ipaddress.ip_address(target)
        own = next(interface for interface in self._interfaces if interface.version == address.version)
        hop = address if address in own.network else self._gateways[address.version]
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            if hop in self._neighbours:
                segment = struct.pack("!HHHH", 40007, port, 8 + len(payload), 0) + payload
                self._send_ip(own.ip, address, UDP, sealed(own.ip, address, UDP, segment, 6), self._neighbours[hop])
            else:
                self._solicit(own.ip, hop)
            try:
                return self._inbox.get(timeout=0.3)
            except queue.Empty:
                continue
        raise TimeoutError(f"{self.name}: {target} does not answer; seen: {self.seen[-20:]}")

    # --- the wire -----------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while True:
            readable, _, _ = select.select([self._fd, self._stop_read], [], [])
            if self._stop_read in readable:
                return
            try:
                frame = os.read(self._fd, 70000)[len(VNET_HEADER) :]
            except BlockingIOError:
                continue
            except OSError:  # EBADFD: the tap went with its namespace
                return
            sender, kind, body = frame[6:12], struct.unpack("!H", frame[12:14])[0], frame[14:]
            if kind == ETH_ARP:
                self._arp(body)
            elif kind == ETH_IP4:
                length, protocol = struct.unpack("!H", body[2:4])[0], body[9]
                source, target = ipaddress.IPv4Address(body[12:16]), ipaddress.IPv4Address(body[16:20])
                self._packet(source, target, protocol, body[(body[0] & 15) * 4 : length], sender)
            elif kind == ETH_IP6:
                length, protocol = struct.unpack("!H", body[4:6])[0], body[6]
                source6, target6 = ipaddress.IPv6Address(body[8:24]), ipaddress.IPv6Address(body[24:40])
                self._packet(source6, target6, protocol, body[40 : 40 + length], sender)

    def _send(self, target_mac: bytes, kind: int, body: bytes) -> None:
        if not self.silent:
            os.write(self._fd, VNET_HEADER + target_mac + self._mac + struct.pack("!H", kind) + body)

    def _send_ip(self, source: Address, target: Address, protocol: int, segment: bytes, mac: bytes) -> None:
        if source.version == 4:
            head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(segment), 0, 0, 255, protocol, 0)
            head += source.packed + target.packed
            head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
            self._send(mac, ETH_IP4, head + segment)
        else:
            head = struct.pack("!IHBB", 6 << 28, len(segment), protocol, 255) + source.packed + target.packed
            self._send(mac, ETH_IP6, head + segment)

    def _solicit(self, own: Address, wanted: Address) -> None:
        if wanted.version == 4:
            body = struct.pack("!HHBBH", 1, ETH_IP4, 6, 4, 1) + self._mac + own.packed + bytes(6) + wanted.packed
            self._send(b"\xff" * 6, ETH_ARP, body)
        else:
            group = ipaddress.IPv6Address(bytes.fromhex("ff0200000000000000000001ff") + wanted.packed[13:])
            message = struct.pack("!BBHI", NEIGHBOUR_SOLICITATION, 0, 0, 0) + wanted.packed + b"\1\1" + self._mac
            self._send_ip(own, group, ICMP6, sealed(own, group, ICMP6, message, 2), b"\x33\x33" + group.packed[12:])

    def _owns(self, address: Address) -> bool:
        return any(interface.ip == address for interface in self._interfaces)

    def _arp(self, body: bytes) -> None:
        operation = struct.unpack("!H", body[6:8])[0]
        sender_mac, sender, target = body[8:14], ipaddress.IPv4Address(body[14:18]), ipaddress.IPv4Address(body[24:28])
        self.seen.append(f"arp {operation} for {target}")
        self._neighbours[sender] = sender_mac
        if operation == 1 and self._owns(target):
            answer = struct.pack("!HHBBH", 1, ETH_IP4, 6, 4, 2) + self._mac + target.packed + sender_mac + sender.packed
            self._send(sender_mac, ETH_ARP, answer)

    def _packet(self, source: Address, target: Address, protocol: int, segment: bytes, mac: bytes) -> None:
        if protocol == ICMP6 and segment[0] == NEIGHBOUR_SOLICITATION:
            wanted = ipaddress.IPv6Address(segment[8:24])
            self.seen.append(f"neighbour solicitation for {wanted}")
            if self._owns(wanted) and int(source):
                message = struct.pack("!BBHI", NEIGHBOUR_ADVERTISEMENT, 0, 0, 0x60000000) + wanted.packed
                message += b"\2\1" + self._mac
                self._send_ip(wanted, source, ICMP6, sealed(wanted, source, ICMP6, message, 2), mac)
        elif protocol == ICMP6 and segment[0] == NEIGHBOUR_ADVERTISEMENT:
            self._neighbours[ipaddress.IPv6Address(segment[8:24])] = mac
        elif not self._owns(target):
            return
        elif protocol == UDP:
            source_port, port = struct.unpack("!HH", segment[:4])
            self.seen.append(f"udp {source} to {port}")
            if port == 7:
                answer = struct.pack("!HHHH", 7, source_port, len(segment), 0) + segment[8:]
                self._send_ip(target, source, UDP, sealed(target, source, UDP, answer, 6), mac)
            else:
                self._inbox.put(segment[8:])
        elif protocol == TCP:
            self._tcp(source, target, segment, mac)

    def _tcp(self, source: Address, target: Address, segment: bytes, mac: bytes) -> None:
        """Accept, send `LINE` when the handshake is over, answer nothing else."""
        source_port, port, sequence, acknowledged, _, flags = struct.unpack("!HHIIBB", segment[:14])
        self.seen.append(f"tcp {source} to {port} flags {flags}")

        def answer(own: int, answer_flags: int, data: bytes = b"") -> None:
            head = struct.pack("!HHIIBBHHH", port, source_port, own, sequence + 1, 0x50, answer_flags, 65535, 0, 0)
            self._send_ip(target, source, TCP, sealed(target, source, TCP, head + data, 16), mac)

        if flags == SYN:
            answer(1000, SYN | ACK)
        elif flags == ACK and acknowledged == 1001:
            sequence -= 1  # an acknowledgement takes no number of its own
            answer(1001, PSH | ACK, LINE)
