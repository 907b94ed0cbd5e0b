"""Exec and attach: a process's streams on a session's streams, and how it ended on the error stream.

The order at the end is what Kubernetes' clients wait for: stdout and stderr end, then comes the status, then the error
stream ends. From protocol v4 on the status is a metav1.Status as JSON, below it a text, and only for a failure.

The client's end kills an exec's process: nobody is left to read it. A client that says before that it only goes away
(`kept`) leaves the process: its output is thrown away from then on, and it ends with the daemon at the latest. An
attached container goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial

from vmrt.errors import UnavailableError, VmrtError
from vmrt.streaming.stream import PeerGoneError, Stream
from vmrt.streaming.targets import AttachRequest, ExecRequest, Process, Targets

log = logging.getLogger(__name__)

_RESIZE_BYTES = 4096
_SUCCESS: dict[str, object] = {"metadata": {}, "status": "Success"}


@dataclass(frozen=True, slots=True)
class ProcessStreams:
    """The streams of one session; those that the request does not ask for are None."""

    error: Stream
    stdin: Stream | None = None
    stdout: Stream | None = None
    stderr: Stream | None = None
    resize: Stream | None = None


async def serve(
    targets: Targets,
    request: ExecRequest | AttachRequest,
    streams: ProcessStreams,
    *,
    status_json: bool,
    gone: asyncio.Event,
    stopping: asyncio.Event,
    opened: Callable[[], Awaitable[None]] | None = None,
    kept: Callable[[], bool] = lambda: False,
) -> None:
    """Run the session to the end of the process, the client, or the daemon.

    `opened` is called once the process is there. `kept` says whether a client that has gone wants it to go on.
    """
    work = asyncio.create_task(_run(targets, request, streams, opened, kept))
    ends = [asyncio.create_task(event.wait()) for event in (gone, stopping)]
    try:
        await asyncio.wait([work, *ends], return_when=asyncio.FIRST_COMPLETED)
        if not work.done() and not stopping.is_set() and kept():
            await asyncio.wait([work, ends[1]], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for end in ends:
            end.cancel()
        if not work.done():
            work.cancel()
        await asyncio.wait([work])
    status = _SUCCESS
    try:
        code = await _outcome(work, stopping)
    except PeerGoneError:
        return
    except VmrtError as e:
        log.info("%s: %s", type(request).__name__, e)
        status = failure(str(e))
    else:
        # An attach has told what it had to when the output has ended; the exit code is in the container's status.
        if code and isinstance(request, ExecRequest):
            status = exit_status(code)
    with contextlib.suppress(PeerGoneError):
        for stream in (streams.stdout, streams.stderr):
            if stream is not None:
                await stream.close()
        if status_json:
            await streams.error.write(json.dumps(status).encode())
        elif status is not _SUCCESS:
            await streams.error.write(str(status["message"]).encode())
        await streams.error.close()


async def _outcome(work: asyncio.Task[int], stopping: asyncio.Event) -> int:
    try:
        return await work
    except asyncio.CancelledError:
        if stopping.is_set():
            raise UnavailableError("the daemon is stopping", phase="stream") from None
        raise PeerGoneError("the client has gone") from None


async def _run(
    targets: Targets,
    request: ExecRequest | AttachRequest,
    streams: ProcessStreams,
    opened: Callable[[], Awaitable[None]] | None,
    kept: Callable[[], bool],
) -> int:
    async with _open(targets, request) as process:
        if opened is not None:
            await opened()
        inward = []
        if streams.stdin is not None:
            inward.append(asyncio.create_task(_quietly(partial(_feed, process, streams.stdin, kept))))
        if streams.resize is not None:
            inward.append(asyncio.create_task(_quietly(partial(_resize, process, streams.resize))))
        try:
            async for is_stderr, data in process:
                sink = streams.stderr if is_stderr else streams.stdout
                if sink is not None:
                    await _deliver(sink, data, kept)
            return await process.exit_code()
        finally:
            for task in inward:
                task.cancel()
            if inward:
                await asyncio.wait(inward)


def _open(targets: Targets, request: ExecRequest | AttachRequest) -> AbstractAsyncContextManager[Process]:
    return targets.exec(request) if isinstance(request, ExecRequest) else targets.attach(request)


async def _deliver(sink: Stream, data: bytes, kept: Callable[[], bool]) -> None:
    """Write output; it is lost when the client has gone and the process is to go on."""
    try:
        await sink.write(data)
    except PeerGoneError:
        if not kept():
            raise


async def _quietly(work: Callable[[], Awaitable[None]]) -> None:
    """Let what goes to the process end before the process does: the output's end is what counts."""
    try:
        await work()
    except (PeerGoneError, VmrtError) as e:
        log.debug("towards the process: %s", e)


async def _feed(process: Process, stdin: Stream, kept: Callable[[], bool]) -> None:
    try:
        while data := await stdin.read():
            await process.write_stdin(data)
    except PeerGoneError:
        if kept():
            return  # end of file would end a shell
        # Else a reset ends stdin as FIN does.
    await process.close_stdin()


async def _resize(process: Process, resize: Stream) -> None:
    sizes = WindowSizes()
    while data := await resize.read():
        if found := list(sizes.feed(data)):
            await process.resize(*found[-1])


class WindowSizes:
    """The resize stream: JSON objects one behind the other, `{"Width": 80, "Height": 24}`, in pieces of any length."""

    def __init__(self) -> None:
        self._text = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[int, int]]:
        """Yield (width, height) of each object that is whole. What is none of these is dropped."""
        self._text += data
        while (end := self._text.find(b"}")) >= 0:
            one = bytes(self._text[: end + 1])
            del self._text[: end + 1]
            try:
                size = json.loads(one)
                width, height = size["Width"], size["Height"]
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
            if type(width) is int and type(height) is int and 0 < width < 65536 and 0 < height < 65536:
                yield width, height
        if len(self._text) > _RESIZE_BYTES:
            self._text.clear()


def exit_status(code: int) -> dict[str, object]:
    """Return the metav1.Status of a command that ended with a code that is not 0."""
    return {
        "metadata": {},
        "status": "Failure",
        "message": f"command terminated with non-zero exit code: {code}",
        "reason": "NonZeroExitCode",
        "details": {"causes": [{"reason": "ExitCode", "message": str(code)}]},
    }


def failure(text: str) -> dict[str, object]:
    """Return the metav1.Status of a session that failed."""
    return {
        "metadata": {},
        "status": "Failure",
        "message": f"Internal error occurred: {text}",
        "reason": "InternalError",
        "details": {"causes": [{"message": text}]},
        "code": 500,
    }
