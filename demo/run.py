"""`make demo`: vmrt's main job, shown step by step on a private root, and proof that nothing is left of it."""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demo import busybox_image
from demo.daemon import GUEST, Daemon
from demo.leftovers import snapshot
from vmrt.proto.runtime.v1 import api_pb2 as cri

IMAGE = "docker.io/library/vmrt-demo:latest"
TIMES: dict[str, float] = {}


def say(text: str) -> None:
    """Print one line of the story."""
    print(text, flush=True)


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Say what is being done, and how long it took."""
    print(f"==> {what} ... ", end="", flush=True)
    began = time.monotonic()
    yield
    TIMES[what] = time.monotonic() - began
    print(f"{TIMES[what]:.2f} s", flush=True)


def container(daemon: Daemon, pod: str, pod_config: cri.PodSandboxConfig, name: str, *argv: str) -> str:
    """Create and start a container; return its id."""
    config = cri.ContainerConfig(
        metadata=cri.ContainerMetadata(name=name),
        image=cri.ImageSpec(image=IMAGE),
        command=list(argv),
        log_path=f"{name}.log",
        linux=cri.LinuxContainerConfig(
            security_context=cri.LinuxContainerSecurityContext(
                namespace_options=cri.NamespaceOption(pid=cri.CONTAINER),
                seccomp=cri.SecurityProfile(profile_type=cri.SecurityProfile.RuntimeDefault),
            )
        ),
    )
    request = cri.CreateContainerRequest(pod_sandbox_id=pod, config=config, sandbox_config=pod_config)
    container_id = str(daemon.runtime.CreateContainer(request).container_id)
    daemon.runtime.StartContainer(cri.StartContainerRequest(container_id=container_id))
    return container_id


def wait_exit(daemon: Daemon, container_id: str) -> int:
    """Wait until a container has ended and return its exit code."""
    while True:
        status = daemon.runtime.ContainerStatus(cri.ContainerStatusRequest(container_id=container_id)).status
        if status.state == cri.CONTAINER_EXITED:
            return int(status.exit_code)
        time.sleep(0.05)


def execute(daemon: Daemon, container_id: str, *argv: str) -> str:
    """Run a command in a container and return what it printed."""
    request = cri.ExecSyncRequest(container_id=container_id, cmd=list(argv), timeout=30)
    return bytes(daemon.runtime.ExecSync(request).stdout).decode(errors="replace").strip()


def show(daemon: Daemon, scratch: Path) -> None:
    """Run the pod and print what happens."""
    with timed("assemble an OCI image from this machine's Debian packages"):
        image_id = busybox_image.write_busybox(scratch / "image", IMAGE)
    with timed("load it (each layer becomes a read-only block image)"):
        loaded = daemon.load(scratch / "image")
    if loaded != image_id:
        raise SystemExit(f"the store says {loaded}, the image is {image_id}")
    (scratch / "logs").mkdir()
    config = cri.PodSandboxConfig(
        metadata=cri.PodSandboxMetadata(name="demo", namespace="default", uid=str(uuid.uuid4())),
        hostname="demo",
        log_directory=str(scratch / "logs"),
    )
    with timed("RunPodSandbox: boot a virtual machine and join it to a CNI network"):
        pod = daemon.runtime.RunPodSandbox(cri.RunPodSandboxRequest(config=config)).pod_sandbox_id
    status = daemon.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True))
    ip = status.status.network.ip
    phases = json.loads(status.info["phasesMs"])
    say("    " + ", ".join(f"{name} {ms:.0f} ms" for name, ms in phases.items()))
    say(f"    pod {pod[:13]} has address {ip}")
    with timed("CreateContainer + StartContainer: an HTTP server"):
        server = container(daemon, pod, config, "server", "httpd", "-f", "-v", "-p", "80", "-h", "/srv")
    loop = "for i in 1 2 3 4 5 6 7 8 9 10; do wget -q -O - http://127.0.0.1/ && exit 0; sleep 0.2; done; exit 1"
    with timed("CreateContainer + StartContainer: a client that fetches over the pod's loopback"):
        client = container(daemon, pod, config, "client", "sh", "-c", loop)
        code = wait_exit(daemon, client)
    if code != 0:
        raise SystemExit(f"the client container failed with status {code}")
    with timed("fetch from the host over the pod's address"):
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(f"http://{ip}/", timeout=10) as answer:
            body = answer.read().decode()
    say(f"    the host received: {body.strip()!r}")
    with timed("ExecSync: uname in the container"):
        guest_kernel = execute(daemon, server, "uname", "-r")
    say(f"    host kernel  {platform.release()}")
    say(f"    guest kernel {guest_kernel}")
    say(f"    exec `ps` in the server: {execute(daemon, server, 'ps', '-o', 'pid,args')!r}")
    for name in ("server", "client"):
        say(f"    log of {name}:")
        for line in (scratch / "logs" / f"{name}.log").read_text().splitlines():
            say(f"      {line}")
    with timed("StopPodSandbox + RemovePodSandbox"):
        daemon.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod))
        daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod))
    with timed("RemoveImage"):
        daemon.images.RemoveImage(cri.RemoveImageRequest(image=cri.ImageSpec(image=IMAGE)))


def main() -> int:
    """Run the demonstration; the exit status is 0 when all of it worked and nothing was left."""
    if os.geteuid() != 0:
        say("the demonstration makes network namespaces and VMs: run it as root (sudo make demo)")
        return 1
    if not GUEST.exists():
        say("there is no guest image yet: run `make setup`")
        return 1
    daemon = Daemon("demo")
    before = snapshot(daemon.root)
    try:
        with daemon, tempfile.TemporaryDirectory(prefix="vmrt-demo-") as scratch:
            say(f"==> private root {daemon.root}")
            with timed("start `vmrt serve` (probes KVM, opens libvirt)"):
                daemon.start()
            try:
                show(daemon, Path(scratch))
            except BaseException:
                say(f"\nthe end of the daemon's log:\n{daemon.log()[-3000:]}")
                raise
            with timed("stop the daemon"):
                status = daemon.stop()
            left = snapshot(daemon.root).added_since(before)
    finally:
        daemon.remove()
    if status != 0:
        say(f"the daemon ended with status {status}")
        return 1
    for kind, lines in left.items():
        say(f"left behind, {kind}: {lines}")
    if not left:
        say("nothing is left: no process, link, mount, firewall rule, namespace, address lease or disk")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
