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
from vmrt.pods import pod_vm
from vmrt.pods.records import ContainerRecord, SandboxRecord
from vmrt.pods.table import PodTable

log = logging.getLogger(__name__)


def state_dir(table: PodTable, sandbox_id: str) -> Path:
    """Return the directory for a sandbox's small files (log positions)."""
    return table.config.root / "pods" / sandbox_id


def position_file(table: PodTable, record: ContainerRecord) -> Path:
    """Return the file that says how far a container's log is written."""
    return state_dir(table, record.sandbox_id) / f"{record.id}.position"


async def release(
    table: PodTable, record: SandboxRecord, *, before_vm: Callable[[], Awaitable[None]] | None = None
) -> None:
    """Remove the VM, the network and the scratch disk of a sandbox; raise the first error after all were tried.

    VM and network go side by side; `before_vm` is awaited before the VM goes, and the VM goes even if it fails.
    """

    async def vm() -> None:
        try:
            if before_vm is not None:
                await before_vm()
        finally:
            await pod_vm.unmake(table.config.root, table.hypervisor, table.network, record.vm_id, record.tap)

    results = await asyncio.gather(
        vm(),
        table.network.teardown(record.id),
        return_exceptions=True,
    )
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
