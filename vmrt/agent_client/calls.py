"""One ttRPC connection to an agent: calls at the same time, answers matched by stream id."""

from __future__ import annotations

import asyncio

from vmrt import errors
from vmrt.agent import status, ttrpc

SERVICE = "vmrt.agent.v1.Agent"
_READ = 65536
_ERRORS: dict[int, type[errors.VmrtError]] = {
    status.INVALID_ARGUMENT: errors.InvalidArgumentError,
    status.DEADLINE_EXCEEDED: errors.DeadlineError,
    status.NOT_FOUND: errors.NotFoundError,
    status.ALREADY_EXISTS: errors.AlreadyExistsError,
    status.RESOURCE_EXHAUSTED: errors.ExhaustedError,
    status.FAILED_PRECONDITION: errors.FailedPreconditionError,
    status.IMAGE_STORAGE: errors.ImageVolumeError,
    status.OUT_OF_RANGE: errors.InvalidArgumentError,
    status.UNIMPLEMENTED: errors.UnimplementedError,
}


def printable(text: str) -> str:
    """Return a guest's text without control characters and at most 4096 characters long."""
    return "".join(c if c.isprintable() else " " for c in text[: status.MAX_MESSAGE_CHARS])


def translate(code: int, message: str, phase: str, resource: str) -> errors.VmrtError:
    """Return the error for a status that the agent sent."""
    return _ERRORS.get(code, errors.AgentError)(printable(message) or f"status {code}", phase=phase, resource=resource)


class Calls:
    """One ttRPC connection: requests out, answers matched by stream id."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, resource: str) -> None:
        self._reader = reader
        self._writer = writer
        self._resource = resource
        self._next_id = 1
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._failure: tuple[type[errors.VmrtError], str] | None = None
        self._task = asyncio.create_task(self._receive(), name=f"agent {resource}")

    @property
    def alive(self) -> bool:
        """Whether new calls can be made on it."""
        return self._failure is None and self._next_id < 2**32

    async def call(self, method: str, payload: bytes, timeout_s: float) -> bytes:
        """Send a request and return the answer's payload. Raises the agent's `AgentError`, or a `VmrtError`."""
        if self._failure is not None:
            raise self._error()
        stream_id, self._next_id = self._next_id, self._next_id + 2
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[stream_id] = answer
        try:
            # The agent gives up a little earlier: its own error says what it waited for.
            limit_ns = int((timeout_s - min(1.0, timeout_s / 10)) * 1e9)
            try:
                self._writer.write(ttrpc.request(stream_id, SERVICE, method, payload, limit_ns))
                await self._writer.drain()
            except OSError as e:
                self.fail(f"the connection broke: {e}")
            except ttrpc.ProtocolError as e:
                raise errors.InvalidArgumentError(str(e), phase=method, resource=self._resource) from e
            return await answer
        finally:
            self._waiting.pop(stream_id, None)
            if answer.done() and not answer.cancelled():
                answer.exception()  # retrieved: nobody may be waiting any more

    async def _receive(self) -> None:
        decoder = ttrpc.ClientDecoder()
        reason = "the agent closed the connection"
        try:
            while data := await self._reader.read(_READ):
                for message in decoder.feed(data):
                    self._answer(message)
        except OSError as e:
            reason = f"the connection broke: {e}"
        except ttrpc.ProtocolError as e:
            reason = f"the agent broke the protocol: {printable(str(e))}"
        finally:
            self.fail(reason)

    def _answer(self, message: ttrpc.Message) -> None:
        waiting = self._waiting.get(message.stream_id)
        if waiting is None or waiting.done():
            return  # its caller gave up
        try:
            waiting.set_result(ttrpc.parse_response(message))
        except status.AgentError as e:
            waiting.set_exception(e)

    def fail(self, reason: str, kind: type[errors.VmrtError] = errors.UnavailableError) -> None:
        """Fail all calls, those to come too, and close the connection."""
        if self._failure is None:
            self._failure = (kind, reason)
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(self._error())
        self._writer.close()

    def _error(self) -> errors.VmrtError:
        # A new one each time: an exception collects the traceback of whoever raises it.
        kind, reason = self._failure or (errors.UnavailableError, "not connected")
        return kind(reason, phase="agent call", resource=self._resource)

    async def close(self, reason: str, kind: type[errors.VmrtError]) -> None:
        """Fail all calls and wait until the connection's task has ended."""
        self.fail(reason, kind)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
