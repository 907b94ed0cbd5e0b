"""The loop's priority: who has it, who does not inherit it, and that children are given theirs back."""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vmrt import realtime, spawn
from vmrt.errors import ProcessError

POLICY = "import os; print(os.sched_getscheduler(0))"


@pytest.fixture
def entered() -> Iterator[None]:
    why_not = realtime.enter()
    if why_not:
        pytest.skip(f"no real-time priority here: {why_not}")
    try:
        yield
    finally:
        realtime.leave()


def policy() -> int:
    return os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK


def test_only_the_calling_thread_has_it_and_threads_do_not_inherit_it(entered: None) -> None:
    assert policy() == os.SCHED_RR
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(policy()))
    thread.start()
    thread.join()
    assert seen == [os.SCHED_OTHER]


def test_workers_share_it_and_what_they_make_does_not() -> None:
    """Also those that worked before it came, and those that come later; an ordinary executor's stay out."""
    with (
        realtime.executor("early", 1) as early,
        realtime.executor("late", 1) as late,
        ThreadPoolExecutor(1) as converters,
    ):
        assert [pool.submit(policy).result() for pool in (early, converters)] == [os.SCHED_OTHER] * 2
        if why_not := realtime.enter():
            pytest.skip(f"no real-time priority here: {why_not}")
        try:
            pools = (early, late, converters)
            assert [pool.submit(policy).result() for pool in pools] == [os.SCHED_RR, os.SCHED_RR, os.SCHED_OTHER]
            made = late.submit(subprocess.run, ["python3", "-c", POLICY], capture_output=True, check=True).result()
            assert made.stdout.decode().strip() == str(os.SCHED_OTHER)
        finally:
            realtime.leave()
        assert [pool.submit(policy).result() for pool in pools] == [os.SCHED_OTHER] * 3


def test_a_thread_for_one_piece_of_work_has_it_while_the_loop_has_it(entered: None) -> None:
    def work() -> tuple[int, str]:
        return policy(), threading.current_thread().name

    assert realtime.in_own_thread("x", work) == (os.SCHED_RR, "x")
    realtime.leave()
    assert realtime.in_own_thread("x", work) == (os.SCHED_OTHER, "x")


def test_what_such_work_raises_is_raised() -> None:
    with pytest.raises(FileNotFoundError, match="gone"):
        realtime.in_own_thread("x", lambda: os.stat("/gone"))  # noqa: PTH116


def test_leaving_gives_it_back(entered: None) -> None:
    realtime.leave()
    assert policy() == os.SCHED_OTHER


async def test_children_are_ordinary(entered: None, tmp_path: Path) -> None:
    done = await spawn.run(["python3", "-c", POLICY])
    assert done.text().strip() == str(os.SCHED_OTHER)
    with (tmp_path / "log").open("wb") as log:
        child = spawn.detached(["sh", "-c", "chrt -p $$; sleep 1000"], log_fd=log.fileno())
    while "SCHED_OTHER" not in (text := (tmp_path / "log").read_text()):
        assert "SCHED_RR" not in text
        assert spawn.alive(child)
        await asyncio.sleep(0.01)
    spawn.terminate(child)
    while spawn.alive(child):
        await asyncio.sleep(0.01)
    assert os.sched_getscheduler(0) == os.SCHED_RR | os.SCHED_RESET_ON_FORK


async def test_a_missing_program_is_still_told(entered: None) -> None:
    with pytest.raises(ProcessError, match="cannot start /no/such/program: No such file"):
        await spawn.run(["/no/such/program"])
    with pytest.raises(ProcessError, match="cannot start no-such-program: No such file"):
        spawn.detached(["no-such-program"])


def test_without_chrt_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(realtime, "ORDINARY", ())
    assert "chrt" in realtime.enter()
    assert policy() == os.SCHED_OTHER


def test_where_it_is_not_allowed_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    assert realtime.enter() == "Operation not permitted"
    with realtime.hurried() as prefix:
        assert prefix == ()
