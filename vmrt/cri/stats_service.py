"""The part of CRI's RuntimeService that tells figures and events, and the lists as streams.

A mixin of `RuntimeService`: one class has to answer for the gRPC service, one file need not hold it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from vmrt.cri import fields, filters, metrics, specs, stats, statuses
from vmrt.cri.ports import Pods
from vmrt.pods.lifecycle import Change
from vmrt.pods.records import ContainerRecord, SandboxRecord
from vmrt.proto.runtime.v1 import api_pb2 as cri

# Small enough for any client's message bound: a status has up to 1 MiB of annotations.
_CHUNK = 8

_EVENT_TYPES = {
    Change.CREATED: cri.CONTAINER_CREATED_EVENT,
    Change.STARTED: cri.CONTAINER_STARTED_EVENT,
    Change.STOPPED: cri.CONTAINER_STOPPED_EVENT,
    Change.DELETED: cri.CONTAINER_DELETED_EVENT,
}


class StatsCalls:
    """Statistics, metrics, events, streamed lists, and changes of limits."""

    _pods: Pods

    # --- containers ---

    async def ContainerStats(self, request: cri.ContainerStatsRequest, context: Any) -> cri.ContainerStatsResponse:
        """One container's figures."""
        record = self._pods.container(_id(request.container_id, "container_id"))
        (found,) = await self._container_stats([record])
        return cri.ContainerStatsResponse(stats=found)

    async def ListContainerStats(
        self, request: cri.ListContainerStatsRequest, context: Any
    ) -> cri.ListContainerStatsResponse:
        """Return the figures of those containers that a filter names."""
        chosen = stats.select_containers(self._pods.containers(), request.filter)
        return cri.ListContainerStatsResponse(stats=await self._container_stats(chosen))

    async def StreamContainerStats(
        self, request: cri.StreamContainerStatsRequest, context: Any
    ) -> AsyncIterator[cri.StreamContainerStatsResponse]:
        """As ListContainerStats, in messages of bounded size."""
        chosen = stats.select_containers(self._pods.containers(), request.filter)
        for chunk in _chunks(await self._container_stats(chosen)):
            yield cri.StreamContainerStatsResponse(container_stats=chunk)

    async def _container_stats(self, records: Sequence[ContainerRecord]) -> list[cri.ContainerStats]:
        figures = await self._pods.figures({record.sandbox_id for record in records})
        layers = self._pods.writable_layers
        return [stats.container_stats(record, figures.get(record.sandbox_id), layers) for record in records]

    async def StreamContainers(
        self, request: cri.StreamContainersRequest, context: Any
    ) -> AsyncIterator[cri.StreamContainersResponse]:
        """As ListContainers, in messages of bounded size."""
        for chunk in _chunks(filters.select_containers(self._pods.containers(), request.filter)):
            yield cri.StreamContainersResponse(containers=[statuses.container_item(record) for record in chunk])

    async def UpdateContainerResources(
        self, request: cri.UpdateContainerResourcesRequest, context: Any
    ) -> cri.UpdateContainerResourcesResponse:
        """Change limits, all or nothing; annotations are for runtimes with extensions, and vmrt has none."""
        record = self._pods.container(_id(request.container_id, "container_id"))
        await self._pods.update_container(record.id, specs.resources(request.linux, "linux"))
        return cri.UpdateContainerResourcesResponse()

    # --- pod sandboxes ---

    async def PodSandboxStats(self, request: cri.PodSandboxStatsRequest, context: Any) -> cri.PodSandboxStatsResponse:
        """One pod's figures."""
        record = self._pods.sandbox(_id(request.pod_sandbox_id, "pod_sandbox_id"))
        (found,) = await self._sandbox_stats([record])
        return cri.PodSandboxStatsResponse(stats=found)

    async def ListPodSandboxStats(
        self, request: cri.ListPodSandboxStatsRequest, context: Any
    ) -> cri.ListPodSandboxStatsResponse:
        """Return the figures of those pods that a filter names."""
        chosen = stats.select_sandboxes(self._pods.sandboxes(), request.filter)
        return cri.ListPodSandboxStatsResponse(stats=await self._sandbox_stats(chosen))

    async def StreamPodSandboxStats(
        self, request: cri.StreamPodSandboxStatsRequest, context: Any
    ) -> AsyncIterator[cri.StreamPodSandboxStatsResponse]:
        """As ListPodSandboxStats, in messages of bounded size."""
        chosen = stats.select_sandboxes(self._pods.sandboxes(), request.filter)
        for chunk in _chunks(await self._sandbox_stats(chosen)):
            yield cri.StreamPodSandboxStatsResponse(pod_sandbox_stats=chunk)

    async def _sandbox_stats(self, records: Sequence[SandboxRecord]) -> list[cri.PodSandboxStats]:
        figures = await self._pods.figures([record.id for record in records])
        layers = self._pods.writable_layers
        return [
            stats.sandbox_stats(record, self._containers_of(record.id), figures.get(record.id), layers)
            for record in records
        ]

    def _containers_of(self, sandbox_id: str) -> list[ContainerRecord]:
        return [record for record in self._pods.containers() if record.sandbox_id == sandbox_id]

    async def StreamPodSandboxes(
        self, request: cri.StreamPodSandboxesRequest, context: Any
    ) -> AsyncIterator[cri.StreamPodSandboxesResponse]:
        """As ListPodSandbox, in messages of bounded size."""
        for chunk in _chunks(filters.select_sandboxes(self._pods.sandboxes(), request.filter)):
            yield cri.StreamPodSandboxesResponse(pod_sandboxes=[statuses.sandbox_item(record) for record in chunk])

    async def UpdatePodSandboxResources(
        self, request: cri.UpdatePodSandboxResourcesRequest, context: Any
    ) -> cri.UpdatePodSandboxResourcesResponse:
        """Take a pod's new sums, or refuse them when its VM is too small."""
        record = self._pods.sandbox(_id(request.pod_sandbox_id, "pod_sandbox_id"))
        overhead = specs.resources(request.overhead, "overhead") if request.HasField("overhead") else None
        resources = specs.resources(request.resources, "resources") if request.HasField("resources") else None
        await self._pods.update_sandbox(record.id, overhead, resources)
        return cri.UpdatePodSandboxResourcesResponse()

    # --- metrics ---

    async def ListMetricDescriptors(
        self, request: cri.ListMetricDescriptorsRequest, context: Any
    ) -> cri.ListMetricDescriptorsResponse:
        """Return the table in `vmrt.cri.metrics`."""
        return cri.ListMetricDescriptorsResponse(descriptors=metrics.descriptors())

    async def ListPodSandboxMetrics(
        self, request: cri.ListPodSandboxMetricsRequest, context: Any
    ) -> cri.ListPodSandboxMetricsResponse:
        """Every pod's values."""
        return cri.ListPodSandboxMetricsResponse(pod_metrics=await self._metrics())

    async def StreamPodSandboxMetrics(
        self, request: cri.StreamPodSandboxMetricsRequest, context: Any
    ) -> AsyncIterator[cri.StreamPodSandboxMetricsResponse]:
        """As ListPodSandboxMetrics, in messages of bounded size."""
        for chunk in _chunks(await self._metrics()):
            yield cri.StreamPodSandboxMetricsResponse(pod_sandbox_metrics=chunk)

    async def _metrics(self) -> list[cri.PodSandboxMetrics]:
        records = self._pods.sandboxes()
        figures = await self._pods.figures([record.id for record in records])
        return [
            metrics.pod_metrics(record, self._containers_of(record.id), figures[record.id])
            for record in records
            if record.id in figures
        ]

    # --- events ---

    async def GetContainerEvents(
        self, request: cri.GetEventsRequest, context: Any
    ) -> AsyncIterator[cri.ContainerEventResponse]:
        """Tell what happens from now on, until the client goes or falls too far behind."""
        async for event in self._pods.events():
            yield cri.ContainerEventResponse(
                container_id=event.id,
                container_event_type=_EVENT_TYPES[event.change],
                created_at=event.created_ns,
                pod_sandbox_status=None if event.sandbox is None else statuses.sandbox_status(event.sandbox),
                containers_statuses=[statuses.container_status(record) for record in event.containers],
            )


def _chunks(items: Sequence[Any]) -> list[Sequence[Any]]:
    return [items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK)]


def _id(value: str, path: str) -> str:
    return fields.text(value, path, required=True, limit=1024)
