"""Images mounted as volumes: the layers become disks of the VM, the agent stacks them read-only beside the container.

A volume of an image has neither a writable layer nor device nodes that work nor setuid programs that count. What of it
is looked up (the sub path) is looked up in the guest, inside the image: a symbolic link cannot lead out of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from vmrt.agent import agent_pb2 as pb
from vmrt.agent import layout
from vmrt.errors import ImageVolumeError
from vmrt.model import Image, Mount
from vmrt.pods.drivers import ImageStore
from vmrt.pods.layer_disks import serial
from vmrt.pods.oci import BoundMount

Volumes = dict[int, Image]
"""The images by their mount's place in the list of mounts."""


def find(images: ImageStore, mounts: Sequence[Mount]) -> Volumes:
    """Return the image of each mount that has one. Raises `ImageVolumeError` for one that is not on this node."""
    found = {}
    for index, mount in enumerate(mounts):
        if not mount.image:
            continue
        image = images.get(mount.image)
        if image is None:
            raise ImageVolumeError(
                f"config.mounts[{index}]: the image {mount.image!r} is not on this node", hint="pull or load it first"
            )
        if not image.layers:
            raise ImageVolumeError(f"config.mounts[{index}]: the image {mount.image!r} has no layers")
        found[index] = image
    return found


def ids(volumes: Volumes, count: int) -> tuple[str, ...]:
    """Return the image id for each of `count` mounts, "" for those without; () when no mount has one."""
    return tuple(volumes[index].id if index in volumes else "" for index in range(count)) if volumes else ()


def storages(volumes: Volumes, mounts: Sequence[Mount]) -> list[pb.Storage]:
    """Return what the agent has to mount before the container's own mounts."""
    return [
        pb.Storage(
            name=_name(index),
            readonly=True,
            image=pb.ImageStorage(
                layer_serials=[serial(layer) for layer in image.layers], sub_path=mounts[index].image_sub_path
            ),
        )
        for index, image in volumes.items()
    ]


def bound(volumes: Volumes, mounts: Sequence[Mount], container_id: str) -> tuple[BoundMount, ...]:
    """Return the mounts with the guest paths where `storages` puts them."""
    directory = f"{layout.CONTAINERS}/{container_id}/storage"
    return tuple(BoundMount(mounts[index], f"{directory}/{_name(index)}") for index in volumes)


def _name(index: int) -> str:
    return f"mount-{index}"
