"""The OCI runtime specification of a container, made on the host by a pure function.

Sources: runtime-spec 1.0.2 (config.md, config-linux.md): the version is pinned to what the guest's crun takes; CRI's
rules for commands, environment and defaults (`proto/runtime/v1/api.proto`). What only the guest can know (the root
path, the user behind a name, HOME, the cgroup path) the agent fills in.

The VM is the sandbox: network, UTS and IPC namespaces are the guest's own, so a container gets new mount, cgroup and
(by choice) PID namespaces only, plus a new IPC namespace where CRI asks for CONTAINER. In a pod with a user namespace
they are those that the agent made with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vmrt.agent import layout
from vmrt.errors import InvalidArgumentError
from vmrt.model import ContainerSpec, ImageConfig, LinuxResources, Mount, NamespaceMode, Propagation, SandboxSpec

OCI_VERSION = "1.0.2"
DEFAULT_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# capabilities(7), in the order of their numbers, up to the guest kernel's last.
# fmt: off
_ALL = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
    "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
    "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
    "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
    "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF",
    "CHECKPOINT_RESTORE",
)
# fmt: on
ALL_CAPABILITIES = tuple(f"CAP_{name}" for name in _ALL)

# What containers have when nothing is said: the set that containerd, CRI-O and Docker agree on.
# fmt: off
_DEFAULT = (
    "CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID", "SETFCAP", "SETPCAP",
    "NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE",
)
# fmt: on
DEFAULT_CAPABILITIES = frozenset(f"CAP_{name}" for name in _DEFAULT)


@dataclass(frozen=True, slots=True)
class BoundMount:
    """One of the container's mounts with the guest path that holds its content."""

    mount: Mount
    guest_source: str
    # False for a read-only volume whose submounts stay writable: the host alone enforces it then.
    guest_readonly: bool = True


def command(spec: ContainerSpec, image: ImageConfig) -> tuple[str, ...]:
    """Return the argument vector: CRI's command and args over the image's Entrypoint and Cmd.

    A command replaces both of the image's; args alone replace Cmd. Raises `InvalidArgumentError` when nothing is left.
    """
    if spec.command:
        argv = spec.command + spec.args
    elif spec.args:
        argv = image.entrypoint + spec.args
    else:
        argv = image.entrypoint + image.cmd
    if not argv or not argv[0]:
        raise InvalidArgumentError(
            "no command: config.command and config.args are empty and the image has neither Entrypoint nor Cmd",
            resource=f"container {spec.name}",
        )
    return argv


def environment(spec: ContainerSpec, image: ImageConfig, hostname: str) -> list[str]:
    """Return NAME=value lines: defaults, then the image's, then the container's; a later one replaces an earlier."""
    values: dict[str, str] = {}
    lines = [DEFAULT_PATH, f"HOSTNAME={hostname}", *(["TERM=xterm"] if spec.tty else []), *image.env]
    for line in lines:
        name, separator, value = line.partition("=")
        if name and separator:
            values[name] = value
    values.update(spec.envs)
    return [f"{name}={value}" for name, value in values.items()]


def capabilities(spec: ContainerSpec) -> tuple[str, ...]:
    """Return the container's capability set, sorted by number. "ALL" in drop empties it before the adds apply."""
    security = spec.security
    if security.privileged:
        return ALL_CAPABILITIES
    chosen = set(DEFAULT_CAPABILITIES)
    add = {_capability(name) for name in (*security.capabilities_add, *security.capabilities_ambient)}
    drop = {_capability(name) for name in security.capabilities_drop}
    if "ALL" in add:
        chosen = set(ALL_CAPABILITIES)
    if "ALL" in drop:
        chosen = set()
    chosen |= add - {"ALL"}
    chosen -= drop - {"ALL"}
    return tuple(name for name in ALL_CAPABILITIES if name in chosen)


def _capability(name: str) -> str:
    if name.upper() == "ALL":
        return "ALL"
    full = name.upper() if name.upper().startswith("CAP_") else "CAP_" + name.upper()
    if full not in ALL_CAPABILITIES:
        raise InvalidArgumentError(f"unknown capability {name!r}")
    return full


def resources(limits: LinuxResources) -> dict[str, Any]:
    """Return the OCI `linux.resources` object for CRI's limits; what is not set is left out."""
    memory = {
        key: value
        for key, value in (("limit", limits.memory_limit_bytes), ("swap", limits.memory_swap_limit_bytes))
        if value
    }
    cpu: dict[str, Any] = {
        key: value
        for key, value in (
            ("shares", limits.cpu_shares),
            ("quota", limits.cpu_quota_us),
            ("period", limits.cpu_period_us),
        )
        if value
    }
    # cpuset is left out: its numbers are the host's, and act there (vmrt/pods/cpusets.py).
    result: dict[str, Any] = {}
    if memory:
        result["memory"] = memory
    if cpu:
        result["cpu"] = cpu
    pages = [{"pageSize": h.page_size, "limit": h.limit_bytes} for h in limits.hugepage_limits if h.limit_bytes]
    if pages:
        result["hugepageLimits"] = pages
    if limits.unified:
        result["unified"] = dict(limits.unified)
    return result


def _default_mounts(spec: ContainerSpec) -> list[dict[str, Any]]:
    privileged = spec.security.privileged
    kernel = ["nosuid", "noexec", "nodev"]
    access = "rw" if privileged else "ro"
    return [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": kernel},
        {
            "destination": "/dev",
            "type": "tmpfs",
            "source": "tmpfs",
            "options": ["nosuid", "strictatime", "mode=755", "size=65536k"],
        },
        {
            "destination": "/dev/pts",
            "type": "devpts",
            "source": "devpts",
            "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        },
        {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": kernel},
        {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": [*kernel, access]},
        {
            "destination": "/sys/fs/cgroup",
            "type": "cgroup",
            "source": "cgroup",
            "options": [*kernel, "relatime", access],
        },
        {
            "destination": "/dev/shm",
            "type": "bind",
            "source": f"{layout.SANDBOX}/shm",
            "options": ["rbind", "rw", "nosuid", "noexec", "nodev"],
        },
    ]


def _file_mounts(spec: ContainerSpec, covered: set[str]) -> list[dict[str, Any]]:
    access = "ro" if spec.security.readonly_rootfs else "rw"
    return [
        {
            "destination": f"/etc/{name}",
            "type": "bind",
            "source": f"{layout.SANDBOX}/{name}",
            "options": ["rbind", "rprivate", access],
        }
        for name in ("hostname", "hosts", "resolv.conf")
        if f"/etc/{name}" not in covered
    ]


def _volume_mount(bound: BoundMount) -> dict[str, Any]:
    mount = bound.mount
    if mount.image:
        options = ["rbind", "rprivate", "ro", "nosuid", "nodev"]
        return {"destination": mount.container_path, "type": "bind", "source": bound.guest_source, "options": options}
    options = ["rbind", "rslave" if mount.propagation is Propagation.HOST_TO_CONTAINER else "rprivate"]
    # Not "rro": a submount appears in the guest when it is first walked to, with its parent's flag.
    options.append("ro" if mount.readonly and bound.guest_readonly else "rw")
    return {"destination": mount.container_path, "type": "bind", "source": bound.guest_source, "options": options}


def _depth(mount: Mapping[str, Any]) -> int:
    return len([part for part in str(mount["destination"]).split("/") if part])


def build(
    sandbox: SandboxSpec,
    spec: ContainerSpec,
    image: ImageConfig,
    *,
    hostname: str,
    mounts: Sequence[BoundMount] = (),
    seccomp: Mapping[str, Any] | None = None,
    apparmor: str = "",
) -> dict[str, Any]:
    """Return the OCI configuration as a JSON-able object.

    `hostname` is the pod's; `mounts` the container's volumes as the guest sees them; `seccomp` a resolved profile,
    `apparmor` the name of one.
    Raises `InvalidArgumentError` naming the field for what cannot be.
    """
    security = spec.security
    caps = capabilities(spec)
    ambient = [name for name in ALL_CAPABILITIES if name in {_capability(c) for c in security.capabilities_ambient}]
    covered = {mount.mount.container_path.rstrip("/") for mount in mounts}
    volumes = sorted((_volume_mount(bound) for bound in mounts), key=_depth)
    defaults = [mount for mount in _default_mounts(spec) if mount["destination"] not in covered]
    namespaces: list[dict[str, str]] = [{"type": "mount"}, {"type": "cgroup"}]
    match security.namespaces.pid:
        case NamespaceMode.CONTAINER:
            namespaces.append({"type": "pid"})
        case NamespaceMode.POD:
            namespaces.append({"type": "pid", "path": layout.POD_PID_NAMESPACE})
        case NamespaceMode.TARGET:
            namespaces.append({"type": "pid", "path": layout.TARGET_PID_NAMESPACE})
        case NamespaceMode.NODE:
            pass  # the guest's own: the node of this pod is its VM
    if security.namespaces.ipc is NamespaceMode.CONTAINER:
        namespaces.append({"type": "ipc"})
    if security.namespaces.userns is NamespaceMode.POD:
        namespaces += _POD_NAMESPACES
    limits = resources(spec.resources)
    limits["devices"] = [
        {"allow": security.privileged, "access": "rwm"},
        *([] if security.privileged else _DEVICE_RULES),
    ]
    linux: dict[str, Any] = {"namespaces": namespaces, "resources": limits}
    if not security.privileged:
        linux["maskedPaths"] = list(security.masked_paths)
        linux["readonlyPaths"] = list(security.readonly_paths)
        if seccomp is not None:
            linux["seccomp"] = dict(seccomp)
    working_dir = spec.working_dir or image.working_dir or "/"
    process: dict[str, Any] = {
        "terminal": spec.tty,
        "user": {"uid": 0, "gid": 0},
        "args": list(command(spec, image)),
        "env": environment(spec, image, hostname),
        "cwd": working_dir if working_dir.startswith("/") else "/" + working_dir,
        "capabilities": {
            "bounding": list(caps),
            "effective": list(caps),
            "permitted": list(caps),
            "inheritable": ambient,
            "ambient": ambient,
        },
        "noNewPrivileges": security.no_new_privs,
        "oomScoreAdj": spec.resources.oom_score_adj,
    }
    process["rlimits"] = [dict(limit) for limit in _RLIMITS]
    if apparmor:
        process["apparmorProfile"] = apparmor
    return {
        "ociVersion": OCI_VERSION,
        "process": process,
        "root": {"path": "rootfs", "readonly": security.readonly_rootfs},
        "mounts": defaults + _file_mounts(spec, covered) + volumes,
        "linux": linux,
        "annotations": {"vmrt.sandbox": f"{sandbox.namespace}/{sandbox.name}"},
    }


# CRI has no field for these. Open files as systemd gives them to a node's runtime (systemd-system.conf(5),
# DefaultLimitNOFILE); no bound on a user's processes: the kernel's would follow the VM's size, and uids of different
# containers are the same user to it. The pids controller is what bounds a container.
_RLIMITS = (
    {"type": "RLIMIT_NOFILE", "soft": 1024, "hard": 524288},
    {"type": "RLIMIT_NPROC", "soft": 2**64 - 1, "hard": 2**64 - 1},
)

# The pod's own where it has a user namespace; else they are the guest's and no container leaves them.
_POD_NAMESPACES = [
    {"type": "user", "path": layout.POD_USER_NAMESPACE},
    {"type": "network", "path": layout.POD_NETWORK_NAMESPACE},
    {"type": "ipc", "path": layout.POD_IPC_NAMESPACE},
    {"type": "uts", "path": layout.POD_UTS_NAMESPACE},
]


def _rule(kind: str, major: int | None, minor: int | None, access: str = "rwm") -> dict[str, Any]:
    rule: dict[str, Any] = {"allow": True, "type": kind, "access": access}
    if major is not None:
        rule["major"] = major
    if minor is not None:
        rule["minor"] = minor
    return rule


# runtime-spec "default devices" and what making nodes (without opening them) needs.
_DEVICE_RULES = [
    _rule("c", None, None, "m"),
    _rule("b", None, None, "m"),
    *(_rule("c", 1, minor) for minor in (3, 5, 7, 8, 9)),  # null zero full random urandom
    *(_rule("c", 5, minor) for minor in (0, 1, 2)),  # tty console ptmx
    _rule("c", 136, None),  # pts
]
