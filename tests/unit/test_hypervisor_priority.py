"""What nobody waits for yet gives way to the rest, also where the kernel weighs sessions."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmrt import spawn
from vmrt.hypervisor import priority

pytestmark = pytest.mark.skipif(not priority.can_restore(), reason="needs CAP_SYS_NICE")


@pytest.fixture(params=[True, False], ids=["own-session", "our-session"])
def sleeper(request: pytest.FixtureRequest) -> Iterator[tuple[spawn.ProcessId, bool]]:
    process = subprocess.Popen(["sleep", "1000"], start_new_session=request.param)
    try:
        found = spawn.identify(process.pid)
        assert found is not None
        yield found, request.param
    finally:
        process.kill()
        process.wait()


def session_nice(pid: int) -> str | None:
    """The session's nice value; None in the kernel's first session, which is no autogroup and reads as nothing."""
    words = Path(f"/proc/{pid}/autogroup").read_text().split()
    return words[-1] if words else None


def test_a_process_gives_way_and_comes_back(sleeper: tuple[spawn.ProcessId, bool]) -> None:
    process, own_session = sleeper
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    for nice in (priority.BACKGROUND, priority.NORMAL):
        priority.set_nice(process, nice)
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == nice
        if Path("/proc/self/autogroup").exists():
            assert session_nice(process.pid) == (str(nice) if own_session else session_nice(os.getpid()))
    assert os.getpriority(os.PRIO_PROCESS, 0) == ours


def test_a_process_that_has_ended_is_no_error() -> None:
    process = subprocess.Popen(["sleep", "1000"])
    gone = spawn.identify(process.pid)
    process.kill()
    process.wait()
    assert gone is not None
    priority.set_nice(gone, priority.BACKGROUND)
