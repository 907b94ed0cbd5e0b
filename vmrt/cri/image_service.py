"""CRI's ImageService over the image store: each call translates, asks once, and translates back."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from vmrt.cri import fields, specs, statuses
from vmrt.model import Image, RegistryAuth
from vmrt.pods.drivers import ImageStore
from vmrt.proto.runtime.v1 import api_pb2 as cri
from vmrt.proto.runtime.v1 import api_pb2_grpc as cri_grpc
from vmrt.proto.vmrt.v1 import control_pb2 as control

_SECRET_LIMIT_BYTES = 64 * 1024  # registry tokens are JWTs of some kilobytes


def registry_auth(auth: cri.AuthConfig | control.RegistryAuth) -> RegistryAuth | None:
    """Translate credentials; None when there are none. Errors name the field and never quote it."""
    if not (auth.username or auth.password or auth.auth or auth.identity_token or auth.registry_token):
        return None
    for key in ("username", "password", "auth", "identity_token", "registry_token"):
        fields.text(getattr(auth, key), f"auth.{key}", limit=_SECRET_LIMIT_BYTES)
    return RegistryAuth(
        username=auth.username,
        password=auth.password,
        auth=auth.auth,
        server_address=fields.text(auth.server_address, "auth.server_address"),
        identity_token=auth.identity_token,
        registry_token=auth.registry_token,
    )


def image_info(image: Image) -> dict[str, str]:
    """Return the details of a verbose ImageStatus, JSON values."""
    layers = [
        {"diff_id": layer.diff_id, "path": str(layer.path), "size_bytes": layer.size_bytes} for layer in image.layers
    ]
    return {"config": json.dumps(dataclasses.asdict(image.config)), "layers": json.dumps(layers)}


class ImageService(cri_grpc.ImageServiceServicer):
    """Every image is for every handler, so an ImageSpec's runtime_handler makes no difference."""

    def __init__(self, images: ImageStore) -> None:
        self._images = images

    async def ListImages(self, request: cri.ListImagesRequest, context: Any) -> cri.ListImagesResponse:
        """From memory."""
        found = self._images.list(fields.text(request.filter.image.image, "filter.image.image"))
        return cri.ListImagesResponse(images=[statuses.image_message(image) for image in found])

    async def ImageStatus(self, request: cri.ImageStatusRequest, context: Any) -> cri.ImageStatusResponse:
        """From memory; an absent image is an empty reply."""
        image = self._images.get(specs.image_reference(request.image, "image"))
        if image is None:
            return cri.ImageStatusResponse()
        return cri.ImageStatusResponse(
            image=statuses.image_message(image), info=image_info(image) if request.verbose else None
        )

    async def PullImage(self, request: cri.PullImageRequest, context: Any) -> cri.PullImageResponse:
        """Fetch; the client gives up by cancelling, which cancels the store's work."""
        reference = specs.image_reference(request.image, "image")
        image = await self._images.pull(reference, registry_auth(request.auth))
        return cri.PullImageResponse(image_ref=image.id)

    async def RemoveImage(self, request: cri.RemoveImageRequest, context: Any) -> cri.RemoveImageResponse:
        """Remove with all names; an absent image is no error."""
        await self._images.remove(specs.image_reference(request.image, "image"))
        return cri.RemoveImageResponse()

    async def ImageFsInfo(self, request: cri.ImageFsInfoRequest, context: Any) -> cri.ImageFsInfoResponse:
        """Figures of the store's file system. Writable layers are inside the VMs' scratch disks: none are told."""
        directory, used_bytes, inodes_used = await self._images.usage()
        usage = cri.FilesystemUsage(
            timestamp=time.time_ns(),
            fs_id=cri.FilesystemIdentifier(mountpoint=str(directory)),
            used_bytes=cri.UInt64Value(value=used_bytes),
            inodes_used=cri.UInt64Value(value=inodes_used),
        )
        return cri.ImageFsInfoResponse(image_filesystems=[usage])

    async def StreamImages(
        self, request: cri.StreamImagesRequest, context: Any
    ) -> AsyncIterator[cri.StreamImagesResponse]:
        """As ListImages, an image a message."""
        for image in self._images.list(fields.text(request.filter.image.image, "filter.image.image")):
            yield cri.StreamImagesResponse(images=[statuses.image_message(image)])
