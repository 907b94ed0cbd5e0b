"""The network of a machine on which nobody has installed one: bridge + host-local + portmap, private to one daemon.

Bridge, network name, subnet and lease directory are all this daemon's own, so several daemons share a machine. What the
host's iptables can do is tried beforehand: pods get a network without masquerading or host ports rather than none.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmrt import cni, netns, spawn
from vmrt.config import NetworkConfig
from vmrt.errors import DeadlineError, NetworkError, ProcessError

log = logging.getLogger(__name__)

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# Every plugin release since 2021 speaks it, and Debian 12's speaks no newer one.
VERSION = "1.0.0"
# Of each configured subnet a daemon takes a block of this size, so that several on one machine do not collide.
BLOCK_PREFIX = {4: 22, 6: 64}
NETFILTER_TIMEOUT_S = 10.0
BUILT_IN = "vmrt itself"  # the source of the configuration

# What the plugins ask of iptables' nat table.
MASQUERADE_RULES = "-A POSTROUTING -m comment --comment vmrt -j MASQUERADE"
PORT_MAPPING_RULES = """-A PREROUTING -m addrtype --dst-type LOCAL -j MARK --set-xmark 0x2000/0x2000
-A POSTROUTING -m mark --mark 0x2000/0x2000 -j MASQUERADE
-A PREROUTING -p tcp -m multiport --dports 80,81 -j ACCEPT
-A PREROUTING -p tcp --dport 80 -j DNAT --to-destination :81"""


@dataclass(frozen=True, slots=True)
class NatSupport:
    """What the host's iptables can do; `detail` is its first complaint, "" when it has none."""

    masquerade: bool
    port_mapping: bool
    detail: str


class FallbackNetwork:
    """Decides the built-in configuration once per daemon life.

    `name` names network and bridge; `in_use` says whether pods may still be on it. Below `root`: `cni/ipam` for the
    leases and `cni-fallback.json` for the blocks taken.
    """

    def __init__(self, config: NetworkConfig, root: Path, instance: str, in_use: Callable[[], bool]) -> None:
        self.name = network_name(instance)
        self._pools = tuple(pool for pool in (config.fallback_subnet, config.fallback_subnet_v6) if pool)
        self._record_dir = root / "cni"
        self._netns_dir = root / "netns"
        self._file = root / "cni-fallback.json"
        # Daemons start at different blocks: two that start at the same moment cannot see each other's bridge yet.
        self._start = int.from_bytes(hashlib.sha256(instance.encode()).digest()[:4], "big")
        self._in_use = in_use
        self._lock = asyncio.Lock()
        self._conflist: cni.ConfList | None = None
        self._nat: NatSupport | None = None

    async def conflist(self) -> cni.ConfList:
        """Return the built-in configuration; raise `NetworkError` when no subnet is free."""
        async with self._lock:
            if self._conflist is None:
                blocks = await netns.in_thread(self._take_blocks)
                nat = await self.nat_support()
                filters = [await netfilter_rules(tool, "filter") for tool in ("iptables-save", "ip6tables-save")]
                self._conflist = fallback_conflist(
                    self.name,
                    blocks,
                    self._record_dir / "ipam",
                    masquerade=nat.masquerade,
                    port_mapping=nat.port_mapping,
                    forward_rules=any(map(drops_forwarded, filters[: len(blocks)])),
                )
                log.info("no CNI configuration: using bridge %s with %s", self.name, ", ".join(blocks))
                if nat.detail:
                    log.warning("%s", nat_limits(nat))
            return self._conflist

    def _take_blocks(self) -> tuple[str, ...]:
        """Take this daemon's blocks of the configured subnets, or those it took before."""
        try:
            kept = json.loads(self._file.read_bytes())
            pools, blocks = tuple(kept["pools"]), tuple(map(str, kept["blocks"]))
            known = [ipaddress.ip_network(block) for block in blocks]
        except (OSError, ValueError, KeyError, TypeError):
            pools, blocks, known = (), (), []
        used = [ipaddress.ip_network(network) for network in netns.used_networks(self.name)]
        # Pods hold their addresses: a changed configuration has to wait until they are gone.
        if blocks and (self._in_use() or (pools == self._pools and not any(clashes(block, used) for block in known))):
            return blocks
        blocks = tuple(str(choose_block(pool, used, self._start)) for pool in self._pools)
        # A bridge of ours with the gateway address of another block would make the bridge plugin fail.
        netns.delete_link(self.name, "bridge")
        cni.write_durably(self._file, json.dumps({"pools": self._pools, "blocks": blocks}).encode())
        return blocks

    async def nat_support(self) -> NatSupport:
        """Try, in a namespace made for it, the iptables rules that ipMasq and portmap need. Asked once."""
        if self._nat is None:
            path = self._netns_dir / ".nat"
            tools = ("iptables-restore", "ip6tables-restore")[: len(self._pools)]
            await netns.in_thread(netns.remove, path)  # of a daemon that was killed here
            try:
                await netns.in_thread(netns.create, path)
                failures = [
                    next(filter(None, [await _restore(path, tool, rules) for tool in tools]), "")
                    for rules in (MASQUERADE_RULES, PORT_MAPPING_RULES)
                ]
            finally:
                await netns.in_thread(netns.remove, path)
            self._nat = NatSupport(not failures[0], not failures[1], failures[0] or failures[1])
        return self._nat

    @property
    def limits(self) -> str:
        """What pods of this network go without on this host, "" for nothing."""
        return nat_limits(self._nat) if self._nat is not None and self._nat.detail else ""

    async def remove(self) -> None:
        """Delete the bridge; for when no pod is left. The plugin makes it again for the next one."""
        await netns.in_thread(netns.delete_link, self.name, "bridge")


# --- decisions --------------------------------------------------------------------------------------------------------


def network_name(instance: str) -> str:
    """Return the name of a daemon's own network and bridge: at most 15 characters (IFNAMSIZ), one per instance."""
    if re.fullmatch(r"[a-zA-Z0-9_-]{1,10}", instance):
        return f"vmrt-{instance}"
    return f"vmrt-{hashlib.sha256(instance.encode()).hexdigest()[:10]}"


def clashes(block: Network, used: Sequence[Network]) -> bool:
    """Say whether a block overlaps a network of the same family."""
    return any(other.version == block.version and other.overlaps(block) for other in used)


def choose_block(pool: str, used: Sequence[Network], start: int) -> Network:
    """Return the first block of `pool`, counted from number `start`, that overlaps no network in `used`.

    Networks that contain the whole pool do not count: the block's own route is the more specific one. A pool that is no
    larger than a block is taken whole. Raises `NetworkError` when nothing is free or the pool is none.
    """
    try:
        whole = ipaddress.ip_network(pool)
    except ValueError as e:
        raise NetworkError(f"network.fallback_subnet: {e}", phase="cni config") from e
    taken = [other for other in used if not (other.prefixlen < whole.prefixlen and clashes(whole, [other]))]
    prefix = max(whole.prefixlen, BLOCK_PREFIX[whole.version])
    count = 1 << min(prefix - whole.prefixlen, 16)
    step = 1 << (whole.max_prefixlen - prefix)
    for number in range(count):
        base = whole.network_address + (start + number) % count * step
        block = ipaddress.ip_network(f"{base}/{prefix}")
        if not clashes(block, taken):
            return block
    raise NetworkError(
        f"every block of {pool} overlaps a route of this host", phase="cni config", hint="set network.fallback_subnet"
    )


def nat_limits(nat: NatSupport) -> str:
    """Say what pods go without when iptables cannot do it."""
    lost = [] if nat.masquerade else ["pods reach nothing beyond the host's own networks"]
    lost += [] if nat.port_mapping else ["host ports are not published"]
    return f"{' and '.join(lost)}: {nat.detail} (is iptables installed, and nf_tables in the kernel?)"


def fallback_conflist(
    name: str,
    subnets: Sequence[str],
    data_dir: Path,
    *,
    masquerade: bool,
    port_mapping: bool,
    forward_rules: bool = False,
) -> cni.ConfList:
    """Return the configuration used when the operator gave none: bridge + host-local + portmap.

    `name` is the network's and the bridge's; `subnets` has one IPv4 and at most one IPv6 range; the leases are kept
    below `data_dir`. `masquerade` and `port_mapping` say what the host's iptables can do; `forward_rules` asks for
    rules that let pods' packets through a firewall which drops what is forwarded.
    """
    networks = [ipaddress.ip_network(subnet) for subnet in subnets]
    bridge_plugin: cni.Json = {
        "type": "bridge",
        "bridge": name,
        "isGateway": True,
        "ipMasq": masquerade,
        # A pod may reach itself through its host port.
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "dataDir": str(data_dir),
            "ranges": [[{"subnet": str(network)}] for network in networks],
            "routes": [{"dst": "0.0.0.0/0" if network.version == 4 else "::/0"} for network in networks],
        },
    }
    plugins = [bridge_plugin]
    if forward_rules:
        plugins.append({"type": "firewall", "backend": "iptables"})
    if port_mapping:
        plugins.append({"type": "portmap", "capabilities": {"portMappings": True}, "snat": True})
    return cni.ConfList(name, VERSION, tuple(plugins), BUILT_IN)


def drops_forwarded(rules: bytes) -> bool:
    """Say whether a filter table (as iptables-save prints it) drops what no rule accepts. Docker sets this policy."""
    return any(line.startswith((b":FORWARD DROP", b":FORWARD REJECT")) for line in rules.splitlines())


async def netfilter_rules(tool: str, table: str) -> bytes:
    """Return what iptables-save or its sibling prints of a table; nothing where there is no such tool or table."""
    try:
        env = {**os.environ, "PATH": cni.search_path(os.environ)}
        return (await spawn.run([tool, "-t", table], env=env, timeout_s=NETFILTER_TIMEOUT_S)).stdout
    except (ProcessError, DeadlineError) as e:
        log.debug("%s", e)
        return b""


async def _restore(path: Path, tool: str, rules: str) -> str:
    """Load NAT rules in a namespace; return "" or the tool's complaint."""
    try:
        await spawn.run(
            ["nsenter", f"--net={path}", tool],
            input_bytes=f"*nat\n{rules}\nCOMMIT\n".encode(),
            env={**os.environ, "PATH": cni.search_path(os.environ)},
            timeout_s=NETFILTER_TIMEOUT_S,
        )
    except (ProcessError, DeadlineError) as e:
        return f"{tool}: {e.message}"
    return ""
