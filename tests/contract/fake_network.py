"""The one fake of `vmrt.pods.drivers.Network`: a host's network in memory, for tests of what is built on the Protocol.

`FakeHost` is the kernel and the disk, so a second `FakeNetwork` on it is a restarted daemon. Failures are scripted:
``network.failures["setup"] = [NetworkError("...")]`` makes the next call fail; ``network.gate`` holds `setup` back
half-way until it is set, for tests of cancellation and of races.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vmrt.errors import NetworkError
from vmrt.model import GuestInterface, GuestRoute, PodNetwork, SandboxSpec


@dataclass
class FakeHost:
    """What survives a daemon: taps (with the sandbox they moved to, "" for none), and pods with their host number."""

    taps: dict[str, str] = field(default_factory=dict)
    pods: dict[str, int] = field(default_factory=dict)


class FakeNetwork:
    """Pods get 10.88.0.2, .3 and so on; `calls` lists what was asked, in order."""

    def __init__(self, host: FakeHost | None = None) -> None:
        self.host = host or FakeHost()
        self.failures: dict[str, list[Exception]] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.ready = True
        self.extra_interfaces = 0
        self.calls: list[tuple[str, ...]] = []

    def _call(self, *call: str) -> None:
        self.calls.append(call)
        if self.failures.get(call[0]):
            raise self.failures[call[0]].pop(0)

    async def open(self) -> None:
        self._call("open")

    async def set_pod_ranges(self, cidrs: Sequence[str]) -> None:
        self._call("set_pod_ranges", *cidrs)

    async def close(self) -> None:
        self._call("close")

    async def create_tap(self, name: str) -> None:
        self._call("create_tap", name)
        if not 0 < len(name) <= 15 or "/" in name:
            raise NetworkError(f"{name!r} is no interface name", phase="tap")
        self.host.taps.setdefault(name, "")

    async def delete_taps(self, names: Sequence[str]) -> None:
        self._call("delete_taps", *names)
        for name in names:
            if self.host.taps.get(name) == "":
                del self.host.taps[name]

    async def setup(self, sandbox_id: str, spec: SandboxSpec, *, device_mac: str) -> PodNetwork:
        self._call("setup", sandbox_id)
        self._check(sandbox_id)
        if sandbox_id in self.host.pods:
            raise NetworkError("it has a network", phase="cni add", resource=f"sandbox {sandbox_id}")
        number = next(number for number in range(2, 255) if number not in self.host.pods.values())
        self.host.pods[sandbox_id] = number
        try:
            await self.gate.wait()
        except BaseException:
            del self.host.pods[sandbox_id]
            raise
        ip = f"10.88.0.{number}"
        interfaces = [GuestInterface("eth0", device_mac, f"0a:58:0a:58:00:{number:02x}", 1500, (f"{ip}/24",))]
        for extra in range(1, self.extra_interfaces + 1):
            mac = f"0a:58:0a:58:{extra:02x}:{number:02x}"
            interfaces.append(GuestInterface(f"net{extra}", mac, mac, 1400, (f"10.88.{extra}.{number}/24",)))
        routes = (GuestRoute("0.0.0.0/0", "10.88.0.1", "eth0"),)
        return PodNetwork(Path("/run/netns", sandbox_id), (ip,), tuple(interfaces), routes, ())

    async def join(self, sandbox_id: str, tap: str, interface: str = "") -> None:
        self._call("join", sandbox_id, tap, interface)
        self._check(sandbox_id)
        if sandbox_id not in self.host.pods or self.host.taps.get(tap) not in ("", sandbox_id):
            raise NetworkError("no such netns or tap", phase="tap join", resource=f"sandbox {sandbox_id}, tap {tap}")
        self.host.taps[tap] = sandbox_id

    async def teardown(self, sandbox_id: str) -> None:
        self._call("teardown", sandbox_id)
        self._check(sandbox_id)
        self.host.pods.pop(sandbox_id, None)
        # A tap goes with the namespace that it was moved to.
        self.host.taps = {tap: owner for tap, owner in self.host.taps.items() if owner != sandbox_id}

    def list(self) -> Sequence[str]:
        return sorted(self.host.pods)

    async def status(self) -> tuple[bool, str, str]:
        return (True, "", "fake") if self.ready else (False, "NetworkPluginNotReady", "fake network is not ready")

    def _check(self, sandbox_id: str) -> None:
        if not re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}", sandbox_id):
            raise NetworkError(f"{sandbox_id!r} is no sandbox id", phase="netns")
