"""What plugins are asked for on a pod's behalf, with Debian's own: ports, bandwidth, ranges, MTU, one family only."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import ipaddress
import json
import os
import secrets
import socket
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTSocket

from tests.e2e.network.house import (
    DEVICE_MAC,
    House,
    a_bridge,
    a_spec,
    configure,
    output,
    plugin,
    tcp_from_host,
    udp_from_host,
)
from tests.e2e.network.tap_guest import LINE
from vmrt import netns
from vmrt.cni_args import EGRESS, INGRESS
from vmrt.model import PortMapping, Protocol
from vmrt.netbridge import NetBridge


def a_dual_bridge(house: House, **more: Any) -> dict[str, Any]:
    bridge = a_bridge(house, **more)
    third = int(house.instance[:2], 16)
    bridge["ipam"]["ranges"] = [[{"subnet": f"10.242.{third}.0/24"}], [{"subnet": f"fd00:242:{third}::/64"}]]
    bridge["ipam"]["routes"] = [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
    return bridge


PORTMAP = {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True}


async def opened(house: House) -> NetBridge:
    network = house.network()
    await network.open()
    return network


def flows_to(address: str) -> list[Any]:
    """The kernel's UDP flows that are answered from an address."""
    with NFCTSocket(nfgen_family=socket.AF_INET) as conntrack:
        entries = list(conntrack.dump())
    found = []
    for entry in entries:
        reply = entry.get_attr("CTA_TUPLE_REPLY")
        if reply.get_attr("CTA_TUPLE_PROTO").get_attr("CTA_PROTO_NUM") == socket.IPPROTO_UDP:
            found += [entry] if reply.get_attr("CTA_TUPLE_IP").get_attr("CTA_IP_V4_SRC") == address else []
    return found


async def test_host_ports_of_every_protocol_and_family(configured: House) -> None:
    configure(configured, a_dual_bridge(configured), PORTMAP)
    network = await opened(configured)
    port = 21000 + secrets.randbelow(5000)
    spec = a_spec(
        PortMapping(Protocol.TCP, 80, port), PortMapping(Protocol.UDP, 7, port), PortMapping(Protocol.SCTP, 80, port)
    )
    sandbox, pod, _ = await configured.pod(network, spec)
    third = int(configured.instance[:2], 16)
    for ip in pod.ips:  # until the bridge's IPv6 address is no longer tentative
        await asyncio.to_thread(udp_from_host, ip, b"warm up")
    for gateway in (f"10.242.{third}.1", f"fd00:242:{third}::1"):
        assert await asyncio.to_thread(tcp_from_host, gateway, port) == LINE
    assert await asyncio.to_thread(tcp_from_host, "127.0.0.1", port) == LINE
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        # A client that never rests: its flow would live on with the socket.
        client.settimeout(20)
        client.connect((f"10.242.{third}.1", port))
        await asyncio.to_thread(client.send, b"over udp")
        assert await asyncio.to_thread(client.recv, 100) == b"over udp"
        assert await asyncio.to_thread(flows_to, pod.ips[0])
        for tool in ("iptables-save", "ip6tables-save"):
            assert f"-p sctp -m sctp --dport {port}" in output(tool, "-t", "nat")
        await network.teardown(sandbox)
        assert not await asyncio.to_thread(flows_to, pod.ips[0])
    assert configured.leftovers() == []
    with pytest.raises(ConnectionRefusedError):
        await asyncio.to_thread(tcp_from_host, "127.0.0.1", port)


async def test_bandwidth_is_limited_by_annotations(configured: House) -> None:
    configure(configured, a_bridge(configured), {"type": "bandwidth", "capabilities": {"bandwidth": True}})
    network = await opened(configured)
    spec = replace(a_spec(), annotations={INGRESS: "10M", EGRESS: "20M"})
    sandbox, pod, _ = await configured.pod(network, spec)
    limits = output("tc", "qdisc", "show")
    assert "tbf" in limits
    assert "rate 10Mbit" in limits
    assert "rate 20Mbit" in limits
    assert await asyncio.to_thread(udp_from_host, pod.ips[0], b"slow") == b"slow"
    await network.teardown(sandbox)
    assert configured.leftovers() == []
    assert "rate 20Mbit" not in output("tc", "qdisc", "show")
    # The plugin's own devices, which egress goes through.
    assert " bwp" not in output("ip", "-o", "link")


async def test_addresses_come_from_the_nodes_pod_ranges(configured: House) -> None:
    bridge = a_bridge(configured, capabilities={"ipRanges": True})
    del bridge["ipam"]["ranges"]
    configure(configured, bridge)
    third = int(configured.instance[:2], 16)
    await (await opened(configured)).set_pod_ranges((f"10.243.{third}.0/26", f"fd00:243:{third}::/64"))
    # As after a restart: kubelet tells a range once.
    network = await opened(configured)
    sandbox, pod, _ = await configured.pod(network)
    networks = [ipaddress.ip_network(f"10.243.{third}.0/26"), ipaddress.ip_network(f"fd00:243:{third}::/64")]
    assert all(ipaddress.ip_address(ip) in network for ip, network in zip(pod.ips, networks, strict=True))
    await network.teardown(sandbox)
    assert configured.leftovers() == []


async def test_ipv6_alone(configured: House) -> None:
    third = int(configured.instance[:2], 16)
    bridge = a_bridge(configured)
    bridge["ipam"] |= {"ranges": [[{"subnet": f"fd00:242:{third}::/64"}]], "routes": [{"dst": "::/0"}]}
    configure(configured, bridge, PORTMAP)
    network = await opened(configured)
    first, first_pod, guest = await configured.pod(network)
    second, second_pod, _ = await configured.pod(network)
    assert [ipaddress.ip_address(ip).version for ip in first_pod.ips] == [6]
    assert [route.destination for route in first_pod.routes if not route.gateway.startswith("fe80")] == ["::/0"]
    assert await asyncio.to_thread(udp_from_host, first_pod.ips[0], b"six") == b"six"
    assert await asyncio.to_thread(guest.ask, second_pod.ips[0], b"six to six") == b"six to six"
    for sandbox in (first, second):
        await network.teardown(sandbox)
    assert configured.leftovers() == []


async def test_jumbo_frames(configured: House) -> None:
    configure(configured, a_dual_bridge(configured, mtu=9000))
    network = await opened(configured)
    first, first_pod, guest = await configured.pod(network)
    second, second_pod, _ = await configured.pod(network)
    assert first_pod.interfaces[0].mtu == 9000
    big = secrets.token_bytes(8900)
    for ip in second_pod.ips:
        assert await asyncio.to_thread(guest.ask, ip, big) == big
    for sandbox in (first, second):
        await network.teardown(sandbox)
    assert configured.leftovers() == []


async def test_macvlan_and_tuning(configured: House) -> None:
    third = int(configured.instance[:2], 16)
    master = f"vm{configured.instance[:8]}"
    output("ip", "link", "add", master, "type", "veth", "peer", "name", f"{master}p")
    try:
        for name in (master, f"{master}p"):
            output("ip", "link", "set", name, "up")
        output("ip", "addr", "add", f"10.244.{third}.1/24", "dev", f"{master}p")
        ipam = a_bridge(configured)["ipam"] | {"ranges": [[{"subnet": f"10.244.{third}.0/24"}]]}
        macvlan = {"type": "macvlan", "master": master, "mode": "bridge", "ipam": ipam}
        configure(configured, macvlan, {"type": "tuning", "mac": "02:00:00:00:24:40", "mtu": 1300})
        network = await opened(configured)
        sandbox, pod, _ = await configured.pod(network)
        assert (pod.interfaces[0].mac, pod.interfaces[0].mtu) == ("02:00:00:00:24:40", 1300)
        assert await asyncio.to_thread(udp_from_host, pod.ips[0], b"macvlan") == b"macvlan"
        await network.check(sandbox)
        await network.teardown(sandbox)
        assert configured.leftovers() == []
    finally:
        output("ip", "link", "delete", master)


async def test_gc_names_the_pods_that_are_there(configured: House) -> None:
    kind = plugin(configured, "collector")
    script = configured.root / "bin/collector"
    told = configured.root / "gc.json"
    script.write_text(
        script.read_text()
        + "elif os.environ['CNI_COMMAND'] == 'GC':\n"
        + f"    pathlib.Path({str(told)!r}).write_text(json.dumps(config))\n"
    )
    configure(configured, a_bridge(configured, ipMasq=False), kind, version="1.0.0")
    network = await opened(configured)
    sandbox, _, _ = await configured.pod(network)
    path = configure(configured, kind, version="1.1.0")
    await opened(configured)
    assert not told.exists(), "GC frees other runtimes' pods, so it has to be asked for"
    configured.config = replace(configured.config, cni_gc=True)
    network = await opened(configured)
    config = json.loads(told.read_text())
    assert config["cni.dev/valid-attachments"] == [{"containerID": sandbox, "ifname": "eth0"}]
    assert config["name"] == configured.bridge
    assert Path(path).exists()
    await network.teardown(sandbox)
    assert configured.leftovers() == []


def a_queue(tap: str, flags: int) -> int:
    """Open a tap as QEMU does."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        wanted = netns.IFF_TAP | netns.IFF_NO_PI | netns.IFF_VNET_HDR | flags
        fcntl.ioctl(fd, netns.TUNSETIFF, struct.pack("16sH22x", tap.encode(), wanted))
    except OSError:
        os.close(fd)
        raise
    return fd


async def test_a_tap_for_several_queues_is_opened_by_as_many(house: House) -> None:
    network = NetBridge(house.config, house.root, house.instance, tap_queues=2)
    await network.open()
    name = f"vt{secrets.token_hex(4)}"
    await network.create_tap(name)
    with contextlib.ExitStack() as opened_files:
        try:
            for flags in (netns.IFF_MULTI_QUEUE, netns.IFF_MULTI_QUEUE, 0):
                with contextlib.nullcontext() if flags else pytest.raises(OSError):
                    opened_files.callback(os.close, a_queue(name, flags))
            # Both stay open when the tap moves, as a VM's do.
            sandbox = house.sandbox()
            pod = await network.setup(sandbox, a_spec(), device_mac=DEVICE_MAC)
            await network.join(sandbox, name)
            shown = output("nsenter", f"--net={pod.netns}", "ip", "-d", "link", "show", name)
            assert "multi_queue" in shown
            assert "numqueues 2" in shown or "numtxqueues" in shown
        finally:
            opened_files.close()
            await network.teardown(sandbox)
    assert house.leftovers() == []
