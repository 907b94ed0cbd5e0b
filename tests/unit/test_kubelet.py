"""What kubelet does all the time must cost no VM a thing: its lists and statuses, with the daemon's real parts."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import cast

import grpc.aio
import pytest
from pods_world import CONTAINER, World
from test_cri_server import FakeStreams
from test_pods_service import run

from vmrt.config import Config
from vmrt.cri import server
from vmrt.pods.drivers import ImageStore
from vmrt.proto.runtime.v1 import api_pb2 as cri
from vmrt.proto.runtime.v1 import api_pb2_grpc as cri_grpc


def test_relisting_and_statuses_touch_neither_vm_nor_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        sandbox, container = await world.started()
        with tempfile.TemporaryDirectory(prefix="cri-") as directory:
            path = Path(directory) / "s"
            config = Config(listen=f"unix://{path}")
            served = server.CriServer(config, world.service, cast("ImageStore", world.images), FakeStreams())
            await served.open()
            async with grpc.aio.insecure_channel(f"unix://{path}") as channel:
                runtime = cri_grpc.RuntimeServiceStub(channel)
                before = list(world.steps)
                # PLEG lists everything every second and asks for the status of what has changed.
                pods = (await runtime.ListPodSandbox(cri.ListPodSandboxRequest())).items
                containers = (await runtime.ListContainers(cri.ListContainersRequest())).containers
                pod = await runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=sandbox))
                one = await runtime.ContainerStatus(cri.ContainerStatusRequest(container_id=container))
                assert world.steps == before
                # The same while the guest does not answer.
                world.hung = True
                again = await runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=sandbox))
                world.hung = False
            await served.close(0.1)
        assert ([p.id for p in pods], [c.id for c in containers]) == ([sandbox], [container])
        # What the evented PLEG takes from one answer.
        assert pod.timestamp > 0
        assert pod.status.metadata.uid
        assert pod.containers_statuses == [one.status] == again.containers_statuses
        assert one.status.state == cri.CONTAINER_RUNNING

    run(tmp_path, monkeypatch, test)


def test_a_pod_is_restarted_in_place_with_the_same_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        sandbox, first = await world.started()
        world.guest_of(sandbox).exit(first, 1)
        await world.service.remove_container(first)
        second = await world.service.create_container(sandbox, CONTAINER)
        assert second != first
        await world.service.start_container(second)

    run(tmp_path, monkeypatch, test)


def test_every_test_that_the_manual_names_exists() -> None:
    tests = Path(__file__).parents[1]
    manual = (tests.parent / "docs/cri.md").read_text()
    file, named = "", 0
    for found in re.finditer(r"`((?:unit|e2e)/\w+\.py)?(?:::(\w+))?`", manual):
        file = found[1] or file
        if not found[0].strip("`"):
            continue
        assert (tests / file).is_file(), f"docs/cri.md names {file}"
        assert not found[2] or f"def {found[2]}(" in (tests / file).read_text(), f"docs/cri.md names {file}::{found[2]}"
        named += 1
    for name in re.findall(r"`(Test\w+)[/`]", manual):
        assert any(f"func {name}(" in path.read_text() for path in (tests / "interop").glob("*.go")), name
    assert named > 30
