"""The one place where the outcome of a call becomes a gRPC status, a log line, or both.

    VmrtError            its class's code, str(error) as the message, shortened to what clients' header limits take
    cancellation         passed on: grpc answers CANCELLED, the handler has undone its work
    anything else        INTERNAL with a short id; the log has the traceback under the same id

Requests are never logged: PullImage carries credentials, containers' environments carry secrets.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

import vmrt
from vmrt.errors import Code, UnimplementedError, VmrtError

log = logging.getLogger(__name__)

# C-core clients (the vmrt command line is one) take 8 KiB of metadata by default; grpc-message is percent-encoded.
DETAILS_LIMIT_BYTES = 6 * 1024

# Asked for every second or so by kubelet: their success is worth no line at the usual level.
_POLLED = frozenset(
    f"/runtime.v1.{method}"
    for method in (
        "RuntimeService/Version",
        "RuntimeService/Status",
        "RuntimeService/ListPodSandbox",
        "RuntimeService/ListContainers",
        "RuntimeService/PodSandboxStatus",
        "RuntimeService/ContainerStatus",
        "RuntimeService/ExecSync",
        "RuntimeService/ContainerStats",
        "RuntimeService/ListContainerStats",
        "RuntimeService/ListPodSandboxStats",
        "RuntimeService/ListPodSandboxMetrics",
        "ImageService/ListImages",
        "ImageService/ImageStatus",
        "ImageService/ImageFsInfo",
    )
)
STATUS: dict[Code, grpc.StatusCode] = {
    Code(status.value[0]): status for status in grpc.StatusCode if status.value[0] in set(Code)
}


def unimplemented(method: str) -> Any:
    """Return a handler, unary or streaming, for a call of the interface that vmrt does not have yet."""

    async def refuse(_self: Any, _request: Any, _context: Any) -> Any:
        raise UnimplementedError(f"{method} is not implemented by vmrt {vmrt.__version__}")

    return refuse


def with_outcome(method: str, handler: Any) -> grpc.RpcMethodHandler[Any, Any]:
    """Return a handler with its behaviour wrapped. `method` is the full name, "/runtime.v1.RuntimeService/Version".

    Once for each method, where an interceptor of grpc's would make a new handler for each call.
    """
    if handler.unary_unary:
        return grpc.unary_unary_rpc_method_handler(
            _unary(method, handler.unary_unary),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
    if handler.unary_stream:
        return grpc.unary_stream_rpc_method_handler(
            _stream(method, handler.unary_stream),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
    raise TypeError(f"{method}: calls with a stream of requests are not wrapped yet")


def _unary(method: str, behaviour: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        started = time.monotonic()
        try:
            response = await behaviour(request, context)
        except BaseException as error:
            await _fail(method, started, error, context)
            raise
        _log_success(method, started)
        return response

    return call


def _stream(method: str, behaviour: Callable[[Any, Any], Any]) -> Callable[[Any, Any], AsyncIterator[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        started = time.monotonic()
        try:
            answer = behaviour(request, context)
            if isinstance(answer, Awaitable):
                await answer  # a refusal: it has no messages
            else:
                async for message in answer:
                    yield message
        except BaseException as error:
            await _fail(method, started, error, context)
            raise
        _log_success(method, started)

    return call


def _log_success(method: str, started: float) -> None:
    level = logging.DEBUG if method in _POLLED else logging.INFO
    log.log(level, "%s: OK in %.1f ms", method, (time.monotonic() - started) * 1e3)


async def _fail(method: str, started: float, error: BaseException, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    """Log, and abort the call with the error's status; returns for what is to be raised on."""
    spent_ms = (time.monotonic() - started) * 1e3
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        log.info("%s: cancelled after %.1f ms", method, spent_ms)
    elif isinstance(error, VmrtError):
        level = logging.INFO if error.code is not Code.INTERNAL else logging.ERROR
        log.log(level, "%s: %s in %.1f ms: %s", method, error.code.name, spent_ms, error)
        await context.abort(STATUS[error.code], bounded(str(error)))
    elif isinstance(error, Exception) and not isinstance(error, grpc.aio.AbortError):
        ident = secrets.token_hex(4)
        log.error("%s: internal error %s after %.1f ms", method, ident, spent_ms, exc_info=error)
        await context.abort(
            grpc.StatusCode.INTERNAL, f"internal error {ident} ({type(error).__name__}): vmrt's log has more under it"
        )


def bounded(text: str, limit: int = DETAILS_LIMIT_BYTES) -> str:
    """Shorten a message in its middle so that its percent-encoded form has at most `limit` octets.

    The beginning says what failed, the end is that of a console: both are kept, one third and two thirds.
    """
    costs = [1 if " " <= char <= "~" and char != "%" else 3 * len(char.encode(errors="replace")) for char in text]
    if sum(costs) <= limit:
        return text
    mark = " [...] "
    room = limit - len(mark)
    head = _fitting(costs, room // 3)
    tail = _fitting(costs[::-1], room - room // 3)
    return text[:head] + mark + text[len(text) - tail :]


def _fitting(costs: list[int], room: int) -> int:
    for count, cost in enumerate(costs):
        room -= cost
        if room < 0:
            return count
    return len(costs)
