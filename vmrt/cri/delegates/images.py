"""CRI's ImageService over our store and those of the delegates, shown as one store.

An image is fetched to where its pod runs: kubelet says so with the pod's configuration, a newer one with the handler's
name; what neither tells goes to our own store. Ids are digests of the image's configuration on both sides, so an image
has the same id everywhere, and a client that has seen it in the one store may use it for a pod of the other: a
`Provider` then fetches it there, by its digest, before the container is made.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from vmrt.cri import specs
from vmrt.cri.delegates import merging, routing
from vmrt.cri.delegates.directory import Directory
from vmrt.cri.delegates.endpoint import LIST_S, Delegate, DelegateError, Kind
from vmrt.cri.image_service import registry_auth
from vmrt.errors import Code, ImageError, VmrtError
from vmrt.pods.drivers import ImageStore
from vmrt.proto.runtime.v1 import api_pb2 as cri
from vmrt.proto.runtime.v1 import api_pb2_grpc as cri_grpc

# Credentials of so many images are remembered, in memory only, for fetching the same image to the other side.
_CREDENTIALS = 64


class Provider:
    """Brings images to where containers need them."""

    def __init__(self, images: ImageStore, directory: Directory) -> None:
        self._images = images
        self._directory = directory
        self._credentials: OrderedDict[str, cri.AuthConfig] = OrderedDict()

    def remember(self, image_id: str, auth: cri.AuthConfig) -> None:
        """Note what an image was fetched with."""
        self._credentials.pop(image_id, None)
        if auth.ByteSize():
            self._credentials[image_id] = auth
            while len(self._credentials) > _CREDENTIALS:
                self._credentials.popitem(last=False)

    def find(self, reference: str) -> str:
        """Return the id of an image of our store, "" when it has none of this name."""
        found = self._images.get(reference)
        return "" if found is None else found.id

    async def provide_here(self, spec: cri.ImageSpec) -> None:
        """Fetch to our store what only a delegate has; an image that nobody has is no error of ours.

        `spec` then names the image by its id where our store does not know the name: a digest fetches no tag.
        """
        if not spec.image or self._images.get(specs.image_reference(spec, "config.image")) is not None:
            return
        for delegate in self._directory.delegates:
            image = await status_at(delegate, spec.image)
            if image is None:
                continue
            if self._images.get(image.id) is None:
                auth = registry_auth(self._credentials.get(image.id, cri.AuthConfig()))
                await self._fetch(image, "vmrt's store", lambda name, auth=auth: self._pull_here(name, auth))
            spec.image = image.id
            return

    async def provide_at(self, delegate: Delegate, spec: cri.ImageSpec, timeout_s: float | None) -> None:
        """Fetch to a delegate what only our store or another delegate has; `spec` changes as above."""
        if not spec.image or await status_at(delegate, spec.image) is not None:
            return
        image = await self._elsewhere(delegate, spec.image)
        if image is None:
            return  # its own answer is the best one
        if await status_at(delegate, image.id) is None:
            await self._fetch_at(delegate, image, timeout_s)
        spec.image = image.id

    async def _fetch_at(self, delegate: Delegate, image: cri.Image, timeout_s: float | None) -> None:
        auth = self._credentials.get(image.id)

        async def pull(name: str) -> str:
            request = cri.PullImageRequest(image=cri.ImageSpec(image=name), auth=auth)
            return str((await delegate.call("PullImage", request, timeout_s)).image_ref)

        await self._fetch(image, f"the delegate {delegate}", pull)

    async def _elsewhere(self, delegate: Delegate, reference: str) -> cri.Image | None:
        ours = self._images.get(reference)
        if ours is not None:
            return cri.Image(id=ours.id, repo_tags=ours.repo_tags, repo_digests=ours.repo_digests)
        for other in self._directory.delegates:
            if other is not delegate and (found := await status_at(other, reference)) is not None:
                return found
        return None

    async def _pull_here(self, name: str, auth: Any) -> str:
        return (await self._images.pull(name, auth)).id

    @staticmethod
    async def _fetch(image: cri.Image, where: str, pull: Any) -> None:
        """Fetch by each of an image's names, digests first, until one gives the same image."""
        failure = "it has no name to fetch it by"
        for name in (*image.repo_digests, *image.repo_tags):
            try:
                got = await pull(name)
            except VmrtError as e:
                failure = f"{name}: {e.message}"
                continue
            if got == image.id:
                return
            failure = f"{name} is {got} by now"
        raise ImageError(
            f"the image is needed in {where} and could not be fetched there: {failure}",
            phase="fetch image",
            resource=f"image {image.id}",
            hint="pull it there by hand, or let the registry answer",
        )


async def status_at(delegate: Delegate, reference: str) -> cri.Image | None:
    """Return a delegate's image, None when it has none; from its last list while it is down."""
    if not delegate.problem:
        with contextlib.suppress(DelegateError):
            request = cri.ImageStatusRequest(image=cri.ImageSpec(image=reference))
            reply = await delegate.query("ImageStatus", request, LIST_S)
            return reply.image if reply.HasField("image") else None
    return merging.named_image(delegate.known(Kind.IMAGES), reference)


class MergedImages(cri_grpc.ImageServiceServicer):
    """`local` is our own service."""

    def __init__(self, local: cri_grpc.ImageServiceServicer, directory: Directory, provider: Provider) -> None:
        self._local: Any = local
        self._directory = directory
        self._provider = provider

    async def ListImages(self, request: cri.ListImagesRequest, context: Any) -> Any:
        """One entry for each id."""
        ours = (await self._local.ListImages(request, context)).images
        return cri.ListImagesResponse(images=merging.merged_images(ours, await self._theirs(request.filter)))

    async def StreamImages(self, request: cri.StreamImagesRequest, context: Any) -> AsyncIterator[Any]:
        """As ListImages, an image a message."""
        reply = await self.ListImages(cri.ListImagesRequest(filter=request.filter), context)
        for image in reply.images:
            yield cri.StreamImagesResponse(images=[image])

    async def _theirs(self, wanted: cri.ImageFilter) -> list[cri.Image]:
        if not wanted.image.image:
            return await self._directory.listed(Kind.IMAGES)
        # Not every runtime minds a list's filter; all know how to find one image.
        found = await asyncio.gather(*(status_at(d, wanted.image.image) for d in self._directory.delegates))
        return [image for image in found if image is not None]

    async def ImageStatus(self, request: cri.ImageStatusRequest, context: Any) -> Any:
        """Ours, else a delegate's; that of one side where the request names the handler."""
        handler = request.image.runtime_handler
        chosen = self._serving(handler)
        if chosen is None:
            reply = await self._local.ImageStatus(request, context)
            if reply.HasField("image") or handler:
                return reply
        for delegate in self._directory.delegates if chosen is None else (chosen,):
            image = await status_at(delegate, request.image.image)
            if image is not None:
                return await self._status(delegate, image, request.verbose)
        return cri.ImageStatusResponse()

    @staticmethod
    async def _status(delegate: Delegate, image: cri.Image, verbose: bool) -> cri.ImageStatusResponse:
        info = {}
        if verbose:
            with contextlib.suppress(DelegateError):
                request = cri.ImageStatusRequest(image=cri.ImageSpec(image=image.id), verbose=True)
                info = dict((await delegate.query("ImageStatus", request, LIST_S)).info)
        return cri.ImageStatusResponse(image=image, info=info)

    def _serving(self, handler: str) -> Delegate | None:
        handlers = self._directory.handlers
        return self._directory.of_handler(handler) if handler in handlers and handlers[handler].endpoint else None

    async def PullImage(self, request: cri.PullImageRequest, context: Any) -> Any:
        """Fetch to where the pod runs."""
        registry_auth(request.auth)  # its fields are checked in the same way for both sides
        delegate, handler = await self._target(request)
        if delegate is None:
            reply = await self._local.PullImage(request, context)
        else:
            specs.image_reference(request.image, "image")
            theirs = cri.PullImageRequest()
            theirs.CopyFrom(request)
            theirs.image.runtime_handler = self._directory.handlers[handler].delegate_handler if handler else ""
            reply = await delegate.call("PullImage", theirs, context.time_remaining())
            delegate.learn(Kind.IMAGES, reply.image_ref)
        self._provider.remember(reply.image_ref, request.auth)
        return reply

    async def _target(self, request: cri.PullImageRequest) -> tuple[Delegate | None, str]:
        """Return the delegate that a request is for, and the handler as far as it was named."""
        handlers, named = self._directory.handlers, request.image.runtime_handler
        if named:
            return self._serving(named), named
        if not request.HasField("sandbox_config"):
            return None, ""
        # kubelet runs the sandbox before it pulls, so a pod of a delegate is there.
        delegate = await self._directory.of_pod(request.sandbox_config.metadata)
        if delegate is not None:
            return delegate, ""
        options = request.sandbox_config.linux.security_context.namespace_options
        routed = routing.route(handlers, "", options)
        return (self._directory.of_handler(routed), routed) if routed else (None, "")

    async def RemoveImage(self, request: cri.RemoveImageRequest, context: Any) -> Any:
        """Remove wherever it is; a delegate that is down and had it makes the call fail, so that it is tried again."""
        reference = specs.image_reference(request.image, "image")
        ours = self._provider.find(reference)
        results = await asyncio.gather(
            self._local.RemoveImage(request, context),
            *(self._remove_at(delegate, reference, ours, context) for delegate in self._directory.delegates),
            return_exceptions=True,
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results[0]

    async def _remove_at(self, delegate: Delegate, reference: str, ours: str, context: Any) -> None:
        # By id too: of one name the two stores may know different images, and then both go, as with one store.
        for name in dict.fromkeys([reference, *([ours] if ours else [])]):
            had = merging.named_image(delegate.known(Kind.IMAGES), name)
            if delegate.problem and had is None:
                continue
            request = cri.RemoveImageRequest(image=cri.ImageSpec(image=name))
            try:
                await delegate.call("RemoveImage", request, context.time_remaining())
            except DelegateError as e:
                # What was not there when it last answered need not be removed now that it does not.
                if e.code is not Code.NOT_FOUND and (e.code is not Code.UNAVAILABLE or had is not None):
                    raise
            if had is not None:
                delegate.forget(Kind.IMAGES, had.id)

    async def ImageFsInfo(self, request: cri.ImageFsInfoRequest, context: Any) -> Any:
        """Ours first; what delegates keep on the same file system is added to it."""
        reply = await self._local.ImageFsInfo(request, context)
        told = await asyncio.gather(
            *(d.query("ImageFsInfo", request, LIST_S) for d in self._directory.delegates), return_exceptions=True
        )
        theirs = [usage for each in told if not isinstance(each, BaseException) for usage in each.image_filesystems]
        places = [usage.fs_id.mountpoint for usage in (*reply.image_filesystems, *theirs)]
        devices = await asyncio.to_thread(_devices, places)
        return cri.ImageFsInfoResponse(
            image_filesystems=merging.merged_usage(reply.image_filesystems, theirs, devices),
            container_filesystems=reply.container_filesystems,
        )


def _devices(places: Sequence[str]) -> dict[str, int]:
    """Return on which device each directory lies; those that cannot be looked at are left out."""
    found = {}
    for place in places:
        with contextlib.suppress(OSError, ValueError):
            found[place] = Path(place).stat().st_dev
    return found
