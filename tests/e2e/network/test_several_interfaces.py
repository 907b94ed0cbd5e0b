"""Pods with several interfaces, as meta plugins make them: each is a network card of the VM."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from demo.daemon import Daemon
from tests.e2e.conftest import Pod, clean_daemon, run_pod
from tests.e2e.network.house import DEVICE_MAC, House, a_bridge, a_spec, configure, output
from vmrt.errors import NetworkError
from vmrt.proto.runtime.v1 import api_pb2 as cri

PATIENCE_S = 240
META = Path(__file__).with_name("meta_plugin.py")


def install(directory: Path) -> str:
    """Put the meta plugin where plugins are; return its type."""
    program = directory / "meta"
    program.write_text(f"#!{sys.executable} -IS\n{META.read_text()}")
    program.chmod(0o755)
    return program.name


# --- without VMs ------------------------------------------------------------------------------------------------------


def delegates(house: House, count: int) -> list[dict[str, Any]]:
    made = []
    for number in range(count):
        one = a_bridge(house, mtu=1400 + number, isGateway=number == 0, ipMasq=number == 0)
        if number:
            one["ipam"] |= {
                "ranges": [[{"subnet": f"10.{242 + number}.{int(house.instance[:2], 16)}.0/24"}]],
                "routes": [],
            }
        made.append(one)
    return made


async def test_each_interface_is_told_of(configured: House) -> None:
    kind = install(configured.root / "bin")
    configure(configured, {"type": kind, "delegates": delegates(configured, 3)})
    network = configured.network()
    await network.open()
    sandbox = configured.sandbox()
    pod = await network.setup(sandbox, a_spec(), device_mac=DEVICE_MAC)
    assert [(i.name, i.mtu, len(i.addresses)) for i in pod.interfaces] == [
        ("eth0", 1400, 1),
        ("net1", 1401, 1),
        ("net2", 1402, 1),
    ]
    assert [i.device_mac == i.mac for i in pod.interfaces] == [False, True, True]
    assert pod.ips == (pod.interfaces[0].addresses[0].partition("/")[0],)
    assert {route.interface for route in pod.routes} == {"eth0"}
    for interface in pod.interfaces:
        tap = f"vt{secrets.token_hex(4)}"
        await network.create_tap(tap)
        await network.join(sandbox, tap, interface.name)
        shown = output("nsenter", f"--net={pod.netns}", "tc", "filter", "show", "dev", interface.name, "ingress")
        assert f"to device {tap}" in shown
        assert f"mtu {interface.mtu}" in output("nsenter", f"--net={pod.netns}", "ip", "link", "show", tap)
    await network.teardown(sandbox)
    assert configured.leftovers() == []
    assert configured.leases() == []


@pytest.mark.parametrize("step", ["ADD 0", "ADD 1", "ADD 2", "DEL 0", "DEL 1"])
async def test_a_meta_plugin_that_fails_at_each_step(configured: House, step: str) -> None:
    """What the delegates made before is undone; a DEL that fails is tried again with what was recorded."""
    kind = install(configured.root / "bin")
    chain = {"type": kind, "delegates": delegates(configured, 3), "failAt": step}
    configure(configured, chain)
    network = configured.network()
    await network.open()
    sandbox = configured.sandbox()
    if step.startswith("ADD"):
        with pytest.raises(NetworkError, match=f"told to fail at {step}"):
            await network.setup(sandbox, a_spec(), device_mac=DEVICE_MAC)
    else:
        await network.setup(sandbox, a_spec(), device_mac=DEVICE_MAC)
        with pytest.raises(NetworkError, match=f"told to fail at {step}"):
            await network.teardown(sandbox)
        assert network.list() == [sandbox]
        # What stops the failure is in the record, not in the configuration of the day.
        record = configured.root / "cni" / f"{sandbox}.json"
        record.write_text(record.read_text().replace(step, "never"))
        await configured.network().teardown(sandbox)
    assert network.list() == []
    assert configured.leftovers() == []


# --- in VMs -----------------------------------------------------------------------------------------------------------


@dataclass
class Net:
    daemon: Daemon
    number: int
    bridges: list[str]
    logs: Path
    pods: list[Pod] = field(default_factory=list)

    def configure(self, count: int) -> None:
        """Pods started from now on have `count` interfaces: each on a bridge of its own, the last without a gateway."""
        made = []
        for number in range(count):
            ranges = [[{"subnet": f"10.{200 + number}.{self.number}.0/24"}]]
            if number == 1:
                ranges.append([{"subnet": f"fd00:200:{self.number}::/64"}])
            ipam: dict[str, Any] = {
                "type": "host-local",
                "dataDir": str(self.daemon.root / "cni/ipam"),
                "ranges": ranges,
            }
            ipam["routes"] = [{"dst": "0.0.0.0/0"}] if number == 0 else [{"dst": f"10.{220 + number}.0.0/16"}]
            made.append(
                {
                    "type": "bridge",
                    "bridge": self.bridges[number],
                    "isGateway": True,
                    "mtu": 1500 - number,
                    "ipam": ipam,
                }
            )
        chain = {"type": "meta", "delegates": made}
        conflist = {"cniVersion": "1.0.0", "name": f"meta{self.number}", "plugins": [chain]}
        (self.daemon.root / "net.d" / "10-meta.conflist").write_text(json.dumps(conflist))


def waiting(daemon: Daemon) -> int:
    """How many VMs of the pool wait for a pod."""
    told = json.loads(daemon.runtime.Status(cri.StatusRequest(verbose=True)).info["config"])
    return int(told["pool"]["waiting"])


@pytest.fixture(scope="module")
def net(layout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Net]:
    number = secrets.randbelow(200)
    bridges = [f"vmmeta{number}-{n}" for n in range(5)]
    plugins = tmp_path_factory.mktemp("bin")
    install(plugins)
    settings = f'cni_bin_dirs = ["{plugins}", "/opt/cni/bin", "/usr/lib/cni"]\n[hypervisor]\nboot_timeout_s = 240\n'
    with clean_daemon("meta", f"{settings}[pool]\nsize = 1\n") as daemon:
        made = Net(daemon, number, bridges, tmp_path_factory.mktemp("logs"))
        try:
            made.configure(3)
            daemon.start()
            daemon.load(layout)
            # The first is a VM that was booted before its network was known; the second most likely boots for its pod.
            deadline = time.monotonic() + PATIENCE_S
            while not waiting(daemon):
                assert time.monotonic() < deadline
                time.sleep(0.2)
            made.pods += [run_pod(daemon, made.logs, name) for name in ("one", "two")]
            yield made
            daemon.remove_pods()
        finally:
            # The plugin leaves its bridges, by design; they are this test's.
            for bridge in bridges:
                with contextlib.suppress(Exception):
                    output("ip", "link", "delete", bridge)


def sh(pod: Pod, container: str, script: str) -> str:
    done = pod.execute(container, "sh", "-c", script, timeout=PATIENCE_S)
    assert done.exit_code == 0, (script, done.stdout[-500:], done.stderr[-500:])
    return done.stdout.decode()


@pytest.mark.timeout(600)
def test_a_card_for_each_interface(net: Net) -> None:
    first, second = net.pods
    containers = [pod.run("sleep", "1000") for pod in net.pods]
    netns = net.daemon.root / "netns" / first.id
    host = {link["ifname"]: link for link in json.loads(output("nsenter", f"--net={netns}", "ip", "-j", "addr"))}
    assert {"eth0", "net1", "net2"} <= host.keys()
    for number, name in enumerate(("eth0", "net1", "net2")):
        told = sh(first, containers[0], f"cat /sys/class/net/{name}/address /sys/class/net/{name}/mtu").split()
        assert told == [host[name]["address"], str(1500 - number)], name
        mine = sh(first, containers[0], f"ip addr show dev {name}")
        for address in host[name]["addr_info"]:
            assert f"{address['local']}/{address['prefixlen']}" in mine
    routes = sh(first, containers[0], "ip route")
    assert f"default via 10.200.{net.number}.1 dev eth0" in routes
    assert f"10.221.0.0/16 via 10.201.{net.number}.1 dev net1" in routes
    assert f"10.222.0.0/16 via 10.202.{net.number}.1 dev net2" in routes
    # Between the pods over each network, both families, full frames.
    theirs = sh(second, containers[1], "ip -o addr show scope global")
    addresses = {line.split()[1]: [] for line in theirs.splitlines()}  # type: ignore[var-annotated]
    for line in theirs.splitlines():
        addresses[line.split()[1]].append(line.split()[3].partition("/")[0])
    assert [len(addresses[name]) for name in ("eth0", "net1", "net2")] == [1, 2, 1]
    for name in ("eth0", "net1", "net2"):
        for address in addresses[name]:
            script = f"ping -c 1 -W 60 -s 1400 -I {name} {address}"
            assert " 0% packet loss" in sh(first, containers[0], script), (name, address)
    # CRI's addresses are the pod's own interface's; the statistics are each one's.
    status = net.daemon.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=first.id)).status
    assert (status.network.ip.rpartition(".")[0], len(status.network.additional_ips)) == (f"10.200.{net.number}", 0)
    deadline = time.monotonic() + PATIENCE_S
    while True:
        stats = net.daemon.runtime.PodSandboxStats(cri.PodSandboxStatsRequest(pod_sandbox_id=first.id)).stats
        figures = stats.linux.network
        assert figures.default_interface.name == "eth0"
        assert [interface.name for interface in figures.interfaces] == ["eth0", "net1", "net2"]
        if all(interface.rx_bytes.value > 1400 and interface.tx_bytes.value > 1400 for interface in figures.interfaces):
            break
        assert time.monotonic() < deadline
        time.sleep(0.5)
    for pod, container in zip(net.pods, containers, strict=True):
        pod.remove(container)


@pytest.mark.timeout(600)
def test_more_interfaces_than_a_vm_takes(net: Net) -> None:
    net.configure(5)
    try:
        with pytest.raises(grpc.RpcError, match="no place for another") as caught:
            run_pod(net.daemon, net.logs, "many")
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "hypervisor.extra_nics" in str(caught.value)
        # Nothing of it stays: no lease, no tap of a further card; the bridges are the plugin's.
        assert not list(net.daemon.root.glob("cni/ipam/*/10.20[34].*"))
        tag = next(iter(net.daemon.root.glob("vms/*"))).name[:4]
        assert [tap for _, tap in socket.if_nameindex() if tap.startswith(f"vt{tag}") and len(tap) > 14] == []
    finally:
        net.configure(3)
