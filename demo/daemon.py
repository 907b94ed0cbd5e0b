"""A `vmrt serve` of one's own, on a private root, with a CRI client on its socket: for the demonstration and tests."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

import grpc

from vmrt.proto.runtime.v1 import api_pb2 as cri
from vmrt.proto.runtime.v1 import api_pb2_grpc as cri_grpc
from vmrt.proto.vmrt.v1 import control_pb2, control_pb2_grpc

CHECKOUT = Path(__file__).resolve().parent.parent
GUEST = CHECKOUT / ".cache" / "guest"


class Daemon:
    """One daemon process and stubs for its services. `stop` leaves pods running; `remove` deletes the root."""

    def __init__(self, name: str, settings: str = "", *, guest: Path = GUEST, log_level: str = "debug") -> None:
        """Prepare a private root; `settings` is TOML text appended to the configuration."""
        # A short path: Unix socket addresses end at 107 octets.
        self.root = Path(tempfile.mkdtemp(prefix=f"vmrt-{name}-", dir="/var/tmp"))
        self.root.chmod(0o711)
        self.socket = self.root / "vmrt.sock"
        self.log_path = self.root / "daemon.log"
        self.guest = guest
        (self.root / "net.d").mkdir()
        self.config = self.root / "config.toml"
        # Cold unless a caller asks for the pool: a VM booted ahead is not what most tests are about.
        pool = "" if "[pool]" in settings else "[pool]\nsize = 0\n"
        self.config.write_text(self._base_settings(pool, log_level) + settings)
        self.process: subprocess.Popen[bytes] | None = None
        self._channel: grpc.Channel | None = None

    def _base_settings(self, pool: str, log_level: str) -> str:
        return (
            f'root = "{self.root}"\nlisten = "unix://{self.socket}"\nguest_dir = "{self.guest}"\n'
            f'{pool}[log]\nlevel = "{log_level}"\n[network]\ncni_config_dir = "{self.root}/net.d"\n'
        )

    def start(self, *, timeout_s: float = 120, environment: Mapping[str, str] | None = None) -> None:
        """Start the daemon and wait until it answers; raises `RuntimeError` with its log when it ends instead."""
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vmrt", "serve", "--config", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=CHECKOUT,
                env={**os.environ, **(environment or {})},
            )
        self._channel = grpc.insecure_channel(f"unix:{self.socket}", options=[("grpc.enable_http_proxy", 0)])
        self.runtime = cri_grpc.RuntimeServiceStub(self._channel)
        self.images = cri_grpc.ImageServiceStub(self._channel)
        self.control = control_pb2_grpc.ControlStub(self._channel)
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                self.runtime.Version(cri.VersionRequest(), timeout=2)
                return
            except grpc.RpcError as e:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the daemon did not start:\n{self.log()[-4000:]}") from e
                time.sleep(0.05)

    def log(self) -> str:
        """Return what the daemon has logged."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End the daemon process (pods go on) and return its exit status."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self.process is None:
            return 0
        self.process.send_signal(number)
        try:
            status = self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self.process = None
        return status

    def remove_pods(self) -> None:
        """Stop and remove every pod."""
        for sandbox in self.runtime.ListPodSandbox(cri.ListPodSandboxRequest()).items:
            self.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=sandbox.id))
            self.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=sandbox.id))

    def remove(self) -> None:
        """Delete the root; the daemon must have been stopped."""
        shutil.rmtree(self.root, ignore_errors=True)

    def load(self, layout: Path) -> str:
        """Import an OCI layout and return the image's id."""
        image = ""
        for event in self.control.LoadImages(control_pb2.LoadImagesRequest(path=str(layout))):
            if event.HasField("image"):
                image = event.image.id
        return image

    def __enter__(self) -> Daemon:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(Exception):
            if self.process is not None and self.process.poll() is None:
                self.remove_pods()
        self.stop()
        self.remove()


@contextlib.contextmanager
def running(name: str, settings: str = "") -> Iterator[Daemon]:
    """Run a started daemon; stop and remove it, with its pods, at the end."""
    with Daemon(name, settings) as daemon:
        daemon.start()
        yield daemon
