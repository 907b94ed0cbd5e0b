"""What sandboxes and containers use: one agent call per VM, its answer good for a second.

A call that is under way serves all who ask meanwhile. What a VM said last stays when it stops or does not answer, with
the time it was said. The figures are the guest's own account: a guest that lies can misstate itself only.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass

from vmrt.agent import agent_pb2 as pb
from vmrt.errors import VmrtError
from vmrt.pods.records import ContainerState, SandboxState
from vmrt.pods.table import LiveSandbox, PodTable

log = logging.getLogger(__name__)

MAX_AGE_S = 1.0
# A VM that answers slower than this does not hold up the list of all others.
CALL_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Figures:
    """What one VM said: `taken_ns` since the epoch, the pod as a whole, and its containers by id."""

    taken_ns: int
    sandbox: pb.SandboxStat
    containers: dict[str, pb.ContainerStat]


@dataclass(slots=True)
class _Entry:
    figures: Figures | None = None
    taken_at: float = -1e9  # monotonic
    call: asyncio.Task[None] | None = None


class Stats:
    """The figures of all sandboxes in one table."""

    def __init__(self, table: PodTable) -> None:
        self._table = table
        self._entries: dict[str, _Entry] = {}

    async def of(self, sandbox_ids: Iterable[str]) -> dict[str, Figures]:
        """Return the figures by sandbox; a sandbox that never gave any is left out."""
        self._forget_removed()
        wanted = [live for i in sandbox_ids if (live := self._table.sandboxes.get(i)) is not None]
        await asyncio.gather(*(self._refresh(live) for live in wanted))
        found = {live.id: entry.figures for live in wanted if (entry := self._entries.get(live.id)) is not None}
        return {key: figures for key, figures in found.items() if figures is not None}

    def _forget_removed(self) -> None:
        for gone in self._entries.keys() - self._table.sandboxes.keys():
            del self._entries[gone]

    async def _refresh(self, live: LiveSandbox) -> None:
        entry = self._entries.setdefault(live.id, _Entry())
        if live.record.state is not SandboxState.READY or live.agent is None:
            return
        if entry.call is None:
            if time.monotonic() - entry.taken_at < MAX_AGE_S and self._complete(live, entry):
                return
            entry.call = asyncio.create_task(self._ask(live, entry))
        # Shielded: it serves others too.
        await asyncio.shield(entry.call)

    def _complete(self, live: LiveSandbox, entry: _Entry) -> bool:
        """Whether the figures have every container that runs: one just started must not be missing."""
        known = entry.figures.containers if entry.figures is not None else {}
        return all(
            c.id in known for c in self._table.containers_of(live.id) if c.record.state is ContainerState.RUNNING
        )

    async def _ask(self, live: LiveSandbox, entry: _Entry) -> None:
        try:
            said = await live.need_agent().container_stats(timeout_s=CALL_TIMEOUT_S)
        except VmrtError as e:
            log.info("sandbox %s: no fresh figures: %s", live.id[:13], e)
        else:
            ours = {container.id for container in self._table.containers_of(live.id)}
            known = entry.figures.containers if entry.figures is not None else {}
            fresh = {stat.container_id: stat for stat in said.stats if stat.container_id in ours}
            kept = {key: stat for key, stat in known.items() if key in ours}
            entry.figures = Figures(time.time_ns(), said.sandbox, kept | fresh)
            entry.taken_at = time.monotonic()
        finally:
            entry.call = None
