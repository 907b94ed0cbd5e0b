"""The command line's service over our own: Inspect knows what delegates run; images are loaded into our store only."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from google.protobuf import json_format

from vmrt.cri.delegates.directory import Directory, Owned
from vmrt.cri.delegates.runtime import sandbox_status
from vmrt.errors import NotFoundError
from vmrt.proto.runtime.v1 import api_pb2 as cri
from vmrt.proto.vmrt.v1 import control_pb2 as control
from vmrt.proto.vmrt.v1 import control_pb2_grpc as control_grpc


class MergedControl(control_grpc.ControlServicer):
    """`local` is our own service."""

    def __init__(self, local: control_grpc.ControlServicer, directory: Directory) -> None:
        self._local: Any = local
        self._directory = directory

    async def Ping(self, request: control.PingRequest, context: Any) -> Any:
        """Ours."""
        return await self._local.Ping(request, context)

    async def LoadImages(self, request: control.LoadImagesRequest, context: Any) -> AsyncIterator[Any]:
        """Ours: CRI has no call that loads into a delegate."""
        async for event in self._local.LoadImages(request, context):
            yield event

    async def PullImage(self, request: control.PullImageRequest, context: Any) -> AsyncIterator[Any]:
        """Ours; a delegate fetches for itself when a container of its needs the image."""
        async for event in self._local.PullImage(request, context):
            yield event

    async def Inspect(self, request: control.InspectRequest, context: Any) -> Any:
        """Ours, else what a delegate tells of a sandbox or container."""
        try:
            return await self._local.Inspect(request, context)
        except NotFoundError:
            sandbox = await self._directory.sandbox(request.id)
            if sandbox is not None:
                status = await sandbox_status(sandbox, verbose=True)
                return control.InspectResponse(kind="sandbox", json=_described(sandbox, status.status, status.info))
            container = await self._directory.container(request.id)
            if container is not None:
                asked = cri.ContainerStatusRequest(container_id=container.id, verbose=True)
                reply = await container.delegate.query("ContainerStatus", asked)
                return control.InspectResponse(kind="container", json=_described(container, reply.status, reply.info))
            raise


def _described(owned: Owned, status: Any, info: Mapping[str, str]) -> str:
    """Return one JSON object: who runs it, its status as CRI has it, and the delegate's own details."""
    details: dict[str, object] = {
        "delegate": {"handlers": list(owned.delegate.handlers), "endpoint": owned.delegate.endpoint},
        "status": json_format.MessageToDict(status, preserving_proto_field_name=True),
    }
    for key, value in info.items():
        try:
            details[key] = json.loads(value)
        except ValueError:
            details[key] = value
    return json.dumps(details, indent=2)
