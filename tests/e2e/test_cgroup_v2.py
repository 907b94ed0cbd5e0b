"""The host's side of cgroup v2, in a guest: this machine may have v1, and every guest has v2 with all controllers.

The daemon's own code (`vmrt.hypervisor.cgroup`, `confine`) is run by the guest's Python on the guest's hierarchy, where
another process stands in for QEMU.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from demo.daemon import CHECKOUT, Daemon
from tests.e2e.conftest import run_pod
from vmrt.proto.runtime.v1 import api_pb2 as cri

PROGRAM = """
import asyncio, ctypes, json, os, pathlib, signal, sys

# Out of the container's cgroup namespace: no process may be moved across it.
assert ctypes.CDLL(None).setns(os.open("/proc/1/ns/cgroup", os.O_RDONLY), 0) == 0
sys.path.insert(0, sys.argv[1])
from vmrt import spawn
from vmrt.errors import VmrtError
from vmrt.hypervisor import cgroup, confine
from vmrt.model import Confinement

ROOT = pathlib.Path("/sys/fs/cgroup")
POD = ROOT / "kubepods" / "pod"
told = {}


def child():
    if (pid := os.fork()) == 0:
        signal.pause()
    return pid


def allowed(pid):
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith("Cpus_allowed_list"))


# As kubelet makes a pod's cgroup: controllers handed down to it, and not by it.
POD.mkdir(parents=True)
for level in (ROOT, POD.parent):
    (level / "cgroup.subtree_control").write_text("+cpuset +cpu +memory +pids")
cgroups = cgroup.here("cgroupfs")
leaf = POD / "vmrt-v"
vm = child()


async def place():
    qemu = spawn.identify(vm)
    early = await cgroups.place("v", "/kubepods/pod", cgroup.Part.EARLY, [qemu])
    late = await cgroups.place("v", "/kubepods/pod", cgroup.Part.LATE, [qemu])
    return [str(path) for path in early], [str(path) for path in late]


try:
    (POD / "cpu.max").write_text("50000 100000")
    told["throttled"] = cgroup.throttled(POD)
    (POD / "cpu.max").write_text("max 100000")
    told["made"] = asyncio.run(place())
    told["leaves"] = [str(path) for path in cgroups.leaves("v", "/kubepods/pod")]
    told["cgroup"] = pathlib.Path(f"/proc/{vm}/cgroup").read_text().strip()
    confine.confine("v", [leaf], [vm], Confinement(frozenset((1,)), frozenset((0,))))
    told["cpuset"] = (leaf / "cpuset.cpus").read_text().strip(), (leaf / "cpuset.mems").read_text().strip()
    told["kept"] = allowed(vm)
    # Nothing of it is in the way of the thread's own wish, and the cgroup stands above that: what libvirt does.
    os.sched_setaffinity(vm, {0, 1})
    told["cgroup wins"] = allowed(vm)
    try:
        confine.confine("v", [leaf], [vm], Confinement(mems=frozenset((5,))))
    except VmrtError as e:
        told["refused"] = str(e)
    confine.confine("v", [leaf], [vm], Confinement())
    told["free"] = allowed(vm)
    told["kills"] = cgroup.oom_kills([leaf])
finally:
    os.kill(vm, signal.SIGKILL)
    os.waitpid(vm, 0)
    cgroup.remove([leaf, POD, POD.parent])
told["left"] = POD.parent.exists()
print(json.dumps(told))
"""


def test_a_pods_cgroup_of_v2(daemon: Daemon, tmp_path: Path) -> None:
    two = cri.LinuxPodSandboxConfig(security_context=cri.LinuxSandboxSecurityContext(privileged=True))
    two.resources.cpu_quota, two.resources.cpu_period = 200_000, 100_000
    two.security_context.namespace_options.pid = cri.NODE
    pod = run_pod(daemon, tmp_path, "v2", linux=two)
    linux = cri.LinuxContainerConfig(security_context=cri.LinuxContainerSecurityContext(privileged=True))
    linux.security_context.namespace_options.pid = cri.NODE
    source = cri.Mount(host_path=str(CHECKOUT / "vmrt"), container_path="/src/vmrt", readonly=True)
    container = pod.run("sleep", "123456", linux=linux, mounts=[source])
    # The source as the guest sees it: by way of the container's own process.
    script = 'exec nsenter -t 1 -m /usr/bin/python3 -B -c "$0" "/proc/$(pidof sleep)/root/src"'
    answer = pod.execute(container, "sh", "-c", script, PROGRAM, timeout=120)
    assert (answer.exit_code, answer.stderr.decode()) == (0, ""), answer.stderr.decode()
    told = json.loads(answer.stdout)
    refused = told.pop("refused", "")
    several = (os.cpu_count() or 1) > 1
    if several:
        assert told == {
            "throttled": True,
            "made": [["/sys/fs/cgroup/kubepods/pod/vmrt-v"], []],
            "leaves": ["/sys/fs/cgroup/kubepods/pod/vmrt-v"],
            "cgroup": "0::/kubepods/pod/vmrt-v",
            "cpuset": ["1", "0"],
            "kept": "1",
            "cgroup wins": "1",
            "free": "0-1",
            "kills": 0,
            "left": False,
        }
    assert "cpuset_mems 5" in refused
    daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod.id))
