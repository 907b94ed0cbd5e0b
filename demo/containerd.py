"""Debian's containerd with runc on a private root: the peer of the benchmark, and the delegate of end-to-end tests.

Its configuration is as Debian ships it but for paths, the sandbox image (made here: nothing is downloaded), and what a
machine without CAP_SYS_RESOURCE needs. The CNI chain is the one that vmrt's built-in network uses: bridge with
host-local and masquerading, portmap.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc

from demo import busybox_image
from vmrt.proto.runtime.v1 import api_pb2 as cri
from vmrt.proto.runtime.v1 import api_pb2_grpc as cri_grpc

PAUSE = "docker.io/library/vmrt-pause:latest"
_CONFIG = """
version = 2
root = "{root}/root"
state = "{root}/state"
[grpc]
  address = "{socket}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{root}/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{cni_bin_dir}"
    conf_dir = "{root}/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "{snapshotter}"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
"""
_START_S = 60.0


@dataclass(frozen=True, slots=True)
class Bridge:
    """The network of its pods: a bridge's name and an IPv4 subnet of 24 bits, which nobody else may have."""

    name: str
    subnet: str


class Containerd:
    """One containerd: `start` and `stop` as often as wanted, its pods outlive it; and stubs for its services."""

    def __init__(self, root: Path, bridge: Bridge) -> None:
        """Prepare the absent directory `root`."""
        self.root = root
        self.bridge = bridge
        self.socket = root / "containerd.sock"
        root.mkdir(parents=True)
        (root / "config.toml").write_text(
            _CONFIG.format(
                root=root,
                socket=self.socket,
                pause=PAUSE,
                cni_bin_dir=self._network(),
                snapshotter="overlayfs" if _overlay_works(root) else "native",
            )
        )
        self.process: subprocess.Popen[bytes] | None = None
        self._channel = grpc.insecure_channel(f"unix:{self.socket}", options=[("grpc.enable_http_proxy", 0)])
        self.runtime = cri_grpc.RuntimeServiceStub(self._channel)
        self.images = cri_grpc.ImageServiceStub(self._channel)

    def start(self) -> None:
        """Return when it answers; raises `RuntimeError` with its log otherwise."""
        with (self.root / "log").open("ab") as log:
            self.process = subprocess.Popen(
                ["containerd", "--config", str(self.root / "config.toml")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + _START_S
        while True:
            try:
                self.runtime.Status(cri.StatusRequest(), timeout=2)
                return
            except grpc.RpcError as e:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"containerd did not start:\n{self.log()[-3000:]}") from e
                time.sleep(0.05)

    def stop(self) -> None:
        """End the process; its pods go on."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
            self.process = None

    def log(self) -> str:
        """Return what it has logged."""
        return (self.root / "log").read_text(errors="replace")

    def load(self, layout: Path) -> None:
        """Import an OCI layout into the namespace that CRI uses."""
        archive = layout.with_suffix(".tar")
        with tarfile.open(archive, "w") as tar:
            for path in sorted(layout.iterdir()):
                tar.add(path, path.name)
        argv = ["ctr", "--address", str(self.socket), "--namespace", "k8s.io", "images", "import", str(archive)]
        subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, capture_output=True)

    def load_pause(self) -> None:
        """Make and import the image of its sandboxes."""
        layer = busybox_image.layer(busybox_image.busybox())
        pause = {"Env": ["PATH=/bin"], "Cmd": ["sleep", "1000000"]}
        busybox_image.write_layout(self.root / "pause", PAUSE, [layer], pause)
        self.load(self.root / "pause")

    def remove_pods(self) -> None:
        """Stop and remove every pod."""
        for sandbox in self.runtime.ListPodSandbox(cri.ListPodSandboxRequest()).items:
            self.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=sandbox.id))
            self.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=sandbox.id))

    def close(self) -> None:
        """Remove its pods, and end it."""
        try:
            if self.process is None or self.process.poll() is not None:
                self.start()
            with contextlib.suppress(grpc.RpcError):
                self.remove_pods()
        finally:
            self._channel.close()
            self.stop()
            subprocess.run(["ip", "link", "del", self.bridge.name], capture_output=True, check=False)

    def left_behind(self) -> list[str]:
        """Return the processes and mounts that name its root."""
        root, found = str(self.root), []
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if root in command and "containerd" in command:
                    found.append(f"pid {directory.name}: {command[:120]}")
        mounts = (line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())
        return found + [place for place in mounts if place.startswith(root)]

    def _network(self) -> str:
        """Write the CNI configuration; return the directory of its plugins."""
        plugins = [
            {
                "type": "bridge", "bridge": self.bridge.name, "isGateway": True, "ipMasq": True, "hairpinMode": True,
                "ipam": {
                    "type": "host-local", "dataDir": f"{self.root}/ipam",
                    "ranges": [[{"subnet": self.bridge.subnet}]], "routes": [{"dst": "0.0.0.0/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True},
        ]  # fmt: skip
        (self.root / "net.d").mkdir()
        conflist = {"cniVersion": "1.0.0", "name": self.bridge.name, "plugins": plugins}
        (self.root / "net.d" / "10-bridge.conflist").write_text(json.dumps(conflist))
        return next(d for d in ("/opt/cni/bin", "/usr/lib/cni") if (Path(d) / "bridge").exists())


def _overlay_works(root: Path) -> bool:
    """Say whether directories below `root` can be an overlay's layers: not where they are on an overlay themselves."""
    names = ("lower", "upper", "work", "merged")
    lower, upper, work, merged = (root / "overlay" / name for name in names)
    for directory in (lower, upper, work, merged):
        directory.mkdir(parents=True)
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    done = subprocess.run(
        ["mount", "-t", "overlay", "overlay", "-o", options, merged], capture_output=True, check=False
    )
    if done.returncode == 0:
        subprocess.run(["umount", merged], check=True)
    shutil.rmtree(root / "overlay")
    return done.returncode == 0


def version() -> str:
    """Return what is installed; "" when containerd or runc is not (Debian: containerd)."""
    lines = []
    for program in ("containerd", "runc"):
        if shutil.which(program) is None:
            return ""
        done = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
        lines.append(done.stdout.splitlines()[0])
    return ", ".join(lines)


@contextlib.contextmanager
def running(root: Path, bridge: Bridge) -> Iterator[Containerd]:
    """Run one in the absent directory `root`; its pods, processes and bridge are gone at the end."""
    containerd = Containerd(root, bridge)
    try:
        containerd.start()
        containerd.load_pause()
        yield containerd
    finally:
        containerd.close()
