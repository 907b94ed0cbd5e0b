"""Port-forward: octets and connections to an echo on a pod's loopback, beside the same echo on the pod's address.

The client is `vmrt port-forward`'s own code in this process, so its share of the processor is in the figures; the
direct way is plain TCP to the pod's virtio-net card and needs no client but the socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import queue
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial

from bench.samples import COLD
from bench.stand import Bench, Stage, create_request, sandbox_config
from demo.daemon import Daemon
from vmrt.cli.streams import forward_ports
from vmrt.proto.runtime.v1 import api_pb2 as cri

PORT = 7
BULK_BYTES = 16 * 1024 * 1024
CONNECTIONS = 50
PATIENCE_S = 120.0


def measure(bench: Bench) -> None:
    """Take turns between the forwarded port and the pod's own address."""
    daemon, samples = bench.cold, bench.samples
    config = sandbox_config("forwarded")
    pod = daemon.runtime.RunPodSandbox(cri.RunPodSandboxRequest(config=config)).pod_sandbox_id
    try:
        request = create_request(pod, config, "echo")
        request.config.command[:] = ["nc", "-ll", "-p", str(PORT), "-e", "cat"]
        container = daemon.runtime.CreateContainer(request).container_id
        daemon.runtime.StartContainer(cri.StartContainerRequest(container_id=container))
        status = daemon.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod)).status
        direct = (status.network.ip, PORT)
        _answering(direct)
        with _forwarded(daemon, pod) as forwarded:
            for address in (forwarded, direct):
                echo(address, bytes(1000))
            for _ in range(bench.rounds):
                for what, address in (("port-forward", forwarded), ("direct", direct)):
                    for _ in range(CONNECTIONS):
                        samples.timed(COLD, f"{what}: connect, 1 octet back", partial(echo, address, b"x"))
                    data = os.urandom(BULK_BYTES)
                    began = time.monotonic()
                    echo(address, data)
                    samples.add(COLD, f"{what}: MB/s each way", BULK_BYTES / 1e6 / (time.monotonic() - began))
    finally:
        daemon.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod))
        daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod))
    samples.compare(
        "a forwarded connection, of a direct one",
        (COLD, "port-forward: connect, 1 octet back"),
        (COLD, "direct: connect, 1 octet back"),
    )
    samples.compare(
        "throughput of a forwarded port, of a direct one",
        (COLD, "port-forward: MB/s each way"),
        (COLD, "direct: MB/s each way"),
    )


def echo(address: tuple[str, int], data: bytes) -> None:
    """Send octets over a new connection, and have the same ones back. Raises `RuntimeError`, `OSError`."""
    with socket.create_connection(address, timeout=PATIENCE_S) as connection:
        sending = threading.Thread(target=_send, args=(connection, data))
        sending.start()
        received, count = hashlib.sha256(), 0
        while piece := connection.recv(1 << 16):
            received.update(piece)
            count += len(piece)
        sending.join()
    if received.digest() != hashlib.sha256(data).digest():
        raise RuntimeError(f"{count} octets came back from {address}, not the {len(data)} that were sent")


def _send(connection: socket.socket, data: bytes) -> None:
    connection.sendall(data)
    connection.shutdown(socket.SHUT_WR)


def _answering(address: tuple[str, int]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return echo(address, b"?")
        except OSError as e:
            if time.monotonic() > deadline:
                raise RuntimeError(f"nothing answers on {address}") from e
            time.sleep(0.1)


@contextlib.contextmanager
def _forwarded(daemon: Daemon, pod: str) -> Iterator[tuple[str, int]]:
    """Forward a local port, in a thread, and give its address."""
    url = daemon.runtime.PortForward(cri.PortForwardRequest(pod_sandbox_id=pod)).url
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    loop = asyncio.new_event_loop()

    async def work() -> None:
        forwarding = asyncio.ensure_future(forward_ports(url, "127.0.0.1", [(0, PORT)], told.put))
        stopped = asyncio.ensure_future(stop.wait())
        await asyncio.wait([forwarding, stopped], return_when=asyncio.FIRST_COMPLETED)
        forwarding.cancel()
        await asyncio.wait([forwarding])

    stop = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(work()))
    thread.start()
    try:
        yield "127.0.0.1", int(told.get(timeout=PATIENCE_S).partition(" ")[0].rpartition(":")[2])
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


STAGE = Stage("portforward", "connections and octets through port-forward", measure)
