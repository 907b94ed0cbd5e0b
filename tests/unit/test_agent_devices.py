"""Device nodes from /dev into an OCI specification."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from vmrt.agent import agent_pb2 as pb
from vmrt.agent import devices, process, status


def resolve(**fields: str) -> list[devices.Node]:
    return devices.resolve([pb.DeviceNode(**fields)], process.Reaper(), time.monotonic())


def test_a_node_and_its_rule() -> None:
    spec: dict[str, Any] = {"linux": {"resources": {"devices": [{"allow": False, "access": "rwm"}]}}}
    devices.add(spec, resolve(path="/dev/void", guest_path="/dev/null", permissions="r"), bind=False)
    assert spec["linux"]["resources"]["devices"] == [
        {"allow": False, "access": "rwm"},
        {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "r"},
    ]
    (node,) = spec["linux"]["devices"]
    mode = os.stat("/dev/null").st_mode & 0o777  # noqa: PTH116
    assert node == {"path": "/dev/void", "type": "c", "major": 1, "minor": 3, "fileMode": mode, "uid": 0, "gid": 0}


def test_in_a_user_namespace_it_is_bound() -> None:
    spec: dict[str, Any] = {"linux": {}}
    devices.add(spec, resolve(path="/dev/void", guest_path="/dev/null"), bind=True)
    assert "devices" not in spec["linux"]
    assert spec["mounts"] == [
        {"destination": "/dev/void", "type": "bind", "source": "/dev/null", "options": ["bind", "rw"]}
    ]
    assert spec["linux"]["resources"]["devices"] == [
        {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rwm"}
    ]


@pytest.mark.parametrize(
    ("path", "code", "message"),
    [
        ("/dev/absent", status.FAILED_PRECONDITION, "the guest has no /dev/absent"),
        ("/dev/../etc/passwd", status.INVALID_ARGUMENT, "is not below /dev"),
        ("/etc/passwd", status.INVALID_ARGUMENT, "is not below /dev"),
        ("/dev/fd", status.INVALID_ARGUMENT, "is no device"),
    ],
)
def test_refused(path: str, code: int, message: str) -> None:
    with pytest.raises(status.AgentError, match=message) as caught:
        resolve(path="/dev/x", guest_path=path)
    assert caught.value.code == code


def test_everything_but_what_a_containers_dev_has_of_its_own() -> None:
    paths = {node.path for node in devices.everything()}
    assert paths
    assert not paths & {"/dev/null", "/dev/tty", "/dev/ptmx", "/dev/console"}
    assert not any(path.startswith(("/dev/pts/", "/dev/shm/", "/dev/mqueue/")) for path in paths)
