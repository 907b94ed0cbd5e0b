"""The loop monitor says who blocks the loop, and is silent otherwise."""

import asyncio
import logging
import time

import pytest

from vmrt.loop_monitor import LoopMonitor


def block_for(seconds: float) -> None:
    time.sleep(seconds)


async def test_it_names_who_blocked(caplog: pytest.LogCaptureFixture) -> None:
    monitor = LoopMonitor(0.05)
    monitor.start()
    with caplog.at_level(logging.WARNING, "vmrt.loop_monitor"):
        await asyncio.sleep(0.1)
        block_for(0.5)
        await asyncio.sleep(0.1)
    monitor.stop()
    assert "block_for" in caplog.text


async def test_a_loop_that_only_waits_is_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    monitor = LoopMonitor(5)
    monitor.start()
    await asyncio.sleep(0.1)
    monitor.stop()
    assert not caplog.records
