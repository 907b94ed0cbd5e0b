"""Nothing that a pod's life does blocks the daemon's loop (`vmrt.loop_monitor`, on in these daemons' debug log).

What blocks does so in each pod's life; where the loop stood still only once, the machine was at fault: a thread with
the interpreter's lock and no processor, or a processor that the machine's own host took away.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from demo.daemon import Daemon
from tests.e2e.conftest import run_pod
from vmrt.proto.runtime.v1 import api_pb2 as cri

OURS = re.compile(r'File "\S+/(vmrt/\S+", line \d+)')


def test_a_pods_life_does_not_block_the_loop(private_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = private_daemon("\n[pool]\nsize = 1\n")
    blocked: list[set[str]] = []
    for name in ("a", "b", "c"):
        began = len(daemon.log())
        pod = run_pod(daemon, tmp_path / name, name)
        container = pod.run("sh", "-c", "echo out; sleep 1000")
        assert pod.execute(container, "true").exit_code == 0
        for _ in range(50):
            daemon.runtime.ListPodSandbox(cri.ListPodSandboxRequest())
            daemon.runtime.ListContainers(cri.ListContainersRequest())
        pod.remove(container)
        daemon.remove_pods()
        reports = re.findall(r"the loop was blocked for \d+ ms.*?(?=\n\d{4}-)", daemon.log()[began:], flags=re.S)
        print("\n".join(reports))
        blocked.append(
            {place for report in reports if "selectors.py" not in report for place in OURS.findall(report)[-1:]}
        )
    always = set.intersection(*blocked)
    assert not always, (always, daemon.log()[-20000:])
