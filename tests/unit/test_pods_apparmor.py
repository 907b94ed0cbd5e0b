"""AppArmor profiles: which one a container gets, where a Localhost one is found, and that they compile."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from vmrt.errors import InvalidArgumentError
from vmrt.model import ProfileType, SecurityContext, SecurityProfile
from vmrt.pods import apparmor

needs_parser = pytest.mark.skipif(shutil.which("apparmor_parser") is None, reason="apparmor_parser is not installed")
PROFILE = "profile vmrt-unit flags=(attach_disconnected) { file, deny /tmp/** w, }\n"


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with no profiles yet: directories for loaded ones and for files."""
    (tmp_path / "loaded").mkdir()
    (tmp_path / "files/disable").mkdir(parents=True)
    monkeypatch.setattr(apparmor, "LOADED", tmp_path / "loaded")
    monkeypatch.setattr(apparmor, "FILES", tmp_path / "files")
    monkeypatch.setattr(apparmor, "_compiled", {})
    return tmp_path


def context(kind: ProfileType, reference: str = "", *, privileged: bool = False) -> SecurityContext:
    return SecurityContext(apparmor=SecurityProfile(kind, reference), privileged=privileged)


def test_features_file() -> None:
    assert apparmor.features({"file": {"mask": "read write"}, "capability": "0x1"}) == (
        "file {mask {read write\n}\n}\ncapability {0x1\n}\n"
    )


@pytest.mark.parametrize(
    "security",
    [
        SecurityContext(),
        context(ProfileType.UNCONFINED),
        context(ProfileType.RUNTIME_DEFAULT, privileged=True),
        context(ProfileType.LOCALHOST, "no-such", privileged=True),
    ],
)
async def test_unconfined(security: SecurityContext) -> None:
    assert await apparmor.policy(security) is None


@needs_parser
async def test_the_default_profile_compiles() -> None:
    policy = await apparmor.policy(context(ProfileType.RUNTIME_DEFAULT))
    assert policy is not None
    assert policy.name == apparmor.DEFAULT_NAME
    # "version" and its u32, then the name: what the kernel's aa_unpack reads first (security/apparmor/policy_unpack.c).
    assert b"version" in policy.binary[:16]
    assert apparmor.DEFAULT_NAME.encode() in policy.binary[:200]
    again = await apparmor.policy(context(ProfileType.RUNTIME_DEFAULT))
    assert again is not None
    assert again.binary is policy.binary


async def test_a_profile_that_the_hosts_kernel_has(host: Path) -> None:
    for name, data in (("a.1", b"other"), ("vmrt-unit.7", b"policy")):
        entry = host / "loaded" / name
        entry.mkdir()
        (entry / "name").write_text(name.partition(".")[0] + "\n")
        (entry / "raw_data").write_bytes(data)
    assert await apparmor.policy(context(ProfileType.LOCALHOST, "vmrt-unit")) == apparmor.Policy("vmrt-unit", b"policy")


@needs_parser
async def test_a_profile_of_a_file(host: Path) -> None:
    (host / "files/broken").write_text("profile vmrt-unit {")
    (host / "files/mention").write_text("# vmrt-unit is elsewhere\nprofile other { file, }\n")
    (host / "files/real").write_text(PROFILE)
    policy = await apparmor.policy(context(ProfileType.LOCALHOST, "vmrt-unit"))
    assert policy is not None
    assert b"vmrt-unit" in policy.binary[:200]


async def test_no_such_profile(host: Path) -> None:
    (host / "files/off").write_text(PROFILE)
    (host / "files/disable/off").symlink_to(host / "files/off")
    with pytest.raises(InvalidArgumentError, match="AppArmor profile 'vmrt-unit' is not on this node"):
        await apparmor.policy(context(ProfileType.LOCALHOST, "vmrt-unit"))
