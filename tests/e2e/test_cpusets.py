"""What kubelet's CPU and memory managers send, with a real VM: where its threads may run."""

from __future__ import annotations

import json
import os
import signal
import uuid
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from demo.daemon import Daemon
from tests.e2e.conftest import Pod, run_pod, until
from vmrt import number_list
from vmrt.hypervisor import cgroup
from vmrt.proto.runtime.v1 import api_pb2 as cri


class Cpus:
    """Two CPUs that this machine has, the same one where it has no more, and what a pod's VM is kept to."""

    def __init__(self, pod: Pod) -> None:
        mine = sorted(os.sched_getaffinity(0))
        self.first, self.last = str(mine[0]), str(mine[-1])
        self.both = number_list.spelt((mine[0], mine[-1]))
        self.several = len(mine) > 1
        request = cri.PodSandboxStatusRequest(pod_sandbox_id=pod.id, verbose=True)
        vm = json.loads(pod.daemon.runtime.PodSandboxStatus(request).info["vm"])
        self._pids = [each for pid in vm["pids"] for each in cgroup.family(pid)]

    def kept(self, wanted: str) -> bool:
        """Say whether every thread of QEMU and its helpers may run there, and nowhere else."""
        allowed = set()
        for pid in self._pids:
            for status in Path(f"/proc/{pid}/task").glob("*/status"):
                lines = status.read_text().splitlines()
                allowed |= {line.split()[1] for line in lines if line.startswith("Cpus_allowed_list:")}
        assert allowed
        return allowed == {wanted}

    def free(self) -> bool:
        """Say whether nothing keeps the VM."""
        return not self.several or not (self.kept(self.first) or self.kept(self.last))


def container(pod: Pod, cpus: str = "", mems: str = "") -> str:
    linux = cri.LinuxContainerConfig(resources=cri.LinuxContainerResources(cpuset_cpus=cpus, cpuset_mems=mems))
    linux.security_context.namespace_options.pid = cri.CONTAINER
    return pod.run("sleep", "1000", linux=linux)


@pytest.mark.parametrize("in_cgroup", [True, False])
def test_a_vm_runs_where_its_containers_may(
    private_daemon: Callable[..., Daemon], tmp_path: Path, in_cgroup: bool
) -> None:
    daemon = private_daemon()
    runtime = daemon.runtime
    parent = f"vmrt-e2e-{uuid.uuid4().hex[:8]}"
    linux = cri.LinuxPodSandboxConfig(cgroup_parent=f"/{parent}/pod" if in_cgroup else "")
    pod = run_pod(daemon, tmp_path, "pinned", linux=linux)
    cpus = Cpus(pod)
    for field, value in (("cpus", "8000"), ("mems", "77")):
        with pytest.raises(grpc.RpcError, match=rf"cpuset_{field} '{value}': the host's .* has no {value}") as caught:
            container(pod, **{field: value})
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    free = container(pod)
    one = container(pod, cpus.last, "0")
    assert cpus.free()  # since one may run anywhere
    pod.remove(free)
    until(lambda: cpus.kept(cpus.last), "the VM is where its container may run")
    resources = pod.status(one).resources.linux
    assert (resources.cpuset_cpus, resources.cpuset_mems) == (cpus.last, "0")
    # Of the host's numbers nothing is in the guest.
    assert pod.execute(one, "cat", "/sys/fs/cgroup/cpuset.cpus").stdout.strip() == b""
    if cpus.several:
        # libvirt gives the thread of a plugged CPU all of the host's.
        more = cri.LinuxContainerResources(cpu_quota=200_000, cpu_period=100_000)
        runtime.UpdatePodSandboxResources(cri.UpdatePodSandboxResourcesRequest(pod_sandbox_id=pod.id, resources=more))
        assert cpus.kept(cpus.last)
    cgroups = [*Path("/sys/fs/cgroup").glob(f"**/{parent}/pod/vmrt-*/cpuset.cpus")]
    assert [path.read_text().strip() for path in cgroups] == [cpus.last] * len(cgroups)
    first = cri.LinuxContainerResources(cpuset_cpus=cpus.first)
    runtime.UpdateContainerResources(cri.UpdateContainerResourcesRequest(container_id=one, linux=first))
    assert cpus.kept(cpus.first)
    assert pod.status(one).resources.linux.cpuset_cpus == cpus.first
    two = container(pod, cpus.last)
    assert cpus.kept(cpus.both)
    # A daemon that is killed leaves the VM where it is, and the next one knows why it is there.
    assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
    daemon.start()
    assert cpus.kept(cpus.both)
    daemon.runtime.StopContainer(cri.StopContainerRequest(container_id=two, timeout=0))
    until(lambda: cpus.kept(cpus.first), "an ended container's CPUs are given back")
    pod.remove(one)
    until(cpus.free, "nothing keeps the VM any more")
    daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod.id))
    assert not [*Path("/sys/fs/cgroup").glob(f"**/{parent}")]
