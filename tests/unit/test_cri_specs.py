"""Protobuf in: every field arrives, every bad one is refused by its name."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vmrt.cri import specs
from vmrt.errors import Code, InvalidArgumentError, UnsupportedError
from vmrt.model import (
    DnsConfig,
    HugepageLimit,
    IdMapping,
    LinuxResources,
    Mount,
    NamespaceMode,
    NamespaceOptions,
    PortMapping,
    ProfileType,
    Propagation,
    Protocol,
    SandboxSpec,
    SecurityContext,
    SecurityProfile,
    SupplementalGroupsPolicy,
)
from vmrt.proto.runtime.v1 import api_pb2 as cri

HANDLERS = ("vm", "vm-large")
SANDBOX = SandboxSpec(name="p", uid="u", namespace="n")
PRIVILEGED = SandboxSpec(name="p", uid="u", namespace="n", security=SecurityContext(privileged=True))


def sandbox_config() -> cri.PodSandboxConfig:
    return cri.PodSandboxConfig(metadata=cri.PodSandboxMetadata(name="web", uid="1-2", namespace="default", attempt=3))


def container_config() -> cri.ContainerConfig:
    return cri.ContainerConfig(
        metadata=cri.ContainerMetadata(name="main", attempt=1), image=cri.ImageSpec(image="sha256:ab")
    )


def test_full_sandbox() -> None:
    config = sandbox_config()
    config.hostname = "web-0"
    config.log_directory = "/var/log/pods/x"
    config.dns_config.servers.extend(["10.0.0.10", "fd00::a"])
    config.dns_config.searches.append("svc.cluster.local")
    config.dns_config.options.append("ndots:5")
    config.port_mappings.add(protocol=cri.UDP, container_port=53, host_port=5353, host_ip="127.0.0.1")
    config.labels["a"] = "b"
    config.annotations["c"] = "d\ne"
    linux = config.linux
    linux.cgroup_parent = "/kubepods/pod1"
    linux.sysctls["net.ipv4.ip_local_port_range"] = "1024\t65000"
    linux.overhead.memory_limit_in_bytes = 7
    linux.resources.cpu_quota = 20000
    linux.resources.cpu_period = 100000
    context = linux.security_context
    context.privileged = True
    context.readonly_rootfs = True
    context.run_as_user.value = 0
    context.run_as_group.value = 5
    context.supplemental_groups.extend([7, 8])
    context.supplemental_groups_policy = cri.Strict
    context.namespace_options.pid = cri.NODE
    context.seccomp.profile_type = cri.SecurityProfile.RuntimeDefault
    assert specs.sandbox_spec(config, "vm", HANDLERS) == SandboxSpec(
        name="web",
        uid="1-2",
        namespace="default",
        attempt=3,
        hostname="web-0",
        log_directory="/var/log/pods/x",
        dns=DnsConfig(("10.0.0.10", "fd00::a"), ("svc.cluster.local",), ("ndots:5",)),
        port_mappings=(PortMapping(Protocol.UDP, 53, 5353, "127.0.0.1"),),
        labels={"a": "b"},
        annotations={"c": "d\ne"},
        runtime_handler="vm",
        cgroup_parent="/kubepods/pod1",
        sysctls={"net.ipv4.ip_local_port_range": "1024\t65000"},
        security=SecurityContext(
            namespaces=specs.sandbox_spec(_with_pid_node(), "", HANDLERS).security.namespaces,
            privileged=True,
            readonly_rootfs=True,
            run_as_user=0,
            run_as_group=5,
            supplemental_groups=(7, 8),
            supplemental_groups_policy=SupplementalGroupsPolicy.STRICT,
            seccomp=SecurityProfile(ProfileType.RUNTIME_DEFAULT),
        ),
        overhead=LinuxResources(memory_limit_bytes=7),
        resources=LinuxResources(cpu_quota_us=20000, cpu_period_us=100000),
    )


def _with_pid_node() -> cri.PodSandboxConfig:
    config = sandbox_config()
    config.linux.security_context.namespace_options.pid = cri.NODE
    return config


def test_absent_parts_of_a_sandbox_stay_absent() -> None:
    spec = specs.sandbox_spec(sandbox_config(), "", HANDLERS)
    assert (spec.dns, spec.overhead, spec.resources, spec.security.run_as_user) == (None, None, None, None)
    assert specs.sandbox_spec(_with_pid_node(), "", HANDLERS).security.namespaces.pid is NamespaceMode.NODE


def _sandbox_change(path: str, value: object) -> Callable[[cri.PodSandboxConfig], None]:
    """Return a change that sets the field at a dotted path below the configuration."""

    def change(config: cri.PodSandboxConfig) -> None:
        *parents, last = path.split(".")
        message: object = config
        for parent in parents:
            message = getattr(message, parent)
        setattr(message, last, value)

    return change


CONTEXT = "linux.security_context"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c.ClearField("metadata"), "config.metadata is missing"),
        (_sandbox_change("metadata.name", ""), "config.metadata.name is empty"),
        (_sandbox_change("metadata.uid", ""), "config.metadata.uid is empty"),
        (_sandbox_change("metadata.namespace", ""), "config.metadata.namespace is empty"),
        (_sandbox_change("metadata.name", "a/b"), "config.metadata.name is 'a/b'"),
        (_sandbox_change("metadata.name", "a\nb"), "config.metadata.name contains the control character"),
        (_sandbox_change("metadata.name", "a" * 254), "config.metadata.name is 254 octets long, more than 253"),
        (_sandbox_change("hostname", "-x"), "config.hostname is '-x'"),
        (_sandbox_change("hostname", "x" * 65), "config.hostname is 65 octets long"),
        (_sandbox_change("log_directory", "var/log"), "config.log_directory is 'var/log', not an absolute path"),
        (_sandbox_change("log_directory", "/var/../etc"), "config.log_directory is '/var/../etc'; '..'"),
        (lambda c: c.dns_config.servers.append("ns.example"), "config.dns_config.servers[0] is 'ns.example'"),
        (lambda c: c.dns_config.searches.append("a b"), "config.dns_config.searches[0]"),
        (lambda c: c.dns_config.options.append("x\nnameserver 6.6.6.6"), "config.dns_config.options[0]"),
        (lambda c: c.port_mappings.add(container_port=0), "config.port_mappings[0].container_port is 0"),
        (lambda c: c.port_mappings.add(container_port=1, host_port=-1), "config.port_mappings[0].host_port is -1"),
        (lambda c: c.port_mappings.add(container_port=1, host_ip="x"), "config.port_mappings[0].host_ip is 'x'"),
        (lambda c: c.port_mappings.add(container_port=1, protocol=9), "config.port_mappings[0].protocol has the unkn"),
        (lambda c: c.labels.update({"": "x"}), "config.labels has an empty key"),
        (lambda c: c.annotations.update({"a": "x" * 2**20}), "config.annotations is 1048577 octets in all"),
        (lambda c: c.linux.sysctls.update({"net/../x": "1"}), "config.linux.sysctls has the key 'net/../x'"),
        (lambda c: c.linux.sysctls.update({"single": "1"}), "config.linux.sysctls has the key 'single'"),
        (lambda c: c.linux.sysctls.update({"a.b": ""}), "config.linux.sysctls['a.b'] is empty"),
        (lambda c: c.linux.sysctls.update({"a.b": "1\n2"}), "config.linux.sysctls['a.b'] contains the control"),
        (_sandbox_change(f"{CONTEXT}.namespace_options.network", 1), "namespace_options.network is CONTAINER"),
        (_sandbox_change(f"{CONTEXT}.namespace_options.network", 77), "namespace_options.network has the unknown"),
        (_sandbox_change(f"{CONTEXT}.namespace_options.pid", cri.TARGET), "namespace_options.pid is TARGET"),
        (_sandbox_change(f"{CONTEXT}.namespace_options.target_id", "x"), "namespace_options.target_id is set"),
        (_sandbox_change(f"{CONTEXT}.namespace_options.ipc", cri.CONTAINER), "namespace_options.ipc is CONTAINER"),
        (_sandbox_change(f"{CONTEXT}.run_as_group.value", 1), "run_as_group is set without run_as_user"),
        (_sandbox_change(f"{CONTEXT}.run_as_user.value", -1), "run_as_user is -1, not between 0 and"),
        (_sandbox_change(f"{CONTEXT}.run_as_user.value", 2**32 - 1), "run_as_user is 4294967295, not between"),
        (_sandbox_change(f"{CONTEXT}.supplemental_groups_policy", 5), "supplemental_groups_policy has the unknown"),
        (_sandbox_change(f"{CONTEXT}.seccomp.profile_type", 9), "seccomp.profile_type has the unknown value 9"),
        (_sandbox_change(f"{CONTEXT}.seccomp.profile_type", 2), "seccomp.localhost_ref is empty"),
        (_sandbox_change(f"{CONTEXT}.seccomp_profile_path", "what"), "seccomp_profile_path is 'what'"),
        (_sandbox_change(f"{CONTEXT}.seccomp_profile_path", "localhost/x"), "seccomp_profile_path is 'x', not an"),
        (_sandbox_change("linux.resources.cpu_period", 1), "config.linux.resources.cpu_period is 1"),
        (_sandbox_change("linux.overhead.memory_limit_in_bytes", -5), "config.linux.overhead.memory_limit_in_bytes"),
    ],
)
def test_bad_sandbox_field_is_refused_by_name(change: Callable[[cri.PodSandboxConfig], None], named: str) -> None:
    config = sandbox_config()
    change(config)
    with pytest.raises(InvalidArgumentError) as caught:
        specs.sandbox_spec(config, "", HANDLERS)
    assert named in str(caught.value)
    assert not isinstance(caught.value, UnsupportedError)


def test_unknown_handler() -> None:
    with pytest.raises(InvalidArgumentError, match=r"runtime_handler is 'kata'.*configured: vm, vm-large"):
        specs.sandbox_spec(sandbox_config(), "kata", HANDLERS)


def _map_users(config: cri.PodSandboxConfig, pid: cri.NamespaceMode.ValueType = cri.POD) -> None:
    config.linux.security_context.namespace_options.pid = pid
    options = _pod_userns(config)
    options.uids.add(host_id=100000, container_id=0, length=65536)
    options.gids.add(host_id=200000, container_id=0, length=65536)


def _pod_userns(config: cri.PodSandboxConfig) -> cri.UserNamespace:
    options = config.linux.security_context.namespace_options.userns_options
    options.mode = cri.POD
    return options


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_sandbox_change(f"{CONTEXT}.namespace_options.network", cri.NODE), "namespace_options.network is NODE"),
        (_sandbox_change(f"{CONTEXT}.namespace_options.ipc", cri.NODE), "namespace_options.ipc is NODE"),
        (_sandbox_change(f"{CONTEXT}.selinux_options.level", "s0"), "selinux_options.level is set"),
        (_sandbox_change(f"{CONTEXT}.apparmor.profile_type", 2), "localhost_ref is empty"),
        (
            lambda c: _map_users(c, pid=cri.NODE),
            "namespace_options.pid is NODE in a pod with a user namespace",
        ),
    ],
)
def test_what_a_vm_cannot_do_is_unsupported(change: Callable[[cri.PodSandboxConfig], None], named: str) -> None:
    config = sandbox_config()
    change(config)
    with pytest.raises(InvalidArgumentError) as caught:
        specs.sandbox_spec(config, "", HANDLERS)
    assert named in str(caught.value)
    assert caught.value.code is Code.INVALID_ARGUMENT
    assert isinstance(caught.value, UnsupportedError) or "is empty" in named


@pytest.mark.parametrize(
    ("mode", "uids", "gids", "named"),
    [
        (cri.CONTAINER, 0, 0, "userns_options.mode is CONTAINER"),
        (cri.TARGET, 0, 0, "userns_options.mode is TARGET"),
        (cri.POD, 2, 1, "userns_options.uids has 2 ranges"),
        (cri.POD, 1, 0, "userns_options.gids has 0 ranges"),
        (cri.NODE, 1, 1, "userns_options has mappings, with mode being NODE"),
    ],
)
def test_malformed_user_namespace(mode: cri.NamespaceMode.ValueType, uids: int, gids: int, named: str) -> None:
    config = sandbox_config()
    options = config.linux.security_context.namespace_options.userns_options
    options.mode = mode
    for _ in range(uids):
        options.uids.add(host_id=1000, container_id=0, length=10)
    for _ in range(gids):
        options.gids.add(host_id=1000, container_id=0, length=10)
    with pytest.raises(InvalidArgumentError) as caught:
        specs.sandbox_spec(config, "", HANDLERS)
    assert named in str(caught.value)


def test_user_namespace_must_map_root() -> None:
    config = sandbox_config()
    options = _pod_userns(config)
    options.uids.add(host_id=1000, container_id=1, length=10)
    options.gids.add(host_id=1000, container_id=0, length=10)
    with pytest.raises(InvalidArgumentError, match=r"uids\[0\].container_id is not 0"):
        specs.sandbox_spec(config, "", HANDLERS)


def test_user_namespace_of_a_pod_and_its_containers() -> None:
    config = sandbox_config()
    _map_users(config)
    sandbox = specs.sandbox_spec(config, "", HANDLERS)
    assert sandbox.security.namespaces == NamespaceOptions(
        userns=NamespaceMode.POD, uids=(IdMapping(100000, 0, 65536),), gids=(IdMapping(200000, 0, 65536),)
    )
    theirs = container_config()
    with pytest.raises(InvalidArgumentError, match="userns_options differs from the pod's"):
        specs.container_spec(theirs, sandbox)
    options = theirs.linux.security_context.namespace_options.userns_options
    options.MergeFrom(config.linux.security_context.namespace_options.userns_options)
    assert specs.container_spec(theirs, sandbox).security.namespaces.uids == (IdMapping(100000, 0, 65536),)
    with pytest.raises(InvalidArgumentError, match="userns_options differs from the pod's"):
        specs.container_spec(theirs, specs.sandbox_spec(sandbox_config(), "", HANDLERS))


def test_user_namespace_of_the_node_is_none() -> None:
    config = sandbox_config()
    config.linux.security_context.namespace_options.userns_options.mode = cri.NODE
    assert specs.sandbox_spec(config, "", HANDLERS).security.namespaces.userns is NamespaceMode.NODE


def test_full_container() -> None:
    config = container_config()
    config.image.user_specified_image = "busybox"
    config.command.extend(["/bin/sh", "-c"])
    config.args.extend(["", "a\nb"])
    config.working_dir = "/srv"
    config.envs.add(key="A", value=b"1=\xc3\xa4")
    config.mounts.add(
        container_path="/data",
        host_path="/srv/data",
        readonly=True,
        selinux_relabel=True,
        propagation=cri.PROPAGATION_HOST_TO_CONTAINER,
    )
    config.labels["l"] = "m"
    config.annotations["n"] = "o"
    config.log_path = "main/0.log"
    config.stdin = config.stdin_once = config.tty = True
    config.stop_signal = cri.SIGRTMINPLUS3
    limits = config.linux.resources
    limits.cpu_quota = -1
    limits.cpu_shares = 262144
    limits.oom_score_adj = -997
    limits.cpuset_cpus = "0-3,7"
    limits.hugepage_limits.add(page_size="2MB", limit=0)
    limits.unified["memory.oom.group"] = "1"
    limits.memory_swap_limit_in_bytes = -1
    context = config.linux.security_context
    context.privileged = True
    context.capabilities.add_capabilities.extend(["NET_ADMIN", "cap_sys_admin"])
    context.capabilities.drop_capabilities.append("ALL")
    context.namespace_options.pid = cri.TARGET
    context.namespace_options.target_id = "abc"
    context.run_as_username = "nobody"
    context.run_as_group.value = 9
    context.no_new_privs = True
    context.masked_paths.append("/proc/kcore")
    context.readonly_paths.append("/proc/sys")
    context.seccomp.profile_type = cri.SecurityProfile.Localhost
    context.seccomp.localhost_ref = "localhost//srv/profile.json"
    context.apparmor_profile = "runtime/default"

    spec = specs.container_spec(config, PRIVILEGED)
    assert (spec.name, spec.attempt, spec.image, spec.user_specified_image) == ("main", 1, "sha256:ab", "busybox")
    assert (spec.command, spec.args, spec.working_dir) == (("/bin/sh", "-c"), ("", "a\nb"), "/srv")
    assert spec.envs == (("A", "1=ä"),)
    assert spec.mounts == (
        Mount("/data", "/srv/data", readonly=True, selinux_relabel=True, propagation=Propagation.HOST_TO_CONTAINER),
    )
    assert (spec.labels, spec.annotations, spec.log_path) == ({"l": "m"}, {"n": "o"}, "main/0.log")
    assert (spec.stdin, spec.stdin_once, spec.tty, spec.stop_signal) == (True, True, True, "SIGRTMIN+3")
    assert spec.resources == LinuxResources(
        cpu_quota_us=-1,
        cpu_shares=262144,
        oom_score_adj=-997,
        cpuset_cpus="0-3,7",
        hugepage_limits=(HugepageLimit("2MB", 0),),
        unified={"memory.oom.group": "1"},
        memory_swap_limit_bytes=-1,
    )
    security = spec.security
    assert security.privileged
    assert security.no_new_privs
    assert (security.capabilities_add, security.capabilities_drop) == (("NET_ADMIN", "SYS_ADMIN"), ("ALL",))
    assert (security.namespaces.pid, security.namespaces.target_id) == (NamespaceMode.TARGET, "abc")
    assert (security.run_as_user, security.run_as_username, security.run_as_group) == (None, "nobody", 9)
    assert (security.masked_paths, security.readonly_paths) == (("/proc/kcore",), ("/proc/sys",))
    assert security.seccomp == SecurityProfile(ProfileType.LOCALHOST, "/srv/profile.json")
    assert security.apparmor == SecurityProfile(ProfileType.RUNTIME_DEFAULT)


def test_new_profile_field_wins_over_the_deprecated_one() -> None:
    config = container_config()
    context = config.linux.security_context
    context.seccomp_profile_path = "localhost/nonsense"
    context.apparmor_profile = "localhost/nonsense"
    context.seccomp.profile_type = cri.SecurityProfile.Unconfined
    context.apparmor.profile_type = cri.SecurityProfile.Unconfined
    security = specs.container_spec(config, SANDBOX).security
    assert security.seccomp == security.apparmor == SecurityProfile(ProfileType.UNCONFINED)


@pytest.mark.parametrize(
    ("old", "kind"),
    [
        ("", None),
        ("runtime/default", ProfileType.RUNTIME_DEFAULT),
        ("docker/default", ProfileType.RUNTIME_DEFAULT),
        ("unconfined", ProfileType.UNCONFINED),
        ("localhost//p.json", ProfileType.LOCALHOST),
    ],
)
def test_deprecated_seccomp_spelling(old: str, kind: ProfileType | None) -> None:
    config = container_config()
    config.linux.security_context.seccomp_profile_path = old
    seccomp = specs.container_spec(config, SANDBOX).security.seccomp
    assert (seccomp.type if seccomp else None) == kind


@pytest.mark.parametrize(
    ("change", "named", "kind"),
    [
        (lambda c: c.ClearField("metadata"), "config.metadata is missing", InvalidArgumentError),
        (lambda c: c.metadata.ClearField("name"), "config.metadata.name is empty", InvalidArgumentError),
        (lambda c: c.ClearField("image"), "config.image.image is empty", InvalidArgumentError),
        (lambda c: c.command.append("a\0b"), "config.command[0] contains a NUL", InvalidArgumentError),
        (lambda c: c.envs.add(value=b"x"), "config.envs[0].key is empty", InvalidArgumentError),
        (lambda c: c.envs.add(key="A=B"), "config.envs[0].key is 'A=B'", InvalidArgumentError),
        (
            lambda c: c.envs.add(key="A", value=b"\xff"),
            "config.envs[0].value of 'A' is not UTF-8",
            InvalidArgumentError,
        ),
        (lambda c: c.mounts.add(host_path="/x"), "config.mounts[0].container_path is empty", InvalidArgumentError),
        (lambda c: c.mounts.add(container_path="/x"), "config.mounts[0].host_path is empty", InvalidArgumentError),
        (
            lambda c: c.mounts.add(container_path="/x", host_path="/y", image_sub_path="z"),
            "config.mounts[0].image_sub_path is set without image",
            InvalidArgumentError,
        ),
        (
            lambda c: c.mounts.add(container_path="/x", host_path="/y", propagation=8),
            "config.mounts[0].propagation has the unknown value 8",
            InvalidArgumentError,
        ),
        (
            lambda c: c.mounts.add(container_path="/x", host_path="/y", propagation=cri.PROPAGATION_BIDIRECTIONAL),
            "config.mounts[0].propagation is PROPAGATION_BIDIRECTIONAL",
            UnsupportedError,
        ),
        (
            lambda c: c.mounts.add(container_path="/x", host_path="/y", recursive_read_only=True),
            "config.mounts[0].recursive_read_only is set without readonly",
            InvalidArgumentError,
        ),
        (
            lambda c: c.mounts.add(
                container_path="/x", host_path="/y", recursive_read_only=True, readonly=True, propagation=1
            ),
            "config.mounts[0].recursive_read_only is set, with propagation",
            InvalidArgumentError,
        ),
        (
            lambda c: c.mounts.add(container_path="/x", image=cri.ImageSpec(image="i")),
            "config.mounts[0].readonly is false",
            InvalidArgumentError,
        ),
        (
            lambda c: c.mounts.add(container_path="/x", host_path="/y", readonly=True, image=cri.ImageSpec(image="i")),
            "config.mounts[0].host_path is set together with image",
            InvalidArgumentError,
        ),
        (
            lambda c: c.mounts.add(container_path="/x", readonly=True, image=cri.ImageSpec(image="i"), propagation=1),
            "config.mounts[0].propagation is not PROPAGATION_PRIVATE",
            InvalidArgumentError,
        ),
        (
            lambda c: c.mounts.add(
                container_path="/x", readonly=True, image=cri.ImageSpec(image="i"), image_sub_path="a/../../b"
            ),
            "config.mounts[0].image_sub_path is 'a/../../b'; '..'",
            InvalidArgumentError,
        ),
        (
            lambda c: c.mounts.add(
                container_path="/x", readonly=True, image=cri.ImageSpec(image="i"), image_sub_path="/etc"
            ),
            "config.mounts[0].image_sub_path is '/etc', not a relative path",
            InvalidArgumentError,
        ),
        (
            lambda c: c.mounts.add(
                container_path="/x",
                readonly=True,
                image=cri.ImageSpec(image="i"),
                uidMappings=[cri.IDMapping(host_id=1, length=1)],
            ),
            "config.mounts[0].gidMappings is empty, with the other one being set",
            InvalidArgumentError,
        ),
        (
            lambda c: c.mounts.add(
                container_path="/x", host_path="/y", uidMappings=[cri.IDMapping(host_id=1, length=1)]
            ),
            "config.mounts[0].gidMappings is empty, with the other one being set",
            InvalidArgumentError,
        ),
        (
            lambda c: c.mounts.add(container_path="/x", host_path="/y", gidMappings=[cri.IDMapping(host_id=1)]),
            "config.mounts[0].gidMappings[0].length is 0",
            InvalidArgumentError,
        ),
        (
            lambda c: c.devices.add(host_path="/dev/kvm", container_path="/dev/kvm"),
            "config.devices[0].permissions is '', not made of",
            InvalidArgumentError,
        ),
        (
            lambda c: c.devices.add(host_path="/dev/kvm", container_path="/dev/kvm", permissions="rrw"),
            "config.devices[0].permissions is 'rrw', not made of",
            InvalidArgumentError,
        ),
        (
            lambda c: c.devices.add(host_path="kvm", container_path="/dev/kvm", permissions="rw"),
            "config.devices[0].host_path is 'kvm', not an absolute",
            InvalidArgumentError,
        ),
        (
            lambda c: c.CDI_devices.add(name="a.b/c"),
            "config.CDI_devices[0].name is 'a.b/c', not a CDI device",
            InvalidArgumentError,
        ),
        (
            lambda c: c.annotations.update({"cdi.k8s.io/gpu": "a.b/c=d,"}),
            "config.annotations['cdi.k8s.io/gpu'] is '', not a CDI device",
            InvalidArgumentError,
        ),
        (lambda c: setattr(c, "log_path", "/abs"), "config.log_path is '/abs', not a relative", InvalidArgumentError),
        (lambda c: setattr(c, "log_path", "../x"), "config.log_path is '../x'; '..'", InvalidArgumentError),
        (lambda c: setattr(c, "working_dir", "srv"), "config.working_dir is 'srv'", InvalidArgumentError),
        (lambda c: setattr(c, "stop_signal", 99), "config.stop_signal has the unknown value 99", InvalidArgumentError),
        (
            lambda c: c.linux.resources.unified.update({"cpuset.cpus": "1"}),
            "config.linux.resources.unified has the key 'cpuset.cpus': the guest has other CPUs",
            InvalidArgumentError,
        ),
        (
            lambda c: setattr(c.linux.resources, "cpuset_mems", "0-99999"),
            "config.linux.resources.cpuset_mems is '0-99999': 99999 is more than any kernel has",
            InvalidArgumentError,
        ),
        (
            lambda c: c.linux.resources.unified.update({"../x": "1"}),
            "config.linux.resources.unified has the key '../x'",
            InvalidArgumentError,
        ),
        (
            lambda c: setattr(c.linux.resources, "memory_swap_limit_in_bytes", 5),
            "config.linux.resources.memory_swap_limit_in_bytes is set without memory_limit_in_bytes",
            InvalidArgumentError,
        ),
        (
            lambda c: c.linux.resources.MergeFrom(
                cri.LinuxContainerResources(memory_limit_in_bytes=6, memory_swap_limit_in_bytes=5)
            ),
            "config.linux.resources.memory_swap_limit_in_bytes is 5, below memory 6",
            InvalidArgumentError,
        ),
        (
            lambda c: setattr(c.linux.resources, "cpuset_cpus", "0-"),
            "config.linux.resources.cpuset_cpus is '0-'",
            InvalidArgumentError,
        ),
        (
            lambda c: setattr(c.linux.resources, "oom_score_adj", 1001),
            "config.linux.resources.oom_score_adj is 1001",
            InvalidArgumentError,
        ),
        (
            lambda c: c.linux.resources.hugepage_limits.add(page_size="big"),
            "config.linux.resources.hugepage_limits[0].page_size is 'big'",
            InvalidArgumentError,
        ),
        (
            lambda c: setattr(c.linux.security_context, "privileged", True),
            "config.linux.security_context.privileged is set, but the pod sandbox is not",
            InvalidArgumentError,
        ),
        (
            lambda c: c.linux.security_context.run_as_group.MergeFrom(cri.Int64Value(value=1)),
            "run_as_group is set without run_as_user or run_as_username",
            InvalidArgumentError,
        ),
        (
            lambda c: c.linux.security_context.MergeFrom(
                cri.LinuxContainerSecurityContext(run_as_user=cri.Int64Value(value=1), run_as_username="x")
            ),
            "run_as_username and run_as_user are both set",
            InvalidArgumentError,
        ),
        (
            lambda c: c.linux.security_context.capabilities.add_capabilities.append("FLY"),
            "capabilities.add_capabilities[0] is 'FLY'",
            InvalidArgumentError,
        ),
        (
            lambda c: setattr(c.linux.security_context.namespace_options, "pid", cri.TARGET),
            "namespace_options.target_id is empty",
            InvalidArgumentError,
        ),
        (
            lambda c: c.linux.security_context.masked_paths.append("etc"),
            "masked_paths[0] is 'etc', not an absolute path",
            InvalidArgumentError,
        ),
        (
            lambda c: setattr(c.linux.security_context, "apparmor_profile", "my-profile"),
            "apparmor_profile is 'my-profile', which names no profile",
            InvalidArgumentError,
        ),
    ],
)
def test_bad_container_field_is_refused_by_name(
    change: Callable[[cri.ContainerConfig], object], named: str, kind: type[InvalidArgumentError]
) -> None:
    config = container_config()
    change(config)
    with pytest.raises(InvalidArgumentError) as caught:
        specs.container_spec(config, SANDBOX)
    assert named in str(caught.value)
    assert type(caught.value) is kind


def test_image_volume() -> None:
    config = container_config()
    config.mounts.add(
        container_path="/data",
        readonly=True,
        recursive_read_only=True,
        image=cri.ImageSpec(image="sha256:" + "a" * 64, user_specified_image="data:1"),
        image_sub_path="models/small",
    )
    (mount,) = specs.container_spec(config, SANDBOX).mounts
    assert mount == Mount(
        "/data",
        readonly=True,
        recursive_read_only=True,
        image="sha256:" + "a" * 64,
        user_specified_image="data:1",
        image_sub_path="models/small",
    )


def test_secrets_are_not_quoted() -> None:
    config = container_config()
    config.envs.add(key="TOKEN", value=b"hunter2\xff")
    with pytest.raises(InvalidArgumentError) as caught:
        specs.container_spec(config, SANDBOX)
    assert "hunter2" not in str(caught.value)


def test_every_signal_has_a_name_of_its_own() -> None:
    assert len(specs.SIGNALS) == len(cri.Signal.values()) == 66
    assert specs.signal_name(cri.SIGRTMAXMINUS14) == "SIGRTMAX-14"
    assert specs.signal_name(cri.SIGTERM) == "SIGTERM"
    assert specs.signal_name(cri.RUNTIME_DEFAULT) == ""


def test_command_needs_a_program() -> None:
    with pytest.raises(InvalidArgumentError, match=r"^cmd is empty"):
        specs.command([], "cmd")
    with pytest.raises(InvalidArgumentError, match=r"^cmd\[0\] is empty"):
        specs.command([""], "cmd")
    assert specs.command(["a", ""], "cmd") == ("a", "")
