"""Huge pages and limits beyond the VM that a pod was given: it is enlarged before its container needs them."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.daemon import Daemon
from tests.e2e.conftest import Pod, run_pod, until
from vmrt.proto.runtime.v1 import api_pb2 as cri

MIB = 1024**2


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Path]:
    """An emptyDir with medium HugePages as kubelet makes it: a hugetlbfs, on a host that needs no pages of its own."""
    path = tmp_path / "pods" / "uid" / "volumes" / "kubernetes.io~empty-dir" / "huge"
    path.mkdir(parents=True)
    subprocess.run(["mount", "-t", "hugetlbfs", "-o", "pagesize=2Mi,mode=1770,gid=77", "nodev", str(path)], check=True)
    yield path
    subprocess.run(["umount", str(path)], check=True)


def linux(**resources: object) -> cri.LinuxContainerConfig:
    config = cri.LinuxContainerConfig(resources=cri.LinuxContainerResources(**resources))  # type: ignore[arg-type]
    config.security_context.namespace_options.pid = cri.CONTAINER
    return config


def sh(pod: Pod, container: str, script: str) -> str:
    answer = pod.execute(container, "sh", "-c", script)
    assert answer.exit_code == 0, answer
    return answer.stdout.decode().strip()


def meminfo(pod: Pod, container: str) -> dict[str, int]:
    """Return the guest's memory in MiB, and its numbers of huge pages."""
    lines = sh(pod, container, "cat /proc/meminfo").splitlines()
    values = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return {"memory": values["MemTotal"] // 1024, "pages": values["HugePages_Total"], "free": values["HugePages_Free"]}


def test_a_vm_is_enlarged_for_huge_pages(daemon: Daemon, tmp_path: Path, volume: Path) -> None:
    pod = run_pod(daemon, tmp_path, "huge")
    small = pod.run("sleep", "1000", linux=linux())
    before = meminfo(pod, small)
    assert before["pages"] == 0
    # More than the whole VM had.
    pages = [cri.HugepageLimit(page_size="2MB", limit=600 * MIB), cri.HugepageLimit(page_size="1GB", limit=0)]
    mounts = [cri.Mount(host_path=str(volume), container_path="/huge")]
    large = pod.run("sleep", "1000", linux=linux(hugepage_limits=pages), mounts=mounts)
    now = meminfo(pod, large)
    assert (now["pages"], now["free"]) == (300, 300)
    assert now["memory"] - before["memory"] >= 550
    assert sh(pod, large, "grep ' /huge ' /proc/mounts | cut -d' ' -f3,4").startswith("hugetlbfs rw")
    assert "pagesize=2M" in sh(pod, large, "grep ' /huge ' /proc/mounts")
    # Of this machine other daemons' libvirt may have changed it.
    assert sh(pod, large, "stat -c '%a %g' /huge") == f"{stat.S_IMODE(volume.stat().st_mode):o} 77"
    sh(pod, large, "fallocate -l 64M /huge/file")
    assert meminfo(pod, large)["free"] == 300 - 32
    assert not (volume / "file").exists()  # nothing of it is the host's
    sh(pod, large, "rm /huge/file")
    pod.remove(large)
    until(lambda: meminfo(pod, small)["pages"] == 0, "the pages are given back")
    # As much as the guest lets go of, in its own time.
    until(lambda: meminfo(pod, small)["memory"] < now["memory"] - 100, "memory is given back")
    # The pod told no sums: what its containers are limited to stands in.
    cpus = min(2, os.cpu_count() or 1)
    limited = pod.run(
        "sleep", "1000", linux=linux(memory_limit_in_bytes=900 * MIB, cpu_quota=cpus * 100_000, cpu_period=100_000)
    )
    assert meminfo(pod, limited)["memory"] >= 850
    assert sh(pod, limited, "grep -c ^processor /proc/cpuinfo") == str(cpus)
    daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod.id))
