"""A pod's network: namespace, CNI, tap, and what the guest is told of it. Implements `vmrt.pods.drivers.Network`.

Below the daemon's root:
    netns/<sandbox id>   the namespace, held by a bind mount
    cni/<sandbox id>.json  what ADD ran with and returned (`vmrt.cni.Attachment`), there before the first plugin runs
    cni/ipam/            host-local's leases for the built-in configuration
    cni-fallback.json    the subnets that the built-in configuration took
    pod-ranges.json      the node's pod CIDRs, as kubelet told them last

Rules: the record is written before a side effect and removed after the last; `teardown` needs nothing else. The
blocking work of `vmrt.netns` runs in worker threads and, once begun, to its end, also when the caller is cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import json
import logging
import re
import time
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vmrt import cni, cni_args, conntrack, netns
from vmrt.config import NetworkConfig
from vmrt.errors import DeadlineError, NetworkError, VmrtError
from vmrt.fallback_network import BUILT_IN, FallbackNetwork, netfilter_rules
from vmrt.interfaces import InterfaceState, KernelRoute
from vmrt.model import GuestInterface, GuestNeighbour, GuestRoute, PodNetwork, SandboxSpec

log = logging.getLogger(__name__)

IFNAME = "eth0"
NOT_READY = "NetworkPluginNotReady"  # the reason that kubelet's users know
DELETE_PAUSES_S = (0.0, 0.2, 1.0)
STATUS_AGE_S = 10.0

_SANDBOX_ID = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}")


class NetBridge:
    """CNI networks for pods whose network card is a VM's tap.

    `instance` tells daemons on one machine apart. `tap_owner` is the uid that may open taps besides root. `tap_queues`
    is how many queues VMs open taps with.
    """

    def __init__(
        self, config: NetworkConfig, root: Path, instance: str, *, tap_owner: int | None = None, tap_queues: int = 1
    ) -> None:
        self._config = config
        self._netns_dir = root / "netns"
        self._record_dir = root / "cni"
        self._ranges = root / "pod-ranges.json"
        self._tap_owner = tap_owner
        self._tap_queues = tap_queues
        self._bin_dirs = tuple(str(directory) for directory in config.cni_bin_dirs)
        self._fallback = FallbackNetwork(config, root, instance, lambda: bool(self.list()))
        self._joint: netns.Joint | None = None
        # When STATUS was asked, of which configuration, and what was wrong ("" for nothing).
        self._plugin_status: tuple[float, str, str] | None = None
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    async def open(self) -> None:
        """Make the directories and look at the configuration; one that is not ready yet is said by `status`."""
        for directory in (self._netns_dir, self._record_dir):
            try:
                await asyncio.to_thread(directory.mkdir, 0o711, True, True)
                # What a daemon that was killed had written of a record and not yet named.
                for part in directory.glob(".*.new"):
                    part.unlink(missing_ok=True)
            except OSError as e:
                raise NetworkError(f"cannot prepare {directory}: {e.strerror}", phase="network open") from e
        ready, _, message = await self.status()
        if not ready:
            log.warning("network is not ready: %s", message)
        elif self._config.cni_gc:
            await self._collect()

    async def _collect(self) -> None:
        """Have the plugins free what they hold for none of our pods; a failure costs no more than what stays held."""
        conflist = await self._conflist()
        attachments = [await self._recall(sandbox_id) for sandbox_id in self.list()]
        valid = [
            (each.container_id, each.ifname) for each in attachments if each and each.conflist.name == conflist.name
        ]
        collector = cni.Attachment("gc", "", IFNAME, "", {}, conflist, self._bin_dirs)
        try:
            await cni.collect(collector, valid, self._config.cni_timeout_s)
        except NetworkError as e:
            log.warning("CNI GC: %s", e)

    async def set_pod_ranges(self, cidrs: Sequence[str]) -> None:
        """Remember the node's pod CIDRs, for plugins that declare the capability ipRanges."""
        content = json.dumps({"format": 1, "ranges": list(cidrs)}).encode()
        if await asyncio.to_thread(read_pod_ranges, self._ranges) != tuple(cidrs):
            await netns.in_thread(cni.write_durably, self._ranges, content)
            log.info("the node's pod ranges are %s", ", ".join(cidrs))

    async def close(self) -> None:
        """Remove the built-in configuration's bridge if no pod is left; pods keep their network."""
        if not self.list():
            await self._fallback.remove()

    # --- taps ---------------------------------------------------------------------------------------------------------

    async def create_tap(self, name: str) -> None:
        """Create a persistent tap that QEMU's user may open; an existing one is no error. `join` brings it up."""
        await netns.in_thread(netns.create_tap, name, self._tap_owner, self._tap_queues)

    async def delete_taps(self, names: Sequence[str]) -> None:
        """Delete taps in the host's netns; absent ones are no error."""
        await netns.in_thread(netns.delete_links, names)

    async def join(self, sandbox_id: str, tap: str, interface: str = "") -> None:
        """Move the tap into the pod's netns and join it to one of its interfaces; "" is the pod's own.

        Repeating it is no error.
        """
        path = self._netns(sandbox_id)
        try:
            joint = await netns.in_thread(netns.join, path, interface or IFNAME, tap, self._joint)
        except NetworkError as e:
            raise NetworkError(e.message, phase=e.phase, resource=f"sandbox {sandbox_id}, tap {tap}") from e
        if self._joint is None:
            self._joint = joint
            log.info("taps are joined to CNI interfaces by %s", joint.value)

    # --- pods ---------------------------------------------------------------------------------------------------------

    async def setup(self, sandbox_id: str, spec: SandboxSpec, *, device_mac: str) -> PodNetwork:
        """Make the pod's netns, run CNI ADD, return addresses and the guest's configuration of them.

        On failure or cancellation DEL has been run for the whole chain and the netns removed before this raises. Should
        that DEL fail too, the record stays: `list` names the sandbox and `teardown` tries again.
        """
        path, record = self._netns(sandbox_id), self._record(sandbox_id)
        ranges = asyncio.to_thread(read_pod_ranges, self._ranges)
        conflist, pod_ranges = await asyncio.gather(self._conflist(), ranges)
        self._refuse_missing(conflist, sandbox_id)
        attachment = cni.Attachment(
            container_id=sandbox_id,
            netns=str(path),
            ifname=IFNAME,
            args=cni_args.cni_args(sandbox_id, spec),
            capability_args=cni_args.capability_args(spec, pod_ranges),
            conflist=conflist,
            bin_dirs=self._bin_dirs,
        )
        if "portMappings" in attachment.capability_args and not cni.offers(conflist, "portMappings"):
            log.warning("sandbox %s: network %s publishes no host ports", sandbox_id, conflist.name)
        async with self._lock(sandbox_id):
            if record.exists() or path.exists():
                raise NetworkError("it has a network", phase="cni add", resource=f"sandbox {sandbox_id}")
            try:
                return await self._attach(attachment, device_mac)
            except BaseException as e:
                try:
                    await netns.to_the_end(self._detach(sandbox_id, forget_netns=True))
                except VmrtError as undo:
                    log.warning("undoing the network of sandbox %s: %s", sandbox_id, undo)
                    e.add_note(f"undoing it failed as well: {undo}")
                raise

    async def _attach(self, attachment: cni.Attachment, device_mac: str) -> PodNetwork:
        path, record = Path(attachment.netns), self._record(attachment.container_id)

        def prepare() -> None:
            cni.write_durably(record, cni.to_record(attachment))
            netns.create(path)

        async def keep(newer: cni.Attachment) -> None:
            # Of a chain that a failure of the machine cuts off only addresses stay held, and to free them the plugins
            # need no result: what was written before the first of them will do.
            if not newer.complete:
                write = functools.partial(cni.write_durably, synced=False)
                await netns.in_thread(write, record, cni.to_record(newer))

        def finish(done: cni.Attachment) -> tuple[InterfaceState, ...]:
            cni.write_durably(record, cni.to_record(done))
            return netns.read_interfaces(path, IFNAME)

        await netns.in_thread(prepare)
        done = await cni.add(attachment, self._config.cni_timeout_s, keep)
        states = await netns.in_thread(finish, done)
        return pod_network(path, cni.parse_result(done.result or {}, IFNAME), states, device_mac)

    async def teardown(self, sandbox_id: str) -> None:
        """Run CNI DEL with what ADD returned and remove the netns. Idempotent; works with nothing but the id.

        Raises `NetworkError` when DEL fails repeatedly; the record stays, so that it can be called again.
        """
        self._netns(sandbox_id)
        async with self._lock(sandbox_id):
            await self._detach(sandbox_id, forget_netns=False)

    async def _detach(self, sandbox_id: str, *, forget_netns: bool) -> None:
        path, record = self._netns(sandbox_id), self._record(sandbox_id)
        try:
            attachment = await self._recall(sandbox_id)
            if attachment is not None:
                await self._delete(attachment)
        except BaseException:
            if forget_netns:
                await netns.in_thread(netns.remove, path)
            raise
        if attachment is not None and (addresses := udp_published(attachment)):
            try:
                await netns.in_thread(conntrack.forget_udp, addresses)
            except NetworkError as e:
                # They end by themselves when their clients fall silent.
                log.warning("sandbox %s: %s", sandbox_id, e)

        def forget() -> None:
            netns.remove(path)
            record.unlink(missing_ok=True)

        await netns.in_thread(forget)

    async def _recall(self, sandbox_id: str) -> cni.Attachment | None:
        record = self._record(sandbox_id)
        if not record.exists():
            return None
        try:
            return cni.from_record(await asyncio.to_thread(record.read_bytes))
        except NetworkError as e:
            # What it was added with is lost; the present configuration frees at least the address.
            log.warning("%s: %s: using the present configuration for DEL", record, e)
            path = str(self._netns(sandbox_id))
            return cni.Attachment(sandbox_id, path, IFNAME, "", {}, await self._conflist(), self._bin_dirs)

    async def _delete(self, attachment: cni.Attachment) -> None:
        path, addresses = Path(attachment.netns), masqueraded(attachment)

        def look() -> tuple[bool, bool]:
            whole = not addresses or netns.has_addresses(path, attachment.ifname, addresses)
            return netns.exists(path), whole

        for attempt, pause_s in enumerate(DELETE_PAUSES_S, start=1):
            await asyncio.sleep(pause_s)
            held, whole = await netns.in_thread(look)
            if not whole and await self._restore(attachment, addresses):
                held = True
            try:
                await cni.delete(
                    attachment if held else replace(attachment, netns=""), timeout_s=self._config.cni_timeout_s
                )
                return
            except NetworkError as e:
                if attempt == len(DELETE_PAUSES_S) or isinstance(e.__cause__, DeadlineError):
                    raise
                log.info("sandbox %s: trying again: %s", attachment.container_id, e)

    async def _restore(self, attachment: cni.Attachment, addresses: Sequence[str]) -> bool:
        """See that the bridge and ptp plugins (1.1.1 and later) find their masquerading rules; say if there were any.

        They remove the rules of the addresses that they find on the interface: where it is gone, with the whole
        netns or by an earlier attempt, DEL succeeds and leaks them. Where it is there and the rules are gone (after a
        reboot), DEL fails for ever. So the addresses are put back that still have rules.
        """
        path = Path(attachment.netns)
        wanted = []
        for version, tool in ((4, "iptables-save"), (6, "ip6tables-save")):
            entries = [
                line for line in (await netfilter_rules(tool, "nat")).splitlines() if line.startswith(b"-A POSTROUTING")
            ]
            if any(attachment.container_id.encode() in line for line in entries):
                wanted += [cidr for cidr in addresses if ipaddress.ip_interface(cidr).version == version]

        def restore() -> None:
            if not netns.exists(path):
                netns.remove(path)
                netns.create(path)
            netns.stand_in(path, attachment.ifname, tuple(wanted))

        if wanted:
            log.info("sandbox %s: putting back %s for DEL", attachment.container_id, ", ".join(wanted))
            await netns.in_thread(restore)
        return bool(wanted)

    async def check(self, sandbox_id: str) -> None:
        """Run CNI CHECK; raise `NetworkError` when a plugin finds the pod's network not as ADD left it."""
        attachment = await self._recall(sandbox_id)
        if attachment is None or not attachment.complete:
            raise NetworkError("it has no network", phase="cni check", resource=f"sandbox {sandbox_id}")
        await cni.verify(attachment, self._config.cni_timeout_s)

    def list(self) -> Sequence[str]:
        """Return the sandbox ids for which a netns or a cached CNI result exists under our root."""
        names: set[str] = set()
        with contextlib.suppress(FileNotFoundError):
            names |= {path.name for path in self._netns_dir.iterdir()}
        with contextlib.suppress(FileNotFoundError):
            names |= {path.stem for path in self._record_dir.iterdir() if path.suffix == ".json"}
        return sorted(name for name in names if _SANDBOX_ID.fullmatch(name))

    # --- readiness ----------------------------------------------------------------------------------------------------

    async def status(self) -> tuple[bool, str, str]:
        """Return (ready, reason, message) for CRI's NetworkReady condition."""
        try:
            conflist = await self._conflist()
            self._refuse_missing(conflist, "")
            await self._ask_plugins(conflist)
        except NetworkError as e:
            return False, NOT_READY, str(e)
        message = f"network {conflist.name} of {conflist.source}"
        if conflist.source == BUILT_IN and self._fallback.limits:
            message += f"; {self._fallback.limits}"
        return True, "", message

    async def _ask_plugins(self, conflist: cni.ConfList) -> None:
        """Run STATUS, whose answer is kept for a while: kubelet asks every few seconds."""
        known = self._plugin_status
        if known is None or known[1] != conflist.source or time.monotonic() - known[0] >= STATUS_AGE_S:
            asker = cni.Attachment("status", "", IFNAME, "", {}, conflist, self._bin_dirs)
            answer = ""
            try:
                await cni.verify(asker, self._config.cni_timeout_s, "STATUS")
            except NetworkError as e:
                answer = e.message
            known = self._plugin_status = (time.monotonic(), conflist.source, answer)
        if known[2]:
            raise NetworkError(known[2], phase="cni status")

    def _refuse_missing(self, conflist: cni.ConfList, sandbox_id: str) -> None:
        missing = cni.missing_plugins(conflist, self._bin_dirs)
        if missing:
            raise NetworkError(
                f"network {conflist.name} of {conflist.source} needs CNI plugins that are in none of "
                f"{', '.join(self._bin_dirs) or 'no directories'}: {', '.join(missing)}",
                phase="cni add" if sandbox_id else "cni config",
                resource=f"sandbox {sandbox_id}" if sandbox_id else "",
                hint=cni.INSTALL_HINT,
            )

    async def _conflist(self) -> cni.ConfList:
        """Return the configuration as it is now: the directory is read each time, so a change needs no restart."""
        directory = self._config.cni_config_dir
        files = await asyncio.to_thread(cni.read_config_dir, directory)
        if not any(map(cni.is_candidate, files)):
            if self._config.fallback_subnet:
                return await self._fallback.conflist()
            raise NetworkError(
                f"no configuration in {directory}",
                phase="cni config",
                hint="install a CNI network, or set network.fallback_subnet",
            )
        chosen, problems = cni.choose(files)
        if chosen is None:
            raise NetworkError(f"no valid configuration in {directory}: {'; '.join(problems)}", phase="cni config")
        return replace(chosen, source=str(directory / chosen.source))

    # --- names --------------------------------------------------------------------------------------------------------

    def _netns(self, sandbox_id: str) -> Path:
        if not _SANDBOX_ID.fullmatch(sandbox_id):
            raise NetworkError(f"{sandbox_id!r} is no sandbox id", phase="netns")
        return self._netns_dir / sandbox_id

    def _record(self, sandbox_id: str) -> Path:
        return self._record_dir / f"{sandbox_id}.json"

    def _lock(self, sandbox_id: str) -> asyncio.Lock:
        return self._locks.setdefault(sandbox_id, asyncio.Lock())


# --- decisions --------------------------------------------------------------------------------------------------------


def pod_network(path: Path, result: cni.Result, states: Sequence[InterfaceState], device_mac: str) -> PodNetwork:
    """Say what the guest is to configure, from the CNI result and from what the netns really has.

    `states` begin with the pod's own interface. The result names the addresses of that one; of the others it need not
    know anything (meta plugins return their default network's).
    """
    own, *others = states
    # The order is the result's (primary first); what it does not name follows. IPv4 comes before IPv6.
    known = [cidr for cidr in result.addresses if cidr in own.addresses] or [*result.addresses]
    known += [cidr for cidr in own.addresses if cidr not in known]
    known.sort(key=lambda cidr: ipaddress.ip_interface(cidr).version)
    if not known:
        raise NetworkError("the plugins gave the pod no address", phase="cni result", resource=str(path))
    kernel_routes = own.routes or tuple(
        KernelRoute(route.destination, route.gateway, scope=route.scope, metric=route.metric) for route in result.routes
    )
    interfaces = [GuestInterface(own.name, device_mac, own.mac, own.mtu, guest_addresses(known, own.routes))]
    routes = [*guest_routes(kernel_routes, own.name)]
    for state in others:
        # Its NIC is plugged when this is known, with the address that it is to have.
        addresses = guest_addresses(state.addresses, state.routes)
        interfaces.append(GuestInterface(state.name, state.mac, state.mac, state.mtu, addresses))
        # Of a route over several interfaces one way is kept: the kernel takes a destination once for each metric.
        taken = {(route.destination, route.metric) for route in routes}
        more = [r for r in state.routes if r.connected or (r.destination, r.metric) not in taken]
        routes += guest_routes(more, state.name)
    return PodNetwork(
        netns=path,
        ips=tuple(cidr.partition("/")[0] for cidr in known),
        interfaces=tuple(interfaces),
        routes=tuple(routes),
        neighbours=tuple(
            GuestNeighbour(address, mac, state.name) for state in states for address, mac in state.neighbours
        ),
        dns=result.dns,
    )


def guest_addresses(cidrs: Sequence[str], routes: Sequence[KernelRoute]) -> tuple[str, ...]:
    """Return the addresses with the prefix lengths that make the guest's kernel add the netns's connected routes.

    The ptp plugin, for one, gives 10.1.0.2/24 and removes the connected route, so that all goes through the gateway:
    such an address reaches the guest as /32.
    """
    connected = {ipaddress.ip_network(route.destination) for route in routes if route.connected}
    addresses = []
    for cidr in cidrs:
        interface = ipaddress.ip_interface(cidr)
        whole = not routes or interface.network in connected
        addresses.append(cidr if whole else f"{interface.ip}/{interface.max_prefixlen}")
    return tuple(addresses)


def guest_routes(routes: Sequence[KernelRoute], interface: str = IFNAME) -> tuple[GuestRoute, ...]:
    """Return the routes that the guest's kernel does not make by itself, in an order in which it accepts them.

    Routes without a gateway come first, as they make the gateways reachable; then the narrower before the wider, so
    defaults are last. A gateway that no such route covers (the netns has it "onlink") gets a route of its own.
    """
    reachable = [ipaddress.ip_network(route.destination) for route in routes if not route.gateway]
    extra: dict[str, GuestRoute] = {}
    plain = []
    for route in routes:
        if route.connected:
            continue
        plain.append(GuestRoute(route.destination, route.gateway, interface, route.source, route.scope, route.metric))
        if route.gateway:
            gateway = ipaddress.ip_address(route.gateway)
            link_local = gateway.version == 6 and gateway.is_link_local
            if not link_local and not any(gateway in network for network in reachable):
                alone = f"{gateway}/{gateway.max_prefixlen}"
                extra[alone] = GuestRoute(alone, "", interface, scope=253 if gateway.version == 4 else 0)
    plain.sort(key=lambda route: (route.gateway != "", -ipaddress.ip_network(route.destination).prefixlen))
    return (*extra.values(), *plain)


def udp_published(attachment: cni.Attachment) -> tuple[str, ...]:
    """Return the pod's addresses if host ports have led UDP to them."""
    mappings = attachment.capability_args.get("portMappings", [])
    if attachment.result is None or not any(mapping["protocol"].lower() == "udp" for mapping in mappings):
        return ()
    return tuple(cidr.partition("/")[0] for cidr in cni.parse_result(attachment.result, attachment.ifname).addresses)


def read_pod_ranges(path: Path) -> tuple[str, ...]:
    """Return the pod CIDRs that were written down last; none where there is no such file, or it is damaged."""
    try:
        return tuple(str(cidr) for cidr in json.loads(path.read_bytes())["ranges"])
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, KeyError, TypeError) as e:
        log.warning("%s: %r: going on without the node's pod ranges until kubelet tells them again", path, e)
        return ()


def masqueraded(attachment: cni.Attachment) -> tuple[str, ...]:
    """Return the addresses (CIDR) for which a chain has made masquerading rules."""
    if attachment.result is None or not any(plugin.get("ipMasq") is True for plugin in attachment.conflist.plugins):
        return ()
    return cni.parse_result(attachment.result, attachment.ifname).addresses
