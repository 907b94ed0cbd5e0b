"""CRI's configurations, in: `PodSandboxConfig` and `ContainerConfig` become frozen specs, or are refused by field.

Pure functions, no I/O: whether a host path, an image or a target container exists is for the pods room to find out.
Bounds are those of Linux and Kubernetes, so that no record, file or guest call can be blown up from here. Windows
parts are ignored, as CRI says of a Linux node.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Mapping, Sequence

from vmrt import number_list
from vmrt.cri import fields
from vmrt.cri.fields import refuse, unsupported
from vmrt.cri.security import container_security, id_mappings, sandbox_security
from vmrt.model import (
    ContainerSpec,
    Device,
    DnsConfig,
    HugepageLimit,
    IdMapping,
    LinuxResources,
    Mount,
    PortMapping,
    Propagation,
    Protocol,
    SandboxSpec,
)
from vmrt.proto.runtime.v1 import api_pb2 as cri

PROTOCOLS = {cri.TCP: Protocol.TCP, cri.UDP: Protocol.UDP, cri.SCTP: Protocol.SCTP}
PROPAGATIONS = {
    cri.PROPAGATION_PRIVATE: Propagation.PRIVATE,
    cri.PROPAGATION_HOST_TO_CONTAINER: Propagation.HOST_TO_CONTAINER,
    cri.PROPAGATION_BIDIRECTIONAL: Propagation.BIDIRECTIONAL,
}

_RT_SIGNAL = re.compile(r"SIGRT(MIN|MAX)(PLUS|MINUS)(\d+)")


def signal_name(value: int) -> str:
    """Return the name of a CRI signal as signal(7) spells it, "SIGRTMIN+3"; "" for RUNTIME_DEFAULT.

    Raises ValueError for a number the interface does not have.
    """
    name = cri.Signal.Name(cri.Signal.ValueType(value))
    if name == "RUNTIME_DEFAULT":
        return ""
    if parts := _RT_SIGNAL.fullmatch(name):
        return f"SIGRT{parts[1]}{'+' if parts[2] == 'PLUS' else '-'}{parts[3]}"
    return name


SIGNALS: Mapping[str, cri.Signal.ValueType] = {signal_name(value): value for value in cri.Signal.values()}


def pod_ranges(text: str, path: str) -> tuple[str, ...]:
    """Return a node's pod CIDRs, "10.0.3.0/24,fd00:3::/64": one of each family at most."""
    ranges = []
    for word in text.split(","):
        try:
            ranges.append(ipaddress.ip_network(word.strip()))
        except ValueError as e:
            refuse(path, f"holds {fields.short(word)}, which is no range: {e}")
    if len({each.version for each in ranges}) != len(ranges):
        refuse(path, "has two ranges of one family")
    return tuple(map(str, ranges))


_SYSCTL = re.compile(r"[A-Za-z0-9_-]+([./][A-Za-z0-9_-]+)+")
_PAGE_SIZE = re.compile(r"\d{1,6}[KMGT]B")
_CGROUP_FILE = re.compile(r"[a-z0-9_]+(\.[A-Za-z0-9_]+)+")
_CDI_NAME = re.compile(r"[A-Za-z][\w.-]*/[A-Za-z][\w.-]*=[A-Za-z0-9][\w.:-]*", re.ASCII)
_PERIOD_US = (1_000, 1_000_000)  # cgroup v2 cpu.max
_INT64_MAX = 2**63 - 1


def sandbox_spec(config: cri.PodSandboxConfig, handler: str, handlers: Collection[str]) -> SandboxSpec:
    """Translate RunPodSandbox's request; `handlers` are the configured ones, "" stands for the default one."""
    fields.text(handler, "runtime_handler", limit=253)
    if handler and handler not in handlers:
        refuse(
            "runtime_handler",
            f"is {fields.short(handler)}, which is not configured",
            hint=f"configured: {', '.join(sorted(handlers))}",
        )
    if not config.HasField("metadata"):
        refuse("config.metadata", "is missing")
    linux = config.linux
    return SandboxSpec(
        name=fields.name(config.metadata.name, "config.metadata.name"),
        uid=fields.name(config.metadata.uid, "config.metadata.uid"),
        namespace=fields.name(config.metadata.namespace, "config.metadata.namespace"),
        attempt=config.metadata.attempt,
        hostname=fields.hostname(config.hostname, "config.hostname"),
        log_directory=fields.absolute_path(config.log_directory, "config.log_directory"),
        dns=_dns(config.dns_config, "config.dns_config") if config.HasField("dns_config") else None,
        port_mappings=_ports(config.port_mappings, "config.port_mappings"),
        labels=fields.mapping(config.labels, "config.labels"),
        annotations=fields.mapping(config.annotations, "config.annotations"),
        runtime_handler=handler,
        cgroup_parent=fields.text(linux.cgroup_parent, "config.linux.cgroup_parent", limit=fields.PATH_LIMIT),
        sysctls=_sysctls(linux.sysctls, "config.linux.sysctls"),
        security=sandbox_security(linux.security_context, "config.linux.security_context"),
        overhead=resources(linux.overhead, "config.linux.overhead") if linux.HasField("overhead") else None,
        resources=resources(linux.resources, "config.linux.resources") if linux.HasField("resources") else None,
    )


def container_spec(config: cri.ContainerConfig, sandbox: SandboxSpec) -> ContainerSpec:
    """Translate CreateContainer's request; `sandbox` is what the pod was made of."""
    if not config.HasField("metadata"):
        refuse("config.metadata", "is missing")
    return ContainerSpec(
        name=fields.name(config.metadata.name, "config.metadata.name"),
        attempt=config.metadata.attempt,
        image=image_reference(config.image, "config.image"),
        user_specified_image=fields.text(config.image.user_specified_image, "config.image.user_specified_image"),
        command=_arguments(config.command, "config.command"),
        args=_arguments(config.args, "config.args"),
        working_dir=fields.absolute_path(config.working_dir, "config.working_dir"),
        envs=_envs(config.envs, "config.envs"),
        mounts=_mounts(config.mounts, "config.mounts"),
        devices=_devices(config.devices, "config.devices"),
        cdi_devices=_cdi_devices(config),
        labels=fields.mapping(config.labels, "config.labels"),
        annotations=fields.mapping(config.annotations, "config.annotations"),
        log_path=fields.relative_path(config.log_path, "config.log_path"),
        stdin=config.stdin,
        stdin_once=config.stdin_once,
        tty=config.tty,
        resources=_container_resources(config.linux.resources, "config.linux.resources"),
        security=container_security(config.linux.security_context, "config.linux.security_context", sandbox.security),
        stop_signal=_stop_signal(config.stop_signal, "config.stop_signal"),
    )


def image_reference(image: cri.ImageSpec, path: str) -> str:
    """Return the reference that an ImageSpec names; whether it is a well-formed one is for the image store to say."""
    return fields.text(image.image, f"{path}.image", required=True)


def command(values: Sequence[str], path: str) -> tuple[str, ...]:
    """Translate a command to execute: at least a program."""
    if not values or not values[0]:
        refuse(path if not values else f"{path}[0]", "is empty")
    return _arguments(values, path)


def resources(limits: cri.LinuxContainerResources, path: str) -> LinuxResources:
    """Translate resource limits; 0 and "" are "not set"."""
    if limits.cpu_period:
        fields.number(limits.cpu_period, f"{path}.cpu_period", *_PERIOD_US)
    if limits.cpu_quota != -1:
        fields.number(limits.cpu_quota, f"{path}.cpu_quota", 0, _INT64_MAX)
    if limits.memory_swap_limit_in_bytes != -1:
        fields.number(limits.memory_swap_limit_in_bytes, f"{path}.memory_swap_limit_in_bytes", 0, _INT64_MAX)
    for key, value in (("cpuset_cpus", limits.cpuset_cpus), ("cpuset_mems", limits.cpuset_mems)):
        fields.text(value, f"{path}.{key}")
        if value:
            try:
                number_list.parse(value)
            except ValueError as e:
                refuse(f"{path}.{key}", f"is {fields.short(value)}: {e}")
    fields.few(limits.hugepage_limits, f"{path}.hugepage_limits", 16)
    for index, limit in enumerate(limits.hugepage_limits):
        if not _PAGE_SIZE.fullmatch(limit.page_size):
            refuse(f"{path}.hugepage_limits[{index}].page_size", f"is {fields.short(limit.page_size)}, not as in '2MB'")
    fields.few(limits.unified, f"{path}.unified", 128)
    for key, value in limits.unified.items():
        # The key becomes a file name in the guest's cgroup file system.
        if not _CGROUP_FILE.fullmatch(key) or fields.octets(key) > 128:
            refuse(f"{path}.unified", f"has the key {fields.short(key)}, which is no cgroup v2 file")
        if key.startswith("cpuset."):
            refuse(f"{path}.unified", f"has the key {key!r}: the guest has other CPUs than the host, say cpuset_cpus")
        fields.text(value, f"{path}.unified[{fields.short(key)}]", limit=1024)
    return LinuxResources(
        cpu_period_us=limits.cpu_period,
        cpu_quota_us=limits.cpu_quota,
        cpu_shares=fields.number(limits.cpu_shares, f"{path}.cpu_shares", 0, 262_144),
        memory_limit_bytes=fields.number(limits.memory_limit_in_bytes, f"{path}.memory_limit_in_bytes", 0, _INT64_MAX),
        oom_score_adj=fields.number(limits.oom_score_adj, f"{path}.oom_score_adj", -1000, 1000),
        cpuset_cpus=limits.cpuset_cpus,
        cpuset_mems=limits.cpuset_mems,
        hugepage_limits=tuple(HugepageLimit(limit.page_size, limit.limit) for limit in limits.hugepage_limits),
        unified=dict(limits.unified),
        memory_swap_limit_bytes=limits.memory_swap_limit_in_bytes,
    )


def _container_resources(limits: cri.LinuxContainerResources, path: str) -> LinuxResources:
    """Translate a container's first limits, which are whole: an update's are merged with these before such checks."""
    memory, swap = limits.memory_limit_in_bytes, limits.memory_swap_limit_in_bytes
    if swap > 0 and not memory:
        refuse(f"{path}.memory_swap_limit_in_bytes", "is set without memory_limit_in_bytes: it limits both together")
    if 0 < swap < memory:
        refuse(f"{path}.memory_swap_limit_in_bytes", f"is {swap}, below memory {memory}: it limits both together")
    return resources(limits, path)


def _dns(config: cri.DNSConfig, path: str) -> DnsConfig:
    for key, values in (("servers", config.servers), ("searches", config.searches), ("options", config.options)):
        fields.few(values, f"{path}.{key}", 64)
    return DnsConfig(
        servers=tuple(fields.address(v, f"{path}.servers[{i}]") for i, v in enumerate(config.servers)),
        searches=tuple(fields.resolv_word(v, f"{path}.searches[{i}]") for i, v in enumerate(config.searches)),
        options=tuple(fields.resolv_word(v, f"{path}.options[{i}]") for i, v in enumerate(config.options)),
    )


def _ports(mappings: Sequence[cri.PortMapping], path: str) -> tuple[PortMapping, ...]:
    fields.few(mappings, path, 4096)
    return tuple(_port(mapping, f"{path}[{index}]") for index, mapping in enumerate(mappings))


def _port(mapping: cri.PortMapping, path: str) -> PortMapping:
    if mapping.protocol not in PROTOCOLS:
        refuse(f"{path}.protocol", f"has the unknown value {mapping.protocol}")
    return PortMapping(
        protocol=PROTOCOLS[mapping.protocol],
        container_port=fields.number(mapping.container_port, f"{path}.container_port", 1, 65535),
        host_port=fields.number(mapping.host_port, f"{path}.host_port", 0, 65535),
        host_ip=fields.address(mapping.host_ip, f"{path}.host_ip", required=False),
    )


def _sysctls(values: Mapping[str, str], path: str) -> dict[str, str]:
    fields.few(values, path, 256)
    for key, value in values.items():
        # The key becomes a path below /proc/sys in the guest: no empty component, and so no "..".
        if not _SYSCTL.fullmatch(key) or fields.octets(key) > 256:
            refuse(path, f"has the key {fields.short(key)}, which is no sysctl (sysctl(8))")
        # Some take several numbers with tabs between them, as they are printed.
        fields.text(value.replace("\t", " "), f"{path}[{fields.short(key)}]", required=True, limit=1024)
    return dict(values)


def _arguments(values: Sequence[str], path: str) -> tuple[str, ...]:
    fields.few(values, path, 65536)
    return tuple(fields.argument(value, f"{path}[{index}]") for index, value in enumerate(values))


def _envs(values: Sequence[cri.KeyValue], path: str) -> tuple[tuple[str, str], ...]:
    fields.few(values, path, 65536)
    return tuple(_env(item, f"{path}[{index}]") for index, item in enumerate(values))


def _env(item: cri.KeyValue, path: str) -> tuple[str, str]:
    if not item.key:
        refuse(f"{path}.key", "is empty")
    if "=" in item.key:
        refuse(f"{path}.key", f"is {fields.short(item.key)}; '=' cannot be part of it")
    key = fields.argument(item.key, f"{path}.key")
    try:
        value = item.value.decode()
    except UnicodeDecodeError:
        # The OCI runtime specification is JSON. The value itself may be a secret: it is not quoted.
        refuse(f"{path}.value", f"of {fields.short(key)} is not UTF-8")
    return key, fields.argument(value, f"{path}.value")


def _mounts(mounts: Sequence[cri.Mount], path: str) -> tuple[Mount, ...]:
    fields.few(mounts, path, 4096)
    return tuple(_mount(mount, f"{path}[{index}]") for index, mount in enumerate(mounts))


def _mount(mount: cri.Mount, path: str) -> Mount:
    container_path = fields.absolute_path(mount.container_path, f"{path}.container_path", required=True)
    if mount.propagation not in PROPAGATIONS:
        refuse(f"{path}.propagation", f"has the unknown value {mount.propagation}")
    propagation = PROPAGATIONS[mount.propagation]
    if mount.HasField("image") and mount.image.image:
        return _image_mount(mount, container_path, propagation, path)
    if mount.image_sub_path:
        refuse(f"{path}.image_sub_path", "is set without image")
    host_path = fields.absolute_path(mount.host_path, f"{path}.host_path", required=True)
    if mount.recursive_read_only:
        if not mount.readonly:
            refuse(f"{path}.recursive_read_only", "is set without readonly")
        if propagation is not Propagation.PRIVATE:
            refuse(f"{path}.recursive_read_only", "is set, with propagation not being PROPAGATION_PRIVATE")
    if propagation is Propagation.BIDIRECTIONAL:
        unsupported(
            f"{path}.propagation",
            "is PROPAGATION_BIDIRECTIONAL: a mount made in the guest's kernel cannot appear on the host",
        )
    uids, gids = _mappings(mount, path)
    return Mount(
        container_path=container_path,
        host_path=host_path,
        readonly=mount.readonly,
        selinux_relabel=mount.selinux_relabel,
        propagation=propagation,
        recursive_read_only=mount.recursive_read_only,
        uids=uids,
        gids=gids,
    )


def _mappings(mount: cri.Mount, path: str) -> tuple[tuple[IdMapping, ...], tuple[IdMapping, ...]]:
    uids = id_mappings(mount.uidMappings, f"{path}.uidMappings")
    gids = id_mappings(mount.gidMappings, f"{path}.gidMappings")
    if bool(uids) != bool(gids):
        refuse(f"{path}.{'gidMappings' if uids else 'uidMappings'}", "is empty, with the other one being set")
    return uids, gids


def _devices(devices: Sequence[cri.Device], path: str) -> tuple[Device, ...]:
    fields.few(devices, path, 256)
    return tuple(_device(device, f"{path}[{index}]") for index, device in enumerate(devices))


def _cdi_devices(config: cri.ContainerConfig) -> tuple[str, ...]:
    """Return the names of the field and of the annotations that came before it, each once."""
    fields.few(config.CDI_devices, "config.CDI_devices", 256)
    names = [(device.name, f"config.CDI_devices[{index}].name") for index, device in enumerate(config.CDI_devices)]
    for key, value in sorted(config.annotations.items()):
        if key.startswith("cdi.k8s.io/"):
            names += [(name.strip(), f"config.annotations[{fields.short(key)}]") for name in value.split(",")]
    for name, path in names:
        if not _CDI_NAME.fullmatch(fields.text(name, path, limit=512)):
            refuse(path, f"is {fields.short(name)}, not a CDI device as in 'vendor.com/class=name'")
    return tuple(dict.fromkeys(name for name, _ in names))


def _device(device: cri.Device, path: str) -> Device:
    permissions = device.permissions
    if not permissions or not set(permissions) <= set("rwm") or len(set(permissions)) != len(permissions):
        refuse(f"{path}.permissions", f"is {fields.short(permissions)}, not made of r, w and m")
    host_path = fields.absolute_path(device.host_path, f"{path}.host_path", required=True)
    inside = fields.absolute_path(device.container_path, f"{path}.container_path", required=True)
    return Device(inside, host_path, permissions)


def _image_mount(mount: cri.Mount, container_path: str, propagation: Propagation, path: str) -> Mount:
    """Translate an image volume: the content of an image, always read-only."""
    if mount.host_path:
        refuse(f"{path}.host_path", "is set together with image")
    if not mount.readonly:
        refuse(f"{path}.readonly", "is false; an image is mounted read-only")
    if propagation is not Propagation.PRIVATE:
        refuse(f"{path}.propagation", "is not PROPAGATION_PRIVATE; nothing is ever mounted below an image")
    uids, gids = _mappings(mount, path)  # told, no more: layers are mapped as the pod's user namespace says
    return Mount(
        container_path=container_path,
        readonly=True,
        uids=uids,
        gids=gids,
        selinux_relabel=mount.selinux_relabel,
        recursive_read_only=mount.recursive_read_only,
        image=image_reference(mount.image, f"{path}.image"),
        user_specified_image=fields.text(mount.image.user_specified_image, f"{path}.image.user_specified_image"),
        image_sub_path=fields.relative_path(mount.image_sub_path, f"{path}.image_sub_path"),
    )


def _stop_signal(value: int, path: str) -> str:
    try:
        return signal_name(value)
    except ValueError:
        refuse(path, f"has the unknown value {value}")
