"""The runtime's side of the Container Network Interface: configuration, requests, results and running the plugins.

Source: containernetworking/cni SPEC.md, versions 0.3.0 to 1.1.0, and CONVENTIONS.md for capability arguments. Where the
specification leaves a choice, libcni's is taken, because kubelet's users know it: files ending in .conf, .conflist or
.json, in name order, the first valid one wins.

Rules: decisions are pure functions; only `read_config_dir`, `find_plugin`, `invoke` and `write_durably` touch the
system. DEL always runs with the `Attachment` that ADD ran with, never with what the configuration has become since.
What plugins are told of the pod is made by `cni_args`.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import os
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vmrt import spawn
from vmrt.errors import DeadlineError, NetworkError, ProcessError
from vmrt.model import DnsConfig

Json = dict[str, Any]

VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
CONFIG_LIMIT_BYTES = 1024 * 1024
INSTALL_HINT = "apt-get install containernetworking-plugins, or set network.cni_bin_dirs"

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*")
# Debian's service managers often leave the sbin directories out, and the plugins look for iptables on PATH.
_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"


class CniError(NetworkError):
    """A plugin refused: `plugin` is its type, `cni_code` the specification's error code (0 when it gave none)."""

    def __init__(
        self, message: str, *, phase: str = "", resource: str = "", hint: str = "", plugin: str = "", cni_code: int = 0
    ) -> None:
        super().__init__(message, phase=phase, resource=resource, hint=hint)
        self.plugin = plugin
        self.cni_code = cni_code


@dataclass(frozen=True, slots=True)
class ConfList:
    """One network configuration list. `plugins` are the plugins' objects unchanged; `source` says where it is from."""

    name: str
    version: str
    plugins: tuple[Json, ...]
    source: str
    disable_check: bool = False

    @property
    def types(self) -> tuple[str, ...]:
        """The plugin programs that a chain needs, delegated IPAM plugins included, each once."""
        names: list[str] = []
        for plugin in self.plugins:
            ipam = plugin.get("ipam")
            names += [plugin["type"], ipam.get("type", "") if isinstance(ipam, dict) else ""]
        return tuple(dict.fromkeys(name for name in names if name))


@dataclass(frozen=True, slots=True)
class Attachment:
    """All that ADD was run with and has returned so far: the same goes into DEL and CHECK.

    `result` is the last plugin's result as it came, None before the first; `complete` says that the chain has ended.
    """

    container_id: str
    netns: str
    ifname: str
    args: str
    capability_args: Json
    conflist: ConfList
    bin_dirs: tuple[str, ...]
    result: Json | None = None
    complete: bool = False

    @property
    def resource(self) -> str:
        """How errors name it."""
        return f"sandbox {self.container_id}"


@dataclass(frozen=True, slots=True)
class ResultRoute:
    """A route as the plugins returned it; `gateway` may be "" for "the gateway of the address"."""

    destination: str
    gateway: str
    metric: int = 0
    scope: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """A result of any version in one form. `addresses` are CIDRs of the pod's interface, IPv4 first."""

    addresses: tuple[str, ...]
    routes: tuple[ResultRoute, ...]
    dns: DnsConfig | None


# --- configuration ----------------------------------------------------------------------------------------------------


def read_config_dir(directory: Path) -> dict[str, bytes]:
    """Return the configuration files of a directory and of its drop-in directories, keyed by relative path.

    A directory that does not exist is an empty one. Raises `NetworkError` when it cannot be read.
    """
    files: dict[str, bytes] = {}
    try:
        for pattern in ("*.conf", "*.conflist", "*.json", "*/*.conf"):
            for path in directory.glob(pattern):
                if path.is_file():
                    with path.open("rb") as file:
                        files[str(path.relative_to(directory))] = file.read(CONFIG_LIMIT_BYTES)
    except OSError as e:
        raise NetworkError(f"cannot read {e.filename}: {e.strerror}", phase="cni config") from e
    return files


def is_candidate(name: str) -> bool:
    """Say whether a file of `read_config_dir` is a configuration by itself (and no drop-in)."""
    return "/" not in name


def choose(files: Mapping[str, bytes]) -> tuple[ConfList | None, tuple[str, ...]]:
    """Return the first valid configuration in name order, and what is wrong with those before it."""
    problems: list[str] = []
    for name in sorted(filter(is_candidate, files)):
        try:
            return parse_conflist(name, files[name], files), tuple(problems)
        except NetworkError as e:
            problems.append(e.message)
    return None, tuple(problems)


def parse_conflist(name: str, text: bytes, drop_ins: Mapping[str, bytes] | None = None) -> ConfList:
    """Parse one file: a list, or a single plugin's configuration (not ``.conflist``), which becomes a list of one.

    Plugins of a list are completed by `drop_ins` from the directory named after the network (since 1.1.0). Raises
    `NetworkError` that names file and key.
    """
    whole = _object(name, text)
    single = not name.endswith(".conflist") and "plugins" not in whole
    plugins = [whole] if single else whole.get("plugins", [])
    network = whole.get("name")
    if not isinstance(network, str) or not _NAME.fullmatch(network):
        raise NetworkError(f"{name}: name must be a word of letters, digits, '_', '.' and '-', not {network!r}")
    if not isinstance(plugins, list):
        raise NetworkError(f"{name}: plugins must be a list")
    if not single and whole.get("loadOnlyInlinedPlugins") is not True:
        drops = sorted(path for path in drop_ins or {} if path.startswith(f"{network}/"))
        plugins = plugins + [_object(path, (drop_ins or {})[path]) for path in drops]
    if not plugins:
        raise NetworkError(f"{name}: the list has no plugins")
    for plugin in plugins:
        kind = plugin.get("type") if isinstance(plugin, dict) else None
        if not isinstance(kind, str) or not _NAME.fullmatch(kind):
            raise NetworkError(f"{name}: every plugin needs a type that is a file name, not {kind!r}")
    return ConfList(
        network, _version(name, whole), tuple(plugins), name, str(whole.get("disableCheck")).lower() == "true"
    )


def _object(name: str, text: bytes) -> Json:
    try:
        value = json.loads(text)
    except ValueError as e:
        raise NetworkError(f"{name}: not JSON: {e}") from e
    if not isinstance(value, dict):
        raise NetworkError(f"{name}: not a JSON object")
    return value


def _version(name: str, whole: Json) -> str:
    """Select the highest version that configuration and we support (SPEC.md, version considerations)."""
    several = whole.get("cniVersions")
    stated = [whole.get("cniVersion"), *(several if isinstance(several, list) else [])]
    usable = [version for version in VERSIONS if version in stated]
    if not usable:
        wanted = ", ".join(str(version) for version in stated if version) or "none"
        raise NetworkError(f"{name}: cniVersion: vmrt speaks {VERSIONS[0]} to {VERSIONS[-1]}, the file states {wanted}")
    return usable[-1]


# --- requests ---------------------------------------------------------------------------------------------------------


def offers(conflist: ConfList, capability: str) -> bool:
    """Say whether some plugin of the chain declares the capability."""
    return any(_capabilities(plugin).get(capability) is True for plugin in conflist.plugins)


def _capabilities(plugin: Json) -> Json:
    value = plugin.get("capabilities")
    return value if isinstance(value, dict) else {}


def request_config(attachment: Attachment, index: int, command: str) -> Json:
    """Return what plugin number `index` reads (SPEC.md, deriving request configuration from plugin configuration)."""
    conflist = attachment.conflist
    plugin = conflist.plugins[index]
    config = {key: value for key, value in plugin.items() if key not in ("capabilities", "cniVersions", "prevResult")}
    config |= {"cniVersion": conflist.version, "name": conflist.name}
    runtime = {
        name: attachment.capability_args[name]
        for name, wanted in _capabilities(plugin).items()
        if wanted is True and name in attachment.capability_args
    }
    if runtime:
        config["runtimeConfig"] = runtime
    # DEL has no previous result before 0.4.0.
    if attachment.result is not None and not (command == "DEL" and conflist.version.startswith("0.3.")):
        config["prevResult"] = attachment.result
    return config


def search_path(inherited: Mapping[str, str]) -> str:
    """Return the PATH of plugins and of what they call."""
    return f"{inherited.get('PATH', '/usr/bin:/bin')}:{_SBIN}"


def environment(attachment: Attachment, command: str, inherited: Mapping[str, str]) -> dict[str, str]:
    """Return a plugin's environment: ours, the CNI parameters, and a PATH on which iptables is found."""
    variables = {
        **inherited,
        "PATH": search_path(inherited),
        "CNI_COMMAND": command,
        "CNI_PATH": ":".join(attachment.bin_dirs),
    }
    if command in ("STATUS", "GC"):  # of the network, not of a container
        return variables
    return variables | {
        "CNI_CONTAINERID": attachment.container_id,
        "CNI_NETNS": attachment.netns,
        "CNI_IFNAME": attachment.ifname,
        "CNI_ARGS": attachment.args,
    }


# --- results ----------------------------------------------------------------------------------------------------------


def parse_result(result: Json, ifname: str) -> Result:
    """Bring a result of any supported version into one form; raise `NetworkError` for one that is malformed.

    An address counts when it names no interface, or one inside a sandbox that is called `ifname`.
    """
    try:
        interfaces = [_object_of(entry) for entry in result.get("interfaces") or []]
        addresses: list[ipaddress.IPv4Interface | ipaddress.IPv6Interface] = []
        gateways: dict[int, str] = {}
        for entry in map(_object_of, result.get("ips") or []):
            index = entry.get("interface")
            if index is not None:
                interface = interfaces[int(index)] if 0 <= int(index) < len(interfaces) else {}
                if not interface.get("sandbox") or interface.get("name") != ifname:
                    continue
            address = ipaddress.ip_interface(entry["address"])
            addresses.append(address)
            if entry.get("gateway"):
                gateways.setdefault(address.version, str(ipaddress.ip_address(entry["gateway"])))
        routes = []
        for entry in map(_object_of, result.get("routes") or []):
            destination = ipaddress.ip_network(entry["dst"], strict=False)
            # A link-scoped route has no gateway; else the specification lets the address's own stand in.
            scope = int(entry.get("scope") or 0)
            gateway = entry.get("gw") or ("" if scope else gateways.get(destination.version, ""))
            gateway = str(ipaddress.ip_address(gateway)) if gateway else ""
            routes.append(ResultRoute(str(destination), gateway, int(entry.get("priority") or 0), scope))
        dns = _dns(_object_of(result.get("dns") or {}))
    except (KeyError, ValueError, TypeError) as e:
        raise NetworkError(f"the result is malformed: {e!r}", phase="cni result") from e
    addresses.sort(key=lambda address: address.version)
    return Result(tuple(str(address) for address in addresses), tuple(routes), dns)


def _object_of(value: object) -> Json:
    if not isinstance(value, dict):
        raise TypeError(f"an object was expected, not {value!r}")
    return value


def _dns(table: Json) -> DnsConfig | None:
    searches = tuple(str(search) for search in table.get("search") or ())
    if not searches and table.get("domain"):
        searches = (str(table["domain"]),)
    dns = DnsConfig(
        tuple(str(server) for server in table.get("nameservers") or ()),
        searches,
        tuple(str(option) for option in table.get("options") or ()),
    )
    return None if dns == DnsConfig() else dns


def parse_error(stdout: bytes, stderr: bytes, status: int) -> tuple[int, str]:
    """Return (code, text) of a failed plugin, from its error object or else from what it wrote."""
    try:
        error = _object_of(json.loads(stdout))
        parts = [str(error[key]) for key in ("msg", "details") if error.get(key)]
        if parts:
            return int(error.get("code") or 0), "; ".join(parts)
    except (ValueError, TypeError):
        pass
    words = (stderr.strip() or stdout.strip())[-spawn.STDERR_TAIL_BYTES :].decode(errors="replace")
    return 0, words or f"it exited with status {status} and no message"


# --- running ----------------------------------------------------------------------------------------------------------


def find_plugin(kind: str, bin_dirs: Sequence[str]) -> Path:
    """Find a plugin's program; raise `NetworkError` that names the directories searched."""
    for directory in bin_dirs:
        path = Path(directory, kind)
        if path.is_file() and os.access(path, os.X_OK):
            return path
    raise CniError(
        f"the plugin {kind} is in none of {', '.join(bin_dirs) or 'no directories'}", hint=INSTALL_HINT, plugin=kind
    )


def missing_plugins(conflist: ConfList, bin_dirs: Sequence[str]) -> tuple[str, ...]:
    """Return the programs that a chain needs and that are not there."""
    missing = []
    for kind in conflist.types:
        try:
            find_plugin(kind, bin_dirs)
        except NetworkError:
            missing.append(kind)
    return tuple(missing)


async def invoke(
    attachment: Attachment, index: int, command: str, timeout_s: float, more: Json | None = None
) -> Json | None:
    """Run one plugin; return its result for ADD, else None. Raises `CniError`. Cancelling kills the plugin.

    `more` is added to what it reads.
    """
    kind = attachment.conflist.plugins[index]["type"]

    def failed(text: str, hint: str = "", code: int = 0) -> CniError:
        phase = f"cni {command.lower()}"
        message = f"plugin {kind}: {text}"
        return CniError(message, phase=phase, resource=attachment.resource, hint=hint, plugin=kind, cni_code=code)

    try:
        done = await spawn.run(
            [find_plugin(kind, attachment.bin_dirs)],
            input_bytes=json.dumps(request_config(attachment, index, command) | (more or {})).encode(),
            env=environment(attachment, command, os.environ),
            timeout_s=timeout_s,
            check=False,
        )
    except (ProcessError, DeadlineError, CniError) as e:
        raise failed(e.message, e.hint) from e
    if done.status != 0:
        code, text = parse_error(done.stdout, done.stderr, done.status)
        hint = f"network {attachment.conflist.name} of {attachment.conflist.source}"
        raise failed(text, hint, code)
    if command != "ADD":
        return None
    try:
        result = _object_of(json.loads(done.stdout))
        parse_result(result, attachment.ifname)
    except (ValueError, TypeError, NetworkError) as e:
        raise failed(f"its answer is no CNI result: {e}") from e
    return result


async def add(attachment: Attachment, timeout_s: float, record: Callable[[Attachment], Awaitable[None]]) -> Attachment:
    """Run the chain's ADD; `record` is called after every plugin, so that DEL always has the newest result.

    Raises `CniError` at the first plugin that fails: the caller then runs `delete` with what was recorded last.
    """
    last = len(attachment.conflist.plugins) - 1
    for index in range(last + 1):
        result = await invoke(attachment, index, "ADD", timeout_s)
        attachment = replace(attachment, result=result, complete=index == last)
        await record(attachment)
    return attachment


async def delete(attachment: Attachment, timeout_s: float) -> None:
    """Run the chain's DEL, last plugin first.

    A plugin that fails keeps none of the others from cleaning up; the first error is raised at the end.
    """
    first: CniError | None = None
    for index in reversed(range(len(attachment.conflist.plugins))):
        try:
            await invoke(attachment, index, "DEL", timeout_s)
        except CniError as e:
            first = first or e
    if first is not None:
        raise first


async def collect(attachment: Attachment, valid: Sequence[tuple[str, str]], timeout_s: float) -> None:
    """Run the chain's GC (1.1.0): plugins free what belongs to none of the (container id, interface) of `valid`.

    All plugins are run; the first error is raised at the end.
    """
    conflist = attachment.conflist
    if VERSIONS.index(conflist.version) < VERSIONS.index("1.1.0"):
        return
    attachments = [{"containerID": container_id, "ifname": ifname} for container_id, ifname in valid]
    first: CniError | None = None
    for index in range(len(conflist.plugins)):
        try:
            await invoke(attachment, index, "GC", timeout_s, {"cni.dev/valid-attachments": attachments})
        except CniError as e:
            first = first or e
    if first is not None:
        raise first


async def verify(attachment: Attachment, timeout_s: float, command: str = "CHECK") -> None:
    """Run the chain's CHECK (0.4.0 and later) or STATUS (1.1.0); older or exempt chains always pass."""
    since = VERSIONS.index("0.4.0" if command == "CHECK" else "1.1.0")
    conflist = attachment.conflist
    if VERSIONS.index(conflist.version) < since or (command == "CHECK" and conflist.disable_check):
        return
    for index in range(len(conflist.plugins)):
        await invoke(attachment, index, command, timeout_s)


# --- records ----------------------------------------------------------------------------------------------------------


def to_record(attachment: Attachment) -> bytes:
    """Return the attachment as JSON for the disk."""
    return json.dumps({"format": 1, **dataclasses.asdict(attachment)}).encode()


def from_record(text: bytes) -> Attachment:
    """Read back what `to_record` wrote; raise `NetworkError` for anything else."""
    try:
        table = _object_of(json.loads(text))
        if table.pop("format") != 1:
            raise ValueError("of an unknown format")
        conflist = table.pop("conflist")
        conflist["plugins"] = tuple(map(_object_of, conflist["plugins"]))
        table["bin_dirs"] = tuple(table["bin_dirs"])
        return Attachment(conflist=ConfList(**conflist), **table)
    except (KeyError, TypeError, ValueError) as e:
        raise NetworkError(f"the record of an attachment is damaged: {e!r}", phase="cni record") from e


def write_durably(path: Path, content: bytes, *, synced: bool = True) -> None:
    """Replace a file atomically; it is on disk when this returns. Raises `NetworkError`, leaving the old file.

    When not `synced` it outlives this process, but not a failure of the machine.
    """
    temporary = path.with_name(f".{path.name}.new")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            if synced:
                os.fsync(fd)
        temporary.replace(path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise NetworkError(f"cannot write {path}: {e.strerror}", phase="cni record") from e
