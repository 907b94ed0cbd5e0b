"""Giving back all that a sandbox holds on the host.

One function serves a failed RunPodSandbox, StopPodSandbox and recovery after a crash: it works from the record alone,
each step is idempotent, and a step that fails does not keep the others from running.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

from vmrt.errors import VmrtError
from vmrt.pods import scratch, volumes
from vmrt.pods.records import ContainerRecord, SandboxRecord
from vmrt.pods.table import PodTable

log = logging.getLogger(__name__)


def state_dir(table: PodTable, sandbox_id: str) -> Path:
    """Return the directory for a sandbox's small files (log positions)."""
    return table.config.root / "pods" / sandbox_id


def position_file(table: PodTable, record: ContainerRecord) -> Path:
    """Return the file that says how far a container's log is written."""
    return state_dir(table, record.sandbox_id) / f"{record.id}.position"


async def release(table: PodTable, record: SandboxRecord) -> None:
    """Remove the VM, the network, scratch disk and share of a sandbox; raise the first error after all were tried."""

    async def vm_then_tap() -> None:
        await table.hypervisor.destroy(record.vm_id)
        # Only now: QEMU holds the scratch file, and the tap unless it has moved into the netns; virtiofsd the share.
        await asyncio.to_thread(scratch.remove, table.config.root, record.vm_id)
        await asyncio.to_thread(volumes.remove, table.config.root, record.id)
        if record.tap:
            await table.network.delete_tap(record.tap)

    steps: list[Callable[[], Awaitable[None]]] = [vm_then_tap, lambda: table.network.teardown(record.id)]
    results = await asyncio.gather(*(step() for step in steps), return_exceptions=True)
    errors = [r for r in results if isinstance(r, BaseException)]
    for error in errors:
        log.error("sandbox %s: release: %s", record.id[:13], error)
    for error in errors:
        if isinstance(error, VmrtError):
            raise error
        raise VmrtError(
            f"unexpected: {error!r}", phase="release", resource=f"sandbox {record.id}", hint="the daemon's log has more"
        ) from error


def remove_state(table: PodTable, sandbox_id: str) -> None:
    """Delete the sandbox's small files."""
    shutil.rmtree(state_dir(table, sandbox_id), ignore_errors=True)
