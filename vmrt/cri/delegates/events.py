"""What happens to a delegate's sandboxes and containers, for those who follow GetContainerEvents.

A delegate is followed once, however many listen: some runtimes give each event to one of their followers only. One that
does not have the call (containerd before 1.7) is looked at every second instead, and its events are made of what has
changed; so are those that were missed while there was no connection. Nobody is followed while nobody listens.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vmrt.cri.delegates import routing
from vmrt.cri.delegates.endpoint import Delegate, DelegateError, Kind, report
from vmrt.errors import Code, ExhaustedError
from vmrt.pods.lifecycle import LIMIT
from vmrt.proto.runtime.v1 import api_pb2 as cri

log = logging.getLogger(__name__)

_LOOK_S = 1.0
_PAUSES_S = (0.2, 5.0)
_STATES: Mapping[int, int] = {
    cri.CONTAINER_CREATED_EVENT: cri.CONTAINER_CREATED,
    cri.CONTAINER_STARTED_EVENT: cri.CONTAINER_RUNNING,
    cri.CONTAINER_STOPPED_EVENT: cri.CONTAINER_EXITED,
}


@dataclass(frozen=True, slots=True)
class Picture:
    """The states of a delegate's sandboxes and containers, by id; of containers with the id of their sandbox."""

    sandboxes: Mapping[str, int] = field(default_factory=dict)
    containers: Mapping[str, tuple[str, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Happening:
    """An event before it is dressed: whose it is, and what."""

    id: str
    sandbox_id: str
    type: cri.ContainerEventType.ValueType


def picture(sandboxes: Iterable[cri.PodSandbox], containers: Iterable[cri.Container]) -> Picture:
    """Take a picture of two lists."""
    return Picture({item.id: item.state for item in sandboxes}, {c.id: (c.pod_sandbox_id, c.state) for c in containers})


def differences(old: Picture, new: Picture) -> list[Happening]:
    """Return what must have happened between two pictures, in an order in which it may have."""
    found: list[Happening] = []
    for ident, state in new.sandboxes.items():
        before = old.sandboxes.get(ident)
        if before is None:
            found.append(Happening(ident, ident, cri.CONTAINER_CREATED_EVENT))
        if state == cri.SANDBOX_READY and before is None:
            found.append(Happening(ident, ident, cri.CONTAINER_STARTED_EVENT))
        if state != cri.SANDBOX_READY and before in (None, cri.SANDBOX_READY):
            found.append(Happening(ident, ident, cri.CONTAINER_STOPPED_EVENT))
    for ident, (sandbox, state) in new.containers.items():
        had = old.containers.get(ident)
        before = None if had is None else had[1]
        if before is None:
            found.append(Happening(ident, sandbox, cri.CONTAINER_CREATED_EVENT))
        if state in (cri.CONTAINER_RUNNING, cri.CONTAINER_EXITED) and before in (None, cri.CONTAINER_CREATED):
            found.append(Happening(ident, sandbox, cri.CONTAINER_STARTED_EVENT))
        if state in (cri.CONTAINER_EXITED, cri.CONTAINER_UNKNOWN) and before != state:
            found.append(Happening(ident, sandbox, cri.CONTAINER_STOPPED_EVENT))
    for ident, (sandbox, _) in old.containers.items():
        if ident not in new.containers:
            found.append(Happening(ident, sandbox, cri.CONTAINER_DELETED_EVENT))
    found += [
        Happening(ident, ident, cri.CONTAINER_DELETED_EVENT) for ident in old.sandboxes if ident not in new.sandboxes
    ]
    return found


def after(seen: Picture, event: cri.ContainerEventResponse) -> Picture:
    """Return the picture after an event that was passed on."""
    ident, kind = event.container_id, event.container_event_type
    sandbox = event.pod_sandbox_status.id
    sandboxes, containers = dict(seen.sandboxes), dict(seen.containers)
    if ident == sandbox or ident in sandboxes:
        if kind == cri.CONTAINER_DELETED_EVENT:
            sandboxes.pop(ident, None)
        else:
            stopped = kind == cri.CONTAINER_STOPPED_EVENT
            sandboxes[ident] = cri.SANDBOX_NOTREADY if stopped else cri.SANDBOX_READY
    elif kind == cri.CONTAINER_DELETED_EVENT:
        containers.pop(ident, None)
    else:
        containers[ident] = (sandbox or containers.get(ident, ("", 0))[0], _STATES[kind])
    return Picture(sandboxes, containers)


class Hub:
    """The one follower of a delegate, and those who listen to it."""

    def __init__(self, delegate: Delegate) -> None:
        self._delegate = delegate
        self._listeners: set[asyncio.Queue[cri.ContainerEventResponse]] = set()
        self._dropped: set[asyncio.Queue[cri.ContainerEventResponse]] = set()
        self._follower: asyncio.Task[None] | None = None
        self._seen = Picture()

    async def subscribe(self) -> AsyncGenerator[cri.ContainerEventResponse, None]:
        """Yield events from now on; `ExhaustedError` after falling `LIMIT` events behind."""
        queue: asyncio.Queue[cri.ContainerEventResponse] = asyncio.Queue(LIMIT)
        self._listeners.add(queue)
        if self._follower is None or self._follower.done():
            self._follower = asyncio.create_task(self._follow(), name=f"events of delegate {self._delegate.name}")
            self._follower.add_done_callback(report)
        try:
            while queue not in self._dropped:
                yield await queue.get()
            raise ExhaustedError(
                f"the subscriber let {LIMIT} events pile up and is dropped",
                phase="events",
                hint="list sandboxes and containers anew, then subscribe again",
            )
        finally:
            self._listeners.discard(queue)
            self._dropped.discard(queue)
            if not self._listeners and self._follower is not None:
                self._follower.cancel()
                self._follower = None

    def _publish(self, event: cri.ContainerEventResponse) -> None:
        for queue in tuple(self._listeners):
            try:
                queue.put_nowait(event)
            except asyncio.QueueFull:
                self._listeners.discard(queue)
                self._dropped.add(queue)

    async def _follow(self) -> None:
        delegate = self._delegate
        # What we start from is what clients could see before they subscribed.
        self._seen = picture(delegate.known(Kind.SANDBOXES), delegate.known(Kind.CONTAINERS))
        pause, longest = _PAUSES_S
        has_events = True
        while True:
            if not delegate.problem:
                try:
                    if has_events:
                        await self._stream()
                        pause = _PAUSES_S[0]
                    else:
                        await self._look()
                except DelegateError as e:
                    if e.code is Code.UNIMPLEMENTED and has_events:
                        log.info("delegate %s has no events: its lists are compared every second", delegate)
                        has_events = False
                    else:
                        log.debug("events of delegate %s: %s", delegate, e)
            if has_events:
                await asyncio.sleep(pause)
                pause = min(2 * pause, longest)
            else:
                await asyncio.sleep(_LOOK_S)

    async def _stream(self) -> None:
        """Pass on the delegate's events until they end."""
        call = self._delegate.follow("GetContainerEvents", cri.GetEventsRequest())
        try:
            # After the subscription, so that nothing falls between; what is told twice does no harm.
            await self._look()
            async for event in self._delegate.received("GetContainerEvents", call):
                if event.HasField("pod_sandbox_status"):
                    routing.unmark(event.pod_sandbox_status, self._delegate.handlers)
                self._seen = after(self._seen, event)
                self._publish(event)
        finally:
            call.cancel()

    async def _look(self) -> None:
        """Compare what is there with what was, and publish what must have happened."""
        sandboxes = await self._delegate.listed(Kind.SANDBOXES)
        containers = await self._delegate.listed(Kind.CONTAINERS)
        if self._delegate.problem:
            raise self._delegate.down()
        before, self._seen = self._seen, picture(sandboxes, containers)
        for happening in differences(before, self._seen):
            self._publish(await self._dressed(happening, self._seen))

    async def _dressed(self, happening: Happening, now: Picture) -> cri.ContainerEventResponse:
        """Give an event the statuses that belong to it, as far as there still are any."""
        ask = self._delegate.query
        event = cri.ContainerEventResponse(
            container_id=happening.id, container_event_type=happening.type, created_at=time.time_ns()
        )
        if happening.sandbox_id not in now.sandboxes:
            return event
        with contextlib.suppress(DelegateError):
            reply = await ask("PodSandboxStatus", cri.PodSandboxStatusRequest(pod_sandbox_id=happening.sandbox_id))
            event.pod_sandbox_status.CopyFrom(routing.unmark(reply.status, self._delegate.handlers))
        for ident, (sandbox, _) in now.containers.items():
            if sandbox == happening.sandbox_id:
                with contextlib.suppress(DelegateError):
                    reply = await ask("ContainerStatus", cri.ContainerStatusRequest(container_id=ident))
                    event.containers_statuses.append(reply.status)
        return event


async def joined(sources: Sequence[AsyncIterator[Any]]) -> AsyncGenerator[Any, None]:
    """Yield what all sources yield, as it comes; the first error of one ends them all."""
    # One place: each source keeps its own bound on what may wait.
    meeting: asyncio.Queue[Any] = asyncio.Queue(1)

    async def pump(source: AsyncIterator[Any]) -> None:
        try:
            async for item in source:
                await meeting.put(item)
        except Exception as e:
            await meeting.put(e)
        finally:
            if isinstance(source, AsyncGenerator):
                await source.aclose()

    pumps = [asyncio.create_task(pump(source)) for source in sources]
    try:
        while True:
            item = await meeting.get()
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
