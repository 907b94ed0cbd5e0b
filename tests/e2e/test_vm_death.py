"""Virtual machines that die: what clients see, that calls fail at once, and that the pod can still be removed."""

from __future__ import annotations

import contextlib
import json
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from demo.daemon import Daemon
from tests.e2e.conftest import Pod, clean_daemon, log_text, run_pod
from tests.e2e.failures import PATIENCE_S, Before, kill, refused, vm_pids
from vmrt.proto.runtime.v1 import api_pb2 as cri

CODE = grpc.StatusCode


@pytest.fixture(scope="module")
def mortal(layout: Path) -> Iterator[Daemon]:
    """A daemon whose VMs may be killed."""
    with clean_daemon("death") as daemon:
        daemon.start()
        daemon.load(layout)
        yield daemon


@pytest.fixture
def doomed(mortal: Daemon, tmp_path: Path) -> Iterator[Pod]:
    """A privileged pod; it must be removable, without a trace, whatever has become of it."""
    before = Before(mortal)
    linux = cri.LinuxPodSandboxConfig(security_context=cri.LinuxSandboxSecurityContext(privileged=True))
    pod = run_pod(mortal, tmp_path, "doomed", linux=linux)
    yield pod
    for _ in range(2):
        mortal.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod.id))
    # The record is there after the stop, and so is what it says.
    assert sandbox(pod).status.state == cri.SANDBOX_NOTREADY
    mortal.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod.id))
    assert before.left() == {}


def sandbox(pod: Pod) -> cri.PodSandboxStatusResponse:
    return pod.daemon.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod.id, verbose=True))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_dead(pod: Pod) -> cri.PodSandboxStatusResponse:
    """Wait until the sandbox is not ready, told by the lists alone, which ask no VM."""
    listing = cri.ListPodSandboxRequest(filter=cri.PodSandboxFilter(id=pod.id))
    wait_until(lambda: pod.daemon.runtime.ListPodSandbox(listing).items[0].state == cri.SANDBOX_NOTREADY)
    return sandbox(pod)


def killed(pod: Pod, container: str, why: str) -> cri.ContainerStatus:
    """Check the status of a container whose VM died."""
    status = pod.status(container)
    assert (status.state, status.exit_code, status.reason) == (cri.CONTAINER_EXITED, 137, "Error")
    assert why in status.message
    assert status.finished_at >= max(status.created_at, status.started_at) > 0
    return status


def test_qemu_is_killed_under_many_containers(doomed: Pod) -> None:
    pod, runtime = doomed, doomed.daemon.runtime
    ended = pod.run("sh", "-c", "exit 3")
    pod.wait(ended)
    created = pod.create("true")
    writers = [pod.run("sh", "-c", "seq 1 2000; echo end; exec sleep 1000") for _ in range(6)]
    logs = [Path(pod.status(container).log_path) for container in writers]
    wait_until(lambda: all(log_text(log).endswith("end\n") for log in logs))
    # Calls on their way when it happens: each must come back, and not at the end of its own time.
    running = runtime.ExecSync.future(cri.ExecSyncRequest(container_id=writers[0], cmd=["sleep", "1001"]))
    stopping = runtime.StopContainer.future(cri.StopContainerRequest(container_id=writers[1], timeout=1000))
    seen = ("sh", "-c", "ps -o args | grep '[s]leep 1001' || true")
    wait_until(lambda: pod.execute(writers[0], *seen).stdout != b"")
    kill(vm_pids(pod.daemon, pod.id)["qemu-system-x86_64"])
    status = wait_dead(pod)
    assert "QEMU was killed" in json.loads(status.info["reason"])
    assert json.loads(status.info["vm"])["pids"] == []
    for container in (created, *writers):
        killed(pod, container, "QEMU was killed")
    assert (pod.status(ended).exit_code, pod.status(ended).message) == (3, "")
    for log in logs:
        assert log_text(log) == "".join(f"{n}\n" for n in range(1, 2001)) + "end\n"
    assert running.code() is CODE.UNAVAILABLE
    assert stopping.result(timeout=PATIENCE_S) is not None

    for call in (
        lambda: pod.execute(writers[0], "true"),
        lambda: pod.start(created),
        lambda: runtime.ReopenContainerLog(cri.ReopenContainerLogRequest(container_id=writers[0])),
    ):
        with refused(pod.daemon, CODE.FAILED_PRECONDITION, "container ", "exited"):
            call()
    with refused(pod.daemon, CODE.FAILED_PRECONDITION, f"sandbox {pod.id}", "not-ready", "QEMU was killed"):
        pod.create("true")
    runtime.StopContainer(cri.StopContainerRequest(container_id=writers[2], timeout=1000))
    pod.remove(writers[2])
    pod.remove(created)


def test_the_vsock_helper_is_killed(doomed: Pod) -> None:
    container = doomed.run("sleep", "1000")
    pids = vm_pids(doomed.daemon, doomed.id)
    if "vhost-device-vsock" not in pids:
        pytest.skip("this host's kernel has vhost_vsock: there is no helper to kill")
    kill(pids["vhost-device-vsock"])
    assert "vhost-device-vsock" in json.loads(wait_dead(doomed).info["reason"])
    killed(doomed, container, "vhost-device-vsock")
    wait_until(lambda: not Path(f"/proc/{pids['qemu-system-x86_64']}/exe").exists())


# A kernel that is told so panics when a cgroup is out of memory (Documentation/admin-guide/sysctl/vm.rst).
PANIC = "echo 2 > /proc/sys/vm/panic_on_oom; dd if=/dev/zero of=/dev/null bs=200M"


@pytest.mark.parametrize(
    ("key", "command", "last_words"),
    [("c", PANIC, "Kernel panic"), ("b", "reboot -f", ""), ("o", "poweroff -f", "")],
    ids=["panic", "reset", "power off"],
)
def test_the_guest_ends_itself(doomed: Pod, key: str, command: str, last_words: str) -> None:
    """A container that may do so panics, resets or powers off its kernel.

    By SysRq (Documentation/admin-guide/sysrq.rst), which the tuned kernel does not have, else by other means.
    """
    end = f"if [ -e /proc/sysrq-trigger ]; then echo {key} > /proc/sysrq-trigger; else {command}; fi"
    bystander = doomed.run("sleep", "1000")
    # reboot(2) elsewhere than in the guest's first PID namespace ends that namespace only.
    options = cri.NamespaceOption(pid=cri.NODE)
    linux = cri.LinuxContainerConfig(
        security_context=cri.LinuxContainerSecurityContext(privileged=True, namespace_options=options),
        resources=cri.LinuxContainerResources(memory_limit_in_bytes=32 << 20),
    )
    culprit = doomed.run("sh", "-c", f"echo written; sleep 1; {end}; sleep 1000", linux=linux)
    status = wait_dead(doomed)
    reason = json.loads(status.info["reason"])
    # A kernel that ends in order resets its devices first, and then the helper of one may be seen to go before QEMU is.
    assert "the virtual machine shut down" in reason or "virtiofsd" in reason
    assert last_words in json.loads(status.info["console"])
    killed(doomed, bystander, reason)
    assert log_text(Path(killed(doomed, culprit, reason).log_path)) == "written\n"


def test_qemu_is_killed_during_a_create(doomed: Pod) -> None:
    config = cri.ContainerConfig(metadata=cri.ContainerMetadata(name="late"), image=cri.ImageSpec(image="vmrt-test"))
    request = cri.CreateContainerRequest(pod_sandbox_id=doomed.id, config=config, sandbox_config=doomed.config)
    qemu = vm_pids(doomed.daemon, doomed.id)["qemu-system-x86_64"]
    call = doomed.daemon.runtime.CreateContainer.future(request)
    kill(qemu)
    assert call.code() is CODE.UNAVAILABLE, call.details()
    wait_dead(doomed)
    chosen = cri.ContainerFilter(pod_sandbox_id=doomed.id)
    assert not doomed.daemon.runtime.ListContainers(cri.ListContainersRequest(filter=chosen)).containers


def test_a_guest_that_hangs_can_be_stopped(doomed: Pod) -> None:
    container = doomed.run("sleep", "1000")
    qemu = vm_pids(doomed.daemon, doomed.id)["qemu-system-x86_64"]
    kill(qemu, signal.SIGSTOP)
    # What asks no VM is answered, and verbose status says what is wrong with it.
    assert "does not answer" in json.loads(sandbox(doomed).info["vm"])["agent"]
    assert doomed.status(container).state == cri.CONTAINER_RUNNING
    doomed.daemon.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=doomed.id))
    killed(doomed, container, "stopped")


def test_the_host_kills_a_pod_for_memory(mortal: Daemon, tmp_path: Path) -> None:
    """The pod's host cgroup holds its VM; when the VM is killed there for memory, its containers were OOMKilled."""
    before = Before(mortal)
    parent = f"vmrt-e2e-{uuid.uuid4().hex[:8]}/pod"
    pod = run_pod(mortal, tmp_path, "starved", linux=cri.LinuxPodSandboxConfig(cgroup_parent=f"/{parent}"))
    found = [path for path in Path("/sys/fs/cgroup").glob(f"**/{parent}") if path.is_dir()]
    if not found:
        pytest.skip("this host has no cgroup controllers")
    # QEMU and each helper, under every controller.
    processes = {*vm_pids(pod.daemon, pod.id).values()}
    for cgroup in found:
        (leaf,) = [path for path in cgroup.iterdir() if path.is_dir()]
        assert processes <= {int(pid) for pid in (leaf / "cgroup.procs").read_text().split()}
    limits = [path / name for path in found for name in ("memory.limit_in_bytes", "memory.max")]
    (limit,) = [path for path in limits if path.exists()]
    container = pod.run("sh", "-c", "sleep 1000")
    used = limit.parent / limit.name.replace("limit", "usage").replace("max", "current")
    limit.write_text(str(int(used.read_text()) + 4 * 1024**2))
    with contextlib.suppress(grpc.RpcError):  # its VM goes while it runs
        pod.execute(container, "dd", "if=/dev/zero", "of=/dev/shm/filler", "bs=1M", "count=60", timeout=120)
    assert wait_dead(pod).status.state == cri.SANDBOX_NOTREADY
    ended = pod.status(container)
    assert (ended.state, ended.exit_code, ended.reason) == (cri.CONTAINER_EXITED, 137, "OOMKilled")
    mortal.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod.id))
    assert before.left() == {}
    assert not [path for path in found if path.parent.exists()]
