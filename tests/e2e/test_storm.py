"""Many pods at once: all become ready, none is lost, their boots take turns, and lists are answered meanwhile."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from demo.daemon import Daemon
from tests.e2e.conftest import Pod, run_pod
from vmrt.proto.runtime.v1 import api_pb2 as cri

PODS = 6


def test_pods_started_at_once_all_become_ready(private_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = private_daemon("\n[hypervisor]\nboots_at_once = 2\nboot_timeout_s = 300\n")
    seen: list[int] = []
    ended = threading.Event()

    def ask() -> None:
        while not ended.wait(0.05):
            seen.append(len(daemon.runtime.ListPodSandbox(cri.ListPodSandboxRequest()).items))

    with ThreadPoolExecutor(PODS + 1) as callers:
        asking = callers.submit(ask)
        try:
            pods: list[Pod] = list(callers.map(lambda n: run_pod(daemon, tmp_path / f"{n}", f"p{n}"), range(PODS)))
        finally:
            ended.set()
        asking.result()
    listed = daemon.runtime.ListPodSandbox(cri.ListPodSandboxRequest()).items
    assert {item.id for item in listed} == {pod.id for pod in pods}
    assert {item.state for item in listed} == {cri.SANDBOX_READY}
    # What was seen meanwhile only grew: a pod that is ready stays so while others start.
    assert seen == sorted(seen)
    addresses, waits = set(), []
    for pod in pods:
        request = cri.PodSandboxStatusRequest(pod_sandbox_id=pod.id, verbose=True)
        status = daemon.runtime.PodSandboxStatus(request)
        addresses.add(status.status.network.ip)
        waits.append(json.loads(status.info["phasesMs"])["turn"])
    assert len(addresses) == PODS
    # Two boot at once: the others have waited for one of them.
    assert sum(wait_ms > 1 for wait_ms in waits) >= PODS - 2
    assert pods[-1].output("echo", "works") == "works\n"
