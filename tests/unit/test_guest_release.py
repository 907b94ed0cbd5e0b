"""Which Debian release an image is made of, and that set-up and builder know the same ones."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path

import pytest

from vmrt.guest_image import release, rootfs

ROOT = Path(__file__).parents[2]
SETUP = ROOT / "setup" / "setup.sh"


def test_each_release_has_its_own_names() -> None:
    twelve, thirteen = release.choose("bookworm"), release.choose("trixie")
    assert (str(twelve.library), twelve.program) == ("usr/lib/python3.11", "usr/bin/python3.11")
    assert {"python3.11-minimal", "libpython3.11-stdlib", "libssl3"} < set(rootfs.package_names(twelve))
    assert {"python3.13-minimal", "libpython3.13-stdlib", "libssl3t64"} < set(rootfs.package_names(thirteen))
    common = set(rootfs.package_names(twelve)) & set(rootfs.package_names(thirteen))
    assert common == set(rootfs.PACKAGES)


def test_an_unknown_release_is_like_the_newest() -> None:
    assert release.choose("forky") is release.choose("") is release.RELEASES[-1]


def test_the_machines_release_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: {"ID": "debian", "VERSION_CODENAME": "bookworm"})
    assert release.here().codename == "bookworm"
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: {"ID": "arch"})
    assert release.here() is release.RELEASES[-1]

    def absent() -> dict[str, str]:
        raise FileNotFoundError

    monkeypatch.setattr(platform, "freedesktop_os_release", absent)
    assert release.here() is release.RELEASES[-1]


def test_set_up_knows_the_same_releases() -> None:
    known = re.search(r'^readonly RELEASES="([a-z ]+)"', SETUP.read_text(), re.MULTILINE)
    assert known is not None
    assert known[1].split() == [each.codename for each in release.RELEASES]


def packages_of(codename: str) -> list[str]:
    """What set-up itself makes of setup/packages.txt."""
    function = re.search(r"^packages_of\(\) \{.*?^\}", SETUP.read_text(), re.MULTILINE | re.DOTALL)
    assert function is not None
    script = f"{function[0]}\npackages_of {codename}"
    return subprocess.run(["bash", "-c", script], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()


def test_a_package_that_a_release_lacks_is_left_out_there_alone() -> None:
    twelve, thirteen = packages_of("bookworm"), packages_of("trixie")
    assert set(thirteen) - set(twelve) == {"virtiofsd"}
    assert set(twelve) < set(thirteen)
    assert packages_of("''") == packages_of("forky") == thirteen
    assert "qemu-system-x86" in twelve
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", name) for name in thirteen)
