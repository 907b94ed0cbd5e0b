"""Whom the host kills for memory first: oom_score_adj of a pod's QEMU and helpers, as kubelet's classes give it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from demo.daemon import Daemon
from tests.e2e.conftest import Pod, run_pod, until
from vmrt.hypervisor import cgroup
from vmrt.proto.runtime.v1 import api_pb2 as cri

GUARANTEED, BURSTABLE, BEST_EFFORT = -997, 900, 1000


def allowed(value: int) -> bool:
    """Say whether a process of ours may have this value here: not below its least, but for CAP_SYS_RESOURCE."""
    script = f"echo {value} 2>/dev/null > /proc/self/oom_score_adj"
    return subprocess.run(["sh", "-c", script], check=False, stderr=subprocess.DEVNULL).returncode == 0


def scores(pod: Pod) -> set[int]:
    request = cri.PodSandboxStatusRequest(pod_sandbox_id=pod.id, verbose=True)
    vm = json.loads(pod.daemon.runtime.PodSandboxStatus(request).info["vm"])
    pids = [each for pid in vm["pids"] for each in cgroup.family(pid)]
    return {int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in pids}


def container(pod: Pod, value: int) -> str:
    linux = cri.LinuxContainerConfig(resources=cri.LinuxContainerResources(oom_score_adj=value))
    linux.security_context.namespace_options.pid = cri.CONTAINER
    return pod.run("sleep", "1000", linux=linux)


@pytest.mark.skipif(not allowed(BURSTABLE), reason="this machine lets no process have less than 1000")
def test_a_vm_goes_with_its_most_protected_container(daemon: Daemon, tmp_path: Path) -> None:
    pod = run_pod(daemon, tmp_path, "oom-score")
    (ordinary,) = scores(pod)
    first = container(pod, BEST_EFFORT)
    assert scores(pod) == {BEST_EFFORT}
    second = container(pod, BURSTABLE)
    assert scores(pod) == {BURSTABLE}
    third = container(pod, GUARANTEED)
    assert scores(pod) == {GUARANTEED if allowed(GUARANTEED) else ordinary}
    # Inside it is each container's own.
    seen = [pod.execute(each, "cat", "/proc/1/oom_score_adj").stdout.strip() for each in (first, second, third)]
    assert seen == [str(value).encode() for value in (BEST_EFFORT, BURSTABLE, GUARANTEED)]
    pod.remove(third)
    until(lambda: scores(pod) == {BURSTABLE}, "a removed container protects nothing")
    daemon.runtime.StopContainer(cri.StopContainerRequest(container_id=second, timeout=0))
    until(lambda: scores(pod) == {BEST_EFFORT}, "nor does one that has ended")
