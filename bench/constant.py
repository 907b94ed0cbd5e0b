"""A grpc.aio server in a process of its own that answers with constant octets: `python -m bench.constant SOCKET`.

What a list takes at least in Python, at the daemon's priority and beside what it is measured beside. Prints a line when
it serves, and ends with its stdin.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from typing import Any

import grpc

from vmrt import realtime

# About what ListPodSandbox answers for thirty pods.
_ANSWER = bytes(9000)


class _Everything(grpc.GenericRpcHandler):
    def service(self, _details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        async def answer(_request: bytes, _context: Any) -> bytes:
            return _ANSWER

        return grpc.unary_unary_rpc_method_handler(answer)


async def serve(socket: str) -> None:
    """Answer until stdin ends."""
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((_Everything(),))
    server.add_insecure_port(f"unix:{socket}")
    await server.start()
    gc.collect()
    gc.freeze()
    if why := realtime.enter():
        print(f"no real-time priority: {why}", file=sys.stderr)
    print("serving", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    realtime.leave()
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:]))
