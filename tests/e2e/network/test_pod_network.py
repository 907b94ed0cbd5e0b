"""Two pods and the host, in real VMs: both families, jumbo frames, several queues, large transfers, host ports."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from demo.daemon import Daemon
from tests.e2e.conftest import Pod, clean_daemon, run_pod
from tests.e2e.network.house import output
from vmrt.proto.runtime.v1 import api_pb2 as cri

SIZE = 24 * 1024 * 1024
PATIENCE_S = 240
pytestmark = pytest.mark.timeout(600)
# An HTTP server, and an echo on port 7, of each family.
SERVER = "mkdir -p /data; echo up >/data/up; nc -ll -p 7 -e cat & httpd -f -p '[::]:80' -h /data & wait"


@dataclass
class Two:
    daemon: Daemon
    pods: list[Pod]
    servers: list[str]
    ips: list[list[str]]
    gateways: list[str]
    host_port: int


@pytest.fixture(scope="module")
def two(layout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    number = secrets.randbelow(200)
    bridge = f"vmjumbo{number}"
    ranges = [[{"subnet": f"10.245.{number}.0/24"}], [{"subnet": f"fd00:245:{number}::/64"}]]
    with clean_daemon("net", "[hypervisor]\nnic_queues = 2\ndefault_vcpus = 2\nboot_timeout_s = 240\n") as daemon:
        ipam: dict[str, object] = {"type": "host-local", "dataDir": str(daemon.root / "ipam"), "ranges": ranges}
        ipam |= {"routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}
        plugins: list[dict[str, object]] = [
            {"type": "bridge", "bridge": bridge, "isGateway": True, "mtu": 9000, "ipam": ipam},
            {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True},
        ]
        conflist = {"cniVersion": "1.0.0", "name": bridge, "plugins": plugins}
        (daemon.root / "net.d" / "10-jumbo.conflist").write_text(json.dumps(conflist))
        daemon.start()
        daemon.load(layout)
        port = 22000 + secrets.randbelow(5000)
        mappings = [
            cri.PortMapping(protocol=cri.TCP, container_port=80, host_port=port),
            cri.PortMapping(protocol=cri.UDP, container_port=9, host_port=port),
        ]
        try:
            logs = tmp_path_factory.mktemp("logs")
            pods = [run_pod(daemon, logs, "first", port_mappings=mappings), run_pod(daemon, logs, "second")]
            servers = [pod.run("sh", "-c", SERVER, name="server") for pod in pods]
            ips = []
            for pod in pods:
                request = cri.PodSandboxStatusRequest(pod_sandbox_id=pod.id)
                network = daemon.runtime.PodSandboxStatus(request).status.network
                ips.append([network.ip, *(extra.ip for extra in network.additional_ips)])
            gateways = [f"10.245.{number}.1", f"fd00:245:{number}::1"]
            yield Two(daemon, pods, servers, ips, gateways, port)
            daemon.remove_pods()
        finally:
            # The plugin leaves its bridge, by design; it is this test's.
            with contextlib.suppress(Exception):
                output("ip", "link", "delete", bridge)


def at(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def shell(two: Two, which: int, script: str) -> str:
    answer = two.pods[which].execute(two.servers[which], "sh", "-c", script, timeout=PATIENCE_S)
    assert answer.exit_code == 0, (script, answer.stdout[-500:], answer.stderr[-500:])
    return answer.stdout.decode()


def echoed(address: str, port: int, data: bytes) -> bytes:
    """Send octets to an echo and return the digest of what comes back."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            connection = socket.create_connection((address, port), timeout=PATIENCE_S)
            break
        except OSError:
            # An IPv6 address of the bridge is tentative at first.
            assert time.monotonic() < deadline
            time.sleep(0.2)
    with connection:

        def send() -> None:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)

        sending = threading.Thread(target=send)
        sending.start()
        digest = hashlib.sha256()
        while piece := connection.recv(1 << 16):
            digest.update(piece)
        sending.join()
    return digest.digest()


def test_pods_have_both_families_jumbo_frames_and_two_queues(two: Two) -> None:
    for which in range(2):
        assert [":" in ip for ip in two.ips[which]] == [False, True]
        assert shell(two, which, "cat /sys/class/net/eth0/mtu").strip() == "9000"
        assert sorted(shell(two, which, "ls /sys/class/net/eth0/queues").split()) == ["rx-0", "rx-1", "tx-0", "tx-1"]
    for address in two.ips[1]:
        # 8900 octets in one unfragmented frame.
        assert "0% packet loss" in shell(two, 0, f"ping -c 1 -W 60 -s 8900 {address}")


def test_host_and_pod_exchange_octets(two: Two) -> None:
    data = os.urandom(SIZE // 4)
    for address in two.ips[0]:
        assert echoed(address, 7, data) == hashlib.sha256(data).digest(), address


def test_pods_fetch_from_each_other(two: Two) -> None:
    made = f"head -c {SIZE} /dev/urandom >/data/big; sha256sum </data/big"
    wanted = shell(two, 1, made)
    for address in two.ips[1]:
        assert shell(two, 0, f"wget -q -O - http://{at(address)}/big | sha256sum") == wanted, address


def test_pods_reach_the_host(two: Two) -> None:
    data = os.urandom(SIZE // 4)
    for family, gateway in zip((socket.AF_INET, socket.AF_INET6), two.gateways, strict=True):
        with socket.create_server((gateway, 0), family=family) as server:
            server.settimeout(PATIENCE_S)

            def answer(server: socket.socket = server) -> None:
                connection, _ = server.accept()
                with connection:
                    connection.sendall(data)

            answering = threading.Thread(target=answer)
            answering.start()
            digest = shell(two, 0, f"nc {gateway} {server.getsockname()[1]} </dev/null | sha256sum").split()[0]
            answering.join()
        assert digest == hashlib.sha256(data).hexdigest(), gateway


def test_host_ports_lead_in_from_everywhere_and_end_with_the_pod(two: Two) -> None:
    from urllib.request import ProxyHandler, build_opener

    opener = build_opener(ProxyHandler({}))
    for host in ("127.0.0.1", *map(at, two.gateways)):
        with opener.open(f"http://{host}:{two.host_port}/up", timeout=PATIENCE_S) as answer:
            assert answer.read() == b"up\n", host
    for gateway in two.gateways:
        assert shell(two, 1, f"wget -q -O - http://{at(gateway)}:{two.host_port}/up") == "up\n"
    first = two.pods[0]
    # The image has nothing that receives datagrams: the guest's kernel counts those that nobody listens for.
    unheard = "awk '/^Udp: [0-9]/ {print $3}' /proc/net/snmp"
    before, deadline = int(shell(two, 0, unheard)), time.monotonic() + PATIENCE_S
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        while int(shell(two, 0, unheard)) == before:
            assert time.monotonic() < deadline
            client.sendto(b"by udp\n", (two.gateways[0], two.host_port))
            time.sleep(0.1)
    first.daemon.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=first.id))
    with pytest.raises(OSError), opener.open(f"http://127.0.0.1:{two.host_port}/up", timeout=10):
        pass


def test_a_network_of_ipv6_alone_is_taken_up_without_a_restart(two: Two, tmp_path: Path) -> None:
    number = secrets.randbelow(200)
    bridge = f"vmsix{number}"
    ipam = {
        "type": "host-local",
        "dataDir": str(two.daemon.root / "ipam6"),
        "ranges": [[{"subnet": f"fd00:246:{number}::/64"}]],
        "routes": [{"dst": "::/0"}],
    }
    plugins = [{"type": "bridge", "bridge": bridge, "isGateway": True, "ipam": ipam}]
    path = two.daemon.root / "net.d" / "05-six.conflist"
    path.write_text(json.dumps({"cniVersion": "1.0.0", "name": bridge, "plugins": plugins}))
    try:
        linux = cri.LinuxPodSandboxConfig(sysctls={"net.ipv4.ip_unprivileged_port_start": "7"})
        pod = run_pod(two.daemon, tmp_path, "six", hostname="six-host", linux=linux)
        status = two.daemon.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod.id)).status
        assert (":" in status.network.ip, len(status.network.additional_ips)) == (True, 0)
        script = (
            "hostname; cat /proc/sys/net/ipv4/ip_unprivileged_port_start; grep six-host /etc/hosts; "
            f"ping -c 1 -W 60 fd00:246:{number}::1"
        )
        told = pod.output("sh", "-c", script)
        assert told.splitlines()[:2] == ["six-host", "7"]
        assert status.network.ip in told
        assert "0% packet loss" in told
        request = cri.PodSandboxStatsRequest(pod_sandbox_id=pod.id)
        deadline = time.monotonic() + PATIENCE_S
        while True:
            interface = two.daemon.runtime.PodSandboxStats(request).stats.linux.network.default_interface
            if interface.rx_bytes.value and interface.tx_bytes.value:
                break
            assert time.monotonic() < deadline
            time.sleep(0.5)
        assert interface.name == "eth0"
        two.daemon.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod.id))
        two.daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod.id))
    finally:
        path.unlink()
        with contextlib.suppress(Exception):
            output("ip", "link", "delete", bridge)
