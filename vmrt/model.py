"""The nouns that vmrt's rooms exchange: what was asked for (specs), what a VM is made of, what the network gave.

Rules: frozen, slotted dataclasses; enums instead of strings; units in names; no I/O. Only the standard library is
imported, so every room may import this one. Specs are what `vmrt.cri` makes of CRI's protobuf messages (cri-api v0.36,
`proto/runtime/v1/api.proto`) and what `vmrt.store` writes into the records; field names follow CRI's where they mean
the same.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path

# --- what a client asks for -----------------------------------------------------------------------------------------


class NamespaceMode(enum.Enum):
    """Whose namespace a container uses (CRI NamespaceMode)."""

    POD = "pod"
    CONTAINER = "container"
    NODE = "node"
    TARGET = "target"


class ProfileType(enum.Enum):
    """Where a seccomp or AppArmor profile comes from (CRI SecurityProfile.ProfileType)."""

    RUNTIME_DEFAULT = "runtime-default"
    UNCONFINED = "unconfined"
    LOCALHOST = "localhost"


class Propagation(enum.Enum):
    """Mount propagation (CRI MountPropagation)."""

    PRIVATE = "private"
    HOST_TO_CONTAINER = "host-to-container"
    BIDIRECTIONAL = "bidirectional"


class Protocol(enum.Enum):
    """Transport protocol of a port mapping."""

    TCP = "tcp"
    UDP = "udp"
    SCTP = "sctp"


class SupplementalGroupsPolicy(enum.Enum):
    """Whether the image's group file adds to the groups asked for."""

    MERGE = "merge"
    STRICT = "strict"


@dataclass(frozen=True, slots=True)
class SecurityProfile:
    """A seccomp or AppArmor profile; `localhost_ref` is a host path or profile name for LOCALHOST."""

    type: ProfileType
    localhost_ref: str = ""


@dataclass(frozen=True, slots=True)
class IdMapping:
    """One range of a user namespace's mapping (user_namespaces(7))."""

    host_id: int
    container_id: int
    length: int


@dataclass(frozen=True, slots=True)
class NamespaceOptions:
    """Namespace choices of a sandbox or container; `uids`/`gids` non-empty mean a user namespace."""

    network: NamespaceMode = NamespaceMode.POD
    pid: NamespaceMode = NamespaceMode.POD
    ipc: NamespaceMode = NamespaceMode.POD
    target_id: str = ""
    userns: NamespaceMode = NamespaceMode.NODE
    uids: tuple[IdMapping, ...] = ()
    gids: tuple[IdMapping, ...] = ()


@dataclass(frozen=True, slots=True)
class HugepageLimit:
    """Limit for one huge page size, as cgroups name it ("2MB")."""

    page_size: str
    limit_bytes: int


@dataclass(frozen=True, slots=True)
class LinuxResources:
    """CRI LinuxContainerResources; 0 and "" mean "not set". CPU times are microseconds, -1 quota is unlimited."""

    cpu_period_us: int = 0
    cpu_quota_us: int = 0
    cpu_shares: int = 0
    memory_limit_bytes: int = 0
    oom_score_adj: int = 0
    cpuset_cpus: str = ""
    cpuset_mems: str = ""
    hugepage_limits: tuple[HugepageLimit, ...] = ()
    unified: dict[str, str] = field(default_factory=dict)
    memory_swap_limit_bytes: int = 0


@dataclass(frozen=True, slots=True)
class SecurityContext:
    """What CRI's two security contexts have in common plus the container's own part; None means "not set"."""

    namespaces: NamespaceOptions = NamespaceOptions()
    privileged: bool = False
    capabilities_add: tuple[str, ...] = ()
    capabilities_drop: tuple[str, ...] = ()
    capabilities_ambient: tuple[str, ...] = ()
    run_as_user: int | None = None
    run_as_username: str = ""
    run_as_group: int | None = None
    supplemental_groups: tuple[int, ...] = ()
    supplemental_groups_policy: SupplementalGroupsPolicy = SupplementalGroupsPolicy.MERGE
    readonly_rootfs: bool = False
    no_new_privs: bool = False
    masked_paths: tuple[str, ...] = ()
    readonly_paths: tuple[str, ...] = ()
    seccomp: SecurityProfile | None = None
    apparmor: SecurityProfile | None = None


@dataclass(frozen=True, slots=True)
class DnsConfig:
    """Lines for the pod's resolv.conf."""

    servers: tuple[str, ...] = ()
    searches: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PortMapping:
    """One host port published for a pod; `host_port` 0 means that none is."""

    protocol: Protocol
    container_port: int
    host_port: int = 0
    host_ip: str = ""


@dataclass(frozen=True, slots=True)
class SandboxSpec:
    """What RunPodSandbox asks for."""

    name: str
    uid: str
    namespace: str
    attempt: int = 0
    hostname: str = ""
    log_directory: str = ""
    dns: DnsConfig | None = None
    port_mappings: tuple[PortMapping, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    runtime_handler: str = ""
    cgroup_parent: str = ""
    sysctls: dict[str, str] = field(default_factory=dict)
    security: SecurityContext = SecurityContext()
    overhead: LinuxResources | None = None
    resources: LinuxResources | None = None


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount of a container, as the client asked for it (ContainerStatus gives it back unchanged)."""

    container_path: str
    host_path: str = ""
    readonly: bool = False
    selinux_relabel: bool = False
    propagation: Propagation = Propagation.PRIVATE
    recursive_read_only: bool = False
    uids: tuple[IdMapping, ...] = ()
    gids: tuple[IdMapping, ...] = ()
    # An image volume: the image's reference, the name in the pod, and a path in it; `host_path` is "" then.
    image: str = ""
    user_specified_image: str = ""
    image_sub_path: str = ""


@dataclass(frozen=True, slots=True)
class Device:
    """A host device asked for in a container; `permissions` of cgroups' r, w, m."""

    container_path: str
    host_path: str
    permissions: str


@dataclass(frozen=True, slots=True)
class ContainerSpec:
    """What CreateContainer asks for."""

    name: str
    image: str
    attempt: int = 0
    user_specified_image: str = ""
    command: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    working_dir: str = ""
    envs: tuple[tuple[str, str], ...] = ()
    mounts: tuple[Mount, ...] = ()
    devices: tuple[Device, ...] = ()
    cdi_devices: tuple[str, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    log_path: str = ""
    stdin: bool = False
    stdin_once: bool = False
    tty: bool = False
    resources: LinuxResources = LinuxResources()
    security: SecurityContext = SecurityContext()
    stop_signal: str = ""


# --- images -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """The run-time part of an OCI image configuration (image-spec, config.md)."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    working_dir: str = ""
    user: str = ""
    stop_signal: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    volumes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LayerImage:
    """One layer as a read-only EROFS block image on the host. `diff_id` is "sha256:<hex>" of the uncompressed tar."""

    diff_id: str
    path: Path
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Image:
    """One image in the store.

    `id` is "sha256:<hex>" of its configuration; tags and digests are complete references ("docker.io/library/x:1",
    "docker.io/library/x@sha256:..."), sorted. `layers` are base first. `size_bytes` is what its layers occupy.
    """

    id: str
    repo_tags: tuple[str, ...]
    repo_digests: tuple[str, ...]
    size_bytes: int
    config: ImageConfig
    layers: tuple[LayerImage, ...]
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class RegistryAuth:
    """Credentials for one pull (CRI AuthConfig). Never logged: the repr hides them."""

    username: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    auth: str = field(default="", repr=False)
    server_address: str = ""
    identity_token: str = field(default="", repr=False)
    registry_token: str = field(default="", repr=False)


# --- virtual machines -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GuestImage:
    """The kernel and root image that VMs boot, as `vmrt guest build` made them.

    `version` changes with any input; `protocol` is the agent protocol number the image's agent speaks, checked by the
    daemon. `initramfs` is None for a kernel with everything built in. `cmdline` is what the image needs on the kernel
    command line (the hypervisor adds what its devices need).
    """

    version: str
    protocol: int
    kernel: Path
    initramfs: Path | None
    rootfs: Path
    cmdline: str
    kernel_release: str


@dataclass(frozen=True, slots=True)
class Disk:
    """A block device for a VM. `serial` (at most 36 of [0-9a-z-]) is how the guest finds it.

    `path` names a raw file or a block device of the host. A file that is not `readonly` is the VM's own and dies with
    it: it is given to QEMU's user, and flushes do not reach the platter. A host device stays as it is, whoever owns it;
    its flushes are kept.
    """

    serial: str
    path: Path
    readonly: bool = True


@dataclass(frozen=True, slots=True)
class VmSpec:
    """What one VM is made of.

    `tap` names an existing host tap device that QEMU opens, `mac` its guest-side address ("" for no NIC).
    `share_dir` is served to the guest as virtiofs tag "share" when given. With `background` it boots at a low priority,
    which ends when it is ready. Its processes go below the host cgroup `cgroup_parent` (CRI's) when that is not "",
    before the guest runs; CPU limits of that cgroup hold once it is ready. `max_vcpus` and `max_memory_bytes` are what
    it may be enlarged to while it runs; at or below the size that it boots with, that is its size for life.
    """

    vm_id: str
    guest: GuestImage
    vcpus: int
    memory_bytes: int
    disks: tuple[Disk, ...] = ()
    tap: str = ""
    mac: str = ""
    share_dir: Path | None = None
    background: bool = False
    max_vcpus: int = 0
    max_memory_bytes: int = 0
    cgroup_parent: str = ""


@dataclass(frozen=True, slots=True)
class VmSize:
    """What a VM has, what it can be enlarged to, and how much memory it was booted with and keeps."""

    vcpus: int
    memory_bytes: int
    max_vcpus: int
    max_memory_bytes: int
    min_memory_bytes: int


@dataclass(frozen=True, slots=True)
class Confinement:
    """Which of the host's CPUs a VM's threads may run on, and in which of its memory nodes its memory lies.

    None is anywhere; a set is never empty.
    """

    cpus: frozenset[int] | None = None
    mems: frozenset[int] | None = None


class VmEventKind(enum.Enum):
    """What can happen to a VM without our asking."""

    STOPPED = "stopped"  # QEMU ended: guest shutdown, panic or our own destroy
    CRASHED = "crashed"  # QEMU itself was killed or failed
    OOM_KILLED = "oom-killed"  # the host killed QEMU for memory


@dataclass(frozen=True, slots=True)
class VmEvent:
    """A VM's end, told once per VM."""

    vm_id: str
    kind: VmEventKind
    detail: str = ""


# --- network ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GuestInterface:
    """One interface as the guest has to configure it. `device_mac` finds the NIC; `mac` is the address it is to use."""

    name: str
    device_mac: str
    mac: str
    mtu: int
    addresses: tuple[str, ...]  # CIDR, IPv4 and IPv6


@dataclass(frozen=True, slots=True)
class GuestRoute:
    """A route; `destination` in CIDR ("0.0.0.0/0" for the default), `gateway` "" for an on-link one."""

    destination: str
    gateway: str
    interface: str
    source: str = ""
    scope: int = 0
    metric: int = 0


@dataclass(frozen=True, slots=True)
class GuestNeighbour:
    """A permanent neighbour entry (ARP or NDP)."""

    address: str
    mac: str
    interface: str


@dataclass(frozen=True, slots=True)
class PodNetwork:
    """What CNI gave a pod: its addresses (primary first) and the guest's side of them.

    The first of `interfaces` is the pod's own, whose addresses `ips` are; each other one needs a NIC with its address.
    """

    netns: Path
    ips: tuple[str, ...]
    interfaces: tuple[GuestInterface, ...]
    routes: tuple[GuestRoute, ...]
    neighbours: tuple[GuestNeighbour, ...]
    dns: DnsConfig | None = None
