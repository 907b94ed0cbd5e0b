"""Figures, events and changes of limits, with a real VM."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from demo.daemon import Daemon
from tests.e2e.conftest import Pod, run_pod
from tests.e2e.failures import vm_pids
from vmrt.proto.runtime.v1 import api_pb2 as cri

MIB = 1024**2


def test_stats_right_after_the_start_and_after_the_end(pod: Pod) -> None:
    runtime = pod.daemon.runtime
    container = pod.run("sh", "-c", "dd if=/dev/zero of=/tmp/big bs=1M count=4 2>/dev/null; sleep 1000")
    request = cri.ContainerStatsRequest(container_id=container)
    while not (first := runtime.ContainerStats(request).stats).cpu.timestamp:
        time.sleep(0.1)  # the guest did not answer in time
    assert first.memory.timestamp > 0
    assert first.memory.working_set_bytes.value > 0
    pod.execute(container, "sh", "-c", "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done")
    while (later := runtime.ContainerStats(request).stats).cpu.timestamp == first.cpu.timestamp:
        time.sleep(0.1)
    assert later.cpu.usage_core_nano_seconds.value > first.cpu.usage_core_nano_seconds.value
    listed = runtime.ListContainerStats(
        cri.ListContainerStatsRequest(filter=cri.ContainerStatsFilter(pod_sandbox_id=pod.id, id=container))
    ).stats
    assert [stats.attributes.id for stats in listed] == [container]
    streamed = [
        stats.attributes.id
        for message in runtime.StreamContainerStats(cri.StreamContainerStatsRequest())
        for stats in message.container_stats
    ]
    assert container in streamed
    runtime.StopContainer(cri.StopContainerRequest(container_id=container, timeout=0))
    kept = runtime.ContainerStats(request).stats
    assert kept.cpu.usage_core_nano_seconds.value >= later.cpu.usage_core_nano_seconds.value
    pod.remove(container)
    with pytest.raises(grpc.RpcError) as caught:
        runtime.ContainerStats(request)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_pods_stats_and_metrics_are_the_guests(pod: Pod) -> None:
    runtime = pod.daemon.runtime
    container = pod.run("sleep", "1000")
    stats = runtime.PodSandboxStats(cri.PodSandboxStatsRequest(pod_sandbox_id=pod.id)).stats.linux
    assert stats.process.process_count.value >= 1
    assert stats.network.default_interface.name == "eth0"
    assert container in [c.attributes.id for c in stats.containers]
    described = {d.name for d in runtime.ListMetricDescriptors(cri.ListMetricDescriptorsRequest()).descriptors}
    assert len(described) >= 45
    pods = runtime.ListPodSandboxMetrics(cri.ListPodSandboxMetricsRequest()).pod_metrics
    (ours,) = [metrics for metrics in pods if metrics.pod_sandbox_id == pod.id]
    named = {m.name for m in ours.metrics} | {m.name for c in ours.container_metrics for m in c.metrics}
    assert len(named) >= 40
    assert named <= described
    pod.remove(container)


def test_limits_change_in_the_guest_and_a_refused_change_changes_nothing(pod: Pod) -> None:
    runtime = pod.daemon.runtime
    linux = cri.LinuxContainerConfig(resources=cri.LinuxContainerResources(memory_limit_in_bytes=64 * MIB))
    linux.security_context.namespace_options.pid = cri.CONTAINER
    container = pod.run("sleep", "1000", linux=linux)

    def limit() -> bytes:
        return bytes(pod.execute(container, "cat", "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/cpu.max").stdout)

    def update(**values: int) -> None:
        runtime.UpdateContainerResources(
            cri.UpdateContainerResourcesRequest(
                container_id=container,
                linux=cri.LinuxContainerResources(**values),  # type: ignore[arg-type]
            )
        )

    assert limit().split()[0] == str(64 * MIB).encode()
    update(memory_limit_in_bytes=96 * MIB, cpu_quota=40_000, cpu_period=100_000)
    changed = f"{96 * MIB}\n40000 100000\n".encode()
    assert limit() == changed
    resources = pod.status(container).resources.linux
    assert (resources.memory_limit_in_bytes, resources.cpu_quota) == (96 * MIB, 40_000)
    for values in ({"memory_limit_in_bytes": 1 << 40}, {"memory_limit_in_bytes": 4096}, {"cpu_quota": 10**9}):
        with pytest.raises(grpc.RpcError, match=next(iter(values))):
            update(**values)
    assert limit() == changed
    assert pod.status(container).resources.linux == resources
    pod.remove(container)


def test_a_pods_vm_grows_and_gives_back(pod: Pod) -> None:
    def resize(memory: int, cpus: int = 0) -> None:
        resources = cri.LinuxContainerResources(
            memory_limit_in_bytes=memory, cpu_quota=cpus * 100_000, cpu_period=100_000 if cpus else 0
        )
        pod.daemon.runtime.UpdatePodSandboxResources(
            cri.UpdatePodSandboxResourcesRequest(pod_sandbox_id=pod.id, resources=resources)
        )

    def has() -> tuple[int, int]:
        text = pod.execute(container, "cat", "/proc/meminfo", "/sys/devices/system/cpu/online").stdout.decode()
        last = text.split()[-1]
        return int(text.split()[1]) * 1024, len(last.split("-")) if last != "0" else 1

    container = pod.run("sleep", "1000")
    memory, cpus = has()
    assert cpus == 1
    for wanted in ((1 << 40, 1), (32 * MIB, 10_000)):
        with pytest.raises(grpc.RpcError, match=r"memory_limit_in_bytes|cpu_quota") as caught:
            resize(*wanted)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert has() == (memory, 1)
    more = min(2, os.cpu_count() or 1)
    resize(1024 * MIB, more)
    grown, cpus = has()
    assert grown > memory + 400 * MIB
    assert cpus == more
    # What the pod's containers may have is what its VM has.
    pod.daemon.runtime.UpdateContainerResources(
        cri.UpdateContainerResourcesRequest(
            container_id=container, linux=cri.LinuxContainerResources(memory_limit_in_bytes=1024 * MIB)
        )
    )
    resize(32 * MIB, 1)
    assert has()[1] == 1
    while has()[0] >= grown:
        time.sleep(0.1)
    pod.remove(container)


def test_memory_that_a_guest_frees_returns_to_the_host(pod: Pod) -> None:
    container = pod.run("sleep", "1000")
    qemu = vm_pids(pod.daemon, pod.id)["qemu-system-x86_64"]

    def resident() -> int:
        status = Path(f"/proc/{qemu}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) * 1024

    pod.execute(container, "dd", "if=/dev/zero", "of=/dev/shm/filler", "bs=1M", "count=60", timeout=120)
    full = resident()
    pod.execute(container, "rm", "/dev/shm/filler")
    deadline = time.monotonic() + 120
    while resident() > full - 40 * MIB:
        assert time.monotonic() < deadline, (full, resident())
        time.sleep(0.1)
    pod.remove(container)


def test_two_subscribers_hear_a_pods_whole_life_in_order(daemon: Daemon, tmp_path: Path) -> None:
    streams = [daemon.runtime.GetContainerEvents(cri.GetEventsRequest()) for _ in range(2)]
    heard: list[list[tuple[str, int, int]]] = [[], []]

    def listen(stream: Iterator[cri.ContainerEventResponse], into: list[tuple[str, int, int]]) -> None:
        try:
            for event in stream:
                into.append((event.container_id, event.container_event_type, len(event.containers_statuses)))
        except grpc.RpcError:
            pass  # cancelled below

    threads = [threading.Thread(target=listen, args=pair) for pair in zip(streams, heard, strict=True)]
    for thread in threads:
        thread.start()
    pod = run_pod(daemon, tmp_path, "events")
    container = pod.run("true")
    pod.wait(container)
    pod.remove(container)
    daemon.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod.id))
    daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod.id))
    created, started, stopped, deleted = range(4)
    expected = [
        (pod.id, created, 0),
        (pod.id, started, 0),
        (container, created, 1),
        (container, started, 1),
        (container, stopped, 1),
        (container, deleted, 0),
        (pod.id, stopped, 0),
        (pod.id, deleted, 0),
    ]
    deadline = time.monotonic() + 30
    while any(len(events) < len(expected) for events in heard) and time.monotonic() < deadline:
        time.sleep(0.02)
    for stream in streams:
        stream.cancel()
    for thread in threads:
        thread.join()
    for events in heard:
        assert [event for event in events if event[0] in (pod.id, container)] == expected
