"""CDI specifications: found, read, and turned into what a container gets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vmrt.errors import InvalidArgumentError, UnsupportedError, VmrtError
from vmrt.model import ContainerSpec, Device, Mount
from vmrt.pods import cdi

SPEC = ContainerSpec(name="c", image="i", envs=(("A", "1"),), devices=(Device("/dev/a", "/dev/a", "r"),))
ONE = """{
  "cdiVersion": "0.6.0", "kind": "vendor.com/net",
  "containerEdits": {"env": ["GENERAL=yes"]},
  "devices": [
    {"name": "tun", "containerEdits": {
      "env": ["A=2", "EMPTY="],
      "deviceNodes": [{"path": "/dev/net/tun", "major": 10, "minor": 200}, {"path": "/dev/x", "hostPath": "/dev/fuse",
        "permissions": "rw"}],
      "mounts": [{"hostPath": "/srv", "containerPath": "/vendor", "options": ["ro", "bind"]}],
      "additionalGids": [44]
    }},
    {"name": "other", "containerEdits": {"env": ["OTHER=1"]}}
  ]
}"""


@pytest.fixture
def directories(tmp_path: Path) -> tuple[Path, Path]:
    first, second = tmp_path / "etc", tmp_path / "run"
    first.mkdir()
    second.mkdir()
    (first / "vendor.json").write_text(ONE)
    return first, second


def applied(directories: tuple[Path, Path], *names: str) -> ContainerSpec:
    return cdi.applied(replace(SPEC, cdi_devices=names), directories)


def test_edits(directories: tuple[Path, Path]) -> None:
    spec = applied(directories, "vendor.com/net=tun", "vendor.com/net=other")
    assert spec.envs == (("A", "1"), ("GENERAL", "yes"), ("A", "2"), ("EMPTY", ""), ("OTHER", "1"))
    assert spec.devices == (
        Device("/dev/a", "/dev/a", "r"),
        Device("/dev/net/tun", "/dev/net/tun", "rwm"),
        Device("/dev/x", "/dev/fuse", "rw"),
    )
    assert spec.mounts == (Mount("/vendor", "/srv", readonly=True),)
    assert spec.security.supplemental_groups == (44,)


def test_the_later_directory_counts(directories: tuple[Path, Path]) -> None:
    (directories[1] / "vendor.json").write_text(ONE.replace("OTHER=1", "OTHER=2"))
    assert ("OTHER", "2") in applied(directories, "vendor.com/net=other").envs


def test_yaml(directories: tuple[Path, Path]) -> None:
    pytest.importorskip("yaml")
    (directories[1] / "gpu.yaml").write_text(
        "cdiVersion: 0.5.0\nkind: vendor.com/gpu\ndevices:\n- name: '0'\n  containerEdits:\n    env: [GPU=0]\n"
    )
    assert ("GPU", "0") in applied(directories, "vendor.com/gpu=0").envs


def test_two_of_one_directory_conflict(directories: tuple[Path, Path]) -> None:
    (directories[0] / "zwei.json").write_text(ONE)
    with pytest.raises(InvalidArgumentError, match=r"'vendor.com/net=tun' is defined by .*vendor.json and .*zwei.json"):
        applied(directories, "vendor.com/net=tun")


def test_unknown_device_tells_of_a_broken_file(directories: tuple[Path, Path]) -> None:
    (directories[1] / "broken.json").write_text('{"cdiVersion": "0.6.0", "kind": 5}')
    with pytest.raises(
        InvalidArgumentError, match=r"no CDI specification defines the device 'vendor.com/net=none'"
    ) as e:
        applied(directories, "vendor.com/net=none")
    assert "broken.json cannot be read" in e.value.hint
    assert applied(directories, "vendor.com/net=other").envs  # what is not broken works


@pytest.mark.parametrize(
    ("edits", "named"),
    [
        ('"hooks": [{"hookName": "createContainer", "path": "/bin/x"}]', "hooks"),
        ('"intelRdt": {"closID": "x"}', "intelRdt"),
        ('"netDevices": [{"hostInterfaceName": "eth1", "name": "eth1"}]', "netDevices"),
    ],
)
def test_what_a_vm_cannot_do(directories: tuple[Path, Path], edits: str, named: str) -> None:
    (directories[1] / "v.json").write_text(ONE.replace('"env": ["OTHER=1"]', edits))
    with pytest.raises(UnsupportedError, match=f"the CDI device 'vendor.com/net=other' wants {named}"):
        applied(directories, "vendor.com/net=other")


def test_env_and_version_are_checked(directories: tuple[Path, Path]) -> None:
    (directories[1] / "v.json").write_text(ONE.replace("OTHER=1", "OTHER"))
    with pytest.raises(InvalidArgumentError, match="sets 'OTHER', which is no NAME=value"):
        applied(directories, "vendor.com/net=other")
    with pytest.raises(VmrtError, match=r"has the unknown version '2.0.0'"):
        cdi.parse(ONE.replace("0.6.0", "2.0.0").encode(), Path("/x.json"))
