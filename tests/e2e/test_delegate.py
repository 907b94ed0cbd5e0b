"""A node with VMs and a delegate: Debian's containerd with runc, and Debian's docker-registry for both.

One VM, one containerd, one daemon for the module; pods of the host's network and of the handler `runc` run at the
delegate. The last tests restart the daemon and the delegate under them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner

from demo import busybox_image
from demo.containerd import Bridge, Containerd, running, version
from demo.daemon import Daemon
from tests.e2e.conftest import IMAGE, Pod, clean_daemon, log_text, run_pod, until
from tests.e2e.docker_registry import Registry
from vmrt.cli.app import cli
from vmrt.pods.table import instance_tag
from vmrt.proto.runtime.v1 import api_pb2 as cri

WAIT_S = 60.0
CGROUP = f"vmrt-test-{os.getpid()}"
HOST_NETWORK = cri.NamespaceOption(network=cri.NODE)


@dataclass
class Node:
    """The daemon, its delegate, and the registry that both fetch from."""

    daemon: Daemon
    containerd: Containerd
    registry: Registry
    logs: Path

    def pod(self, name: str, handler: str = "", options: cri.NamespaceOption | None = None, **fields: object) -> Pod:
        """Run a pod with a log directory of its own."""
        logs = self.logs / name
        logs.mkdir()
        context = cri.LinuxSandboxSecurityContext(namespace_options=options)
        # As kubelet does, with a parent of its own making; containerd 1.6 tells no figures of a pod without one.
        fields["linux"] = cri.LinuxPodSandboxConfig(security_context=context, cgroup_parent=f"/{CGROUP}")
        return run_pod(self.daemon, logs, name, handler, **fields)

    def pods(self, **wanted: object) -> dict[str, cri.PodSandbox]:
        request = cri.ListPodSandboxRequest(filter=cri.PodSandboxFilter(**wanted))  # type: ignore[arg-type]
        return {item.id: item for item in self.daemon.runtime.ListPodSandbox(request).items}

    def theirs(self) -> set[str]:
        return {item.id for item in self.containerd.runtime.ListPodSandbox(cri.ListPodSandboxRequest()).items}

    def containers(self, **wanted: object) -> dict[str, cri.Container]:
        request = cri.ListContainersRequest(filter=cri.ContainerFilter(**wanted))  # type: ignore[arg-type]
        return {item.id: item for item in self.daemon.runtime.ListContainers(request).containers}

    def pull(self, image: str, pod: Pod) -> str:
        """Fetch as kubelet does: with the configuration of the pod that it has run."""
        request = cri.PullImageRequest(image=cri.ImageSpec(image=image), sandbox_config=pod.config)
        return str(self.daemon.images.PullImage(request).image_ref)

    def delegates_ready(self) -> cri.RuntimeCondition:
        conditions = self.daemon.runtime.Status(cri.StatusRequest()).status.conditions
        return next(condition for condition in conditions if condition.type == "DelegatesReady")

    def command(self, *arguments: str) -> str:
        """Run the command line against the daemon."""
        result = CliRunner().invoke(cli, ["--socket", str(self.daemon.socket), *arguments])
        assert result.exit_code == 0, result.output
        return result.stdout


@pytest.fixture(scope="module")
def containerd() -> Iterator[Containerd]:
    """The delegate."""
    assert version(), "containerd and runc are not installed: run `make setup`"
    # A short path: containerd's shims have sockets below it.
    root = Path(tempfile.mkdtemp(prefix="vmrt-ctd-", dir="/var/tmp"))
    tag = instance_tag(root)
    bridge = Bridge(f"vtc{tag[:6]}", f"10.239.{int(tag[:2], 16)}.0/24")
    with running(root / "c", bridge) as made:
        yield made
    assert made.left_behind() == []
    shutil.rmtree(root)
    for hierarchy in (Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").iterdir()):
        with contextlib.suppress(OSError):
            (hierarchy / CGROUP).rmdir()


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """Busybox as app:1, app:2 and app:3, three images."""
    registry = Registry(tmp_path_factory.mktemp("registry"))
    layer = busybox_image.layer(busybox_image.busybox())
    for tag in "123":
        registry.push("app", tag, [layer], Env=["PATH=/bin", f"APP={tag}"], Cmd=["sh"])
    yield registry
    registry.stop()


@pytest.fixture(scope="module")
def node(
    containerd: Containerd, registry: Registry, layout: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Node]:
    """The whole node; the image IMAGE is in both stores, no image of the registry in either."""
    logs = tmp_path_factory.mktemp("delegate-logs")
    (logs / "registries.conf").write_text(f'[[registry]]\nlocation = "{registry.host}"\ninsecure = true\n')
    endpoint = f"unix://{containerd.socket}"
    settings = (
        f'[images]\nregistries_conf = "{logs}/registries.conf"\n[handlers.vm]\n'
        f'[handlers.runc]\nendpoint = "{endpoint}"\ndelegate_handler = "runc"\nhost_network = true\nhost_ipc = true\n'
    )
    containerd.load(layout)
    with clean_daemon("dlg", settings) as daemon:
        daemon.start()
        daemon.load(layout)
        yield Node(daemon, containerd, registry, logs)


@pytest.fixture(scope="module")
def vm(node: Node) -> Pod:
    """A pod in a VM."""
    return node.pod("vm-pod")


@pytest.fixture(scope="module")
def host(node: Node) -> Pod:
    """A pod of the host's network, as kube-proxy's is."""
    return node.pod("proxy", options=HOST_NETWORK)


def test_a_host_network_pod_sees_the_host(node: Node, host: Pod) -> None:
    assert host.id in node.theirs()
    # Other links come and go meanwhile; those that stay are all seen.
    before = {path.name for path in Path("/sys/class/net").iterdir()}
    seen = set(host.output("ls", "/sys/class/net").split())
    after = {path.name for path in Path("/sys/class/net").iterdir()}
    assert before & after <= seen
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        assert f"127.0.0.1:{listener.getsockname()[1]}" in host.output("netstat", "-ltn")
    assert host.output("uname", "-r").strip() == os.uname().release
    status = node.daemon.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=host.id)).status
    assert status.linux.namespaces.options.network == cri.NODE
    assert (status.runtime_handler, dict(status.annotations)) == ("", {})


def test_a_host_ipc_pod_runs_at_the_delegate(node: Node) -> None:
    options = cri.NamespaceOption(ipc=cri.NODE)
    pod = node.pod("ipc", options=options)
    assert pod.id in node.theirs()
    command = ("readlink", "/proc/self/ns/ipc")
    linux = cri.LinuxContainerConfig(security_context=cri.LinuxContainerSecurityContext(namespace_options=options))
    assert pod.output(*command, linux=linux).strip() == str(Path("/proc/self/ns/ipc").readlink())
    node.daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod.id))
    assert pod.id not in node.pods()


def test_pods_of_both_kinds_are_one_list(node: Node, vm: Pod, host: Pod) -> None:
    runc = node.pod("runc-pod", "runc", labels={"app": "runc"})
    assert {runc.id, host.id} <= node.theirs()
    assert vm.id not in node.theirs()
    pods = node.pods()
    assert {ident: pods[ident].runtime_handler for ident in (vm.id, host.id, runc.id)} == {
        vm.id: "",
        host.id: "",
        runc.id: "runc",
    }
    assert node.pods(label_selector={"app": "runc"}).keys() == {runc.id}
    for pod in (vm, runc):
        assert node.pods(id=pod.id[:12]).keys() == {pod.id}
        request = cri.PodSandboxStatusRequest(pod_sandbox_id=pod.id[:12])
        status = node.daemon.runtime.PodSandboxStatus(request).status
        assert (status.id, bool(status.network.ip)) == (pod.id, True)
    ours, theirs = vm.run("sleep", "1000"), runc.run("sleep", "1000")
    assert node.containers().keys() >= {ours, theirs}
    assert node.containers(pod_sandbox_id=runc.id).keys() == {theirs}
    # Two kernels, one runtime.
    assert vm.execute(ours, "uname", "-r").stdout != runc.execute(theirs, "uname", "-r").stdout
    stats = node.daemon.runtime.ListContainerStats(cri.ListContainerStatsRequest()).stats
    assert {s.attributes.id for s in stats if s.memory.timestamp} >= {ours, theirs}
    told = {s.attributes.id: s for s in node.daemon.runtime.ListPodSandboxStats(cri.ListPodSandboxStatsRequest()).stats}
    assert told.keys() >= {vm.id, runc.id}
    assert dict(told[runc.id].attributes.annotations) == {}
    of_theirs = node.daemon.runtime.ContainerStats(cri.ContainerStatsRequest(container_id=theirs))
    assert of_theirs.stats.attributes.id == theirs
    vm.remove(ours)
    node.daemon.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=runc.id))
    assert node.pods(state=cri.PodSandboxStateValue(state=cri.SANDBOX_NOTREADY)).keys() == {runc.id}
    node.daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=runc.id))
    assert runc.id not in node.pods()
    assert theirs not in node.containers()


def test_a_container_at_the_delegate_has_all_that_kubelet_uses(node: Node, host: Pod) -> None:
    container = host.run("sh", "-c", "while :; do echo tick; sleep 0.05; done", name="ticker")
    result = host.execute(container, "sh", "-c", "echo out; echo err >&2; exit 3")
    assert (result.stdout, result.stderr, result.exit_code) == (b"out\n", b"err\n", 3)
    log = host.logs / "ticker.log"
    until(lambda: "tick" in log_text(log), "it prints")
    log.rename(log.with_suffix(".old"))
    node.daemon.runtime.ReopenContainerLog(cri.ReopenContainerLogRequest(container_id=container))
    until(lambda: log.exists() and "tick" in log_text(log), "it prints to the new file")
    limits = cri.LinuxContainerResources(cpu_shares=512)
    node.daemon.runtime.UpdateContainerResources(
        cri.UpdateContainerResourcesRequest(container_id=container, linux=limits)
    )
    assert host.status(container).resources.linux.cpu_shares in (0, 512)  # 1.6 does not tell resources
    url = node.daemon.runtime.Exec(cri.ExecRequest(container_id=container, cmd=["true"], stdout=True)).url
    assert url.startswith("http://127.0.0.1:")
    forward = node.daemon.runtime.PortForward(cri.PortForwardRequest(pod_sandbox_id=host.id))
    assert forward.url.startswith("http://127.0.0.1:")
    node.daemon.runtime.StopContainer(cri.StopContainerRequest(container_id=container, timeout=0))
    assert host.status(container).state == cri.CONTAINER_EXITED
    host.remove(container)
    with pytest.raises(grpc.RpcError) as caught:
        host.status(container)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_the_command_line_shows_both(node: Node, vm: Pod, host: Pod) -> None:
    container = host.run("sleep", "1000", name="cli")
    listed = {pod["id"]: pod for pod in json.loads(node.command("pods", "--json"))}
    assert {vm.id, host.id} <= listed.keys()
    assert container in {each["id"] for each in json.loads(node.command("ps", "--json"))}
    assert node.command("exec", "proxy/cli", "echo", "through the delegate").strip() == "through the delegate"
    # A session with containerd's own streaming server, which knows no WebSocket v5.
    argv = [sys.executable, "-m", "vmrt", "--socket", str(node.daemon.socket), "exec", "-i", "proxy/cli"]
    done = subprocess.run(
        [*argv, "sh", "-c", "cat; echo err >&2; exit 7"], input=b"in and out", capture_output=True, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == (b"in and out", b"err\n", 7)
    told = json.loads(node.command("inspect", host.id))
    assert told["kind"] == "sandbox"
    assert told["delegate"]["endpoint"] == f"unix://{node.containerd.socket}"
    assert json.loads(node.command("inspect", container))["status"]["id"] == container
    host.remove(container)


def test_events_of_both_kinds_are_one_stream(node: Node, vm: Pod, host: Pod) -> None:
    events = node.daemon.runtime.GetContainerEvents(cri.GetEventsRequest(), timeout=WAIT_S)
    # A stream begins when the daemon has it: the first event tells.
    seen: dict[str, set[int]] = {}
    made: list[str] = []
    try:
        made.append(vm.run("true", name=f"e{uuid.uuid4().hex[:6]}"))
        for event in events:
            seen.setdefault(event.container_id, set()).add(event.container_event_type)
            if len(made) == 1 and seen.get(made[0], set()):
                made.append(host.run("true", name="event"))
            theirs = seen.get(made[-1], set()) if len(made) == 2 else set()
            if cri.CONTAINER_STOPPED_EVENT in theirs:
                assert event.pod_sandbox_status.id == host.id
                assert {cri.CONTAINER_CREATED_EVENT, cri.CONTAINER_STARTED_EVENT} <= theirs
                break
        else:
            pytest.fail(f"the stream has ended: {seen}")
    finally:
        events.cancel()
    for pod, container in zip((vm, host), made, strict=True):
        pod.remove(container)


def test_images_are_one_store_and_go_to_where_they_are_needed(node: Node, vm: Pod, host: Pod) -> None:
    images = node.daemon.images
    one, two, three = (f"{node.registry.host}/app:{tag}" for tag in "123")

    def listed() -> dict[str, cri.Image]:
        return {image.id: image for image in images.ListImages(cri.ListImagesRequest()).images}

    def at_containerd(image: str) -> bool:
        request = cri.ImageStatusRequest(image=cri.ImageSpec(image=image))
        return bool(node.containerd.images.ImageStatus(request).HasField("image"))

    everything = images.ListImages(cri.ListImagesRequest()).images
    assert len([image for image in everything if IMAGE in image.repo_tags]) == 1, "one entry for an image in both"
    # kubelet's way for a pod of each kind.
    theirs = node.pull(one, host)
    assert at_containerd(one)
    assert listed()[theirs].repo_tags == [one]
    assert images.ImageStatus(cri.ImageStatusRequest(image=cri.ImageSpec(image=theirs))).image.id == theirs
    assert host.output("sh", "-c", "echo $APP", image=theirs).strip() == "1"
    ours = node.pull(two, vm)
    assert not at_containerd(two)
    assert vm.output("sh", "-c", "echo $APP", image=ours).strip() == "2"
    # Pull policy IfNotPresent: kubelet sees an image that the other kind of pod has fetched, and does not fetch it.
    assert host.output("sh", "-c", "echo $APP", image=ours).strip() == "2"
    assert at_containerd(ours)
    assert vm.output("sh", "-c", "echo $APP", image=theirs).strip() == "1"
    # crictl uses names; what was fetched by its digest has none on the other side.
    assert host.output("sh", "-c", "echo $APP", image=two).strip() == "2"
    assert vm.output("sh", "-c", "echo $APP", image=one).strip() == "1"
    # One whose name is another image by now is fetched by its digest.
    third = node.pull(three, vm)
    node.registry.push("app", "3", [busybox_image.layer(busybox_image.busybox())], Env=["PATH=/bin", "APP=new"])
    assert host.output("sh", "-c", "echo $APP", image=third).strip() == "3"
    for image in (ours, theirs, third):
        images.RemoveImage(cri.RemoveImageRequest(image=cri.ImageSpec(image=image)))
        assert image not in listed()
        assert not at_containerd(image)
    usage = images.ImageFsInfo(cri.ImageFsInfoRequest()).image_filesystems
    assert usage[0].used_bytes.value > 0


def test_status_tells_the_handlers(node: Node) -> None:
    status = node.daemon.runtime.Status(cri.StatusRequest(verbose=True))
    assert [handler.name for handler in status.runtime_handlers] == ["", "vm", "runc"]
    assert {c.type: c.status for c in status.status.conditions}["DelegatesReady"]
    assert json.loads(status.info["delegates"])["runc"]["endpoint"] == f"unix://{node.containerd.socket}"


def test_a_restarted_daemon_keeps_routing(node: Node, host: Pod) -> None:
    container = host.run("sleep", "1000", name="survivor")
    node.daemon.stop()
    node.daemon.start()
    assert node.pods()[host.id].runtime_handler == ""
    assert host.execute(container, "echo", "hello").stdout == b"hello\n"
    node.daemon.runtime.StopContainer(cri.StopContainerRequest(container_id=container, timeout=0))
    host.remove(container)


def test_the_node_lives_through_a_stop_of_the_delegate(node: Node, vm: Pod, host: Pod) -> None:
    container = host.run("sleep", "1000", name="through")
    assert container in node.containers()
    assert host.id in node.pods()
    node.containerd.stop()
    # What kubelet sees: the same pods, and a condition that tells; VMs are as they were.
    assert {vm.id, host.id} <= node.pods().keys()
    assert container in node.containers()
    assert not node.delegates_ready().status
    assert vm.output("echo", "still here").strip() == "still here"
    with pytest.raises(grpc.RpcError) as caught:
        node.pod("meanwhile", options=HOST_NETWORK)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert str(node.containerd.socket) in (caught.value.details() or "")
    with pytest.raises(grpc.RpcError) as caught:
        host.remove(container)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert host.id in node.command("pods", "-q").split()
    node.containerd.start()
    until(lambda: node.delegates_ready().status, "the delegate is up again")
    assert host.execute(container, "echo", "again").stdout == b"again\n"
    node.daemon.runtime.StopContainer(cri.StopContainerRequest(container_id=container, timeout=0))
    host.remove(container)
    assert container not in node.containers()
