"""Process 1 of the PID namespace that a pod's containers may share."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.contract.conftest import TIMEOUT_S, AgentHost
from vmrt import spawn


@pytest.fixture
async def pause(agent_host: AgentHost) -> int:
    """The process, as this machine numbers it."""
    await agent_host.client.rehearse(timeout_s=100)  # makes what is the same for every pod
    tasks = Path(f"/proc/{agent_host.pid}/task").iterdir()
    pids = [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
    found: list[int] = []
    async with asyncio.timeout(TIMEOUT_S):
        while not found:  # it takes its name as its first act
            found = [pid for pid in pids if Path(f"/proc/{pid}/comm").read_text() == "pause\n"]
            await asyncio.sleep(0.01)
    return found[0]


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


async def _asleep(pid: int) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while list(Path(f"/proc/{pid}/fd").iterdir()):
            await asyncio.sleep(0.01)


async def test_it_has_nothing_and_cannot_be_ended_from_inside(agent_host: AgentHost, pause: int) -> None:
    await _asleep(pause)
    told = _status(pause)
    assert told["NSpid"].split()[-1] == "1"
    assert int(told["SigIgn"], 16) >> 16 & 1  # SIGCHLD
    assert int(told["SigCgt"], 16) == 0
    named = agent_host.root / "run/vmrt/sandbox/pidns"
    assert named.stat().st_ino == Path(f"/proc/{pause}/ns/pid").stat().st_ino
    inside = ["nsenter", f"--target={pause}", "--pid", "--", "sh", "-c"]
    await spawn.run([*inside, "kill -TERM 1; kill -INT 1; kill -KILL 1; true"])
    assert _status(pause)["Name"] == "pause"


async def test_the_kernel_reaps_what_is_left_to_it(pause: int) -> None:
    inside = ["nsenter", f"--target={pause}", "--pid", "--", "sh", "-c"]
    await spawn.run([*inside, "(sleep 0.2 >/dev/null 2>&1 &); (true &)"])
    async with asyncio.timeout(TIMEOUT_S):
        while Path(f"/proc/{pause}/task/{pause}/children").read_text().strip():
            await asyncio.sleep(0.02)
