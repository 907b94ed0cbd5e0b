"""What a pod and its containers may ask of their guest's kernel: devices, namespaces, profiles, limits.

Cases share pods where isolation is not what is tested: a VM costs more than all that is asked here.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from demo.daemon import Daemon
from tests.e2e.conftest import Pod, log_text, run_pod
from vmrt.proto.runtime.v1 import api_pb2 as cri


@pytest.fixture(scope="module")
def privileged(daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pod]:
    """A pod whose containers may be privileged."""
    linux = cri.LinuxPodSandboxConfig(security_context=cri.LinuxSandboxSecurityContext(privileged=True))
    pod = run_pod(daemon, tmp_path_factory.mktemp("logs"), "privileged", linux=linux)
    yield pod
    daemon.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod.id))
    daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod.id))


def container_linux(**fields: object) -> cri.LinuxContainerConfig:
    """Return a container's Linux part, with a PID namespace of its own unless `fields` say otherwise."""
    fields.setdefault("namespace_options", cri.NamespaceOption(pid=cri.CONTAINER))
    return cri.LinuxContainerConfig(security_context=cri.LinuxContainerSecurityContext(**fields))  # type: ignore[arg-type]


def refused(pod: Pod, **fields: object) -> str:
    """Return the message with which a container is refused."""
    with pytest.raises(grpc.RpcError) as caught:
        pod.create("true", **fields)  # type: ignore[arg-type]
    return str(caught.value.details())


def device(host: str, inside: str = "", permissions: str = "rwm") -> cri.Device:
    return cri.Device(host_path=host, container_path=inside or host, permissions=permissions)


def test_devices_of_the_guest(pod: Pod) -> None:
    """They are the guest's, under the name asked for, with the permissions asked for."""
    script = """
        stat -c '%n %F %t:%T' /dev/fuse /dev/tunnel
        : < /dev/fuse && echo may be read
        (: <> /dev/fuse) 2>&1 | grep -o 'Operation not permitted'
        [ -e /dev/net/tun ] || echo only under the name asked for
    """
    # The tunnel's permissions say little: crun 1.21 of Debian 13 gives it to every container, as runc did for years.
    devices = [device("/dev/fuse", permissions="r"), device("/dev/net/tun", "/dev/tunnel")]
    told = pod.output("sh", "-c", script, devices=devices)
    assert told.splitlines() == [
        "/dev/fuse character special file a:e5",
        "/dev/tunnel character special file a:c8",
        "may be read",
        "Operation not permitted",
        "only under the name asked for",
    ]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/dev/ptmx", "config.devices[0].host_path is '/dev/ptmx', a character device of the host's kernel"),
        ("/dev/vhost-vsock", "device /dev/vhost-vsock: the guest has no /dev/vhost-vsock"),
        ("/dev/nothing", "config.devices[0].host_path is '/dev/nothing': No such file or directory"),
    ],
)
def test_a_device_that_cannot_be(pod: Pod, path: str, message: str) -> None:
    assert message in refused(pod, devices=[device(path)])


def test_privileged_has_the_guests_devices(privileged: Pod) -> None:
    script = "test -c /dev/kmsg && head -c 1 /dev/vda | wc -c && ls /dev/vda /dev/fuse | wc -l"
    linux = container_linux(privileged=True)
    assert privileged.output("sh", "-c", script, linux=linux).split() == ["1", "2"]
    assert privileged.output("sh", "-c", "ls /dev/vda /dev/fuse 2>/dev/null | wc -l").split() == ["0"]


def test_cdi_device(pod: Pod, tmp_path: Path) -> None:
    """A vendor's name becomes what the specification says; the status tells what was asked for."""
    vendor = f"vmrt-e2e-{os.getpid()}.test"
    (tmp_path / "library").write_text("of the vendor")
    edits = {
        "env": ["VENDOR=yes"],
        "deviceNodes": [{"path": "/dev/vendor0", "hostPath": "/dev/fuse"}],
        "mounts": [{"hostPath": str(tmp_path), "containerPath": "/vendor", "options": ["ro"]}],
    }
    specification = {
        "cdiVersion": "0.6.0",
        "kind": f"{vendor}/accelerator",
        "devices": [
            {"name": "0", "containerEdits": edits},
            {"name": "h", "containerEdits": {"hooks": [{"path": "/x"}]}},
        ],
    }
    directory = Path("/var/run/cdi")
    directory.mkdir(exist_ok=True)
    path = directory / f"{vendor}.json"
    path.write_text(json.dumps(specification))
    try:
        script = "echo $VENDOR; stat -c '%t:%T' /dev/vendor0; cat /vendor/library; touch /vendor/x || echo read-only"
        name = cri.CDIDevice(name=f"{vendor}/accelerator=0")
        container = pod.run("sh", "-c", script, CDI_devices=[name])
        status = pod.wait(container)
        assert log_text(Path(status.log_path)).splitlines() == ["yes", "a:e5", "of the vendorread-only"]
        assert not status.mounts
        pod.remove(container)
        told = pod.output("sh", "-c", "echo $VENDOR", annotations={"cdi.k8s.io/test": name.name})
        assert told.split() == ["yes"]
        hooks = cri.CDIDevice(name=f"{vendor}/accelerator=h")
        assert "wants hooks, which act on the host's kernel" in refused(pod, CDI_devices=[hooks])
    finally:
        path.unlink()
    assert f"no CDI specification defines the device '{vendor}/accelerator=0'" in refused(pod, CDI_devices=[name])


# --- limits and the rest ----------------------------------------------------------------------------------------------


CASES: dict[str, tuple[dict[str, object], dict[str, object], str, str]] = {
    # name: (security context, resources, script, what it says)
    "ambient capabilities": (
        {
            "run_as_user": cri.Int64Value(value=1000),
            "capabilities": cri.Capability(add_ambient_capabilities=["NET_BIND_SERVICE"]),
        },
        {},
        "grep CapAmb /proc/self/status; grep CapEff /proc/self/status",
        "CapAmb:\t0000000000000400\nCapEff:\t0000000000000400\n",
    ),
    "no capabilities": (
        {"capabilities": cri.Capability(drop_capabilities=["ALL"])},
        {},
        "grep -E 'Cap(Eff|Bnd)' /proc/self/status",
        "CapEff:\t0000000000000000\nCapBnd:\t0000000000000000\n",
    ),
    "rlimits": (
        {},
        {},
        "sed -n 's/  */ /g; /^Max processes/p; /^Max open/p' /proc/self/limits",
        "Max processes unlimited unlimited processes \nMax open files 1024 524288 files \n",
    ),
    "OOM score": ({}, {"oom_score_adj": -997}, "cat /proc/self/oom_score_adj", "-997\n"),
    "unified": (
        {},
        {"unified": {"pids.max": "77", "memory.oom.group": "1"}},
        "cat /sys/fs/cgroup/pids.max /sys/fs/cgroup/memory.oom.group",
        "77\n1\n",
    ),
    "no swap": (
        {},
        {"memory_limit_in_bytes": 64 << 20, "memory_swap_limit_in_bytes": 64 << 20},
        "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory.swap.max",
        "67108864\n0\n",
    ),
    "CPU": (
        {},
        {"cpu_period": 100_000, "cpu_quota": 50_000, "cpu_shares": 1024},
        "cat /sys/fs/cgroup/cpu.max",
        "50000 100000\n",
    ),
    "huge pages": (
        {},
        {"hugepage_limits": [cri.HugepageLimit(page_size="2MB", limit=4 << 20)]},
        "cat /sys/fs/cgroup/hugetlb.2MB.max; cat /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages",
        "4194304\n2\n",
    ),
    "masked and read-only paths": (
        {"masked_paths": ["/etc/passwd", "/tmp"], "readonly_paths": ["/etc"]},
        {},
        "wc -c < /etc/passwd; ls -A /tmp | wc -l; touch /etc/x 2>&1 | grep -o 'Read-only file system'",
        "0\n0\nRead-only file system\n",
    ),
    "no new privileges": (
        {"no_new_privs": True},
        {},
        "grep NoNewPrivs /proc/self/status",
        "NoNewPrivs:\t1\n",
    ),
    "strict groups": (
        {
            "run_as_username": "nobody",
            "supplemental_groups": [5, 6],
            "supplemental_groups_policy": cri.Strict,
        },
        {},
        "id -G",
        "65534 5 6\n",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_container_gets_what_it_asks_for(pod: Pod, name: str) -> None:
    context, resources, script, told = CASES[name]
    linux = container_linux(**context)
    linux.resources.MergeFrom(cri.LinuxContainerResources(**resources))  # type: ignore[arg-type]
    assert pod.output("sh", "-c", script, linux=linux) == told


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        (
            cri.LinuxContainerResources(hugepage_limits=[cri.HugepageLimit(page_size="2MB", limit=1 << 40)]),
            "hugepage_limits: the pod's VM would need 10",
        ),
        (
            cri.LinuxContainerResources(hugepage_limits=[cri.HugepageLimit(page_size="16MB", limit=1 << 24)]),
            "hugepage_limits: the guest has no huge pages of 16MB",
        ),
        (cri.LinuxContainerResources(unified={"memory.nonsense": "1"}), "memory.nonsense"),
        (cri.LinuxContainerResources(unified={"pids.max": "many"}), "pids.max"),
    ],
)
def test_limits_that_cannot_be(pod: Pod, resources: cri.LinuxContainerResources, message: str) -> None:
    linux = container_linux()
    linux.resources.CopyFrom(resources)
    assert message in refused(pod, linux=linux)


def test_pid_namespaces(pod: Pod) -> None:
    """Whose process 1 a container sees: its own, the pod's, a target's, the guest's."""
    target = pod.run("sleep", "1000")
    for mode, target_id, first in (
        (cri.CONTAINER, "", "cat"),
        (cri.POD, "", "pause"),
        (cri.TARGET, target, "sleep"),
    ):
        options = cri.NamespaceOption(pid=mode, target_id=target_id)
        assert pod.output("cat", "/proc/1/comm", linux=container_linux(namespace_options=options)) == f"{first}\n"
    node = container_linux(namespace_options=cri.NamespaceOption(pid=cri.NODE))
    # The guest's: the target is seen there, under another number than in its own.
    told = pod.output("sh", "-c", "cat /proc/1/comm; grep -l sleep /proc/[0-9]*/comm | wc -l", linux=node).split()
    assert told[0] not in ("cat", "sh", "pause", "sleep")
    assert int(told[1]) >= 1
    pod.remove(target)
    gone = container_linux(namespace_options=cri.NamespaceOption(pid=cri.TARGET, target_id=target))
    assert target[:13] in refused(pod, linux=gone)


def test_stop_signal(pod: Pod) -> None:
    script = "trap 'echo hangup; exit 7' HUP; echo up; while :; do sleep 0.1; done"
    container = pod.run("sh", "-c", script, stop_signal=cri.SIGHUP)
    while "up" not in log_text(Path(pod.status(container).log_path)):
        time.sleep(0.05)
    assert pod.status(container).stop_signal == cri.SIGHUP
    pod.daemon.runtime.StopContainer(cri.StopContainerRequest(container_id=container, timeout=60))
    status = pod.wait(container)
    assert status.exit_code == 7
    assert log_text(Path(status.log_path)) == "up\nhangup\n"
    pod.remove(container)


# --- AppArmor ---------------------------------------------------------------------------------------------------------

RUNTIME_DEFAULT = cri.SecurityProfile(profile_type=cri.SecurityProfile.RuntimeDefault)


@pytest.fixture(scope="module")
def host_profile() -> Iterator[str]:
    """A profile in the host's /etc/apparmor.d, for no longer than the tests take."""
    name = f"vmrt-e2e-{os.getpid()}"
    path = Path("/etc/apparmor.d") / name
    path.write_text(f"profile {name} flags=(attach_disconnected) {{ file, capability, deny /tmp/** w, }}\n")
    yield name
    path.unlink()


def localhost(name: str) -> cri.SecurityProfile:
    return cri.SecurityProfile(profile_type=cri.SecurityProfile.Localhost, localhost_ref=name)


def test_apparmor_by_default(pod: Pod) -> None:
    add = cri.Capability(add_capabilities=["SYS_ADMIN"])
    script = """
        cat /proc/self/attr/current
        echo x > /tmp/file && cat /tmp/file && sh -c 'kill -0 $$'
        mount -t tmpfs none /tmp 2>&1 | grep -o 'Permission denied'
        (echo 1 > /proc/sys/kernel/printk_delay) 2>&1 | grep -o 'Permission denied'
    """
    linux = container_linux(apparmor=RUNTIME_DEFAULT, capabilities=add)
    told = pod.output("sh", "-c", script, linux=linux).splitlines()
    assert told == ["vmrt-default (enforce)", "x", "Permission denied", "Permission denied"]


def test_apparmor_holds_what_is_executed_later(pod: Pod) -> None:
    container = pod.run("sleep", "1000", linux=container_linux(apparmor_profile="runtime/default"))
    assert pod.execute(container, "cat", "/proc/self/attr/current").stdout == b"vmrt-default (enforce)\n"
    pod.remove(container)


def test_apparmor_profile_of_the_host(pod: Pod, host_profile: str) -> None:
    script = (
        "cat /proc/self/attr/current; touch /tmp/foo 2>&1 | grep -o 'Permission denied'; touch /foo && echo elsewhere"
    )
    told = pod.output("sh", "-c", script, linux=container_linux(apparmor=localhost(f"localhost/{host_profile}")))
    assert told.splitlines() == [f"{host_profile} (enforce)", "Permission denied", "elsewhere"]
    # The new field wins over the deprecated one.
    both = container_linux(apparmor=localhost(host_profile), apparmor_profile="localhost/no-such")
    assert pod.output("cat", "/proc/self/attr/current", linux=both).split()[0] == host_profile


def test_apparmor_unconfined_and_absent(pod: Pod) -> None:
    assert "the AppArmor profile 'no-such' is not on this node" in refused(
        pod, linux=container_linux(apparmor_profile="localhost/no-such")
    )
    unconfined = cri.SecurityProfile(profile_type=cri.SecurityProfile.Unconfined)
    assert pod.output("cat", "/proc/self/attr/current", linux=container_linux(apparmor=unconfined)) == "unconfined\n"


def test_privileged_ignores_apparmor(privileged: Pod) -> None:
    linux = container_linux(privileged=True, apparmor=localhost("no-such"))
    assert privileged.output("cat", "/proc/self/attr/current", linux=linux) == "unconfined\n"


# --- user namespaces --------------------------------------------------------------------------------------------------

# critest's own mapping. What a real kubelet gives is a multiple of 65536.
USERNS = cri.UserNamespace(
    mode=cri.POD,
    uids=[cri.IDMapping(host_id=1000, container_id=0, length=100000)],
    gids=[cri.IDMapping(host_id=2000, container_id=0, length=100000)],
)


def in_userns(**fields: object) -> cri.LinuxContainerConfig:
    options = cri.NamespaceOption(userns_options=USERNS, pid=cri.CONTAINER)
    return container_linux(namespace_options=options, **fields)


@pytest.fixture(scope="module")
def mapped(daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pod]:
    """A pod with a user namespace."""
    context = cri.LinuxSandboxSecurityContext(
        namespace_options=cri.NamespaceOption(userns_options=USERNS), privileged=True
    )
    linux = cri.LinuxPodSandboxConfig(
        security_context=context, sysctls={"net.ipv4.ip_unprivileged_port_start": "1024", "kernel.shm_rmid_forced": "1"}
    )
    pod = run_pod(daemon, tmp_path_factory.mktemp("logs"), "mapped", hostname="mapped-host", linux=linux)
    yield pod
    daemon.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod.id))
    daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod.id))


def test_user_namespace(mapped: Pod) -> None:
    script = """
        cat /proc/self/uid_map /proc/self/gid_map
        id -u; hostname
        cat /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/ip_unprivileged_port_start
        stat -c '%u:%g' /etc/passwd /etc/hosts /tmp /dev/shm /made
        touch /tmp/mine /dev/shm/mine && chown 1000:1001 /tmp/mine && stat -c '%u:%g' /tmp/mine
        echo '10.0.0.1 added' >> /etc/hosts && tail -n 1 /etc/hosts
        pwd
    """
    told = mapped.output("sh", "-c", script, working_dir="/made", linux=in_userns()).splitlines()
    assert [line.split() for line in told[:2]] == [["0", "1000", "100000"], ["0", "2000", "100000"]]
    assert told[2:4] == ["0", "mapped-host"]
    assert told[4:6] == ["1", "1024"]
    assert told[6:11] == ["0:0"] * 5
    assert told[11:] == ["1000:1001", "10.0.0.1 added", "/made"]


def test_a_user_namespaces_root_is_root_of_the_pods_network_only(mapped: Pod) -> None:
    add = cri.Capability(add_capabilities=["NET_ADMIN", "SYS_TIME"])
    script = """
        ip link add name test0 type dummy && ip link set test0 up && ip -o link show test0 | grep -c test0
        ip link del test0
        date -s @0 2>&1 | grep -o 'Operation not permitted'
        mknod /tmp/disk b 254 0 2>&1 | grep -o 'Operation not permitted'
    """
    told = mapped.output("sh", "-c", script, linux=in_userns(capabilities=add)).split("\n")
    assert told[:3] == ["1", "Operation not permitted", "Operation not permitted"]


def test_containers_of_a_pod_share_its_user_namespace(mapped: Pod) -> None:
    first = mapped.run("sleep", "1000", linux=in_userns())
    show = "for name in user net ipc uts; do readlink /proc/self/ns/$name; done"
    other = mapped.output("sh", "-c", show, linux=in_userns())
    assert mapped.execute(first, "sh", "-c", show).stdout.decode() == other
    assert mapped.execute(first, "sh", "-c", "id -u; cat /proc/self/uid_map").stdout.split() == [
        b"0", b"0", b"1000", b"100000",
    ]  # fmt: skip
    ip = mapped.daemon.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=mapped.id)).status.network.ip
    assert ip in mapped.execute(first, "ip", "-4", "-o", "address", "show", "eth0").stdout.decode()
    stats = mapped.daemon.runtime.PodSandboxStats(cri.PodSandboxStatsRequest(pod_sandbox_id=mapped.id)).stats
    assert stats.linux.network.default_interface.name == "eth0"
    mapped.remove(first)


def test_standard_streams_can_be_opened_in_a_user_namespace(mapped: Pod) -> None:
    script = "echo one > /dev/stdout; echo two > /proc/self/fd/2"
    assert mapped.output("sh", "-c", script, linux=in_userns()) == "one\n"
    container = mapped.run("sleep", "1000", linux=in_userns())
    done = mapped.execute(container, "sh", "-c", script)
    assert (done.stdout, done.stderr, done.exit_code) == (b"one\n", b"two\n", 0)
    mapped.remove(container)


@pytest.mark.parametrize("pid", [cri.POD, cri.CONTAINER])
def test_a_user_in_a_user_namespace(mapped: Pod, pid: cri.NamespaceMode.ValueType) -> None:
    linux = container_linux(
        namespace_options=cri.NamespaceOption(userns_options=USERNS, pid=pid),
        run_as_username="nobody",
        supplemental_groups=[7],
    )
    script = "id -u; id -g; id -G; touch /etc/x 2>&1 | grep -o 'Permission denied'; cat /proc/1/comm; true"
    told = mapped.output("sh", "-c", script, linux=linux).split("\n")
    assert (told[0], told[1], told[3]) == ("65534", "65534", "Permission denied")
    assert set(told[2].split()) == {"65534", "7", "50000"}
    assert told[4] == ("pause" if pid == cri.POD else "sh")


def test_volumes_in_a_user_namespace(mapped: Pod, tmp_path: Path) -> None:
    """An id-mapped volume: the host's root is the container's, and what the container writes is the host's root's."""
    tmp_path.chmod(0o755)
    (tmp_path / "secret").write_text("hello")
    (tmp_path / "secret").chmod(0o600)
    mount = cri.Mount(host_path=str(tmp_path), container_path="/data", uidMappings=USERNS.uids, gidMappings=USERNS.gids)
    plain = cri.Mount(host_path=str(tmp_path), container_path="/plain")
    script = """
        cat /data/secret; echo
        echo back > /data/made && chown 5:6 /data/made && stat -c '%u:%g' /data/secret /data/made /plain/made
        cat /plain/secret 2>&1 | grep -o 'Permission denied'
    """
    told = mapped.output("sh", "-c", script, mounts=[mount, plain], linux=in_userns()).split("\n")
    assert told[:5] == ["hello", "0:0", "5:6", "65534:65534", "Permission denied"]
    info = (tmp_path / "made").stat()
    assert (info.st_uid, info.st_gid) == (5, 6)


def test_devices_and_privilege_in_a_user_namespace(mapped: Pod) -> None:
    told = mapped.output("stat", "-c", "%F %t:%T", "/dev/fuse", devices=[device("/dev/fuse")], linux=in_userns())
    assert told.split("\n")[0] == "character special file a:e5"
    script = "test -b /dev/vda && head -c 1 /dev/vda 2>&1 | grep -o 'Permission denied'"
    assert mapped.output("sh", "-c", script, linux=in_userns(privileged=True)).strip() == "Permission denied"


def test_a_container_without_the_pods_user_namespace(mapped: Pod) -> None:
    assert "userns_options differs from the pod's" in refused(mapped)
