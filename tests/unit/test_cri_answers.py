"""Lists and statuses as kept octets: when they are kept, when they are not, and that no VM is asked for them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from pods_world import CONTAINER, SANDBOX, World, use
from test_cri_server import FakeImages, FakeStreams

from vmrt.config import Config
from vmrt.cri import answers
from vmrt.cri.server import CriServer
from vmrt.errors import NotFoundError
from vmrt.pods.records import SandboxState
from vmrt.proto.runtime.v1 import api_pb2 as cri
from vmrt.proto.runtime.v1 import api_pb2_grpc as cri_grpc

PODS = 100


class Calls:
    """A method of the service that counts how often it is asked, and the generation of its records."""

    def __init__(self) -> None:
        self.generation: int | None = 1
        self.asked = 0
        self.error: Exception | None = None
        self.meanwhile: Callable[[], None] = lambda: None

    async def status(self, request: cri.ContainerStatusRequest, context: Any) -> cri.ContainerStatusResponse:
        self.asked += 1
        self.meanwhile()
        if self.error is not None:
            raise self.error
        return cri.ContainerStatusResponse(status=cri.ContainerStatus(id=request.container_id))

    async def pod(self, request: cri.PodSandboxStatusRequest, context: Any) -> cri.PodSandboxStatusResponse:
        self.asked += 1
        return cri.PodSandboxStatusResponse(status=cri.PodSandboxStatus(id="p"), timestamp=1)

    def handler(self, name: str = "ContainerStatus") -> Callable[[bytes], Any]:
        generated = (
            grpc.unary_unary_rpc_method_handler(
                self.status, cri.ContainerStatusRequest.FromString, cri.ContainerStatusResponse.SerializeToString
            )
            if name == "ContainerStatus"
            else grpc.unary_unary_rpc_method_handler(
                self.pod, cri.PodSandboxStatusRequest.FromString, cri.PodSandboxStatusResponse.SerializeToString
            )
        )
        handler: Any = answers.Answers(lambda: self.generation).handler(name, generated)
        assert handler.request_deserializer is None
        assert handler.response_serializer is None
        return lambda request: handler.unary_unary(request, None)


def request(container_id: str = "c", *, verbose: bool = False) -> bytes:
    return cri.ContainerStatusRequest(container_id=container_id, verbose=verbose).SerializeToString()


async def test_a_known_question_is_answered_without_asking() -> None:
    calls = Calls()
    ask = calls.handler()
    first = await ask(request())
    assert cri.ContainerStatusResponse.FromString(first).status.id == "c"
    assert await ask(request()) == first
    assert calls.asked == 1
    await ask(request("other"))
    assert calls.asked == 2


async def test_a_change_of_records_ends_what_was_kept() -> None:
    calls = Calls()
    ask = calls.handler()
    await ask(request())
    calls.generation = 2
    await ask(request())
    await ask(request())
    assert calls.asked == 2


async def test_what_was_built_while_records_changed_is_not_kept() -> None:
    calls = Calls()
    ask = calls.handler()

    def change() -> None:
        calls.generation = 2

    calls.meanwhile = change
    await ask(request())
    await ask(request())
    assert calls.asked == 2
    await ask(request())
    assert calls.asked == 2


async def test_nothing_is_kept_of_verbose_requests_errors_and_records_that_change_unseen() -> None:
    calls = Calls()
    ask = calls.handler()
    for _ in range(2):
        await ask(request(verbose=True))
    assert calls.asked == 2
    calls.error = NotFoundError("no such container")
    for _ in range(2):
        with pytest.raises(NotFoundError):
            await ask(request())
    calls.error, calls.generation = None, None
    for _ in range(2):
        await ask(request())
    assert calls.asked == 6


@pytest.mark.parametrize(("bound", "value"), [("_LIMIT_ANSWERS", 2), ("_LIMIT_BYTES", 25)])
async def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch, bound: str, value: int) -> None:
    monkeypatch.setattr(answers, bound, value)
    calls = Calls()
    kept = answers.Answers(lambda: calls.generation)
    generated = grpc.unary_unary_rpc_method_handler(
        calls.status, cri.ContainerStatusRequest.FromString, cri.ContainerStatusResponse.SerializeToString
    )
    handler: Any = kept.handler("ContainerStatus", generated)
    for number in range(50):
        await handler.unary_unary(request(f"c{number}"), None)
        assert len(kept._kept) <= 2
    await handler.unary_unary(request("c49"), None)
    assert calls.asked == 50, "the last one is kept"


async def test_a_kept_pod_status_has_the_time_of_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls()
    ask = calls.handler("PodSandboxStatus")
    await ask(b"")
    monkeypatch.setattr("vmrt.cri.answers.time.time_ns", lambda: 77)
    again = cri.PodSandboxStatusResponse.FromString(await ask(b""))
    assert (calls.asked, again.timestamp, again.status.id) == (1, 77, "p")


# --- over the wire, on the pods room's own records --------------------------------------------------------------------


@pytest.fixture
def directory() -> Iterator[Path]:
    # pytest's own directories are too long for a socket path where the run's name is long.
    with tempfile.TemporaryDirectory(prefix="cri-") as name:
        yield Path(name)


@contextlib.asynccontextmanager
async def served(world: World, socket: Path) -> AsyncIterator[cri_grpc.RuntimeServiceAsyncStub]:
    server = CriServer(Config(listen=f"unix://{socket}"), world.service, FakeImages(), FakeStreams())
    await server.open()
    try:
        async with grpc.aio.insecure_channel(f"unix://{socket}") as channel:
            yield cri_grpc.RuntimeServiceStub(channel)
    finally:
        await server.close(0.1)


async def test_lists_and_statuses_of_a_hundred_pods_touch_no_vm(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path)
    use(world, monkeypatch)
    await world.restart()
    pods: dict[str, str] = {}
    for number in range(PODS):
        spec = dataclasses.replace(SANDBOX, uid=f"u{number}")
        pod = await world.service.run_sandbox(spec)
        pods[await world.service.create_container(pod, CONTAINER)] = pod
    async with asyncio.timeout(60), served(world, directory / "s") as runtime:
        world.steps.clear()
        for _ in range(3):
            listed = (await runtime.ListPodSandbox(cri.ListPodSandboxRequest())).items
            assert {item.id for item in listed} == set(pods.values())
            containers = (await runtime.ListContainers(cri.ListContainersRequest())).containers
            assert {item.id: item.pod_sandbox_id for item in containers} == pods
            for container, pod in pods.items():
                status = (await runtime.ContainerStatus(cri.ContainerStatusRequest(container_id=container))).status
                assert (status.id, status.state) == (container, cri.CONTAINER_CREATED)
                of_pod = await runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod))
                assert (of_pod.status.id, of_pod.status.state) == (pod, cri.SANDBOX_READY)
        # Every call of the agent, the hypervisor, the network and the store is a step of the world's.
        assert world.steps == []
    await world.service.close()
    world.store.close()


async def test_every_change_is_seen_by_the_next_question(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path)
    use(world, monkeypatch)
    await world.restart()
    async with asyncio.timeout(60), served(world, directory / "s") as runtime:

        async def picture() -> tuple[list[int], list[int]]:
            pods = (await runtime.ListPodSandbox(cri.ListPodSandboxRequest())).items
            containers = (await runtime.ListContainers(cri.ListContainersRequest())).containers
            for item in pods:
                request = cri.PodSandboxStatusRequest(pod_sandbox_id=item.id)
                assert (await runtime.PodSandboxStatus(request)).status.state == item.state
            for one in containers:
                status = await runtime.ContainerStatus(cri.ContainerStatusRequest(container_id=one.id))
                assert status.status.state == one.state
            return [int(item.state) for item in pods], [int(one.state) for one in containers]

        assert await picture() == ([], [])
        pod = await world.service.run_sandbox(SANDBOX)
        assert await picture() == ([cri.SANDBOX_READY], [])
        container = await world.service.create_container(pod, CONTAINER)
        assert await picture() == ([cri.SANDBOX_READY], [cri.CONTAINER_CREATED])
        await world.service.start_container(container)
        assert await picture() == ([cri.SANDBOX_READY], [cri.CONTAINER_RUNNING])
        await world.service.stop_container(container, 0)
        assert await picture() == ([cri.SANDBOX_READY], [cri.CONTAINER_EXITED])
        await world.service.remove_container(container)
        assert await picture() == ([cri.SANDBOX_READY], [])
        await world.service.stop_sandbox(pod)
        assert world.service.sandbox(pod).state is SandboxState.NOT_READY
        assert await picture() == ([cri.SANDBOX_NOTREADY], [])
        await world.service.remove_sandbox(pod)
        assert await picture() == ([], [])
    await world.service.close()
    world.store.close()
