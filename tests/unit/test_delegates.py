"""Delegates behind the edge: who runs a pod, what clients see, and what happens when a delegate fails in any way."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from fake_runtime import FakeRuntime, running
from test_cri_server import IMAGE, FakeImages, FakePods, FakeStreams, refused, sandbox_request

from vmrt.config import Config, HandlerConfig
from vmrt.cri import server
from vmrt.cri.delegates import endpoint, events, merging, routing
from vmrt.cri.delegates.compose import compose
from vmrt.model import Image, ImageConfig
from vmrt.pods.lifecycle import Change
from vmrt.proto.runtime.v1 import api_pb2 as cri
from vmrt.proto.runtime.v1 import api_pb2_grpc as cri_grpc
from vmrt.proto.vmrt.v1 import control_pb2 as control
from vmrt.proto.vmrt.v1 import control_pb2_grpc as control_grpc

OURS = "ab" * 32
WAIT_S = 60.0


@dataclass
class Node:
    """A daemon's edge with one delegate, whose handlers are "host" (host network, its default handler) and "runc"."""

    pods: FakePods
    images: FakeImages
    theirs: FakeRuntime
    config: Config
    runtime: cri_grpc.RuntimeServiceAsyncStub
    image: cri_grpc.ImageServiceAsyncStub
    control: control_grpc.ControlAsyncStub

    async def run(self, name: str = "proxy", handler: str = "", *, host: bool = True) -> str:
        request = sandbox_request(name)
        request.runtime_handler = handler
        request.config.annotations["kept"] = "as it is"
        if host:
            request.config.linux.security_context.namespace_options.network = cri.NODE
        return (await self.runtime.RunPodSandbox(request)).pod_sandbox_id

    async def create(self, sandbox: str, image: str = "theirs:1") -> str:
        config = cri.ContainerConfig(metadata=cri.ContainerMetadata(name="c"), image=cri.ImageSpec(image=image))
        request = cri.CreateContainerRequest(pod_sandbox_id=sandbox, config=config)
        return (await self.runtime.CreateContainer(request)).container_id

    async def sandboxes(self, **wanted: Any) -> list[str]:
        request = cri.ListPodSandboxRequest(filter=cri.PodSandboxFilter(**wanted))
        return [item.id for item in (await self.runtime.ListPodSandbox(request)).items]

    async def condition(self) -> cri.RuntimeCondition:
        conditions = (await self.runtime.Status(cri.StatusRequest())).status.conditions
        return next(c for c in conditions if c.type == "DelegatesReady")

    async def until_up(self, wanted: bool = True) -> None:
        async with asyncio.timeout(WAIT_S):
            while (await self.condition()).status is not wanted:
                await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def serving(directory: Path, pods: FakePods, images: FakeImages, theirs: FakeRuntime) -> AsyncIterator[Node]:
    path = directory / "vmrt.sock"
    handlers = {
        "vm": HandlerConfig(),
        "host": HandlerConfig(endpoint=theirs.endpoint, host_network=True, host_ipc=True),
        "runc": HandlerConfig(endpoint=theirs.endpoint, delegate_handler="theirs-runc"),
    }
    config = Config(listen=f"unix://{path}", handlers=handlers)
    served = server.CriServer(config, pods, images, FakeStreams())
    await served.open()
    try:
        async with grpc.aio.insecure_channel(f"unix://{path}") as channel:
            stubs = cri_grpc.RuntimeServiceStub(channel), cri_grpc.ImageServiceStub(channel)
            yield Node(pods, images, theirs, config, *stubs, control_grpc.ControlStub(channel))
    finally:
        await served.close(0.1)


@pytest.fixture
def directory() -> Any:
    with tempfile.TemporaryDirectory(prefix="dlg-") as name:
        yield Path(name)


@pytest.fixture
async def node(directory: Path) -> AsyncIterator[Node]:
    async with (
        running(directory / "theirs.sock") as theirs,
        serving(directory, FakePods(), FakeImages(), theirs) as made,
    ):
        theirs.registry["theirs:1"] = cri.Image(id="sha256:" + "7" * 64, repo_tags=["theirs:1"], size=9)
        theirs.images = {"x": theirs.registry["theirs:1"]}
        yield made


# --- who runs a pod ---


HANDLERS = {
    "vm": HandlerConfig(),
    "net": HandlerConfig(endpoint="unix:///n", host_network=True),
    "ipc": HandlerConfig(endpoint="unix:///i", host_ipc=True),
    "pid": HandlerConfig(endpoint="unix:///p", host_pid=True),
}


@pytest.mark.parametrize(
    ("asked", "network", "ipc", "pid", "taker"),
    [
        ("", cri.POD, cri.POD, cri.POD, ""),
        ("", cri.NODE, cri.POD, cri.POD, "net"),
        ("", cri.POD, cri.NODE, cri.POD, "ipc"),
        ("", cri.POD, cri.POD, cri.NODE, "pid"),
        ("", cri.NODE, cri.NODE, cri.NODE, "net"),
        ("vm", cri.NODE, cri.POD, cri.POD, ""),
        ("pid", cri.POD, cri.POD, cri.POD, "pid"),
        ("absent", cri.NODE, cri.POD, cri.POD, ""),
    ],
)
def test_route(asked: str, network: Any, ipc: Any, pid: Any, taker: str) -> None:
    assert routing.route(HANDLERS, asked, cri.NamespaceOption(network=network, ipc=ipc, pid=pid)) == taker


def test_route_without_takers_leaves_host_pods_to_be_refused() -> None:
    handlers = {"vm": HandlerConfig(), "runc": HandlerConfig(endpoint="unix:///r")}
    assert routing.route(handlers, "", cri.NamespaceOption(network=cri.NODE, ipc=cri.NODE, pid=cri.NODE)) == ""


def test_without_delegates_nothing_is_in_the_way() -> None:
    ours: list[Any] = [object(), object(), object()]
    services = compose(Config(), FakePods(), FakeImages(), *ours)
    assert [services.runtime, services.image, services.control] == ours
    assert services.directory is None


async def test_a_host_network_pod_runs_at_the_delegate(node: Node) -> None:
    sandbox = await node.run()
    (request,) = node.theirs.asked("RunPodSandbox")
    assert request.runtime_handler == ""
    assert request.config.annotations[routing.HANDLER_ANNOTATION] == ""
    assert node.pods.calls == []
    (item,) = (await node.runtime.ListPodSandbox(cri.ListPodSandboxRequest())).items
    assert (item.id, item.runtime_handler, dict(item.annotations)) == (sandbox, "", {"kept": "as it is"})
    status = (await node.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=sandbox))).status
    assert (status.runtime_handler, dict(status.annotations)) == ("", {"kept": "as it is"})
    assert status.linux.namespaces.options.network == cri.NODE


async def test_a_handler_is_told_as_it_was_asked_for(node: Node) -> None:
    sandbox = await node.run(handler="runc", host=False)
    assert node.theirs.asked("RunPodSandbox")[0].runtime_handler == "theirs-runc"
    (item,) = (await node.runtime.ListPodSandbox(cri.ListPodSandboxRequest())).items
    assert (item.id, item.runtime_handler) == (sandbox, "runc")


async def test_what_others_made_at_the_delegate_is_shown_too(node: Node) -> None:
    node.theirs.sandboxes["0" * 64] = cri.PodSandbox(id="0" * 64, runtime_handler="theirs-runc")
    node.theirs.sandboxes["1" * 64] = cri.PodSandbox(id="1" * 64, runtime_handler="kata")
    items = (await node.runtime.ListPodSandbox(cri.ListPodSandboxRequest())).items
    assert {item.id[0]: item.runtime_handler for item in items} == {"0": "runc", "1": "kata"}


async def test_vms_refuse_the_hosts_network_and_say_who_would_take_it(node: Node) -> None:
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, "handlers.NAME.host_network"):
        await node.run(handler="vm")
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, "configured: host, runc, vm"):
        await node.run(handler="absent")
    assert node.theirs.calls["RunPodSandbox"] == 0


# --- one runtime ---


async def test_lists_are_one(node: Node) -> None:
    assert await node.run("web", host=False) == OURS
    theirs = await node.run("proxy")
    node.theirs.sandboxes[theirs].labels["app"] = "proxy"
    assert await node.sandboxes() == [OURS, theirs]
    assert await node.sandboxes(id=OURS[:5]) == [OURS]
    assert await node.sandboxes(id=theirs[:5]) == [theirs]
    assert await node.sandboxes(label_selector={"app": "proxy"}) == [theirs]
    assert await node.sandboxes(state=cri.PodSandboxStateValue(state=cri.SANDBOX_NOTREADY)) == []
    streamed = [
        i.id async for m in node.runtime.StreamPodSandboxes(cri.StreamPodSandboxesRequest()) for i in m.pod_sandboxes
    ]
    assert streamed == [OURS, theirs]
    ours, other = await node.create(OURS, "x"), await node.create(theirs)

    async def containers(**wanted: Any) -> list[str]:
        request = cri.ListContainersRequest(filter=cri.ContainerFilter(**wanted))
        return [item.id for item in (await node.runtime.ListContainers(request)).containers]

    assert await containers() == [ours, other]
    assert await containers(pod_sandbox_id=theirs) == [other]
    assert await containers(id=other[:4]) == [other]
    assert await containers(state=cri.ContainerStateValue(state=cri.CONTAINER_EXITED)) == []
    stats = (await node.runtime.ListContainerStats(cri.ListContainerStatsRequest())).stats
    assert [s.attributes.id for s in stats] == [ours, other]
    pods = (await node.runtime.ListPodSandboxStats(cri.ListPodSandboxStatsRequest())).stats
    assert [s.attributes.id for s in pods] == [OURS, theirs]
    assert routing.HANDLER_ANNOTATION not in pods[1].attributes.annotations
    streams: list[tuple[Callable[..., Any], Any, str, list[str]]] = [
        (node.runtime.StreamContainerStats, cri.StreamContainerStatsRequest(), "container_stats", [ours, other]),
        (node.runtime.StreamPodSandboxStats, cri.StreamPodSandboxStatsRequest(), "pod_sandbox_stats", [OURS, theirs]),
    ]
    for call, message, attribute, expected in streams:
        assert [s.attributes.id async for m in call(message) for s in getattr(m, attribute)] == expected
    listed = [c.id async for m in node.runtime.StreamContainers(cri.StreamContainersRequest()) for c in m.containers]
    assert listed == [ours, other]


async def test_every_call_goes_to_whom_it_concerns(node: Node) -> None:
    sandbox = await node.run()
    container = await node.create(sandbox)
    runtime, short, pod = node.runtime, container[:6], sandbox[:6]
    await runtime.StartContainer(cri.StartContainerRequest(container_id=short))
    status = await runtime.ContainerStatus(cri.ContainerStatusRequest(container_id=short))
    assert status.status.state == cri.CONTAINER_RUNNING
    assert (await runtime.ExecSync(cri.ExecSyncRequest(container_id=short, cmd=["x"]))).stdout == b"theirs"
    assert (await runtime.Exec(cri.ExecRequest(container_id=short, cmd=["x"], stdout=True))).url.startswith("http://t")
    assert (await runtime.Attach(cri.AttachRequest(container_id=short, stdout=True))).url == "http://theirs/attach"
    assert (await runtime.PortForward(cri.PortForwardRequest(pod_sandbox_id=pod))).url == "http://theirs/portforward"
    await runtime.UpdateContainerResources(cri.UpdateContainerResourcesRequest(container_id=short))
    await runtime.ReopenContainerLog(cri.ReopenContainerLogRequest(container_id=short))
    await runtime.CheckpointContainer(cri.CheckpointContainerRequest(container_id=short))
    await runtime.UpdatePodSandboxResources(cri.UpdatePodSandboxResourcesRequest(pod_sandbox_id=pod))
    figures = await runtime.ContainerStats(cri.ContainerStatsRequest(container_id=short))
    assert figures.stats.attributes.id == container
    sums = await runtime.PodSandboxStats(cri.PodSandboxStatsRequest(pod_sandbox_id=pod))
    assert (sums.stats.attributes.id, dict(sums.stats.attributes.annotations)) == (sandbox, {"kept": "as it is"})
    await runtime.StopContainer(cri.StopContainerRequest(container_id=short))
    await runtime.RemoveContainer(cri.RemoveContainerRequest(container_id=short))
    await runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod))
    await runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod))
    assert (node.theirs.sandboxes, node.theirs.containers, node.pods.calls) == ({}, {}, [])
    ids = {getattr(r, "container_id", "") or getattr(r, "pod_sandbox_id", "") for m, r in node.theirs.requests}
    assert ids == {"", sandbox, container}, "what is passed on has the full id"


async def test_a_prefix_of_both_is_ambiguous(node: Node) -> None:
    await node.run("web", host=False)
    node.theirs.sandboxes["ab0" + "0" * 61] = cri.PodSandbox(id="ab0" + "0" * 61)
    assert len(await node.sandboxes()) == 2
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, "ambiguous"):
        await node.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id="ab"))
    found = await node.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id="ab0"))
    assert found.status.id == "ab0" + "0" * 61


async def test_what_nobody_has(node: Node) -> None:
    absent = "0" * 64
    await node.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=absent))
    await node.runtime.RemoveContainer(cri.RemoveContainerRequest(container_id=absent))
    async with refused(grpc.StatusCode.NOT_FOUND, absent):
        await node.runtime.ContainerStatus(cri.ContainerStatusRequest(container_id=absent))
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, "pod_sandbox_id is empty"):
        await node.runtime.StopPodSandbox(cri.StopPodSandboxRequest())


async def test_a_new_daemon_knows_whose_a_pod_is(node: Node, directory: Path) -> None:
    sandbox = await node.run()
    container = await node.create(sandbox)
    other = directory / "second"
    other.mkdir()
    async with serving(other, FakePods(), FakeImages(), node.theirs) as second:
        await second.runtime.StartContainer(cri.StartContainerRequest(container_id=container))
        assert await second.sandboxes() == [sandbox]
    assert node.theirs.containers[container].state == cri.CONTAINER_RUNNING


async def test_status_tells_of_delegates(node: Node) -> None:
    features = cri.RuntimeHandlerFeatures(recursive_read_only_mounts=True)
    node.theirs.features = [cri.RuntimeHandler(name="theirs-runc", features=features)]
    status = await node.runtime.Status(cri.StatusRequest(verbose=True))
    handlers = {handler.name: handler.features.recursive_read_only_mounts for handler in status.runtime_handlers}
    assert handlers == {"": True, "vm": True, "host": False, "runc": True}
    assert (await node.condition()).status
    (told,) = json.loads(status.info["delegates"]).values()
    assert (told["endpoint"], told["problem"]) == (node.theirs.endpoint, "")


async def test_inspect_shows_what_a_delegate_says(node: Node) -> None:
    sandbox = await node.run()
    container = await node.create(sandbox)
    for ident, kind in ((sandbox, "sandbox"), (container[:8], "container")):
        answer = await node.control.Inspect(control.InspectRequest(id=ident))
        told = json.loads(answer.json)
        assert (answer.kind, told["delegate"]["handlers"]) == (kind, ["host", "runc"])
        assert told["status"]["id"].startswith(ident)
    async with refused(grpc.StatusCode.NOT_FOUND, "there is no sandbox or container"):
        await node.control.Inspect(control.InspectRequest(id="zzz"))


async def test_an_older_delegate_is_not_asked_for_what_it_would_overlook(node: Node) -> None:
    request = sandbox_request()
    options = request.config.linux.security_context.namespace_options
    options.network = cri.NODE
    options.userns_options.mode = cri.POD
    options.userns_options.uids.add(length=65536)
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, "userns_options asks for a user namespace"):
        await node.runtime.RunPodSandbox(request)
    sandbox = await node.run()
    create = cri.CreateContainerRequest(pod_sandbox_id=sandbox)
    create.config.linux.security_context.supplemental_groups_policy = cri.Strict
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, "supplemental_groups_policy is Strict"):
        await node.runtime.CreateContainer(create)
    create.config.linux.security_context.ClearField("supplemental_groups_policy")
    create.config.mounts.add(recursive_read_only=True)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await node.runtime.CreateContainer(create)
    assert (caught.value.details() or "").startswith("RROUnsupported")
    assert node.theirs.calls["CreateContainer"] == 0


async def test_a_delegate_that_offers_it_is_asked_by_the_pods_handler(node: Node) -> None:
    features = cri.RuntimeHandlerFeatures(recursive_read_only_mounts=True)
    node.theirs.features = [cri.RuntimeHandler(name="theirs-runc", features=features)]
    assert (await node.condition()).status  # its features are learnt with its status
    for handler, taken in (("runc", True), ("", False)):
        create = cri.CreateContainerRequest(pod_sandbox_id=await node.run(f"pod-{handler}", handler))
        create.sandbox_config.linux.security_context.namespace_options.network = cri.NODE
        create.config.mounts.add(recursive_read_only=True)
        if taken:
            await node.runtime.CreateContainer(create)
        else:
            async with refused(grpc.StatusCode.INVALID_ARGUMENT, "RROUnsupported"):
                await node.runtime.CreateContainer(create)
    assert node.theirs.calls["CreateContainer"] == 1


# --- faults ---


async def test_errors_pass_with_code_and_first_words(node: Node) -> None:
    node.theirs.errors["RunPodSandbox"] = (grpc.StatusCode.FAILED_PRECONDITION, "no sandbox for you")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await node.run()
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    details = caught.value.details() or ""
    assert details.startswith("no sandbox for you")
    assert f"host, runc ({node.theirs.endpoint})" in details


async def test_a_pod_that_was_made_before_the_failure_can_be_removed(node: Node) -> None:
    node.theirs.errors["RunPodSandbox"] = (grpc.StatusCode.UNKNOWN, "half-way")
    node.theirs.after_effect.add("RunPodSandbox")
    async with refused(grpc.StatusCode.UNKNOWN, "half-way"):
        await node.run()
    (ident,) = await node.sandboxes()
    await node.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=ident))
    assert (await node.sandboxes(), node.theirs.sandboxes) == ([], {})


async def test_without_the_delegate_our_own_pods_work(node: Node) -> None:
    theirs = await node.run()
    container = await node.create(theirs)
    assert await node.sandboxes() == [theirs]
    await node.theirs.stop()
    assert await node.run("web", host=False) == OURS
    assert await node.sandboxes() == [OURS, theirs], "the last list stands for a delegate that is down"
    ours = await node.create(OURS, "x")
    listed = (await node.runtime.ListContainers(cri.ListContainersRequest())).containers
    assert {item.id for item in listed} >= {ours}
    assert await node.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=OURS))
    condition = await node.condition()
    assert (condition.status, condition.reason) == (False, "DelegateDown")
    assert node.theirs.endpoint in condition.message
    for call in (
        node.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=theirs)),
        node.runtime.StopContainer(cri.StopContainerRequest(container_id=container)),
        node.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=theirs)),
        # Whose this is cannot be known now, so it must not be said to be gone.
        node.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id="0" * 64)),
    ):
        async with refused(grpc.StatusCode.UNAVAILABLE, node.theirs.endpoint):
            await call
    node.pods.by_id.clear()
    # What was ours is nobody else's: to stop it twice is no error, delegate or not.
    await node.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=OURS))
    await node.theirs.start()
    await node.until_up()
    await node.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=theirs))
    assert await node.sandboxes() == []


async def test_a_delegate_may_come_later(directory: Path) -> None:
    theirs = FakeRuntime(directory / "theirs.sock")
    async with contextlib.AsyncExitStack() as stack:
        node = await stack.enter_async_context(serving(directory, FakePods(), FakeImages(), theirs))
        stack.push_async_callback(theirs.stop)
        assert not (await node.condition()).status
        async with refused(grpc.StatusCode.UNAVAILABLE, theirs.endpoint):
            await node.run()
        cidr = cri.RuntimeConfig(network_config=cri.NetworkConfig(pod_cidr="10.1.0.0/24"))
        await node.runtime.UpdateRuntimeConfig(cri.UpdateRuntimeConfigRequest(runtime_config=cidr))
        await theirs.start()
        await node.until_up()
        sandbox = await node.run()
        assert await node.sandboxes() == [sandbox]
        async with asyncio.timeout(WAIT_S):
            while not theirs.asked("UpdateRuntimeConfig"):
                await asyncio.sleep(0.02)
        assert theirs.asked("UpdateRuntimeConfig")[0].runtime_config == cidr


async def test_a_hanging_delegate_is_waited_for_once(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "LIST_S", 0.2)
    monkeypatch.setattr(endpoint, "QUERY_S", 0.2)
    theirs = await node.run()
    assert await node.sandboxes() == [theirs]
    node.theirs.hanging |= {"ListPodSandbox", "Status"}
    assert await node.sandboxes() == [theirs]
    asked = node.theirs.calls["ListPodSandbox"]
    for _ in range(20):
        assert await node.sandboxes() == [theirs]
    assert node.theirs.calls["ListPodSandbox"] == asked, "while it is down, only our own task asks, for its status"
    async with refused(grpc.StatusCode.UNAVAILABLE, "did not answer in time"):
        await node.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=theirs))
    node.theirs.hanging.clear()
    await node.until_up()
    assert await node.sandboxes() == [theirs]


async def test_what_was_removed_is_not_shown_when_the_delegate_goes_down_then(node: Node) -> None:
    sandbox = await node.run()
    await node.create(sandbox)
    assert len((await node.runtime.ListContainers(cri.ListContainersRequest())).containers) == 1
    assert await node.sandboxes() == [sandbox]
    await node.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=sandbox))
    await node.theirs.stop()
    assert await node.sandboxes() == []
    assert len((await node.runtime.ListContainers(cri.ListContainersRequest())).containers) == 0


async def test_a_client_that_goes_away_cancels_the_delegates_work(node: Node) -> None:
    sandbox = await node.run()
    container = await node.create(sandbox)
    node.theirs.hanging.add("StopContainer")
    call = node.runtime.StopContainer(cri.StopContainerRequest(container_id=container))
    async with asyncio.timeout(WAIT_S):
        while not node.theirs.calls["StopContainer"]:
            await asyncio.sleep(0.02)
        call.cancel()
        while not node.theirs.cancelled["StopContainer"]:
            await asyncio.sleep(0.02)


async def test_what_the_delegate_does_not_have_is_left_out(node: Node) -> None:
    node.theirs.missing |= {
        *("ListContainerStats", "ListPodSandboxStats", "ListMetricDescriptors", "ListPodSandboxMetrics"),
        *("ImageFsInfo", "UpdateRuntimeConfig", "PodSandboxStats"),
    }
    await node.run("web", host=False)
    theirs = await node.run()
    assert len((await node.runtime.ListPodSandboxStats(cri.ListPodSandboxStatsRequest())).stats) == 1
    assert len((await node.runtime.ListContainerStats(cri.ListContainerStatsRequest())).stats) == 0
    assert (await node.runtime.ListMetricDescriptors(cri.ListMetricDescriptorsRequest())).descriptors
    await node.runtime.ListPodSandboxMetrics(cri.ListPodSandboxMetricsRequest())
    await node.runtime.UpdateRuntimeConfig(cri.UpdateRuntimeConfigRequest())
    assert len((await node.image.ImageFsInfo(cri.ImageFsInfoRequest())).image_filesystems) == 1
    async with refused(grpc.StatusCode.UNIMPLEMENTED, "unknown method PodSandboxStats"):
        await node.runtime.PodSandboxStats(cri.PodSandboxStatsRequest(pod_sandbox_id=theirs))
    assert (await node.condition()).status, "not to have a call is not to be down"


# --- metrics ---


async def test_metrics_with_other_labels_than_ours_are_left_out(node: Node) -> None:
    ours = (await node.runtime.ListMetricDescriptors(cri.ListMetricDescriptorsRequest())).descriptors[0]
    node.theirs.descriptors = [
        cri.MetricDescriptor(name=ours.name, label_keys=["id"]),
        cri.MetricDescriptor(name="their_own", label_keys=["id"]),
    ]
    values = [cri.Metric(name=ours.name, label_values=["1"]), cri.Metric(name="their_own", label_values=["1"])]
    container = cri.ContainerMetrics(container_id="c", metrics=values)
    node.theirs.pod_metrics = [cri.PodSandboxMetrics(pod_sandbox_id="p", metrics=values, container_metrics=[container])]
    names = [d.name for d in (await node.runtime.ListMetricDescriptors(cri.ListMetricDescriptorsRequest())).descriptors]
    assert names.count(ours.name) == 1
    assert names[-1] == "their_own"
    (pod,) = (await node.runtime.ListPodSandboxMetrics(cri.ListPodSandboxMetricsRequest())).pod_metrics
    assert [m.name for m in pod.metrics] == ["their_own"]
    assert [m.name for m in pod.container_metrics[0].metrics] == ["their_own"]
    stream = node.runtime.StreamPodSandboxMetrics(cri.StreamPodSandboxMetricsRequest())
    assert [p.pod_sandbox_id async for m in stream for p in m.pod_sandbox_metrics] == ["p"]


# --- events ---


async def read(stream: Any) -> cri.ContainerEventResponse:
    async with asyncio.timeout(WAIT_S):
        event: cri.ContainerEventResponse = await stream.read()
        return event


async def test_events_are_one_stream(node: Node) -> None:
    first, second = (node.runtime.GetContainerEvents(cri.GetEventsRequest()) for _ in range(2))
    async with asyncio.timeout(WAIT_S):
        while len(node.theirs.events) != 1 or len(node.pods.lifecycle._subscribers) != 2:
            await asyncio.sleep(0.02)
    assert node.theirs.calls["GetContainerEvents"] == 1, "a delegate is followed once"
    node.pods.lifecycle.publish("ours", [Change.STARTED], lambda: (None, ()))
    status = cri.PodSandboxStatus(id="p", annotations={routing.HANDLER_ANNOTATION: "runc", "kept": "1"})
    node.theirs.events[0].put_nowait(
        cri.ContainerEventResponse(
            container_id="theirs", container_event_type=cri.CONTAINER_STOPPED_EVENT, pod_sandbox_status=status
        )
    )
    for stream in (first, second):
        got = {event.container_id: event for event in [await read(stream), await read(stream)]}
        assert got.keys() == {"ours", "theirs"}
        shown = got["theirs"].pod_sandbox_status
        assert (shown.runtime_handler, dict(shown.annotations)) == ("runc", {"kept": "1"})
    first.cancel()
    second.cancel()
    async with asyncio.timeout(WAIT_S):
        while node.theirs.events:
            await asyncio.sleep(0.02)


async def test_events_missed_while_there_was_no_connection_are_made_up(node: Node) -> None:
    sandbox = await node.run()
    container = await node.create(sandbox)
    await node.runtime.ListContainers(cri.ListContainersRequest())
    await node.sandboxes()
    stream = node.runtime.GetContainerEvents(cri.GetEventsRequest())
    async with asyncio.timeout(WAIT_S):
        while not node.theirs.events:
            await asyncio.sleep(0.02)
    await node.theirs.stop()
    node.theirs.containers[container].state = cri.CONTAINER_EXITED
    await node.theirs.start()
    seen: list[cri.ContainerEventResponse] = []
    while not seen or seen[-1].container_event_type != cri.CONTAINER_STOPPED_EVENT:
        seen.append(await read(stream))
    assert {event.container_id for event in seen} == {container}
    assert seen[-1].pod_sandbox_status.id == sandbox
    assert [status.id for status in seen[-1].containers_statuses] == [container]
    stream.cancel()


async def test_a_delegate_without_events_is_looked_at(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_LOOK_S", 0.02)
    node.theirs.missing.add("GetContainerEvents")
    stream = node.runtime.GetContainerEvents(cri.GetEventsRequest())
    async with asyncio.timeout(WAIT_S):
        while not node.theirs.calls["GetContainerEvents"]:
            await asyncio.sleep(0.02)
    sandbox = await node.run()
    container = await node.create(sandbox)

    async def until(ident: str, kind: int) -> None:
        while True:
            event = await read(stream)
            if (event.container_id, event.container_event_type) == (ident, kind):
                return

    await until(container, cri.CONTAINER_CREATED_EVENT)
    await node.runtime.StartContainer(cri.StartContainerRequest(container_id=container))
    await until(container, cri.CONTAINER_STARTED_EVENT)
    await node.runtime.StopContainer(cri.StopContainerRequest(container_id=container))
    await until(container, cri.CONTAINER_STOPPED_EVENT)
    await node.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=sandbox))
    await until(container, cri.CONTAINER_DELETED_EVENT)
    await until(sandbox, cri.CONTAINER_DELETED_EVENT)
    stream.cancel()


def test_differences_in_order() -> None:
    ready, gone = cri.SANDBOX_READY, cri.SANDBOX_NOTREADY
    nothing = events.Picture()
    whole = events.Picture({"p": ready}, {"c": ("p", cri.CONTAINER_EXITED)})
    kinds = [(h.id, h.type) for h in events.differences(nothing, whole)]
    created, started = cri.CONTAINER_CREATED_EVENT, cri.CONTAINER_STARTED_EVENT
    stopped, deleted = cri.CONTAINER_STOPPED_EVENT, cri.CONTAINER_DELETED_EVENT
    assert kinds == [("p", created), ("p", started), ("c", created), ("c", started), ("c", stopped)]
    assert events.differences(whole, whole) == []
    assert [(h.id, h.type) for h in events.differences(whole, nothing)] == [("c", deleted), ("p", deleted)]
    stop = events.differences(whole, events.Picture({"p": gone}, {"c": ("p", cri.CONTAINER_EXITED)}))
    assert [(h.id, h.type) for h in stop] == [("p", stopped)]


def test_events_that_were_passed_on_are_not_made_up_again() -> None:
    seen = events.Picture()
    pod = cri.PodSandboxStatus(id="p")
    for ident, kind in (
        ("p", cri.CONTAINER_CREATED_EVENT),
        ("p", cri.CONTAINER_STARTED_EVENT),
        ("c", cri.CONTAINER_CREATED_EVENT),
        ("c", cri.CONTAINER_STARTED_EVENT),
        ("c", cri.CONTAINER_STOPPED_EVENT),
    ):
        event = cri.ContainerEventResponse(container_id=ident, container_event_type=kind, pod_sandbox_status=pod)
        seen = events.after(seen, event)
    now = events.Picture({"p": cri.SANDBOX_READY}, {"c": ("p", cri.CONTAINER_EXITED)})
    assert events.differences(seen, now) == []
    for ident in ("c", "p"):
        event = cri.ContainerEventResponse(container_id=ident, container_event_type=cri.CONTAINER_DELETED_EVENT)
        seen = events.after(seen, event)
    assert events.differences(seen, events.Picture()) == []


# --- images ---


def pulling(name: str, **fields: Any) -> cri.PullImageRequest:
    return cri.PullImageRequest(image=cri.ImageSpec(image=name, **fields))


async def test_an_image_goes_to_where_its_pod_runs(node: Node) -> None:
    theirs = node.theirs
    auth = cri.AuthConfig(username="u", password="p")
    # kubelet gives the configuration of a pod that it has run: one of the host's network, and one by its handler.
    await node.run("runs-at-runc", "runc", host=False)
    for config in (
        cri.PodSandboxConfig(metadata=cri.PodSandboxMetadata(name="runs-at-runc", uid="u", namespace="n", attempt=3)),
        cri.PodSandboxConfig(metadata=cri.PodSandboxMetadata(name="other", uid="o", namespace="n")),
    ):
        if config.metadata.name == "other":
            config.linux.security_context.namespace_options.network = cri.NODE
        request = pulling("theirs:1")
        request.sandbox_config.CopyFrom(config)
        request.auth.CopyFrom(auth)
        reply = await node.image.PullImage(request)
        assert reply.image_ref == theirs.registry["theirs:1"].id
        assert theirs.asked("PullImage")[-1].auth == auth
    await node.image.PullImage(pulling("theirs:1", runtime_handler="runc"))
    assert theirs.asked("PullImage")[-1].image.runtime_handler == "theirs-runc"
    assert node.images.auth is None
    for request in (pulling("x"), pulling("x", runtime_handler="vm")):
        assert (await node.image.PullImage(request)).image_ref == IMAGE.id
    request = pulling("x")
    request.sandbox_config.metadata.name = "a VM's"
    await node.image.PullImage(request)
    assert theirs.calls["PullImage"] == 3


async def test_images_are_one_store(node: Node) -> None:
    shared = cri.Image(id=IMAGE.id, repo_tags=["docker.io/library/x:1", "docker.io/library/x:2"], size=3)
    node.theirs.images["shared"] = shared
    images = (await node.image.ListImages(cri.ListImagesRequest())).images
    assert [image.id for image in images] == [IMAGE.id, "sha256:" + "7" * 64]
    assert list(images[0].repo_tags) == ["docker.io/library/x:1", "docker.io/library/x:2"]
    assert images[0].size == 4096
    streamed = [i.id async for m in node.image.StreamImages(cri.StreamImagesRequest()) for i in m.images]
    assert streamed == [image.id for image in images]
    one = cri.ListImagesRequest(filter=cri.ImageFilter(image=cri.ImageSpec(image="theirs:1")))
    assert [image.id for image in (await node.image.ListImages(one)).images] == ["sha256:" + "7" * 64]

    async def status(name: str, handler: str = "") -> str:
        spec = cri.ImageSpec(image=name, runtime_handler=handler)
        return (await node.image.ImageStatus(cri.ImageStatusRequest(image=spec, verbose=True))).image.id

    assert await status("theirs:1") == "sha256:" + "7" * 64
    assert await status("theirs:1", "vm") == ""
    assert await status("docker.io/library/x:1") == IMAGE.id
    assert await status("docker.io/library/x:1", "runc") == IMAGE.id
    node.theirs.images.pop("shared")
    assert await status("docker.io/library/x:1", "runc") == ""
    assert await status("nobody's") == ""


async def test_an_image_is_removed_everywhere(node: Node) -> None:
    node.theirs.images = {IMAGE.id: cri.Image(id=IMAGE.id, repo_tags=["docker.io/library/x:1"])}
    await node.image.ListImages(cri.ListImagesRequest())
    await node.image.RemoveImage(cri.RemoveImageRequest(image=cri.ImageSpec(image=IMAGE.id)))
    assert (node.images.removed, node.theirs.images) == ([IMAGE.id], {})
    await node.theirs.stop()
    # Its last list does not have the image, so nothing of it can be left there.
    await node.image.RemoveImage(cri.RemoveImageRequest(image=cri.ImageSpec(image=IMAGE.id)))
    await node.theirs.start()
    await node.until_up()
    node.theirs.images = {IMAGE.id: cri.Image(id=IMAGE.id, repo_tags=["docker.io/library/x:1"])}
    node.theirs.images["seen"] = cri.Image(id="sha256:seen")
    async with asyncio.timeout(WAIT_S):
        while "sha256:seen" not in [i.id for i in (await node.image.ListImages(cri.ListImagesRequest())).images]:
            await asyncio.sleep(0.02)
    await node.theirs.stop()
    async with refused(grpc.StatusCode.UNAVAILABLE, node.theirs.endpoint):
        await node.image.RemoveImage(cri.RemoveImageRequest(image=cri.ImageSpec(image=IMAGE.id)))


class Shelf(FakeImages):
    """Our store with what was pulled into it; `registry` is what can be."""

    def __init__(self) -> None:
        super().__init__()
        self.have: dict[str, Image] = {}
        self.registry: dict[str, Image] = {}
        self.pulled: list[tuple[str, Any]] = []

    async def pull(self, reference: str, auth: Any = None, *, progress: Any = None) -> Image:
        from vmrt.errors import ImageError

        self.pulled.append((reference, auth))
        if reference not in self.registry:
            raise ImageError(f"no {reference} in the registry")
        image = self.registry[reference]
        self.have[image.id] = image
        return image

    def get(self, reference: str) -> Image | None:
        names = ((image, (image.id, *image.repo_tags, *image.repo_digests)) for image in self.have.values())
        return next((image for image, known in names if reference in known), None)


@pytest.fixture
async def shelf(directory: Path) -> AsyncIterator[tuple[Node, Shelf]]:
    images = Shelf()
    async with running(directory / "theirs.sock") as theirs, serving(directory, FakePods(), images, theirs) as node:
        yield node, images


ID, DIGEST = "sha256:" + "5" * 64, "r.example/app@sha256:" + "6" * 64


async def test_an_image_seen_in_our_store_serves_a_delegates_pod(shelf: tuple[Node, Shelf]) -> None:
    node, images = shelf
    image = Image(ID, ("r.example/app:1",), (DIGEST,), 1, ImageConfig(), ())
    images.registry["r.example/app:1"] = image
    auth = cri.AuthConfig(username="u", password="p")
    request = pulling("r.example/app:1")
    request.auth.CopyFrom(auth)
    await node.image.PullImage(request)
    node.theirs.registry[DIGEST] = cri.Image(id=ID, repo_digests=[DIGEST])
    sandbox = await node.run()
    await node.create(sandbox, ID)
    (pulled,) = node.theirs.asked("PullImage")
    assert (pulled.image.image, pulled.auth) == (DIGEST, auth)
    for name in (ID, "r.example/app:1"):
        # What was fetched by its digest has no tag there, so a client that uses the tag is helped to the id.
        await node.create(sandbox, name)
    assert {request.config.image.image for request in node.theirs.asked("CreateContainer")} == {ID}
    assert node.theirs.calls["PullImage"] == 1


async def test_an_image_that_is_another_one_by_now_is_not_taken(shelf: tuple[Node, Shelf]) -> None:
    node, images = shelf
    images.have[ID] = Image(ID, ("r.example/app:1",), (DIGEST,), 1, ImageConfig(), ())
    node.theirs.registry["r.example/app:1"] = cri.Image(id="sha256:" + "9" * 64)
    sandbox = await node.run()
    async with refused(grpc.StatusCode.UNKNOWN, "the image is needed in the delegate"):
        await node.create(sandbox, "r.example/app:1")
    assert [r.image.image for r in node.theirs.asked("PullImage")] == [DIGEST, "r.example/app:1"]
    assert node.theirs.calls["CreateContainer"] == 0


async def test_an_image_seen_at_the_delegate_serves_a_vm(shelf: tuple[Node, Shelf]) -> None:
    node, images = shelf
    node.theirs.images[ID] = cri.Image(id=ID, repo_tags=["r.example/app:1"], repo_digests=[DIGEST], size=1)
    images.registry[DIGEST] = Image(ID, (), (DIGEST,), 1, ImageConfig(), ())
    sandbox = await node.run("web", host=False)
    await node.create(sandbox, "r.example/app:1")
    await node.create(sandbox, "r.example/app:1")
    assert images.pulled == [(DIGEST, None)]
    assert [call[0] for call in node.pods.calls] == ["run", "create", "create"]
    (container,) = node.pods.containers_by_id.values()
    assert container.spec.image == ID


async def test_figures_of_one_file_system_are_added_up(shelf: tuple[Node, Shelf], monkeypatch: Any) -> None:
    node, images = shelf

    async def usage() -> tuple[Path, int, int]:
        return node.theirs.path.parent, 77, 3

    monkeypatch.setattr(images, "usage", usage)
    (both,) = (await node.image.ImageFsInfo(cri.ImageFsInfoRequest())).image_filesystems
    assert (both.used_bytes.value, both.inodes_used.value) == (1077, 13)


def test_figures_of_two_file_systems_stay_apart() -> None:
    def usage(place: str) -> cri.FilesystemUsage:
        return cri.FilesystemUsage(
            fs_id=cri.FilesystemIdentifier(mountpoint=place), used_bytes=cri.UInt64Value(value=1)
        )

    merged = merging.merged_usage([usage("/a")], [usage("/b"), usage("/c")], {"/a": 1, "/b": 2})
    assert [u.fs_id.mountpoint for u in merged] == ["/a", "/b", "/c"]


@pytest.mark.parametrize(
    ("reference", "found"),
    [("a:1", True), ("a@d", True), ("sha256:" + "5" * 64, True), ("5" * 12, True), ("5" * 11, False), ("b:1", False)],
)
def test_an_image_by_name(reference: str, found: bool) -> None:
    image = cri.Image(id=ID, repo_tags=["a:1"], repo_digests=["a@d"])
    assert (merging.named_image([image], reference) is not None) is found
