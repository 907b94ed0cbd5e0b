"""What containers and the pod use, read from cgroup v2, procfs and the scratch disk.

Sources: kernel Documentation/admin-guide/cgroup-v2.rst, accounting/psi.rst, proc(5). A file that is absent, because the
kernel lacks the controller, counts as zero; pressure is left out then. Everything read here is bounded: a container
chooses how many processes and descriptors it has.
"""

from __future__ import annotations

import contextlib
import os
import time

from vmrt.agent import agent_pb2 as pb
from vmrt.agent import cgroups, layout, namespaces, rootfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmrt.agent.containers import Container

# How old the size of a writable layer may be: finding it is a walk over the layer.
_WRITABLE_AGE_S = 10.0
_MAX_PROCESSES = 256
_MAX_DESCRIPTORS = 4096
_MAX_DEVICES = 64
_MAX_INTERFACES = 32


def container_stat(container: Container) -> pb.ContainerStat:
    """Read one container's figures."""
    stat = usage(container.cgroup)
    measured_at, octets, inodes = container.measured
    if time.monotonic() - measured_at > _WRITABLE_AGE_S:
        octets, inodes = rootfs.usage(f"{container.writable}/u")
        container.measured = (time.monotonic(), octets, inodes)
    stat.container_id = container.id
    stat.writable_used_bytes = octets
    stat.writable_inodes_used = inodes
    return stat


def sandbox_stat(containers: Iterable[Container]) -> pb.SandboxStat:
    """Read the pod's figures; descriptors are counted over its containers."""
    stat = pb.SandboxStat(usage=usage(cgroups.Cgroup(""), tasks=False), interfaces=interfaces(_read_interfaces()))
    for container in containers:
        processes = container.cgroup.processes()
        stat.usage.processes += len(processes)
    with contextlib.suppress(OSError):
        disk = os.statvfs(layout.SCRATCH)
        stat.scratch_bytes = disk.f_blocks * disk.f_frsize
        stat.scratch_free_bytes = disk.f_bavail * disk.f_frsize
        stat.scratch_inodes = disk.f_files
        stat.scratch_free_inodes = disk.f_favail
    return stat


def usage(cgroup: cgroups.Cgroup, *, tasks: bool = True) -> pb.ContainerStat:
    """Read a cgroup; the working set is what kubelet calls so: usage without inactive page cache.

    `tasks` False leaves out what has to be looked for process by process.
    """
    cpu = cgroup.keyed("cpu.stat")
    memory = cgroup.keyed("memory.stat")
    events = cgroup.keyed("memory.events")
    current = cgroup.number("memory.current")
    stat = pb.ContainerStat(
        cpu_usage_us=cpu.get("usage_usec", 0),
        cpu_user_us=cpu.get("user_usec", 0),
        cpu_system_us=cpu.get("system_usec", 0),
        cpu_periods=cpu.get("nr_periods", 0),
        cpu_throttled_periods=cpu.get("nr_throttled", 0),
        cpu_throttled_us=cpu.get("throttled_usec", 0),
        memory_current_bytes=current,
        memory_working_set_bytes=max(0, current - memory.get("inactive_file", 0)),
        memory_rss_bytes=memory.get("anon", 0),
        memory_peak_bytes=max(current, cgroup.number("memory.peak")),
        memory_cache_bytes=memory.get("file", 0),
        memory_kernel_bytes=memory.get("kernel", 0),
        memory_mapped_file_bytes=memory.get("file_mapped", 0),
        swap_bytes=cgroup.number("memory.swap.current"),
        memory_max_events=events.get("max", 0),
        oom_kills=events.get("oom_kill", 0),
        page_faults=memory.get("pgfault", 0),
        major_page_faults=memory.get("pgmajfault", 0),
        pids=cgroup.number("pids.current"),
        pids_max=cgroup.number("pids.max"),
        block=block(cgroup.text("io.stat")),
    )
    for name in ("cpu", "memory", "io"):
        stalls = pressure(cgroup.text(f"{name}.pressure"))
        if stalls is not None:
            getattr(stat, f"{name}_pressure").CopyFrom(stalls)
    if tasks:
        processes = cgroup.processes()
        stat.processes = len(processes)
        stat.file_descriptors, stat.sockets = descriptors(processes)
    return stat


def block(text: str) -> list[pb.BlockStat]:
    """Parse io.stat: "8:0 rbytes=1 wbytes=2 rios=3 wios=4 ..." a line; what is no such line is skipped."""
    devices = []
    for line in text.splitlines()[:_MAX_DEVICES]:
        device, _, rest = line.strip().partition(" ")
        with contextlib.suppress(ValueError):
            major, minor = (int(number) for number in device.split(":"))
            values = {key: int(value) for key, _, value in (pair.partition("=") for pair in rest.split())}
            devices.append(
                pb.BlockStat(
                    major=major,
                    minor=minor,
                    read_bytes=values.get("rbytes", 0),
                    written_bytes=values.get("wbytes", 0),
                    reads=values.get("rios", 0),
                    writes=values.get("wios", 0),
                )
            )
    return devices


def pressure(text: str) -> pb.Pressure | None:
    """Parse a pressure file: "some avg10=0.00 avg60=0.00 avg300=0.00 total=0" and "full ..."; None when it is empty."""
    stalls = pb.Pressure()
    for line in text.splitlines():
        kind, _, rest = line.strip().partition(" ")
        values = {key: value for key, _, value in (pair.partition("=") for pair in rest.split())}
        if kind in ("some", "full"):
            with contextlib.suppress(KeyError, ValueError):
                getattr(stalls, kind).CopyFrom(
                    pb.PressureLine(
                        total_us=int(values["total"]),
                        avg10=float(values["avg10"]),
                        avg60=float(values["avg60"]),
                        avg300=float(values["avg300"]),
                    )
                )
    return stalls if stalls.HasField("some") else None


def interfaces(text: str) -> list[pb.InterfaceStat]:
    """Parse /proc/net/dev: two lines of headings, then "name: 8 received, 8 transmitted"; the loopback is left out."""
    found = []
    for line in text.splitlines()[2 : 2 + _MAX_INTERFACES]:
        name, _, rest = line.partition(":")
        values = [int(value) for value in rest.split() if value.isdecimal()]
        if name.strip() == "lo" or len(values) < 12:
            continue
        found.append(
            pb.InterfaceStat(
                name=name.strip(),
                rx_bytes=values[0],
                rx_packets=values[1],
                rx_errors=values[2],
                rx_dropped=values[3],
                tx_bytes=values[8],
                tx_packets=values[9],
                tx_errors=values[10],
                tx_dropped=values[11],
            )
        )
    # The kernel's order behind the pod's own one is that of the plugging, which happens side by side.
    return [*found[:1], *sorted(found[1:], key=lambda interface: interface.name)]


def descriptors(processes: Iterable[int]) -> tuple[int, int]:
    """Return how many file descriptors, and sockets among them, processes have; one that has ended has none."""
    total = sockets = 0
    for pid in list(processes)[:_MAX_PROCESSES]:
        with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
            for entry in entries:
                if total >= _MAX_DESCRIPTORS:
                    return total, sockets
                total += 1
                with contextlib.suppress(OSError):
                    sockets += os.readlink(entry.path).startswith("socket:")  # noqa: PTH115 - as everywhere in the agent
    return total, sockets


def _read_interfaces() -> str:
    with namespaces.entered():
        return _read("/proc/thread-self/net/dev")


def _read(path: str) -> str:
    with contextlib.suppress(OSError), open(path, encoding="ascii", errors="replace") as file:  # noqa: PTH123
        return file.read(65536)
    return ""
