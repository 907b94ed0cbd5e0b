"""ExecSync: one more process in a running container, its output collected."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from vmrt.errors import DeadlineError, FailedPreconditionError, InvalidArgumentError
from vmrt.pods.records import ContainerState
from vmrt.pods.table import LiveContainer, PodTable

# CRI: each stream is cut at 16 MiB. The reply must also stay below cri-client's 16 MiB message limit.
STREAM_LIMIT_BYTES = 16 * 1024**2
REPLY_LIMIT_BYTES = 16 * 1024**2 - 4096


@dataclass(frozen=True, slots=True)
class ExecResult:
    """What a command printed, cut at the limits, and how it ended."""

    stdout: bytes
    stderr: bytes
    exit_code: int


async def exec_sync(table: PodTable, live: LiveContainer, args: Sequence[str], timeout_s: float) -> ExecResult:
    """Run a command to its end; 0 is no time limit. When the limit runs out it is killed and `DeadlineError` raised."""
    if not args or not args[0]:
        raise InvalidArgumentError("cmd is empty", resource=f"container {live.id}")
    if live.record.state is not ContainerState.RUNNING:
        raise FailedPreconditionError(
            f"the container is {live.record.state.value}, exec needs a running one", resource=f"container {live.id}"
        )
    agent = table.sandboxes[live.record.sandbox_id].need_agent()
    out, err = bytearray(), bytearray()
    try:
        async with asyncio.timeout(timeout_s if timeout_s > 0 else None):
            async with agent.exec(live.id, args) as session:
                async for stderr, data in session:
                    sink = err if stderr else out
                    room = min(STREAM_LIMIT_BYTES - len(sink), REPLY_LIMIT_BYTES - len(out) - len(err))
                    sink += data[: max(0, room)]
                code = await session.exit_code()
    except TimeoutError as e:
        raise DeadlineError(
            f"the command did not end within {timeout_s:g} s and was killed",
            phase="exec",
            resource=f"container {live.id}",
        ) from e
    return ExecResult(bytes(out), bytes(err), code)
