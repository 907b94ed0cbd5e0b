"""Pods' networks with the real CNI plugins and the real kernel; the guest is a tap that the test holds (`TapGuest`)."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import secrets
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.network.house import (
    DEVICE_MAC,
    FALLBACK,
    House,
    a_bridge,
    a_spec,
    configure,
    housed,
    output,
    plugin,
    tcp_from_host,
    udp_from_host,
)
from tests.e2e.network.tap_guest import LINE
from vmrt import netns
from vmrt.errors import NetworkError
from vmrt.model import PortMapping, Protocol
from vmrt.netbridge import IFNAME, NOT_READY, NetBridge

# --- the built-in network ---------------------------------------------------------------------------------------------


async def test_two_pods_and_the_host_reach_each_other(house: House, network: NetBridge) -> None:
    ready, reason, _ = await network.status()
    assert (ready, reason) == (True, "")
    first, first_pod, first_guest = await house.pod(network)
    second, second_pod, second_guest = await house.pod(network)
    assert sorted(network.list()) == sorted([first, second])
    assert [ipaddress.ip_address(ip).version for ip in first_pod.ips] == [4, 6]
    assert sorted(house.leases()) == sorted(first_pod.ips + second_pod.ips)
    for pod in (first_pod, second_pod):
        for ip in pod.ips:
            assert await asyncio.to_thread(udp_from_host, ip, b"host to guest") == b"host to guest"
    for ip in second_pod.ips:
        assert await asyncio.to_thread(first_guest.ask, ip, b"guest to guest") == b"guest to guest"
    big = secrets.token_bytes(1400)
    assert await asyncio.to_thread(second_guest.ask, first_pod.ips[0], big) == big

    await network.teardown(first)
    assert sorted(house.leases()) == sorted(second_pod.ips)
    assert await asyncio.to_thread(udp_from_host, second_pod.ips[0], b"still there") == b"still there"
    await network.teardown(second)
    await network.teardown(second)
    assert house.leftovers() == []
    assert network.list() == []
    await network.close()
    assert house.bridge not in output("ip", "-o", "link")


async def test_host_stack_in_the_netns_keeps_out_of_the_guests_connections(house: House, network: NetBridge) -> None:
    sandbox, pod, guest = await house.pod(network)
    # Nothing listens in the netns: had its stack seen the segments, it would have reset the connection.
    for ip in pod.ips:
        await asyncio.to_thread(udp_from_host, ip, b"warm up")
        assert await asyncio.to_thread(tcp_from_host, ip, 8080) == LINE
    # With the guest silent nobody answers ARP, so the host finds no way (and is not refused).
    guest.silent = True
    output("ip", "neigh", "flush", "to", pod.ips[0])
    with pytest.raises(OSError) as caught:
        await asyncio.to_thread(tcp_from_host, pod.ips[0], 8080)
    assert not isinstance(caught.value, ConnectionRefusedError | ConnectionResetError)
    assert f"arp 1 for {pod.ips[0]}" in guest.seen
    await network.teardown(sandbox)


async def test_host_port_leads_into_the_guest(house: House, network: NetBridge) -> None:
    host_port = 20000 + secrets.randbelow(10000)
    spec = a_spec(PortMapping(Protocol.TCP, 80, host_port), PortMapping(Protocol.TCP, 81))
    sandbox, pod, guest = await house.pod(network, spec)
    gateway = next(route.gateway for route in pod.routes if route.destination == "0.0.0.0/0")
    for host_address in (gateway, "127.0.0.1"):
        assert await asyncio.to_thread(tcp_from_host, host_address, host_port) == LINE
    assert any(" to 80 " in event for event in guest.seen)
    await network.teardown(sandbox)
    assert house.leftovers() == []
    with pytest.raises(ConnectionRefusedError):
        await asyncio.to_thread(tcp_from_host, "127.0.0.1", host_port)


async def test_bridge_joins_where_tc_cannot(house: House, network: NetBridge) -> None:
    first, first_pod, first_guest = await house.pod(network)
    sandbox = house.sandbox()
    guest = await house.guest(network)
    pod = await network.setup(sandbox, a_spec(), device_mac=DEVICE_MAC)
    guest.configure(pod)
    joint = await netns.in_thread(netns.join, pod.netns, IFNAME, guest.name, netns.Joint.BRIDGE)
    assert joint is netns.Joint.BRIDGE
    for ip in pod.ips:
        assert await asyncio.to_thread(udp_from_host, ip, b"host") == b"host"
        assert await asyncio.to_thread(tcp_from_host, ip, 8080) == LINE
    assert await asyncio.to_thread(first_guest.ask, pod.ips[0], b"guest") == b"guest"
    assert await asyncio.to_thread(guest.ask, first_pod.ips[0], b"tseug") == b"tseug"
    for each in (first, sandbox):
        await network.teardown(each)
    assert house.leftovers() == []


async def test_joining_twice_is_no_error(house: House, network: NetBridge) -> None:
    sandbox, pod, guest = await house.pod(network)
    await house.network().join(sandbox, guest.name)
    assert await asyncio.to_thread(udp_from_host, pod.ips[0], b"again") == b"again"
    await network.teardown(sandbox)


async def test_two_daemons_take_different_subnets(house: House, network: NetBridge, tmp_path: Path) -> None:
    # The same first choice for both, so that the second really has to give way.
    tight = replace(FALLBACK, fallback_subnet="10.243.0.0/21", fallback_subnet_v6="")
    names = [secrets.token_hex(4) for _ in range(2)]
    with contextlib.ExitStack() as stack:
        pods = []
        for name in names:
            other = stack.enter_context(housed(House(tmp_path / name, name, tight, f"vmrt-{name}")))
            other.root.mkdir()
            driver = other.network()
            await driver.open()
            pods.append((driver, other, *await other.pod(driver)))
        networks = {ipaddress.ip_interface(pod.interfaces[0].addresses[0]).network for _, _, _, pod, _ in pods}
        assert len(networks) == 2
        for driver, other, sandbox, pod, _ in pods:
            assert (
                await asyncio.to_thread(udp_from_host, pod.ips[0], other.instance.encode()) == other.instance.encode()
            )
            await driver.teardown(sandbox)
            await driver.close()
            assert other.leftovers() == []


# --- other networks ---------------------------------------------------------------------------------------------------


async def test_point_to_point_network(configured: House) -> None:
    ptp = {**a_bridge(configured), "type": "ptp"}
    configure(configured, ptp, version="0.3.1")
    network = configured.network()
    await network.open()
    sandbox, pod, guest = await configured.pod(network)
    # The plugin took the connected route away: everything goes through the gateway.
    assert pod.interfaces[0].addresses == (f"{pod.ips[0]}/32",)
    gateway = next(route.gateway for route in pod.routes if route.destination == "0.0.0.0/0")
    assert (pod.routes[0].destination, pod.routes[0].gateway, pod.routes[0].scope) == (f"{gateway}/32", "", 253)
    assert await asyncio.to_thread(udp_from_host, pod.ips[0], b"ptp") == b"ptp"
    assert await asyncio.to_thread(tcp_from_host, pod.ips[0], 80) == LINE
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((gateway, 0))
        answer = asyncio.create_task(asyncio.to_thread(echo_once, server))
        assert (
            await asyncio.to_thread(guest.ask, gateway, b"to the host", port=server.getsockname()[1]) == b"to the host"
        )
        await answer
    await network.teardown(sandbox)
    assert configured.leftovers() == []


def echo_once(server: socket.socket) -> None:
    data, peer = server.recvfrom(2000)
    server.sendto(data, peer)


async def test_neighbours_mtu_dns_and_routes_reach_the_guest(configured: House) -> None:
    bridge = a_bridge(configured, mtu=1400, dns={"nameservers": ["192.0.2.53"], "search": ["test"]})
    third = int(configured.instance[:2], 16)
    bridge["ipam"]["routes"].append({"dst": "192.0.2.0/24", "gw": f"10.242.{third}.9"})
    # A chained plugin as some clouds have it: a fixed neighbour, made in the pod's namespace.
    neighbour = (
        "import subprocess; subprocess.run(['nsenter', '--net=' + os.environ['CNI_NETNS'], 'ip', 'neigh', 'add', "
        f"'10.242.{third}.9', 'lladdr', '02:11:22:33:44:55', 'dev', 'eth0', 'nud', 'permanent'], check=True); "
        "print(json.dumps(prev))"
    )
    configure(configured, bridge, plugin(configured, "cloud", add=neighbour), version="0.4.0")
    network = configured.network()
    await network.open()
    sandbox, pod, _ = await configured.pod(network)
    assert pod.interfaces[0].mtu == 1400
    assert [(n.address, n.mac) for n in pod.neighbours] == [(f"10.242.{third}.9", "02:11:22:33:44:55")]
    assert pod.dns is not None and pod.dns.servers == ("192.0.2.53",) and pod.dns.searches == ("test",)
    assert [route.destination for route in pod.routes] == ["192.0.2.0/24", "0.0.0.0/0"]
    await network.check(sandbox)
    await network.teardown(sandbox)
    assert configured.leftovers() == []


async def test_chain_with_firewall_and_host_port(configured: House) -> None:
    # The chain that the built-in network uses where the host's policy is to drop what is forwarded.
    portmap = {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True}
    configure(configured, a_bridge(configured), {"type": "firewall", "backend": "iptables"}, portmap)
    network = configured.network()
    await network.open()
    host_port = 30000 + secrets.randbelow(2000)
    sandbox, pod, _ = await configured.pod(network, a_spec(PortMapping(Protocol.TCP, 80, host_port)))
    assert f"-A CNI-FORWARD -s {pod.ips[0]}/32 -j ACCEPT" in output("iptables-save", "-t", "filter")
    assert await asyncio.to_thread(tcp_from_host, "127.0.0.1", host_port) == LINE
    await network.teardown(sandbox)
    assert configured.leftovers() == []
    assert f" {pod.ips[0]}/32 " not in output("iptables-save", "-t", "filter")


async def test_configuration_is_read_anew_and_says_what_is_wrong(configured: House) -> None:
    network = configured.network()
    await network.open()
    ready, reason, message = await network.status()
    assert (ready, reason) == (False, NOT_READY) and "no configuration" in message
    (configured.config.cni_config_dir / "05-broken.conflist").write_text("{")
    assert "05-broken.conflist" in (await network.status())[2]
    configure(configured, a_bridge(configured))
    ready, _, message = await network.status()
    assert ready and "10-test.conflist" in message


async def test_plugin_can_say_that_it_is_not_ready(configured: House) -> None:
    agent = configured.root / "agent-runs"
    unready = plugin(configured, "daemonset")
    script = configured.root / "bin/daemonset"
    script.write_text(
        script.read_text()
        + "elif os.environ['CNI_COMMAND'] == 'STATUS':\n"
        + f"    pathlib.Path({str(agent)!r}).exists() or sys.exit('agent down')\n"
    )
    configure(configured, unready, version="1.1.0")
    network = configured.network()
    await network.open()
    ready, reason, message = await network.status()
    assert (ready, reason) == (False, NOT_READY) and "agent down" in message
    agent.touch()
    assert (await configured.network().status())[0]


async def test_foreign_names_are_refused(network: NetBridge) -> None:
    bad: list[Callable[[], Any]] = [
        lambda: network.setup("../../etc", a_spec(), device_mac=DEVICE_MAC),
        lambda: network.teardown("a/b"),
        lambda: network.create_tap("name-that-is-too-long"),
        lambda: network.create_tap("lo"),
        lambda: network.join("unknown", "nonexistent0"),
        lambda: network.setup("abc", replace(a_spec(), name="x;K8S_POD_UID=y"), device_mac=DEVICE_MAC),
    ]
    for call in bad:
        with pytest.raises(NetworkError):
            await call()
    await network.delete_taps(["lo"])
    assert Path("/sys/class/net/lo").exists()
