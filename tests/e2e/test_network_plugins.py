"""Pods' networks with the real CNI plugins and the real kernel; the guest is a tap that the test holds (`TapGuest`)."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import os
import secrets
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.tap_guest import LINE, TapGuest
from vmrt import netns
from vmrt.config import NetworkConfig
from vmrt.errors import NetworkError
from vmrt.model import PodNetwork, PortMapping, Protocol, SandboxSpec
from vmrt.netbridge import IFNAME, NOT_READY, NetBridge

DEVICE_MAC = "02:00:00:00:00:01"
FALLBACK = NetworkConfig(cni_config_dir=Path("/nonexistent"), fallback_subnet_v6="fd00:241::/48")


def output(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def off_the_loop(work: Callable[..., None], *args: str) -> None:
    netns.inside(Path("/proc/self/ns/net"), lambda: work(*args))


@dataclass
class House:
    """A daemon's root, its network, and what it must not leave behind."""

    root: Path
    instance: str
    config: NetworkConfig
    bridge: str
    sandboxes: list[str] = field(default_factory=list)
    guests: list[TapGuest] = field(default_factory=list)

    def network(self) -> NetBridge:
        """A new driver on this root, as after a restart of the daemon."""
        return NetBridge(self.config, self.root, self.instance)

    def sandbox(self) -> str:
        self.sandboxes.append(secrets.token_hex(32))
        return self.sandboxes[-1]

    async def guest(self, network: NetBridge) -> TapGuest:
        name = f"vt{secrets.token_hex(4)}"
        await network.create_tap(name)
        self.guests.append(TapGuest(name))
        return self.guests[-1]

    async def pod(self, network: NetBridge, spec: SandboxSpec | None = None) -> tuple[str, PodNetwork, TapGuest]:
        sandbox = self.sandbox()
        guest = await self.guest(network)
        pod = await network.setup(sandbox, spec or a_spec(), device_mac=DEVICE_MAC)
        guest.configure(pod)
        await network.join(sandbox, guest.name)
        return sandbox, pod, guest

    def leases(self) -> list[str]:
        """Addresses that host-local holds: one file each, named after the address."""
        names = [path.name for path in self.root.glob("cni/ipam/*/*")]
        return [name for name in names if name != "lock" and not name.startswith("last_reserved_ip")]

    def leftovers(self) -> list[str]:
        """What still belongs to our sandboxes anywhere on the host."""
        found = [f"lease {lease}" for lease in self.leases()]
        found += [f"file {path}" for name in ("netns/*", "cni/*.json", "cni/.*") for path in self.root.glob(name)]
        found += [
            f"mount {line}" for line in Path("/proc/self/mounts").read_text().splitlines() if str(self.root) in line
        ]
        for tool in ("iptables-save", "ip6tables-save"):
            found += [rule for rule in output(tool).splitlines() if any(sandbox in rule for sandbox in self.sandboxes)]
        return found + [f"port {port}" for port in Path(f"/sys/class/net/{self.bridge}/brif").glob("*")]


def a_spec(*ports: PortMapping) -> SandboxSpec:
    return SandboxSpec("web-0", "6f1c-uid", "default", port_mappings=ports)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """A daemon with the built-in network."""
    if os.geteuid() != 0:
        pytest.fail("network tests need root")
    instance = secrets.token_hex(4)
    with housed(House(tmp_path, instance, FALLBACK, f"vmrt-{instance}")) as house:
        yield house


@pytest.fixture
def configured(tmp_path: Path, house: House) -> House:
    """A daemon whose operator has a configuration directory (empty so far) and plugins of their own."""
    for name in ("net.d", "bin"):
        (tmp_path / name).mkdir()
    house.config = NetworkConfig(
        cni_config_dir=tmp_path / "net.d",
        cni_bin_dirs=(tmp_path / "bin", *NetworkConfig().cni_bin_dirs),
        fallback_subnet="",
        cni_timeout_s=20.0,
    )
    return house


@contextlib.contextmanager
def housed(house: House) -> Iterator[House]:
    try:
        yield house
    finally:
        for guest in house.guests:
            guest.close()
            off_the_loop(netns.delete_link, guest.name)
        for path in house.root.glob("netns/*"):
            netns.remove(path)
        off_the_loop(netns.delete_link, house.bridge, "bridge")


@pytest.fixture
async def network(house: House) -> AsyncIterator[NetBridge]:
    network = house.network()
    await network.open()
    yield network
    for sandbox in network.list():
        await network.teardown(sandbox)
    await network.close()


def udp_from_host(address: str, payload: bytes) -> bytes:
    """What the guest echoes; repeated, because an IPv6 address of the bridge is tentative at first."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as client:
        client.settimeout(0.5)
        for _ in range(30):
            client.sendto(payload, (address, 7))
            with contextlib.suppress(TimeoutError):
                return client.recv(2000)
    raise TimeoutError(f"{address} does not answer")


def tcp_from_host(address: str, port: int) -> bytes:
    with socket.create_connection((address, port), timeout=10) as client:
        return client.recv(100)


def a_bridge(house: House, **more: Any) -> dict[str, Any]:
    third = int(house.instance[:2], 16)
    ipam = {
        "type": "host-local",
        "dataDir": str(house.root / "cni/ipam"),
        "ranges": [[{"subnet": f"10.242.{third}.0/24"}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    return {"type": "bridge", "bridge": house.bridge, "isGateway": True, "ipMasq": True, "ipam": ipam, **more}


def configure(house: House, *plugins: dict[str, Any], version: str = "1.0.0", name: str = "10-test.conflist") -> Path:
    path = house.config.cni_config_dir / name
    path.write_text(json.dumps({"cniVersion": version, "name": house.bridge, "plugins": plugins}))
    return path


def plugin(house: House, kind: str, add: str = "print(json.dumps(prev))", delete: str = "pass") -> dict[str, Any]:
    """A plugin that notes each command in calls.log and then does what it is told, in Python, by command."""
    path = house.root / "bin" / kind
    path.write_text(
        f"#!{sys.executable} -IS\n"
        "import json, os, pathlib, sys, time\n"
        "config = json.load(sys.stdin)\n"
        "prev = config.get('prevResult', {'cniVersion': config['cniVersion'], 'ips': []})\n"
        f"note = pathlib.Path({str(house.root / 'calls.log')!r}).open('a')\n"
        f"print(os.environ['CNI_COMMAND'], {kind!r}, 'prevResult' in config, file=note, flush=True)\n"
        "if os.environ['CNI_COMMAND'] == 'ADD':\n"
        f"    {add}\n"
        "elif os.environ['CNI_COMMAND'] == 'DEL':\n"
        f"    {delete}\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return {"type": kind}


def calls(house: House) -> list[str]:
    return (house.root / "calls.log").read_text().splitlines()


FAILURES = {
    "error object": ('print(\'{"code": 7, "msg": "no", "details": "not today"}\'); sys.exit(1)', "no; not today"),
    "words on stderr": ("sys.exit('fell over')", "fell over"),
    "no words at all": ("os.abort()", "status -6"),
    "not JSON": ("print('done!')", "no CNI result"),
    "no result": ('print(\'{"ips": [{"address": "nowhere"}]}\')', "malformed"),
}

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


# --- crash, reboot, changed configuration -----------------------------------------------------------------------------


async def test_restarted_daemon_tears_down_with_what_add_used(configured: House) -> None:
    configure(configured, a_bridge(configured), plugin(configured, "chained"))
    before = configured.network()
    await before.open()
    sandbox, _, _ = await configured.pod(before)
    (configured.config.cni_config_dir / "10-test.conflist").unlink()
    after = configured.network()
    await after.open()
    assert (await after.status())[:2] == (False, NOT_READY)
    assert after.list() == [sandbox]
    await after.teardown(sandbox)
    assert calls(configured) == ["ADD chained True", "DEL chained True"]
    assert configured.leftovers() == []


async def test_teardown_after_the_netns_is_gone(house: House, network: NetBridge) -> None:
    sandbox, _, _ = await house.pod(network)
    # What a reboot leaves: the file without its mount, and the record.
    path = house.root / "netns" / sandbox
    netns.remove(path)
    path.touch()
    assert network.list() == [sandbox]
    await house.network().teardown(sandbox)
    assert house.leftovers() == []


async def test_teardown_after_a_reboot(house: House, network: NetBridge) -> None:
    sandbox, pod, _ = await house.pod(network)
    record = house.root / "cni" / f"{sandbox}.json"
    lease = next(house.root.glob(f"cni/ipam/*/{pod.ips[0]}"))
    kept = {path: path.read_bytes() for path in (record, lease)}
    await network.teardown(sandbox)
    # On the disk everything is as before; the kernel knows nothing: no netns, no interface, no iptables rule.
    for path, content in kept.items():
        path.write_bytes(content)
    (house.root / "netns" / sandbox).touch()
    await house.network().teardown(sandbox)
    assert house.leftovers() == []


async def test_teardown_of_a_setup_that_was_killed(configured: House) -> None:
    # The second plugin kills the daemon's work by never coming back; the driver is dropped without any undo.
    configure(configured, a_bridge(configured), plugin(configured, "stuck", add="time.sleep(600)"))
    network = configured.network()
    await network.open()
    sandbox = configured.sandbox()
    task = asyncio.ensure_future(network.setup(sandbox, a_spec(), device_mac=DEVICE_MAC))
    while not (configured.root / "calls.log").exists():
        await asyncio.sleep(0.05)
    record = (configured.root / "cni" / f"{sandbox}.json").read_bytes()
    assert len(configured.leases()) == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    # Cancelling undoes everything ...
    assert calls(configured) == ["ADD stuck True", "DEL stuck True"]
    assert configured.leftovers() == []
    # ... and a record that a killed daemon would have left is enough as well.
    (configured.root / "cni" / f"{sandbox}.json").write_bytes(record)
    assert configured.network().list() == [sandbox]
    await configured.network().teardown(sandbox)
    assert configured.leftovers() == []


async def test_damaged_record_still_frees_the_address(house: House, network: NetBridge) -> None:
    sandbox, _, _ = await house.pod(network)
    (house.root / "cni" / f"{sandbox}.json").write_text('{"format": 1, "conta')
    await network.teardown(sandbox)
    assert house.leftovers() == []


# --- failing plugins --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 1, 2])
async def test_failing_plugin_leaves_nothing(configured: House, position: int) -> None:
    bad = plugin(configured, "bad", add=FAILURES["error object"][0])
    good = plugin(configured, "good")
    chain = [a_bridge(configured), good]
    chain.insert(position, bad)
    configure(configured, *chain)
    network = configured.network()
    await network.open()
    sandbox = configured.sandbox()
    with pytest.raises(NetworkError) as caught:
        await network.setup(sandbox, a_spec(), device_mac=DEVICE_MAC)
    for part in ("cni add", f"sandbox {sandbox}", "plugin bad", "no; not today", "10-test.conflist"):
        assert part in str(caught.value)
    # DEL ran for the whole chain, in reverse, also for plugins that had not been reached.
    mine = [call.split()[:2] for call in calls(configured) if call.startswith("DEL")]
    assert mine == ([["DEL", "good"], ["DEL", "bad"]] if position < 2 else [["DEL", "bad"], ["DEL", "good"]])
    assert configured.leftovers() == []
    assert network.list() == []


@pytest.mark.parametrize("how", list(FAILURES))
async def test_every_kind_of_failure_is_told(configured: House, how: str) -> None:
    code, words = FAILURES[how]
    configure(configured, a_bridge(configured), plugin(configured, "bad", add=code))
    network = configured.network()
    await network.open()
    with pytest.raises(NetworkError, match="plugin bad") as caught:
        await network.setup(configured.sandbox(), a_spec(), device_mac=DEVICE_MAC)
    assert words in str(caught.value)
    assert configured.leftovers() == []


async def test_plugin_that_hangs_is_killed(configured: House) -> None:
    configured.config = replace(configured.config, cni_timeout_s=2.0)
    configure(configured, a_bridge(configured), plugin(configured, "stuck", add="time.sleep(600)"))
    network = configured.network()
    await network.open()
    with pytest.raises(NetworkError, match=r"plugin stuck: .*did not finish within 2 s"):
        await network.setup(configured.sandbox(), a_spec(), device_mac=DEVICE_MAC)
    assert configured.leftovers() == []
    assert "bin/stuck" not in output("ps", "-eo", "args")


async def test_missing_plugin_is_refused_before_anything_is_made(configured: House) -> None:
    configure(configured, a_bridge(configured), {"type": "no-such-plugin"})
    network = configured.network()
    await network.open()
    ready, reason, message = await network.status()
    assert (ready, reason) == (False, NOT_READY)
    assert "no-such-plugin" in message
    with pytest.raises(NetworkError, match="no-such-plugin") as caught:
        await network.setup(configured.sandbox(), a_spec(), device_mac=DEVICE_MAC)
    assert str(configured.root / "bin") in str(caught.value)
    assert configured.leftovers() == []


async def test_delete_is_repeated_until_it_works(configured: House) -> None:
    flag = configured.root / "broken"
    delete = f"pathlib.Path({str(flag)!r}).exists() and sys.exit('not now')"
    configure(configured, a_bridge(configured), plugin(configured, "moody", delete=delete))
    network = configured.network()
    await network.open()
    sandbox, _, _ = await configured.pod(network)
    flag.touch()
    with pytest.raises(NetworkError, match=r"cni del, sandbox .*plugin moody: not now"):
        await network.teardown(sandbox)
    assert calls(configured).count("DEL moody True") == 3
    assert configured.leases() == [], "a plugin that fails must not keep the others from cleaning up"
    assert network.list() == [sandbox]
    flag.unlink()
    await network.teardown(sandbox)
    assert configured.leftovers() == []


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
    await network.delete_tap("lo")
    assert Path("/sys/class/net/lo").exists()
