"""The stand on which stages measure: daemons, containerd, bare VMs, made when the first stage asks for them.

A stage is a module of this package with a `STAGE`, listed in `bench/stages.py`. It takes turns between the sides that
it compares, notes values in `Bench.samples`, and says with `Samples.compare` which ratios are to be reported.
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bench import floor, peer
from bench.samples import Samples
from demo import busybox_image
from demo.daemon import Daemon
from vmrt import config, guest_image
from vmrt.model import GuestImage
from vmrt.proto.runtime.v1 import api_pb2 as cri

IMAGE = "docker.io/library/vmrt-bench:latest"
_REFILL_S = 120.0


class Bench:
    """What stages share. Everything is taken away by the ExitStack that it is given."""

    def __init__(self, scratch: Path, rounds: int, stack: contextlib.ExitStack) -> None:
        self.scratch = scratch
        self.rounds = rounds
        self.samples = Samples()
        self._stack = stack
        self._bare = 0
        self.image = scratch / "image"
        busybox_image.write_busybox(self.image, IMAGE)

    def daemon(self, name: str, settings: str) -> Daemon:
        """Start one more daemon, at the log level that people run it at, with the busybox image loaded."""
        made = self._stack.enter_context(Daemon(name, settings, log_level="info"))
        made.start()
        made.load(self.image)
        return made

    @cached_property
    def cold(self) -> Daemon:
        """A daemon without a warm pool."""
        return self.daemon("cold", "[pool]\nsize = 0\n")

    @cached_property
    def warm(self) -> Daemon:
        """A daemon with one VM booted ahead."""
        return self.daemon("warm", "[pool]\nsize = 1\n")

    @cached_property
    def containerd(self) -> peer.Peer | None:
        """Debian's containerd with the image loaded; None, said once, where it is not installed."""
        if not peer.version():
            print("containerd or runc is not installed (apt-get install containerd): no comparison with them")
            return None
        made = self._stack.enter_context(peer.running(self.scratch / "containerd"))
        made.load(self.image)
        return made

    @cached_property
    def guest(self) -> GuestImage:
        """The guest image that all of them boot."""
        return guest_image.load(self.cold.guest)

    @cached_property
    def accelerator(self) -> str:
        """What the daemons found: "kvm" or "tcg"."""
        return str(self.runtime_info(self.cold)["accelerator"])

    @contextlib.contextmanager
    def bare_vm(self, extra: floor.Extra | None = None) -> Iterator[floor.Bare]:
        """Boot a bare VM with the same guest; it is gone at the end."""
        self._bare += 1
        number = self._bare
        helper = config.HypervisorConfig().vhost_device_vsock
        kvm = self.accelerator == "kvm"
        directory = self.scratch / f"bare{number}"
        with floor.bare_vm(self.guest, directory, helper, number=number, kvm=kvm, extra=extra) as vm:
            yield vm

    @staticmethod
    def runtime_info(daemon: Daemon) -> dict[str, object]:
        """Return what Status says of a daemon when asked verbosely."""
        info = json.loads(daemon.runtime.Status(cri.StatusRequest(verbose=True)).info["config"])
        return dict(info)

    def wait_for_pool(self, daemon: Daemon) -> None:
        """Return when the pool is full: refilling must not weigh on what is measured. `RuntimeError` if it never is."""
        deadline = time.monotonic() + _REFILL_S
        while True:
            pool = self.runtime_info(daemon)["pool"]
            assert isinstance(pool, dict)
            if pool["waiting"] >= pool["size"]:
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"no VM was booted ahead:\n{daemon.log()[-3000:]}")
            time.sleep(0.1)


@dataclass(frozen=True, slots=True)
class Stage:
    """One part of the benchmark, to be chosen by its name."""

    name: str
    summary: str
    measure: Callable[[Bench], None]


def sandbox_config(name: str = "bench") -> cri.PodSandboxConfig:
    """Return the configuration of a pod with a unique uid."""
    metadata = cri.PodSandboxMetadata(name=name, namespace="bench", uid=str(uuid.uuid4()))
    return cri.PodSandboxConfig(metadata=metadata)


def create_request(pod: str, sandbox: cri.PodSandboxConfig, name: str) -> cri.CreateContainerRequest:
    """Return the request for a container that sleeps."""
    own_pids = cri.LinuxContainerConfig(
        security_context=cri.LinuxContainerSecurityContext(namespace_options=cri.NamespaceOption(pid=cri.CONTAINER))
    )
    container = cri.ContainerConfig(
        metadata=cri.ContainerMetadata(name=name),
        image=cri.ImageSpec(image=IMAGE),
        command=["sleep", "100000"],
        linux=own_pids,
    )
    return cri.CreateContainerRequest(pod_sandbox_id=pod, config=container, sandbox_config=sandbox)


def pids_of(daemon: Daemon, pod: str) -> list[int]:
    """Return the processes that a pod of vmrt has on the host."""
    request = cri.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True)
    return [int(pid) for pid in json.loads(daemon.runtime.PodSandboxStatus(request).info["vm"])["pids"]]
