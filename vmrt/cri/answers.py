"""Answers that read memory only, kept as the octets that go on the wire until a record changes.

kubelet asks for all pods and containers every second, and for the status of each now and then; nearly always nothing
has changed since. The octets of a request are the key, so that a known question costs neither parsing nor building.

Rules: an answer is kept for one generation of the records (`Pods.generation`) and never with a verbose request, which
may ask a VM; errors are not kept; what is kept is bounded.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from vmrt.proto.runtime.v1 import api_pb2 as cri

# Lists and statuses of more containers than a node has; beyond either bound everything is built anew.
_LIMIT_ANSWERS = 4096
_LIMIT_BYTES = 64 * 1024**2

Behaviour = Callable[[Any, Any], Awaitable[Any]]


def fresh_timestamp() -> bytes:
    """Return the part of a PodSandboxStatusResponse that is never old; of a field that comes twice the last counts."""
    return cri.PodSandboxStatusResponse(timestamp=time.time_ns()).SerializeToString()


def nothing() -> bytes:
    """Return no octets: for answers that are kept as they are."""
    return b""


# The calls whose answers are kept, each with what is appended to a kept answer.
KEPT: dict[str, Callable[[], bytes]] = {
    "ListPodSandbox": nothing,
    "ListContainers": nothing,
    "PodSandboxStatus": fresh_timestamp,
    "ContainerStatus": nothing,
}


class Answers:
    """The kept answers of one server. `generation` returns what changes with the records, None to keep nothing."""

    def __init__(self, generation: Callable[[], int | None]) -> None:
        self._generation = generation
        self._of: int | None = None
        self._kept: dict[tuple[str, bytes], bytes] = {}
        self._size_bytes = 0

    def handler(self, name: str, handler: Any) -> grpc.RpcMethodHandler[Any, Any]:
        """Return a unary handler that takes and gives octets, in place of a generated one of the same call."""
        return grpc.unary_unary_rpc_method_handler(
            self._behaviour(name, handler.unary_unary, handler.request_deserializer, handler.response_serializer)
        )

    def _behaviour(
        self, name: str, behave: Behaviour, parse: Callable[[bytes], Any], serialise: Callable[[Any], bytes]
    ) -> Behaviour:
        suffix = KEPT[name]

        async def answer(request: bytes, context: Any) -> bytes:
            generation = self._current()
            found = self._kept.get((name, request))
            if found is not None:
                return found + suffix()
            message = parse(request)
            octets = serialise(await behave(message, context))
            # What was built while records changed is of neither generation.
            if generation is not None and generation == self._current() and not getattr(message, "verbose", False):
                self._keep((name, request), octets)
            return octets

        return answer

    def _current(self) -> int | None:
        """Return the generation of now, with nothing kept of another one."""
        generation = self._generation()
        if generation is None or generation != self._of:
            self._forget()
            self._of = generation
        return generation

    def _keep(self, key: tuple[str, bytes], octets: bytes) -> None:
        size = len(key[1]) + len(octets)
        if len(self._kept) >= _LIMIT_ANSWERS or self._size_bytes + size > _LIMIT_BYTES:
            self._forget()
        self._kept[key] = octets
        self._size_bytes += size

    def _forget(self) -> None:
        self._kept.clear()
        self._size_bytes = 0
