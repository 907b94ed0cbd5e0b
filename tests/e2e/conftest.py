"""Fixtures of the end-to-end tests: real daemons with real VMs, and the check that each leaves nothing behind.

A session shares one daemon and, where isolation is not what is tested, one pod; a test that breaks things takes a
daemon of its own (`private_daemon`).
"""

from __future__ import annotations

import itertools
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from demo import busybox_image
from demo.daemon import GUEST, Daemon
from demo.leftovers import snapshot
from vmrt.proto.runtime.v1 import api_pb2 as cri

IMAGE = "docker.io/library/vmrt-test:latest"


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Without root there are no namespaces and no VMs; under CI that is a failure, not a skip."""
    if os.geteuid() != 0 and not os.environ.get("CI"):
        for item in items:
            item.add_marker(pytest.mark.skip(reason="end-to-end tests need root"))


@pytest.fixture(scope="session")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The busybox image as an OCI layout."""
    directory = tmp_path_factory.mktemp("image") / "layout"
    busybox_image.write_busybox(directory, IMAGE)
    return directory


@contextmanager
def clean_daemon(name: str, settings: str = "") -> Iterator[Daemon]:
    """A prepared, not yet started daemon; afterwards nothing of it may be left on the host."""
    assert GUEST.exists(), "there is no guest image: run `make setup`"
    daemon = Daemon(name, settings)
    before = snapshot(daemon.root)
    try:
        yield daemon
        if daemon.process is None or daemon.process.poll() is not None:
            daemon.stop()
            daemon.start()
        daemon.remove_pods()
        assert daemon.stop() == 0, daemon.log()[-3000:]
        left = snapshot(daemon.root).added_since(before)
        assert not left, f"left behind: {left}\n{daemon.log()[-3000:]}"
    except BaseException:
        print(f"--- the end of the daemon's log ---\n{daemon.log()[-6000:]}")
        raise
    finally:
        with daemon:
            pass


@dataclass
class Pod:
    """A running sandbox and shorthand for what tests do with it."""

    daemon: Daemon
    id: str
    config: cri.PodSandboxConfig
    logs: Path
    _names: Iterator[int]

    def create(self, *command: str, name: str = "", image: str = IMAGE, **fields: object) -> str:
        """Create a container; `fields` are ContainerConfig's."""
        name = name or f"c{next(self._names)}"
        config = cri.ContainerConfig(
            metadata=cri.ContainerMetadata(name=name),
            image=cri.ImageSpec(image=image),
            command=command,
            log_path=f"{name}.log",
        )
        if "linux" not in fields:
            config.linux.security_context.namespace_options.pid = cri.CONTAINER
        config.MergeFrom(cri.ContainerConfig(**fields))  # type: ignore[arg-type]
        request = cri.CreateContainerRequest(pod_sandbox_id=self.id, config=config, sandbox_config=self.config)
        return str(self.daemon.runtime.CreateContainer(request).container_id)

    def start(self, container_id: str) -> None:
        """Start a container."""
        self.daemon.runtime.StartContainer(cri.StartContainerRequest(container_id=container_id))

    def run(self, *command: str, **fields: object) -> str:
        """Create and start a container."""
        container_id = self.create(*command, **fields)  # type: ignore[arg-type]
        self.start(container_id)
        return container_id

    def status(self, container_id: str) -> cri.ContainerStatus:
        """Return a container's status."""
        return self.daemon.runtime.ContainerStatus(cri.ContainerStatusRequest(container_id=container_id)).status

    def wait(self, container_id: str) -> cri.ContainerStatus:
        """Wait until a container has ended and return its status."""
        while (status := self.status(container_id)).state != cri.CONTAINER_EXITED:
            time.sleep(0.02)
        return status

    def output(self, *command: str, **fields: object) -> str:
        """Run a container to its end; return what it wrote to stdout, with its exit code checked to be 0."""
        container_id = self.run(*command, **fields)
        status = self.wait(container_id)
        text = log_text(Path(status.log_path))
        assert status.exit_code == 0, (status.reason, status.message, text, log_text(Path(status.log_path), "stderr"))
        self.remove(container_id)
        return text

    def remove(self, container_id: str) -> None:
        """Remove a container."""
        self.daemon.runtime.RemoveContainer(cri.RemoveContainerRequest(container_id=container_id))

    def execute(self, container_id: str, *command: str, timeout: int = 30) -> cri.ExecSyncResponse:
        """Run a command in a running container."""
        return self.daemon.runtime.ExecSync(
            cri.ExecSyncRequest(container_id=container_id, cmd=command, timeout=timeout)
        )


def log_text(path: Path, stream: str = "stdout") -> str:
    """Return what a CRI log file says one stream carried."""
    out = []
    for line in path.read_text().splitlines():
        _, name, tag, content = line.split(" ", 3)
        if name == stream:
            out.append(content + ("\n" if tag == "F" else ""))
    return "".join(out)


def until(what: Callable[[], bool], why: str, limit_s: float = 60) -> None:
    """Wait for something to become true; the limit is for a test that fails, and far from what is expected."""
    deadline = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < deadline, f"waited {limit_s} s until {why}"
        time.sleep(0.02)


def sandbox_config(logs: Path, name: str = "pod", **fields: object) -> cri.PodSandboxConfig:
    """Return the configuration of a pod with a unique uid."""
    config = cri.PodSandboxConfig(
        metadata=cri.PodSandboxMetadata(name=name, namespace="test", uid=str(uuid.uuid4())),
        log_directory=str(logs),
    )
    config.MergeFrom(cri.PodSandboxConfig(**fields))  # type: ignore[arg-type]
    return config


def run_pod(daemon: Daemon, logs: Path, name: str = "pod", handler: str = "", **fields: object) -> Pod:
    """Run a sandbox."""
    config = sandbox_config(logs, name, **fields)
    request = cri.RunPodSandboxRequest(config=config, runtime_handler=handler)
    return Pod(daemon, daemon.runtime.RunPodSandbox(request).pod_sandbox_id, config, logs, itertools.count())


@pytest.fixture(scope="session")
def direct_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the session's daemon finds direct-assigned volumes."""
    return tmp_path_factory.mktemp("direct")


@pytest.fixture(scope="session")
def daemon(layout: Path, direct_dir: Path) -> Iterator[Daemon]:
    """The session's daemon with the busybox image loaded."""
    with clean_daemon("e2e", f'[volumes]\ndirect_dir = "{direct_dir}"\n') as daemon:
        daemon.start()
        daemon.load(layout)
        yield daemon


@pytest.fixture(scope="session")
def pod(daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Pod:
    """The session's pod, for tests that only need some VM."""
    return run_pod(daemon, tmp_path_factory.mktemp("logs"), "shared", hostname="shared-host")


@pytest.fixture
def private_daemon(layout: Path) -> Iterator[Callable[..., Daemon]]:
    """Make a started daemon of the test's own, with the image loaded."""
    from contextlib import ExitStack

    with ExitStack() as stack:

        def make(settings: str = "", *, load: bool = True) -> Daemon:
            made = stack.enter_context(clean_daemon("own", settings))
            made.start()
            if load:
                made.load(layout)
            return made

        yield make
