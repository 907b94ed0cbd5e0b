"""Whose a sandbox, container or image is: ours, a delegate's, or nobody's.

What delegates have is learnt from their lists, at start and with every list that a client asks for, so nothing of it
has to be kept on disk. An id that nobody is known to have is looked for in fresh lists; while a delegate is down, "not
found" cannot be said, and the error names the delegate instead. What has been ours is known to be nobody else's.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vmrt.config import HandlerConfig
from vmrt.cri.delegates import routing
from vmrt.cri.delegates.endpoint import Delegate, Kind
from vmrt.cri.ports import Pods
from vmrt.errors import InvalidArgumentError, NotFoundError
from vmrt.proto.runtime.v1 import api_pb2 as cri

# Ids of ours that are remembered when they are gone: clients stop and remove things twice.
_REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class Owned:
    """A delegate's sandbox or container, with its id in full."""

    delegate: Delegate
    id: str


class Directory:
    """All delegates of a daemon. `handlers` are all configured ones, `pods` knows what is ours."""

    def __init__(self, handlers: Mapping[str, HandlerConfig], pods: Pods) -> None:
        self.handlers = dict(handlers)
        self._pods = pods
        self._were_ours: OrderedDict[str, None] = OrderedDict()
        endpoints: dict[str, dict[str, HandlerConfig]] = {}
        for name, handler in handlers.items():
            if handler.endpoint:
                endpoints.setdefault(handler.endpoint, {})[name] = handler
        self.delegates = tuple(Delegate(endpoint, served) for endpoint, served in endpoints.items())

    async def open(self) -> None:
        """Connect to all; those that do not answer are waited for in the background."""
        await asyncio.gather(*(delegate.open() for delegate in self.delegates))

    async def close(self) -> None:
        """Disconnect."""
        await asyncio.gather(*(delegate.close() for delegate in self.delegates))

    def of_handler(self, name: str) -> Delegate:
        """Return who serves a delegating handler."""
        return next(delegate for delegate in self.delegates if name in delegate.handlers)

    async def sandbox(self, wanted: str) -> Owned | None:
        """Find a delegate's sandbox by id or unique prefix; None when it is ours, or there is none."""
        return await self._owner(Kind.SANDBOXES, wanted)

    async def container(self, wanted: str) -> Owned | None:
        """Find a delegate's container, likewise."""
        return await self._owner(Kind.CONTAINERS, wanted)

    async def listed(self, kind: Kind) -> list[Any]:
        """Return what all delegates have; the messages are not to be changed."""
        lists = await asyncio.gather(*(delegate.listed(kind) for delegate in self.delegates))
        return [item for items in lists for item in items]

    async def of_pod(self, metadata: cri.PodSandboxMetadata) -> Delegate | None:
        """Return the delegate that has a sandbox of this pod."""
        await self.listed(Kind.SANDBOXES)
        for delegate in self.delegates:
            if any(routing.same_pod(item.metadata, metadata) for item in delegate.known(Kind.SANDBOXES)):
                return delegate
        return None

    async def _owner(self, kind: Kind, wanted: str) -> Owned | None:
        if not wanted:
            return None  # for our own service to refuse
        ours = self._ours(kind, wanted)
        if ours == wanted or wanted in self._were_ours:
            return None
        found = self._matches(kind, wanted)
        if not found and not ours:
            await self.listed(kind)
            found = self._matches(kind, wanted)
            down = next((delegate for delegate in self.delegates if delegate.problem), None)
            if not found and down is not None:
                raise down.down()
        if len(found) + bool(ours) > 1:
            raise InvalidArgumentError(f"{kind.value} id {wanted!r} is ambiguous: several begin with it")
        return found[0] if found else None

    def _ours(self, kind: Kind, wanted: str) -> str:
        """Return the full id of what is ours, "" when it is not."""
        try:
            record = self._pods.sandbox(wanted) if kind is Kind.SANDBOXES else self._pods.container(wanted)
        except NotFoundError:
            return ""
        self._were_ours[record.id] = None
        self._were_ours.move_to_end(record.id)
        if len(self._were_ours) > _REMEMBERED:
            self._were_ours.popitem(last=False)
        return record.id

    def _matches(self, kind: Kind, wanted: str) -> Sequence[Owned]:
        matches = [Owned(delegate, ident) for delegate in self.delegates for ident in delegate.find(kind, wanted)]
        return [owned for owned in matches if owned.id == wanted] or matches
