"""Stages "lists" and "records": what kubelet's every second costs.

"lists" has 20 real pods with one container each on vmrt and on containerd. "records" asks daemons that remember 1 and
100 stopped pods: their records are written before the start, since no VM takes part in an answer.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc

from bench.samples import COLD, CONTAINERD, Samples
from bench.stand import Bench, Stage, create_request, sandbox_config
from demo.daemon import Daemon
from vmrt.model import ContainerSpec, SandboxSpec
from vmrt.pods.records import ContainerRecord, ContainerState, SandboxRecord, SandboxState
from vmrt.proto.runtime.v1 import api_pb2 as cri
from vmrt.proto.runtime.v1 import api_pb2_grpc as cri_grpc
from vmrt.store import Store

PODS = 20
RECORDS = 100
_AT_ONCE = 4
_TURNS, _CALLS = 20, 20


def run_pod(runtime: cri_grpc.RuntimeServiceStub, name: str) -> str:
    """Run one pod with one container that sleeps; return the container's id."""
    config = sandbox_config(name)
    pod = runtime.RunPodSandbox(cri.RunPodSandboxRequest(config=config)).pod_sandbox_id
    container = runtime.CreateContainer(create_request(pod, config, "c")).container_id
    runtime.StartContainer(cri.StartContainerRequest(container_id=container))
    return str(container)


def ask(runtime: cri_grpc.RuntimeServiceStub, container: str, samples: Samples, whose: str, where: str) -> None:
    """Time the three calls that kubelet repeats, some times each."""
    status = cri.ContainerStatusRequest(container_id=container)
    calls: dict[str, Callable[[], object]] = {
        "ListPodSandbox": lambda: runtime.ListPodSandbox(cri.ListPodSandboxRequest()),
        "ListContainers": lambda: runtime.ListContainers(cri.ListContainersRequest()),
        "ContainerStatus": lambda: runtime.ContainerStatus(status),
    }
    for what, call in calls.items():
        for _ in range(_CALLS):
            samples.timed(whose, f"{what}, {where}", call)


def measure_lists(bench: Bench) -> None:
    where = f"{PODS} pods"
    sides = [(COLD, bench.cold.runtime)]
    if bench.containerd is not None:
        sides.append((CONTAINERD, bench.containerd.runtime))
    containers = {}
    for whose, runtime in sides:
        with ThreadPoolExecutor(_AT_ONCE) as starters:
            made = list(starters.map(lambda n, r=runtime: run_pod(r, f"list{n}"), range(PODS)))
        containers[whose] = made[0]
        print(".", end="", flush=True)
    for _ in range(_TURNS):
        for whose, runtime in sides:
            ask(runtime, containers[whose], bench.samples, whose, where)
    for what in ("ListPodSandbox", "ListContainers", "ContainerStatus"):
        name = f"{what}, {where}"
        bench.samples.compare(f"{name}, vmrt / containerd", (COLD, name), (CONTAINERD, name), 1.6)
    bench.cold.remove_pods()
    if bench.containerd is not None:
        bench.containerd.remove_pods()


def remember(daemon: Daemon, count: int) -> str:
    """Write the records of stopped pods with an ended container each, before the start; return a container's id."""
    store = Store(daemon.root / "state.db")
    container = ""
    for number in range(count):
        pod, container = secrets.token_hex(32), secrets.token_hex(32)
        labels = {"io.kubernetes.pod.name": f"pod-{number}", "io.kubernetes.pod.namespace": "bench"}
        store.put(
            "sandbox",
            pod,
            SandboxRecord(
                pod,
                SandboxSpec(name=f"pod-{number}", uid=str(number), namespace="bench", labels=labels),
                SandboxState.NOT_READY,
                time.time_ns(),
                vm_id=f"gone{number}",
                tap="",
                reason="stopped",
                released=True,
            ),
        )
        store.put(
            "container",
            container,
            ContainerRecord(
                container,
                pod,
                ContainerSpec(name="c", image="image", labels=labels),
                ContainerState.EXITED,
                time.time_ns(),
                "sha256:gone",
                "sha256:gone",
                finished_ns=time.time_ns(),
            ),
        )
    store.close()
    return container


def measure_records(bench: Bench) -> None:
    with contextlib.ExitStack() as stack:
        few = stack.enter_context(Daemon("few", "", log_level="info"))
        many = stack.enter_context(Daemon("many", "", log_level="info"))
        sides = [(few, 1, remember(few, 1)), (many, RECORDS, remember(many, RECORDS))]
        raw: dict[int, grpc.UnaryUnaryMultiCallable[bytes, bytes]] = {}
        for daemon, count, _ in sides:
            daemon.start()
            channel = stack.enter_context(
                grpc.insecure_channel(f"unix:{daemon.socket}", options=[("grpc.enable_http_proxy", 0)])
            )
            # Octets to the client: how long a client parses a hundred pods is not the daemon's affair.
            raw[count] = channel.unary_unary("/runtime.v1.RuntimeService/ListPodSandbox")
        for _ in range(_TURNS):
            for daemon, count, container in sides:
                where = f"{count} in the records"
                ask(daemon.runtime, container, bench.samples, COLD, where)
                for _ in range(_CALLS):
                    bench.samples.timed(COLD, f"ListPodSandbox unparsed, {where}", lambda c=count: raw[c](b""))  # type: ignore[misc]
        what = "ListPodSandbox unparsed"
        bench.samples.compare(
            f"{what}, {RECORDS} in the records / 1",
            (COLD, f"{what}, {RECORDS} in the records"),
            (COLD, f"{what}, 1 in the records"),
            1.0,
        )


LISTS = Stage("lists", f"lists and statuses with {PODS} pods beside containerd", measure_lists)
RECORDED = Stage("records", f"lists with {RECORDS} pods in the records, and with one", measure_records)
