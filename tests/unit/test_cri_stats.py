"""Statistics and metrics as clients see them: names, labels, units, and what a guest may say."""

from __future__ import annotations

from pathlib import Path

from vmrt.agent import agent_pb2 as pb
from vmrt.cri import metrics, stats
from vmrt.model import ContainerSpec, LinuxResources, SandboxSpec
from vmrt.pods.records import ContainerRecord, ContainerState, SandboxRecord, SandboxState
from vmrt.pods.stats import Figures
from vmrt.proto.runtime.v1 import api_pb2 as cri

SANDBOX = SandboxRecord("s1", SandboxSpec(name="web", uid="u", namespace="shop"), SandboxState.READY, 1, "vm", "tap")
CONTAINER = ContainerRecord(
    id="c1",
    sandbox_id="s1",
    spec=ContainerSpec(
        name="main", image="x", labels={"a": "b"}, resources=LinuxResources(memory_limit_bytes=1000, cpu_quota_us=5)
    ),
    state=ContainerState.RUNNING,
    created_ns=2,
    image_id="i",
    image_ref="i",
    started_ns=3 * 10**9,
)
PRESSURE = pb.Pressure(some=pb.PressureLine(total_us=5_000_000, avg10=1.5), full=pb.PressureLine(total_us=2_000_000))
STAT = pb.ContainerStat(
    container_id="c1",
    cpu_usage_us=7_000_000,
    memory_working_set_bytes=300,
    writable_used_bytes=40,
    block=[pb.BlockStat(major=8, minor=0, reads=3)],
    cpu_pressure=PRESSURE,
    memory_pressure=PRESSURE,
    io_pressure=PRESSURE,
)
FIGURES = Figures(
    9 * 10**9,
    pb.SandboxStat(usage=pb.ContainerStat(processes=4), interfaces=[pb.InterfaceStat(name="eth0", rx_bytes=11)]),
    {"c1": STAT},
)


def test_a_containers_statistics() -> None:
    found = stats.container_stats(CONTAINER, FIGURES, Path("/x"))
    assert (found.attributes.id, found.attributes.metadata.name) == ("c1", "main")
    assert (found.cpu.timestamp, found.cpu.usage_core_nano_seconds.value) == (9 * 10**9, 7 * 10**9)
    assert (found.memory.working_set_bytes.value, found.memory.available_bytes.value) == (300, 700)
    assert (found.writable_layer.fs_id.mountpoint, found.writable_layer.used_bytes.value) == ("/x", 40)
    assert (found.cpu.psi.Some.Total, found.cpu.psi.Some.Avg10) == (5 * 10**9, 1.5)


def test_one_that_was_never_heard_of_has_attributes_only() -> None:
    found = stats.container_stats(CONTAINER, None, Path("/x"))
    assert found.attributes.id == "c1"
    assert not found.HasField("cpu")
    assert not found.HasField("memory")


def test_a_guest_that_boasts_breaks_nothing() -> None:
    figures = Figures(1, pb.SandboxStat(), {"c1": pb.ContainerStat(cpu_usage_us=2**64 - 1)})
    found = stats.container_stats(CONTAINER, figures, Path("/x"))
    assert found.cpu.usage_core_nano_seconds.value == 2**64 - 1


def test_a_pods_statistics() -> None:
    found = stats.sandbox_stats(SANDBOX, [CONTAINER], FIGURES, Path("/x")).linux
    assert (found.network.default_interface.name, found.network.default_interface.rx_bytes.value) == ("eth0", 11)
    assert found.process.process_count.value == 4
    assert [c.attributes.id for c in found.containers] == ["c1"]


def test_filters_must_all_hold() -> None:
    def chosen(**wanted: object) -> int:
        return len(stats.select_containers([CONTAINER], cri.ContainerStatsFilter(**wanted)))  # type: ignore[arg-type]

    assert [chosen(), chosen(id="c1", label_selector={"a": "b"}), chosen(pod_sandbox_id="s1")] == [1, 1, 1]
    assert [chosen(id="c1", label_selector={"a": "c"}), chosen(id="c1", pod_sandbox_id="s2")] == [0, 0]


def test_every_described_metric_has_a_value_with_its_labels_and_none_is_not_described() -> None:
    described = {d.name: d for d in metrics.descriptors()}
    assert len(described) == len(metrics.descriptors()) >= 45
    assert all(d.help for d in described.values())
    pod = metrics.pod_metrics(SANDBOX, [CONTAINER], FIGURES)
    found = [*pod.metrics, *pod.container_metrics[0].metrics]
    assert {metric.name for metric in found} == described.keys()
    for metric in found:
        assert len(metric.label_values) == len(described[metric.name].label_keys), metric.name
    values = {metric.name: metric.value.value for metric in found}
    assert values["container_cpu_usage_seconds_total"] == 7
    assert values["container_start_time_seconds"] == 3
    assert values["container_pressure_io_stalled_seconds_total"] == 2
    assert values["container_fs_reads_total"] == 3
    assert values["container_network_receive_bytes_total"] == 11


def test_without_pressure_there_is_no_value_of_it() -> None:
    figures = Figures(1, pb.SandboxStat(), {"c1": pb.ContainerStat(container_id="c1")})
    names = {m.name for m in metrics.pod_metrics(SANDBOX, [CONTAINER], figures).container_metrics[0].metrics}
    assert not any("pressure" in name for name in names)
