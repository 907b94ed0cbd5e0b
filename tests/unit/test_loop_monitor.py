"""The loop monitor says who blocks the loop, and is silent otherwise."""

import asyncio
import logging
import threading
import time

import pytest

from vmrt.loop_monitor import LoopMonitor


def block_for(seconds: float) -> None:
    time.sleep(seconds)


async def test_it_names_who_blocked(caplog: pytest.LogCaptureFixture) -> None:
    monitor = LoopMonitor(0.05)
    monitor.start()
    with caplog.at_level(logging.WARNING, "vmrt.loop_monitor"):
        # More than once: what the monitor's own thread waits for a processor on a busy machine is taken off.
        for _ in range(20):
            await asyncio.sleep(0.1)
            block_for(0.5)
            await asyncio.sleep(0.1)
            if caplog.text:
                break
    monitor.stop()
    assert "block_for" in caplog.text


async def test_a_loop_that_only_waits_is_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    monitor = LoopMonitor(5)
    monitor.start()
    await asyncio.sleep(0.1)
    monitor.stop()
    assert not caplog.records


async def test_it_ends_also_when_it_was_about_to_ask() -> None:
    """Told to stop between its look at the clock and its question, it must not wait for a loop that waits for it."""
    asking, told = threading.Event(), threading.Event()

    class Alive(threading.Event):
        def clear(self) -> None:
            asking.set()
            assert told.wait(10)
            super().clear()

        def set(self) -> None:
            super().set()
            told.set()

    monitor = LoopMonitor()
    monitor._alive = Alive()
    monitor.start()
    assert asking.wait(10)
    end = threading.Thread(target=monitor.stop, daemon=True)
    end.start()
    # The loop stands still here, as it does when the daemon ends.
    end.join(10)
    assert not end.is_alive()
