"""The pod's network: what the way through CNI costs a VM's octets, and what vmrt costs CNI's plugins.

Octets: the host exchanges them with two pods in turn, with one as the world does (bridge, veth, tc's redirect, tap),
with the other from inside its namespace, the redirect taken away and the gateway's address on the tap itself: the same
QEMU with the same card and the same guest, and nothing between. Plugins: setup and teardown of vmrt's driver take turns
with the same plugins run by hand on the same configuration, each with a namespace made and removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import socket
import subprocess
import time
from functools import partial
from pathlib import Path

from bench.samples import COLD, FLOOR
from bench.stand import Bench, Stage, create_request, sandbox_config
from demo.daemon import Daemon
from vmrt import cni, netns
from vmrt.config import NetworkConfig
from vmrt.model import SandboxSpec
from vmrt.netbridge import NetBridge
from vmrt.proto.runtime.v1 import api_pb2 as cri

BY_HAND = "plugins by hand"
ECHO, SINK = 7, 9
BULK_BYTES = 48 * 1024 * 1024
TURNS = 200
CHAINS = 11
PATIENCE_S = 120.0
SERVER = f"nc -ll -p {ECHO} -e cat & nc -ll -p {SINK} -e sh -c 'cat >/dev/null' & wait"
BULK, LATENCY, CHAIN = f"{BULK_BYTES >> 20} MB to the pod", "1 octet there and back", "CNI ADD + DEL"
CHAIN_CPU = f"{CHAIN}, processor time"


def measure(bench: Bench) -> None:
    """Measure both, and report the ratios that were promised."""
    _octets(bench)
    asyncio.run(_chains(bench))
    bench.samples.compare("octets to a pod, of the tap itself (time)", (COLD, BULK), (FLOOR, BULK), 1 / 0.9)
    bench.samples.compare("latency of a pod, of the tap itself", (COLD, LATENCY), (FLOOR, LATENCY), 1 / 0.9)
    bench.samples.compare("CNI ADD + DEL, of the plugins by hand", (COLD, CHAIN), (BY_HAND, CHAIN), 1.1)
    bench.samples.compare(
        "CNI ADD + DEL, processor time, of the plugins by hand", (COLD, CHAIN_CPU), (BY_HAND, CHAIN_CPU)
    )


# --- octets -----------------------------------------------------------------------------------------------------------


def _octets(bench: Bench) -> None:
    with contextlib.ExitStack() as undo:
        (_, address), (other, other_address) = (_server(bench.cold, name, undo) for name in ("network", "tap"))
        path = bench.cold.root / "netns" / other
        _bypass(path)
        for _ in range(bench.rounds):
            _exchange(bench, COLD, address)
            netns.inside(path, partial(_exchange, bench, FLOOR, other_address))


def _server(daemon: Daemon, name: str, undo: contextlib.ExitStack) -> tuple[str, str]:
    """Run a pod that answers; return its id and address."""
    runtime, config = daemon.runtime, sandbox_config(name)
    # As kubelet's pods have: bench/volumes.py says why it matters.
    config.linux.cgroup_parent = f"/vmrt-bench-{os.getpid()}/{name}"
    pod = runtime.RunPodSandbox(cri.RunPodSandboxRequest(config=config)).pod_sandbox_id
    undo.callback(runtime.RemovePodSandbox, cri.RemovePodSandboxRequest(pod_sandbox_id=pod))
    request = create_request(pod, config, "server")
    request.config.command[:] = ["sh", "-c", SERVER]
    container = runtime.CreateContainer(request).container_id
    runtime.StartContainer(cri.StartContainerRequest(container_id=container))
    status = runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod)).status
    _answering(status.network.ip)
    return pod, status.network.ip


def _exchange(bench: Bench, whose: str, address: str) -> None:
    data = os.urandom(1 << 20)
    _sink(address, data, 1)
    with socket.create_connection((address, ECHO), timeout=PATIENCE_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for turn in range(TURNS):
            began = time.monotonic()
            connection.sendall(b"x")
            connection.recv(1)
            if turn >= TURNS // 10:
                bench.samples.add(whose, LATENCY, (time.monotonic() - began) * 1000)
    bench.samples.timed(whose, BULK, lambda: _sink(address, data, BULK_BYTES >> 20))


def _sink(address: str, data: bytes, times: int) -> None:
    """Send octets, and return when the pod has taken all of them: its end follows ours."""
    with socket.create_connection((address, SINK), timeout=PATIENCE_S) as connection:
        for _ in range(times):
            connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        if connection.recv(1):
            raise RuntimeError("the sink has sent something")


def _answering(address: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    for port in (ECHO, SINK):
        while True:
            try:
                socket.create_connection((address, port), timeout=5).close()
                break
            except OSError as e:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"nothing answers on {address} port {port}") from e
                time.sleep(0.1)


def _bypass(path: Path) -> None:
    """Take CNI's interface out of the pod's way: the tap gets what the bridge had, the guest sees no difference."""
    inside = ["nsenter", f"--net={path}"]
    links = json.loads(_output(*inside, "ip", "-j", "link"))
    tap = next(link["ifname"] for link in links if link["ifname"] not in ("lo", "eth0"))
    routes = json.loads(_output(*inside, "ip", "-j", "route"))
    gateway = next(route["gateway"] for route in routes if route["dst"] == "default")
    prefix = json.loads(_output(*inside, "ip", "-j", "-4", "addr", "show", "eth0"))[0]["addr_info"][0]["prefixlen"]
    links = json.loads(_output("ip", "-j", "addr"))
    bridge = next(link for link in links if any(a.get("local") == gateway for a in link["addr_info"]))
    for name in ("eth0", tap):
        _output(*inside, "tc", "qdisc", "del", "dev", name, "ingress")
    _output(*inside, "ip", "addr", "flush", "dev", "eth0")
    _output(*inside, "ip", "link", "set", tap, "address", bridge["address"])
    _output(*inside, "ip", "addr", "add", f"{gateway}/{prefix}", "dev", tap)


def _output(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


# --- plugins ----------------------------------------------------------------------------------------------------------


async def _chains(bench: Bench) -> None:
    root = bench.scratch / "network"
    net_d = root / "net.d"
    net_d.mkdir(parents=True)
    name = f"vmbench{os.getpid() % 100000}"
    ipam = {
        "type": "host-local",
        "dataDir": str(root / "ipam"),
        "ranges": [[{"subnet": "10.246.0.0/24"}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    plugins = [
        {"type": "bridge", "bridge": name, "isGateway": True, "ipMasq": True, "ipam": ipam},
        {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True},
    ]
    text = json.dumps({"cniVersion": "1.0.0", "name": name, "plugins": plugins}).encode()
    (net_d / "10-bench.conflist").write_bytes(text)
    config = NetworkConfig(cni_config_dir=net_d, fallback_subnet="")
    driver = NetBridge(config, root, "bench")
    await driver.open()
    conflist = cni.parse_conflist("10-bench.conflist", text)
    try:
        for number in range(CHAINS + 1):
            spec = SandboxSpec(f"pod-{number}", f"uid-{number}", "bench")
            began, before = time.monotonic(), _processor_ms()
            await driver.setup(f"driver{number}", spec, device_mac="02:00:00:00:00:01")
            await driver.teardown(f"driver{number}")
            ended, between = time.monotonic(), _processor_ms()
            by_hand = await asyncio.to_thread(_run_by_hand, root, conflist, config, number)
            if number:  # the first chain makes the bridge
                bench.samples.add(COLD, CHAIN, (ended - began) * 1000)
                bench.samples.add(BY_HAND, CHAIN, by_hand * 1000)
                bench.samples.add(COLD, CHAIN_CPU, between - before)
                bench.samples.add(BY_HAND, CHAIN_CPU, _processor_ms() - between)
        await driver.close()
    finally:
        await asyncio.to_thread(subprocess.run, ["ip", "link", "delete", name], check=False, capture_output=True)


def _processor_ms() -> float:
    """Return the processor time of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used) * 1000


def _run_by_hand(root: Path, conflist: cni.ConfList, config: NetworkConfig, number: int) -> float:
    """Do what a shell script would; return how long it took, in seconds."""
    bin_dirs = tuple(map(str, config.cni_bin_dirs))
    path = root / f"hand{number}"
    attachment = cni.Attachment(f"hand{number}", str(path), "eth0", "", {}, conflist, bin_dirs)
    programs = [cni.find_plugin(plugin["type"], bin_dirs) for plugin in conflist.plugins]
    began = time.monotonic()
    netns.create(path)
    result: cni.Json | None = None
    for command in ("ADD", "DEL"):
        order = range(len(programs)) if command == "ADD" else reversed(range(len(programs)))
        for index in order:
            attachment = cni.Attachment(f"hand{number}", str(path), "eth0", "", {}, conflist, bin_dirs, result)
            done = subprocess.run(
                [programs[index]],
                input=json.dumps(cni.request_config(attachment, index, command)).encode(),
                env=cni.environment(attachment, command, os.environ),
                check=True,
                capture_output=True,
            )
            if command == "ADD":
                result = json.loads(done.stdout)
    netns.remove(path)
    return time.monotonic() - began


STAGE = Stage("network", "octets through a pod's network, and CNI's plugins through vmrt", measure)
