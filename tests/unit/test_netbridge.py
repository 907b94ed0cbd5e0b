"""What a guest is told of its network, how tap and interface are joined, and the built-in network's choices."""

from __future__ import annotations

import asyncio
import ipaddress
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmrt import cni, netbridge, netns
from vmrt.config import NetworkConfig
from vmrt.errors import NetworkError
from vmrt.fallback_network import (
    NatSupport,
    choose_block,
    clashes,
    drops_forwarded,
    fallback_conflist,
    nat_limits,
    network_name,
)
from vmrt.interfaces import InterfaceState, KernelRoute
from vmrt.model import GuestNeighbour, GuestRoute
from vmrt.netbridge import NetBridge, guest_addresses, guest_routes, masqueraded, pod_network
from vmrt.netns import Joint, in_thread, redirect_plan, to_the_end

CONNECTED = KernelRoute("10.0.0.0/24", source="10.0.0.2", scope=253, connected=True)
DEFAULT = KernelRoute("0.0.0.0/0", "10.0.0.1")


# --- routes and addresses ---------------------------------------------------------------------------------------------


def test_connected_routes_are_left_to_the_guest() -> None:
    assert guest_routes([DEFAULT, CONNECTED]) == (GuestRoute("0.0.0.0/0", "10.0.0.1", "eth0"),)
    assert guest_addresses(["10.0.0.2/24"], [DEFAULT, CONNECTED]) == ("10.0.0.2/24",)


def test_point_to_point_gateway_comes_first() -> None:
    routes = [
        KernelRoute("0.0.0.0/0", "169.254.1.1"),
        KernelRoute("10.0.0.0/24", "169.254.1.1", source="10.0.0.2"),
        KernelRoute("169.254.1.1/32", scope=253),
    ]
    assert guest_routes(routes) == (
        GuestRoute("169.254.1.1/32", "", "eth0", scope=253),
        GuestRoute("10.0.0.0/24", "169.254.1.1", "eth0", source="10.0.0.2"),
        GuestRoute("0.0.0.0/0", "169.254.1.1", "eth0"),
    )
    assert guest_addresses(["10.0.0.2/24", "fd00::2/64"], routes) == ("10.0.0.2/32", "fd00::2/128")


def test_on_link_gateways_get_a_route_of_their_own() -> None:
    routes = [KernelRoute("0.0.0.0/0", "10.9.9.9"), KernelRoute("::/0", "fd00::1"), CONNECTED]
    assert guest_routes(routes)[:2] == (
        GuestRoute("10.9.9.9/32", "", "eth0", scope=253),
        GuestRoute("fd00::1/128", "", "eth0"),
    )


def test_link_local_gateway_is_always_reachable() -> None:
    assert guest_routes([KernelRoute("::/0", "fe80::1", metric=1024)]) == (
        GuestRoute("::/0", "fe80::1", "eth0", metric=1024),
    )


ADDRESSES = st.ip_addresses(v=4)


@given(st.lists(st.builds(lambda a, p, g: (a, p, g), ADDRESSES, st.integers(0, 32), st.none() | ADDRESSES)))
def test_every_gateway_is_reachable_when_its_route_is_added(
    drawn: list[tuple[ipaddress.IPv4Address, int, ipaddress.IPv4Address | None]],
) -> None:
    routes = [
        KernelRoute(str(ipaddress.ip_network(f"{address}/{prefix}", strict=False)), str(gateway or ""))
        for address, prefix, gateway in drawn
    ]
    so_far: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
    for route in guest_routes(routes):
        if route.gateway:
            assert any(ipaddress.ip_address(route.gateway) in network for network in so_far)
        else:
            so_far.append(ipaddress.ip_network(route.destination))


def test_pod_network_joins_result_and_kernel() -> None:
    result = cni.Result(("10.0.0.3/24", "10.0.0.2/24", "fd00::2/64"), (), None)
    state = InterfaceState(
        "eth0",
        "0a:00:00:00:00:01",
        1450,
        ("10.0.0.2/24", "10.0.0.3/24", "fd00::9/64", "fd00::2/64"),
        (CONNECTED, DEFAULT, KernelRoute("fd00::/64", connected=True, metric=256)),
        (("10.0.0.1", "0a:00:00:00:00:02"),),
    )
    pod = pod_network(Path("/n"), result, [state], "02:00:00:00:00:09")
    assert pod.ips == ("10.0.0.3", "10.0.0.2", "fd00::2", "fd00::9")
    (interface,) = pod.interfaces
    assert (interface.device_mac, interface.mac, interface.mtu) == ("02:00:00:00:00:09", "0a:00:00:00:00:01", 1450)
    assert interface.addresses == ("10.0.0.3/24", "10.0.0.2/24", "fd00::2/64", "fd00::9/64")
    assert pod.routes == (GuestRoute("0.0.0.0/0", "10.0.0.1", "eth0"),)
    assert pod.neighbours[0].mac == "0a:00:00:00:00:02"


def test_a_pod_with_several_interfaces() -> None:
    own = InterfaceState("eth0", "0a:00:00:00:00:01", 1500, ("10.0.0.2/24",), (CONNECTED, DEFAULT), ())
    other = InterfaceState(
        "net1",
        "0a:00:00:00:00:11",
        9000,
        ("10.1.0.2/24", "fd01::2/64"),
        (
            KernelRoute("10.1.0.0/24", connected=True),
            KernelRoute("fd01::/64", connected=True, metric=256),
            KernelRoute("192.168.0.0/16", "10.1.0.1"),
            DEFAULT,  # one of two ways of the same route: the guest's kernel takes a destination once
            KernelRoute("0.0.0.0/0", "10.1.0.1", metric=100),
        ),
        (("10.1.0.9", "0a:00:00:00:00:19"),),
    )
    bare = InterfaceState("net2", "0a:00:00:00:00:21", 1500, (), (), ())
    pod = pod_network(Path("/n"), cni.Result(("10.0.0.2/24",), (), None), [own, other, bare], "02:00:00:00:00:09")
    assert pod.ips == ("10.0.0.2",)
    # The later ones are found by their own addresses: they are plugged when those are known.
    assert [(i.name, i.device_mac, i.mac, i.mtu, i.addresses) for i in pod.interfaces] == [
        ("eth0", "02:00:00:00:00:09", "0a:00:00:00:00:01", 1500, ("10.0.0.2/24",)),
        ("net1", "0a:00:00:00:00:11", "0a:00:00:00:00:11", 9000, ("10.1.0.2/24", "fd01::2/64")),
        ("net2", "0a:00:00:00:00:21", "0a:00:00:00:00:21", 1500, ()),
    ]
    assert pod.routes == (
        GuestRoute("0.0.0.0/0", "10.0.0.1", "eth0"),
        GuestRoute("192.168.0.0/16", "10.1.0.1", "net1"),
        GuestRoute("0.0.0.0/0", "10.1.0.1", "net1", metric=100),
    )
    assert pod.neighbours == (GuestNeighbour("10.1.0.9", "0a:00:00:00:00:19", "net1"),)


def test_result_stands_in_where_the_kernel_has_no_routes() -> None:
    result = cni.Result(("10.0.0.2/24",), (cni.ResultRoute("0.0.0.0/0", "10.0.0.1", 7),), None)
    state = InterfaceState("eth0", "0a:00:00:00:00:01", 1500, (), (), ())
    pod = pod_network(Path("/n"), result, [state], "")
    assert pod.interfaces[0].addresses == ("10.0.0.2/24",)
    assert GuestRoute("0.0.0.0/0", "10.0.0.1", "eth0", metric=7) in pod.routes


def test_pod_without_an_address_is_refused() -> None:
    with pytest.raises(NetworkError, match="no address"):
        pod_network(Path("/n"), cni.Result((), (), None), [InterfaceState("eth0", "", 1500, (), (), ())], "")


def test_only_masquerading_chains_need_their_addresses_back() -> None:
    result = {"ips": [{"address": "10.0.0.2/24"}]}
    for masquerades, expected in ((True, ("10.0.0.2/24",)), (False, ())):
        conflist = cni.ConfList("n", "1.0.0", ({"type": "ptp", "ipMasq": masquerades}, {"type": "x"}), "f")
        assert masqueraded(cni.Attachment("i", "", "eth0", "", {}, conflist, (), result)) == expected
        assert masqueraded(cni.Attachment("i", "", "eth0", "", {}, conflist, (), None)) == ()


# --- joining ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("joint", [Joint.MATCHALL, Joint.U32])
def test_redirect_goes_both_ways(joint: Joint) -> None:
    plan = redirect_plan(joint, 3, 9)
    assert [(step["command"], step["index"]) for step in plan] == [
        ("add", 3),
        ("add-filter", 3),
        ("add", 9),
        ("add-filter", 9),
    ]
    filters = [step for step in plan if step["command"] == "add-filter"]
    assert [step["action"][0]["ifindex"] for step in filters] == [9, 3]
    assert {step["kind"] for step in filters} == {"matchall" if joint is Joint.MATCHALL else "u32"}
    assert all(step["action"][0]["action"] == "redirect" and step["protocol"] == 3 for step in filters)


# --- the built-in network ---------------------------------------------------------------------------------------------


@given(st.text(min_size=1), st.text(min_size=1))
def test_network_names_are_short_and_distinct(one: str, other: str) -> None:
    assert len(network_name(one)) <= netns.IFNAMSIZ
    assert (network_name(one) == network_name(other)) == (one == other)


def test_network_name_keeps_a_short_instance_readable() -> None:
    assert network_name("a1b2c3d4") == "vmrt-a1b2c3d4"


@given(st.integers(0, 2**32), st.sets(st.integers(0, 63)))
def test_block_is_in_the_pool_and_free(start: int, taken: set[int]) -> None:
    used = [ipaddress.ip_network((0x0AF10000 + number * 1024, 24)) for number in taken]
    pool = ipaddress.ip_network("10.241.0.0/16")
    if len(taken) == 64:
        with pytest.raises(NetworkError, match="overlaps"):
            choose_block(str(pool), used, start)
        return
    block = choose_block(str(pool), used, start)
    assert isinstance(block, ipaddress.IPv4Network) and isinstance(pool, ipaddress.IPv4Network)
    assert block.subnet_of(pool) and block.prefixlen == 22 and not clashes(block, used)


def test_small_pools_are_taken_whole_and_wider_routes_do_not_count() -> None:
    lan = ipaddress.ip_network("10.0.0.0/8")
    assert str(choose_block("10.50.0.0/24", [lan], 7)) == "10.50.0.0/24"
    assert str(choose_block("fd00::/48", [lan], 3)) == "fd00:0:0:3::/64"
    assert str(choose_block("fd00::/80", [], 3)) == "fd00::/80"
    with pytest.raises(NetworkError, match="overlaps"):
        choose_block("10.50.0.0/24", [ipaddress.ip_network("10.50.0.128/25")], 0)
    with pytest.raises(NetworkError, match="fallback_subnet"):
        choose_block("10.50.0.1/24", [], 0)


def test_built_in_configuration() -> None:
    conflist = fallback_conflist(
        "vmrt-x", ["10.241.4.0/22", "fd00:1::/64"], Path("/r/ipam"), masquerade=True, port_mapping=True
    )
    assert conflist.types == ("bridge", "host-local", "portmap")
    assert cni.offers(conflist, "portMappings")
    ipam = conflist.plugins[0]["ipam"]
    assert ipam["ranges"] == [[{"subnet": "10.241.4.0/22"}], [{"subnet": "fd00:1::/64"}]]
    assert ipam["routes"] == [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
    walled = fallback_conflist(
        "vmrt-x", ["10.0.0.0/24"], Path("/r"), masquerade=True, port_mapping=True, forward_rules=True
    )
    assert walled.types == ("bridge", "host-local", "firewall", "portmap")
    bare = fallback_conflist("vmrt-x", ["10.0.0.0/24"], Path("/r"), masquerade=False, port_mapping=False)
    assert bare.types == ("bridge", "host-local") and bare.plugins[0]["ipMasq"] is False


@pytest.mark.parametrize(
    ("rules", "drops"),
    [
        (b"*filter\n:INPUT DROP [0:0]\n:FORWARD ACCEPT [0:0]\nCOMMIT\n", False),
        (b"*filter\n:INPUT ACCEPT [0:0]\n:FORWARD DROP [7:420]\nCOMMIT\n", True),
        (b"", False),
    ],
)
def test_forward_policy_is_read(rules: bytes, drops: bool) -> None:
    assert drops_forwarded(rules) is drops


def test_limits_say_what_is_lost() -> None:
    text = nat_limits(NatSupport(True, False, "iptables-restore: no multiport"))
    assert "host ports" in text and "beyond" not in text and "no multiport" in text
    assert "beyond" in nat_limits(NatSupport(False, False, "x"))


# --- cancellation -----------------------------------------------------------------------------------------------------


async def test_work_in_a_thread_ends_before_the_cancellation_goes_on() -> None:
    ended: list[bool] = []

    def work() -> None:
        time.sleep(0.05)
        ended.append(True)

    task = asyncio.create_task(in_thread(work))
    await asyncio.sleep(0)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == [True]


async def test_results_and_errors_pass_through() -> None:
    assert await in_thread(int, "7") == 7
    with pytest.raises(ValueError, match="invalid"):
        await in_thread(int, "x")


async def test_failure_under_cancellation_is_the_cancellations_cause() -> None:
    started = asyncio.Event()

    async def fails() -> None:
        started.set()
        await asyncio.sleep(0.01)
        raise NetworkError("late")

    task = asyncio.create_task(to_the_end(fails()))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert isinstance(caught.value.__cause__, NetworkError)


# --- the node's pod ranges, and UDP -----------------------------------------------------------------------------------


async def test_pod_ranges_outlive_the_daemon(tmp_path: Path) -> None:
    ranges = ("10.0.3.0/24", "fd00:3::/64")
    await NetBridge(NetworkConfig(), tmp_path, "x").set_pod_ranges(ranges)
    assert netbridge.read_pod_ranges(tmp_path / "pod-ranges.json") == ranges
    before = (tmp_path / "pod-ranges.json").stat().st_ino
    await NetBridge(NetworkConfig(), tmp_path, "x").set_pod_ranges(ranges)
    assert (tmp_path / "pod-ranges.json").stat().st_ino == before, "written anew without a change"


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"ranges": 1}', b"\xff"])
def test_damaged_pod_ranges_are_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ranges").write_bytes(content)
    assert netbridge.read_pod_ranges(tmp_path / "ranges") == ()
    assert netbridge.read_pod_ranges(tmp_path / "absent") == ()


def test_only_published_udp_has_flows_to_forget() -> None:
    conflist = cni.ConfList("net", "1.0.0", ({"type": "bridge"},), "x")
    mapping = {"hostPort": 5353, "containerPort": 53, "protocol": "udp", "hostIP": ""}
    result = {"ips": [{"address": "10.0.0.2/24"}, {"address": "fd00::2/64"}]}
    attachment = cni.Attachment("id", "/n", "eth0", "", {"portMappings": [mapping]}, conflist, (), result)
    assert netbridge.udp_published(attachment) == ("10.0.0.2", "fd00::2")
    assert netbridge.udp_published(replace(attachment, result=None)) == ()
    tcp = {"portMappings": [{**mapping, "protocol": "tcp"}]}
    assert netbridge.udp_published(replace(attachment, capability_args=tcp)) == ()
    assert netbridge.udp_published(replace(attachment, capability_args={})) == ()
