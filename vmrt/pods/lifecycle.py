"""Who is told when sandboxes and containers are created, started, stopped and deleted (CRI GetContainerEvents).

Any number of subscribers; each sees all events from its subscription on, in order. Publishing never waits: a subscriber
that lets `LIMIT` events pile up is dropped with an error, so that it knows to list anew. An event carries the records
as they were when it happened.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from vmrt.errors import ExhaustedError
from vmrt.pods.records import ContainerRecord, ContainerState, SandboxRecord, SandboxState

LIMIT = 1024


class Change(enum.Enum):
    """What happened to a sandbox or container (CRI ContainerEventType)."""

    CREATED = "created"
    STARTED = "started"
    STOPPED = "stopped"
    DELETED = "deleted"


@dataclass(frozen=True, slots=True)
class Event:
    """`id` is the container's, or the sandbox's own. `sandbox` is None when the event outlived it."""

    id: str
    change: Change
    created_ns: int
    sandbox: SandboxRecord | None
    containers: tuple[ContainerRecord, ...]


def sandbox_changes(old: SandboxState, new: SandboxState) -> tuple[Change, ...]:
    """Return what clients are told of a sandbox's move: a sandbox is created and started in one."""
    if old is new:
        return ()
    return {
        SandboxState.READY: (Change.CREATED, Change.STARTED),
        SandboxState.NOT_READY: (Change.STOPPED,),
    }.get(new, ())


def container_changes(old: ContainerState, new: ContainerState) -> tuple[Change, ...]:
    """Return what clients are told of a container's move."""
    if old is new or old is ContainerState.UNKNOWN:
        return ()
    return {
        ContainerState.CREATED: (Change.CREATED,),
        ContainerState.RUNNING: (Change.STARTED,),
        ContainerState.EXITED: (Change.STOPPED,),
        ContainerState.UNKNOWN: (Change.STOPPED,),
    }.get(new, ())


Picture = Callable[[], tuple[SandboxRecord | None, Sequence[ContainerRecord]]]


class Lifecycle:
    """The subscribers of one daemon."""

    def __init__(self) -> None:
        self._subscribers: set[_Subscriber] = set()

    def publish(self, subject: str, changes: Sequence[Change], picture: Picture) -> None:
        """Tell every subscriber; `picture` returns the records and is asked only when somebody listens."""
        if not changes or not self._subscribers:
            return
        sandbox, containers = picture()
        for change in changes:
            event = Event(subject, change, time.time_ns(), sandbox, tuple(containers))
            for subscriber in tuple(self._subscribers):
                if not subscriber.put(event):
                    self._subscribers.discard(subscriber)

    async def subscribe(self) -> AsyncIterator[Event]:
        """Yield events from now on; `ExhaustedError` after falling `LIMIT` events behind."""
        subscriber = _Subscriber()
        self._subscribers.add(subscriber)
        try:
            while True:
                yield await subscriber.get()
        finally:
            self._subscribers.discard(subscriber)


class _Subscriber:
    def __init__(self) -> None:
        self._waiting: asyncio.Queue[Event | None] = asyncio.Queue()

    def put(self, event: Event) -> bool:
        """Take an event; False, and what waits is thrown away, when too many do."""
        if self._waiting.qsize() < LIMIT:
            self._waiting.put_nowait(event)
            return True
        while not self._waiting.empty():
            self._waiting.get_nowait()
        self._waiting.put_nowait(None)
        return False

    async def get(self) -> Event:
        event = await self._waiting.get()
        if event is None:
            raise ExhaustedError(
                f"the subscriber let {LIMIT} events pile up and is dropped",
                phase="events",
                hint="list sandboxes and containers anew, then subscribe again",
            )
        return event
