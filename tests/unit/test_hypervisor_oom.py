"""oom_score_adj of processes: set with their children's, and as low as the host allows."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmrt import spawn
from vmrt.hypervisor import oom
from vmrt.hypervisor.cgroup import family
from vmrt.spawn import ProcessId


@pytest.fixture
def shell() -> Iterator[ProcessId]:
    """A process with a child."""
    with subprocess.Popen(["sh", "-c", "sleep 1000 & echo; wait"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = spawn.identify(process.pid)
        assert found is not None
        pids = family(process.pid)
        assert len(pids) == 2
        try:
            yield found
        finally:
            for pid in reversed(pids):
                subprocess.run(["kill", "-9", str(pid)], check=True)


def scores(process: ProcessId) -> set[int]:
    return {int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in family(process.pid)}


def test_processes_and_theirs(shell: ProcessId) -> None:
    (ordinary,) = scores(shell)
    oom.weigh([shell], 1000)
    assert scores(shell) == {1000}
    oom.weigh([shell], ordinary)
    assert scores(shell) == {ordinary}


def test_what_the_host_does_not_allow_is_said_once(
    shell: ProcessId, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    written: list[int] = []

    def as_without_cap_sys_resource(_pid: int, oom_score_adj: int) -> None:
        if oom_score_adj < 0:
            raise PermissionError
        written.append(oom_score_adj)

    monkeypatch.setattr(oom, "_set", as_without_cap_sys_resource)
    oom._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "vmrt"):
        oom.weigh([shell], -997)
        oom.weigh([shell], -998)
    assert written == [0] * 4
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "CAP_SYS_RESOURCE" in caplog.text


def test_where_not_even_that_is_allowed_it_stays(shell: ProcessId, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_pid: int, _value: int) -> None:
        raise PermissionError

    monkeypatch.setattr(oom, "_set", refuse)
    oom.weigh([shell], 5)


def test_a_process_that_has_ended_is_no_error(shell: ProcessId) -> None:
    before = scores(shell)
    oom.weigh([ProcessId(shell.pid, shell.start_ticks + 1), ProcessId(2**22 - 1, 1)], 1000)
    assert scores(shell) == before


def test_only_what_is_not_ordinary_is_disinherited(shell: ProcessId, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    monkeypatch.setattr(oom, "_set", lambda _pid, value: written.append(value))
    monkeypatch.setattr(oom, "_own", lambda: 0)
    oom.disinherit([shell])
    assert written == []
    monkeypatch.setattr(oom, "_own", lambda: -999)
    oom.disinherit([shell])
    assert written == [0, 0]
