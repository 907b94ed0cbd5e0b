"""The command line's service (`proto/vmrt/v1/control.proto`): what CRI has no call for.

Progress is coalesced: of each step only the latest figures wait for a slow reader, so no amount of progress fills the
daemon's memory, and the reader sets the pace.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import vmrt
from vmrt.cri import fields
from vmrt.cri.image_service import registry_auth
from vmrt.cri.ports import Pods
from vmrt.errors import NotFoundError
from vmrt.model import Image
from vmrt.pods.drivers import ImageStore, Progress
from vmrt.proto.vmrt.v1 import control_pb2 as control
from vmrt.proto.vmrt.v1 import control_pb2_grpc as control_grpc


async def image_events(
    work: Callable[[Progress], Awaitable[Iterable[Image]]],
) -> AsyncGenerator[control.ImageEvent, None]:
    """Run `work` and yield its progress, then its images; closing the iterator cancels the work and waits for it."""
    loop = asyncio.get_running_loop()
    latest: dict[str, control.Progress] = {}
    news = asyncio.Event()

    def note(what: str, done: int, total: int) -> None:
        latest[what] = control.Progress(what=what, done=max(0, done), total=max(0, total))
        news.set()

    def progress(what: str, done: int, total: int) -> None:
        # Conversions report from worker threads.
        loop.call_soon_threadsafe(note, what, done, total)

    async def run() -> Iterable[Image]:
        return await work(progress)

    task = asyncio.create_task(run())
    task.add_done_callback(lambda _: news.set())
    try:
        finished = False
        while not finished:
            await news.wait()
            news.clear()
            finished = task.done()
            waiting = list(latest.values())
            latest.clear()
            for step in waiting:
                yield control.ImageEvent(progress=step)
        for image in await task:
            yield control.ImageEvent(image=_summary(image))
    finally:
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def _summary(image: Image) -> control.ImageSummary:
    return control.ImageSummary(
        id=image.id, repo_tags=image.repo_tags, repo_digests=image.repo_digests, size_bytes=image.size_bytes
    )


def _as_json(info: Mapping[str, str]) -> str:
    """Join CRI's info (JSON values) into one JSON object; a value that is not JSON becomes a string."""
    values: dict[str, object] = {}
    for key, value in info.items():
        try:
            values[key] = json.loads(value)
        except ValueError:
            values[key] = value
    return json.dumps(values, indent=2)


class ControlService(control_grpc.ControlServicer):
    """Served beside CRI's services, on the same socket."""

    def __init__(self, pods: Pods, images: ImageStore) -> None:
        self._pods = pods
        self._images = images

    async def Ping(self, request: control.PingRequest, context: Any) -> control.PingResponse:
        """Say who answers."""
        return control.PingResponse(version=vmrt.__version__, pid=os.getpid())

    async def LoadImages(self, request: control.LoadImagesRequest, context: Any) -> AsyncIterator[control.ImageEvent]:
        """Import from a path on this host."""
        path = Path(fields.absolute_path(request.path, "path", required=True))
        tag = fields.text(request.tag, "tag")
        async with contextlib.aclosing(
            image_events(lambda progress: self._images.load(path, tag=tag, progress=progress))
        ) as events:
            async for event in events:
                yield event

    async def PullImage(self, request: control.PullImageRequest, context: Any) -> AsyncIterator[control.ImageEvent]:
        """Fetch, with progress."""
        reference = fields.text(request.reference, "reference", required=True)
        auth = registry_auth(request.auth)

        async def pull(progress: Progress) -> Iterable[Image]:
            return (await self._images.pull(reference, auth, progress=progress),)

        async with contextlib.aclosing(image_events(pull)) as events:
            async for event in events:
                yield event

    async def Inspect(self, request: control.InspectRequest, context: Any) -> control.InspectResponse:
        """Find a sandbox, else a container."""
        wanted = fields.text(request.id, "id", required=True, limit=1024)
        with contextlib.suppress(NotFoundError):
            sandbox = self._pods.sandbox(wanted)
            return control.InspectResponse(kind="sandbox", json=_as_json(await self._pods.sandbox_info(sandbox.id)))
        try:
            container = self._pods.container(wanted)
        except NotFoundError as e:
            raise NotFoundError(f"there is no sandbox or container {fields.short(wanted)}") from e
        return control.InspectResponse(kind="container", json=_as_json(await self._pods.container_info(container.id)))
