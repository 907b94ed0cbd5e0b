"""Configuration: TOML files, checked against these classes, every key with a default.

`/etc/vmrt/config.toml` is read first, then `/etc/vmrt/config.d/*.toml` in name order; later files win key by key.
Unknown keys are refused with the nearest known name, wrong types with the key's path. Paths that are not set follow
from `root`, so that several daemons live side by side when each has its own root and socket.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from vmrt.errors import ConfigError

DEFAULT_FILE = Path("/etc/vmrt/config.toml")
DEFAULT_ROOT = Path("/var/lib/vmrt")
DEFAULT_SOCKET = Path("/run/vmrt/vmrt.sock")
# sockaddr_un.sun_path has 108 octets with the terminating NUL (unix(7)).
SOCKET_PATH_LIMIT = 107
# Below a root: a VM's own sockets ("/vms/", an id of 12 digits, "/s/vsock_1026": vmrt.hypervisor.record), and the
# monitor that embedded libvirt makes ("domain-", a running number, "-", 20 octets of the domain's name).
_VM_SOCKET_SUFFIX = len("/vms/") + 12 + len("/s/vsock_1026")
_MONITOR_SOCKET_SUFFIX = len("/libvirt/lib/qemu/domain-") + 7 + len("-") + 20 + len("/monitor.sock")
MAX_NIC_QUEUES = 256  # the kernel's limit for a tap
# Their taps' names end in a digit, and they have slots 0x10 to 0x18 of the VM's root complex.
MAX_EXTRA_NICS = 9
MAX_LOG_LINE_BYTES = 256 * 1024  # of the agent's buffer of 1 MiB per stream


@dataclass(frozen=True, slots=True)
class HypervisorConfig:
    """How VMs are run."""

    # libvirt URI; "" means qemu:///embed with the daemon's root.
    uri: str = ""
    # "auto" probes by booting a tiny guest; "kvm" fails where the probe fails; "tcg" does not probe.
    accelerator: typing.Literal["auto", "kvm", "tcg"] = "auto"
    # "auto" takes the kernel's vhost_vsock where present, else vhost-device-vsock.
    vsock: typing.Literal["auto", "kernel", "vhost-user"] = "auto"
    vhost_device_vsock: Path = Path("/usr/local/bin/vhost-device-vsock")
    virtiofsd: str = ""
    # One virtiofsd for every pod, for its volumes; false saves the process and refuses config.mounts.
    share: bool = True
    qemu_user: str = "vmrt-qemu"
    qemu_group: str = "vmrt-qemu"
    # Each VM runs under a uid and gid of its own from this range, which nothing else on the host may use; base 0 has
    # all VMs run as qemu_user. The default lies where systemd leaves ids unused (its UIDS-GIDS.md).
    vm_uid_base: int = 0x7000_0000
    vm_uid_count: int = 65536
    qemu_binary: Path = Path("/usr/bin/qemu-system-x86_64")
    boot_timeout_s: float = 60.0
    # How many boot side by side, the others wait their turn; 0: two for each processor.
    boots_at_once: int = 0
    default_vcpus: int = 1
    default_memory_bytes: int = 512 * 1024**2
    overhead_memory_bytes: int = 128 * 1024**2
    # What a pod's VM may be enlarged to; 0 is as much as the host has, within reason: vmrt.pods.sizing.
    max_vcpus: int = 0
    max_memory_bytes: int = 0
    scratch_bytes: int = 10 * 1024**3
    console_limit_bytes: int = 256 * 1024
    # How kubelet is to spell cgroup_parent, and who makes cgroups below it; "auto" is systemd where it is the init.
    cgroup_driver: typing.Literal["auto", "cgroupfs", "systemd"] = "auto"
    # Queue pairs of a VM's network card. More than one helps pods with several CPUs that have much to send.
    nic_queues: int = 1
    # How many network cards a VM can be given beside its first, for pods whose CNI plugins make several interfaces.
    extra_nics: int = 3


@dataclass(frozen=True, slots=True)
class VolumesConfig:
    """Where volumes live that need not be on the share."""

    # An emptyDir with the default medium: the host's directory on the share, or a disk whose file is in it.
    empty_dir: typing.Literal["share", "disk"] = "share"
    # How much such a disk holds at most; it is sparse.
    empty_dir_bytes: int = 10 * 1024**3
    # An emptyDir with medium Memory: a tmpfs in the guest, or the host's tmpfs on the share.
    memory_empty_dir: typing.Literal["guest", "share"] = "guest"
    # ConfigMaps, Secrets, projected and downward API volumes: a copy in the guest that follows the host's and raises
    # inotify events there, or the share.
    files: typing.Literal["mirror", "share"] = "mirror"
    # The largest of those that is copied; a larger one is on the share.
    mirror_limit_bytes: int = 64 * 1024**2
    # Where CSI drivers tell of volumes whose file systems the guest mounts, as Kata Containers does; "" turns it off.
    direct_dir: str = ""


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """Where CNI's files are."""

    cni_config_dir: Path = Path("/etc/cni/net.d")
    cni_bin_dirs: tuple[Path, ...] = (Path("/opt/cni/bin"), Path("/usr/lib/cni"))
    # A conflist used when cni_config_dir holds none: bridge + host-local + portmap on this subnet. "" turns it off.
    fallback_subnet: str = "10.241.0.0/16"
    fallback_subnet_v6: str = ""
    cni_timeout_s: float = 60.0
    # Run CNI's GC at start. It frees what the plugins hold for pods that are not ours: only where no other runtime
    # (a delegate, for one) uses the same network.
    cni_gc: bool = False


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """How images are fetched; "" leaves a choice to skopeo's own default files."""

    registries_conf: str = ""
    policy_json: str = ""
    registries_d: str = ""
    pull_timeout_s: float = 0.0
    default_registry: str = "docker.io"
    # References of images that kubelet's image garbage collection leaves alone.
    pinned: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """VMs booted ahead."""

    # How many wait for each handler; 0 turns the pool off.
    size: int = 1
    # Memory that the host must have left after a VM has been booted ahead.
    reserve_bytes: int = 1024**3
    # The host cgroup below which they wait, a path; "" leaves them in the daemon's own.
    cgroup_parent: str = ""


@dataclass(frozen=True, slots=True)
class StreamingConfig:
    """Where exec, attach and port-forward are served; port 0 is any free one, `tls_cert` "" is plain HTTP."""

    address: str = "127.0.0.1"
    port: int = 0
    tls_cert: str = ""
    tls_key: str = ""
    # Clients must have a certificate of this CA.
    client_ca: str = ""


@dataclass(frozen=True, slots=True)
class HandlerConfig:
    """One RuntimeClass handler: VMs of one kind, or, with an `endpoint`, a delegate (docs/delegate.md).

    `guest` names a guest image directory, "" the default one.
    """

    guest: str = ""
    vcpus: int = 0
    memory_bytes: int = 0
    # unix:///PATH of another CRI runtime, which runs the pods of this handler.
    endpoint: str = ""
    # What that runtime calls the handler; "" is its default one.
    delegate_handler: str = ""
    # Pods that name no handler and share this namespace with the host come here.
    host_network: bool = False
    host_ipc: bool = False
    host_pid: bool = False


@dataclass(frozen=True, slots=True)
class LogConfig:
    """The daemon's own log."""

    level: typing.Literal["debug", "info", "warning", "error"] = "info"
    format: typing.Literal["text", "json"] = "text"


@dataclass(frozen=True, slots=True)
class Config:
    """The whole configuration."""

    root: Path = DEFAULT_ROOT
    listen: str = f"unix://{DEFAULT_SOCKET}"
    guest_dir: str = ""
    max_container_log_line_bytes: int = 16 * 1024
    # The event loop's thread runs ahead of the machine's load (vmrt/realtime.py).
    realtime: bool = True
    hypervisor: HypervisorConfig = field(default_factory=HypervisorConfig)
    volumes: VolumesConfig = field(default_factory=VolumesConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    images: ImageConfig = field(default_factory=ImageConfig)
    pool: PoolConfig = field(default_factory=PoolConfig)
    streaming: StreamingConfig = field(default_factory=StreamingConfig)
    log: LogConfig = field(default_factory=LogConfig)
    handlers: dict[str, HandlerConfig] = field(default_factory=lambda: {"vm": HandlerConfig()})

    @property
    def socket_path(self) -> Path:
        """The path of the gRPC socket."""
        return Path(self.listen.removeprefix("unix://"))

    @property
    def guest_image_dir(self) -> Path:
        """Where the default guest image is."""
        return Path(self.guest_dir) if self.guest_dir else self.root / "guest"

    @property
    def delegates(self) -> dict[str, HandlerConfig]:
        """The handlers that other runtimes serve."""
        return {name: handler for name, handler in self.handlers.items() if handler.endpoint}

    def of_vms(self) -> Config:
        """Return the configuration as those see it who run VMs: without the delegates."""
        return dataclasses.replace(
            self, handlers={name: handler for name, handler in self.handlers.items() if not handler.endpoint}
        )

    def handler_guest_dir(self, handler: str) -> Path:
        """Where a handler's guest image is."""
        own = self.handlers[handler].guest
        return Path(own) if own else self.guest_image_dir


def load(files: Sequence[Path] | None = None, overrides: Mapping[str, object] | None = None) -> Config:
    """Read and check the configuration.

    `files` None means the default file and its `config.d`; files given by name must exist. `overrides` are top-level
    keys from the command line. Raises `ConfigError` naming file and key.
    """
    merged: dict[str, Any] = {}
    for path in _default_files() if files is None else files:
        _merge(merged, _read(path))
    _merge(merged, dict(overrides or {}))
    try:
        config = msgspec.convert(merged, Config, dec_hook=_decode, strict=True)
    except msgspec.ValidationError as e:
        raise ConfigError(f"configuration: {e}", hint="see docs/configuration.md") from e
    return check(config)


def check(config: Config) -> Config:
    """Check what types cannot say; return `config` unchanged or raise `ConfigError`."""
    if not config.listen.startswith("unix:///"):
        raise ConfigError(f"listen must be unix:///PATH, not {config.listen!r}")
    length = len(str(config.socket_path).encode())
    if length > SOCKET_PATH_LIMIT:
        raise ConfigError(
            f"listen: the socket path is {length} octets long, the kernel takes at most {SOCKET_PATH_LIMIT}",
            resource=str(config.socket_path),
            hint="choose a shorter path",
        )
    if not config.root.is_absolute():
        raise ConfigError(f"root must be an absolute path, not {str(config.root)!r}")
    if not config.handlers:
        raise ConfigError("handlers: at least one is needed", hint="leave the table out to get the handler 'vm'")
    _check_delegates(config)
    h = config.hypervisor
    for name, value, least in (
        ("hypervisor.default_vcpus", h.default_vcpus, 1),
        ("hypervisor.default_memory_bytes", h.default_memory_bytes, 128 * 1024**2),
        ("hypervisor.vm_uid_base", h.vm_uid_base, 0),
        ("hypervisor.vm_uid_count", h.vm_uid_count, 1),
        ("hypervisor.max_vcpus", h.max_vcpus, 0),
        ("hypervisor.max_memory_bytes", h.max_memory_bytes, 0),
        ("hypervisor.scratch_bytes", h.scratch_bytes, 64 * 1024**2),
        ("hypervisor.boot_timeout_s", h.boot_timeout_s, 1),
        ("volumes.empty_dir_bytes", config.volumes.empty_dir_bytes, 64 * 1024**2),
        ("volumes.mirror_limit_bytes", config.volumes.mirror_limit_bytes, 0),
        ("hypervisor.nic_queues", h.nic_queues, 1),
        ("hypervisor.extra_nics", h.extra_nics, 0),
        ("pool.size", config.pool.size, 0),
        ("hypervisor.boots_at_once", config.hypervisor.boots_at_once, 0),
        ("pool.reserve_bytes", config.pool.reserve_bytes, 0),
        ("max_container_log_line_bytes", config.max_container_log_line_bytes, 64),
    ):
        if value < least:
            raise ConfigError(f"{name} must be at least {least}, not {value}")
    if h.nic_queues > MAX_NIC_QUEUES:
        raise ConfigError(f"hypervisor.nic_queues must be at most {MAX_NIC_QUEUES}, not {h.nic_queues}")
    if h.extra_nics > MAX_EXTRA_NICS:
        raise ConfigError(f"hypervisor.extra_nics must be at most {MAX_EXTRA_NICS}, not {h.extra_nics}")
    if config.max_container_log_line_bytes > MAX_LOG_LINE_BYTES:
        raise ConfigError(
            f"max_container_log_line_bytes must be at most {MAX_LOG_LINE_BYTES}, not "
            f"{config.max_container_log_line_bytes}",
            hint="a piece of a line must fit into the agent's output buffer, or the container would wait for ever",
        )
    if h.vm_uid_base and not 1000 <= h.vm_uid_base <= 2**32 - 2 - h.vm_uid_count:
        raise ConfigError(
            f"hypervisor.vm_uid_base: {h.vm_uid_base} and {h.vm_uid_count} ids are not within 1000 to {2**32 - 3}"
        )
    parent = config.pool.cgroup_parent
    if parent and (not parent.startswith("/") or ".." in parent.split("/") or parent.endswith(".slice")):
        raise ConfigError(
            f"pool.cgroup_parent must be an absolute path of a cgroup and no slice of systemd's, not {parent!r}",
            hint="where systemd makes cgroups, one below a unit with Delegate=yes",
        )
    s = config.streaming
    if not 0 <= s.port < 65536:
        raise ConfigError(f"streaming.port must be 0 (any) or a TCP port, not {s.port}")
    if not s.address:
        raise ConfigError("streaming.address is empty", hint="0.0.0.0 and :: listen on every address")
    if not s.tls_cert and (s.tls_key or s.client_ca):
        raise ConfigError("streaming.tls_key and streaming.client_ca need streaming.tls_cert")
    return config


def _check_delegates(config: Config) -> None:
    taken: dict[str, str] = {}
    for name, handler in config.handlers.items():
        where = f"handlers.{name}"
        wanted = [key for key in ("host_network", "host_ipc", "host_pid") if getattr(handler, key)]
        if not handler.endpoint:
            for key in [*wanted, *(["delegate_handler"] if handler.delegate_handler else [])]:
                raise ConfigError(f"{where}.{key} needs {where}.endpoint", hint="see docs/delegate.md")
            continue
        if not handler.endpoint.startswith("unix:///"):
            raise ConfigError(f"{where}.endpoint must be unix:///PATH, not {handler.endpoint!r}")
        if len(handler.endpoint.removeprefix("unix://").encode()) > SOCKET_PATH_LIMIT:
            raise ConfigError(f"{where}.endpoint: a socket path has at most {SOCKET_PATH_LIMIT} octets")
        if handler.endpoint == config.listen:
            raise ConfigError(f"{where}.endpoint is vmrt's own socket", resource=handler.endpoint)
        for key in ("guest", "vcpus", "memory_bytes"):
            if getattr(handler, key):
                raise ConfigError(f"{where}.{key} is for VMs, and {where}.endpoint makes it a delegate")
        for key in wanted:
            if key in taken:
                raise ConfigError(f"{where}.{key} is set, and so is handlers.{taken[key]}.{key}: one takes these pods")
            taken[key] = name
    if config.handlers and not config.of_vms().handlers:
        raise ConfigError("handlers: all have an endpoint, none runs VMs", hint="add an empty table [handlers.vm]")


def longest_root_octets(hypervisor: HypervisorConfig) -> int:
    """Return how long a root's path may be, so that the sockets below it fit into sun_path."""
    return SOCKET_PATH_LIMIT - (_VM_SOCKET_SUFFIX if hypervisor.uri else _MONITOR_SOCKET_SUFFIX)


def _default_files() -> list[Path]:
    files = [DEFAULT_FILE] if DEFAULT_FILE.exists() else []
    return files + sorted((DEFAULT_FILE.parent / "config.d").glob("*.toml"))


def _read(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text())
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: {e}") from e
    _refuse_unknown(table, Config, str(path), "")
    return table


def _refuse_unknown(table: Mapping[str, Any], shape: object, path: str, prefix: str) -> None:
    if typing.get_origin(shape) is dict:
        for key, value in table.items():
            if isinstance(value, dict):
                _refuse_unknown(value, typing.get_args(shape)[1], path, f"{prefix}{key}.")
        return
    if not (isinstance(shape, type) and dataclasses.is_dataclass(shape)):
        return
    hints = typing.get_type_hints(shape)
    for key, value in table.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            raise ConfigError(
                f"{path}: unknown key {prefix}{key}", hint=f"did you mean {prefix}{near[0]}?" if near else ""
            )
        if isinstance(value, dict):
            _refuse_unknown(value, hints[key], path, f"{prefix}{key}.")


def _merge(into: dict[str, Any], table: Mapping[str, Any]) -> None:
    for key, value in table.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _decode(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is Path and isinstance(value, Path):
        return value
    raise NotImplementedError(f"{kind} from {type(value)}")


__all__ = [
    "Config",
    "HandlerConfig",
    "HypervisorConfig",
    "ImageConfig",
    "LogConfig",
    "NetworkConfig",
    "PoolConfig",
    "StreamingConfig",
    "VolumesConfig",
    "check",
    "load",
]
