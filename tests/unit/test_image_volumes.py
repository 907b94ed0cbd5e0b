"""Images mounted as volumes: what the agent is asked for, what is retained, and how a missing one is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from pods_world import CONTAINER, SANDBOX, World
from test_pods_service import run

from vmrt.agent import agent_pb2 as pb
from vmrt.agent import status
from vmrt.agent_client.calls import translate
from vmrt.errors import ImageVolumeError
from vmrt.model import Mount
from vmrt.pods import recovery

VOLUME = Mount("/data", readonly=True, image="volume", image_sub_path="models")
WITH_VOLUME = replace(CONTAINER, mounts=(VOLUME,))


def ids(*images: str) -> set[str]:
    return {"sha256:" + digit + "b" * 63 for digit in images}


def test_the_agent_gets_the_layers_and_the_container_a_read_only_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(world: World) -> None:
        sandbox = await world.service.run_sandbox(SANDBOX)
        container = await world.service.create_container(sandbox, WITH_VOLUME)
        (request,) = world.created
        (storage,) = request.storages
        assert storage == pb.Storage(
            name="mount-0",
            readonly=True,
            image=pb.ImageStorage(layer_serials=["l-1" + "a" * 31], sub_path="models"),
        )
        (mount,) = [m for m in json.loads(request.oci_spec)["mounts"] if m["destination"] == "/data"]
        assert mount["source"] == f"/run/vmrt/containers/{container}/storage/mount-0"
        assert "ro" in mount["options"]
        assert "noexec" not in mount["options"]
        vm = world.vm_host.vms[world.service.sandbox(sandbox).vm_id]
        assert {disk for disk in vm.disks if disk.startswith("l-")} == {"l-0" + "a" * 31, "l-1" + "a" * 31}
        assert world.service.container(container).volume_image_ids == tuple(ids("1"))

    run(tmp_path, monkeypatch, test)


def test_both_images_are_retained_while_the_container_exists_also_by_the_next_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(world: World) -> None:
        sandbox = await world.service.run_sandbox(SANDBOX)
        container = await world.service.create_container(sandbox, WITH_VOLUME)
        assert world.images.retained == {container: ids("0", "1")}
        await world.restart()
        assert world.images.retained == {container: ids("0", "1")}
        await world.service.remove_container(container)
        assert world.images.retained == {}

    run(tmp_path, monkeypatch, test)


def test_an_image_that_is_not_here_is_told_with_the_word_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(world: World) -> None:
        sandbox = await world.service.run_sandbox(SANDBOX)
        before = world.left()
        absent = replace(WITH_VOLUME, mounts=(Mount("/h", readonly=True, image="absent"),))
        with pytest.raises(ImageVolumeError) as caught:
            await world.service.create_container(sandbox, absent)
        assert str(caught.value).startswith("ImageVolumeMountFailed: config.mounts[0]: the image 'absent' is not on")
        await recovery.sweep(world.table)
        assert world.left() == before

    run(tmp_path, monkeypatch, test)


def test_the_agents_refusal_begins_with_the_word() -> None:
    error = translate(status.IMAGE_STORAGE, "storage mount-0: path 'x': No such file", "create", "container c")
    assert isinstance(error, ImageVolumeError)
    assert str(error).startswith("ImageVolumeMountFailed: storage mount-0: path 'x': No such file")
