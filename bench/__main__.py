"""`make bench`: what a pod costs, beside containerd with runc and the bare VM it stands on, interleaved in one run.

Absolute times shift from machine to machine and from minute to minute: quote the ratios. Written as a table, as JSON
with `--json FILE`, and as a picture of where a pod's start goes with `--svg FILE`.
"""

from __future__ import annotations

import contextlib
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click

from bench import peer
from bench.floor import bare_vm, pss_bytes
from demo import busybox_image
from demo.daemon import Daemon
from vmrt import config, guest_image
from vmrt.cli.trace import phases_svg
from vmrt.proto.runtime.v1 import api_pb2 as cri
from vmrt.proto.runtime.v1 import api_pb2_grpc as cri_grpc

IMAGE = "docker.io/library/vmrt-bench:latest"
SETTLE_S = 5.0
REFILL_S = 120.0
WARM, COLD, CONTAINERD, FLOOR = "vmrt, warm", "vmrt, cold", "containerd", "bare QEMU"
# Issue 4's measures that are ratios of vmrt with a warm pool to containerd, and what they may be at most.
LIMITS = {
    "RunPodSandbox": 1.0,
    "Stop + RemovePodSandbox": 1.0,
    "Create + StartContainer": 4.0,
    "ExecSync(true)": 2.5,
    "ListContainers": 1.6,
}

T = TypeVar("T")


class Samples:
    """Durations and sizes by (whose, what)."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str], list[float]] = {}

    def add(self, whose: str, what: str, value: float) -> None:
        """Note one value."""
        self.values.setdefault((whose, what), []).append(value)

    def timed(self, whose: str, what: str, call: Callable[[], T]) -> T:
        """Time one call, in milliseconds."""
        began = time.monotonic()
        result = call()
        self.add(whose, what, (time.monotonic() - began) * 1000)
        return result

    def median(self, whose: str, what: str) -> float:
        """Return the median of a name's values."""
        return statistics.median(self.values[whose, what])

    def p99(self, whose: str, what: str) -> float:
        """Return the 99th percentile (nearest rank; of few values the largest)."""
        values = sorted(self.values[whose, what])
        return values[-(-len(values) * 99 // 100) - 1]


def pod_round(
    runtime: cri_grpc.RuntimeServiceStub, samples: Samples, whose: str, containers: int, execs: int
) -> dict[str, str]:
    """Run one pod through its life; return its verbose status."""
    sandbox_config = cri.PodSandboxConfig(
        metadata=cri.PodSandboxMetadata(name="bench", namespace="bench", uid=str(uuid.uuid4()))
    )
    run = cri.RunPodSandboxRequest(config=sandbox_config)
    pod = samples.timed(whose, "RunPodSandbox", lambda: runtime.RunPodSandbox(run)).pod_sandbox_id
    info = dict(runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True)).info)
    own_pids = cri.LinuxContainerConfig(
        security_context=cri.LinuxContainerSecurityContext(namespace_options=cri.NamespaceOption(pid=cri.CONTAINER))
    )
    container = ""
    for number in range(containers):
        create = cri.CreateContainerRequest(
            pod_sandbox_id=pod,
            config=cri.ContainerConfig(
                metadata=cri.ContainerMetadata(name=f"c{number}"),
                image=cri.ImageSpec(image=IMAGE),
                command=["sleep", "1000"],
                linux=own_pids,
            ),
            sandbox_config=sandbox_config,
        )
        began = time.monotonic()
        made = samples.timed(whose, "CreateContainer", lambda c=create: runtime.CreateContainer(c))  # type: ignore[misc]
        container = made.container_id
        start = cri.StartContainerRequest(container_id=container)
        samples.timed(whose, "StartContainer", lambda s=start: runtime.StartContainer(s))  # type: ignore[misc]
        samples.add(whose, "Create + StartContainer", (time.monotonic() - began) * 1000)
    execute = cri.ExecSyncRequest(container_id=container, cmd=["true"], timeout=30)
    for _ in range(execs):
        samples.timed(whose, "ExecSync(true)", lambda: runtime.ExecSync(execute))
        samples.timed(whose, "ListContainers", lambda: runtime.ListContainers(cri.ListContainersRequest()))
    began = time.monotonic()
    stop = cri.StopPodSandboxRequest(pod_sandbox_id=pod)
    samples.timed(whose, "StopPodSandbox", lambda: runtime.StopPodSandbox(stop))
    remove = cri.RemovePodSandboxRequest(pod_sandbox_id=pod)
    samples.timed(whose, "RemovePodSandbox", lambda: runtime.RemovePodSandbox(remove))
    samples.add(whose, "Stop + RemovePodSandbox", (time.monotonic() - began) * 1000)
    return info


def vmrt_round(daemon: Daemon, samples: Samples, whose: str) -> None:
    """Run one pod of vmrt and note its phases."""
    info = pod_round(daemon.runtime, samples, whose, containers=3, execs=10)
    for phase, ms in json.loads(info["phasesMs"]).items():
        samples.add(whose, f"phase: {phase}", ms)


def wait_for_pool(daemon: Daemon) -> None:
    """Return when a VM waits; raises `RuntimeError` when none comes."""
    deadline = time.monotonic() + REFILL_S
    while True:
        info = json.loads(daemon.runtime.Status(cri.StatusRequest(verbose=True)).info["config"])
        if info["pool"]["waiting"] >= info["pool"]["size"]:
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"no VM was booted ahead:\n{daemon.log()[-3000:]}")
        time.sleep(0.1)


def idle_memory(daemon: Daemon, samples: Samples) -> None:
    """Measure an idle pod and its helpers."""
    metadata = cri.PodSandboxMetadata(name="idle", namespace="bench", uid=str(uuid.uuid4()))
    run = cri.RunPodSandboxRequest(config=cri.PodSandboxConfig(metadata=metadata))
    pod = daemon.runtime.RunPodSandbox(run).pod_sandbox_id
    time.sleep(SETTLE_S)
    info = daemon.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True)).info
    pss = sum(pss_bytes(p) for p in json.loads(info["vm"])["pids"])
    samples.add(COLD, "PSS with helpers, MB", pss / 1e6)
    daemon.remove_pods()


def report(samples: Samples) -> dict[str, object]:
    """Print the tables and return what goes into the JSON."""
    print(f"\n{'whose':<12} {'what':<26} {'median':>9} {'p99':>9} {'min':>9}   n")
    for (whose, what), values in samples.values.items():
        line = f"{samples.median(whose, what):9.1f} {samples.p99(whose, what):9.1f} {min(values):9.1f}"
        print(f"{whose:<12} {what:<26} {line}  {len(values):3}")
    ratios = {
        "RunPodSandbox, cold / bare QEMU to ready": samples.median(COLD, "RunPodSandbox")
        / samples.median(FLOOR, "boot to ready"),
        "PSS of an idle pod with helpers / bare QEMU with its own": samples.median(COLD, "PSS with helpers, MB")
        / samples.median(FLOOR, "PSS with helpers, MB"),
    }
    limits = {"RunPodSandbox, cold / bare QEMU to ready": 1.25}
    if (CONTAINERD, "RunPodSandbox") in samples.values:
        for what, limit in LIMITS.items():
            name = f"{what}, vmrt warm / containerd"
            ratios[name] = samples.median(WARM, what) / samples.median(CONTAINERD, what)
            limits[name] = limit
    print()
    for name, ratio in ratios.items():
        limit_text = f"  (at most {limits[name]:g})" if name in limits else ""
        print(f"{name}: {ratio:.2f}{limit_text}")
    values_by_name = {f"{whose}: {what}": values for (whose, what), values in samples.values.items()}
    return {"values": values_by_name, "ratios": ratios, "limits": limits}


@click.command()
@click.option("--rounds", default=5, show_default=True, help="Pods and bare VMs to start, in turn.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all values here.")
@click.option("--svg", "svg_path", type=click.Path(path_type=Path), help="Draw where a pod's start goes here.")
def main(rounds: int, json_path: Path | None, svg_path: Path | None) -> None:
    """Measure vmrt against containerd and bare QEMU on this machine. Times in milliseconds."""
    samples = Samples()
    with contextlib.ExitStack() as stack:
        scratch = Path(
            stack.enter_context(
                tempfile.TemporaryDirectory(prefix="vmrt-bench-", dir="/var/tmp", ignore_cleanup_errors=True)
            )
        )
        busybox_image.write_busybox(scratch / "image", IMAGE)
        cold = stack.enter_context(Daemon("cold", "[pool]\nsize = 0\n"))
        warm = stack.enter_context(Daemon("warm", "[pool]\nsize = 1\n"))
        guest = guest_image.load(cold.guest)
        for daemon in (cold, warm):
            daemon.start()
            daemon.load(scratch / "image")
        info = json.loads(cold.runtime.Status(cri.StatusRequest(verbose=True)).info["config"])
        kvm = info["accelerator"] == "kvm"
        qemu = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True).stdout
        print(f"{qemu.splitlines()[0]}, {info['accelerator']}, guest kernel {guest.kernel_release}")
        print(f"host kernel {platform.release()}, Python {platform.python_version()}, {rounds} rounds", flush=True)
        containerd = None
        if version := peer.version():
            print(version, flush=True)
            containerd = stack.enter_context(peer.running(scratch / "containerd"))
            containerd.load(scratch / "image")
        else:
            print("containerd or runc is not installed (apt-get install containerd): no comparison with them")
        helper = config.HypervisorConfig().vhost_device_vsock
        for number in range(rounds):
            with bare_vm(guest, scratch / f"bare{number}", helper, kvm=kvm) as vm:
                samples.add(FLOOR, "boot to ready", vm.boot_s * 1000)
                if number == 0:
                    time.sleep(SETTLE_S)
                    both = pss_bytes(vm.qemu_pid) + pss_bytes(vm.helper_pid)
                    samples.add(FLOOR, "PSS with helpers, MB", both / 1e6)
            vmrt_round(cold, samples, COLD)
            # The refilling of the pool must not weigh on what is measured beside it.
            wait_for_pool(warm)
            vmrt_round(warm, samples, WARM)
            wait_for_pool(warm)
            if containerd is not None:
                pod_round(containerd.runtime, samples, CONTAINERD, containers=3, execs=10)
            print(".", end="", flush=True)
        idle_memory(cold, samples)
        result = report(samples)
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1))
    if svg_path is not None:
        svg_path.write_text(phases_svg(_medians(samples)))


def _medians(samples: Samples) -> dict[str, dict[str, float]]:
    phases: dict[str, dict[str, float]] = {}
    for whose, what in samples.values:
        if what.startswith("phase: "):
            phases.setdefault(whose, {})[what.removeprefix("phase: ")] = samples.median(whose, what)
    return phases


if __name__ == "__main__":
    sys.exit(main())
