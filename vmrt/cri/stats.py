"""CRI's statistics, out: what the guests said becomes protobuf messages. Pure functions of what they are given.

Times in the messages are nanoseconds; those of the agent are microseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from vmrt.agent import agent_pb2 as pb
from vmrt.cri import statuses
from vmrt.cri.filters import has_labels
from vmrt.pods.records import ContainerRecord, SandboxRecord
from vmrt.pods.stats import Figures
from vmrt.proto.runtime.v1 import api_pb2 as cri


def container_stats(record: ContainerRecord, figures: Figures | None, layers: Path) -> cri.ContainerStats:
    """Return a container's statistics; its attributes alone when nothing has been heard of it."""
    stats = cri.ContainerStats(
        attributes=cri.ContainerAttributes(
            id=record.id,
            metadata=cri.ContainerMetadata(name=record.spec.name, attempt=record.spec.attempt),
            labels=record.spec.labels,
            annotations=record.spec.annotations,
        )
    )
    stat = figures.containers.get(record.id) if figures is not None else None
    if figures is None or stat is None:
        return stats
    at = figures.taken_ns
    stats.cpu.CopyFrom(_cpu(stat, at))
    stats.memory.CopyFrom(_memory(stat, at, record.spec.resources.memory_limit_bytes))
    stats.writable_layer.CopyFrom(
        cri.FilesystemUsage(
            timestamp=at,
            fs_id=cri.FilesystemIdentifier(mountpoint=str(layers)),
            used_bytes=_value(stat.writable_used_bytes),
            inodes_used=_value(stat.writable_inodes_used),
        )
    )
    stats.swap.CopyFrom(cri.SwapUsage(timestamp=at, swap_usage_bytes=_value(stat.swap_bytes)))
    stats.io.CopyFrom(_io(stat, at))
    return stats


def sandbox_stats(
    record: SandboxRecord, containers: Iterable[ContainerRecord], figures: Figures | None, layers: Path
) -> cri.PodSandboxStats:
    """Return a pod's statistics; its attributes alone when nothing has been heard of it."""
    stats = cri.PodSandboxStats(
        attributes=cri.PodSandboxAttributes(
            id=record.id,
            metadata=statuses.sandbox_metadata(record),
            labels=record.spec.labels,
            annotations=record.spec.annotations,
        )
    )
    if figures is None:
        return stats
    usage, at = figures.sandbox.usage, figures.taken_ns
    interfaces = [_interface(interface) for interface in figures.sandbox.interfaces]
    stats.linux.CopyFrom(
        cri.LinuxPodSandboxStats(
            cpu=_cpu(usage, at),
            memory=_memory(usage, at, record.spec.resources.memory_limit_bytes if record.spec.resources else 0),
            network=cri.NetworkUsage(
                timestamp=at, default_interface=interfaces[0] if interfaces else None, interfaces=interfaces
            ),
            process=cri.ProcessUsage(timestamp=at, process_count=_value(usage.processes)),
            containers=[container_stats(container, figures, layers) for container in containers],
            io=_io(usage, at),
        )
    )
    return stats


def select_containers(records: Sequence[ContainerRecord], wanted: cri.ContainerStatsFilter) -> list[ContainerRecord]:
    """Return the containers that a statistics filter names."""
    return [
        record
        for record in records
        if record.id.startswith(wanted.id)
        and record.sandbox_id.startswith(wanted.pod_sandbox_id)
        and has_labels(record.spec.labels, wanted.label_selector)
    ]


def select_sandboxes(records: Sequence[SandboxRecord], wanted: cri.PodSandboxStatsFilter) -> list[SandboxRecord]:
    """Return the sandboxes that a statistics filter names."""
    return [
        record
        for record in records
        if record.id.startswith(wanted.id) and has_labels(record.spec.labels, wanted.label_selector)
    ]


def _value(number: int) -> cri.UInt64Value:
    return cri.UInt64Value(value=number)


def _cpu(stat: pb.ContainerStat, at: int) -> cri.CpuUsage:
    return cri.CpuUsage(
        timestamp=at,
        usage_core_nano_seconds=_value(_nanoseconds(stat.cpu_usage_us)),
        psi=_psi(stat.cpu_pressure) if stat.HasField("cpu_pressure") else None,
    )


def _memory(stat: pb.ContainerStat, at: int, limit: int) -> cri.MemoryUsage:
    return cri.MemoryUsage(
        timestamp=at,
        working_set_bytes=_value(stat.memory_working_set_bytes),
        available_bytes=_value(max(0, limit - stat.memory_working_set_bytes)) if limit else None,
        usage_bytes=_value(stat.memory_current_bytes),
        rss_bytes=_value(stat.memory_rss_bytes),
        page_faults=_value(stat.page_faults),
        major_page_faults=_value(stat.major_page_faults),
        psi=_psi(stat.memory_pressure) if stat.HasField("memory_pressure") else None,
    )


def _io(stat: pb.ContainerStat, at: int) -> cri.IoUsage:
    return cri.IoUsage(timestamp=at, psi=_psi(stat.io_pressure) if stat.HasField("io_pressure") else None)


def _psi(pressure: pb.Pressure) -> cri.PsiStats:
    return cri.PsiStats(Some=_psi_line(pressure.some), Full=_psi_line(pressure.full))


def _psi_line(line: pb.PressureLine) -> cri.PsiData:
    return cri.PsiData(Total=_nanoseconds(line.total_us), Avg10=line.avg10, Avg60=line.avg60, Avg300=line.avg300)


def _nanoseconds(microseconds: int) -> int:
    # The guest chooses the number; the field has 64 bits.
    return min(microseconds * 1000, 2**64 - 1)


def _interface(stat: pb.InterfaceStat) -> cri.NetworkInterfaceUsage:
    return cri.NetworkInterfaceUsage(
        name="".join(char for char in stat.name[:15] if char.isprintable()),  # IFNAMSIZ
        rx_bytes=_value(stat.rx_bytes),
        rx_errors=_value(stat.rx_errors),
        tx_bytes=_value(stat.tx_bytes),
        tx_errors=_value(stat.tx_errors),
    )
