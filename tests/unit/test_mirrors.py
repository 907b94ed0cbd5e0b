"""Copies in the guest that follow the host's volumes: what is sent when, and what happens when it cannot be."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest
from atomic_volume import write

from vmrt.agent import agent_pb2 as pb
from vmrt.agent_client import AgentClient
from vmrt.errors import ExhaustedError, UnavailableError, VmGoneError
from vmrt.pods import mirrors
from vmrt.pods.mirrors import Mirrors


class Agent:
    """Keeps what is published: the current version's files by volume."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.current: dict[str, dict[str, bytes]] = {}
        self.links: dict[str, dict[str, str]] = {}
        self.published = asyncio.Event()
        self.fails: Exception | None = None

    async def make_volume(self, request: pb.MakeVolumeRequest) -> None:
        self.made.append(request.name)

    async def publish_files(self, request: pb.PublishFilesRequest) -> None:
        if self.fails is not None:
            error, self.fails = self.fails, None
            raise error
        if request.files:
            self.current[request.name] = {file.path: file.data for file in request.files}
        self.links[request.name] = dict(request.links)
        self.published.set()

    async def next(self) -> None:
        """Wait for the next version."""
        async with asyncio.timeout(30):
            await self.published.wait()
        self.published.clear()


@pytest.fixture
async def agent() -> Agent:
    return Agent()


@pytest.fixture
async def kept(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Mirrors]:
    monkeypatch.setattr(mirrors, "_RETRY_S", 0.01)
    made = Mirrors(1 << 20)
    yield made
    await made.close()


async def follow(kept: Mirrors, agent: Agent, path: Path, sandbox: str = "s") -> str:
    return await kept.follow(sandbox, str(path), lambda: cast(AgentClient, agent))


async def test_what_changes_on_the_host_changes_in_the_guest(kept: Mirrors, agent: Agent, tmp_path: Path) -> None:
    write(tmp_path, "..v0", {"a": b"0"})
    name = await follow(kept, agent, tmp_path)
    assert name == mirrors.name_of(str(tmp_path))
    assert agent.current[name] == {"a": b"0"}
    # A second container of the pod: the same volume, brought up to date at once.
    assert await follow(kept, agent, tmp_path) == name
    assert agent.made == [name]
    agent.published.clear()
    write(tmp_path, "..v1", {"a": b"1"})
    while agent.current[name] != {"a": b"1"}:
        await agent.next()
    (tmp_path / "a").symlink_to("..data/a")
    while agent.links[name] != {"a": "..data/a"}:
        await agent.next()


async def test_a_version_that_cannot_be_sent_is_sent_later(kept: Mirrors, agent: Agent, tmp_path: Path) -> None:
    write(tmp_path, "..v0", {"a": b"0"})
    name = await follow(kept, agent, tmp_path)
    agent.published.clear()
    agent.fails = UnavailableError("the connection broke")
    write(tmp_path, "..v1", {"a": b"1"})
    while agent.current[name] != {"a": b"1"}:
        await agent.next()


async def test_a_dead_vm_and_a_gone_volume_end_quietly(kept: Mirrors, agent: Agent, tmp_path: Path) -> None:
    write(tmp_path / "one", "..v0", {"a": b"0"})
    write(tmp_path / "two", "..v0", {"a": b"0"})
    await follow(kept, agent, tmp_path / "one")
    second = await follow(kept, agent, tmp_path / "two", "t")
    shutil.rmtree(tmp_path / "one")
    agent.fails = VmGoneError("gone")
    write(tmp_path / "two", "..v1", {"a": b"1"})
    task = kept._mirrors["t"][str(tmp_path / "two")].task
    assert task is not None
    async with asyncio.timeout(30):
        await task
    assert agent.current[second] == {"a": b"0"}
    kept.forget("s")
    kept.forget("t")
    kept.forget("t")
    assert kept._mirrors == {}


async def test_what_cannot_be_mirrored_is_left_to_the_share(kept: Mirrors, agent: Agent, tmp_path: Path) -> None:
    assert await follow(kept, agent, tmp_path / "missing") == ""
    assert await follow(kept, agent, tmp_path) == ""
    write(tmp_path, "..v0", {"a": b"x" * (2 << 20)})
    with pytest.raises(ExhaustedError):
        await follow(kept, agent, tmp_path)
    assert kept._mirrors == {}
    assert agent.made == []


async def test_the_first_copy_that_fails_is_nothing_that_is_kept(kept: Mirrors, agent: Agent, tmp_path: Path) -> None:
    write(tmp_path, "..v0", {"a": b"0"})
    agent.fails = UnavailableError("the connection broke")
    with pytest.raises(UnavailableError):
        await follow(kept, agent, tmp_path)
    assert cast(Any, kept)._mirrors == {}
    assert await follow(kept, agent, tmp_path)
