"""A pod's life through the CRI socket, with a real VM."""

from __future__ import annotations

import os
import platform
import urllib.request
from pathlib import Path

import grpc
import pytest

from demo.daemon import Daemon
from tests.e2e.conftest import IMAGE, Pod, log_text, run_pod, until
from vmrt.proto.runtime.v1 import api_pb2 as cri


def code_of(call: object) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        call()  # type: ignore[operator]
    return caught.value.code()


def test_version_and_status(daemon: Daemon) -> None:
    version = daemon.runtime.Version(cri.VersionRequest())
    assert (version.version, version.runtime_name, version.runtime_api_version) == ("0.1.0", "vmrt", "v1")
    status = daemon.runtime.Status(cri.StatusRequest())
    assert {c.type: c.status for c in status.status.conditions} == {"RuntimeReady": True, "NetworkReady": True}
    assert {h.name for h in status.runtime_handlers} >= {"", "vm"}


def test_the_guest_is_another_kernel_and_the_output_is_logged(pod: Pod) -> None:
    release = pod.output("uname", "-r").strip()
    assert release
    assert release != platform.release()


def test_containers_share_the_pods_network_and_the_host_reaches_it(pod: Pod) -> None:
    server = pod.run("httpd", "-f", "-p", "8080", "-h", "/srv")
    body = pod.output("sh", "-c", "until wget -q -O - http://127.0.0.1:8080/; do sleep .2; done")
    assert body == "hello from a container in a virtual machine\n"
    status = pod.daemon.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod.id)).status
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{status.network.ip}:8080/", timeout=10) as answer:
        assert answer.read().decode() == body
    pod.remove(server)


def test_exec_sync(pod: Pod) -> None:
    container = pod.run("sleep", "1000")
    done = pod.execute(container, "sh", "-c", "printf out; printf err >&2; exit 7")
    assert (done.stdout, done.stderr, done.exit_code) == (b"out", b"err", 7)
    big = pod.execute(container, "sh", "-c", "dd if=/dev/zero bs=1M count=3 2>/dev/null | tr '\\0' x")
    assert big.stdout == b"x" * (3 << 20)
    assert pod.execute(container, "sh", "-c", "kill -9 $$").exit_code == 137
    pod.remove(container)


def test_exec_that_runs_out_of_time_is_killed_with_its_children(pod: Pod) -> None:
    container = pod.run("sleep", "1000")
    slow = ("sh", "-c", "sleep 4321 & sleep 4321")
    assert code_of(lambda: pod.execute(container, *slow, timeout=1)) is grpc.StatusCode.DEADLINE_EXCEEDED
    ps = ("sh", "-c", "ps -o args | grep '[s]leep 4321' || true")
    until(lambda: pod.execute(container, *ps).stdout == b"", "its processes are gone")
    pod.remove(container)


def test_exec_of_a_missing_command_says_so_at_once(pod: Pod) -> None:
    container = pod.run("sleep", "1000")
    with pytest.raises(grpc.RpcError, match="no-such-command"):
        pod.execute(container, "no-such-command")
    pod.remove(container)


def test_status_tells_the_whole_life(pod: Pod) -> None:
    container = pod.create("sh", "-c", "exit 3", annotations={"a/b": "\u00e9\n"}, labels={"l": "v"})
    status = pod.status(container)
    assert (status.state, status.started_at, status.finished_at) == (cri.CONTAINER_CREATED, 0, 0)
    pod.start(container)
    status = pod.wait(container)
    assert (status.exit_code, status.reason) == (3, "Error")
    assert status.created_at <= status.started_at <= status.finished_at
    assert dict(status.annotations) == {"a/b": "\u00e9\n"}
    assert dict(status.labels) == {"l": "v"}
    assert status.image_ref == status.image_id != ""
    assert os.path.isabs(status.log_path)  # noqa: PTH117
    assert code_of(lambda: pod.start(container)) is grpc.StatusCode.FAILED_PRECONDITION
    pod.remove(container)
    assert code_of(lambda: pod.status(container)) is grpc.StatusCode.NOT_FOUND


def test_stop_signals_then_kills(pod: Pod) -> None:
    polite = pod.run("sh", "-c", "trap 'exit 4' TERM; echo ready; while :; do sleep .1; done")
    stubborn = pod.run("sh", "-c", "trap '' TERM; echo ready; while :; do sleep .1; done")
    logs = [Path(pod.status(container).log_path) for container in (polite, stubborn)]
    # Without its trap, the first process of a PID namespace is deaf to the signal.
    until(lambda: all(log_text(log) == "ready\n" for log in logs), "the traps are set")
    stop = pod.daemon.runtime.StopContainer
    stop(cri.StopContainerRequest(container_id=polite, timeout=30))
    assert pod.status(polite).exit_code == 4
    stop(cri.StopContainerRequest(container_id=stubborn, timeout=1))
    assert pod.status(stubborn).exit_code == 137
    stop(cri.StopContainerRequest(container_id=stubborn, timeout=1))
    stop(cri.StopContainerRequest(container_id="0" * 64, timeout=1))
    for container in (polite, stubborn):
        pod.remove(container)
        pod.remove(container)


def test_logs_keep_streams_apart_and_reopen(pod: Pod) -> None:
    script = "echo one; echo two >&2; while [ ! -e /go ]; do sleep .05; done; echo three; printf tail"
    container = pod.run("sh", "-c", script)
    path = Path(pod.status(container).log_path)
    until(lambda: (log_text(path), log_text(path, "stderr")) == ("one\n", "two\n"), "both lines are there")
    old = path.with_suffix(".old")
    path.rename(old)
    pod.daemon.runtime.ReopenContainerLog(cri.ReopenContainerLogRequest(container_id=container))
    assert path.exists()
    assert pod.execute(container, "touch", "/go").exit_code == 0
    pod.wait(container)
    assert (log_text(old), log_text(old, "stderr"), log_text(path)) == ("one\n", "two\n", "three\ntail")
    reopen = cri.ReopenContainerLogRequest(container_id=container)
    path.unlink()
    assert code_of(lambda: pod.daemon.runtime.ReopenContainerLog(reopen)) is grpc.StatusCode.FAILED_PRECONDITION
    assert not path.exists()
    pod.remove(container)


def test_a_large_log_is_whole(pod: Pod) -> None:
    text = pod.output("seq", "1", "100000")
    assert text == "".join(f"{n}\n" for n in range(1, 100001))


def test_users_working_directory_environment_and_hostname(pod: Pod) -> None:
    linux = cri.LinuxContainerConfig(
        security_context=cri.LinuxContainerSecurityContext(
            run_as_username="nobody",
            supplemental_groups=[1234],
            namespace_options=cri.NamespaceOption(pid=cri.CONTAINER),
        )
    )
    script = "id -u; id -g; id -G; pwd; echo $A; hostname; echo $HOME"
    text = pod.output(
        "sh", "-c", script, linux=linux, working_dir="/made/up", envs=[cri.KeyValue(key="A", value=b"b c")]
    )
    uid, gid, groups, cwd, a, hostname, home = text.splitlines()
    assert (uid, gid, cwd, a, hostname, home) == ("65534", "65534", "/made/up", "b c", "shared-host", "/home")
    assert set(groups.split()) == {"65534", "1234", "50000"}


def test_read_only_root_and_no_new_privileges(pod: Pod) -> None:
    security = cri.LinuxContainerSecurityContext(
        readonly_rootfs=True, no_new_privs=True, namespace_options=cri.NamespaceOption(pid=cri.CONTAINER)
    )
    text = pod.output(
        "sh",
        "-c",
        "touch /x 2>&1; grep NoNewPrivs /proc/self/status; touch /dev/shm/ok && echo shm",
        linux=cri.LinuxContainerConfig(security_context=security),
    )
    assert "Read-only file system" in text
    assert "NoNewPrivs:\t1" in text
    assert text.endswith("shm\n")


def test_default_seccomp_is_applied_in_the_guest(pod: Pod) -> None:
    def mode(profile: cri.SecurityProfile | None) -> str:
        security = cri.LinuxContainerSecurityContext(
            seccomp=profile, namespace_options=cri.NamespaceOption(pid=cri.CONTAINER)
        )
        text = pod.output(
            "grep", "Seccomp:", "/proc/self/status", linux=cri.LinuxContainerConfig(security_context=security)
        )
        return text.split()[1]

    assert mode(cri.SecurityProfile(profile_type=cri.SecurityProfile.RuntimeDefault)) == "2"
    assert mode(cri.SecurityProfile(profile_type=cri.SecurityProfile.Unconfined)) == "0"
    assert mode(None) == "0"


def test_shared_pid_namespace_of_the_pod(pod: Pod) -> None:
    options = cri.NamespaceOption(pid=cri.POD)
    linux = cri.LinuxContainerConfig(security_context=cri.LinuxContainerSecurityContext(namespace_options=options))
    first = pod.run("sleep", "7777", linux=linux)
    text = pod.output("ps", "-o", "pid,args", linux=linux)
    assert "sleep 7777" in text
    assert "sleep" not in text.splitlines()[1]  # PID 1 is the pod's, not a workload
    pod.remove(first)


def test_oom_is_told(pod: Pod) -> None:
    limit = 24 << 20
    linux = cri.LinuxContainerConfig(
        resources=cri.LinuxContainerResources(memory_limit_in_bytes=limit, memory_swap_limit_in_bytes=limit),
        security_context=cri.LinuxContainerSecurityContext(namespace_options=cri.NamespaceOption(pid=cri.CONTAINER)),
    )
    container = pod.run("dd", "if=/dev/zero", "of=/dev/null", "bs=64M", linux=linux)
    status = pod.wait(container)
    assert (status.exit_code, status.reason) == (137, "OOMKilled")
    pod.remove(container)


def test_lists_and_filters(pod: Pod) -> None:
    runtime = pod.daemon.runtime
    one = pod.create("true", labels={"app": "one", "x": "y"})
    two = pod.create("true", labels={"app": "two", "x": "y"})

    def ids(**fields: object) -> set[str]:
        chosen = cri.ContainerFilter(**fields)  # type: ignore[arg-type]
        return {c.id for c in runtime.ListContainers(cri.ListContainersRequest(filter=chosen)).containers}

    assert ids(label_selector={"x": "y"}) == {one, two}
    assert ids(label_selector={"x": "y", "app": "two"}) == {two}
    assert ids(id=one[:13]) == {one}
    assert ids(id=one, state=cri.ContainerStateValue(state=cri.CONTAINER_RUNNING)) == set()
    assert {one, two} <= ids(pod_sandbox_id=pod.id)
    assert ids(id="f" * 64) == set()
    sandboxes = runtime.ListPodSandbox(
        cri.ListPodSandboxRequest(
            filter=cri.PodSandboxFilter(id=pod.id, state=cri.PodSandboxStateValue(state=cri.SANDBOX_READY))
        )
    ).items
    assert [s.id for s in sandboxes] == [pod.id]
    for container in (one, two):
        pod.remove(container)


def test_stop_and_remove_a_pod_with_running_containers(daemon: Daemon, tmp_path: Path) -> None:
    pod = run_pod(daemon, tmp_path, "short", port_mappings=[cri.PortMapping(container_port=80)])
    container = pod.run("sh", "-c", "trap '' TERM; seq 1 5000; sleep 1000")
    runtime = daemon.runtime
    until(lambda: log_text(Path(pod.status(container).log_path)) != "", "it prints")
    for _ in range(2):
        runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod.id))
    status = runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod.id)).status
    assert status.state == cri.SANDBOX_NOTREADY
    ended = pod.status(container)
    assert (ended.state, ended.exit_code) == (cri.CONTAINER_EXITED, 137)
    written = log_text(Path(ended.log_path))
    assert written.startswith("1\n2\n3\n")
    # The kill may cut a line, never lose or double one.
    assert "".join(f"{n}\n" for n in range(1, 5001)).startswith(written)
    assert code_of(lambda: pod.create("true")) is grpc.StatusCode.FAILED_PRECONDITION
    for _ in range(2):
        runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod.id))
    gone = cri.PodSandboxStatusRequest(pod_sandbox_id=pod.id)
    assert code_of(lambda: runtime.PodSandboxStatus(gone)) is grpc.StatusCode.NOT_FOUND
    listed = runtime.ListContainers(cri.ListContainersRequest(filter=cri.ContainerFilter(pod_sandbox_id=pod.id)))
    assert list(listed.containers) == []


def test_image_calls(daemon: Daemon) -> None:
    images = daemon.images
    status = images.ImageStatus(cri.ImageStatusRequest(image=cri.ImageSpec(image=IMAGE))).image
    assert list(status.repo_tags) == [IMAGE]
    assert status.size > 0
    by_id = images.ImageStatus(cri.ImageStatusRequest(image=cri.ImageSpec(image=status.id))).image
    assert by_id == status
    absent = images.ImageStatus(cri.ImageStatusRequest(image=cri.ImageSpec(image="docker.io/library/none:1")))
    assert not absent.HasField("image")
    usage = images.ImageFsInfo(cri.ImageFsInfoRequest()).image_filesystems[0]
    assert Path(usage.fs_id.mountpoint).is_dir()
    assert usage.used_bytes.value >= status.size
    assert usage.timestamp > 0


def test_sysctls_and_dns_reach_the_guest(daemon: Daemon, tmp_path: Path) -> None:
    pod = run_pod(
        daemon,
        tmp_path,
        "dns",
        dns_config=cri.DNSConfig(servers=["10.10.10.10"], searches=["google.com"], options=["ndots:8"]),
        linux=cri.LinuxPodSandboxConfig(sysctls={"kernel.shm_rmid_forced": "1", "fs.mqueue.msg_max": "100"}),
    )
    text = pod.output("cat", "/etc/resolv.conf", "/proc/sys/kernel/shm_rmid_forced", "/proc/sys/fs/mqueue/msg_max")
    assert text == "search google.com\nnameserver 10.10.10.10\noptions ndots:8\n1\n100\n"
    daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod.id))


def test_duplicate_sandbox_is_refused(daemon: Daemon, pod: Pod) -> None:
    request = cri.RunPodSandboxRequest(config=pod.config)
    assert code_of(lambda: daemon.runtime.RunPodSandbox(request)) is grpc.StatusCode.ALREADY_EXISTS
