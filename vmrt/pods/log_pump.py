"""Carries one container's output from the agent's buffer into its CRI log file, for as long as both exist.

The agent keeps what is not acknowledged; an acknowledgement goes out only for what is in the file. So neither a broken
connection nor a restart of the daemon loses or doubles an octet.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path

from vmrt.agent_client import AgentClient
from vmrt.errors import NotFoundError, VmGoneError, VmrtError
from vmrt.pods.cri_log import LogFile

log = logging.getLogger(__name__)

_RETRY_S = 0.2


class LogPump:
    """The pump of one container; runs from construction until the streams end or `stop`."""

    def __init__(
        self, agent: AgentClient, container_id: str, log_path: Path, position_path: Path, line_limit: int
    ) -> None:
        """Open the log (created if absent) and start; raises `VmrtError` when the file cannot be opened."""
        self._agent = agent
        self._id = container_id
        self._file = LogFile(log_path, position_path, line_limit)
        self._done = asyncio.Event()
        self._task = asyncio.create_task(self._run(), name=f"log {container_id[:13]}")

    def reopen(self) -> None:
        """Go on in a fresh file under the same name (kubelet has renamed the old one)."""
        self._file.reopen()

    async def drained(self, timeout_s: float) -> None:
        """Wait until all output is in the file; a process that holds the stream open cannot hold us past the limit."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._done.wait()

    async def stop(self) -> None:
        """End the pump and close the file. What is not in the file yet stays with the agent."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._file.close()

    async def _run(self) -> None:
        try:
            ended = await self._follow()
            while not ended:
                await asyncio.sleep(_RETRY_S)  # the VM may be gone: the next attempt tells
                ended = await self._follow()
        except (VmGoneError, NotFoundError):
            pass  # nothing more will come
        try:
            self._file.finish()
            self._file.close()
        except OSError as e:
            log.error("container %s: the end of its log: %s", self._id[:13], e)
        finally:
            self._done.set()

    async def _follow(self) -> bool:
        """Follow the stream until it ends (True) or its connection does (False)."""
        done = self._file.position.committed
        try:
            async with self._agent.output(self._id, done.stdout, done.stderr) as output:
                async for chunk in output:
                    if chunk.eof:
                        done = self._file.finish()
                        await output.ack(done.stdout, done.stderr)
                        return True
                    done = self._file.take(chunk.stderr, chunk.offset, chunk.data, chunk.age_us)
                    await output.ack(done.stdout, done.stderr)
        except (VmGoneError, NotFoundError):
            raise
        except (VmrtError, OSError) as e:
            log.debug("container %s: log stream broke, trying again: %s", self._id[:13], e)
        except Exception:
            # Without its log's reader the container would block once the agent's buffer is full.
            log.exception("container %s: log stream broke, trying again", self._id[:13])
        return False
