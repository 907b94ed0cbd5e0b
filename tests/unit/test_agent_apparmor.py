"""A policy is loaded once, in one write, and only where the kernel has AppArmor."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmrt.agent import apparmor, status


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kernel with AppArmor, as far as `load` can see."""
    (tmp_path / "enabled").write_text("Y\n")
    (tmp_path / "replace").touch()
    monkeypatch.setattr(apparmor, "_ENABLED", str(tmp_path / "enabled"))
    monkeypatch.setattr(apparmor, "_REPLACE", str(tmp_path / "replace"))
    monkeypatch.setattr(apparmor, "_loaded", {})
    return tmp_path


def test_once(kernel: Path) -> None:
    apparmor.load("a", b"policy")
    assert (kernel / "replace").read_bytes() == b"policy"
    (kernel / "replace").unlink()
    apparmor.load("a", b"policy")  # known: nothing is written
    (kernel / "replace").touch()
    apparmor.load("a", b"better")  # changed on the host meanwhile
    assert (kernel / "replace").read_bytes() == b"better"


@pytest.mark.parametrize("told", ["N\n", None])
def test_a_kernel_without(kernel: Path, told: str | None) -> None:
    (kernel / "enabled").unlink()
    if told is not None:
        (kernel / "enabled").write_text(told)
    with pytest.raises(
        status.AgentError, match=r"AppArmor profile a: the kernel of the guest, .* runs without"
    ) as caught:
        apparmor.load("a", b"policy")
    assert caught.value.code == status.FAILED_PRECONDITION
    assert (kernel / "replace").read_bytes() == b""
