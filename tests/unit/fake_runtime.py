"""Another CRI runtime on a socket, for what delegates do wrong: slow, hanging, refusing, without newer calls, gone.

It keeps sandboxes, containers and images in dictionaries. `hanging`, `missing` and `errors` name calls by method.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from vmrt.cri.outcome import unimplemented
from vmrt.proto.runtime.v1 import api_pb2 as cri
from vmrt.proto.runtime.v1 import api_pb2_grpc as cri_grpc


class _Faults(grpc.aio.ServerInterceptor):
    def __init__(self, runtime: FakeRuntime) -> None:
        self._runtime = runtime

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method.rpartition("/")[2]
        if handler is None or not handler.unary_unary:
            return handler

        async def call(request: Any, context: Any) -> Any:
            await self._runtime.enter(method, request, context)
            return await handler.unary_unary(request, context)

        return grpc.unary_unary_rpc_method_handler(
            call, request_deserializer=handler.request_deserializer, response_serializer=handler.response_serializer
        )


class FakeRuntime(cri_grpc.RuntimeServiceServicer, cri_grpc.ImageServiceServicer):
    """`start` and `stop` as often as wanted, on the same socket; what it has stays, as pods do."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.endpoint = f"unix://{path}"
        self.sandboxes: dict[str, cri.PodSandbox] = {}
        self.configs: dict[str, cri.PodSandboxConfig] = {}
        self.containers: dict[str, cri.Container] = {}
        self.images: dict[str, cri.Image] = {}
        self.registry: dict[str, cri.Image] = {}
        self.requests: list[tuple[str, Any]] = []
        self.calls: Counter[str] = Counter()
        self.cancelled: Counter[str] = Counter()
        self.hanging: set[str] = set()
        self.missing: set[str] = set()
        self.errors: dict[str, tuple[grpc.StatusCode, str]] = {}
        self.after_effect: set[str] = set()
        self.features: list[cri.RuntimeHandler] = []
        self.descriptors: list[cri.MetricDescriptor] = []
        self.pod_metrics: list[cri.PodSandboxMetrics] = []
        self.events: list[asyncio.Queue[cri.ContainerEventResponse | None]] = []
        self._server: grpc.aio.Server | None = None
        self._made = 0

    async def start(self) -> None:
        self._server = grpc.aio.server(interceptors=(_Faults(self),))
        cri_grpc.add_RuntimeServiceServicer_to_server(self, self._server)
        cri_grpc.add_ImageServiceServicer_to_server(self, self._server)
        self._server.add_insecure_port(self.endpoint)
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(0)
            self._server = None
        self.path.unlink(missing_ok=True)

    async def enter(self, method: str, request: Any, context: Any) -> None:
        self.calls[method] += 1
        self.requests.append((method, request))
        if method in self.missing:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"unknown method {method}")
        if method in self.errors and method not in self.after_effect:
            await context.abort(*self.errors[method])
        if method in self.hanging:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled[method] += 1
                raise

    def asked(self, method: str) -> list[Any]:
        """The requests that were made by a method."""
        return [request for name, request in self.requests if name == method]

    def _ident(self) -> str:
        self._made += 1
        return f"{self._made:02x}" + "f" * 62

    # --- the runtime ---

    async def Version(self, request: Any, context: Any) -> Any:
        return cri.VersionResponse(version="0.1.0", runtime_name="fake", runtime_version="1.0.0")

    async def Status(self, request: Any, context: Any) -> Any:
        status = cri.RuntimeStatus(
            conditions=[
                cri.RuntimeCondition(type="RuntimeReady", status=True),
                cri.RuntimeCondition(type="NetworkReady", status=True),
            ]
        )
        return cri.StatusResponse(status=status, runtime_handlers=self.features)

    async def UpdateRuntimeConfig(self, request: Any, context: Any) -> Any:
        return cri.UpdateRuntimeConfigResponse()

    async def RunPodSandbox(self, request: Any, context: Any) -> Any:
        ident, config = self._ident(), request.config
        self.configs[ident] = config
        self.sandboxes[ident] = cri.PodSandbox(
            id=ident,
            metadata=config.metadata,
            state=cri.SANDBOX_READY,
            created_at=1,
            labels=config.labels,
            annotations=config.annotations,
            runtime_handler=request.runtime_handler,
        )
        if "RunPodSandbox" in self.errors:
            await context.abort(*self.errors["RunPodSandbox"])
        return cri.RunPodSandboxResponse(pod_sandbox_id=ident)

    async def StopPodSandbox(self, request: Any, context: Any) -> Any:
        if request.pod_sandbox_id in self.sandboxes:
            self.sandboxes[request.pod_sandbox_id].state = cri.SANDBOX_NOTREADY
        return cri.StopPodSandboxResponse()

    async def RemovePodSandbox(self, request: Any, context: Any) -> Any:
        self.sandboxes.pop(request.pod_sandbox_id, None)
        self.containers = {k: c for k, c in self.containers.items() if c.pod_sandbox_id != request.pod_sandbox_id}
        return cri.RemovePodSandboxResponse()

    async def PodSandboxStatus(self, request: Any, context: Any) -> Any:
        item = await self._found(self.sandboxes, request.pod_sandbox_id, context)
        status = cri.PodSandboxStatus(
            id=item.id,
            metadata=item.metadata,
            state=item.state,
            created_at=1,
            labels=item.labels,
            annotations=item.annotations,
            runtime_handler=item.runtime_handler,
        )
        status.linux.namespaces.options.network = cri.NODE
        return cri.PodSandboxStatusResponse(status=status, info={"info": '{"pid": 7}'} if request.verbose else {})

    async def ListPodSandbox(self, request: Any, context: Any) -> Any:
        return cri.ListPodSandboxResponse(items=self.sandboxes.values())

    async def CreateContainer(self, request: Any, context: Any) -> Any:
        await self._found(self.sandboxes, request.pod_sandbox_id, context)
        ident, config = self._ident(), request.config
        self.containers[ident] = cri.Container(
            id=ident,
            pod_sandbox_id=request.pod_sandbox_id,
            metadata=config.metadata,
            image=config.image,
            image_ref=config.image.image,
            created_at=1,
            labels=config.labels,
        )
        return cri.CreateContainerResponse(container_id=ident)

    async def StartContainer(self, request: Any, context: Any) -> Any:
        (await self._found(self.containers, request.container_id, context)).state = cri.CONTAINER_RUNNING
        return cri.StartContainerResponse()

    async def StopContainer(self, request: Any, context: Any) -> Any:
        if request.container_id in self.containers:
            self.containers[request.container_id].state = cri.CONTAINER_EXITED
        return cri.StopContainerResponse()

    async def RemoveContainer(self, request: Any, context: Any) -> Any:
        self.containers.pop(request.container_id, None)
        return cri.RemoveContainerResponse()

    async def ListContainers(self, request: Any, context: Any) -> Any:
        return cri.ListContainersResponse(containers=self.containers.values())

    async def ContainerStatus(self, request: Any, context: Any) -> Any:
        item = await self._found(self.containers, request.container_id, context)
        return cri.ContainerStatusResponse(status=cri.ContainerStatus(id=item.id, state=item.state))

    async def UpdateContainerResources(self, request: Any, context: Any) -> Any:
        return cri.UpdateContainerResourcesResponse()

    async def ReopenContainerLog(self, request: Any, context: Any) -> Any:
        return cri.ReopenContainerLogResponse()

    async def ExecSync(self, request: Any, context: Any) -> Any:
        return cri.ExecSyncResponse(stdout=b"theirs")

    async def Exec(self, request: Any, context: Any) -> Any:
        return cri.ExecResponse(url="http://theirs/exec")

    async def Attach(self, request: Any, context: Any) -> Any:
        return cri.AttachResponse(url="http://theirs/attach")

    async def PortForward(self, request: Any, context: Any) -> Any:
        return cri.PortForwardResponse(url="http://theirs/portforward")

    async def CheckpointContainer(self, request: Any, context: Any) -> Any:
        return cri.CheckpointContainerResponse()

    async def ContainerStats(self, request: Any, context: Any) -> Any:
        item = await self._found(self.containers, request.container_id, context)
        return cri.ContainerStatsResponse(stats=cri.ContainerStats(attributes=cri.ContainerAttributes(id=item.id)))

    async def ListContainerStats(self, request: Any, context: Any) -> Any:
        stats = [cri.ContainerStats(attributes=cri.ContainerAttributes(id=ident)) for ident in self.containers]
        return cri.ListContainerStatsResponse(stats=stats)

    async def PodSandboxStats(self, request: Any, context: Any) -> Any:
        item = await self._found(self.sandboxes, request.pod_sandbox_id, context)
        return cri.PodSandboxStatsResponse(stats=self._stats(item))

    async def ListPodSandboxStats(self, request: Any, context: Any) -> Any:
        return cri.ListPodSandboxStatsResponse(stats=map(self._stats, self.sandboxes.values()))

    @staticmethod
    def _stats(item: cri.PodSandbox) -> cri.PodSandboxStats:
        return cri.PodSandboxStats(attributes=cri.PodSandboxAttributes(id=item.id, annotations=item.annotations))

    async def UpdatePodSandboxResources(self, request: Any, context: Any) -> Any:
        return cri.UpdatePodSandboxResourcesResponse()

    async def ListMetricDescriptors(self, request: Any, context: Any) -> Any:
        return cri.ListMetricDescriptorsResponse(descriptors=self.descriptors)

    async def ListPodSandboxMetrics(self, request: Any, context: Any) -> Any:
        return cri.ListPodSandboxMetricsResponse(pod_metrics=self.pod_metrics)

    async def RuntimeConfig(self, request: Any, context: Any) -> Any:
        return cri.RuntimeConfigResponse()

    async def GetContainerEvents(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.calls["GetContainerEvents"] += 1
        if "GetContainerEvents" in self.missing:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "unknown method GetContainerEvents")
        queue: asyncio.Queue[cri.ContainerEventResponse | None] = asyncio.Queue()
        self.events.append(queue)
        try:
            while (event := await queue.get()) is not None:
                yield event
        finally:
            self.events.remove(queue)

    # Lists are asked for as one message of every runtime: nobody calls these.
    StreamPodSandboxes = StreamContainers = StreamContainerStats = unimplemented("streamed lists")
    StreamPodSandboxStats = StreamPodSandboxMetrics = StreamImages = unimplemented("streamed lists")

    # --- images ---

    async def ListImages(self, request: Any, context: Any) -> Any:
        return cri.ListImagesResponse(images=self.images.values())  # the filter is not minded, as containerd has it

    async def ImageStatus(self, request: Any, context: Any) -> Any:
        found = self._image(request.image.image)
        return cri.ImageStatusResponse(image=found, info={"x": "1"} if request.verbose and found else {})

    def _image(self, reference: str) -> cri.Image | None:
        for image in self.images.values():
            if reference in (image.id, *image.repo_tags, *image.repo_digests):
                return image
        return None

    async def PullImage(self, request: Any, context: Any) -> Any:
        if request.image.image not in self.registry:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no {request.image.image} in the registry")
        image = self.registry[request.image.image]
        self.images[image.id] = image
        return cri.PullImageResponse(image_ref=image.id)

    async def RemoveImage(self, request: Any, context: Any) -> Any:
        if (image := self._image(request.image.image)) is not None:
            del self.images[image.id]
        return cri.RemoveImageResponse()

    async def ImageFsInfo(self, request: Any, context: Any) -> Any:
        usage = cri.FilesystemUsage(
            timestamp=1,
            fs_id=cri.FilesystemIdentifier(mountpoint=str(self.path.parent)),
            used_bytes=cri.UInt64Value(value=1000),
            inodes_used=cri.UInt64Value(value=10),
        )
        return cri.ImageFsInfoResponse(image_filesystems=[usage])

    @staticmethod
    async def _found(table: dict[str, Any], ident: str, context: Any) -> Any:
        if ident not in table:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"an error occurred when try to find {ident!r}: not found")
        return table[ident]


@contextlib.asynccontextmanager
async def running(path: Path) -> AsyncIterator[FakeRuntime]:
    """A started runtime."""
    runtime = FakeRuntime(path)
    await runtime.start()
    try:
        yield runtime
    finally:
        await runtime.stop()
