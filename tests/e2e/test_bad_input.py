"""What clients and operators get wrong: each is refused for its reason, in words, and nothing of it is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from demo import busybox_image
from demo.daemon import CHECKOUT, GUEST, Daemon
from tests.e2e.conftest import IMAGE, Pod, clean_daemon, run_pod, sandbox_config
from tests.e2e.failures import Before, records, refused
from vmrt.proto.runtime.v1 import api_pb2 as cri
from vmrt.proto.vmrt.v1 import control_pb2

CODE = grpc.StatusCode
OWN_PIDS = cri.NamespaceOption(pid=cri.CONTAINER)
BRIDGE = "vmrt-e2e-bad"


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of CNI plugins of our own, searched before the installed ones."""
    return tmp_path_factory.mktemp("plugins")


@pytest.fixture(scope="module")
def daemon(layout: Path, plugins: Path) -> Iterator[Daemon]:
    """The module's daemon."""
    with clean_daemon("bad", f'cni_bin_dirs = ["{plugins}", "/opt/cni/bin", "/usr/lib/cni"]\n') as daemon:
        daemon.start()
        daemon.load(layout)
        yield daemon


@pytest.fixture(scope="module")
def pod(daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Pod:
    """The module's pod."""
    return run_pod(daemon, tmp_path_factory.mktemp("logs"), "good")


# --- pods -------------------------------------------------------------------------------------------------------------

BAD_PODS: dict[str, tuple[cri.PodSandboxConfig, str]] = {
    "name with a slash": (cri.PodSandboxConfig(metadata=cri.PodSandboxMetadata(name="a/b")), "metadata.name"),
    "control character": (cri.PodSandboxConfig(metadata=cri.PodSandboxMetadata(uid="u\n")), "config.metadata.uid"),
    "endless name": (cri.PodSandboxConfig(metadata=cri.PodSandboxMetadata(namespace="n" * 254)), "254 octets long"),
    "host name": (cri.PodSandboxConfig(hostname="no host name"), "config.hostname"),
    "relative log directory": (cri.PodSandboxConfig(log_directory="logs"), "config.log_directory"),
    "log directory above": (cri.PodSandboxConfig(log_directory="/var/log/../../etc"), "config.log_directory"),
    "DNS server": (cri.PodSandboxConfig(dns_config=cri.DNSConfig(servers=["localhost"])), "no IP address"),
    "port": (cri.PodSandboxConfig(port_mappings=[cri.PortMapping(container_port=65536)]), "container_port"),
}


@pytest.mark.parametrize("case", list(BAD_PODS))
def test_bad_pods(daemon: Daemon, tmp_path: Path, case: str) -> None:
    change, words = BAD_PODS[case]
    config = sandbox_config(tmp_path)
    config.MergeFrom(change)
    with refused(daemon, CODE.INVALID_ARGUMENT, "config.", words):
        daemon.runtime.RunPodSandbox(cri.RunPodSandboxRequest(config=config))


@pytest.mark.parametrize("missing", ["", "name", "uid", "namespace"])
def test_incomplete_metadata(daemon: Daemon, tmp_path: Path, missing: str) -> None:
    config = sandbox_config(tmp_path)
    if missing:
        config.metadata.ClearField(missing)  # type: ignore[arg-type]
    else:
        config.ClearField("metadata")
    words = f"config.metadata.{missing} is empty" if missing else "config.metadata is missing"
    with refused(daemon, CODE.INVALID_ARGUMENT, words):
        daemon.runtime.RunPodSandbox(cri.RunPodSandboxRequest(config=config))


def test_an_unknown_handler(daemon: Daemon, tmp_path: Path) -> None:
    with refused(daemon, CODE.INVALID_ARGUMENT, "runtime_handler is 'kata'", "configured: vm"):
        run_pod(daemon, tmp_path, handler="kata")


def test_a_pods_name_is_taken(daemon: Daemon, pod: Pod) -> None:
    with refused(daemon, CODE.ALREADY_EXISTS, f"sandbox {pod.id}", "good_test_", "is taken"):
        daemon.runtime.RunPodSandbox(cri.RunPodSandboxRequest(config=pod.config))


def test_a_name_is_taken_from_the_first_moment(daemon: Daemon, tmp_path: Path) -> None:
    request = cri.RunPodSandboxRequest(config=sandbox_config(tmp_path, "twice"))
    before = Before(daemon)
    first, second = (daemon.runtime.RunPodSandbox.future(request) for _ in range(2))
    codes = [first.code(), second.code()]
    assert sorted(codes, key=str) == [CODE.ALREADY_EXISTS, CODE.OK]
    made = (first, second)[codes.index(CODE.OK)].result().pod_sandbox_id
    assert f"sandbox {made}" in (first, second)[codes.index(CODE.ALREADY_EXISTS)].details()
    daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=made))
    assert before.left() == {}


# --- containers -------------------------------------------------------------------------------------------------------

NO_PROFILE = cri.SecurityProfile(profile_type=cri.SecurityProfile.Localhost, localhost_ref="/no/such/profile.json")
Security = cri.LinuxContainerSecurityContext
BAD_CONTAINERS: dict[str, tuple[dict[str, object], grpc.StatusCode, tuple[str, ...]]] = {
    "image absent": ({"image": "docker.io/library/no-such"}, CODE.NOT_FOUND, ("no-such", "not on this node")),
    "image id absent": ({"image": "sha256:" + "0" * 64}, CODE.NOT_FOUND, ("sha256:000", "not on this node")),
    "bad reference": ({"image": "Bad Reference!!"}, CODE.INVALID_ARGUMENT, ("Bad Reference!!",)),
    "command not found": ({"command": ["no-such-command"]}, CODE.INVALID_ARGUMENT, ("no-such-command",)),
    "command is no program": ({"command": ["/etc/passwd"]}, CODE.INVALID_ARGUMENT, ("/etc/passwd",)),
    "command is a directory": ({"command": ["/etc"]}, CODE.INVALID_ARGUMENT, ("/etc",)),
    "working directory below a file": (
        {"working_dir": "/etc/passwd/below"},
        CODE.INVALID_ARGUMENT,
        ("working directory /etc/passwd/below", "Not a directory"),
    ),
    "working directory is a file": (
        {"working_dir": "/etc/passwd"},
        CODE.INVALID_ARGUMENT,
        ("working directory /etc/passwd", "Not a directory"),
    ),
    "working directory on a mount that takes none": (
        {"working_dir": "/proc/no-such"},
        CODE.INVALID_ARGUMENT,
        ("/proc/no-such",),
    ),
    "unknown user": (
        {"security": Security(run_as_username="wizard")},
        CODE.INVALID_ARGUMENT,
        ("'wizard'", "/etc/passwd"),
    ),
    "group without user": (
        {"security": Security(run_as_group=cri.Int64Value(value=5))},
        CODE.INVALID_ARGUMENT,
        ("run_as_group is set without run_as_user",),
    ),
    "no seccomp profile": (
        {"security": Security(seccomp=NO_PROFILE)},
        CODE.INVALID_ARGUMENT,
        ("seccomp", "/no/such/profile.json"),
    ),
}


@pytest.mark.parametrize("case", list(BAD_CONTAINERS))
def test_bad_containers(daemon: Daemon, pod: Pod, case: str) -> None:
    change, code, words = BAD_CONTAINERS[case]
    fields = dict(change)
    security = fields.pop("security", Security())
    assert isinstance(security, Security)
    security.namespace_options.CopyFrom(OWN_PIDS)
    command = fields.pop("command", ["true"])
    assert isinstance(command, list)
    with refused(daemon, code, *words):
        pod.create(*command, linux=cri.LinuxContainerConfig(security_context=security), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(("user", "words"), [("wizard", "user 'wizard'"), ("root:coven", "group 'coven'")])
def test_an_image_whose_user_is_unknown(daemon: Daemon, pod: Pod, tmp_path: Path, user: str, words: str) -> None:
    reference = f"localhost/user:{words[:4].strip()}"
    layer = busybox_image.layer(busybox_image.busybox())
    busybox_image.write_layout(tmp_path / "layout", reference, [layer], {"User": user})
    daemon.load(tmp_path / "layout")
    with refused(daemon, CODE.INVALID_ARGUMENT, words, "is not in the image's /etc/"):
        pod.create("true", image=reference)


def test_a_containers_name_is_taken_until_it_is_removed(daemon: Daemon, pod: Pod) -> None:
    holder = pod.create("true", name="unique")
    with refused(daemon, CODE.ALREADY_EXISTS, f"container {holder}", "unique_0", "is taken"):
        pod.create("true", name="unique")
    pod.remove(holder)
    pod.remove(pod.create("true", name="unique"))


def test_exec_in_a_container_that_does_not_run(daemon: Daemon, pod: Pod) -> None:
    container = pod.create("true")
    with refused(daemon, CODE.FAILED_PRECONDITION, f"container {container}", "created", "needs a running one"):
        pod.execute(container, "true")
    pod.start(container)
    pod.wait(container)
    with refused(daemon, CODE.FAILED_PRECONDITION, f"container {container}", "exited", "needs a running one"):
        pod.execute(container, "true")
    pod.remove(container)


def test_a_client_that_gives_up_a_create(daemon: Daemon, pod: Pod) -> None:
    config = cri.ContainerConfig(metadata=cri.ContainerMetadata(name="given-up"), image=cri.ImageSpec(image=IMAGE))
    request = cri.CreateContainerRequest(pod_sandbox_id=pod.id, config=config, sandbox_config=pod.config)
    before = Before(daemon)
    call = daemon.runtime.CreateContainer.future(request)
    while "container creating" not in records(daemon).values():
        assert not call.done()
    call.cancel()
    before.wait_restored()
    # Name and layers are free again, and the guest has forgotten the half-made one.
    pod.remove(pod.create("true", name="given-up"))


# --- networks ---------------------------------------------------------------------------------------------------------


@contextmanager
def network(daemon: Daemon, plugins: Path, *last: str) -> Iterator[None]:
    """Configure a bridge network whose chain ends with plugins that `last` names."""
    bridge = {
        "type": "bridge",
        "bridge": BRIDGE,
        "isGateway": True,
        "ipMasq": True,
        "ipam": {
            "type": "host-local",
            "dataDir": f"{daemon.root}/cni/ipam",
            "ranges": [[{"subnet": "10.251.77.0/24"}]],
        },
    }
    chain = [bridge, *({"type": kind} for kind in last)]
    conflist = daemon.root / "net.d" / "10-bad.conflist"
    conflist.write_text(json.dumps({"cniVersion": "1.0.0", "name": BRIDGE, "plugins": chain}))
    try:
        yield
    finally:
        conflist.unlink()
        subprocess.run(["ip", "link", "delete", BRIDGE], capture_output=True, check=False)


def test_a_cni_plugin_is_missing(daemon: Daemon, plugins: Path, tmp_path: Path) -> None:
    with network(daemon, plugins, "no-such-plugin"):
        conditions = daemon.runtime.Status(cri.StatusRequest()).status.conditions
        told = next(condition for condition in conditions if condition.type == "NetworkReady")
        assert not told.status
        assert "no-such-plugin" in told.message
        with refused(daemon, CODE.UNKNOWN, "no-such-plugin", str(plugins), networks=[BRIDGE]):
            run_pod(daemon, tmp_path)


def failing_plugin(plugins: Path, note: Path, delay_s: int) -> None:
    """A plugin that notes each command and refuses ADD after a while."""
    script = plugins / "fails"
    script.write_text(
        f"#!/bin/sh\ncat > /dev/null\necho $CNI_COMMAND >> {note}\n[ $CNI_COMMAND = ADD ] || exit 0\nsleep {delay_s}\n"
        'echo \'{"cniVersion": "1.0.0", "code": 7, "msg": "no more addresses", "details": "ask again"}\'\nexit 1\n'
    )
    script.chmod(0o755)
    # The bridge itself is the network's, not the pod's, and there before as it is after any pod.
    subprocess.run(["ip", "link", "add", BRIDGE, "type", "bridge"], check=True)


@pytest.mark.parametrize("delay_s", [0, 8])
def test_a_cni_plugin_fails_half_way(daemon: Daemon, plugins: Path, tmp_path: Path, delay_s: int) -> None:
    """At once, while QEMU is starting; and late, when the VM waits ready."""
    words = ("cni add", "sandbox ", "plugin fails", "no more addresses; ask again")
    with network(daemon, plugins, "fails"):
        failing_plugin(plugins, tmp_path / "note", delay_s)
        with refused(daemon, CODE.UNKNOWN, *words, networks=[BRIDGE]):
            run_pod(daemon, tmp_path)
    assert (tmp_path / "note").read_text().split() == ["ADD", "DEL"]


def test_a_client_that_gives_up_while_a_cni_plugin_works(daemon: Daemon, plugins: Path, tmp_path: Path) -> None:
    with network(daemon, plugins, "fails"):
        failing_plugin(plugins, tmp_path / "note", 1000)
        before = Before(daemon, [BRIDGE])
        call = daemon.runtime.RunPodSandbox.future(cri.RunPodSandboxRequest(config=sandbox_config(tmp_path)))
        while not (tmp_path / "note").exists():
            assert not call.done()
            time.sleep(0.02)
        call.cancel()
        before.wait_restored()
    assert (tmp_path / "note").read_text().split() == ["ADD", "DEL"]


# --- daemons ----------------------------------------------------------------------------------------------------------


def serve(root: Path, socket: Path) -> str:
    """Start a daemon that must refuse to run; return what it says."""
    argv = [sys.executable, "-m", "vmrt", "serve", "--root", str(root), "--listen", f"unix://{socket}"]
    done = subprocess.run(
        [*argv, "--guest", str(GUEST)], cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_second_daemon_on_the_same_root(daemon: Daemon, pod: Pod, tmp_path: Path) -> None:
    assert daemon.process is not None
    before = Before(daemon)
    said = serve(daemon.root, tmp_path / "other.sock")
    assert f"another vmrt daemon (pid {daemon.process.pid}) uses this root" in said
    assert str(daemon.root) in said
    assert "--root and --listen" in said
    assert before.left() == {}
    assert pod.output("echo", "unharmed") == "unharmed\n"


def test_a_second_daemon_on_the_same_socket(daemon: Daemon, pod: Pod) -> None:
    before = Before(daemon)
    other = daemon.root / "other"
    said = serve(other, daemon.socket)
    assert "another daemon answers on the socket" in said
    assert str(daemon.socket) in said
    assert before.left() == {}
    assert daemon.socket.is_socket()
    assert pod.output("echo", "unharmed") == "unharmed\n"


def test_a_socket_path_too_long(tmp_path: Path) -> None:
    socket = tmp_path / ("s" * 108)
    said = serve(tmp_path / "root", socket)
    assert f"the socket path is {len(os.fsencode(socket))} octets long, the kernel takes at most 107" in said
    assert list(tmp_path.iterdir()) == []


def test_a_root_path_too_long(tmp_path: Path) -> None:
    """VMs have sockets below the root: told when the daemon starts, not when the first pod is to run."""
    root = tmp_path / ("r" * 100)
    said = serve(root, tmp_path / "v.sock")
    assert f"root: the path is {len(os.fsencode(root))} octets long, the sockets below it leave" in said
    assert {path.name for path in root.iterdir()} <= {"vmrt.lock", "state.db"}


def test_a_root_that_qemus_user_cannot_reach(daemon: Daemon) -> None:
    closed = daemon.root / "closed"
    closed.mkdir(mode=0o700)
    said = serve(closed / "r", daemon.root / "v.sock")
    assert f"may not pass through {closed} on the way to {closed}/r" in said
    assert f"chmod o+x {closed}" in said


def test_disks_that_are_full(layout: Path, tmp_path: Path) -> None:
    """One that is too small for a layer, one too small for a pod's scratch disk: each under its directory of a root."""
    large = tmp_path / "large"
    busybox_image.write_layout(
        large, IMAGE, [busybox_image.layer({"big": busybox_image.File(os.urandom(6 << 20))})], {}
    )
    with clean_daemon("full", "[hypervisor]\nscratch_bytes = 134217728\n") as daemon:
        mounts = {daemon.root / "images": "4m", daemon.root / "scratch": "64k"}
        try:
            for directory, size in mounts.items():
                directory.mkdir()
                subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", directory], check=True)
            daemon.start()
            with refused(daemon, CODE.RESOURCE_EXHAUSTED, "o space left on device", "images"):
                list(daemon.control.LoadImages(control_pb2.LoadImagesRequest(path=str(large))))
            assert not daemon.images.ListImages(cri.ListImagesRequest()).images
            assert list((daemon.root / "images" / "layers").iterdir()) == []
            assert list((daemon.root / "images" / "staging").iterdir()) == []
            daemon.load(layout)
            with refused(daemon, CODE.RESOURCE_EXHAUSTED, "scratch disk", "o space left on device"):
                run_pod(daemon, tmp_path)
            assert list((daemon.root / "scratch").iterdir()) == []
            daemon.stop()
        finally:
            daemon.stop()
            for directory in mounts:
                subprocess.run(["umount", directory], check=False)
