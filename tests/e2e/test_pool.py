"""The warm pool with real VMs: a pooled pod is what a cold one is, and no VM of it outlives its use."""

from __future__ import annotations

import json
import os
import re
import signal
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from demo.daemon import Daemon
from tests.e2e.conftest import Pod, run_pod
from vmrt.proto.runtime.v1 import api_pb2 as cri

BOOT_S = 120.0

# What a pod can see of its machine, one named observation after the other. What differs from pod to pod by design
# (names, addresses, ids, free memory) is left out or asked for separately.
OBSERVATIONS = {
    "kernel": "uname -srvm",
    "hostname": "hostname; cat /etc/hostname",
    "resolv.conf": "cat /etc/resolv.conf",
    "hosts": "sed 's/^[0-9].*\\thost-of-pod/ADDRESS\\thost-of-pod/' /etc/hosts",
    "interfaces": "for i in /sys/class/net/*; do echo ${i##*/} $(cat $i/mtu $i/operstate $i/flags); done",
    "routes": "ip route | sed 's/[0-9][0-9.]*[0-9]/ADDRESS/g'; ip -6 route | grep -c .",
    "address count": "ip -o addr | awk '{print $2, $3}'",
    "neighbours": "ip neigh show nud permanent | wc -l",
    "sysctls": "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shm_rmid_forced",
    "all network sysctls": "cd /proc/sys/net/ipv4/conf/eth0 && for f in *; do echo $f $(cat $f 2>/dev/null); done",
    "all IPv6 sysctls": "cd /proc/sys/net/ipv6/conf/eth0 && for f in *; do case $f in stable_secret) ;; *) "
    "echo $f $(cat $f 2>/dev/null);; esac; done",
    "mounts": "sed 's/[0-9a-f]\\{64\\}/ID/g; s/lowerdir=[^,]*/lowerdir/' /proc/mounts",
    "cgroup": "sed 's/[0-9a-f]\\{64\\}/ID/g' /proc/self/cgroup",
    "capabilities": "grep -E '^(Cap|Seccomp|NoNewPrivs)' /proc/self/status",
    "memory": "grep MemTotal /proc/meminfo",
    "processors": "grep -c ^processor /proc/cpuinfo",
    "priority": "cut -d' ' -f18,19 /proc/self/stat",
    "disk size": "df -P / | awk 'NR==2 {print $2}'",
    "kernel's command line": "tr ' ' '\\n' < /proc/cmdline | sed 's/=[0-9a-f-]\\{12,\\}$/=ID/'",
    "devices": "cd /dev && find . -mindepth 1 | sort | while read f; do stat -c '%n %F %a %u:%g %t:%T' $f; done",
    "block devices": "cd /sys/block && for d in *; do echo $d $(cat $d/size $d/ro $d/queue/rotational); done",
    "PCI devices": "cd /sys/bus/pci/devices && for d in *; do echo $d $(cat $d/vendor $d/device); done",
    "limits of memory": "cat /proc/sys/vm/overcommit_memory /proc/sys/vm/swappiness /proc/sys/vm/max_map_count; "
    "tail -n +2 /proc/swaps | wc -l",
    "limits of processes": "cat /proc/self/limits /proc/sys/kernel/pid_max /proc/sys/kernel/threads-max",
    "limits of the container": "cd /sys/fs/cgroup && for f in *.max *.high *.min *.low *.weight; do "
    "[ -f $f ] && echo $f $(cat $f); done",
    "clocks": "cat /proc/self/timens_offsets; cat /sys/devices/system/clocksource/clocksource0/current_clocksource",
    "security modules": "cat /proc/self/attr/current; cat /proc/sys/kernel/unprivileged_userns_clone 2>/dev/null; "
    "cat /proc/sys/kernel/randomize_va_space",
    "modules": "echo loaded: $(cut -d' ' -f1 /proc/modules | sort)",
    "shared PID namespace": "cat /proc/1/comm; ls /proc | grep -c '^[0-9]*$'",
}
UNIQUE = {
    "address": "ip -4 -o addr show dev eth0 | awk '{print $4}'",
    "MAC address": "cat /sys/class/net/eth0/address",
    "boot id": "cat /proc/sys/kernel/random/boot_id",
    "random": "head -c 32 /dev/urandom | sha256sum; cat /proc/sys/kernel/random/uuid",
}


def pool_settings(size: int) -> str:
    return f"\n[pool]\nsize = {size}\nreserve_bytes = 0\n"


def waiting(daemon: Daemon) -> int:
    """Return how many VMs have been booted ahead since the daemon's start, by its log."""
    return daemon.log().count("waits for a pod of")


def wait_for_pool(daemon: Daemon, count: int) -> None:
    deadline = time.monotonic() + BOOT_S
    while waiting(daemon) < count:
        assert time.monotonic() < deadline, daemon.log()[-3000:]
        time.sleep(0.05)


def vm_of(pod: Pod) -> str:
    request = cri.PodSandboxStatusRequest(pod_sandbox_id=pod.id, verbose=True)
    return str(json.loads(pod.daemon.runtime.PodSandboxStatus(request).info["vm"])["id"])


def vms(daemon: Daemon) -> set[str]:
    return {path.name for path in (daemon.root / "vms").iterdir()}


def a_pod(daemon: Daemon, logs: Path, name: str) -> Pod:
    linux = cri.LinuxPodSandboxConfig(
        sysctls={"net.ipv4.ip_unprivileged_port_start": "81", "kernel.shm_rmid_forced": "1"},
        security_context=cri.LinuxSandboxSecurityContext(namespace_options=cri.NamespaceOption(pid=cri.POD)),
    )
    dns = cri.DNSConfig(servers=["192.0.2.53"], searches=["example.test"], options=["ndots:3"])
    return run_pod(daemon, logs, name, hostname="host-of-pod", linux=linux, dns_config=dns)


def observe(pod: Pod, what: dict[str, str]) -> dict[str, str]:
    """Run every observation in one container that shares the pod's PID namespace."""
    linux = cri.LinuxContainerConfig(
        security_context=cri.LinuxContainerSecurityContext(namespace_options=cri.NamespaceOption(pid=cri.POD))
    )
    container = pod.run("sleep", "1000", linux=linux)
    seen = {}
    for name, script in what.items():
        done = pod.execute(container, "sh", "-c", script)
        assert done.stdout, (name, done.stderr, done.exit_code)
        seen[name] = done.stdout.decode()
    clock = int(pod.execute(container, "date", "+%s").stdout)
    assert abs(clock - time.time()) < 5, "the guest's clock is the host's"
    return seen


def test_a_pooled_pod_is_what_a_cold_one_is(private_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    cold_daemon = private_daemon(pool_settings(0))
    cold = a_pod(cold_daemon, tmp_path, "cold")
    cold_view, cold_unique = observe(cold, OBSERVATIONS), observe(cold, UNIQUE)
    assert "from the pool" not in cold_daemon.log()

    warm_daemon = private_daemon(pool_settings(2))
    wait_for_pool(warm_daemon, 2)
    ahead = vms(warm_daemon)
    for vm_id in ahead:
        # What they did ahead was done to its end.
        assert "rehears" not in (warm_daemon.root / "vms" / vm_id / "console").read_text(errors="replace")
    # Long enough for a difference in clocks or in what is counted from the boot to show.
    time.sleep(3)
    first, second = (a_pod(warm_daemon, tmp_path, name) for name in ("warm-1", "warm-2"))
    assert {vm_of(first), vm_of(second)} == ahead
    assert warm_daemon.log().count("from the pool") == 2
    assert observe(first, OBSERVATIONS) == cold_view
    uniques = [cold_unique, observe(first, UNIQUE), observe(second, UNIQUE)]
    for name in UNIQUE:
        if name != "address":  # two daemons have two networks, and may give the same address
            assert len({seen[name] for seen in uniques}) == 3, name
    assert uniques[1]["address"] != uniques[2]["address"]
    for pod in (cold, first):
        status = pod.daemon.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod.id)).status
        assert status.state == cri.SANDBOX_READY
        assert re.fullmatch(r"[0-9.]+", status.network.ip)


def test_each_pod_gets_a_vm_that_no_pod_had(private_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = private_daemon(pool_settings(1), load=False)
    used = set()
    for number in range(3):
        wait_for_pool(daemon, number + 1)
        pod = run_pod(daemon, tmp_path, f"p{number}")
        used.add(vm_of(pod))
        daemon.remove_pods()
    assert len(used) == 3
    assert daemon.log().count("from the pool") == 3
    assert not used & vms(daemon)


def test_a_waiting_vm_grows_to_what_a_pod_needs(private_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    """One that needs more than a VM may be enlarged to has one booted for it."""
    daemon = private_daemon("[hypervisor]\nmax_memory_bytes = 1000000000\n" + pool_settings(1))
    for mib, from_the_pool in ((700, True), (1000, False)):
        wait_for_pool(daemon, 1 + daemon.log().count("from the pool"))
        ahead = vms(daemon)
        limits = cri.LinuxContainerResources(memory_limit_in_bytes=mib * 1024**2)
        linux = cri.LinuxPodSandboxConfig(resources=limits)
        pod = run_pod(daemon, tmp_path / str(mib), f"needs-{mib}", linux=linux)
        assert (vm_of(pod) in ahead) == from_the_pool, mib
        if from_the_pool:
            # It can use what it was promised, but for the page tables and what dd is itself.
            limited = cri.LinuxContainerConfig(resources=limits)
            pod.output("dd", "if=/dev/zero", "of=/dev/null", "bs=690M", "count=1", linux=limited)
        # The second gets what the configuration lets a VM have.
        assert int(pod.output("awk", "/MemTotal/ {print $2}", "/proc/meminfo")) > min(mib, 850) * 1024


def test_the_pool_over_restarts(private_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = private_daemon(pool_settings(1))
    wait_for_pool(daemon, 1)
    pod = run_pod(daemon, tmp_path / "first", "stays")
    wait_for_pool(daemon, 2)
    ahead = vms(daemon) - {vm_of(pod)}
    # A killed daemon's VM waits for the next one.
    daemon.stop(signal.SIGKILL)
    daemon.start()
    assert "waits on" in daemon.log()
    assert vms(daemon) == ahead | {vm_of(pod)}
    second = run_pod(daemon, tmp_path / "second", "second")
    assert {vm_of(second)} == ahead
    assert second.output("echo", "alive") == "alive\n"
    # One that is told to stop leaves the pods' VMs and no others.
    wait_for_pool(daemon, 3)
    kept = {vm_of(pod), vm_of(second)}
    assert daemon.stop() == 0
    assert vms(daemon) == kept
    daemon.start()
    assert pod.output("echo", "alive") == "alive\n"


def test_a_waiting_vm_that_is_killed_is_replaced(private_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = private_daemon(pool_settings(1), load=False)
    wait_for_pool(daemon, 1)
    (victim,) = vms(daemon)
    pid, _ = json.loads((daemon.root / "vms" / victim / "vm.json").read_text())["qemu"]
    os.kill(pid, signal.SIGKILL)
    wait_for_pool(daemon, 2)
    pod = run_pod(daemon, tmp_path)
    assert vm_of(pod) != victim
    assert "from the pool" in daemon.log()


def test_waiting_vms_have_a_cgroup_of_their_own(private_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    """What waits is accounted in the pool's cgroup; a claimed VM's processes are its pod's, cpuset included."""
    name = f"vmrt-e2e-{uuid.uuid4().hex[:8]}"
    daemon = private_daemon(f'{pool_settings(1)}cgroup_parent = "/{name}/pool"\n')
    wait_for_pool(daemon, 1)
    hierarchies = [path.parent.parent for path in Path("/sys/fs/cgroup").glob(f"**/{name}/pool") if path.is_dir()]
    assert hierarchies, "this host has no cgroup controllers"

    def processes(below: str) -> list[set[str]]:
        """Return what is in the VMs' cgroups below a parent, by hierarchy."""
        found = []
        for hierarchy in hierarchies:
            leaves = (hierarchy / name / below).glob("vmrt-*/cgroup.procs")
            found.append({pid for leaf in leaves for pid in leaf.read_text().split()})
        return found

    (first, *others) = processes("pool")
    assert len(first) >= 2  # QEMU and helpers
    assert all(other == first for other in others)
    linux = cri.LinuxPodSandboxConfig(cgroup_parent=f"/{name}/pod")
    linux.resources.cpuset_cpus = str(max(os.sched_getaffinity(0)))
    pod = run_pod(daemon, tmp_path, "claimed", linux=linux)
    assert all(first <= pids for pids in processes("pod"))
    assert not any(first & pids for pids in processes("pool"))
    cpusets = [*Path("/sys/fs/cgroup").glob(f"**/{name}/pod/vmrt-*/cpuset.cpus")]
    assert {path.read_text().strip() for path in cpusets} <= {linux.resources.cpuset_cpus}
    daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod.id))
    assert daemon.stop() == 0
    assert not [*Path("/sys/fs/cgroup").glob(f"**/{name}")]
