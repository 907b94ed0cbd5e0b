"""A boot's time-out: a hung guest's is the limit, a starved one's is longer, and there is an end to that."""

from __future__ import annotations

import asyncio
import os
import subprocess

import pytest

from vmrt import schedstat
from vmrt.hypervisor.boot_limit import MOST, BootLimit

LIMIT_S = 100


class Clock:
    """The loop's time, moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loop = asyncio.get_running_loop()
        self._began = loop.time()
        self._now = self._began
        monkeypatch.setattr(loop, "time", lambda: self._now)

    async def at(self, seconds: float) -> None:
        """Let all happen that is due then."""
        self._now = self._began + seconds
        for _ in range(5):
            await asyncio.sleep(0)


@pytest.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def starved(monkeypatch: pytest.MonkeyPatch, *values: float) -> None:
    left = list(values)
    monkeypatch.setattr(schedstat, "all_waited_s", lambda _pid: {1: 0.0, 2: left.pop(0) if left[1:] else left[0]})


async def outcome(clock: Clock, limit: BootLimit, *times: float) -> float | None:
    """Return at which of the times it was over; None when it was not."""
    reached = 0.0
    try:
        async with limit():
            for reached in times:
                await clock.at(reached)
    except TimeoutError:
        return reached
    return None


async def test_a_guest_that_hangs(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    starved(monkeypatch, 0)
    limit = BootLimit(LIMIT_S, lambda: 7)
    assert await outcome(clock, limit, 50, 99.8, 101, 110) == 101
    assert str(limit) == "100 s"


async def test_one_that_has_no_processor(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    starved(monkeypatch, 50, 70, 70)
    limit = BootLimit(LIMIT_S, lambda: 7)
    assert await outcome(clock, limit, 99.8, 120, 149.8, 169, 169.8, 171, 180) == 171
    assert str(limit) == "100 s besides 70 s without a processor"


async def test_there_is_an_end_to_it(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    starved(monkeypatch, 1e6)
    assert await outcome(clock, BootLimit(LIMIT_S, lambda: 7), 99.8, LIMIT_S * MOST - 1, LIMIT_S * MOST + 1) == 501


async def test_before_qemu_runs_only_the_limit_counts(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    starved(monkeypatch, 50)
    assert await outcome(clock, BootLimit(LIMIT_S, lambda: None), 99.8, 101) == 101


async def test_one_that_is_ready_in_time(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    starved(monkeypatch, 0)
    assert await outcome(clock, BootLimit(LIMIT_S, lambda: 7), 99) is None
    await clock.at(1000)


def test_what_the_kernel_counts() -> None:
    assert os.getpid() in schedstat.all_waited_s()
    assert min(schedstat.all_waited_s().values()) >= 0
    child = subprocess.Popen(["true"])
    child.wait()
    assert schedstat.all_waited_s(child.pid) == {}
    assert schedstat.waited_s(child.pid, child.pid) == 0.0
