"""Which CPUs of the guest are online; with plain files as sysfs."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from vmrt.agent import cpus, status


def machine(directory: Path, present: str, online: str) -> Path:
    (directory / "present").write_text(present)
    (directory / "online").write_text(online)
    for cpu in cpus.parse(present):
        (directory / f"cpu{cpu}").mkdir(exist_ok=True)
        if cpu:  # CPU 0 cannot be taken away, and has no such file
            (directory / f"cpu{cpu}" / "online").write_text("?")
    return directory


def switched(directory: Path) -> dict[str, str]:
    found = {path.parent.name: path.read_text() for path in directory.glob("cpu*/online")}
    return {name: text for name, text in found.items() if text != "?"}


def soon() -> float:
    return time.monotonic() + 60


@pytest.mark.parametrize(("text", "found"), [("0\n", [0]), ("0-2,5\n", [0, 1, 2, 5]), ("", []), ("1,3-4", [1, 3, 4])])
def test_lists_of_cpus(text: str, found: list[int]) -> None:
    assert cpus.parse(text) == found


@pytest.mark.parametrize(
    ("present", "online", "wanted", "writes"),
    [
        ("0-3", "0", 3, {"cpu1": "1", "cpu2": "1"}),
        ("0-3", "0-3", 1, {"cpu1": "0", "cpu2": "0", "cpu3": "0"}),
        ("0-3", "0-1", 2, {}),
        ("0-3", "0,3", 2, {"cpu1": "1", "cpu3": "0"}),
    ],
)
def test_the_first_ones_are_online(
    tmp_path: Path, present: str, online: str, wanted: int, writes: dict[str, str]
) -> None:
    directory = machine(tmp_path, present, online)
    cpus.set_online(wanted, soon(), str(directory))
    assert switched(directory) == writes


def test_a_cpu_that_is_just_being_plugged_is_waited_for(tmp_path: Path) -> None:
    directory = machine(tmp_path, "0", "0")
    plug = threading.Timer(0.1, machine, (directory, "0-1", "0"))
    plug.start()
    cpus.set_online(2, soon(), str(directory))
    plug.join()
    assert switched(directory) == {"cpu1": "1"}


def test_one_that_never_comes(tmp_path: Path) -> None:
    with pytest.raises(status.AgentError, match="has 1 CPUs, not 2") as late:
        cpus.set_online(2, time.monotonic(), str(machine(tmp_path, "0", "0")))
    assert late.value.code == status.DEADLINE_EXCEEDED
    with pytest.raises(status.AgentError, match="at least one"):
        cpus.set_online(0, soon(), str(tmp_path))


def test_what_fails_half_way_is_taken_back(tmp_path: Path) -> None:
    directory = machine(tmp_path, "0-2", "0")
    (directory / "cpu2" / "online").unlink()
    (directory / "cpu2" / "online").mkdir()
    with pytest.raises(status.AgentError):
        cpus.set_online(3, time.monotonic(), str(directory))
    assert switched_files(directory) == {"cpu1": "0"}


def switched_files(directory: Path) -> dict[str, str]:
    """As `switched`, where one of them is no file; each write is seen in the order of writing, the last one last."""
    return {path.parent.name: path.read_text()[0] for path in directory.glob("cpu*/online") if path.is_file()}
