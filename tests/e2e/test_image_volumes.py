"""Images mounted as volumes: content, sub paths, refusals, and an image that is removed while it is in use."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from demo import busybox_image
from demo.busybox_image import File
from demo.daemon import Daemon
from tests.e2e.conftest import IMAGE, Pod
from tests.e2e.failures import refused
from vmrt.proto.runtime.v1 import api_pb2 as cri

VOLUME = "docker.io/library/vmrt-volume:latest"


@pytest.fixture
def volume(daemon: Daemon, tmp_path: Path) -> str:
    """An image of two layers, the upper one of which changes a file of the lower one; returns its id."""
    lower = busybox_image.layer(
        {
            "models/weights": File(b"old\n"),
            "models/shape": File(b"3x3\n"),
            "bin/tool": File(b"#!/bin/sh\necho ran\n", 0o755),
        }
    )
    upper = busybox_image.layer({"models/weights": File(b"new\n")})
    busybox_image.write_layout(tmp_path / "volume", VOLUME, [lower, upper], {})
    return daemon.load(tmp_path / "volume")


def image_mount(inside: str, image: str, sub_path: str = "", *, readonly: bool = True) -> cri.Mount:
    spec = cri.ImageSpec(image=image, user_specified_image=VOLUME)
    return cri.Mount(container_path=inside, readonly=readonly, image=spec, image_sub_path=sub_path)


def test_image_volumes(daemon: Daemon, pod: Pod, volume: str) -> None:
    mounts = [
        image_mount("/all", volume),
        image_mount("/models", VOLUME, "models"),
        image_mount("/etc/shape", volume[:20], "models/shape"),
        # The container's own image, at the same time: its layers serve both.
        image_mount("/self", IMAGE, "srv"),
    ]
    script = (
        "cat /all/models/weights /all/models/shape /models/weights /etc/shape /self/index.html; /all/bin/tool;"
        "touch /all/x /models/x; mount -o remount,rw /all; ls /models"
    )
    container = pod.create("sh", "-c", script, mounts=mounts)
    told = pod.status(container).mounts
    assert [(m.container_path, m.image.image_ref, m.image_sub_path) for m in told[:3]] == [
        ("/all", volume, ""),
        ("/models", volume, "models"),
        ("/etc/shape", volume, "models/shape"),
    ]
    assert told[3].image.image_ref == pod.status(container).image_id
    # What a container was made of stays until the container is removed.
    daemon.images.RemoveImage(cri.RemoveImageRequest(image=cri.ImageSpec(image=VOLUME)))
    assert not daemon.images.ImageStatus(cri.ImageStatusRequest(image=cri.ImageSpec(image=VOLUME))).image.id
    layers = set((daemon.root / "images/layers").iterdir())
    pod.start(container)
    ended = pod.wait(container)
    out = [line.split(" ", 3)[1::2] for line in Path(ended.log_path).read_text().splitlines()]
    page = "hello from a container in a virtual machine"
    assert [text for stream, text in out if stream == "stdout"] == [
        *("new", "3x3", "new", "3x3", page, "ran"),
        *("shape", "weights"),
    ]
    errors = [text for stream, text in out if stream == "stderr"]
    assert errors[:2] == [f"touch: {path}: Read-only file system" for path in ("/all/x", "/models/x")]
    assert "denied" in errors[2]
    pod.remove(container)
    assert len(layers - set((daemon.root / "images/layers").iterdir())) == 2


@pytest.mark.parametrize(
    ("mount", "code", "begins"),
    [
        (
            image_mount("/v", VOLUME, "absent"),
            grpc.StatusCode.UNKNOWN,
            "ImageVolumeMountFailed: storage mount-0: path 'absent': No such file",
        ),
        (
            image_mount("/v", "docker.io/library/never:1"),
            grpc.StatusCode.UNKNOWN,
            "ImageVolumeMountFailed: config.mounts[0]: the image 'docker.io/library/never:1' is not on this node",
        ),
        (image_mount("/v", VOLUME, readonly=False), grpc.StatusCode.INVALID_ARGUMENT, "config.mounts[0].readonly"),
    ],
    ids=["sub path", "image", "writable"],
)
def test_an_image_volume_that_cannot_be(
    daemon: Daemon, pod: Pod, volume: str, mount: cri.Mount, code: grpc.StatusCode, begins: str
) -> None:
    with refused(daemon, code) as refusal:
        pod.create("true", mounts=[mount])
    assert refusal.text.startswith(begins)
