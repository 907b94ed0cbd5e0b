"""A daemon for the command line's unit tests: real gRPC on a real Unix socket, pods that are entries in a dict.

Containers are scripts: a function that is given a `Process` writes its log and returns its exit code, in a thread.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from click.testing import CliRunner, Result
from google.protobuf.message import Message

from vmrt.cli.app import cli
from vmrt.proto.runtime.v1 import api_pb2, api_pb2_grpc
from vmrt.proto.vmrt.v1 import control_pb2, control_pb2_grpc


class Process:
    """What a script has of its container: the log, and whether it has been told to end."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.stopped = threading.Event()

    def write(self, octets: bytes, *, stderr: bool = False) -> None:
        """Log octets as CRI does: F for whole lines, P for a rest without a newline."""
        *lines, rest = octets.split(b"\n")
        name = b"stderr" if stderr else b"stdout"
        entries = [(b"F", line) for line in lines] + ([(b"P", rest)] if rest else [])
        with self.log.open("ab") as log:
            for tag, content in entries:
                log.write(b"2026-11-21T06:00:00.000000001Z %s %s %s\n" % (name, tag, content))


Script = Callable[[Process], int]
RUNNING = api_pb2.CONTAINER_RUNNING


class FakeDaemon:
    """The state, and all three services (their method names do not collide)."""

    def __init__(self, tmp_path: Path) -> None:
        self.socket = tmp_path / "v.sock"
        self.pods: dict[str, api_pb2.PodSandbox] = {}
        self.containers: dict[str, api_pb2.ContainerStatus] = {}
        self.owner: dict[str, str] = {}
        self.configs: dict[str, api_pb2.ContainerConfig] = {}
        self.pod_configs: dict[str, api_pb2.PodSandboxConfig] = {}
        self.processes: dict[str, Process] = {}
        self.images: list[api_pb2.Image] = []
        self.calls: list[Message] = []
        self.script: Script = lambda process: 0
        self.fail: dict[str, tuple[grpc.StatusCode, str]] = {}
        self.before: dict[str, Callable[[grpc.ServicerContext], None]] = {}
        self.execute: Callable[[api_pb2.ExecSyncRequest], api_pb2.ExecSyncResponse] = lambda request: (
            api_pb2.ExecSyncResponse()
        )
        self.pull_events: list[control_pb2.ImageEvent] = []

    # --- what tests ask and set ---------------------------------------------------------------------------------------

    def add_pod(self, identifier: str, name: str, namespace: str = "default", **more: Any) -> api_pb2.PodSandbox:
        """Put a ready pod there."""
        metadata = api_pb2.PodSandboxMetadata(name=name, namespace=namespace, uid=f"uid-{identifier}")
        more.setdefault("created_at", time.time_ns())
        self.pods[identifier] = api_pb2.PodSandbox(id=identifier, metadata=metadata, runtime_handler="vm", **more)
        return self.pods[identifier]

    def add_container(
        self,
        identifier: str,
        pod_id: str,
        name: str,
        *,
        attempt: int = 0,
        state: api_pb2.ContainerState.ValueType = RUNNING,
        log: Path | None = None,
    ) -> api_pb2.ContainerStatus:
        """Put a container there; running unless `state` says otherwise."""
        self.owner[identifier] = pod_id
        self.containers[identifier] = api_pb2.ContainerStatus(
            id=identifier,
            metadata=api_pb2.ContainerMetadata(name=name, attempt=attempt),
            image=api_pb2.ImageSpec(image="sha256:" + "e" * 64, user_specified_image="docker.io/library/app:1"),
            image_id="sha256:" + "e" * 64,
            state=state,
            created_at=time.time_ns(),
            log_path=str(log or ""),
        )
        return self.containers[identifier]

    def add_image(self, *tags: str, identifier: str = "sha256:" + "e" * 64, size: int = 12_345_678) -> None:
        """Put an image there."""
        self.images.append(api_pb2.Image(id=identifier, repo_tags=tags, size=size))

    def called(self, kind: type[Message]) -> list[Any]:
        """Return the requests of one type, in order."""
        return [request for request in self.calls if isinstance(request, kind)]

    def _note(self, request: Message, context: grpc.ServicerContext) -> None:
        self.calls.append(request)
        name = type(request).__name__.removesuffix("Request")
        if name in self.before:
            self.before[name](context)
        if name in self.fail:
            context.abort(*self.fail[name])

    # --- CRI ----------------------------------------------------------------------------------------------------------

    def ListPodSandbox(self, request: Any, context: grpc.ServicerContext) -> Message:
        self._note(request, context)
        wanted = dict(request.filter.label_selector)
        return api_pb2.ListPodSandboxResponse(
            items=[pod for pod in self.pods.values() if wanted.items() <= dict(pod.labels).items()]
        )

    def PodSandboxStatus(self, request: Any, context: grpc.ServicerContext) -> Message:
        self._note(request, context)
        if request.pod_sandbox_id not in self.pods:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such sandbox")
        network = api_pb2.PodSandboxNetworkStatus(ip="10.1.2.3", additional_ips=[api_pb2.PodIP(ip="fd00::3")])
        return api_pb2.PodSandboxStatusResponse(status=api_pb2.PodSandboxStatus(network=network))

    def RunPodSandbox(self, request: Any, context: grpc.ServicerContext) -> Message:
        identifier = f"{len(self.pods) + 0xABC:064x}"
        self.pod_configs[identifier] = request.config
        pod = self.add_pod(identifier, request.config.metadata.name, labels=request.config.labels)
        pod.metadata.CopyFrom(request.config.metadata)
        self._note(request, context)
        return api_pb2.RunPodSandboxResponse(pod_sandbox_id=identifier)

    def StopPodSandbox(self, request: Any, context: grpc.ServicerContext) -> Message:
        self._note(request, context)
        if request.pod_sandbox_id in self.pods:
            self.pods[request.pod_sandbox_id].state = api_pb2.SANDBOX_NOTREADY
        for identifier, owner in self.owner.items():
            if owner == request.pod_sandbox_id and identifier in self.processes:
                self.processes[identifier].stopped.set()
        return api_pb2.StopPodSandboxResponse()

    def RemovePodSandbox(self, request: Any, context: grpc.ServicerContext) -> Message:
        self._note(request, context)
        self.pods.pop(request.pod_sandbox_id, None)
        for identifier in [each for each, owner in self.owner.items() if owner == request.pod_sandbox_id]:
            self.containers.pop(identifier, None)
        return api_pb2.RemovePodSandboxResponse()

    def ListContainers(self, request: Any, context: grpc.ServicerContext) -> Message:
        self._note(request, context)
        return api_pb2.ListContainersResponse(
            containers=[
                api_pb2.Container(
                    id=status.id,
                    pod_sandbox_id=self.owner[status.id],
                    metadata=status.metadata,
                    image=status.image,
                    image_id=status.image_id,
                    state=status.state,
                    created_at=status.created_at,
                )
                for status in self.containers.values()
            ]
        )

    def ContainerStatus(self, request: Any, context: grpc.ServicerContext) -> Message:
        self._note(request, context)
        if request.container_id not in self.containers:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such container")
        return api_pb2.ContainerStatusResponse(status=self.containers[request.container_id])

    def CreateContainer(self, request: Any, context: grpc.ServicerContext) -> Message:
        self._note(request, context)
        identifier = f"{len(self.containers) + 0xC0C:064x}"
        log = Path(request.sandbox_config.log_directory) / request.config.log_path
        self.configs[identifier] = request.config
        self.add_container(
            identifier, request.pod_sandbox_id, request.config.metadata.name, state=api_pb2.CONTAINER_CREATED, log=log
        )
        return api_pb2.CreateContainerResponse(container_id=identifier)

    def StartContainer(self, request: Any, context: grpc.ServicerContext) -> Message:
        self._note(request, context)
        status = self.containers[request.container_id]
        process = self.processes[request.container_id] = Process(Path(status.log_path))
        status.state = api_pb2.CONTAINER_RUNNING

        def live() -> None:
            status.exit_code = self.script(process)
            status.state = api_pb2.CONTAINER_EXITED

        threading.Thread(target=live, daemon=True).start()
        return api_pb2.StartContainerResponse()

    def StopContainer(self, request: Any, context: grpc.ServicerContext) -> Message:
        self._note(request, context)
        if request.container_id in self.processes:
            self.processes[request.container_id].stopped.set()
        return api_pb2.StopContainerResponse()

    def RemoveContainer(self, request: Any, context: grpc.ServicerContext) -> Message:
        self._note(request, context)
        self.containers.pop(request.container_id, None)
        return api_pb2.RemoveContainerResponse()

    def ExecSync(self, request: Any, context: grpc.ServicerContext) -> Message:
        self._note(request, context)
        return self.execute(request)

    def ListImages(self, request: Any, context: grpc.ServicerContext) -> Message:
        self._note(request, context)
        wanted = request.filter.image.image
        return api_pb2.ListImagesResponse(
            images=[image for image in self.images if not wanted or wanted in image.repo_tags]
        )

    def ImageStatus(self, request: Any, context: grpc.ServicerContext) -> Message:
        self._note(request, context)
        for image in self.images:
            if request.image.image in (image.id, *image.repo_tags):
                return api_pb2.ImageStatusResponse(image=image)
        return api_pb2.ImageStatusResponse()

    def RemoveImage(self, request: Any, context: grpc.ServicerContext) -> Message:
        self._note(request, context)
        self.images = [image for image in self.images if image.id != request.image.image]
        return api_pb2.RemoveImageResponse()

    # --- control ------------------------------------------------------------------------------------------------------

    def PullImage(self, request: Any, context: grpc.ServicerContext) -> Iterator[Message]:
        self._note(request, context)
        yield from self.pull_events

    LoadImages = PullImage

    def Inspect(self, request: Any, context: grpc.ServicerContext) -> Message:
        self._note(request, context)
        return control_pb2.InspectResponse(kind="sandbox", json=json.dumps({"id": request.id, "phases": {"boot": 2.5}}))

    def Ping(self, request: Any, context: grpc.ServicerContext) -> Message:
        self._note(request, context)
        return control_pb2.PingResponse(version="0.1.0", pid=4242)


@contextlib.contextmanager
def serving(tmp_path: Path) -> Iterator[FakeDaemon]:
    """Serve a `FakeDaemon` on a socket below `tmp_path`."""
    fake = FakeDaemon(tmp_path)
    server = grpc.server(ThreadPoolExecutor(8))
    for service, register in (
        (api_pb2_grpc.RuntimeServiceServicer, api_pb2_grpc.add_RuntimeServiceServicer_to_server),
        (api_pb2_grpc.ImageServiceServicer, api_pb2_grpc.add_ImageServiceServicer_to_server),
        (control_pb2_grpc.ControlServicer, control_pb2_grpc.add_ControlServicer_to_server),
    ):
        register(_only(fake, service), server)
    server.add_insecure_port(f"unix://{fake.socket}")
    server.start()
    try:
        yield fake
    finally:
        server.stop(None).wait()


def _only(fake: FakeDaemon, service: type) -> Any:
    """Give one service's methods: ours where we have them, else the generated UNIMPLEMENTED ones.

    CRI's PullImage and Control's have one name and two shapes; the commands call Control's.
    """
    theirs = {name for name in vars(service) if not name.startswith("_")}
    ours = {name: getattr(fake, name) for name in theirs if hasattr(fake, name)}
    if service is api_pb2_grpc.ImageServiceServicer:
        ours.pop("PullImage", None)
    instance = type(service.__name__, (service,), {})()
    for name, method in ours.items():
        setattr(instance, name, method)
    return instance


def vmrt(fake: FakeDaemon | None, *args: str, stdin: bytes | None = None, env: dict[str, str] | None = None) -> Result:
    """Run one `vmrt` command against the fake."""
    where = [] if fake is None else ["--socket", str(fake.socket)]
    return CliRunner().invoke(cli, [*where, *args], input=stdin, env=env, prog_name="vmrt")
