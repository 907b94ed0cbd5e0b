"""Changes of limits: what a request leaves alone, what is refused, and what brings the old limits back."""

from __future__ import annotations

import pytest

from vmrt.errors import ExhaustedError, InvalidArgumentError
from vmrt.model import LinuxResources
from vmrt.pods import resize

MIB = 1024**2
OLD = LinuxResources(
    cpu_period_us=100_000,
    cpu_quota_us=50_000,
    cpu_shares=512,
    memory_limit_bytes=64 * MIB,
    memory_swap_limit_bytes=64 * MIB,
    oom_score_adj=10,
    unified={"memory.high": "max"},
)


def test_what_is_not_set_stays() -> None:
    assert resize.merged(OLD, LinuxResources()) == OLD
    new = resize.merged(OLD, LinuxResources(cpu_quota_us=70_000, oom_score_adj=99, unified={"memory.min": "1"}))
    assert (new.cpu_quota_us, new.cpu_shares, new.oom_score_adj) == (70_000, 512, 10)
    assert new.unified == {"memory.high": "max", "memory.min": "1"}


def test_no_swap_stays_no_swap_under_a_new_memory_limit() -> None:
    new = resize.merged(OLD, LinuxResources(memory_limit_bytes=128 * MIB))
    assert (new.memory_limit_bytes, new.memory_swap_limit_bytes) == (128 * MIB, 128 * MIB)


def test_more_than_the_vm_has_is_refused_by_name() -> None:
    with pytest.raises(ExhaustedError, match=r"linux\.memory_limit_in_bytes is 600 MiB.*512 MiB"):
        resize.check(LinuxResources(memory_limit_bytes=600 * MIB), OLD, 1, 512 * MIB)
    with pytest.raises(ExhaustedError, match=r"linux\.cpu_quota is worth 1\.5 CPUs.*has 1"):
        resize.check(LinuxResources(cpu_quota_us=150_000, cpu_period_us=100_000), OLD, 1, 512 * MIB)
    with pytest.raises(InvalidArgumentError, match="memory_swap_limit_in_bytes"):
        resize.check(LinuxResources(memory_limit_bytes=2 * MIB, memory_swap_limit_bytes=MIB), OLD, 1, 512 * MIB)
    resize.check(LinuxResources(cpu_quota_us=-1, memory_limit_bytes=512 * MIB), OLD, 1, 512 * MIB)


def test_what_was_unlimited_becomes_so_again() -> None:
    tried = LinuxResources(cpu_quota_us=1, cpu_shares=2, memory_limit_bytes=3, memory_swap_limit_bytes=3)
    assert resize.restoring(LinuxResources(), tried)["unified"] == {
        "memory.max": "max",
        "memory.swap.max": "max",
        "cpu.max": "max",
        "cpu.weight": "100",
    }
    assert resize.restoring(OLD, OLD)["memory"]["limit"] == 64 * MIB
