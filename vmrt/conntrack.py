"""What the kernel remembers of connections: forgetting those that led to a pod which is gone.

A UDP flow through a host port keeps its translation for as long as octets come, whatever the rules have become: a
client that goes on sending would reach nobody, or the pod that gets the address next. (TCP's ends with a handshake.)
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence

from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTAttrTuple, NFCTSocket

from vmrt.errors import NetworkError


def forget_udp(addresses: Sequence[str]) -> int:
    """Forget the UDP flows that are answered from these addresses; return how many there were. Blocks.

    Raises `NetworkError` where the kernel does not say or does not obey.
    """
    forgotten = 0
    for version, family in ((4, socket.AF_INET), (6, socket.AF_INET6)):
        wanted = [address for address in addresses if ipaddress.ip_address(address).version == version]
        if not wanted:
            continue
        try:
            with NFCTSocket(nfgen_family=family) as conntrack:
                for address in wanted:
                    for original in _answered_from(conntrack, family, address):
                        try:
                            conntrack.entry("del", tuple_orig=original)
                        except NetlinkError as e:
                            if e.code != 2:  # ENOENT: it has ended meanwhile
                                raise
                        forgotten += 1
        except (NetlinkError, OSError) as e:
            raise NetworkError(f"cannot forget the UDP flows of {', '.join(wanted)}: {e}", phase="conntrack") from e
    return forgotten


def _answered_from(conntrack: NFCTSocket, family: int, address: str) -> list[NFCTAttrTuple]:
    """Return the flows' original tuples. The kernel filters where it can (since 5.8); what it gives is looked at."""
    answer = NFCTAttrTuple(family=family, saddr=address, proto=socket.IPPROTO_UDP)
    found = []
    for entry in list(conntrack.dump(tuple_reply=answer)):
        if entry["nfgen_family"] != family:
            continue
        reply = NFCTAttrTuple.from_netlink(family, entry.get_attr("CTA_TUPLE_REPLY"))
        if reply.proto == socket.IPPROTO_UDP and ipaddress.ip_address(reply.saddr) == ipaddress.ip_address(address):
            found.append(NFCTAttrTuple.from_netlink(family, entry.get_attr("CTA_TUPLE_ORIG")))
    return found
