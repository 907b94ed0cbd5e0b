"""Stage "volumes": virtiofs and the scratch disk as a container sees them, beside bare QEMU with the same devices.

One script in one kind of container on both sides, driven by the same agent: what differs is who made the VM. Times are
the guest's own clock. Each round writes to new files, so that no cache is warmer on one side.

Both VMs have a cgroup, as kubelet gives one to each pod. Without, the kernel takes each session for a group
(sched(7), autogroup): then virtiofsd, in a session of its own, waits for the machine's other work at every call of the
guest, and the bare VM's does not. On a busy machine the processor time says more than the times.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

from bench.floor import Extra, processor_ms
from bench.samples import COLD, FLOOR
from bench.stand import IMAGE, Bench, Stage, pids_of, sandbox_config
from vmrt import spawn
from vmrt.agent import agent_pb2 as pb
from vmrt.agent import layout
from vmrt.agent_client import AgentClient
from vmrt.config import HypervisorConfig
from vmrt.hypervisor import cgroup, virtiofsd
from vmrt.model import ContainerSpec, ImageConfig, Mount, SandboxSpec
from vmrt.pods import oci, scratch
from vmrt.proto.runtime.v1 import api_pb2 as cri

MIB = 1024**2
SIZE_MIB, SMALL_WRITES, FLUSHES, FILES = 32, 500, 100, 300
# Throughput and latency are compared as times: 0.9 of the bare VM's throughput is 1 / 0.9 of its time.
LIMIT = 1 / 0.9
_TIMEOUT_S = 120.0
_PARENT = f"/vmrt-bench-{os.getpid()}"

# Numbers of x86_64: clock_gettime 228 (CLOCK_MONOTONIC 1), fsync 74, fadvise64 221 (POSIX_FADV_DONTNEED 4).
SCRIPT = """
sub now { my $t = "\\0" x 16; syscall(228, 1, $t); my ($s, $n) = unpack("qq", $t); return $s + $n / 1e9 }
sub told { my ($what, $since) = @_; push @lines, sprintf("%s=%.3f", $what, (now() - $since) * 1000) }
sub create { open(my $f, "+>", $_[0]) or die "$_[0]: $!"; return $f }
sub put { my ($f, $size, $count) = @_; my $data = "x" x $size;
  for (1..$count) { syswrite($f, $data) == $size or die $! } }
sub flush { syscall(74, fileno($_[0])) == 0 or die $! }
sub take { my ($f) = @_; sysseek($f, 0, 0); while (sysread($f, my $data, 1048576)) { } }
for my $where (["virtiofs", "/data"], ["scratch disk", "/tmp"]) {
  my ($name, $dir) = @$where;
  my $f = create("$dir/big"); my $t = now(); put($f, 1048576, $size); flush($f); told("$name: write and flush", $t);
  syscall(221, fileno($f), 0, 0, 4); $t = now(); take($f); told("$name: read", $t); close $f;
  $f = create("$dir/small"); $t = now(); put($f, 4096, $small); flush($f); told("$name: small writes", $t); close $f;
  $f = create("$dir/log"); $t = now(); for (1..$flushes) { put($f, 4096, 1); flush($f) }
  told("$name: write and flush, 4 KiB", $t); close $f;
  mkdir "$dir/many"; $t = now(); for (1..$files) { close create("$dir/many/$_") } told("$name: make files", $t);
  $t = now(); for (1..$files) { unlink "$dir/many/$_" or die $! } told("$name: remove files", $t);
}
open(my $out, ">", "/data/result.part"); print $out join("\\n", @lines), "\\n"; close $out;
rename("/data/result.part", "/data/result");
"""


def program(tools: Path) -> list[str]:
    """Copy this machine's Perl (Debian's perl-base, always there) to `tools`; return how to run the script with it."""
    listing = subprocess.run(["ldd", "/usr/bin/perl"], check=True, capture_output=True, text=True).stdout
    tools.mkdir()
    for path in ["/usr/bin/perl", *re.findall(r"(/\S+) \(0x", listing)]:
        shutil.copy(Path(path).resolve(), tools / Path(path).name)
    loader = next(path.name for path in tools.iterdir() if path.name.startswith("ld-linux"))
    sizes = f"$size = {SIZE_MIB}; $small = {SMALL_WRITES}; $flushes = {FLUSHES}; $files = {FILES};"
    return [f"/tools/{loader}", "--library-path", "/tools", "/tools/perl", "-e", sizes + SCRIPT]


def wait_for(data: Path, pids: list[int]) -> dict[str, float]:
    """Return what the script wrote, in milliseconds by name, and the processor time that the VM took for it."""
    processes = [one for pid in pids for one in cgroup.family(pid)]
    before = processor_ms(processes)
    deadline = time.monotonic() + _TIMEOUT_S
    while not (data / "result").exists():
        if time.monotonic() > deadline:
            raise RuntimeError("the script did not end")
        time.sleep(0.05)
    lines = (data / "result").read_text().splitlines()
    told = {name: float(value) for name, _, value in (line.partition("=") for line in lines)}
    return told | {"processor time, virtiofs and scratch disk": processor_ms(processes) - before}


def in_a_pod(bench: Bench, tools: Path, data: Path, argv: list[str]) -> dict[str, float]:
    """Run the script in a pod."""
    runtime, config = bench.cold.runtime, sandbox_config()
    config.linux.cgroup_parent = f"{_PARENT}/pod"
    pod = runtime.RunPodSandbox(cri.RunPodSandboxRequest(config=config)).pod_sandbox_id
    try:
        container = cri.ContainerConfig(
            metadata=cri.ContainerMetadata(name="volumes"),
            image=cri.ImageSpec(image=IMAGE),
            command=argv,
            mounts=[
                cri.Mount(host_path=str(tools), container_path="/tools", readonly=True),
                cri.Mount(host_path=str(data), container_path="/data"),
            ],
        )
        request = cri.CreateContainerRequest(pod_sandbox_id=pod, config=container, sandbox_config=config)
        made = runtime.CreateContainer(request).container_id
        runtime.StartContainer(cri.StartContainerRequest(container_id=made))
        return wait_for(data, pids_of(bench.cold, pod))
    finally:
        runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod))
        runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod))


def in_a_bare_vm(bench: Bench, share: Path, number: int, argv: list[str], made: list[Path]) -> dict[str, float]:
    """Run the script in a bare VM: its share is one directory, its scratch disk is made as a pod's is.

    The cgroups that are made for it are added to `made`.
    """
    root = bench.scratch / f"bare-root{number}"
    root.mkdir()
    disk = asyncio.run(scratch.make(root, "bare", 10 * 1024 * MIB, "root"))
    layers = sorted(bench.cold.root.glob("images/**/*.erofs"))
    extra = Extra(virtiofsd.find(""), share, disk, tuple(layers))
    with bench.bare_vm(extra) as vm:
        processes = [process for pid in vm.pids if (process := spawn.identify(pid)) is not None]
        host = cgroup.here(HypervisorConfig().cgroup_driver)
        for part in cgroup.Part:
            made += asyncio.run(host.place("bare", f"{_PARENT}/pod", part, processes))
        asyncio.run(_drive(vm.vsock, len(layers), argv))
        return wait_for(share / "data", list(vm.pids))


async def _drive(vsock: Path, layers: int, argv: list[str]) -> None:
    async def dial(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_unix_connection(vsock)
        writer.write(f"CONNECT {port}\n".encode())
        answer = await reader.readline()
        if not answer.startswith(b"OK "):
            raise RuntimeError(f"the bare VM's vsock says {answer!r}")
        return reader, writer

    agent = AgentClient(dial, "bare")
    try:
        await agent.configure_sandbox(
            pb.ConfigureSandboxRequest(sandbox_id="bare", hostname="bare", scratch_serial=scratch.SERIAL, share=True)
        )
        mounts = [
            oci.BoundMount(Mount("/tools", "/tools", readonly=True), f"{layout.SHARE}/tools"),
            oci.BoundMount(Mount("/data", "/data"), f"{layout.SHARE}/data"),
        ]
        spec = ContainerSpec(name="volumes", image=IMAGE, command=tuple(argv))
        sandbox = SandboxSpec(name="bare", uid="bare", namespace="bench")
        config = oci.build(sandbox, spec, ImageConfig(), hostname="bare", mounts=mounts)
        config["linux"]["namespaces"] = [n for n in config["linux"]["namespaces"] if n["type"] != "pid"]
        config["mounts"] = [m for m in config["mounts"] if not m["destination"].startswith("/etc/")]
        request = pb.CreateContainerRequest(
            container_id="bare",
            layer_serials=[f"l-{number}" for number in range(layers)],
            oci_spec=json.dumps(config).encode(),
            discard_output=True,
        )
        await agent.create_container(request, timeout_s=60.0)
        await agent.start_container("bare")
    finally:
        await agent.close()


def measure(bench: Bench) -> None:
    tools = bench.scratch / "tools"
    argv = program(tools)
    names: dict[str, None] = {}
    made: list[Path] = []
    for number in range(bench.rounds):
        share = bench.scratch / f"share{number}"
        (share / "data").mkdir(parents=True)
        shutil.copytree(tools, share / "tools")
        data = bench.scratch / f"data{number}"
        data.mkdir()
        sides = {
            FLOOR: lambda s=share, n=number: in_a_bare_vm(bench, s, n, argv, made),  # type: ignore[misc]
            COLD: lambda d=data: in_a_pod(bench, tools, d, argv),
        }
        # Each side is first every other time.
        for whose in list(sides) if number % 2 == 0 else reversed(list(sides)):
            for name, ms in sides[whose]().items():
                bench.samples.add(whose, name, ms)
                names[name] = None
        shutil.rmtree(share)
        shutil.rmtree(data)
        os.sync()
        print(".", end="", flush=True)
    deadline = time.monotonic() + _TIMEOUT_S
    while any(directory.exists() for directory in made) and time.monotonic() < deadline:
        cgroup.remove(made)  # one that holds a process, which has been killed, is busy still
        time.sleep(0.1)
    for name in names:
        bench.samples.compare(f"{name}, vmrt / bare QEMU", (COLD, name), (FLOOR, name), LIMIT)


STAGE = Stage("volumes", "virtiofs and scratch disk in a container, beside bare QEMU with the same devices", measure)
