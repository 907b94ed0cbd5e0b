"""CRI's RuntimeService over our own and the delegates: each call goes to whom it concerns, lists become one.

Our own service checks a request first wherever it answers too, so that what is refused is refused in the same words.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from google.protobuf import json_format

from vmrt.cri import fields
from vmrt.cri.delegates import merging, routing
from vmrt.cri.delegates.directory import Directory, Owned
from vmrt.cri.delegates.endpoint import Delegate, DelegateError, Kind
from vmrt.cri.delegates.events import Hub, joined
from vmrt.cri.delegates.images import Provider
from vmrt.proto.runtime.v1 import api_pb2 as cri
from vmrt.proto.runtime.v1 import api_pb2_grpc as cri_grpc

log = logging.getLogger(__name__)

# Statistics may take a runtime a while; nobody asks for them every second.
_STATS_S = 5.0
_CHUNK = 8


def _by_sandbox(method: str, *, query: bool = False) -> Any:
    """Return a handler for a call that names a sandbox."""

    async def call(self: MergedRuntime, request: Any, context: Any) -> Any:
        owned = await self.directory.sandbox(request.pod_sandbox_id)
        if owned is None:
            return await getattr(self.local, method)(request, context)
        return await _passed(method, owned, _with(request, "pod_sandbox_id", owned.id), context, query=query)

    return call


def _by_container(method: str, *, query: bool = False) -> Any:
    """Return a handler for a call that names a container."""

    async def call(self: MergedRuntime, request: Any, context: Any) -> Any:
        owned = await self.directory.container(request.container_id)
        if owned is None:
            return await getattr(self.local, method)(request, context)
        return await _passed(method, owned, _with(request, "container_id", owned.id), context, query=query)

    return call


def _with(request: Any, field: str, ident: str) -> Any:
    """Put a full id in the place of an abbreviated one."""
    setattr(request, field, ident)
    return request


async def _passed(method: str, owned: Owned, request: Any, context: Any, *, query: bool = False) -> Any:
    if query:
        return await owned.delegate.query(method, request)
    return await owned.delegate.call(method, request, context.time_remaining())


def _chunks(items: Sequence[Any]) -> list[Sequence[Any]]:
    return [items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK)]


class MergedRuntime(cri_grpc.RuntimeServiceServicer):
    """`local` is our own service, `provider` brings an image to where a container needs it."""

    def __init__(self, local: cri_grpc.RuntimeServiceServicer, directory: Directory, provider: Provider) -> None:
        # The stubs' base class has methods of another kind than asyncio's: calls go through Any.
        self.local: Any = local
        self.directory = directory
        self._provider = provider
        self._failures: dict[tuple[str, str], str] = {}
        self._hubs = [Hub(delegate) for delegate in directory.delegates]

    # --- the runtime ---

    async def Version(self, request: cri.VersionRequest, context: Any) -> Any:
        """Ours: there is one runtime."""
        return await self.local.Version(request, context)

    async def Status(self, request: cri.StatusRequest, context: Any) -> Any:
        """Ours, with the delegates' handlers and a condition that tells of those that are down.

        RuntimeReady stays ours: a node that runs VMs is not taken out of service by the failure of a delegate.
        """
        reply = await self.local.Status(request, context)
        delegates = self.directory.delegates
        await asyncio.gather(*(delegate.refresh_status() for delegate in delegates))
        reply.runtime_handlers.extend(
            cri.RuntimeHandler(name=name, features=delegate.features(name))
            for delegate in delegates
            for name in delegate.handlers
        )
        problems = [problem for problem in map(_problem, delegates) if problem]
        reply.status.conditions.append(
            cri.RuntimeCondition(
                type="DelegatesReady",
                status=not problems,
                reason="DelegateDown" if problems else "",
                message="; ".join(problems),
            )
        )
        if request.verbose:
            reply.info["delegates"] = json.dumps({d.name: _picture(d) for d in delegates})
        return reply

    async def RuntimeConfig(self, request: cri.RuntimeConfigRequest, context: Any) -> Any:
        """Ours; a delegate that has another cgroup driver is told of in the log."""
        return await self.local.RuntimeConfig(request, context)

    async def UpdateRuntimeConfig(self, request: cri.UpdateRuntimeConfigRequest, context: Any) -> Any:
        """Ours, and passed on to all."""
        reply = await self.local.UpdateRuntimeConfig(request, context)
        await asyncio.gather(*(d.configure(request.runtime_config) for d in self.directory.delegates))
        return reply

    # --- pod sandboxes ---

    async def RunPodSandbox(self, request: cri.RunPodSandboxRequest, context: Any) -> Any:
        """Run here, or where `routing.route` says."""
        handlers, asked = self.directory.handlers, request.runtime_handler
        if asked and asked not in handlers:
            known = ", ".join(sorted(handlers))
            fields.refuse(
                "runtime_handler",
                f"is {fields.short(asked)}, which is not configured",
                hint=f"configured: {known}",
            )
        name = routing.route(handlers, asked, request.config.linux.security_context.namespace_options)
        if not name:
            return await self.local.RunPodSandbox(request, context)
        delegate = self.directory.of_handler(name)
        delegate.require_known()
        routing.check_sandbox(request.config, delegate.features(name), name)
        theirs = cri.RunPodSandboxRequest(
            config=routing.marked(request.config, asked), runtime_handler=handlers[name].delegate_handler
        )
        reply = await delegate.call("RunPodSandbox", theirs, context.time_remaining())
        delegate.learn(Kind.SANDBOXES, reply.pod_sandbox_id)
        return reply

    StopPodSandbox = _by_sandbox("StopPodSandbox")

    async def RemovePodSandbox(self, request: cri.RemovePodSandboxRequest, context: Any) -> Any:
        """Remove, wherever it is."""
        owned = await self.directory.sandbox(request.pod_sandbox_id)
        if owned is None:
            return await self.local.RemovePodSandbox(request, context)
        reply = await _passed("RemovePodSandbox", owned, _with(request, "pod_sandbox_id", owned.id), context)
        owned.delegate.forget(Kind.SANDBOXES, owned.id)
        return reply

    async def PodSandboxStatus(self, request: cri.PodSandboxStatusRequest, context: Any) -> Any:
        """Tell what a sandbox is like."""
        owned = await self.directory.sandbox(request.pod_sandbox_id)
        if owned is None:
            return await self.local.PodSandboxStatus(request, context)
        return await sandbox_status(owned, request.verbose)

    async def ListPodSandbox(self, request: cri.ListPodSandboxRequest, context: Any) -> Any:
        """All of them."""
        reply = await self.local.ListPodSandbox(request, context)
        theirs = await self.directory.listed(Kind.SANDBOXES)
        reply.items.extend(item for item in theirs if merging.shows_sandbox(item, request.filter))
        return reply

    async def StreamPodSandboxes(self, request: cri.StreamPodSandboxesRequest, context: Any) -> AsyncIterator[Any]:
        """As ListPodSandbox, in messages of bounded size."""
        async for message in self.local.StreamPodSandboxes(request, context):
            yield message
        theirs = await self.directory.listed(Kind.SANDBOXES)
        for chunk in _chunks([item for item in theirs if merging.shows_sandbox(item, request.filter)]):
            yield cri.StreamPodSandboxesResponse(pod_sandboxes=chunk)

    UpdatePodSandboxResources = _by_sandbox("UpdatePodSandboxResources")
    PortForward = _by_sandbox("PortForward")

    # --- containers ---

    async def CreateContainer(self, request: cri.CreateContainerRequest, context: Any) -> Any:
        """Create; an image that only the other side has is fetched first (docs/delegate.md, "Images")."""
        owned = await self.directory.sandbox(request.pod_sandbox_id)
        if owned is None:
            await self._provider.provide_here(request.config.image)
            return await self.local.CreateContainer(request, context)
        delegate = owned.delegate
        delegate.require_known()
        features = delegate.features(await self._handler(owned, request.sandbox_config))
        routing.check_container(request.config, features, delegate.status.features, delegate.name)
        await self._provider.provide_at(delegate, request.config.image, context.time_remaining())
        reply = await _passed("CreateContainer", owned, _with(request, "pod_sandbox_id", owned.id), context)
        delegate.learn(Kind.CONTAINERS, reply.container_id)
        return reply

    async def _handler(self, owned: Owned, config: cri.PodSandboxConfig) -> str:
        """Return the handler of a sandbox: the one that was asked for, or the one that took it."""
        handlers = owned.delegate.handlers
        items = {item.id: item for item in await owned.delegate.listed(Kind.SANDBOXES)}
        if owned.id in items and items[owned.id].runtime_handler in handlers:
            return str(items[owned.id].runtime_handler)
        routed = routing.route(self.directory.handlers, "", config.linux.security_context.namespace_options)
        return routed if routed in handlers else next(iter(handlers))

    StartContainer = _by_container("StartContainer")
    StopContainer = _by_container("StopContainer")

    async def RemoveContainer(self, request: cri.RemoveContainerRequest, context: Any) -> Any:
        """Remove, wherever it is."""
        owned = await self.directory.container(request.container_id)
        if owned is None:
            return await self.local.RemoveContainer(request, context)
        reply = await _passed("RemoveContainer", owned, _with(request, "container_id", owned.id), context)
        owned.delegate.forget(Kind.CONTAINERS, owned.id)
        return reply

    async def ListContainers(self, request: cri.ListContainersRequest, context: Any) -> Any:
        """All of them."""
        reply = await self.local.ListContainers(request, context)
        theirs = await self.directory.listed(Kind.CONTAINERS)
        reply.containers.extend(item for item in theirs if merging.shows_container(item, request.filter))
        return reply

    async def StreamContainers(self, request: cri.StreamContainersRequest, context: Any) -> AsyncIterator[Any]:
        """As ListContainers, in messages of bounded size."""
        async for message in self.local.StreamContainers(request, context):
            yield message
        theirs = await self.directory.listed(Kind.CONTAINERS)
        for chunk in _chunks([item for item in theirs if merging.shows_container(item, request.filter)]):
            yield cri.StreamContainersResponse(containers=chunk)

    ContainerStatus = _by_container("ContainerStatus", query=True)
    UpdateContainerResources = _by_container("UpdateContainerResources")
    ReopenContainerLog = _by_container("ReopenContainerLog")
    ExecSync = _by_container("ExecSync")
    # The URL is one of the delegate's own streaming server; kubelet connects to it as it would to ours.
    Exec = _by_container("Exec")
    Attach = _by_container("Attach")
    CheckpointContainer = _by_container("CheckpointContainer")

    # --- figures and events ---

    ContainerStats = _by_container("ContainerStats", query=True)

    async def ListContainerStats(self, request: cri.ListContainerStatsRequest, context: Any) -> Any:
        """All of them; those of a delegate that is down, or does not know the call, are missing."""
        reply = await self.local.ListContainerStats(request, context)
        for theirs in await self._asked("ListContainerStats", cri.ListContainerStatsRequest(filter=request.filter)):
            reply.stats.extend(theirs.stats)
        return reply

    async def StreamContainerStats(self, request: cri.StreamContainerStatsRequest, context: Any) -> AsyncIterator[Any]:
        """As ListContainerStats, in messages of bounded size."""
        async for message in self.local.StreamContainerStats(request, context):
            yield message
        for theirs in await self._asked("ListContainerStats", cri.ListContainerStatsRequest(filter=request.filter)):
            for chunk in _chunks(theirs.stats):
                yield cri.StreamContainerStatsResponse(container_stats=chunk)

    async def PodSandboxStats(self, request: cri.PodSandboxStatsRequest, context: Any) -> Any:
        """One pod's figures."""
        owned = await self.directory.sandbox(request.pod_sandbox_id)
        if owned is None:
            return await self.local.PodSandboxStats(request, context)
        reply = await owned.delegate.query("PodSandboxStats", _with(request, "pod_sandbox_id", owned.id))
        routing.unmark_stats(reply.stats)
        return reply

    async def ListPodSandboxStats(self, request: cri.ListPodSandboxStatsRequest, context: Any) -> Any:
        """All of them, as far as delegates tell."""
        reply = await self.local.ListPodSandboxStats(request, context)
        for theirs in await self._asked("ListPodSandboxStats", cri.ListPodSandboxStatsRequest(filter=request.filter)):
            reply.stats.extend(routing.unmark_stats(stats) for stats in theirs.stats)
        return reply

    async def StreamPodSandboxStats(
        self, request: cri.StreamPodSandboxStatsRequest, context: Any
    ) -> AsyncIterator[Any]:
        """As ListPodSandboxStats, in messages of bounded size."""
        async for message in self.local.StreamPodSandboxStats(request, context):
            yield message
        for theirs in await self._asked("ListPodSandboxStats", cri.ListPodSandboxStatsRequest(filter=request.filter)):
            for chunk in _chunks([routing.unmark_stats(stats) for stats in theirs.stats]):
                yield cri.StreamPodSandboxStatsResponse(pod_sandbox_stats=chunk)

    async def ListMetricDescriptors(self, request: cri.ListMetricDescriptorsRequest, context: Any) -> Any:
        """Ours, and those that only delegates have."""
        reply = await self.local.ListMetricDescriptors(request, context)
        known = list(reply.descriptors)
        for theirs in await self._asked("ListMetricDescriptors", request):
            known = merging.merged_descriptors(known, theirs.descriptors)
        return cri.ListMetricDescriptorsResponse(descriptors=known)

    async def ListPodSandboxMetrics(self, request: cri.ListPodSandboxMetricsRequest, context: Any) -> Any:
        """All of them, as far as delegates tell."""
        reply = await self.local.ListPodSandboxMetrics(request, context)
        reply.pod_metrics.extend(await self._metrics(context))
        return reply

    async def StreamPodSandboxMetrics(
        self, request: cri.StreamPodSandboxMetricsRequest, context: Any
    ) -> AsyncIterator[Any]:
        """As ListPodSandboxMetrics, in messages of bounded size."""
        async for message in self.local.StreamPodSandboxMetrics(request, context):
            yield message
        for chunk in _chunks(await self._metrics(context)):
            yield cri.StreamPodSandboxMetricsResponse(pod_sandbox_metrics=chunk)

    async def _metrics(self, context: Any) -> list[cri.PodSandboxMetrics]:
        ours = (await self.local.ListMetricDescriptors(cri.ListMetricDescriptorsRequest(), context)).descriptors

        async def of(delegate: Delegate) -> list[cri.PodSandboxMetrics]:
            described = await delegate.query("ListMetricDescriptors", cri.ListMetricDescriptorsRequest(), _STATS_S)
            told = await delegate.query("ListPodSandboxMetrics", cri.ListPodSandboxMetricsRequest(), _STATS_S)
            return list(merging.fitting_metrics(ours, described.descriptors, told.pod_metrics))

        return [metrics for told in await self._of_all("metrics", of) for metrics in told]

    async def _asked(self, method: str, request: Any) -> list[Any]:
        """Ask all delegates; return the answers that there are."""
        return await self._of_all(method, lambda delegate: delegate.query(method, request, _STATS_S))

    async def _of_all(self, what: str, ask: Callable[[Delegate], Awaitable[Any]]) -> list[Any]:
        async def answer(delegate: Delegate) -> list[Any]:
            key = (delegate.name, what)
            try:
                found = [await ask(delegate)]
            except DelegateError as e:
                # Figures may be asked for every few seconds: a failure is told once, until it changes.
                if not delegate.problem and self._failures.get(key) != e.message:
                    log.warning("%s of delegate %s are left out: %s", what, delegate, e.message)
                    self._failures[key] = e.message
                return []
            self._failures.pop(key, None)
            return found

        answers = await asyncio.gather(*map(answer, self.directory.delegates))
        return [each for answer in answers for each in answer]

    async def GetContainerEvents(self, request: cri.GetEventsRequest, context: Any) -> AsyncIterator[Any]:
        """Ours and theirs, as they come."""
        sources = [self.local.GetContainerEvents(request, context), *(hub.subscribe() for hub in self._hubs)]
        async for event in joined(sources):
            yield event


async def sandbox_status(owned: Owned, verbose: bool) -> cri.PodSandboxStatusResponse:
    """Ask a delegate for a sandbox's status, as clients may see it."""
    request = cri.PodSandboxStatusRequest(pod_sandbox_id=owned.id, verbose=verbose)
    reply: cri.PodSandboxStatusResponse = await owned.delegate.query("PodSandboxStatus", request)
    routing.unmark(reply.status, owned.delegate.handlers)
    return reply


def _problem(delegate: Delegate) -> str:
    """Say why a delegate cannot run pods, "" when it can."""
    if delegate.problem:
        return f"{delegate}: {delegate.problem}"
    for condition in delegate.status.status.conditions:
        if condition.type == "RuntimeReady" and not condition.status:
            return f"{delegate}: its RuntimeReady is false: {condition.reason} {condition.message}".rstrip()
    return ""


def _picture(delegate: Delegate) -> dict[str, object]:
    return {
        "endpoint": delegate.endpoint,
        "problem": delegate.problem,
        "sandboxes": len(delegate.known(Kind.SANDBOXES)),
        "status": json_format.MessageToDict(delegate.status),
    }
