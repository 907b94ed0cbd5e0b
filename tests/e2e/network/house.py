"""What the network tests share: a daemon's root and network, plugins written by the test, traffic from the host."""

from __future__ import annotations

import contextlib
import errno
import json
import secrets
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.e2e.network.tap_guest import TapGuest
from vmrt import netns
from vmrt.config import NetworkConfig
from vmrt.model import PodNetwork, PortMapping, SandboxSpec
from vmrt.netbridge import NetBridge

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
    """What the guest says to a connection; tried again while the kernel does not know yet where it is."""
    deadline = time.monotonic() + 60
    while True:
        try:
            with socket.create_connection((address, port), timeout=10) as client:
                return client.recv(100)
        except OSError as e:
            if e.errno != errno.EHOSTUNREACH or time.monotonic() > deadline:
                raise


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
