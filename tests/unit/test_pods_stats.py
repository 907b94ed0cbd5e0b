"""The figures' cache: how often a VM is asked, what is kept of one that is gone, and whose word counts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest

from vmrt.agent import agent_pb2 as pb
from vmrt.errors import VmGoneError
from vmrt.model import ContainerSpec, SandboxSpec
from vmrt.pods import stats
from vmrt.pods.records import ContainerRecord, ContainerState, SandboxRecord, SandboxState
from vmrt.pods.table import LiveContainer, LiveSandbox


@dataclass
class Agent:
    """A guest that says the same of everything in `ids`."""

    ids: list[str]
    calls: int = 0
    error: Exception | None = None
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    async def container_stats(self, ids: Sequence[str] = (), *, timeout_s: float = 0) -> pb.ContainerStatsResponse:
        self.calls += 1
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return pb.ContainerStatsResponse(stats=[pb.ContainerStat(container_id=i, cpu_usage_us=5) for i in self.ids])


class House:
    """A table of one ready sandbox with running containers."""

    def __init__(self, *ids: str) -> None:
        self.agent = Agent([*ids])
        self.agent.gate.set()
        record = SandboxRecord("s", SandboxSpec(name="p", uid="u", namespace="n"), SandboxState.READY, 1, "vm", "tap")
        self.sandbox = LiveSandbox(record, agent=self.agent)  # type: ignore[arg-type]
        self.containers: list[LiveContainer] = []
        for container_id in ids:
            self.add(container_id)
        table: Any = SimpleNamespace(sandboxes={"s": self.sandbox}, containers_of=lambda _: self.containers)
        self.sandboxes = table.sandboxes
        self.stats = stats.Stats(table)

    def add(self, container_id: str) -> None:
        spec = ContainerSpec(name=container_id, image="i")
        self.containers.append(
            LiveContainer(ContainerRecord(container_id, "s", spec, ContainerState.RUNNING, 1, "i", "i"))
        )

    async def ask(self) -> set[str]:
        return set((await self.stats.of(["s"]))["s"].containers)


async def test_all_who_ask_within_a_second_share_one_call() -> None:
    house = House("a", "b")
    house.agent.gate.clear()
    asked = [asyncio.create_task(house.ask()) for _ in range(50)]
    await asyncio.sleep(0)
    house.agent.gate.set()
    assert await asyncio.gather(*asked) == [{"a", "b"}] * 50
    assert await house.ask() == {"a", "b"}
    assert house.agent.calls == 1


async def test_old_figures_and_missing_containers_are_asked_for_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    house = House("a")
    await house.ask()
    house.add("just-started")
    house.agent.ids.append("just-started")
    assert await house.ask() == {"a", "just-started"}
    assert house.agent.calls == 2
    monkeypatch.setattr(stats, "MAX_AGE_S", 0.0)
    await house.ask()
    assert house.agent.calls == 3


async def test_what_was_said_last_stays_when_the_vm_stops_answering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "MAX_AGE_S", 0.0)
    house = House("a")
    await house.ask()
    house.agent.error = VmGoneError("gone")
    assert await house.ask() == {"a"}
    house.sandbox.record = replace(house.sandbox.record, state=SandboxState.NOT_READY)
    house.sandbox.agent = None
    assert await house.ask() == {"a"}
    del house.sandboxes["s"]
    assert await house.stats.of(["s"]) == {}


async def test_a_guest_speaks_for_its_own_containers_only() -> None:
    house = House("a")
    house.agent.ids.append("somebody-elses")
    assert await house.ask() == {"a"}


async def test_one_who_gives_up_does_not_take_the_call_from_the_others() -> None:
    house = House("a")
    house.agent.gate.clear()
    first, second = asyncio.create_task(house.ask()), asyncio.create_task(house.ask())
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    house.agent.gate.set()
    assert await second == {"a"}


async def test_a_hundred_containers_cost_one_call() -> None:
    names = {f"c{number}" for number in range(100)}
    house = House(*sorted(names))
    # Lists, single ones and the metrics of kubelet, crictl and a monitoring agent, all at one time.
    assert await asyncio.gather(*(house.ask() for _ in range(10))) == [names] * 10
    assert house.agent.calls == 1
