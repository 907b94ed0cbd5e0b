"""The metrics that replace cAdvisor's: one table of descriptors, each with how its values are read.

Names and meanings are cAdvisor's (google/cadvisor, docs/storage/prometheus.md), so that dashboards go on to work. The
interface's values are integers: seconds are whole seconds, rounded down. A limit that is not set is 0, as in cAdvisor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from vmrt.agent import agent_pb2 as pb
from vmrt.pods.records import ContainerRecord, SandboxRecord
from vmrt.pods.stats import Figures
from vmrt.proto.runtime.v1 import api_pb2 as cri

BASE_LABELS = ("id", "name", "image", "container", "pod", "namespace")
# OCI's default period (config-linux.md): what the kernel uses when none is set.
_DEFAULT_PERIOD_US = 100_000
_SECOND_US = 1_000_000


@dataclass(frozen=True, slots=True)
class Subject:
    """One container and what was heard of it."""

    record: ContainerRecord
    stat: pb.ContainerStat
    figures: Figures


Values = list[tuple[tuple[str, ...], int]]
"""Values with the labels that come after the base ones."""


@dataclass(frozen=True, slots=True)
class Descriptor:
    """One metric of a container; `labels` are those after the base ones."""

    name: str
    help: str
    type: cri.MetricType.ValueType
    read: Callable[[Subject], Values]
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PodDescriptor:
    """One metric of a pod's interface."""

    name: str
    help: str
    read: Callable[[pb.InterfaceStat], int]


def _one(read: Callable[[pb.ContainerStat], int]) -> Callable[[Subject], Values]:
    return lambda subject: [((), read(subject.stat))]


def _limit(read: Callable[[ContainerRecord], int]) -> Callable[[Subject], Values]:
    return lambda subject: [((), max(0, read(subject.record)))]


def _counter(name: str, text: str, read: Callable[[pb.ContainerStat], int]) -> Descriptor:
    return Descriptor(name, text, cri.COUNTER, _one(read))


def _gauge(name: str, text: str, read: Callable[[pb.ContainerStat], int]) -> Descriptor:
    return Descriptor(name, text, cri.GAUGE, _one(read))


def _pressure(resource: str, kind: str, line: str, text: str) -> Descriptor:
    def read(subject: Subject) -> Values:
        if not subject.stat.HasField(f"{resource}_pressure"):  # type: ignore[arg-type]  # one of three literals
            return []
        return [((), getattr(getattr(subject.stat, f"{resource}_pressure"), line).total_us // _SECOND_US)]

    return Descriptor(f"container_pressure_{resource}_{kind}_seconds_total", text, cri.COUNTER, read)


def _device(block: pb.BlockStat) -> str:
    return f"{block.major}:{block.minor}"


def _disk(name: str, text: str, read: Callable[[pb.BlockStat], int]) -> Descriptor:
    def values(subject: Subject) -> Values:
        return [((_device(block),), read(block)) for block in subject.stat.block]

    return Descriptor(name, text, cri.COUNTER, values, ("device",))


def _scratch(name: str, text: str, read: Callable[[Subject], int]) -> Descriptor:
    return Descriptor(name, text, cri.GAUGE, lambda subject: [(("scratch",), read(subject))], ("device",))


def _block_usage(subject: Subject) -> Values:
    return [
        ((_device(block), str(block.major), str(block.minor), operation), count)
        for block in subject.stat.block
        for operation, count in (("Read", block.read_bytes), ("Write", block.written_bytes))
    ]


def _failures(subject: Subject) -> Values:
    stat = subject.stat
    return [
        (("pgfault", "container"), stat.page_faults),
        (("pgmajfault", "container"), stat.major_page_faults),
    ]


DESCRIPTORS: tuple[Descriptor, ...] = (
    Descriptor(
        "container_blkio_device_usage_total",
        "Octets read from and written to a block device",
        cri.COUNTER,
        _block_usage,
        ("device", "major", "minor", "operation"),
    ),
    _counter("container_cpu_cfs_periods_total", "Elapsed enforcement periods", lambda s: s.cpu_periods),
    _counter("container_cpu_cfs_throttled_periods_total", "Throttled periods", lambda s: s.cpu_throttled_periods),
    _counter("container_cpu_cfs_throttled_seconds_total", "Time throttled", lambda s: s.cpu_throttled_us // _SECOND_US),
    _counter("container_cpu_system_seconds_total", "CPU time in the kernel", lambda s: s.cpu_system_us // _SECOND_US),
    Descriptor(
        "container_cpu_usage_seconds_total",
        "CPU time, summed over CPUs",
        cri.COUNTER,
        lambda subject: [(("total",), subject.stat.cpu_usage_us // _SECOND_US)],
        ("cpu",),
    ),
    _counter("container_cpu_user_seconds_total", "CPU time in user mode", lambda s: s.cpu_user_us // _SECOND_US),
    _gauge("container_file_descriptors", "Open file descriptors", lambda s: s.file_descriptors),
    _scratch("container_fs_inodes_free", "Free inodes", lambda s: s.figures.sandbox.scratch_free_inodes),
    _scratch("container_fs_inodes_total", "Inodes", lambda s: s.figures.sandbox.scratch_inodes),
    _scratch("container_fs_limit_bytes", "Size of the file system", lambda s: s.figures.sandbox.scratch_bytes),
    _disk("container_fs_reads_bytes_total", "Octets read", lambda b: b.read_bytes),
    _disk("container_fs_reads_total", "Reads completed", lambda b: b.reads),
    _scratch("container_fs_usage_bytes", "Size of the writable layer", lambda s: s.stat.writable_used_bytes),
    _disk("container_fs_writes_bytes_total", "Octets written", lambda b: b.written_bytes),
    _disk("container_fs_writes_total", "Writes completed", lambda b: b.writes),
    Descriptor(
        "container_last_seen",
        "When the guest was last heard, in seconds since the epoch",
        cri.GAUGE,
        lambda subject: [((), subject.figures.taken_ns // 10**9)],
    ),
    _gauge("container_memory_cache", "Page cache", lambda s: s.memory_cache_bytes),
    _counter("container_memory_failcnt", "How often usage met the limit", lambda s: s.memory_max_events),
    Descriptor("container_memory_failures_total", "Page faults", cri.COUNTER, _failures, ("failure_type", "scope")),
    _gauge("container_memory_kernel_usage", "Kernel memory", lambda s: s.memory_kernel_bytes),
    _gauge("container_memory_mapped_file", "Memory-mapped files", lambda s: s.memory_mapped_file_bytes),
    _gauge("container_memory_max_usage_bytes", "Highest usage so far", lambda s: s.memory_peak_bytes),
    _gauge("container_memory_rss", "Anonymous memory", lambda s: s.memory_rss_bytes),
    _gauge("container_memory_swap", "Swap", lambda s: s.swap_bytes),
    _gauge("container_memory_usage_bytes", "Memory with all caches", lambda s: s.memory_current_bytes),
    _gauge("container_memory_working_set_bytes", "Memory without inactive cache", lambda s: s.memory_working_set_bytes),
    _counter("container_oom_events_total", "Processes killed for memory", lambda s: s.oom_kills),
    _pressure("cpu", "stalled", "full", "Time in which all tasks waited for a CPU"),
    _pressure("cpu", "waiting", "some", "Time in which a task waited for a CPU"),
    _pressure("io", "stalled", "full", "Time in which all tasks waited for I/O"),
    _pressure("io", "waiting", "some", "Time in which a task waited for I/O"),
    _pressure("memory", "stalled", "full", "Time in which all tasks waited for memory"),
    _pressure("memory", "waiting", "some", "Time in which a task waited for memory"),
    _gauge("container_processes", "Processes", lambda s: s.processes),
    _gauge("container_sockets", "Open sockets", lambda s: s.sockets),
    Descriptor(
        "container_spec_cpu_period",
        "CPU period in microseconds",
        cri.GAUGE,
        _limit(lambda record: record.spec.resources.cpu_period_us or _DEFAULT_PERIOD_US),
    ),
    Descriptor(
        "container_spec_cpu_quota",
        "CPU quota in microseconds a period",
        cri.GAUGE,
        lambda subject: (
            [((), subject.record.spec.resources.cpu_quota_us)] if subject.record.spec.resources.cpu_quota_us > 0 else []
        ),
    ),
    Descriptor(
        "container_spec_cpu_shares", "CPU shares", cri.GAUGE, _limit(lambda record: record.spec.resources.cpu_shares)
    ),
    Descriptor(
        "container_spec_memory_limit_bytes",
        "Memory limit",
        cri.GAUGE,
        _limit(lambda record: record.spec.resources.memory_limit_bytes),
    ),
    Descriptor(
        "container_spec_memory_swap_limit_bytes",
        "Limit of memory and swap together",
        cri.GAUGE,
        _limit(lambda record: record.spec.resources.memory_swap_limit_bytes),
    ),
    Descriptor(
        "container_start_time_seconds",
        "When the container was started, in seconds since the epoch",
        cri.GAUGE,
        _limit(lambda record: record.started_ns // 10**9),
    ),
    _gauge("container_threads", "Tasks: processes and their threads", lambda s: s.pids),
    _gauge("container_threads_max", "Limit of tasks", lambda s: s.pids_max),
)

POD_DESCRIPTORS: tuple[PodDescriptor, ...] = (
    PodDescriptor("container_network_receive_bytes_total", "Octets received", lambda i: i.rx_bytes),
    PodDescriptor("container_network_receive_errors_total", "Errors on receiving", lambda i: i.rx_errors),
    PodDescriptor("container_network_receive_packets_dropped_total", "Dropped on receiving", lambda i: i.rx_dropped),
    PodDescriptor("container_network_receive_packets_total", "Packets received", lambda i: i.rx_packets),
    PodDescriptor("container_network_transmit_bytes_total", "Octets sent", lambda i: i.tx_bytes),
    PodDescriptor("container_network_transmit_errors_total", "Errors on sending", lambda i: i.tx_errors),
    PodDescriptor("container_network_transmit_packets_dropped_total", "Dropped on sending", lambda i: i.tx_dropped),
    PodDescriptor("container_network_transmit_packets_total", "Packets sent", lambda i: i.tx_packets),
)


def descriptors() -> list[cri.MetricDescriptor]:
    """Return what ListMetricDescriptors says."""
    return [
        *(cri.MetricDescriptor(name=d.name, help=d.help, label_keys=[*BASE_LABELS, *d.labels]) for d in DESCRIPTORS),
        *(
            cri.MetricDescriptor(name=d.name, help=d.help, label_keys=[*BASE_LABELS, "interface"])
            for d in POD_DESCRIPTORS
        ),
    ]


def pod_metrics(
    record: SandboxRecord, containers: Iterable[ContainerRecord], figures: Figures
) -> cri.PodSandboxMetrics:
    """Return one pod's values: the network's for the pod, all others by container."""
    pod, namespace = record.spec.name, record.spec.namespace
    base = (record.id, "", "", "", pod, namespace)
    return cri.PodSandboxMetrics(
        pod_sandbox_id=record.id,
        metrics=[
            _metric(d.name, cri.COUNTER, figures.taken_ns, (*base, interface.name[:15]), d.read(interface))
            for interface in figures.sandbox.interfaces
            for d in POD_DESCRIPTORS
        ],
        container_metrics=[
            _container_metrics(Subject(container, stat, figures), pod, namespace)
            for container in containers
            if (stat := figures.containers.get(container.id)) is not None
        ],
    )


def _container_metrics(subject: Subject, pod: str, namespace: str) -> cri.ContainerMetrics:
    spec = subject.record.spec
    base = (subject.record.id, spec.name, spec.user_specified_image or spec.image, spec.name, pod, namespace)
    return cri.ContainerMetrics(
        container_id=subject.record.id,
        metrics=[
            _metric(d.name, d.type, subject.figures.taken_ns, (*base, *labels), value)
            for d in DESCRIPTORS
            for labels, value in d.read(subject)
        ],
    )


def _metric(name: str, kind: cri.MetricType.ValueType, at: int, labels: tuple[str, ...], value: int) -> cri.Metric:
    return cri.Metric(
        name=name, timestamp=at, metric_type=kind, label_values=labels, value=cri.UInt64Value(value=value)
    )
