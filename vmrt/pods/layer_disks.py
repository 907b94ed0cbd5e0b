"""The layers of images as disks of a sandbox's VM."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from vmrt.model import Disk, LayerImage
from vmrt.pods.table import LiveSandbox, PodTable


def serial(layer: LayerImage) -> str:
    """Return the disk serial of a layer: as much of its diff ID as SCSI's 36 octets hold."""
    return "l-" + layer.diff_id.removeprefix("sha256:")[:32]


async def attach_layers(table: PodTable, sandbox: LiveSandbox, layers: Iterable[LayerImage]) -> None:
    """Hot-plug the layers that the VM lacks; containers that share a layer wait for the one plug of it."""
    waits: list[asyncio.Future[None]] = []
    for layer in layers:
        name = serial(layer)
        future = sandbox.disks.get(name)
        if future is None or (future.done() and (future.cancelled() or future.exception() is not None)):
            disk = Disk(name, layer.path)
            future = asyncio.ensure_future(table.hypervisor.attach_disk(sandbox.record.vm_id, disk))
            future.add_done_callback(_retrieved)
            sandbox.disks[name] = future
        waits.append(future)
    for future in waits:
        # Shielded: the plug may serve other containers too.
        await asyncio.shield(future)


def _retrieved(future: asyncio.Future[None]) -> None:
    # Everybody who waited for the plug may have been cancelled.
    if not future.cancelled():
        future.exception()
