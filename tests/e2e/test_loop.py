"""Nothing that a pod's life does blocks the daemon's loop (`vmrt.loop_monitor`, on in these daemons' debug log)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from demo.daemon import Daemon
from tests.e2e.conftest import run_pod
from vmrt.proto.runtime.v1 import api_pb2 as cri


def test_a_pods_life_does_not_block_the_loop(private_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = private_daemon("\n[pool]\nsize = 1\n")
    served = len(daemon.log())
    for name in ("a", "b"):
        pod = run_pod(daemon, tmp_path / name, name)
        container = pod.run("sh", "-c", "echo out; sleep 1000")
        assert pod.execute(container, "true").exit_code == 0
        for _ in range(50):
            daemon.runtime.ListPodSandbox(cri.ListPodSandboxRequest())
            daemon.runtime.ListContainers(cri.ListContainersRequest())
        pod.remove(container)
        daemon.remove_pods()
    reports = re.findall(r"the loop was blocked for \d+ ms.*?(?=\n\d{4}-)", daemon.log()[served:], flags=re.S)
    assert not reports, reports
