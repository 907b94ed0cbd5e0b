"""Every call of the interface with whatever a client may send: always a gRPC status that fits, and nothing left.

First over the edge with fakes behind it, by every method's own schema; then pods and containers of drawn
configurations through the real pods room, over fake drivers that know what is left.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import hypothesis.strategies as st
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from pods_world import World, use
from test_cri_fuzz import requests
from test_cri_server import FakeImages, FakePods, container_request, make, sandbox_request

from vmrt.cri import specs
from vmrt.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from vmrt.pods import recovery
from vmrt.proto.runtime.v1 import api_pb2 as cri

SERVICES = [cri.DESCRIPTOR.services_by_name[name] for name in ("RuntimeService", "ImageService")]
METHODS = [method for service in SERVICES for method in service.methods]
FEW = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
# What a client's mistake may be called. INTERNAL and UNKNOWN are for ours.
EXPECTED = frozenset(
    {
        grpc.StatusCode.OK,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)
IDS = {"pod_sandbox_id": "ab" * 32, "container_id": "cd" * 32}


@contextmanager
def event_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """A loop that outlives the examples: starting a server for each would take most of the time."""
    with asyncio.Runner() as runner:
        yield runner.get_loop()


@contextmanager
def edge(loop: asyncio.AbstractEventLoop) -> Iterator[grpc.aio.Channel]:
    """A served edge that has a sandbox and a container, and a channel to it."""

    async def opened() -> grpc.aio.Channel:
        await served.open()
        sandbox = await pods.run_sandbox(specs.sandbox_spec(sandbox_request().config, "", ("vm",)))
        await pods.create_container(
            sandbox, specs.container_spec(container_request(sandbox).config, pods.by_id[sandbox].spec)
        )
        return grpc.aio.insecure_channel(f"unix://{path}")

    async def closed() -> None:
        await channel.close()
        await served.close(0.1)

    with tempfile.TemporaryDirectory(prefix="cri-") as directory:
        pods, path = FakePods(), Path(directory) / "s"

        # grpc.aio wants a running loop where it is made.
        async def made() -> Any:
            return make(path, pods, FakeImages())

        served = loop.run_until_complete(made())
        channel = loop.run_until_complete(opened())
        try:
            yield channel
        finally:
            loop.run_until_complete(closed())


async def outcome(channel: grpc.aio.Channel, method: MethodDescriptor, request: Any) -> grpc.StatusCode:
    """Make a call; a stream is read as far as it gives something, and cancelled."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    kind = GetMessageClass(method.output_type)
    options = {"request_serializer": type(request).SerializeToString, "response_deserializer": kind.FromString}
    try:
        if not method.server_streaming:
            await channel.unary_unary(path, **options)(request, timeout=60)
            return grpc.StatusCode.OK
        call = channel.unary_stream(path, **options)(request, timeout=60)
        if method.name == "GetContainerEvents":  # it ends when its client goes
            await asyncio.sleep(0)
            call.cancel()
            return grpc.StatusCode.OK
        async for message in call:
            assert isinstance(message, kind)
    except grpc.aio.AioRpcError as error:
        assert error.details()
        return error.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_any_request_of(method: MethodDescriptor) -> None:
    with event_loop() as loop, edge(loop) as channel:

        @FEW
        @given(requests(method.input_type), st.booleans())
        def check(request: Any, known: bool) -> None:
            for field in method.input_type.fields:
                if known and field.name in IDS:
                    setattr(request, field.name, IDS[field.name])
            assert loop.run_until_complete(outcome(channel, method, request)) in EXPECTED

        check()
        # It still answers.
        version = METHODS[0]
        assert loop.run_until_complete(outcome(channel, version, cri.VersionRequest())) is grpc.StatusCode.OK


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[World, asyncio.AbstractEventLoop]]:
    with event_loop() as loop:
        world = World(tmp_path)
        use(world, monkeypatch)
        loop.run_until_complete(world.restart())
        yield world, loop
        loop.run_until_complete(world.service.close())
        world.store.close()


@FEW
@given(
    requests(cri.PodSandboxConfig.DESCRIPTOR),
    st.lists(requests(cri.ContainerConfig.DESCRIPTOR), min_size=1, max_size=3),
)
def test_any_pod_with_any_containers_leaves_nothing(
    world: tuple[World, asyncio.AbstractEventLoop], pod: cri.PodSandboxConfig, containers: list[cri.ContainerConfig]
) -> None:
    house, loop = world
    pod.metadata.CopyFrom(cri.PodSandboxMetadata(name="p", uid="u", namespace="n"))

    async def life() -> None:
        spec = specs.sandbox_spec(pod, "", house.config.handlers)
        sandbox = await house.service.run_sandbox(spec)
        for number, config in enumerate(containers):
            config.metadata.CopyFrom(cri.ContainerMetadata(name=f"c{number}"))
            config.image.image = "image"
            config.command[:] = ["true"]
            config.ClearField("devices")
            try:
                container = await house.service.create_container(sandbox, specs.container_spec(config, spec))
            except (InvalidArgumentError, NotFoundError, FailedPreconditionError):  # volumes: no share in this world
                continue
            await house.service.start_container(container)
            await house.service.stop_container(container, 0.0)
            status = house.service.container(container)
            assert status.exit_code
            assert status.finished_ns >= status.started_ns >= status.created_ns > 0
        await house.service.stop_sandbox(sandbox)
        await house.service.remove_sandbox(sandbox)

    try:
        loop.run_until_complete(life())
    except InvalidArgumentError:
        pass
    finally:
        loop.run_until_complete(_swept(house))
    assert house.left() == {}


async def _swept(house: World) -> None:
    for record in house.service.sandboxes():
        await house.service.remove_sandbox(record.id)
    await recovery.sweep(house.table)
