"""Huge pages are reserved with a container and given back with it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from vmrt.agent import hugepages, status

MIB = 1024**2


def spec(*limits: tuple[str, int]) -> dict[str, Any]:
    wanted = [{"pageSize": size, "limit": octets} for size, octets in limits]
    return {"linux": {"resources": {"hugepageLimits": wanted}}}


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The guest's 2 MB pages: three are another container's."""
    path = tmp_path / "hugepages-2048kB/nr_hugepages"
    path.parent.mkdir()
    path.write_text("3")
    monkeypatch.setattr(hugepages, "available_kb", lambda: 1024**2)
    return path


def test_reserved_and_released(pool: Path) -> None:
    with contextlib.ExitStack() as undo:
        hugepages.reserve(spec(("2MB", 5 * MIB)), undo, str(pool.parents[1]))
        assert pool.read_text() == "6"
    assert pool.read_text() == "3"


def test_nothing_asked_for(pool: Path) -> None:
    with contextlib.ExitStack() as undo:
        hugepages.reserve({"linux": {}}, undo, str(pool.parents[1]))
    assert pool.read_text() == "3"


def test_a_size_that_the_guest_has_not(pool: Path) -> None:
    with (
        contextlib.ExitStack() as undo,
        pytest.raises(status.AgentError, match="the guest has no huge pages of 1GB") as caught,
    ):
        hugepages.reserve(spec(("1GB", 1024 * MIB)), undo, str(pool.parents[1]))
    assert caught.value.code == status.FAILED_PRECONDITION


def test_too_little_memory(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = hugepages._write
    # The kernel gives what it finds: four pages in all.
    monkeypatch.setattr(hugepages, "_write", lambda path, pages: write(path, min(pages, 4)))
    with (
        contextlib.ExitStack() as undo,
        pytest.raises(status.AgentError, match="room for 1 of 2 pages of 2MB") as caught,
    ):
        hugepages.reserve(spec(("2MB", 4 * MIB)), undo, str(pool.parents[1]))
    assert caught.value.code == status.RESOURCE_EXHAUSTED
    assert pool.read_text() == "3"


def test_no_memory_is_taken_in_vain(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hugepages, "available_kb", lambda: 20 * 1024)
    monkeypatch.setattr(hugepages, "_write", lambda path, pages: pytest.fail("written") if pages > 3 else None)
    with contextlib.ExitStack() as undo, pytest.raises(status.AgentError, match="room for 2 of 3 pages of 2MB"):
        hugepages.reserve(spec(("2MB", 6 * MIB)), undo, str(pool.parents[1]))
