"""Which devices a container can have."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmrt.errors import InvalidArgumentError, UnsupportedError, VmrtError
from vmrt.model import Device
from vmrt.pods import devices


def test_a_device_that_the_guests_kernel_has_too() -> None:
    # Whether the host has /dev/net/tun does not matter: the guest's is meant.
    (node,) = devices.nodes([Device("/dev/tunnel", "/dev/net/tun", "rw")])
    assert (node.path, node.guest_path, node.permissions) == ("/dev/tunnel", "/dev/net/tun", "rw")
    assert node.WhichOneof("source") == "guest_path"


@pytest.mark.parametrize(
    ("host_path", "message", "kind"),
    [
        ("/dev/ptmx", "config.devices[0].host_path is '/dev/ptmx', a character device of the host", UnsupportedError),
        ("/dev/no-such", "config.devices[0].host_path is '/dev/no-such': No such file", InvalidArgumentError),
        ("/dev", "config.devices[0].host_path is '/dev', which is no device", InvalidArgumentError),
    ],
)
def test_refused_by_name(host_path: str, message: str, kind: type[VmrtError]) -> None:
    with pytest.raises(kind) as caught:
        devices.nodes([Device("/dev/x", host_path, "rw")])
    assert message in str(caught.value)


def test_a_link_is_followed(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(os.devnull)
    with pytest.raises(UnsupportedError, match="character device"):
        devices.nodes([Device("/dev/x", str(link), "rw")])
