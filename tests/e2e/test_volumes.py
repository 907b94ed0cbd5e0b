"""Volumes: host directories and files in a pod's containers, and what a hostile guest cannot do with them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from demo.daemon import Daemon
from demo.leftovers import snapshot
from tests.e2e.conftest import Pod, log_text, run_pod
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


def kubelet_volume(root: Path, plugin: str, name: str = "v") -> Path:
    """A directory where kubelet would have a pod's volume."""
    directory = root / "pods" / "uid" / "volumes" / f"kubernetes.io~{plugin}" / name
    directory.mkdir(parents=True)
    return directory


def publish(directory: Path, version: str, files: dict[str, str]) -> None:
    """Write as kubelet's atomic writer does (pkg/volume/util/atomic_writer.go)."""
    new = directory / f"..{version}"
    for path, text in files.items():
        (new / path).parent.mkdir(parents=True, exist_ok=True)
        (new / path).write_text(text)
        (new / path).chmod(0o640)
    (directory / "..data_tmp").symlink_to(new.name)
    (directory / "..data_tmp").rename(directory / "..data")
    names = {path.split("/")[0] for path in files}
    for name in names:
        if not (directory / name).is_symlink():
            (directory / name).symlink_to(f"..data/{name}")
    for old in directory.iterdir():
        if old.is_symlink() and old.name != "..data" and old.name not in names:
            old.unlink()
        elif not old.is_symlink() and old != new:
            shutil.rmtree(old)


# Tells the names' changes in /config: mask (inotify(7)) and name. x86_64's numbers of inotify_init1, inotify_add_watch.
WATCHER = """
$| = 1; $path = "/config"; $fd = syscall(294, 0); syscall(254, $fd, $path, 0x3c0) >= 0 or die $!;
open(F, "<&=", $fd); print "watching\n";
while (sysread(F, $data, 65536)) {
    for ($at = 0; $at < length $data; $at += 16 + $length) {
        ($watch, $mask, $cookie, $length) = unpack("iIII", substr($data, $at, 16));
        printf("%x %s\n", $mask & 0xfff, unpack("Z*", substr($data, $at + 16, $length)));
    }
}
"""


def run_perl(pod: Pod, script: str, mounts: list[cri.Mount]) -> str:
    """Run a Perl script in a container, with this machine's Perl; return when it has printed something."""
    loader = Path("/usr/lib64/ld-linux-x86-64.so.2").resolve()
    program = f"/host/{loader.relative_to('/usr')} --library-path /host/lib/x86_64-linux-gnu /host/bin/perl"
    container = pod.run(
        *("sh", "-c", f'exec {program} -e "$SCRIPT"'),
        envs=[cri.KeyValue(key="SCRIPT", value=script.encode())],
        mounts=[mount("/usr", "/host", readonly=True), *mounts],
    )
    log = Path(pod.status(container).log_path)
    while not log_text(log):
        status = pod.status(container)
        assert status.state == cri.CONTAINER_RUNNING, (status, log_text(log, "stderr"))
        time.sleep(0.1)
    return container


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def test_config_maps_change_with_inotify_events(pod: Pod, tmp_path: Path) -> None:
    config = kubelet_volume(tmp_path, "configmap")
    many = {f"key-{n}": f"value {n}" for n in range(300)}
    publish(config, "v0", {"key": "value 0", "old": "x", "dir/sub/file": "deep", **many})
    (config / "..v0/key").chmod(0o604)
    os.chown(config / "..v0/key", 12, 34)
    container = run_perl(pod, WATCHER, [mount(config, "/config", readonly=True)])
    log = Path(pod.status(container).log_path)
    assert log_text(log) == "watching\n"
    assert sh(pod, container, "cat /config/key /config/dir/sub/file; ls /config | wc -l") == "value 0deep303"
    assert sh(pod, container, "stat -L -c '%a %u %g' /config/key") == "604 12 34"
    assert "Read-only" in fails(pod, container, "touch /config/new")
    publish(config, "v1", {"key": "value 1", "new": "y", **many})
    last = ("100 new", "200 old", "200 ..v0")
    until(lambda: all(event in log_text(log) for event in last), "the last events of the update")
    events = [line for line in log_text(log).splitlines() if "..data_tmp" in line or "..data" in line or "..v" in line]
    # IN_CREATE, IN_MOVED_FROM, IN_MOVED_TO, IN_DELETE; kubelet's order.
    assert events == ["100 ..v1", "100 ..data_tmp", "40 ..data_tmp", "80 ..data", "200 ..v0"], events
    assert sh(pod, container, "cat /config/key /config/new; ls /config | wc -l") == "value 1y302"
    assert pod.status(container).mounts[1].host_path == str(config)
    pod.remove(container)


def test_an_empty_dir_in_memory_is_the_guests(pod: Pod, tmp_path: Path) -> None:
    """One tmpfs of the volume's size for all containers, sub-paths included; nothing of it is in the host's memory."""
    volume = kubelet_volume(tmp_path, "empty-dir")
    part = tmp_path / "pods/uid/volume-subpaths/v/c/0"
    part.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m,mode=2777,gid=77", "tmpfs", str(volume)], check=True)
    try:
        (volume / "sub").mkdir(mode=0o751)
        subprocess.run(["mount", "--bind", volume / "sub", part], check=True)
        first = pod.run("sleep", "1000", mounts=[mount(volume, "/m")])
        second = pod.run("sleep", "1000", mounts=[mount(part, "/part"), mount(volume, "/ro", readonly=True)])
        assert sh(pod, first, "stat -c '%a %g' /m; df -k /m | tail -1 | tr -s ' ' | cut -d' ' -f2") == "2777 77\n3072"
        assert sh(pod, first, "stat -f -c %T /m") == "tmpfs"
        sh(pod, second, "echo part > /part/file")
        assert sh(pod, first, "cat /m/sub/file") == "part"
        assert "Read-only" in fails(pod, second, "touch /ro/x")
        assert "No space" in fails(pod, first, "dd if=/dev/zero of=/m/big bs=1M count=4")
        sh(pod, first, "rm /m/big")
        # A container's restart finds what was there, and a link that it made leads nowhere but into the volume.
        sh(pod, first, "rm -r /m/sub; ln -s /run/vmrt /m/sub")
        pod.remove(second)
        with pytest.raises(grpc.RpcError, match="File exists"):
            pod.create("true", mounts=[mount(part, "/part")])
        sh(pod, first, "rm /m/sub; mkdir /m/sub; echo again > /m/sub/file")
        third = pod.run("sleep", "1000", mounts=[mount(part, "/part")])
        assert sh(pod, third, "cat /part/file") == "again"
        assert sorted(p.name for p in volume.iterdir()) == ["sub"]
        assert list((volume / "sub").iterdir()) == []
        pod.remove(first)
        pod.remove(third)
    finally:
        for place in (part, volume):
            subprocess.run(["umount", "-l", place], check=False)


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
                # Where virtiofsd is the Rust one, the guest looks a name up anew after a second only.
                until(lambda: sh(pod, container, "ls -A /slave/later") == "seen", "the mount is seen")
                assert sh(pod, container, "ls -A /private/later") == ""
            until(lambda: sh(pod, container, "ls -A /slave/later") == "", "its end is seen")
            pod.remove(container)
    finally:
        subprocess.run(["umount", "-l", slave], check=True)


def test_the_host_sees_nothing_of_a_pods_volumes(pod: Pod, tmp_path: Path) -> None:
    """No mount of theirs is in the host's mount table, and what is below a volume, or is one, can be removed there."""

    def seen() -> list[str]:
        ours = str(tmp_path), f"{pod.daemon.root}/share/"
        return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if any(p in line for p in ours)]

    volume, before = tmp_path / "volume", len(mounts_of(pod))
    (volume / "plain").mkdir(parents=True)
    with mounted(volume / "sub"):
        (volume / "sub" / "file").write_text("below")
        mounts = [mount(volume, "/v"), mount(volume, "/r", readonly=True, recursive_read_only=True)]
        container = pod.run("sleep", "1000", mounts=mounts)
        assert sh(pod, container, "cat /v/sub/file /r/sub/file") == "belowbelow"
        assert [line.split()[4] for line in seen()] == [str(volume / "sub")]
    assert seen() == []
    assert sh(pod, container, "cat /v/sub/file") == "below"
    (volume / "sub").rmdir()
    (volume / "plain").rmdir()
    assert sh(pod, container, "ls -A /v") == ""
    volume.rmdir()
    assert len(mounts_of(pod)) == before + 2
    pod.remove(container)
    assert len(mounts_of(pod)) == before
    assert seen() == []


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
    """One file system and one inode for all containers of a pod: sockets and FIFOs in it connect them."""
    empty_dir = tmp_path / "pods/uid/volumes/kubernetes.io~empty-dir/run"
    empty_dir.mkdir(parents=True)
    plain = tmp_path / "plain"
    plain.mkdir()
    first = pod.run("sleep", "1000", mounts=[mount(empty_dir, "/a"), mount(plain, "/plain")])
    # One that only reads an emptyDir reaches a socket in it, too.
    second = pod.run("sleep", "1000", mounts=[mount(empty_dir, "/b", readonly=True), mount(plain, "/plain")])
    sh(pod, first, "echo x > /a/file")
    assert sh(pod, second, "cat /b/file") == "x"
    assert "Read-only" in fails(pod, second, "touch /b/new")
    for ours, theirs in (("/a", "/b"), ("/plain", "/plain")):
        sh(pod, first, f"mkfifo {ours}/fifo; (cat /etc/hostname > {ours}/fifo) > /dev/null 2>&1 &")
        assert sh(pod, second, f"cat {theirs}/fifo") == "shared-host"
        # busybox's syslogd listens at /dev/log, links followed, and logger connects there.
        sh(pod, first, f"killall syslogd; rm -f /dev/log; ln -s {ours}/log /dev/log; : > {ours}/messages; sync")
        sh(pod, first, f"syslogd -O {ours}/messages && while [ ! -S {ours}/log ]; do sleep 0.1; done")
        sh(pod, second, f"rm -f /dev/log; ln -s {theirs}/log /dev/log; logger over-the-socket")
        sh(pod, first, f"while ! grep over-the-socket {ours}/messages; do sleep 0.1; done")
    pod.remove(first)
    assert sh(pod, second, "cat /b/file; touch /plain/still-there") == "x"
    pod.remove(second)
    assert list(volumes_of(pod).iterdir()) == []


def inspected(pod: Pod) -> dict[str, Any]:
    """What the daemon tells of the pod's VM."""
    request = cri.PodSandboxStatusRequest(pod_sandbox_id=pod.id, verbose=True)
    told: dict[str, Any] = json.loads(pod.daemon.runtime.PodSandboxStatus(request).info["vm"])
    return told


def volumes_of(pod: Pod) -> Path:
    """What the pod's virtiofsd serves."""
    return pod.daemon.root / "share" / str(inspected(pod)["id"]) / "files"


def mounts_of(pod: Pod) -> list[str]:
    """The mounts in the namespace of the pod's virtiofsd: proc_pid_mountinfo(5)."""
    record = json.loads((pod.daemon.root / "vms" / str(inspected(pod)["id"]) / "vm.json").read_text())
    return Path(f"/proc/{record['helpers']['virtiofsd'][0]}/mountinfo").read_text().splitlines()


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
    assert name
    for attempt in (
        f"mkdir {share}/new",
        f"ln -s /etc {share}/link",
        f"mv {share}/{name} {share}/other",
        f"rmdir {share}/{name}",
    ):
        fails(pod, container, attempt)
    assert name == sh(pod, container, f"ls {share}")
    fails(pod, container, f"ls {share}/../../../../var/tmp | grep vmrt-e2e")
    # virtiofsd may not make device nodes: none appears on the host.
    fails(pod, container, "mknod /v/sda b 8 0")
    assert not (volume / "sda").exists()
    # A set-user-ID file is the host's as the guest made it; on the host the share ignores the bit.
    sh(pod, container, "cp /bin/busybox /v/suid; chmod 4755 /v/suid")
    share_mounts = mounts_of(pod)
    assert len(share_mounts) > 1
    assert all({"nosuid", "nodev"} <= set(line.split()[5].split(",")) for line in share_mounts)
    assert (outside / "secret").read_text() == "secret"
    pod.remove(container)


def test_volumes_outlive_the_daemon_and_leave_nothing(private_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    import signal

    daemon = private_daemon(f'[volumes]\nempty_dir = "disk"\n[hypervisor]\nscratch_bytes = {128 * 1024**2}\n')
    volume = tmp_path / "volume"
    volume.mkdir()
    (volume / "kept").write_text("kept")
    secret = kubelet_volume(tmp_path, "secret")
    publish(secret, "1", {"token": "first"})
    before = snapshot(daemon.root)
    pod = run_pod(daemon, tmp_path, "volumes")
    container = pod.run("sleep", "1000", mounts=[mount(volume, "/v"), mount(secret, "/s", readonly=True)])
    disk, part = kubelet_volume(tmp_path, "empty-dir"), tmp_path / "pods/uid/volume-subpaths/v/c/0"
    disk.chmod(0o2770)
    os.chown(disk, 0, 4321)
    (disk / "sub").mkdir()
    part.mkdir(parents=True)
    subprocess.run(["mount", "--bind", disk / "sub", part], check=True)
    try:
        writer = pod.run("sleep", "1000", mounts=[mount(disk, "/d"), mount(part, "/part")])
    finally:
        subprocess.run(["umount", part], check=True)
    assert sh(pod, writer, "grep ' /d ' /proc/mounts | cut -d' ' -f3; stat -c '%a %g' /d") == "ext4\n2770 4321"
    assert sh(pod, writer, "echo x > /part/file; ls -A /d; cat /d/sub/file") == "sub\nx"
    image = disk / ".vmrt-disk"
    empty = image.stat().st_blocks
    sh(pod, writer, "dd if=/dev/zero of=/d/big bs=1M count=8 conv=fsync 2>/dev/null")
    assert image.stat().st_blocks >= empty + 8 * 2048  # as kubelet sees it
    sh(pod, writer, "rm /d/big; sync")
    daemon.stop(signal.SIGKILL)
    publish(secret, "2", {"token": "second"})
    daemon.start()
    assert sh(pod, container, "cat /v/kept") == "kept"
    until(lambda: sh(pod, container, "cat /s/token") == "second", "what changed while the daemon was down")
    publish(secret, "3", {"token": "third"})
    until(lambda: sh(pod, container, "cat /s/token") == "third", "what changed after the restart")
    later = pod.run("sleep", "1000", mounts=[mount(volume, "/w")])
    assert sh(pod, later, "cat /w/kept") == "kept"
    pod.remove(container)
    until(lambda: image.stat().st_blocks < empty + 4 * 2048, "the discarded blocks")
    pod.remove(writer)
    # Another container of the pod, as after a crash, finds what was there.
    again = pod.run("sleep", "1000", mounts=[mount(disk, "/d")])
    assert sh(pod, again, "cat /d/sub/file") == "x"
    # The writable layers of a pod have one disk, and that has its bound: the host's is not filled.
    assert "No space" in fails(pod, again, "dd if=/dev/zero of=/big bs=1M count=256")
    scratch = next((daemon.root / "scratch").glob("*.img")).stat()
    assert scratch.st_blocks * 512 <= scratch.st_size == 128 * 1024**2
    daemon.remove_pods()
    assert str(image) not in subprocess.run(["losetup", "-l"], check=True, capture_output=True, text=True).stdout
    left = snapshot(daemon.root).added_since(before)
    assert set(left) <= {"links"}, left  # the daemon's bridge stays as long as it runs
    assert (volume / "kept").read_text() == "kept"
