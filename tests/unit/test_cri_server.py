"""The edge over a Unix socket: statuses, idempotence, cancellation, the socket's file; pods and images are fakes."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import socket
import stat
import tempfile
import urllib.parse
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio
import pytest

import vmrt
from vmrt.agent import agent_pb2 as pb
from vmrt.config import Config
from vmrt.cri import outcome, server
from vmrt.cri.control_service import image_events
from vmrt.cri.ports import Pods
from vmrt.cri.runtime_service import cgroup_driver, fit_output
from vmrt.errors import (
    AlreadyExistsError,
    Code,
    ConfigError,
    DeadlineError,
    FailedPreconditionError,
    ImageError,
    NotFoundError,
    RegistryUnavailableError,
    VmError,
    VmrtError,
)
from vmrt.model import ContainerSpec, Image, ImageConfig, LinuxResources, RegistryAuth, SandboxSpec
from vmrt.pods.drivers import ImageStore, Progress
from vmrt.pods.lifecycle import Change, Event, Lifecycle
from vmrt.pods.records import ContainerRecord, ContainerState, SandboxRecord, SandboxState
from vmrt.pods.stats import Figures
from vmrt.proto.runtime.v1 import api_pb2 as cri
from vmrt.proto.runtime.v1 import api_pb2_grpc as cri_grpc
from vmrt.proto.vmrt.v1 import control_pb2 as control
from vmrt.proto.vmrt.v1 import control_pb2_grpc as control_grpc
from vmrt.streaming.targets import AttachRequest, ExecRequest, PortForwardRequest, Request


@dataclass(frozen=True)
class Result:
    stdout: bytes = b""
    stderr: bytes = b""
    exit_code: int = 0


@dataclass(frozen=True)
class Ready:
    runtime_ready: bool = True
    runtime_reason: str = ""
    runtime_message: str = ""
    network_ready: bool = False
    network_reason: str = "NoNetwork"
    network_message: str = "no conflist"
    info: Mapping[str, str] = field(default_factory=lambda: {"config": "{}"})


class FakePods(Pods):
    """Records in dictionaries, which change unseen; `error` is what the next call that works raises."""

    generation = None

    def __init__(self) -> None:
        self.by_id: dict[str, SandboxRecord] = {}
        self.containers_by_id: dict[str, ContainerRecord] = {}
        self.calls: list[tuple[object, ...]] = []
        self.error: BaseException | None = None
        self.result = Result()
        self.by_sandbox: dict[str, Figures] = {}
        self.lifecycle = Lifecycle()
        self.entered = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def _do(self, *call: object) -> None:
        self.calls.append(call)
        if self.error is not None:
            raise self.error

    async def run_sandbox(self, spec: SandboxSpec) -> str:
        await self._do("run", spec.name)
        record = SandboxRecord("ab" * 32, spec, SandboxState.READY, 1, "vm", "tap", ips=("10.0.0.2",))
        self.by_id[record.id] = record
        return record.id

    async def stop_sandbox(self, sandbox_id: str) -> None:
        await self._do("stop", sandbox_id)

    async def remove_sandbox(self, sandbox_id: str) -> None:
        await self._do("remove", sandbox_id)

    def sandbox(self, sandbox_id: str) -> SandboxRecord:
        for record in self.by_id.values():
            if record.id.startswith(sandbox_id):
                return record
        raise NotFoundError("no such sandbox", resource=f"sandbox {sandbox_id}")

    def sandboxes(self) -> Sequence[SandboxRecord]:
        return list(self.by_id.values())

    async def create_container(self, sandbox_id: str, spec: ContainerSpec) -> str:
        await self._do("create", sandbox_id, spec.name)
        record = ContainerRecord("cd" * 32, sandbox_id, spec, ContainerState.CREATED, 2, "sha256:i", "sha256:i")
        self.containers_by_id[record.id] = record
        return record.id

    async def start_container(self, container_id: str) -> None:
        await self._do("start", container_id)

    async def stop_container(self, container_id: str, timeout_s: float) -> None:
        await self._do("stop", container_id, timeout_s)

    async def remove_container(self, container_id: str) -> None:
        await self._do("remove", container_id)

    def container(self, container_id: str) -> ContainerRecord:
        for record in self.containers_by_id.values():
            if record.id.startswith(container_id):
                return record
        raise NotFoundError("no such container", resource=f"container {container_id}")

    def containers(self) -> Sequence[ContainerRecord]:
        return list(self.containers_by_id.values())

    async def exec_sync(self, container_id: str, args: Sequence[str], timeout_s: float) -> Result:
        await self._do("exec", container_id, tuple(args), timeout_s)
        return self.result

    async def reopen_log(self, container_id: str) -> None:
        await self._do("reopen", container_id)

    async def update_container(self, container_id: str, change: LinuxResources) -> None:
        await self._do("update", container_id, change.memory_limit_bytes)

    async def update_sandbox(
        self, sandbox_id: str, overhead: LinuxResources | None, resources: LinuxResources | None
    ) -> None:
        await self._do("resize", sandbox_id, overhead, None if resources is None else resources.memory_limit_bytes)

    async def figures(self, sandbox_ids: Iterable[str]) -> dict[str, Figures]:
        return {key: self.by_sandbox[key] for key in sandbox_ids if key in self.by_sandbox}

    @property
    def writable_layers(self) -> Path:
        return Path("/layers")

    def events(self) -> AsyncIterator[Event]:
        return self.lifecycle.subscribe()

    async def set_pod_ranges(self, cidrs: Sequence[str]) -> None:
        await self._do("ranges", *cidrs)

    async def status(self) -> Ready:
        return Ready()

    async def sandbox_info(self, sandbox_id: str) -> Mapping[str, str]:
        return {"vm": '{"id": "vm-1"}', "console": "not JSON"}

    async def container_info(self, container_id: str) -> Mapping[str, str]:
        return {"pid": "7"}


IMAGE = Image("sha256:i", ("docker.io/library/x:1",), ("docker.io/library/x@sha256:d",), 4096, ImageConfig(), ())


class FakeImages(ImageStore):
    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.auth: RegistryAuth | None = None
        self.removed: list[str] = []
        self.block = False
        self.entered = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def pull(
        self, reference: str, auth: RegistryAuth | None = None, *, progress: Progress | None = None
    ) -> Image:
        self.auth = auth
        self.entered.set()
        if progress is not None:
            for done in range(50):
                progress("copying", done, 50)
            progress("converting", 1, 0)
        try:
            if self.block:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        if self.error is not None:
            raise self.error
        return IMAGE

    async def load(self, path: Path, *, tag: str = "", progress: Progress | None = None) -> Sequence[Image]:
        assert path == Path("/srv/x.tar")
        return [IMAGE, IMAGE]

    def get(self, reference: str) -> Image | None:
        return IMAGE if reference in (IMAGE.id, *IMAGE.repo_tags) else None

    def list(self, reference: str = "") -> Sequence[Image]:
        return [IMAGE] if not reference or self.get(reference) else []

    async def remove(self, reference: str) -> None:
        self.removed.append(reference)

    def retain(self, image_id: str, user: str) -> None: ...

    def release(self, user: str) -> None: ...

    async def usage(self) -> tuple[Path, int, int]:
        return Path("/var/lib/vmrt/images"), 77, 3


class FakeStreams:
    def url(self, request: Request) -> str:
        return f"http://127.0.0.1:1/{request!r}"


@dataclass
class Edge:
    pods: FakePods
    images: FakeImages
    path: Path
    runtime: cri_grpc.RuntimeServiceAsyncStub
    image: cri_grpc.ImageServiceAsyncStub
    control: control_grpc.ControlAsyncStub


def make(path: Path, pods: FakePods, images: FakeImages) -> server.CriServer:
    return server.CriServer(Config(listen=f"unix://{path}"), pods, images, FakeStreams())


@pytest.fixture
def directory() -> Iterator[Path]:
    # pytest's own directories are too long for a socket path where the run's name is long.
    with tempfile.TemporaryDirectory(prefix="cri-") as name:
        yield Path(name)


@pytest.fixture
async def edge(directory: Path) -> AsyncIterator[Edge]:
    pods, images, path = FakePods(), FakeImages(), directory / "vmrt.sock"
    served = make(path, pods, images)
    await served.open()
    try:
        async with grpc.aio.insecure_channel(f"unix://{path}") as channel:
            yield Edge(
                pods,
                images,
                path,
                cri_grpc.RuntimeServiceStub(channel),
                cri_grpc.ImageServiceStub(channel),
                control_grpc.ControlStub(channel),
            )
    finally:
        await served.close(0.1)


def sandbox_request(name: str = "web") -> cri.RunPodSandboxRequest:
    config = cri.PodSandboxConfig(metadata=cri.PodSandboxMetadata(name=name, uid="u", namespace="n"))
    return cri.RunPodSandboxRequest(config=config)


def container_request(sandbox_id: str) -> cri.CreateContainerRequest:
    config = cri.ContainerConfig(metadata=cri.ContainerMetadata(name="c"), image=cri.ImageSpec(image="x"))
    return cri.CreateContainerRequest(pod_sandbox_id=sandbox_id, config=config)


@contextlib.asynccontextmanager
async def refused(code: grpc.StatusCode, text: str) -> AsyncIterator[None]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield
    assert caught.value.code() is code
    assert text in (caught.value.details() or "")


async def test_version_and_status(edge: Edge) -> None:
    version = await edge.runtime.Version(cri.VersionRequest())
    assert (version.version, version.runtime_name, version.runtime_api_version) == ("0.1.0", "vmrt", "v1")
    assert version.runtime_version == vmrt.__version__
    status = await edge.runtime.Status(cri.StatusRequest())
    assert [(c.type, c.status, c.reason) for c in status.status.conditions] == [
        ("RuntimeReady", True, ""),
        ("NetworkReady", False, "NoNetwork"),
    ]
    assert [handler.name for handler in status.runtime_handlers] == ["", "vm"]
    assert status.features.supplemental_groups_policy
    assert not status.info
    assert dict((await edge.runtime.Status(cri.StatusRequest(verbose=True))).info) == {"config": "{}"}
    config = await edge.runtime.RuntimeConfig(cri.RuntimeConfigRequest())
    assert config.linux.cgroup_driver == cgroup_driver()
    await edge.runtime.UpdateRuntimeConfig(cri.UpdateRuntimeConfigRequest())


@pytest.mark.parametrize(
    ("text", "ranges"),
    [("10.0.3.0/24", ("10.0.3.0/24",)), ("10.0.3.0/24, fd00:3::/64", ("10.0.3.0/24", "fd00:3::/64"))],
)
async def test_the_nodes_pod_ranges_are_handed_on(edge: Edge, text: str, ranges: tuple[str, ...]) -> None:
    network = cri.NetworkConfig(pod_cidr=text)
    request = cri.UpdateRuntimeConfigRequest(runtime_config=cri.RuntimeConfig(network_config=network))
    await edge.runtime.UpdateRuntimeConfig(request)
    assert ("ranges", *ranges) in edge.pods.calls
    for bad in ("10.0.3.1/24", "10.0.3.0/24,10.0.4.0/24", "x", "10.0.3.0/24,"):
        network.pod_cidr = bad
        request.runtime_config.network_config.CopyFrom(network)
        with pytest.raises(grpc.aio.AioRpcError, match="pod_cidr"):
            await edge.runtime.UpdateRuntimeConfig(request)


async def test_a_pods_way(edge: Edge) -> None:
    runtime = edge.runtime
    sandbox_id = (await runtime.RunPodSandbox(sandbox_request())).pod_sandbox_id
    short = sandbox_id[:8]
    container_id = (await runtime.CreateContainer(container_request(short))).container_id
    await runtime.StartContainer(cri.StartContainerRequest(container_id=container_id))
    edge.pods.result = Result(b"out", b"err", 3)
    reply = await runtime.ExecSync(cri.ExecSyncRequest(container_id=container_id[:9], cmd=["ls", ""], timeout=4))
    assert (reply.stdout, reply.stderr, reply.exit_code) == (b"out", b"err", 3)
    await runtime.ReopenContainerLog(cri.ReopenContainerLogRequest(container_id=container_id))
    assert [item.id for item in (await runtime.ListPodSandbox(cri.ListPodSandboxRequest())).items] == [sandbox_id]
    listed = (await runtime.ListContainers(cri.ListContainersRequest())).containers
    assert [item.id for item in listed] == [container_id]
    status = await runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=short))
    assert (status.status.network.ip, dict(status.info)) == ("10.0.0.2", {})
    verbose = await runtime.ContainerStatus(cri.ContainerStatusRequest(container_id=container_id, verbose=True))
    assert (verbose.status.state, dict(verbose.info)) == (cri.CONTAINER_CREATED, {"pid": "7"})
    await runtime.StopContainer(cri.StopContainerRequest(container_id=container_id, timeout=-3))
    await runtime.RemoveContainer(cri.RemoveContainerRequest(container_id=container_id))
    await runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=short))
    await runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=short))
    assert edge.pods.calls == [
        ("run", "web"),
        ("create", sandbox_id, "c"),
        ("start", container_id),
        ("exec", container_id, ("ls", ""), 4.0),
        ("reopen", container_id),
        ("stop", container_id, 0.0),
        ("remove", container_id),
        ("stop", sandbox_id),
        ("remove", sandbox_id),
    ]


async def test_stop_and_remove_of_what_is_not_there_succeed(edge: Edge) -> None:
    await edge.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id="0" * 64))
    await edge.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id="0" * 64))
    await edge.runtime.StopContainer(cri.StopContainerRequest(container_id="0" * 64))
    await edge.runtime.RemoveContainer(cri.RemoveContainerRequest(container_id="0" * 64))
    assert edge.pods.calls == []


async def test_everything_else_of_what_is_not_there_is_not_found(edge: Edge) -> None:
    runtime, absent = edge.runtime, "0" * 64
    for call in (
        runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=absent)),
        runtime.CreateContainer(container_request(absent)),
        runtime.StartContainer(cri.StartContainerRequest(container_id=absent)),
        runtime.ContainerStatus(cri.ContainerStatusRequest(container_id=absent)),
        runtime.ExecSync(cri.ExecSyncRequest(container_id=absent, cmd=["x"])),
        runtime.ReopenContainerLog(cri.ReopenContainerLogRequest(container_id=absent)),
    ):
        async with refused(grpc.StatusCode.NOT_FOUND, absent):
            await call


async def test_empty_ids_are_refused_by_name(edge: Edge) -> None:
    # A prefix matches: without this an empty id would be the only sandbox's.
    await edge.runtime.RunPodSandbox(sandbox_request())
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, "pod_sandbox_id is empty"):
        await edge.runtime.StopPodSandbox(cri.StopPodSandboxRequest())
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, "container_id is empty"):
        await edge.runtime.RemoveContainer(cri.RemoveContainerRequest())
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, "cmd is empty"):
        await edge.runtime.ExecSync(cri.ExecSyncRequest(container_id="x"))
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, "timeout is -1"):
        await edge.runtime.ExecSync(cri.ExecSyncRequest(container_id="x", cmd=["x"], timeout=-1))
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, "config.metadata is missing"):
        await edge.runtime.RunPodSandbox(cri.RunPodSandboxRequest())


def subclasses(kind: type[VmrtError]) -> list[type[VmrtError]]:
    return [kind, *(each for below in kind.__subclasses__() for each in subclasses(below))]


@pytest.mark.parametrize("kind", subclasses(VmrtError), ids=lambda kind: kind.__name__)
async def test_every_error_of_the_tree_arrives_with_its_code(edge: Edge, kind: type[VmrtError]) -> None:
    edge.pods.error = kind("it broke", phase="boot", resource="sandbox 1", hint="see the log")
    code = next(status for status in grpc.StatusCode if status.value[0] == kind.code)
    async with refused(code, "it broke"):
        await edge.runtime.RunPodSandbox(sandbox_request())


async def test_words_for_kubelet_come_first(edge: Edge) -> None:
    edge.images.error = RegistryUnavailableError("no route", phase="pull", resource="image x")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await edge.image.PullImage(cri.PullImageRequest(image=cri.ImageSpec(image="x")))
    assert caught.value.code() is grpc.StatusCode.UNKNOWN
    assert (caught.value.details() or "").startswith("RegistryUnavailable: no route")


async def test_unexpected_error_gets_an_id_and_a_traceback(edge: Edge, caplog: pytest.LogCaptureFixture) -> None:
    edge.pods.error = ZeroDivisionError("secret detail")
    with caplog.at_level(logging.ERROR), pytest.raises(grpc.aio.AioRpcError) as caught:
        await edge.runtime.RunPodSandbox(sandbox_request())
    details = caught.value.details() or ""
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in details
    ident = details.split()[2]
    assert len(ident) == 8
    record = next(record for record in caplog.records if ident in record.getMessage())
    assert record.exc_info is not None
    assert record.exc_info[0] is ZeroDivisionError


async def test_long_console_fits_the_clients_header_limit(edge: Edge) -> None:
    edge.pods.error = VmError("the guest panicked", phase="boot", console="ä\n%" * 20000 + "end of console")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await edge.runtime.RunPodSandbox(sandbox_request())
    details = caught.value.details() or ""
    assert details.startswith("boot: the guest panicked")
    assert details.endswith("end of console")


@pytest.mark.parametrize("text", ["", "short", "%" * 9000, "ä€😀" * 4000, "\n" * 9000, "x" * 6144, "x" * 6145])
def test_bounded_messages_keep_both_ends(text: str) -> None:
    shortened = outcome.bounded(text)
    assert len(urllib.parse.quote(shortened, safe=" !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~")) <= 6144
    if shortened != text:
        head, tail = shortened.split(" [...] ")
        assert text.startswith(head)
        assert text.endswith(tail)
        assert len(urllib.parse.quote(shortened, safe=" ")) > 6000


async def test_no_request_is_ever_logged(edge: Edge, caplog: pytest.LogCaptureFixture) -> None:
    auth = cri.AuthConfig(username="me", password="hunter2", server_address="r.example")
    with caplog.at_level(logging.DEBUG):
        await edge.image.PullImage(cri.PullImageRequest(image=cri.ImageSpec(image="x"), auth=auth))
        bad = cri.AuthConfig(password="hunter2\n")
        async with refused(grpc.StatusCode.INVALID_ARGUMENT, "auth.password contains the control character"):
            await edge.image.PullImage(cri.PullImageRequest(image=cri.ImageSpec(image="x"), auth=bad))
        edge.images.error = ImageError("refused")
        async with refused(grpc.StatusCode.UNKNOWN, "refused"):
            await edge.image.PullImage(cri.PullImageRequest(image=cri.ImageSpec(image="x"), auth=auth))
    assert "PullImage: OK" in caplog.text
    assert "hunter2" not in caplog.text
    assert edge.images.auth == RegistryAuth("me", "hunter2", server_address="r.example")
    assert "hunter2" not in repr(edge.images.auth)


async def test_pull_is_cancelled_with_its_client(edge: Edge) -> None:
    edge.images.block = True
    call = edge.image.PullImage(cri.PullImageRequest(image=cri.ImageSpec(image="x")))
    pull = asyncio.ensure_future(call)
    await edge.images.entered.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pull
    await asyncio.wait_for(edge.images.cancelled.wait(), 10)


async def test_control_pull_is_cancelled_with_its_client(edge: Edge) -> None:
    edge.images.block = True
    call = edge.control.PullImage(control.PullImageRequest(reference="x"))
    await call.read()
    call.cancel()
    await asyncio.wait_for(edge.images.cancelled.wait(), 10)


async def test_images(edge: Edge) -> None:
    spec = cri.ImageSpec(image="docker.io/library/x:1")
    assert (await edge.image.PullImage(cri.PullImageRequest(image=spec))).image_ref == IMAGE.id
    assert edge.images.auth is None
    status = await edge.image.ImageStatus(cri.ImageStatusRequest(image=spec, verbose=True))
    assert (status.image.id, status.image.size, set(status.info)) == (IMAGE.id, 4096, {"config", "layers"})
    absent = await edge.image.ImageStatus(cri.ImageStatusRequest(image=cri.ImageSpec(image="no")))
    assert not absent.HasField("image")
    assert [image.id for image in (await edge.image.ListImages(cri.ListImagesRequest())).images] == [IMAGE.id]
    no = cri.ImageFilter(image=cri.ImageSpec(image="no"))
    assert not (await edge.image.ListImages(cri.ListImagesRequest(filter=no))).images
    await edge.image.RemoveImage(cri.RemoveImageRequest(image=spec))
    assert edge.images.removed == ["docker.io/library/x:1"]
    usage = (await edge.image.ImageFsInfo(cri.ImageFsInfoRequest())).image_filesystems[0]
    assert (usage.fs_id.mountpoint, usage.used_bytes.value, usage.inodes_used.value) == ("/var/lib/vmrt/images", 77, 3)
    assert usage.timestamp > 0
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, "image.image is empty"):
        await edge.image.ImageStatus(cri.ImageStatusRequest())


async def test_streaming_calls_give_a_url_for_what_was_asked(edge: Edge) -> None:
    runtime = edge.runtime
    pod = (await runtime.RunPodSandbox(sandbox_request())).pod_sandbox_id
    container = (await runtime.CreateContainer(container_request(pod))).container_id
    async with refused(grpc.StatusCode.FAILED_PRECONDITION, "created"):
        await runtime.Exec(cri.ExecRequest(container_id=container, cmd=["x"], stdout=True))
    created = edge.pods.containers_by_id[container]
    edge.pods.containers_by_id[container] = dataclasses.replace(created, state=ContainerState.RUNNING)
    answer = await runtime.Exec(cri.ExecRequest(container_id=container[:9], cmd=["a", "b"], stdout=True, tty=True))
    wanted = ExecRequest(container, ("a", "b"), stdin=False, stdout=True, stderr=False, tty=True)
    assert answer.url == f"http://127.0.0.1:1/{wanted!r}"
    attached = await runtime.Attach(cri.AttachRequest(container_id=container, stdin=True))
    assert attached.url.endswith(repr(AttachRequest(container, True, False, False, False)))
    forwarded = await runtime.PortForward(cri.PortForwardRequest(pod_sandbox_id=pod, port=[80]))
    assert forwarded.url.endswith(repr(PortForwardRequest(pod, (80,))))
    for wrong, text in (
        (runtime.Exec(cri.ExecRequest(container_id=container, cmd=["x"])), "all false"),
        (runtime.Exec(cri.ExecRequest(container_id=container, stdout=True)), "cmd is empty"),
        (runtime.Attach(cri.AttachRequest(container_id=container, tty=True, stderr=True)), "tty"),
        (runtime.PortForward(cri.PortForwardRequest(pod_sandbox_id=pod, port=[0])), "port[0]"),
        (runtime.PortForward(cri.PortForwardRequest()), "pod_sandbox_id is empty"),
    ):
        async with refused(grpc.StatusCode.INVALID_ARGUMENT, text):
            await wrong
    edge.pods.by_id[pod] = dataclasses.replace(edge.pods.by_id[pod], state=SandboxState.NOT_READY)
    async with refused(grpc.StatusCode.FAILED_PRECONDITION, "not-ready"):
        await runtime.PortForward(cri.PortForwardRequest(pod_sandbox_id=pod))


UNARY_TO_COME = ["CheckpointContainer"]


def rpc(name: str) -> tuple[str, bool]:
    """Return the name of a call's request message and whether it answers with a stream."""
    service = "ImageService" if name == "StreamImages" else "RuntimeService"
    method = cri.DESCRIPTOR.services_by_name[service].methods_by_name[name]
    return method.input_type.name, bool(method.server_streaming)


@pytest.mark.parametrize("name", UNARY_TO_COME)
async def test_calls_to_come_are_unimplemented(edge: Edge, name: str) -> None:
    request, streaming = rpc(name)
    assert not streaming
    async with refused(grpc.StatusCode.UNIMPLEMENTED, f"{name} is not implemented by vmrt"):
        await getattr(edge.runtime, name)(getattr(cri, request)())


async def test_figures_limits_and_events(edge: Edge) -> None:
    runtime = edge.runtime
    pod = (await runtime.RunPodSandbox(sandbox_request())).pod_sandbox_id
    container = (await runtime.CreateContainer(container_request(pod))).container_id
    stats = (await runtime.ContainerStats(cri.ContainerStatsRequest(container_id=container))).stats
    assert (stats.attributes.id, stats.HasField("cpu")) == (container, False)
    edge.pods.by_sandbox[pod] = Figures(7, pb.SandboxStat(), {container: pb.ContainerStat(cpu_usage_us=2)})
    listed = (await runtime.ListContainerStats(cri.ListContainerStatsRequest())).stats
    assert [(s.cpu.timestamp, s.cpu.usage_core_nano_seconds.value) for s in listed] == [(7, 2000)]
    async for message in runtime.StreamPodSandboxStats(cri.StreamPodSandboxStatsRequest()):
        assert [s.attributes.id for s in message.pod_sandbox_stats] == [pod]
    async for images in edge.image.StreamImages(cri.StreamImagesRequest()):
        assert len(images.images) == 1
    status = await runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod))
    assert [c.id for c in status.containers_statuses] == [container]
    assert status.timestamp > 0
    limits = cri.LinuxContainerResources(memory_limit_in_bytes=5)
    await runtime.UpdateContainerResources(cri.UpdateContainerResourcesRequest(container_id=container, linux=limits))
    await runtime.UpdatePodSandboxResources(cri.UpdatePodSandboxResourcesRequest(pod_sandbox_id=pod, resources=limits))
    assert edge.pods.calls[-2:] == [("update", container, 5), ("resize", pod, None, 5)]
    async with refused(grpc.StatusCode.NOT_FOUND, "no such container"):
        await runtime.ContainerStats(cri.ContainerStatsRequest(container_id="ff"))
    events = runtime.GetContainerEvents(cri.GetEventsRequest())
    reading = asyncio.ensure_future(events.read())
    while not edge.pods.lifecycle._subscribers:
        await asyncio.sleep(0)
    edge.pods.lifecycle.publish(pod, (Change.STARTED,), lambda: (edge.pods.sandbox(pod), edge.pods.containers()))
    event = await reading
    assert isinstance(event, cri.ContainerEventResponse)
    assert (event.container_id, event.container_event_type) == (pod, cri.CONTAINER_STARTED_EVENT)
    assert (event.pod_sandbox_status.metadata.name, event.containers_statuses[0].id) == ("web", container)
    events.cancel()


async def test_control(edge: Edge) -> None:
    pong = await edge.control.Ping(control.PingRequest())
    assert (pong.version, pong.pid) == (vmrt.__version__, os.getpid())
    events = [event async for event in edge.control.PullImage(control.PullImageRequest(reference="x"))]
    assert [event.WhichOneof("event") for event in events] == ["progress", "progress", "image"]
    copying, converting, image = events
    assert (copying.progress.what, copying.progress.done, copying.progress.total) == ("copying", 49, 50)
    assert (converting.progress.what, converting.progress.total) == ("converting", 0)
    assert (image.image.id, image.image.size_bytes) == (IMAGE.id, 4096)
    loaded = [event async for event in edge.control.LoadImages(control.LoadImagesRequest(path="/srv/x.tar"))]
    assert [event.image.id for event in loaded] == [IMAGE.id, IMAGE.id]
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, "path is 'x.tar', not an absolute path"):
        async for _ in edge.control.LoadImages(control.LoadImagesRequest(path="x.tar")):
            pytest.fail("an event came")
    edge.images.error = ImageError("manifest unknown")
    async with refused(grpc.StatusCode.UNKNOWN, "manifest unknown"):
        async for _ in edge.control.PullImage(control.PullImageRequest(reference="x")):
            pass


async def test_inspect(edge: Edge) -> None:
    sandbox_id = (await edge.runtime.RunPodSandbox(sandbox_request())).pod_sandbox_id
    container_id = (await edge.runtime.CreateContainer(container_request(sandbox_id))).container_id
    found = await edge.control.Inspect(control.InspectRequest(id=sandbox_id[:6]))
    assert found.kind == "sandbox"
    assert '"id": "vm-1"' in found.json
    assert '"console": "not JSON"' in found.json
    assert (await edge.control.Inspect(control.InspectRequest(id=container_id))).kind == "container"
    async with refused(grpc.StatusCode.NOT_FOUND, "there is no sandbox or container 'zz'"):
        await edge.control.Inspect(control.InspectRequest(id="zz"))


async def test_closing_the_events_waits_for_the_work_to_undo_itself() -> None:
    undone = False

    async def work(progress: Progress) -> Sequence[Image]:
        nonlocal undone
        progress("step", 1, 2)
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            undone = True
        return []

    events = image_events(work)
    assert (await anext(events)).progress.what == "step"
    await events.aclose()
    assert undone


@pytest.mark.parametrize(
    ("stdout", "stderr", "kept"),
    [(3, 4, (3, 4)), (20, 0, (10, 0)), (0, 20, (0, 10)), (20, 20, (5, 5)), (2, 20, (2, 8)), (20, 3, (7, 3))],
)
def test_output_fits_one_message(stdout: int, stderr: int, kept: tuple[int, int]) -> None:
    out, err = fit_output(b"o" * stdout, b"e" * stderr, 10)
    assert (len(out), len(err)) == kept


async def test_large_output_arrives(edge: Edge) -> None:
    await edge.runtime.RunPodSandbox(sandbox_request())
    container_id = (await edge.runtime.CreateContainer(container_request("ab"))).container_id
    edge.pods.result = Result(b"o" * 2**24, b"e" * 2**24)
    async with grpc.aio.insecure_channel(
        f"unix://{edge.path}", options=[("grpc.max_receive_message_length", 2**24)]
    ) as channel:
        reply = await cri_grpc.RuntimeServiceStub(channel).ExecSync(
            cri.ExecSyncRequest(container_id=container_id, cmd=["x"])
        )
    assert len(reply.stdout) == len(reply.stderr) == (2**24 - 4096) // 2


async def test_socket_is_for_root_and_its_group(edge: Edge) -> None:
    assert stat.S_IMODE(edge.path.stat().st_mode) == 0o660


async def test_second_daemon_is_refused_and_the_first_serves_on(edge: Edge) -> None:
    with pytest.raises(AlreadyExistsError, match="another daemon answers"):
        await make(edge.path, edge.pods, edge.images).open()
    assert (await edge.runtime.Version(cri.VersionRequest())).runtime_name == "vmrt"


async def test_stale_socket_is_replaced_and_ours_removed(directory: Path) -> None:
    path = directory / "sub" / "vmrt.sock"
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    served = make(path, FakePods(), FakeImages())
    await served.open()
    async with grpc.aio.insecure_channel(f"unix://{path}") as channel:
        assert await cri_grpc.RuntimeServiceStub(channel).Version(cri.VersionRequest())
    await served.close(0.1)
    assert not path.exists()


async def test_file_in_the_way_is_left_alone(directory: Path) -> None:
    path = directory / "vmrt.sock"
    path.write_text("precious")
    with pytest.raises(ConfigError, match="is no socket"):
        await make(path, FakePods(), FakeImages()).open()
    assert path.read_text() == "precious"


async def test_socket_path_too_long(directory: Path) -> None:
    with pytest.raises(ConfigError, match="the kernel takes at most 107"):
        await make(directory / ("x" * 100), FakePods(), FakeImages()).open()


def test_codes_are_those_of_grpc() -> None:
    for code in Code:
        assert outcome.STATUS[code].value[0] == code
    assert DeadlineError("x").code is Code.DEADLINE_EXCEEDED
    assert FailedPreconditionError("x").code is Code.FAILED_PRECONDITION


@pytest.mark.parametrize(("running", "driver"), [(True, cri.SYSTEMD), (False, cri.CGROUPFS)])
def test_cgroup_driver_follows_systemd(directory: Path, running: bool, driver: int) -> None:
    if running:
        (directory / "system").mkdir()
    assert cgroup_driver("auto", directory / "system") == driver
    assert cgroup_driver("systemd", directory / "system") == cri.SYSTEMD
    assert cgroup_driver("cgroupfs", directory / "system") == cri.CGROUPFS
