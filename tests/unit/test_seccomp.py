import json
from pathlib import Path

import pytest

from vmrt.errors import InvalidArgumentError
from vmrt.model import ProfileType, SecurityProfile
from vmrt.pods import seccomp

PROFILE = {
    "defaultAction": "SCMP_ACT_ERRNO",
    "defaultErrnoRet": 38,
    "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]}],
    "syscalls": [
        {"names": ["read"], "action": "SCMP_ACT_ALLOW"},
        {"names": ["mount"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
        {"names": ["mount"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1, "excludes": {"caps": ["CAP_SYS_ADMIN"]}},
        {"names": ["s390"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["s390x"]}},
        {"names": ["ptrace"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "4.8"}},
        {"name": "old", "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}]},
    ],
}


def names(resolved: dict[str, object], action: str) -> list[str]:
    rules = resolved["syscalls"]
    assert isinstance(rules, list)
    return [name for rule in rules if rule["action"] == action for name in rule["names"]]


def test_conditions_are_decided() -> None:
    plain = seccomp.resolve(PROFILE, (), "6.1.0-1-cloud")
    assert names(plain, "SCMP_ACT_ALLOW") == ["read", "ptrace", "old"]
    assert names(plain, "SCMP_ACT_ERRNO") == ["mount"]
    assert plain["architectures"] == ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]
    assert plain["defaultErrnoRet"] == 38
    assert all(set(r) <= {"names", "action", "args", "errnoRet"} for r in plain["syscalls"])
    admin = seccomp.resolve(PROFILE, ("CAP_SYS_ADMIN",), "4.4")
    assert names(admin, "SCMP_ACT_ALLOW") == ["read", "mount", "old"]


@pytest.mark.parametrize("bad", [{}, {"defaultAction": "x", "syscalls": [3]}, {"defaultAction": "x", "syscalls": 7}])
def test_a_malformed_profile_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(InvalidArgumentError, match="seccomp profile"):
        seccomp.resolve(bad, (), "6.1")


def test_localhost_profiles_are_read_from_the_node(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(PROFILE))
    for ref in (str(path), f"localhost/{path}"):
        assert seccomp.read(SecurityProfile(ProfileType.LOCALHOST, ref)) == PROFILE


@pytest.mark.parametrize("content", [b"not json", b"[1]", b" " * (seccomp.PROFILE_LIMIT_BYTES + 1)])
def test_bad_files_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(InvalidArgumentError, match=r"bad\.json"):
        seccomp.read(SecurityProfile(ProfileType.LOCALHOST, str(path)))


def test_a_reference_cannot_climb() -> None:
    with pytest.raises(InvalidArgumentError, match=r"\.\."):
        seccomp.read(SecurityProfile(ProfileType.LOCALHOST, "../../etc/shadow"))
