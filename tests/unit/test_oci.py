from dataclasses import replace

import pytest

from vmrt.agent import layout
from vmrt.errors import InvalidArgumentError
from vmrt.model import (
    ContainerSpec,
    HugepageLimit,
    IdMapping,
    ImageConfig,
    LinuxResources,
    Mount,
    NamespaceMode,
    NamespaceOptions,
    SandboxSpec,
    SecurityContext,
)
from vmrt.pods import oci

SANDBOX = SandboxSpec(name="web", uid="u", namespace="default")
SPEC = ContainerSpec(name="c", image="i", command=("/bin/app",))
IMAGE = ImageConfig(entrypoint=("/entry",), cmd=("default",), env=("A=image", "B=image"), working_dir="/srv")


def build(spec: ContainerSpec = SPEC, **changes: object) -> dict[str, object]:
    return oci.build(SANDBOX, spec, IMAGE, hostname="web", **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("command", "args", "expected"),
    [
        ((), (), ("/entry", "default")),
        ((), ("x",), ("/entry", "x")),
        (("/cmd",), (), ("/cmd",)),
        (("/cmd",), ("x",), ("/cmd", "x")),
    ],
)
def test_command_rules(command: tuple[str, ...], args: tuple[str, ...], expected: tuple[str, ...]) -> None:
    assert oci.command(replace(SPEC, command=command, args=args), IMAGE) == expected


def test_no_command_at_all_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="no command"):
        oci.command(replace(SPEC, command=()), ImageConfig())


def test_environment_layers() -> None:
    spec = replace(SPEC, envs=(("B", "spec"), ("C", "1"), ("C", "2")), tty=True)
    lines = oci.environment(spec, IMAGE, "web")
    assert lines == [oci.DEFAULT_PATH, "HOSTNAME=web", "TERM=xterm", "A=image", "B=spec", "C=2"]


@pytest.mark.parametrize(
    ("security", "has", "lacks"),
    [
        (SecurityContext(), {"CAP_CHOWN", "CAP_NET_RAW"}, {"CAP_NET_ADMIN", "CAP_SYS_ADMIN"}),
        (SecurityContext(capabilities_add=("NET_ADMIN",)), {"CAP_NET_ADMIN", "CAP_CHOWN"}, {"CAP_SYS_ADMIN"}),
        (SecurityContext(capabilities_drop=("NET_RAW",)), {"CAP_CHOWN"}, {"CAP_NET_RAW"}),
        (SecurityContext(capabilities_add=("ALL",)), set(oci.ALL_CAPABILITIES), set()),
        (SecurityContext(capabilities_drop=("ALL",)), set(), set(oci.ALL_CAPABILITIES)),
        (
            SecurityContext(capabilities_drop=("ALL",), capabilities_add=("cap_kill",)),
            {"CAP_KILL"},
            {"CAP_CHOWN"},
        ),
        (
            SecurityContext(capabilities_add=("ALL",), capabilities_drop=("SYS_ADMIN",)),
            {"CAP_NET_ADMIN"},
            {"CAP_SYS_ADMIN"},
        ),
        (SecurityContext(privileged=True, capabilities_drop=("ALL",)), set(oci.ALL_CAPABILITIES), set()),
    ],
)
def test_capabilities(security: SecurityContext, has: set[str], lacks: set[str]) -> None:
    found = set(oci.capabilities(replace(SPEC, security=security)))
    assert has <= found
    assert not lacks & found


def test_unknown_capability_is_refused_by_name() -> None:
    with pytest.raises(InvalidArgumentError, match="FLY"):
        oci.capabilities(replace(SPEC, security=SecurityContext(capabilities_add=("FLY",))))


def test_resources_leave_out_what_is_not_set() -> None:
    assert oci.resources(LinuxResources()) == {}
    full = LinuxResources(
        cpu_period_us=100_000,
        cpu_quota_us=-1,
        cpu_shares=512,
        memory_limit_bytes=1 << 20,
        memory_swap_limit_bytes=1 << 20,
        hugepage_limits=(HugepageLimit("2MB", 0), HugepageLimit("1GB", 5)),
        unified={"memory.high": "9"},
        cpuset_cpus="0-3",
    )
    assert oci.resources(full) == {
        "memory": {"limit": 1 << 20, "swap": 1 << 20},
        "cpu": {"shares": 512, "quota": -1, "period": 100_000},
        "hugepageLimits": [{"pageSize": "1GB", "limit": 5}],
        "unified": {"memory.high": "9"},
    }


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (NamespaceMode.CONTAINER, {"type": "pid"}),
        (NamespaceMode.POD, {"type": "pid", "path": layout.POD_PID_NAMESPACE}),
        (NamespaceMode.TARGET, {"type": "pid", "path": layout.TARGET_PID_NAMESPACE}),
        (NamespaceMode.NODE, None),
    ],
)
def test_pid_namespaces(mode: NamespaceMode, expected: dict[str, str] | None) -> None:
    spec = replace(SPEC, security=SecurityContext(namespaces=NamespaceOptions(pid=mode)))
    linux = build(spec)["linux"]
    assert isinstance(linux, dict)
    assert [n for n in linux["namespaces"] if n["type"] == "pid"] == ([expected] if expected else [])


def test_privileged_lifts_masks_and_device_rules() -> None:
    masks = SecurityContext(masked_paths=("/proc/kcore",), readonly_paths=("/proc/sys",))
    linux = build(replace(SPEC, security=masks), seccomp={"defaultAction": "SCMP_ACT_ERRNO"})["linux"]
    assert isinstance(linux, dict)
    assert linux["maskedPaths"] == ["/proc/kcore"]
    assert linux["readonlyPaths"] == ["/proc/sys"]
    assert linux["seccomp"] == {"defaultAction": "SCMP_ACT_ERRNO"}
    assert linux["resources"]["devices"][0] == {"allow": False, "access": "rwm"}
    privileged = replace(masks, privileged=True)
    linux = build(replace(SPEC, security=privileged), seccomp={"defaultAction": "SCMP_ACT_ERRNO"})["linux"]
    assert isinstance(linux, dict)
    assert not {"maskedPaths", "readonlyPaths", "seccomp"} & set(linux)
    assert linux["resources"]["devices"] == [{"allow": True, "access": "rwm"}]


def test_a_mount_of_the_client_replaces_ours_and_parents_come_first() -> None:
    mounts = [
        oci.BoundMount(Mount("/data/deep", "/h2", readonly=True), "/g2"),
        oci.BoundMount(Mount("/data", "/h1"), "/g1"),
        oci.BoundMount(Mount("/etc/hosts", "/h3"), "/g3"),
    ]
    made = build(mounts=mounts)["mounts"]
    assert isinstance(made, list)
    places = [m["destination"] for m in made]
    assert len(places) == len(set(places))
    assert places.index("/data") < places.index("/data/deep")
    by_place = {m["destination"]: m for m in made}
    assert by_place["/etc/hosts"]["source"] == "/g3"
    assert "ro" in by_place["/data/deep"]["options"]
    assert by_place["/etc/resolv.conf"]["source"] == f"{layout.SANDBOX}/resolv.conf"


def test_a_pod_with_a_user_namespace_has_its_own_of_all() -> None:
    mapping = (IdMapping(100000, 0, 65536),)
    options = NamespaceOptions(userns=NamespaceMode.POD, uids=mapping, gids=mapping)
    config = build(replace(SPEC, security=SecurityContext(namespaces=options)))
    namespaces = {entry["type"]: entry.get("path", "") for entry in config["linux"]["namespaces"]}  # type: ignore[index]
    assert namespaces == {
        "mount": "",
        "cgroup": "",
        "pid": layout.POD_PID_NAMESPACE,
        "user": layout.POD_USER_NAMESPACE,
        "network": layout.POD_NETWORK_NAMESPACE,
        "ipc": layout.POD_IPC_NAMESPACE,
        "uts": layout.POD_UTS_NAMESPACE,
    }
    assert {"user", "network", "ipc", "uts"}.isdisjoint(
        entry["type"]
        for entry in build()["linux"]["namespaces"]  # type: ignore[index]
    )


def test_limits_that_cri_has_no_field_for() -> None:
    rlimits = build()["process"]["rlimits"]  # type: ignore[index]
    assert {limit["type"]: (limit["soft"], limit["hard"]) for limit in rlimits} == {
        "RLIMIT_NOFILE": (1024, 524288),
        "RLIMIT_NPROC": (2**64 - 1, 2**64 - 1),
    }
