"""`make bench`: what a pod costs, beside the bare VM it stands on, interleaved in one run.

Absolute times shift from machine to machine: quote the ratios. Written as a table, and as JSON with `--json FILE`.
"""

from __future__ import annotations

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

import click

from bench.floor import bare_vm, pss_bytes
from demo import busybox_image
from demo.daemon import Daemon
from vmrt import config, guest_image
from vmrt.proto.runtime.v1 import api_pb2 as cri

IMAGE = "docker.io/library/vmrt-bench:latest"
SETTLE_S = 5.0


class Samples:
    """Durations and sizes by name."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def add(self, name: str, value: float) -> None:
        """Note one value."""
        self.values.setdefault(name, []).append(value)

    def timed(self, name: str, call: Callable[[], object]) -> object:
        """Time one call, in milliseconds."""
        began = time.monotonic()
        result = call()
        self.add(name, (time.monotonic() - began) * 1000)
        return result

    def median(self, name: str) -> float:
        """Return the median of a name's values."""
        return statistics.median(self.values[name])


def pod_round(daemon: Daemon, samples: Samples, containers: int, execs: int) -> None:
    """Run one pod through its life."""
    runtime = daemon.runtime
    sandbox_config = cri.PodSandboxConfig(
        metadata=cri.PodSandboxMetadata(name="bench", namespace="bench", uid=str(uuid.uuid4()))
    )
    run = cri.RunPodSandboxRequest(config=sandbox_config)
    pod = samples.timed("RunPodSandbox, cold", lambda: runtime.RunPodSandbox(run)).pod_sandbox_id  # type: ignore[attr-defined]
    info = runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True)).info
    for phase, ms in json.loads(info["phasesMs"]).items():
        samples.add(f"phase: {phase}", ms)
    container = ""
    for number in range(containers):
        create = cri.CreateContainerRequest(
            pod_sandbox_id=pod,
            config=cri.ContainerConfig(
                metadata=cri.ContainerMetadata(name=f"c{number}"),
                image=cri.ImageSpec(image=IMAGE),
                command=["sleep", "1000"],
                linux=cri.LinuxContainerConfig(
                    security_context=cri.LinuxContainerSecurityContext(
                        namespace_options=cri.NamespaceOption(pid=cri.CONTAINER)
                    )
                ),
            ),
            sandbox_config=sandbox_config,
        )
        began = time.monotonic()
        container = samples.timed("CreateContainer", lambda c=create: runtime.CreateContainer(c)).container_id  # type: ignore[attr-defined,misc]
        start = cri.StartContainerRequest(container_id=container)
        samples.timed("StartContainer", lambda s=start: runtime.StartContainer(s))  # type: ignore[misc]
        samples.add("CreateContainer + StartContainer", (time.monotonic() - began) * 1000)
    execute = cri.ExecSyncRequest(container_id=container, cmd=["true"], timeout=30)
    for _ in range(execs):
        samples.timed("ExecSync(true)", lambda: runtime.ExecSync(execute))
        samples.timed("ListContainers", lambda: runtime.ListContainers(cri.ListContainersRequest()))
    began = time.monotonic()
    samples.timed("StopPodSandbox", lambda: runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod)))
    remove = cri.RemovePodSandboxRequest(pod_sandbox_id=pod)
    samples.timed("RemovePodSandbox", lambda: runtime.RemovePodSandbox(remove))
    samples.add("StopPodSandbox + RemovePodSandbox", (time.monotonic() - began) * 1000)


def idle_memory(daemon: Daemon, samples: Samples) -> None:
    """Measure an idle pod and its helpers."""
    metadata = cri.PodSandboxMetadata(name="idle", namespace="bench", uid=str(uuid.uuid4()))
    run = cri.RunPodSandboxRequest(config=cri.PodSandboxConfig(metadata=metadata))
    pod = daemon.runtime.RunPodSandbox(run).pod_sandbox_id
    time.sleep(SETTLE_S)
    info = daemon.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True)).info
    samples.add("PSS of an idle pod with helpers, MB", sum(pss_bytes(p) for p in json.loads(info["vm"])["pids"]) / 1e6)
    daemon.remove_pods()


def report(samples: Samples) -> dict[str, object]:
    """Print the table and return what goes into the JSON."""
    print(f"\n{'what':<46} {'median':>9} {'min':>9} {'max':>9}   n")
    for name, values in samples.values.items():
        low, high = min(values), max(values)
        print(f"{name:<46} {samples.median(name):9.1f} {low:9.1f} {high:9.1f}  {len(values):2}")
    ratios = {
        "RunPodSandbox, cold / floor": samples.median("RunPodSandbox, cold")
        / samples.median("floor: bare QEMU to ready"),
        "PSS, idle pod with helpers / bare QEMU with its vsock helper": samples.median(
            "PSS of an idle pod with helpers, MB"
        )
        / samples.median("PSS of bare QEMU with its vsock helper, MB"),
    }
    print()
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}")
    return {"values": samples.values, "ratios": ratios}


@click.command()
@click.option("--rounds", default=5, show_default=True, help="Pods and bare VMs to start, in turn.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all values here.")
def main(rounds: int, json_path: Path | None) -> None:
    """Measure vmrt against bare QEMU on this machine. Times in milliseconds."""
    samples = Samples()
    with Daemon("bench") as daemon, tempfile.TemporaryDirectory(prefix="vmrt-bench-", dir="/var/tmp") as scratch:
        guest = guest_image.load(daemon.guest)
        busybox_image.write_busybox(Path(scratch) / "image", IMAGE)
        daemon.start()
        daemon.load(Path(scratch) / "image")
        info = json.loads(daemon.runtime.Status(cri.StatusRequest(verbose=True)).info["config"])
        kvm = info["accelerator"] == "kvm"
        qemu = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True).stdout
        print(f"{qemu.splitlines()[0]}, {info['accelerator']}, guest kernel {guest.kernel_release}")
        print(f"host kernel {platform.release()}, Python {platform.python_version()}, {rounds} rounds", flush=True)
        helper = config.HypervisorConfig().vhost_device_vsock
        for number in range(rounds):
            with bare_vm(guest, Path(scratch) / f"bare{number}", helper, kvm=kvm) as vm:
                samples.add("floor: bare QEMU to ready", vm.boot_s * 1000)
                if number == 0:
                    time.sleep(SETTLE_S)
                    samples.add("PSS of bare QEMU, MB", pss_bytes(vm.qemu_pid) / 1e6)
                    both = pss_bytes(vm.qemu_pid) + pss_bytes(vm.helper_pid)
                    samples.add("PSS of bare QEMU with its vsock helper, MB", both / 1e6)
            pod_round(daemon, samples, containers=3, execs=10)
            print(".", end="", flush=True)
        idle_memory(daemon, samples)
        result = report(samples)
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    sys.exit(main())
