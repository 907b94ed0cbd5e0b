"""A client in a process of its own that asks for all pods again and again: `python -m bench.lister SOCKET [fifo]`.

Prints how long each answer took, in milliseconds, one a line, until its stdin ends. With `fifo` it runs at real-time
priority, so that it never waits for a processor itself and what it measures is the daemon's part.
"""

from __future__ import annotations

import os
import select
import sys
import time

import grpc

PERIOD_S = 0.02


def main(socket: str, *options: str) -> None:
    """Ask until stdin ends."""
    if "fifo" in options:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(2))
    with grpc.insecure_channel(f"unix:{socket}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        method = "/runtime.v1.RuntimeService/ListPodSandbox"
        ask: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(method)
        ask(b"")
        while not select.select([sys.stdin], [], [], PERIOD_S)[0]:
            began = time.monotonic()
            ask(b"", timeout=60)
            print(f"{(time.monotonic() - began) * 1000:.3f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
