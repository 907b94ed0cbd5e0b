"""The peer: Debian's containerd with runc, started by the benchmark on a private root, with vmrt's kind of network.

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
from pathlib import Path

import grpc

from demo import busybox_image
from vmrt.proto.runtime.v1 import api_pb2 as cri
from vmrt.proto.runtime.v1 import api_pb2_grpc as cri_grpc

PAUSE = "docker.io/library/vmrt-bench-pause:latest"
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
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
"""
_START_S = 30.0


class Peer:
    """A running containerd and stubs for its services."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.socket = root / "containerd.sock"
        self._channel = grpc.insecure_channel(f"unix:{self.socket}", options=[("grpc.enable_http_proxy", 0)])
        self.runtime = cri_grpc.RuntimeServiceStub(self._channel)

    def wait_ready(self, process: subprocess.Popen[bytes]) -> None:
        """Return when it answers with its runtime ready; raises `RuntimeError` with its log otherwise."""
        deadline = time.monotonic() + _START_S
        while True:
            try:
                self.runtime.Status(cri.StatusRequest(), timeout=2)
                return
            except grpc.RpcError as e:
                if process.poll() is not None or time.monotonic() > deadline:
                    log = (self.root / "log").read_text(errors="replace")
                    raise RuntimeError(f"containerd did not start:\n{log[-3000:]}") from e
                time.sleep(0.05)

    def load(self, layout: Path) -> None:
        """Import an OCI layout into the namespace that CRI uses."""
        archive = layout.with_suffix(".tar")
        with tarfile.open(archive, "w") as tar:
            for path in sorted(layout.iterdir()):
                tar.add(path, path.name)
        argv = ["ctr", "--address", str(self.socket), "--namespace", "k8s.io", "images", "import", str(archive)]
        subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, capture_output=True)

    def remove_pods(self) -> None:
        """Stop and remove every pod."""
        for sandbox in self.runtime.ListPodSandbox(cri.ListPodSandboxRequest()).items:
            self.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=sandbox.id))
            self.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=sandbox.id))

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()


def version() -> str:
    """Return what is measured against; "" when containerd or runc is not installed (Debian: containerd)."""
    lines = []
    for program in ("containerd", "runc"):
        if shutil.which(program) is None:
            return ""
        done = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
        lines.append(done.stdout.splitlines()[0])
    return ", ".join(lines)


def _network(root: Path) -> str:
    """Write the CNI configuration; return the directory of its plugins."""
    plugins = [
        {
            "type": "bridge", "bridge": "vmrt-bench-ctrd", "isGateway": True, "ipMasq": True, "hairpinMode": True,
            "ipam": {
                "type": "host-local", "dataDir": f"{root}/ipam",
                "ranges": [[{"subnet": "10.240.250.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}],
            },
        },
        {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True},
    ]  # fmt: skip
    (root / "net.d").mkdir()
    conflist = {"cniVersion": "1.0.0", "name": "bench", "plugins": plugins}
    (root / "net.d" / "10-bench.conflist").write_text(json.dumps(conflist))
    return next(d for d in ("/opt/cni/bin", "/usr/lib/cni") if (Path(d) / "bridge").exists())


@contextlib.contextmanager
def running(root: Path) -> Iterator[Peer]:
    """Run a containerd in the absent directory `root`; its pods, processes and bridge are gone at the end."""
    root.mkdir(parents=True)
    peer = Peer(root)
    (root / "config.toml").write_text(
        _CONFIG.format(root=root, socket=peer.socket, pause=PAUSE, cni_bin_dir=_network(root))
    )
    with (root / "log").open("wb") as log:
        process = subprocess.Popen(
            ["containerd", "--config", str(root / "config.toml")], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        peer.wait_ready(process)
        layer = busybox_image.layer(busybox_image.busybox())
        pause = {"Env": ["PATH=/bin"], "Cmd": ["sleep", "1000000"]}
        busybox_image.write_layout(root / "pause", PAUSE, [layer], pause)
        peer.load(root / "pause")
        yield peer
    finally:
        with contextlib.suppress(grpc.RpcError):
            peer.remove_pods()
        peer.close()
        process.terminate()
        process.wait()
        subprocess.run(["ip", "link", "del", "vmrt-bench-ctrd"], capture_output=True, check=False)
