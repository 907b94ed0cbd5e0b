"""The figures that the agent reads: cgroup, pressure and network files, whole, absent and damaged."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmrt.agent import cgroups, stats

FILES = {
    "cpu.stat": "usage_usec 700\nuser_usec 500\nsystem_usec 200\nnr_periods 9\nnr_throttled 3\nthrottled_usec 40\n",
    "memory.current": "1000\n",
    "memory.peak": "1500\n",
    "memory.stat": "anon 400\nfile 600\nkernel 50\nfile_mapped 70\ninactive_file 250\npgfault 11\npgmajfault 2\n",
    "memory.events": "low 0\nhigh 0\nmax 5\noom 1\noom_kill 1\n",
    "memory.swap.current": "0\n",
    "pids.current": "4\n",
    "pids.max": "max\n",
    "io.stat": "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n",
    "cgroup.procs": "",
    "memory.pressure": "some avg10=1.50 avg60=0.00 avg300=0.25 total=99\n"
    "full avg10=0.00 avg60=0.00 avg300=0.00 total=7\n",
}


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cgroups, "ROOT", str(tmp_path))
    directory = tmp_path / "vmrt" / "c1"
    directory.mkdir(parents=True)
    for name, text in FILES.items():
        (directory / name).write_text(text)
    return directory


def test_a_cgroup_is_read_whole(cgroup: Path) -> None:
    stat = stats.usage(cgroups.Cgroup("c1"))
    assert (stat.cpu_usage_us, stat.cpu_user_us, stat.cpu_system_us) == (700, 500, 200)
    assert (stat.cpu_periods, stat.cpu_throttled_periods, stat.cpu_throttled_us) == (9, 3, 40)
    assert (stat.memory_current_bytes, stat.memory_working_set_bytes, stat.memory_peak_bytes) == (1000, 750, 1500)
    assert (stat.memory_rss_bytes, stat.memory_cache_bytes, stat.memory_mapped_file_bytes) == (400, 600, 70)
    assert (stat.memory_max_events, stat.oom_kills, stat.pids, stat.pids_max) == (5, 1, 4, 0)
    assert (stat.block[0].major, stat.block[0].read_bytes, stat.block[0].writes) == (8, 1, 4)
    assert (stat.memory_pressure.some.total_us, stat.memory_pressure.some.avg10) == (99, 1.5)
    assert stat.memory_pressure.full.total_us == 7
    assert not stat.HasField("cpu_pressure")  # the file is absent


def test_processes_of_leaves_count_with_their_descriptors(cgroup: Path) -> None:
    (cgroup / "exec").mkdir()
    (cgroup / "exec" / "cgroup.procs").write_text(f"{os.getpid()}\n0\n")
    left, right = socket.socketpair()
    with left, right:
        stat = stats.usage(cgroups.Cgroup("c1"))
    assert stat.processes == 1
    assert stat.file_descriptors > stat.sockets >= 2


def test_an_absent_cgroup_uses_nothing() -> None:
    stat = stats.usage(cgroups.Cgroup("no-such-container"))
    assert (stat.cpu_usage_us, stat.memory_current_bytes, stat.processes, list(stat.block)) == (0, 0, 0, [])


def test_interfaces_without_the_loopback() -> None:
    text = "Inter-|\n face |\n    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n  eth0:10 2 3 4 0 0 0 0 50 6 7 8 0 0 0 0\n"
    (eth0,) = stats.interfaces(text)
    assert (eth0.name, eth0.rx_bytes, eth0.rx_packets, eth0.rx_errors, eth0.rx_dropped) == ("eth0", 10, 2, 3, 4)
    assert (eth0.tx_bytes, eth0.tx_packets, eth0.tx_errors, eth0.tx_dropped) == (50, 6, 7, 8)


def test_the_pods_own_interface_is_the_first_and_the_others_are_in_order() -> None:
    lines = "".join(f"  {name}: 1 2 3 4 0 0 0 0 50 6 7 8 0 0 0 0\n" for name in ("lo", "pod0", "net2", "net1"))
    assert [each.name for each in stats.interfaces(f"Inter-|\n face |\n{lines}")] == ["pod0", "net1", "net2"]


@given(st.text(alphabet="some full=avg10360:.1-\n "))
def test_damaged_files_are_skipped(text: str) -> None:
    stats.pressure(text)
    stats.block(text)
    stats.interfaces(text)
