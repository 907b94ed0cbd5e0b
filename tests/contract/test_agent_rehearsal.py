"""The rehearsal with the real crun on this machine: it gets to its end, and nothing of it can be found afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contract.conftest import AgentHost
from tests.contract.test_agent_containers import exits, run
from vmrt import errors, spawn
from vmrt.agent import agent_pb2 as pb

_RUN = "run/vmrt"


def _files(host: AgentHost) -> list[str]:
    """Return all paths below the agent's directory but the sockets' and logs' numbers."""
    root = host.root / _RUN
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def _mounts(host: AgentHost) -> list[str]:
    return [line.split()[4] for line in Path(f"/proc/{host.pid}/mountinfo").read_text().splitlines()]


async def test_a_rehearsal_succeeds_and_leaves_nothing(agent_host: AgentHost, tmp_path: Path) -> None:
    await agent_host.client.rehearse(timeout_s=100)
    # What is the same for every pod, and the zygote, stay; the second time adds nothing to them.
    files, mounts = _files(agent_host), _mounts(agent_host)
    descriptors = len(list(Path(f"/proc/{agent_host.pid}/fd").iterdir()))
    await agent_host.client.rehearse(timeout_s=100)
    assert (_files(agent_host), _mounts(agent_host)) == (files, mounts)
    assert len(list(Path(f"/proc/{agent_host.pid}/fd").iterdir())) == descriptors
    assert not any("rehearsal" in name for name in (*files, *mounts))
    assert not list(agent_host.cgroup.glob("rehearsal*"))
    assert (tmp_path / "agent.log").read_text() == ""  # no part of it has failed
    answer = await agent_host.client.list_containers()
    assert (list(answer.containers), answer.last_event) == ([], 0)
    assert not [line for line in Path(f"/proc/{agent_host.pid}/net/dev").read_text().splitlines() if "dummy0" in line]
    # The first container is the pod's first event.
    await run(agent_host.client, "c", ["true"])
    assert (await exits(agent_host.client, "c")).code == 0


async def test_a_part_that_fails_is_told_and_undone(agent_host: AgentHost, tmp_path: Path) -> None:
    """A root file system without the program: crun refuses the container."""
    (tmp_path / "base").unlink()
    (tmp_path / "base").mkdir()
    await agent_host.client.rehearse(timeout_s=100)
    assert "rehearsal: AgentError: create container rehearsal" in (tmp_path / "agent.log").read_text()
    assert not any("rehearsal" in name for name in (*_files(agent_host), *_mounts(agent_host)))
    assert not list(agent_host.cgroup.glob("rehearsal*"))


async def test_what_would_be_left_is_an_error(agent_host: AgentHost) -> None:
    """A writable layer that cannot be removed, because something is mounted there."""
    place = "/run/vmrt/scratch/rehearsal"
    (agent_host.root / place.lstrip("/")).mkdir()
    inside = ["nsenter", f"--target={agent_host.pid}", "--mount"]
    await spawn.run([*inside, "mount", "-t", "tmpfs", "test", place])
    with pytest.raises(errors.VmrtError, match=f"left behind: {place}"):
        await agent_host.client.rehearse(timeout_s=100)
    await spawn.run([*inside, "umount", place])
    (agent_host.root / place.lstrip("/")).rmdir()


async def test_a_vm_with_a_pod_does_not_rehearse(agent_host: AgentHost) -> None:
    request = pb.ConfigureSandboxRequest(sandbox_id="abc", scratch_serial="not-a-disk!")
    with pytest.raises(errors.VmrtError):
        await agent_host.client.configure_sandbox(request)  # a serial that is none: nothing has been done yet
    with pytest.raises(errors.FailedPreconditionError, match="sandbox abc's already"):
        await agent_host.client.rehearse(timeout_s=100)
