"""Volumes: host directories and files in a pod's containers, and what a hostile guest cannot do with them."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from demo.daemon import Daemon
from demo.leftovers import snapshot
from tests.e2e.conftest import Pod, run_pod
from vmrt.proto.runtime.v1 import api_pb2 as cri


def mount(host: Path | str, inside: str, **fields: object) -> cri.Mount:
    return cri.Mount(host_path=str(host), container_path=inside, **fields)  # type: ignore[arg-type]


def sh(pod: Pod, container: str, script: str) -> str:
    done = pod.execute(container, "sh", "-c", script)
    assert done.exit_code == 0, (script, done.stdout, done.stderr)
    return done.stdout.decode().strip()


def fails(pod: Pod, container: str, script: str) -> str:
    done = pod.execute(container, "sh", "-c", script)
    assert done.exit_code != 0, (script, done.stdout)
    return (done.stdout + done.stderr).decode()


@contextmanager
def mounted(target: Path) -> Iterator[None]:
    target.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(target)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(target)], check=True)


@pytest.fixture(scope="module")
def privileged(daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pod]:
    """A pod whose containers may be root in its guest without bounds."""
    linux = cri.LinuxPodSandboxConfig(security_context=cri.LinuxSandboxSecurityContext(privileged=True))
    pod = run_pod(daemon, tmp_path_factory.mktemp("logs"), "privileged", linux=linux)
    yield pod
    daemon.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod.id))
    daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod.id))


def test_directories_and_files_both_ways(pod: Pod, tmp_path: Path) -> None:
    data, link, single = tmp_path / "data", tmp_path / "link", tmp_path / "single"
    data.mkdir()
    (data / "from-host").write_text("hello")
    link.symlink_to(data)
    single.write_text("10.9.8.7 told-by-kubelet\n")
    mounts = [mount(link, "/data"), mount(single, "/etc/hosts")]
    container = pod.run("sleep", "1000", mounts=mounts)
    assert sh(pod, container, "cat /data/from-host /etc/hosts") == "hello10.9.8.7 told-by-kubelet"
    sh(pod, container, "echo back > /data/from-guest; chown 12:34 /data/from-guest; chmod 640 /data/from-guest; sync")
    made = data / "from-guest"
    assert made.read_text() == "back\n"
    assert (made.stat().st_uid, made.stat().st_gid, made.stat().st_mode & 0o7777) == (12, 34, 0o640)
    sh(pod, container, "echo more >> /etc/hosts")
    assert single.read_text().endswith("more\n")
    status = pod.status(container)
    assert [(m.host_path, m.container_path) for m in status.mounts] == [
        (str(link), "/data"),
        (str(single), "/etc/hosts"),
    ]
    pod.remove(container)
    assert made.read_text() == "back\n"


def test_the_termination_log_is_on_the_host_when_the_exit_is_told(pod: Pod, tmp_path: Path) -> None:
    log = tmp_path / "termination"
    log.touch(0o666)
    container = pod.run(
        "sh", "-c", "echo last words > /dev/termination-log; exit 3", mounts=[mount(log, "/dev/termination-log")]
    )
    assert pod.wait(container).exit_code == 3
    assert log.read_text() == "last words\n"
    pod.remove(container)


def test_config_maps_change_at_once(pod: Pod, tmp_path: Path) -> None:
    def publish(version: int) -> None:
        directory = tmp_path / f"..v{version}"
        directory.mkdir()
        (directory / "key").write_text(f"value {version}")
        (tmp_path / "..new").symlink_to(directory.name)
        (tmp_path / "..new").rename(tmp_path / "..data")

    publish(0)
    (tmp_path / "key").symlink_to("..data/key")
    container = pod.run("sleep", "1000", mounts=[mount(tmp_path, "/config", readonly=True)])
    for version in range(1, 6):
        assert sh(pod, container, "cat /config/key") == f"value {version - 1}"
        publish(version)
        assert sh(pod, container, "cat /config/key") == f"value {version}"
    pod.remove(container)


def test_read_only_is_held_by_the_host(privileged: Pod, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    security = cri.LinuxContainerSecurityContext(privileged=True)
    security.namespace_options.pid = cri.CONTAINER
    pod = privileged
    container = pod.run(
        "sleep",
        "1000",
        mounts=[mount(tmp_path, "/ro", readonly=True)],
        linux=cri.LinuxContainerConfig(security_context=security),
    )
    assert "Read-only" in fails(pod, container, "echo x > /ro/file")
    # The guest's root can lift its own kernel's flag, not the host's.
    assert "Read-only" in fails(pod, container, "mount -o remount,bind,rw /ro; echo x > /ro/file")
    assert "Read-only" in fails(pod, container, "touch /ro/new")
    assert (tmp_path / "file").read_text() == "kept"
    pod.remove(container)


def test_host_mounts_below_a_volume(pod: Pod, tmp_path: Path) -> None:
    plain, slave = tmp_path / "plain", tmp_path / "slave"
    for directory in (plain, slave):
        directory.mkdir()
    subprocess.run(["mount", "--bind", slave, slave], check=True)
    subprocess.run(["mount", "--make-rshared", slave], check=True)
    try:
        with mounted(plain / "sub"):
            (plain / "sub" / "file").write_text("below")
            mounts = [
                mount(plain, "/private"),
                mount(plain, "/ro", readonly=True),
                mount(plain, "/rro", readonly=True, recursive_read_only=True),
                mount(slave, "/slave", propagation=cri.PROPAGATION_HOST_TO_CONTAINER),
            ]
            container = pod.run("sleep", "1000", mounts=mounts)
            assert sh(pod, container, "cat /private/sub/file /ro/sub/file") == "belowbelow"
            # Read-only without recursive_read_only: the mount itself, not those below it.
            assert "Read-only" in fails(pod, container, "touch /ro/x")
            sh(pod, container, "touch /ro/sub/x")
            assert "Read-only" in fails(pod, container, "touch /rro/sub/y")
            (slave / "later").mkdir()
            (plain / "later").mkdir()
            assert sh(pod, container, "ls -A /slave/later /private/later") == "/private/later:\n\n/slave/later:"
            with mounted(slave / "later"), mounted(plain / "later"):
                (slave / "later" / "seen").touch()
                (plain / "later" / "unseen").touch()
                assert sh(pod, container, "ls -A /slave/later") == "seen"
                assert sh(pod, container, "ls -A /private/later") == ""
            assert sh(pod, container, "ls -A /slave/later") == ""
            pod.remove(container)
    finally:
        subprocess.run(["umount", "-l", slave], check=True)


def test_sub_paths_and_paths_through_descriptors(pod: Pod, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file").write_text("sub")
    fd = os.open(tmp_path / "sub", os.O_PATH)
    try:
        container = pod.run("sleep", "1000", mounts=[mount(f"/proc/{os.getpid()}/fd/{fd}", "/sub")])
    finally:
        os.close(fd)
    assert sh(pod, container, "cat /sub/file") == "sub"
    pod.remove(container)


def test_containers_share_a_volume(pod: Pod, tmp_path: Path) -> None:
    first = pod.run("sleep", "1000", mounts=[mount(tmp_path, "/a")])
    second = pod.run("sleep", "1000", mounts=[mount(tmp_path, "/b")])
    sh(pod, first, "echo x > /a/file")
    assert sh(pod, second, "cat /b/file") == "x"
    pod.remove(first)
    assert sh(pod, second, "cat /b/file") == "x"
    pod.remove(second)


def test_what_cannot_be_is_refused_by_name_and_leaves_nothing(pod: Pod, tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    os.mkfifo(tmp_path / "fifo")
    before = snapshot(pod.daemon.root)
    for path, words in (
        (tmp_path / "missing", "No such file"),
        (tmp_path / "socket", "socket"),
        (tmp_path / "fifo", "FIFO"),
        ("/dev/null", "character device"),
    ):
        # The first mount succeeds and is undone.
        with pytest.raises(grpc.RpcError, match=words) as caught:
            pod.create("true", mounts=[mount(tmp_path, "/ok"), mount(path, "/x")])
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "config.mounts[1]" in str(caught.value)
    listener.close()
    assert snapshot(pod.daemon.root).added_since(before) == {}


def test_a_hostile_guest_stays_in_its_volumes(privileged: Pod, tmp_path: Path) -> None:
    volume, outside = tmp_path / "volume", tmp_path / "outside"
    volume.mkdir()
    outside.mkdir()
    (outside / "secret").write_text("secret")
    (volume / "absolute").symlink_to(outside)
    security = cri.LinuxContainerSecurityContext(privileged=True)
    security.namespace_options.pid = cri.NODE
    pod = privileged
    container = pod.run(
        "sleep", "1000", mounts=[mount(volume, "/v")], linux=cri.LinuxContainerConfig(security_context=security)
    )
    for escape in ("absolute/secret", "../outside/secret", f"up{outside}/secret"):
        sh(pod, container, "ln -sfn ../../../../../../../.. /v/up")
        assert fails(pod, container, f"cat /v/{escape}") != "secret\n"
    # The whole share, as the guest's root sees it: names from elsewhere can neither be made nor moved in its root.
    share = "/proc/1/root/run/vmrt/share"
    name = sh(pod, container, f"ls {share}")
    assert name == container
    for attempt in (
        f"mkdir {share}/new",
        f"ln -s /etc {share}/link",
        f"mv {share}/{name} {share}/other",
        f"ln -s /etc {share}/{name}/7",
        f"rmdir {share}/{name}/0",
        f"mv {share}/{name}/0 {share}/{name}/9",
    ):
        fails(pod, container, attempt)
    assert name == sh(pod, container, f"ls {share}")
    fails(pod, container, f"ls {share}/../../../../var/tmp | grep vmrt-e2e")
    # virtiofsd may not make device nodes: none appears on the host.
    fails(pod, container, "mknod /v/sda b 8 0")
    assert not (volume / "sda").exists()
    # A set-user-ID file is the host's as the guest made it; on the host the share ignores the bit.
    sh(pod, container, "cp /bin/busybox /v/suid; chmod 4755 /v/suid")
    share_mounts = [
        line
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
        if f"{pod.daemon.root}/share/" in line and "/guest" in line
    ]
    assert share_mounts
    assert all({"nosuid", "nodev"} <= set(line.split()[5].split(",")) for line in share_mounts)
    assert (outside / "secret").read_text() == "secret"
    pod.remove(container)


def test_volumes_outlive_the_daemon_and_leave_nothing(private_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    import signal

    daemon = private_daemon()
    volume = tmp_path / "volume"
    volume.mkdir()
    (volume / "kept").write_text("kept")
    before = snapshot(daemon.root)
    pod = run_pod(daemon, tmp_path, "volumes")
    container = pod.run("sleep", "1000", mounts=[mount(volume, "/v")])
    daemon.stop(signal.SIGKILL)
    daemon.start()
    assert sh(pod, container, "cat /v/kept") == "kept"
    later = pod.run("sleep", "1000", mounts=[mount(volume, "/w")])
    assert sh(pod, later, "cat /w/kept") == "kept"
    pod.remove(container)
    daemon.remove_pods()
    left = snapshot(daemon.root).added_since(before)
    assert set(left) <= {"links"}, left  # the daemon's bridge stays as long as it runs
    assert (volume / "kept").read_text() == "kept"
