"""What a refused call must look like: its code, its words, and a host on which nothing of it is left.

"Nothing" is looked for where things are: in the kernel and on the disk (demo.leftovers) and in the daemon's database,
which also holds the hidden records of half-done calls.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc
import pytest

from demo.daemon import Daemon
from demo.leftovers import Snapshot, snapshot
from vmrt.pods.table import instance_tag
from vmrt.proto.runtime.v1 import api_pb2 as cri

# How long something may take that has no promised time, on a machine that is busy with other things.
PATIENCE_S = 60.0


def records(daemon: Daemon) -> dict[str, str]:
    """Return what the database knows, hidden records included: id -> "kind state"."""
    with closing(sqlite3.connect(f"file:{daemon.root}/state.db?mode=ro", uri=True)) as db:
        rows = db.execute("SELECT kind, id, document FROM records").fetchall()
    return {record_id: f"{kind} {json.loads(document)['state']}" for kind, record_id, document in rows}


@dataclass
class Refusal:
    """How a call failed; filled in when the block of `refused` has ended."""

    code: grpc.StatusCode = grpc.StatusCode.OK
    text: str = ""


@dataclass
class Before:
    """The state that a call without consequences leaves as it was."""

    daemon: Daemon
    networks: Sequence[str] = ()
    host: Snapshot = field(init=False)
    records: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.host = snapshot(self.daemon.root, self.networks)
        self.records = records(self.daemon)

    def left(self) -> dict[str, object]:
        """Return what is there now and was not before, or changed; empty when nothing."""
        now = snapshot(self.daemon.root, self.networks)
        # The daemon's own bridge, made for the first pod, serves all of them and stays until the daemon ends.
        bridge = {f"vmrt-{instance_tag(self.daemon.root)}"}
        found: dict[str, object] = dict(replace(now, links=now.links - bridge).added_since(self.host))
        changed = {i: s for i, s in records(self.daemon).items() if self.records.get(i) != s}
        return found | ({"records": changed} if changed else {})

    def wait_restored(self) -> None:
        """Wait until nothing is left, for a call whose end the client does not see."""
        deadline = time.monotonic() + PATIENCE_S
        while (left := self.left()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left


@contextmanager
def refused(daemon: Daemon, code: grpc.StatusCode, *words: str, networks: Sequence[str] = ()) -> Iterator[Refusal]:
    """Expect the block's call to fail with this code, these words in its message, and nothing left."""
    before = Before(daemon, networks)
    refusal = Refusal()
    with pytest.raises(grpc.RpcError) as caught:
        yield refusal
    refusal.code, refusal.text = caught.value.code(), caught.value.details() or ""
    assert refusal.code is code, refusal
    missing = [word for word in words if word not in refusal.text]
    assert not missing, f"{missing} not in: {refusal.text}"
    assert before.left() == {}


def vm_pids(daemon: Daemon, sandbox_id: str) -> dict[str, int]:
    """Return the processes of a sandbox's VM by program name."""
    request = cri.PodSandboxStatusRequest(pod_sandbox_id=sandbox_id, verbose=True)
    pids = json.loads(daemon.runtime.PodSandboxStatus(request).info["vm"])["pids"]
    return {Path(f"/proc/{pid}/exe").readlink().name: pid for pid in pids}


def wait_for_qemu(daemon: Daemon) -> int:
    """Wait until a QEMU runs for a VM of this daemon and return its pid."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        for line in snapshot(daemon.root).processes:
            if "qemu-system" in line and "-S" not in line.split():
                return int(line.removeprefix("pid ").partition(":")[0])
        time.sleep(0.05)
    raise AssertionError("no QEMU was started")


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Signal a process of a VM."""
    os.kill(pid, number)
