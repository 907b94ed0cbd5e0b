"""CRI's security contexts, in: namespaces, users, capabilities, profiles.

What a virtual machine cannot give, or vmrt does not give yet, is refused by name with `UnsupportedError`: a pod that
was promised less isolation or other files than it asked for must not start.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vmrt.cri import fields
from vmrt.cri.fields import refuse, unsupported
from vmrt.model import (
    IdMapping,
    NamespaceMode,
    NamespaceOptions,
    ProfileType,
    SecurityContext,
    SecurityProfile,
    SupplementalGroupsPolicy,
)
from vmrt.proto.runtime.v1 import api_pb2 as cri

NAMESPACE_MODES = {
    cri.POD: NamespaceMode.POD,
    cri.CONTAINER: NamespaceMode.CONTAINER,
    cri.NODE: NamespaceMode.NODE,
    cri.TARGET: NamespaceMode.TARGET,
}
GROUP_POLICIES = {
    cri.Merge: SupplementalGroupsPolicy.MERGE,
    cri.Strict: SupplementalGroupsPolicy.STRICT,
}
PROFILE_TYPES = {
    cri.SecurityProfile.RuntimeDefault: ProfileType.RUNTIME_DEFAULT,
    cri.SecurityProfile.Unconfined: ProfileType.UNCONFINED,
    cri.SecurityProfile.Localhost: ProfileType.LOCALHOST,
}
# capabilities(7), all that Linux 6.x knows; the guest's kernel may know no more than these.
_CAPABILITY_NAMES = """
    AUDIT_CONTROL AUDIT_READ AUDIT_WRITE BLOCK_SUSPEND BPF CHECKPOINT_RESTORE CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER
    FSETID IPC_LOCK IPC_OWNER KILL LEASE LINUX_IMMUTABLE MAC_ADMIN MAC_OVERRIDE MKNOD NET_ADMIN NET_BIND_SERVICE
    NET_BROADCAST NET_RAW PERFMON SETFCAP SETGID SETPCAP SETUID SYSLOG SYS_ADMIN SYS_BOOT SYS_CHROOT SYS_MODULE SYS_NICE
    SYS_PACCT SYS_PTRACE SYS_RAWIO SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG WAKE_ALARM ALL
"""
CAPABILITIES = frozenset(_CAPABILITY_NAMES.split())
_NO_HOST = "a pod of vmrt is a virtual machine and has no part in the host's namespaces"
_DELEGATE = "use another runtime handler, or let a delegate take such pods: handlers.NAME.{}, docs/delegate.md"


def sandbox_security(context: cri.LinuxSandboxSecurityContext, path: str) -> SecurityContext:
    """Translate a sandbox's context."""
    _no_selinux(context.selinux_options, f"{path}.selinux_options")
    if context.HasField("run_as_group") and not context.HasField("run_as_user"):
        refuse(f"{path}.run_as_group", "is set without run_as_user")
    return SecurityContext(
        namespaces=_namespaces(context.namespace_options, f"{path}.namespace_options", of_sandbox=True),
        privileged=context.privileged,
        run_as_user=_id(context, "run_as_user", path),
        run_as_group=_id(context, "run_as_group", path),
        supplemental_groups=_groups(context.supplemental_groups, f"{path}.supplemental_groups"),
        supplemental_groups_policy=_policy(context.supplemental_groups_policy, path),
        readonly_rootfs=context.readonly_rootfs,
        seccomp=_seccomp(context, path),
        apparmor=_apparmor(context, "", path),
    )


def container_security(
    context: cri.LinuxContainerSecurityContext, path: str, sandbox: SecurityContext
) -> SecurityContext:
    """Translate a container's context; `sandbox` is that of its pod, which has to allow `privileged`."""
    _no_selinux(context.selinux_options, f"{path}.selinux_options")
    if context.privileged and not sandbox.privileged:
        refuse(f"{path}.privileged", "is set, but the pod sandbox is not privileged")
    namespaces = _namespaces(context.namespace_options, f"{path}.namespace_options", of_sandbox=False)
    pods = sandbox.namespaces
    if (namespaces.userns, namespaces.uids, namespaces.gids) != (pods.userns, pods.uids, pods.gids):
        refuse(f"{path}.namespace_options.userns_options", "differs from the pod's: its containers share one")
    has_user = context.HasField("run_as_user")
    if has_user and context.run_as_username:
        refuse(f"{path}.run_as_username", "and run_as_user are both set")
    if context.HasField("run_as_group") and not (has_user or context.run_as_username):
        refuse(f"{path}.run_as_group", "is set without run_as_user or run_as_username")
    return SecurityContext(
        namespaces=namespaces,
        privileged=context.privileged,
        capabilities_add=_capabilities(context.capabilities.add_capabilities, f"{path}.capabilities.add_capabilities"),
        capabilities_drop=_capabilities(
            context.capabilities.drop_capabilities, f"{path}.capabilities.drop_capabilities"
        ),
        capabilities_ambient=_capabilities(
            context.capabilities.add_ambient_capabilities, f"{path}.capabilities.add_ambient_capabilities"
        ),
        run_as_user=_id(context, "run_as_user", path),
        run_as_username=_username(context.run_as_username, f"{path}.run_as_username"),
        run_as_group=_id(context, "run_as_group", path),
        supplemental_groups=_groups(context.supplemental_groups, f"{path}.supplemental_groups"),
        supplemental_groups_policy=_policy(context.supplemental_groups_policy, path),
        readonly_rootfs=context.readonly_rootfs,
        no_new_privs=context.no_new_privs,
        masked_paths=_paths(context.masked_paths, f"{path}.masked_paths"),
        readonly_paths=_paths(context.readonly_paths, f"{path}.readonly_paths"),
        seccomp=_seccomp(context, path),
        apparmor=_apparmor(context, context.apparmor_profile, path),
    )


def id_mappings(mappings: Sequence[cri.IDMapping], path: str) -> tuple[IdMapping, ...]:
    """Translate the ranges of a user namespace."""
    fields.few(mappings, path, 16)
    for index, mapping in enumerate(mappings):
        where = f"{path}[{index}]"
        fields.number(mapping.length, f"{where}.length", 1, 2**32 - 1)
        for key, start in (("host_id", mapping.host_id), ("container_id", mapping.container_id)):
            if start + mapping.length > 2**32:
                refuse(f"{where}.{key}", "plus length goes beyond the last id")
    return tuple(IdMapping(mapping.host_id, mapping.container_id, mapping.length) for mapping in mappings)


def _mode(value: int, path: str) -> NamespaceMode:
    try:
        return NAMESPACE_MODES[cri.NamespaceMode.ValueType(value)]
    except KeyError:
        refuse(path, f"has the unknown value {value}")


def _namespaces(options: cri.NamespaceOption, path: str, *, of_sandbox: bool) -> NamespaceOptions:
    network = _mode(options.network, f"{path}.network")
    if network is NamespaceMode.NODE:
        unsupported(f"{path}.network", f"is NODE (hostNetwork): {_NO_HOST}", hint=_DELEGATE.format("host_network"))
    if network is not NamespaceMode.POD:
        refuse(f"{path}.network", f"is {network.name}; only POD and NODE exist for it")
    ipc = _mode(options.ipc, f"{path}.ipc")
    if ipc is NamespaceMode.NODE:
        unsupported(f"{path}.ipc", f"is NODE (hostIPC): {_NO_HOST}", hint=_DELEGATE.format("host_ipc"))
    if ipc is not NamespaceMode.POD:
        refuse(f"{path}.ipc", f"is {ipc.name}; only POD and NODE exist for it")
    # NODE is honoured for processes: it is the root PID namespace of the guest, where every container can be seen.
    pid = _mode(options.pid, f"{path}.pid")
    target = fields.text(options.target_id, f"{path}.target_id", limit=64)
    if pid is NamespaceMode.TARGET:
        if of_sandbox:
            refuse(f"{path}.pid", "is TARGET, which only a container can ask for")
        if not target:
            refuse(f"{path}.target_id", "is empty, with pid being TARGET")
    elif target:
        refuse(f"{path}.target_id", f"is set, with pid being {pid.name}")
    userns, uids, gids = _user_namespace(options, f"{path}.userns_options")
    if userns is NamespaceMode.POD and pid is NamespaceMode.NODE:
        unsupported(
            f"{path}.pid", "is NODE in a pod with a user namespace, which has no say in a PID namespace outside of it"
        )
    return NamespaceOptions(network=network, pid=pid, ipc=ipc, target_id=target, userns=userns, uids=uids, gids=gids)


def _user_namespace(
    namespaces: cri.NamespaceOption, path: str
) -> tuple[NamespaceMode, tuple[IdMapping, ...], tuple[IdMapping, ...]]:
    if not namespaces.HasField("userns_options"):  # an empty one would mean POD
        return NamespaceMode.NODE, (), ()
    options = namespaces.userns_options
    mode = _mode(options.mode, f"{path}.mode")
    uids, gids = id_mappings(options.uids, f"{path}.uids"), id_mappings(options.gids, f"{path}.gids")
    if mode is NamespaceMode.NODE:
        if uids or gids:
            refuse(path, "has mappings, with mode being NODE")
        return mode, (), ()
    if mode is not NamespaceMode.POD:
        refuse(f"{path}.mode", f"is {mode.name}; only POD and NODE exist for it")
    for key, ranges in (("uids", uids), ("gids", gids)):
        if len(ranges) != 1:
            refuse(f"{path}.{key}", f"has {len(ranges)} ranges, exactly one is needed")
        if ranges[0].container_id != 0:
            refuse(f"{path}.{key}[0].container_id", "is not 0: root of the container must be mapped")
    return mode, uids, gids


def _no_selinux(options: cri.SELinuxOption, path: str) -> None:
    for key, value in (
        ("user", options.user),
        ("role", options.role),
        ("type", options.type),
        ("level", options.level),
    ):
        if value:
            unsupported(f"{path}.{key}", "is set, but the guest's kernel runs without SELinux")


def _id(
    context: cri.LinuxSandboxSecurityContext | cri.LinuxContainerSecurityContext, key: str, path: str
) -> int | None:
    if key == "run_as_user":
        return fields.user_id(context.run_as_user.value, f"{path}.{key}") if context.HasField("run_as_user") else None
    return fields.user_id(context.run_as_group.value, f"{path}.{key}") if context.HasField("run_as_group") else None


def _username(value: str, path: str) -> str:
    fields.text(value, path, limit=256)
    if ":" in value:
        refuse(path, f"is {fields.short(value)}; ':' cannot be part of it")
    return value


def _groups(values: Iterable[int], path: str) -> tuple[int, ...]:
    groups = tuple(values)
    fields.few(groups, path, 65536)  # NGROUPS_MAX
    return tuple(fields.user_id(value, f"{path}[{index}]") for index, value in enumerate(groups))


def _policy(value: int, path: str) -> SupplementalGroupsPolicy:
    try:
        return GROUP_POLICIES[cri.SupplementalGroupsPolicy.ValueType(value)]
    except KeyError:
        refuse(f"{path}.supplemental_groups_policy", f"has the unknown value {value}")


def _capabilities(values: Sequence[str], path: str) -> tuple[str, ...]:
    fields.few(values, path, 128)
    names = tuple(value.upper().removeprefix("CAP_") for value in values)
    for index, name in enumerate(names):
        if name not in CAPABILITIES:
            refuse(f"{path}[{index}]", f"is {fields.short(values[index])}, which is no capability (capabilities(7))")
    return names


def _paths(values: Sequence[str], path: str) -> tuple[str, ...]:
    fields.few(values, path, 1024)
    return tuple(fields.absolute_path(value, f"{path}[{index}]", required=True) for index, value in enumerate(values))


def _profile(profile: cri.SecurityProfile, path: str) -> SecurityProfile:
    try:
        kind = PROFILE_TYPES[profile.profile_type]
    except KeyError:
        refuse(f"{path}.profile_type", f"has the unknown value {profile.profile_type}")
    if kind is not ProfileType.LOCALHOST:
        return SecurityProfile(kind)
    reference = profile.localhost_ref.removeprefix("localhost/")
    return SecurityProfile(kind, fields.text(reference, f"{path}.localhost_ref", required=True))


def _old_profile(value: str, path: str) -> SecurityProfile | None:
    """Translate the deprecated spelling; "" is no profile."""
    match fields.text(value, path):
        case "":
            return None
        case "runtime/default" | "docker/default":
            return SecurityProfile(ProfileType.RUNTIME_DEFAULT)
        case "unconfined":
            return SecurityProfile(ProfileType.UNCONFINED)
    reference = value.removeprefix("localhost/")
    if reference == value or not reference:
        refuse(path, f"is {fields.short(value)}, which names no profile")
    return SecurityProfile(ProfileType.LOCALHOST, reference)


def _seccomp(
    context: cri.LinuxSandboxSecurityContext | cri.LinuxContainerSecurityContext, path: str
) -> SecurityProfile | None:
    if context.HasField("seccomp"):
        profile, where = _profile(context.seccomp, f"{path}.seccomp"), f"{path}.seccomp.localhost_ref"
    else:
        old = _old_profile(context.seccomp_profile_path, f"{path}.seccomp_profile_path")
        if old is None:
            return None
        profile, where = old, f"{path}.seccomp_profile_path"
    if profile.type is ProfileType.LOCALHOST:
        fields.absolute_path(profile.localhost_ref, where, required=True)
    return profile


def _apparmor(
    context: cri.LinuxSandboxSecurityContext | cri.LinuxContainerSecurityContext, old: str, path: str
) -> SecurityProfile | None:
    if context.HasField("apparmor"):
        return _profile(context.apparmor, f"{path}.apparmor")
    return _old_profile(old, f"{path}.apparmor_profile")
