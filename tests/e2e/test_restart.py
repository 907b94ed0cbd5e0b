"""The daemon is killed and started again; pods must not notice, and what a half-done call left must go.

Instants are picked by what is on disk, not by time. Private daemons only: nobody else's pods are put at risk.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from demo.daemon import Daemon
from demo.leftovers import Snapshot, snapshot
from tests.e2e.conftest import IMAGE, Pod, log_text, run_pod, sandbox_config
from vmrt import netns
from vmrt.pods.table import instance_tag
from vmrt.proto.runtime.v1 import api_pb2 as cri

# Some thousand lines a second, until it is told to stop: they cross every kill, restart and rotation.
COUNTER = "i=1; while [ ! -e /stop ]; do seq $i $((i + 199)); i=$((i + 200)); sleep 0.02; done"
# Ends when somebody connects to port 9000; its child's port 9001 closes with the container.
LEAVER = "httpd -f -p 9001 -h /srv & nc -l -p 9000 </dev/null; seq 1 5000; exit 7"


def until(what: Callable[[], bool], why: str, limit_s: float = 60) -> None:
    deadline = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < deadline, f"waited {limit_s} s until {why}"
        time.sleep(0.002)


def kill(daemon: Daemon) -> None:
    """Kill the daemon without any warning to it or to its clients' connections."""
    assert daemon.process is not None
    os.kill(daemon.process.pid, signal.SIGKILL)
    assert daemon.stop() == -signal.SIGKILL


def reopen(pod: Pod, container: str) -> None:
    pod.daemon.runtime.ReopenContainerLog(cri.ReopenContainerLogRequest(container_id=container))


def connects(ip: str, port: int) -> bool:
    try:
        socket.create_connection((ip, port), timeout=5).close()
    except OSError:
        return False
    return True


def sandbox_status(pod: Pod) -> cri.PodSandboxStatusResponse:
    return pod.daemon.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod.id, verbose=True))


def listed(daemon: Daemon) -> tuple[list[str], list[str]]:
    """The sandboxes and containers that a client sees."""
    sandboxes = daemon.runtime.ListPodSandbox(cri.ListPodSandboxRequest()).items
    containers = daemon.runtime.ListContainers(cri.ListContainersRequest()).containers
    return [s.id for s in sandboxes], [c.id for c in containers]


def records(daemon: Daemon, kind: str) -> list[dict[str, object]]:
    with contextlib.closing(sqlite3.connect(f"file:{daemon.root}/state.db?mode=ro", uri=True)) as db:
        return [json.loads(row[0]) for row in db.execute("SELECT document FROM records WHERE kind = ?", (kind,))]


def leftovers(daemon: Daemon, before: Snapshot) -> dict[str, list[str]]:
    """What is there beside the daemon's bridge, which goes with the daemon."""
    now = snapshot(daemon.root)
    return replace(now, links=now.links - {f"vmrt-{instance_tag(daemon.root)}"}).added_since(before)


def test_a_pod_lives_through_kills_of_the_daemon(private_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = private_daemon()
    pod = run_pod(daemon, tmp_path, "survivor")
    before = sandbox_status(pod).status
    counter, leaver = pod.run("sh", "-c", COUNTER), pod.run("sh", "-c", LEAVER)
    log = Path(pod.status(counter).log_path)
    until(lambda: log_text(log).count("\n") > 500, "the counter prints")
    until(lambda: connects(before.network.ip, 9001), "the other container listens")

    # Rotated as kubelet does, then killed: one container goes on printing, the other one ends unseen.
    log.rename(log.with_suffix(".log.1"))
    reopen(pod, counter)
    until(lambda: log.stat().st_size > 0, "the new file gets lines")
    killed_ns = time.time_ns()
    kill(daemon)
    until(lambda: connects(before.network.ip, 9000), "it is told to end")
    until(lambda: not connects(before.network.ip, 9001), "it has ended")
    restarted_ns = time.time_ns()
    daemon.start()

    after = sandbox_status(pod).status
    assert after == before
    ended = pod.wait(leaver)
    assert (ended.exit_code, ended.reason) == (7, "Error")
    # The guest tells the age of the exit in its own clock; a second is for the two clocks' pace under emulation.
    assert killed_ns - 10**9 < ended.finished_at < restarted_ns + 10**9
    assert log_text(Path(ended.log_path)) == "".join(f"{n}\n" for n in range(1, 5001))
    assert pod.status(counter).state == cri.CONTAINER_RUNNING
    assert pod.execute(counter, "echo", "again").stdout == b"again\n"

    # Killed between the rename of a rotation and its ReopenContainerLog.
    size = log.stat().st_size
    until(lambda: log.stat().st_size > size, "the log goes on after the restart")
    log.rename(log.with_suffix(".log.2"))
    kill(daemon)
    daemon.start()
    reopen(pod, counter)

    # An orderly restart, with a new container in a VM that has its image's disks already.
    assert daemon.stop() == 0
    daemon.start()
    assert pod.output("echo", "new") == "new\n"
    assert pod.execute(counter, "touch", "/stop").exit_code == 0
    assert pod.wait(counter).exit_code == 0
    text = "".join(log_text(log.with_suffix(suffix)) for suffix in (".log.1", ".log.2", ".log"))
    assert text.count("\n") > 1000
    assert text == "".join(f"{n}\n" for n in range(1, text.count("\n") + 1))
    pod.remove(leaver)

    # The VM goes while nobody looks.
    sleeper = pod.run("sleep", "1000")
    pids = json.loads(sandbox_status(pod).info["vm"])["pids"]
    kill(daemon)
    os.kill(pids[0], signal.SIGKILL)
    daemon.start()
    lost = sandbox_status(pod)
    assert lost.status.state == cri.SANDBOX_NOTREADY
    assert "while the daemon was down" in lost.info["reason"]
    ended = pod.status(sleeper)
    assert (ended.state, ended.exit_code, ended.reason) == (cri.CONTAINER_EXITED, 255, "Unknown")
    with pytest.raises(grpc.RpcError, match="exec needs a running one"):
        pod.execute(sleeper, "true")
    for _ in range(2):
        daemon.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod.id))
    pod.remove(sleeper)
    daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod.id))
    assert listed(daemon) == ([], [])


def test_half_done_calls_leave_nothing(private_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = private_daemon()
    root, untouched = daemon.root, snapshot(daemon.root)
    config = sandbox_config(tmp_path, "half")
    request = cri.RunPodSandboxRequest(config=config)

    def present(pattern: str, text: bytes = b"") -> Callable[[], bool]:
        def look() -> bool:
            with contextlib.suppress(OSError):  # a file that is being replaced
                return any(text in path.read_bytes() if text else True for path in root.glob(pattern))
            return False

        return look

    instants = {
        "the record": lambda: bool(records(daemon, "sandbox")),
        "scratch disk and network": lambda: present("scratch/*.img")() and present("netns/*")(),
        "QEMU": lambda: bool(snapshot(root).processes),
        "a booted VM": present("vms/*/vm.json", b'"ready": true'),
    }
    for instant, reached in instants.items():
        call = daemon.runtime.RunPodSandbox.future(request)
        until(lambda: reached() or call.done(), instant)  # noqa: B023
        assert not call.done(), (instant, call)
        kill(daemon)
        daemon.start()
        assert listed(daemon) == ([], []), instant
        # At once, but where the kill caught libvirt in the act: then it takes its time to forget the domain.
        until(lambda: records(daemon, "sandbox") == [], instant)
        left = leftovers(daemon, untouched)
        assert not left, (instant, left)

    # The name is free each time, and the last attempt may go on.
    pod = run_pod(daemon, tmp_path, "half")
    create = cri.CreateContainerRequest(
        pod_sandbox_id=pod.id,
        config=cri.ContainerConfig(
            metadata=cri.ContainerMetadata(name="half"), image=cri.ImageSpec(image=IMAGE), command=["true"]
        ),
        sandbox_config=pod.config,
    )
    creating = daemon.runtime.CreateContainer.future(create)
    until(lambda: bool(records(daemon, "container")) or creating.done(), "the container's record")
    assert not creating.done(), creating
    kill(daemon)
    daemon.start()
    assert listed(daemon) == ([pod.id], [])
    # At once, but where the guest is so slow that it is adopted only later.
    until(lambda: records(daemon, "container") == [], "the guest has given up the container")
    container = daemon.runtime.CreateContainer(create).container_id
    pod.start(container)
    assert pod.wait(container).exit_code == 0

    # Killed in the middle of a stop and of a removal: the repeated call ends what the first one began.
    stop = cri.StopPodSandboxRequest(pod_sandbox_id=pod.id)
    stopping = daemon.runtime.StopPodSandbox.future(stop)
    until(lambda: records(daemon, "sandbox")[0]["state"] == "not-ready" or stopping.done(), "the stop is on record")
    kill(daemon)
    daemon.start()
    assert snapshot(root).processes == untouched.processes
    daemon.runtime.StopPodSandbox(stop)
    daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod.id))
    left = leftovers(daemon, untouched)
    assert not left, left


def test_what_has_no_record_is_swept_and_what_is_not_ours_stays(
    private_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    daemon = private_daemon()
    root, untouched = daemon.root, snapshot(daemon.root)
    run_pod(daemon, tmp_path, "stray")
    kill(daemon)
    # A whole pod whose record is lost, and stray pieces of others.
    with contextlib.closing(sqlite3.connect(root / "state.db")) as db, db:
        db.execute("DELETE FROM records")
    netns.create(root / "netns" / ("a" * 64))
    (root / "scratch" / "feedfeedfeed.img").write_bytes(b"")
    (root / "pods" / ("b" * 64)).mkdir(parents=True)
    assert leftovers(daemon, untouched).keys() >= {"processes", "files"}
    # Not ours: what other programs made.
    ours = root / "scratch" / "notes.txt"
    ours.write_text("an administrator's")
    foreign = f"other{os.getpid()}"
    subprocess.run(["ip", "netns", "add", foreign], check=True)
    try:
        subprocess.run(["ip", "tuntap", "add", f"vx{os.getpid()}", "mode", "tap"], check=True)
        try:
            daemon.start()
            left = leftovers(daemon, untouched)
            assert not left, left
            assert ours.exists()
            assert Path("/run/netns", foreign).exists()
            assert Path("/sys/class/net", f"vx{os.getpid()}").exists()
        finally:
            subprocess.run(["ip", "tuntap", "del", f"vx{os.getpid()}", "mode", "tap"], check=True)
    finally:
        subprocess.run(["ip", "netns", "del", foreign], check=True)
