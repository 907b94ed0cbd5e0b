"""IPv4 and IPv6 through a real VM, from the host and between containers, and host ports."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path

from demo.daemon import Daemon
from tests.e2e.conftest import run_pod
from vmrt.proto.runtime.v1 import api_pb2 as cri


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_both_families_and_a_host_port(private_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = private_daemon('fallback_subnet_v6 = "fd00:7672:7274::/56"\n')
    port = free_port()
    mapping = cri.PortMapping(protocol=cri.TCP, container_port=8080, host_port=port)
    pod = run_pod(daemon, tmp_path, "dual", port_mappings=[mapping])
    server = pod.run("httpd", "-f", "-p", "[::]:8080", "-h", "/srv")
    network = daemon.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod.id)).status.network
    addresses = [network.ip, *(extra.ip for extra in network.additional_ips)]
    families = [":" in address for address in addresses]
    assert families == [False, True]
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    inside = "until wget -q -O - http://[::1]:8080/; do sleep .2; done"
    body = pod.output("sh", "-c", inside).encode()
    urls = [f"http://{addresses[0]}:8080/", f"http://[{addresses[1]}]:8080/", f"http://127.0.0.1:{port}/"]
    for url in urls:
        with opener.open(url, timeout=10) as answer:
            assert answer.read() == body, url
    text = pod.execute(server, "ip", "addr", "show", "eth0").stdout.decode()
    for address in addresses:
        assert f"{address}/" in text
    # Duplicate address detection is off: the address is usable from the first moment.
    assert "tentative" not in text
    routes = pod.execute(server, "sh", "-c", "ip route; ip -6 route").stdout.decode()
    assert routes.count("default via") == 2
