"""Work that a caller's cancellation must not cut in two."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")


async def uncancelled(work: Awaitable[T]) -> T:
    """Finish `work` even when the caller is cancelled meanwhile; then let the cancellation go on."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as e:
            if task.cancelled():
                raise
            cancelled = e
        except Exception:
            break
    if cancelled is not None:
        if task.exception() is not None:
            log.error("undo failed: %s", task.exception(), exc_info=task.exception())
        raise cancelled
    return task.result()
