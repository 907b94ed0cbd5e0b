"""What `vmrt doctor` finds on this machine: all of its I/O, no judgement (that is `vmrt.cli.checks`).

Everything is tried rather than looked up where trying is cheap and leaves nothing: libvirt's driver is opened on a
throw-away root, iptables and tc work on a network namespace made for it. A fact that could not be found out carries the
reason as its `error`; nothing here raises.
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import json
import os
import pwd
import re
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import vmrt.cli
from vmrt import spawn
from vmrt.cli.app import Options
from vmrt.config import Config
from vmrt.errors import VmrtError

PROBE_TIMEOUT_S = 20.0
QBOOT = Path("/usr/share/qemu/qboot.rom")
# Where distributions put virtiofsd: none of these is on PATH.
VIRTIOFSD = (Path("/usr/libexec/virtiofsd"), Path("/usr/lib/virtiofsd"), Path("/usr/lib/qemu/virtiofsd"))
# Where vmrt.pods.seccomp finds the profile RuntimeDefault.
SECCOMP_PROFILES = (Path("/etc/containers/seccomp.json"), Path("/usr/share/containers/seccomp.json"))
SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")
# What the bridge plugin's ipMasq asks of iptables.
NAT_RULES = b"*nat\n-A POSTROUTING -m comment --comment vmrt -j MASQUERADE\nCOMMIT\n"
CAP_NET_ADMIN, CAP_SYS_ADMIN, CAP_SYS_RESOURCE = 12, 21, 24  # capabilities(7), linux/capability.h
# Run in a process of its own: the embedded driver starts threads and keeps state for the life of the process.
_LIBVIRT_PROBE = """
import sys
import libvirt
libvirt.registerErrorHandler(lambda *_: None, None)
libvirt.virEventRegisterDefaultImpl()
try:
    version = libvirt.open(sys.argv[1]).getLibVersion()
except libvirt.libvirtError as e:
    sys.exit(e.get_error_message())
print(f"{version // 1000000}.{version // 1000 % 1000}.{version % 1000}")
"""


@dataclass(frozen=True, slots=True)
class Tool:
    """A program: where it is ("" when absent), its version, and why it could not be asked for it."""

    path: str = ""
    version: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Device:
    """A device node: whether it is there, and whether we and QEMU's user may open it (and why we may not)."""

    present: bool = False
    error: str = ""
    for_qemu_user: bool = False


@dataclass(frozen=True, slots=True)
class CniNetwork:
    """The first configuration in the CNI directory; `plugins` are the types it names."""

    file: str = ""
    plugins: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True, slots=True)
class GuestFact:
    """The guest image, or why it cannot be used."""

    directory: str = ""
    version: str = ""
    kernel_release: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class DaemonFact:
    """Who answers on the socket, or why nobody does."""

    socket: str = ""
    version: str = ""
    pid: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True)
class DelegateFact:
    """A delegate's endpoint and the handlers that go there: who answers, or why nobody does.

    `not_ready` is what its RuntimeReady condition says where it is false. `cgroup_driver` is "" where it does not tell.
    """

    endpoint: str = ""
    handlers: tuple[str, ...] = ()
    version: str = ""
    not_ready: str = ""
    cgroup_driver: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """The machine as `vmrt.cli.checks` sees it. Sizes in octets."""

    config: Config = field(default_factory=Config)
    uid: int = 0
    capabilities: int = (1 << 41) - 1
    kvm: Device = Device()
    # Why a guest does not boot under KVM, "" when one does, None when it was not tried.
    kvm_failure: str | None = None
    qemu: Tool = Tool()
    qboot: bool = False
    qemu_user: str = ""
    libvirt: Tool = Tool()
    kernel_vsock: Device = Device()
    vhost_device_vsock: Tool = Tool()
    virtiofsd: Tool = Tool()
    tun: Device = Device()
    # Why traffic control or iptables failed when tried, "" when they work, None when they could not be tried.
    redirect_failure: str | None = None
    nat_failure: str | None = None
    cni_plugins: tuple[str, ...] = ()
    cni_network: CniNetwork = CniNetwork()
    skopeo: Tool = Tool()
    policy_json: str = ""
    registries_conf: str = ""
    apparmor_parser: Tool = Tool()
    seccomp_json: str = ""
    busctl: str = ""
    guest: GuestFact = GuestFact()
    disk_free_bytes: int = 0
    memory_available_bytes: int = 0
    cgroup_version: int = 0
    cgroup_controllers: tuple[str, ...] = ()
    daemon: DaemonFact = DaemonFact()
    delegates: tuple[DelegateFact, ...] = ()
    systemd: bool = False


async def gather(config: Config, options: Options) -> Facts:
    """Find out everything, side by side; takes a few seconds at most."""
    h = config.hypervisor
    user = _groups_of(h.qemu_user)
    async with asyncio.TaskGroup() as group:
        start = group.create_task
        qemu, vhost_device = start(_tool(str(h.qemu_binary))), start(_tool(str(h.vhost_device_vsock)))
        virtiofsd, skopeo = start(_tool(h.virtiofsd or _first(VIRTIOFSD))), start(_tool("skopeo"))
        apparmor_parser = start(_tool("apparmor_parser"))
        libvirt, trial, failure = start(_libvirt(config)), start(_network_trial()), start(_kvm_failure(config))
        daemon = start(asyncio.to_thread(_daemon, options))
        guest = start(asyncio.to_thread(_guest, config))
        delegates = start(asyncio.to_thread(_delegates, config))
    version, controllers = _cgroups()
    return Facts(
        config=config,
        uid=os.geteuid(),
        capabilities=_capabilities(),
        kvm=_device(Path("/dev/kvm"), user),
        kvm_failure=failure.result(),
        qemu=qemu.result(),
        qboot=os.access(QBOOT, os.R_OK),
        qemu_user=h.qemu_user if user else "",
        libvirt=libvirt.result(),
        kernel_vsock=_device(Path("/dev/vhost-vsock"), user),
        vhost_device_vsock=vhost_device.result(),
        virtiofsd=virtiofsd.result(),
        tun=_device(Path("/dev/net/tun"), user),
        redirect_failure=trial.result()[0],
        nat_failure=trial.result()[1],
        cni_plugins=_cni_plugins(config),
        cni_network=_cni_network(config.network.cni_config_dir),
        skopeo=skopeo.result(),
        policy_json=_existing(config.images.policy_json, "/etc/containers/policy.json"),
        registries_conf=_existing(config.images.registries_conf, "/etc/containers/registries.conf"),
        apparmor_parser=apparmor_parser.result(),
        seccomp_json=next((str(path) for path in SECCOMP_PROFILES if path.exists()), ""),
        busctl=_which("busctl"),
        guest=guest.result(),
        disk_free_bytes=_free_bytes(config.root),
        memory_available_bytes=_memory_available(),
        cgroup_version=version,
        cgroup_controllers=controllers,
        daemon=daemon.result(),
        delegates=delegates.result(),
        systemd=_runs_systemd(),
    )


# --- programs ---------------------------------------------------------------------------------------------------------


def _which(name: str) -> str:
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *SBIN])
    return shutil.which(name, path=path) or ""


def _first(paths: tuple[Path, ...]) -> str:
    return next((str(path) for path in paths if path.exists()), "virtiofsd")


async def _tool(name: str) -> Tool:
    path = _which(name)
    if not path:
        return Tool(error=f"{name} is not installed")
    try:
        done = await spawn.run([path, "--version"], timeout_s=PROBE_TIMEOUT_S, check=False)
    except VmrtError as e:
        return Tool(path, error=str(e))
    output = (done.stdout + done.stderr).decode(errors="replace")
    found = re.search(r"\d+(?:\.\d+)+(?:\+vmrt\.\d+)?", output)
    if found is None:
        return Tool(path, error=f"{path} --version says {output.strip()[:200]!r}")
    return Tool(path, found[0])


async def _libvirt(config: Config) -> Tool:
    h = config.hypervisor
    with tempfile.TemporaryDirectory(prefix="vmrt-doctor-") as root:
        if not h.uri:
            settings = Path(root) / "etc" / "qemu.conf"
            settings.parent.mkdir()
            # As the daemon's (vmrt.hypervisor.libvirt_host.qemu_conf), as far as opening goes.
            settings.write_text(
                f'user = "{h.qemu_user}"\ngroup = "{h.qemu_group}"\nsecurity_driver = "none"\nhugetlbfs_mount = []\n'
            )
        uri = h.uri or f"qemu:///embed?root={root}"
        try:
            done = await spawn.run([sys.executable, "-c", _LIBVIRT_PROBE, uri], timeout_s=PROBE_TIMEOUT_S, check=False)
        except VmrtError as e:
            return Tool(error=str(e))
    if done.status:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        return Tool(uri, error=lines[-1] if lines else f"the probe ended with status {done.status}")
    return Tool(uri, done.text().strip())


async def _kvm_failure(config: Config) -> str | None:
    if vmrt.cli.kvm_failure is None or config.hypervisor.accelerator == "tcg":
        return None
    try:
        return await vmrt.cli.kvm_failure(config)
    except (VmrtError, OSError) as e:
        return str(e)


# --- users, devices, privileges ---------------------------------------------------------------------------------------


def _groups_of(user: str) -> tuple[int, frozenset[int]] | None:
    """Return (uid, gids) of a user, None for one that does not exist."""
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        return None
    members = (group.gr_gid for group in grp.getgrall() if user in group.gr_mem)
    return entry.pw_uid, frozenset((entry.pw_gid, *members))


def may_open(mode: int, owner: int, group: int, user: tuple[int, frozenset[int]]) -> bool:
    """Say whether permission bits let a user read and write; the first class that fits decides (path_resolution(7))."""
    uid, gids = user
    if uid == 0:
        return True
    shift = 6 if uid == owner else 3 if group in gids else 0
    return mode >> shift & 0o6 == 0o6


def _device(path: Path, user: tuple[int, frozenset[int]] | None) -> Device:
    try:
        stat = path.stat()
    except OSError:
        return Device()
    allowed = user is not None and may_open(stat.st_mode, stat.st_uid, stat.st_gid, user)
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as e:
        return Device(True, e.strerror or str(e), allowed)
    return Device(True, "", allowed)


def _capabilities() -> int:
    match = re.search(r"^CapEff:\s*([0-9a-f]+)$", _text("/proc/self/status"), re.MULTILINE)
    return int(match[1], 16) if match else 0


# --- network ----------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _scratch_netns() -> AsyncIterator[str]:
    name = f"vmrt-doctor-{os.getpid()}"
    try:
        await spawn.run([_which("ip") or "ip", "netns", "add", name], timeout_s=PROBE_TIMEOUT_S)
        yield name
    finally:
        await spawn.run([_which("ip") or "ip", "netns", "del", name], timeout_s=PROBE_TIMEOUT_S, check=False)


async def _network_trial() -> tuple[str | None, str | None]:
    """Try what joins a tap to the CNI interface, and what CNI asks of iptables; return why each failed."""
    if os.geteuid() != 0:
        return None, None
    redirect = ("prio", "1", "protocol", "all", "{}", "action", "mirred", "egress", "redirect", "dev", "lo")
    matches = (("matchall",), ("u32", "match", "u8", "0", "0"))
    try:
        async with _scratch_netns() as name:
            into = [_which("ip") or "ip", "netns", "exec", name]
            nat = await _failure([*into, _which("iptables-restore") or "iptables-restore"], NAT_RULES)
            tc = [*into, _which("tc") or "tc"]
            failure = await _failure([*tc, "qdisc", "add", "dev", "lo", "ingress"])
            for match in () if failure else matches:
                at = redirect.index("{}")
                words = (*redirect[:at], *match, *redirect[at + 1 :])
                failure = await _failure([*tc, "filter", "add", "dev", "lo", "parent", "ffff:", *words])
                if not failure:
                    break
            return failure, nat
    except VmrtError as e:
        return str(e), str(e)


async def _failure(argv: list[str], stdin: bytes | None = None) -> str:
    """Run a command; return its complaint, "" when it has none."""
    try:
        done = await spawn.run(argv, input_bytes=stdin, timeout_s=PROBE_TIMEOUT_S, check=False)
    except VmrtError as e:
        return str(e)
    said = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
    return "" if done.status == 0 else (said[0] if said else f"status {done.status}")


def _cni_plugins(config: Config) -> tuple[str, ...]:
    found: set[str] = set()
    for directory in config.network.cni_bin_dirs:
        with contextlib.suppress(OSError):
            found.update(entry.name for entry in directory.iterdir() if os.access(entry, os.X_OK))
    return tuple(sorted(found))


def _cni_network(directory: Path) -> CniNetwork:
    """Read the first configuration by name, as libcni chooses it."""
    try:
        files = sorted(path for path in directory.iterdir() if path.suffix in (".conf", ".conflist", ".json"))
    except OSError:
        return CniNetwork()
    for path in files[:1]:
        try:
            content = json.loads(path.read_text())
            plugins = content["plugins"] if path.suffix == ".conflist" else [content]
            kinds = [str(plugin["type"]) for plugin in plugins]
            kinds += [str(plugin["ipam"]["type"]) for plugin in plugins if plugin.get("ipam")]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            return CniNetwork(str(path), error=f"{type(e).__name__}: {e}")
        return CniNetwork(str(path), tuple(dict.fromkeys(kinds)))
    return CniNetwork()


# --- files, room, daemon ----------------------------------------------------------------------------------------------


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _existing(configured: str, default: str) -> str:
    path = configured or default
    return path if os.access(path, os.R_OK) else ""


def _guest(config: Config) -> GuestFact:
    from vmrt import guest_image

    directory = config.guest_image_dir
    try:
        image = guest_image.load(directory)
    except (VmrtError, OSError) as e:
        return GuestFact(str(directory), error=str(e))
    return GuestFact(str(directory), image.version, image.kernel_release)


def _free_bytes(root: Path) -> int:
    """Return what is free where `root` is or will be."""
    place = next(path for path in (root, *root.parents) if path.exists())
    stat = os.statvfs(place)
    return stat.f_bavail * stat.f_frsize


def _memory_available() -> int:
    match = re.search(r"^MemAvailable:\s*(\d+) kB$", _text("/proc/meminfo"), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def _cgroups() -> tuple[int, tuple[str, ...]]:
    """Return (version of the hierarchy that has the controllers, the controllers); (0, ()) for none."""
    unified = _text("/sys/fs/cgroup/cgroup.controllers").split()
    if unified:
        return 2, tuple(sorted(unified))
    rows = [line.split() for line in _text("/proc/cgroups").splitlines() if not line.startswith("#")]
    legacy = tuple(sorted(row[0] for row in rows if len(row) == 4 and row[1] != "0" and row[3] == "1"))
    return (1, legacy) if legacy else (0, ())


def _daemon(options: Options) -> DaemonFact:
    from vmrt.cli.client import Daemon, socket_path

    try:
        path = str(socket_path(options.socket))
    except VmrtError as e:
        return DaemonFact(options.socket, error=str(e))
    try:
        with Daemon(options) as daemon:
            from vmrt.proto.vmrt.v1 import control_pb2

            answer = daemon.call(daemon.control.Ping, control_pb2.PingRequest(), timeout_s=5.0)
    except VmrtError as e:
        return DaemonFact(path, error=e.message)
    return DaemonFact(path, answer.version, answer.pid)


def _runs_systemd() -> bool:
    return Path("/run/systemd/system").is_dir()  # sd_booted(3); kubelet is told the cgroup driver by it


def _delegates(config: Config) -> tuple[DelegateFact, ...]:
    endpoints: dict[str, list[str]] = {}
    for name, handler in config.delegates.items():
        endpoints.setdefault(handler.endpoint, []).append(name)
    return tuple(_delegate(endpoint, tuple(names)) for endpoint, names in endpoints.items())


def _delegate(endpoint: str, handlers: tuple[str, ...]) -> DelegateFact:
    import grpc

    from vmrt.proto.runtime.v1 import api_pb2, api_pb2_grpc

    options = [("grpc.enable_http_proxy", 0), ("grpc.default_authority", "localhost")]
    driver = ""
    try:
        with grpc.insecure_channel(endpoint, options=options) as channel:
            runtime = api_pb2_grpc.RuntimeServiceStub(channel)
            version = runtime.Version(api_pb2.VersionRequest(), timeout=5.0)
            status = runtime.Status(api_pb2.StatusRequest(), timeout=5.0).status
            with contextlib.suppress(grpc.RpcError):  # older runtimes do not tell
                told = runtime.RuntimeConfig(api_pb2.RuntimeConfigRequest(), timeout=5.0)
                driver = api_pb2.CgroupDriver.Name(told.linux.cgroup_driver).lower()
    except grpc.RpcError as e:
        return DelegateFact(endpoint, handlers, error=str(e.details() or e.code()))
    not_ready = [c for c in status.conditions if c.type == "RuntimeReady" and not c.status]
    return DelegateFact(
        endpoint,
        handlers,
        f"{version.runtime_name} {version.runtime_version}",
        "; ".join(f"{c.reason} {c.message}".strip() or "it does not say why" for c in not_ready),
        driver,
    )
