"""User ids for VMs: one each, also when daemons share a machine, die, or leave entries behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmrt.config import HypervisorConfig
from vmrt.errors import ExhaustedError
from vmrt.hypervisor import vm_users
from vmrt.hypervisor.vm_users import VmUsers


def directories(parent: Path, count: int) -> list[Path]:
    found = [parent / f"vm{number}" for number in range(count)]
    for directory in found:
        directory.mkdir()
    return found


def test_no_id_is_given_twice_by_daemons_of_one_machine(tmp_path: Path) -> None:
    daemons = [VmUsers(5000, 20, taken=tmp_path / "taken") for _ in range(2)]
    taken = [daemons[number % 2].take(d).uid for number, d in enumerate(directories(tmp_path, 20))]
    assert sorted(taken) == list(range(5000, 5020))
    (extra,) = directories(tmp_path / "taken", 1)
    with pytest.raises(ExhaustedError, match="20 user ids"):
        daemons[0].take(extra)


def test_an_id_is_free_again_when_its_vm_is_gone(tmp_path: Path) -> None:
    users = VmUsers(5000, 1, taken=tmp_path / "taken")
    first, second = directories(tmp_path, 2)
    assert users.take(first).owner == (5000, 5000)
    users.give_back(5000, second)
    with pytest.raises(ExhaustedError):
        users.take(second)
    users.give_back(5000, first)
    users.give_back(5000, first)
    assert users.take(second).uid == 5000
    # A daemon that was killed between the removal of the directory and the entry's.
    second.rmdir()
    assert users.take(first).uid == 5000


def test_kvms_group(tmp_path: Path) -> None:
    (directory,) = directories(tmp_path, 1)
    user = VmUsers(5000, 1, gid=36, taken=tmp_path / "taken").take(directory)
    assert (user.owner, user.groups) == ((5000, 36), frozenset((36,)))


@pytest.mark.parametrize(
    ("uid_map", "there"),
    [
        ("         0          0 4294967295\n", True),
        ("         0     100000       5000\n", False),
        ("0 1000 1\n1 100000 6000\n", True),
        ("0 1000 1\n1 100000 5010\n", False),
    ],
)
def test_whether_the_ids_exist(uid_map: str, there: bool) -> None:
    assert vm_users.mapped(5000, 100, uid_map) is there


def test_turned_off(tmp_path: Path) -> None:
    assert vm_users.choose(HypervisorConfig(vm_uid_base=0), tmp_path, "tcg") is None
