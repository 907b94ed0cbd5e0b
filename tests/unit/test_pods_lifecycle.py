"""Events: which moves are told, in which order, to whom; and what becomes of a subscriber that does not read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from vmrt.errors import ExhaustedError
from vmrt.pods.lifecycle import LIMIT, Change, Event, Lifecycle, container_changes, sandbox_changes
from vmrt.pods.records import ContainerState, SandboxState


async def take(events: AsyncIterator[Event], count: int) -> list[tuple[str, Change]]:
    return [(event.id, event.change) for event in [await anext(events) for _ in range(count)]]


async def subscribe(lifecycle: Lifecycle) -> tuple[AsyncIterator[Event], asyncio.Task[Event]]:
    events = lifecycle.subscribe()
    first = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0)  # it has to be waiting: it is told from then on
    return events, first


def test_moves_that_clients_are_told_of() -> None:
    assert sandbox_changes(SandboxState.CREATING, SandboxState.READY) == (Change.CREATED, Change.STARTED)
    assert sandbox_changes(SandboxState.READY, SandboxState.NOT_READY) == (Change.STOPPED,)
    assert sandbox_changes(SandboxState.READY, SandboxState.READY) == ()  # its record changed, not its state
    assert container_changes(ContainerState.CREATED, ContainerState.RUNNING) == (Change.STARTED,)
    assert container_changes(ContainerState.RUNNING, ContainerState.EXITED) == (Change.STOPPED,)
    # Its end has been told when it became UNKNOWN.
    assert container_changes(ContainerState.UNKNOWN, ContainerState.EXITED) == ()


async def test_every_subscriber_sees_all_in_order() -> None:
    lifecycle = Lifecycle()
    (one, first_of_one), (two, first_of_two) = await subscribe(lifecycle), await subscribe(lifecycle)
    lifecycle.publish("s", (Change.CREATED, Change.STARTED), lambda: (None, ()))
    lifecycle.publish("c", (Change.CREATED,), lambda: (None, ()))
    for events, first in ((one, first_of_one), (two, first_of_two)):
        assert (await first).change is Change.CREATED
        assert await take(events, 2) == [("s", Change.STARTED), ("c", Change.CREATED)]


async def test_a_slow_subscriber_is_dropped_and_told_so_and_the_others_go_on() -> None:
    lifecycle = Lifecycle()
    (slow, slow_first), (quick, quick_first) = await subscribe(lifecycle), await subscribe(lifecycle)
    lifecycle.publish("c", (Change.CREATED,), lambda: (None, ()))
    await slow_first
    await quick_first
    for _ in range(LIMIT + 1):
        lifecycle.publish("c", (Change.STARTED,), lambda: (None, ()))
        await anext(quick)
    with pytest.raises(ExhaustedError, match="pile up"):
        await anext(slow)


async def test_nothing_is_put_together_for_nobody() -> None:
    lifecycle = Lifecycle()
    events, first = await subscribe(lifecycle)
    lifecycle.publish("c", (Change.CREATED,), lambda: (None, ()))
    await first
    await events.aclose()  # type: ignore[attr-defined]
    lifecycle.publish("c", (Change.STARTED,), lambda: pytest.fail("asked for a picture"))
