"""What a namespace says of itself, read from real kernels' messages: in a namespace of the test's own."""

from __future__ import annotations

import os
import socket
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmrt import interfaces, netns
from vmrt.interfaces import InterfaceState, KernelRoute

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")

COMMANDS = """
link add eth0 address 0a:00:00:00:00:01 mtu 1450 type veth peer name other0
link add net1 address 0a:00:00:00:00:11 mtu 9000 type veth peer name other1
link add br0 type bridge
link set other0 master br0
link set eth0 up
link set other0 up
link set br0 up
link set net1 up
addr add 10.0.0.2/24 dev eth0
addr add 10.0.0.3/32 peer 10.0.0.9/32 dev eth0
addr add fd00::2/64 dev eth0 nodad
addr add 10.1.0.2/24 dev net1
route add default via 10.0.0.1 dev eth0
route add 192.168.0.0/16 via 10.1.0.1 dev net1 metric 7
route add 172.16.0.0/12 nexthop via 10.0.0.1 dev eth0 nexthop via 10.1.0.1 dev net1 nexthop via 10.1.0.9 dev net1
route add 10.77.0.0/16 dev eth0 scope link src 10.0.0.2
route add blackhole 10.66.0.0/16
route add 10.55.0.0/16 dev eth0 table 77
-6 route add default via fd00::1 dev eth0
-6 route add 10.44.0.0/16 via inet6 fd00::7 dev eth0
neigh add 10.0.0.1 lladdr 0a:00:00:00:00:99 nud permanent dev eth0
neigh add fd00::1 lladdr 0a:00:00:00:00:98 nud permanent dev eth0
neigh add 10.0.0.5 lladdr 0a:00:00:00:00:97 nud reachable dev eth0
"""


@needs_root
def test_a_namespace_with_everything() -> None:
    def work() -> tuple[tuple[InterfaceState, ...], set[str] | None, set[str] | None, dict[str, interfaces.Link]]:
        before = {link.name: link for link in interfaces.links()}
        assert not before["lo"].up
        interfaces.bring_up("lo")
        for line in COMMANDS.strip().splitlines():
            words = line.replace("-6 route add 10.44", "route add 10.44").split()
            subprocess.run(["ip", *words], check=True)
        found = {link.name: link for link in interfaces.links()}
        return interfaces.read("eth0"), interfaces.addresses("eth0"), interfaces.addresses("none"), found

    states, addresses, absent, links = netns.inside(None, work)
    assert absent is None
    assert addresses is not None
    assert {"10.0.0.2", "10.0.0.3", "fd00::2"} <= addresses
    assert (links["lo"].up, links["lo"].ethernet, links["lo"].serves_a_vm) == (True, False, False)
    assert (links["br0"].kind, links["eth0"].kind, links["other0"].master) == ("bridge", "veth", True)
    own, other = states
    assert (own.name, own.mac, own.mtu) == ("eth0", "0a:00:00:00:00:01", 1450)
    assert own.addresses == ("10.0.0.2/24", "10.0.0.3/32", "fd00::2/64")
    # That of the link-local address comes when the kernel has noticed the carrier.
    assert set(own.routes) - {KernelRoute("fe80::/64", metric=256, connected=True)} == {
        KernelRoute("0.0.0.0/0", "10.0.0.1"),
        KernelRoute("10.0.0.0/24", source="10.0.0.2", scope=253, connected=True),
        KernelRoute("10.0.0.9/32", source="10.0.0.3", scope=253, connected=True),
        KernelRoute("10.77.0.0/16", source="10.0.0.2", scope=253),
        KernelRoute("172.16.0.0/12", "10.0.0.1"),
        KernelRoute("10.44.0.0/16", "fd00::7"),
        KernelRoute("fd00::/64", metric=256, connected=True),
        KernelRoute("::/0", "fd00::1", metric=1024),
    }
    assert set(own.neighbours) == {("10.0.0.1", "0a:00:00:00:00:99"), ("fd00::1", "0a:00:00:00:00:98")}
    # Neither the bridge, nor what belongs to it, nor what is down.
    assert (other.name, other.mtu, other.addresses, other.neighbours) == ("net1", 9000, ("10.1.0.2/24",), ())
    assert {route for route in other.routes if ":" not in route.destination} == {
        KernelRoute("10.1.0.0/24", source="10.1.0.2", scope=253, connected=True),
        KernelRoute("192.168.0.0/16", "10.1.0.1", metric=7),
        KernelRoute("172.16.0.0/12", "10.1.0.1"),  # the first of two ways over it
    }


@needs_root
def test_an_interface_that_is_not_there() -> None:
    with pytest.raises(OSError, match="no interface eth7"):
        netns.inside(None, lambda: interfaces.read("eth7"))
    with pytest.raises(OSError, match="No such device"):
        netns.inside(None, lambda: interfaces.bring_up("eth7"))


@given(st.binary(max_size=200))
def test_any_octets_are_taken_for_attributes(octets: bytes) -> None:
    """The kernel sends no such thing; a parser that hung on it would hang the pod's start."""
    header = (int(socket.AF_INET), 24, 0, 0, 254, 3, 0, 1, 0)
    assert sum(map(len, interfaces._parse(octets).values())) <= len(octets)
    assert list(interfaces.routes_of(header, {9: octets[:0]})) == []
