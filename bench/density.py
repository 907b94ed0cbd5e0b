"""Stage "density": 30 pods started at once, and what a pod costs in memory while there are 30, 10 and 1 of them.

While they start, a client asks for all pods fifty times a second, once as an ordinary process and once at real-time
priority: on a machine that is busy everywhere an ordinary client waits for a processor, too. A second one at that
priority asks a grpc.aio server that does nothing (`bench.constant`): the floor of what an answer takes meanwhile.
Memory is the proportional set size (PSS) of a pod's QEMU and helpers, beside that of as many bare VMs.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from bench.floor import pss_bytes
from bench.samples import COLD, FLOOR, Samples
from bench.stand import Bench, Stage, create_request, pids_of, sandbox_config
from demo.daemon import Daemon
from vmrt.proto.runtime.v1 import api_pb2 as cri

COUNTS = (30, 10, 1)
SETTLE_S = 5.0
_BARE_AT_ONCE = 4
STORM = "vmrt, storm"


@contextlib.contextmanager
def listers(daemon: Daemon, samples: Samples) -> Iterator[None]:
    """Have the clients ask meanwhile, and note how long their answers took."""
    nothing = daemon.root / "constant.sock"
    clients = {
        "ListPodSandbox meanwhile": [str(daemon.socket)],
        "ListPodSandbox meanwhile, FIFO client": [str(daemon.socket), "fifo"],
        "constant octets meanwhile, FIFO client": [str(nothing), "fifo"],
    }
    floor = _python("bench.constant", str(nothing))
    assert floor.stdout is not None
    floor.stdout.readline()
    asking = {what: _python("bench.lister", *arguments) for what, arguments in clients.items()}
    try:
        yield
    finally:
        for what, client in asking.items():
            # Its stdin ends, and so does it.
            out, _ = client.communicate()
            for line in out.splitlines():
                samples.add(STORM, what, float(line))
        floor.communicate()


def _python(module: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def storm(daemon: Daemon, samples: Samples, count: int) -> list[str]:
    """Start pods all at once; return their ids. Raises `RuntimeError` when one is not ready or was lost."""

    def run(number: int) -> str:
        request = cri.RunPodSandboxRequest(config=sandbox_config(f"storm{number}"))
        return str(samples.timed(STORM, "RunPodSandbox", lambda: daemon.runtime.RunPodSandbox(request)).pod_sandbox_id)

    began = time.monotonic()
    with listers(daemon, samples), ThreadPoolExecutor(count) as starters:
        pods = list(starters.map(run, range(count)))
        samples.add(STORM, f"{count} pods ready", (time.monotonic() - began) * 1000)
    ready = {
        item.id
        for item in daemon.runtime.ListPodSandbox(cri.ListPodSandboxRequest()).items
        if item.state == cri.SANDBOX_READY
    }
    if ready != set(pods):
        raise RuntimeError(f"{len(ready)} of {count} pods are ready:\n{daemon.log()[-5000:]}")
    return pods


def pss_mb(pids: list[int]) -> float:
    """Return what these processes hold together."""
    return sum(pss_bytes(pid) for pid in pids) / 1e6


def memory(bench: Bench, daemon: Daemon, pods: list[str]) -> None:
    """Note a pod's PSS with fewer and fewer of them."""
    for count in COUNTS:
        for pod in pods[count:]:
            daemon.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod))
            daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod))
        del pods[count:]
        time.sleep(SETTLE_S)
        for pod in pods:
            bench.samples.add(COLD, f"PSS of one of {count}, MB", pss_mb(pids_of(daemon, pod)))
        print(".", end="", flush=True)


def bare_memory(bench: Bench) -> None:
    """Note a bare VM's PSS with more and more of them."""
    with contextlib.ExitStack() as stack:
        vms: list[list[int]] = []

        def boot(_number: int) -> list[int]:
            vm = stack.enter_context(bench.bare_vm())
            return [vm.qemu_pid, vm.helper_pid]

        for count in reversed(COUNTS):
            with ThreadPoolExecutor(_BARE_AT_ONCE) as starters:
                vms += starters.map(boot, range(count - len(vms)))
            time.sleep(SETTLE_S)
            for pids in vms:
                bench.samples.add(FLOOR, f"PSS of one of {count}, MB", pss_mb(pids))
            print(".", end="", flush=True)


def measure(bench: Bench) -> None:
    daemon = bench.daemon("storm", "")
    pods = storm(daemon, bench.samples, COUNTS[0])
    print(".", end="", flush=True)
    memory(bench, daemon, pods)
    # One that was idle all the time still does what it is for.
    run_in(daemon, pods[0])
    daemon.remove_pods()
    bare_memory(bench)
    for count in COUNTS:
        what = f"PSS of one of {count}, MB"
        bench.samples.compare(f"{what}, with helpers / bare QEMU with its own", (COLD, what), (FLOOR, what), 1.15)


def run_in(daemon: Daemon, pod: str) -> None:
    """Run a container in a pod that was started before."""
    made = daemon.runtime.CreateContainer(create_request(pod, sandbox_config(), "c"))
    daemon.runtime.StartContainer(cri.StartContainerRequest(container_id=made.container_id))


STAGE = Stage("density", f"{COUNTS[0]} pods at once, and the memory of a pod beside bare QEMU", measure)
