"""The namespaces of a pod with a user namespace, made by the agent's own code on this machine, beside all others'."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
# PID 1 of a PID namespace, with an empty /run, as in a guest.
SCRIPT = """
import json, os, threading
from vmrt.agent import agent_pb2 as pb
from vmrt.agent import kernel, layout, namespaces, process, sandbox

kernel.mount("", "/", "", kernel.MS_REC | 1 << 18)
kernel.mount("tmpfs", "/run", "tmpfs")
os.makedirs(layout.SANDBOX)
reaper = process.Reaper()
threading.Thread(target=reaper.run, daemon=True).start()
own = {name: os.readlink(f"/proc/self/ns/{name}") for name in ("net", "ipc", "uts", "user")}
with namespaces.entered():  # there are none yet
    assert os.readlink("/proc/thread-self/ns/net") == own["net"]
mapping = pb.UserNamespace(first_uid=1000, uids=100000, first_gid=2000, gids=100000)
holder = namespaces.make(reaper, mapping, sandbox._sleep_as_init)
theirs = {name: os.readlink(f"/proc/{holder.pid}/ns/{name}") for name in own}
with namespaces.entered():
    inside = {name: os.readlink(f"/proc/thread-self/ns/{name}") for name in own}
after = {name: os.readlink(f"/proc/thread-self/ns/{name}") for name in own}
status = {}
while status.get("Name") != "pause":  # it takes the name as it goes to sleep
    lines = open(f"/proc/{holder.pid}/status").read().splitlines()
    status = dict(line.split(":\\t", 1) for line in lines if ":\\t" in line)
print(json.dumps({
    "own": own, "theirs": theirs, "inside": inside, "after": after,
    "uid_map": open(f"/proc/{holder.pid}/uid_map").read().split(),
    "gid_map": open(f"/proc/{holder.pid}/gid_map").read().split(),
    "uid": status["Uid"].split(), "gid": status["Gid"].split(), "groups": status["Groups"].split(),
    "pid_inside": status["NSpid"].split()[-1], "name": status["Name"],
    "named": sorted(os.listdir(layout.SANDBOX)),
}), flush=True)
os.kill(holder.pid, 9)
assert holder.wait(10) is not None
"""


def test_made_named_and_entered() -> None:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        assert os.environ.get("CI") != "true"
        pytest.skip("namespaces need root and unshare(1)")
    argv = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", sys.executable, "-c", SCRIPT]
    done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert all(told["theirs"][name] != told["own"][name] for name in told["own"])
    assert told["inside"] == {**told["theirs"], "user": told["own"]["user"]}
    assert told["after"] == told["own"]
    assert (told["uid_map"], told["gid_map"]) == (["0", "1000", "100000"], ["0", "2000", "100000"])
    # PID 1 of the pod is nobody of the guest's: its containers may trace it.
    assert (set(told["uid"]), set(told["gid"]), told["groups"]) == ({"1000"}, {"2000"}, [])
    assert (told["pid_inside"], told["name"]) == ("1", "pause")
    assert told["named"] == ["ipcns", "netns", "pidns", "userns", "utsns"]
