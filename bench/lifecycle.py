"""Stage "lifecycle": a pod's way from RunPodSandbox to its removal, on every side in turn, and the bare VM's boot."""

from __future__ import annotations

import json
import time

from bench.samples import COLD, CONTAINERD, FLOOR, WARM, Samples
from bench.stand import Bench, Stage, create_request, sandbox_config
from demo.daemon import Daemon
from vmrt.proto.runtime.v1 import api_pb2 as cri
from vmrt.proto.runtime.v1 import api_pb2_grpc as cri_grpc

CONTAINERS, EXECS = 3, 10
# Issue 4's measures that are ratios of vmrt with a warm pool to containerd, and what they may be at most.
LIMITS = {
    "RunPodSandbox": 1.0,
    "Stop + RemovePodSandbox": 1.0,
    "Create + StartContainer": 4.0,
    "ExecSync(true)": 2.5,
}


def pod_round(runtime: cri_grpc.RuntimeServiceStub, samples: Samples, whose: str) -> dict[str, str]:
    """Run one pod through its life; return its verbose status."""
    config = sandbox_config()
    run = cri.RunPodSandboxRequest(config=config)
    pod = samples.timed(whose, "RunPodSandbox", lambda: runtime.RunPodSandbox(run)).pod_sandbox_id
    info = dict(runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True)).info)
    container = ""
    for number in range(CONTAINERS):
        create = create_request(pod, config, f"c{number}")
        began = time.monotonic()
        made = samples.timed(whose, "CreateContainer", lambda c=create: runtime.CreateContainer(c))  # type: ignore[misc]
        container = made.container_id
        start = cri.StartContainerRequest(container_id=container)
        samples.timed(whose, "StartContainer", lambda s=start: runtime.StartContainer(s))  # type: ignore[misc]
        samples.add(whose, "Create + StartContainer", (time.monotonic() - began) * 1000)
    execute = cri.ExecSyncRequest(container_id=container, cmd=["true"], timeout=30)
    for _ in range(EXECS):
        samples.timed(whose, "ExecSync(true)", lambda: runtime.ExecSync(execute))
    began = time.monotonic()
    stop = cri.StopPodSandboxRequest(pod_sandbox_id=pod)
    samples.timed(whose, "StopPodSandbox", lambda: runtime.StopPodSandbox(stop))
    remove = cri.RemovePodSandboxRequest(pod_sandbox_id=pod)
    samples.timed(whose, "RemovePodSandbox", lambda: runtime.RemovePodSandbox(remove))
    samples.add(whose, "Stop + RemovePodSandbox", (time.monotonic() - began) * 1000)
    return info


def vmrt_round(daemon: Daemon, samples: Samples, whose: str) -> None:
    """Run one pod of vmrt and note its phases."""
    info = pod_round(daemon.runtime, samples, whose)
    for phase, ms in json.loads(info["phasesMs"]).items():
        samples.add(whose, f"phase: {phase}", ms)


def measure(bench: Bench) -> None:
    samples = bench.samples
    for _ in range(bench.rounds):
        with bench.bare_vm() as vm:
            samples.add(FLOOR, "boot to ready", vm.boot_s * 1000)
        vmrt_round(bench.cold, samples, COLD)
        # The refilling of the pool must not weigh on what is measured beside it.
        bench.wait_for_pool(bench.warm)
        vmrt_round(bench.warm, samples, WARM)
        bench.wait_for_pool(bench.warm)
        if bench.containerd is not None:
            pod_round(bench.containerd.runtime, samples, CONTAINERD)
        print(".", end="", flush=True)
    samples.compare("RunPodSandbox, cold / bare QEMU to ready", (COLD, "RunPodSandbox"), (FLOOR, "boot to ready"), 1.25)
    for what, limit in LIMITS.items():
        samples.compare(f"{what}, vmrt warm / containerd", (WARM, what), (CONTAINERD, what), limit)


STAGE = Stage("lifecycle", "a pod's life beside containerd, a cold start beside bare QEMU", measure)
