"""Volumes of the guest as the agent makes them, with the real crun on this machine (see agent_host.py)."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.contract.test_agent_containers import exits, log_of, oci
from vmrt import errors
from vmrt.agent import agent_pb2 as pb
from vmrt.agent_client import AgentClient

VOLUME = "ab12"
OWNER = pb.FileOwner(mode=0o2775, uid=0, gid=2000)


def bind(source: str, destination: str, *options: str) -> dict[str, Any]:
    return {"destination": destination, "type": "bind", "source": source, "options": ["rbind", *options]}


async def output(client: AgentClient, name: str, script: str, mounts: list[dict[str, Any]], **fields: Any) -> str:
    """Run a script in a container with these mounts; return what it printed."""
    spec = json.loads(oci(["sh", "-c", script]))
    spec["mounts"] += mounts
    request = pb.CreateContainerRequest(
        container_id=name, layer_serials=["base"], oci_spec=json.dumps(spec).encode(), **fields
    )
    await client.create_container(request)
    await client.start_container(name)
    code = (await exits(client, name)).code
    out, err = await log_of(client, name)
    await client.remove_container(name)
    assert code == 0, err
    return out.decode()


async def test_a_volume_in_memory_outlives_containers(client: AgentClient) -> None:
    request = pb.MakeVolumeRequest(name=VOLUME, size_bytes=1 << 20, root=OWNER)
    await client.make_volume(request)
    whole = bind(f"/run/vmrt/volumes/{VOLUME}", "/v")
    assert (
        await output(client, "a", "busybox ls -ld /v | busybox cut -c1-10; echo kept > /v/file", [whole])
        == "drwxrwsr-x\n"
    )
    await client.make_volume(request)  # as for the container's next start
    assert (
        await output(
            client, "b", "cat /v/file; (seq 1000000 > /v/big) 2>/dev/null || echo full; busybox rm /v/big", [whole]
        )
        == "kept\nfull\n"
    )
    request.sub_path, request.size_bytes = "part/deep", 0
    request.sub_path_owner.CopyFrom(pb.FileOwner(mode=0o751))
    await client.make_volume(request)
    storage = pb.Storage(name="s", volume_path=f"{VOLUME}/part/deep")
    part = bind("/run/vmrt/containers/c/storage/s", "/p")
    assert (
        await output(client, "c", "busybox ls -ld /p | busybox cut -c1-10; echo x > /p/f", [part], storages=[storage])
        == "drwxr-x--x\n"
    )
    assert await output(client, "d", "cat /v/part/deep/f", [whole]) == "x\n"


async def test_a_sub_path_leads_nowhere_but_into_the_volume(client: AgentClient) -> None:
    await client.make_volume(pb.MakeVolumeRequest(name=VOLUME, root=OWNER))
    whole = bind(f"/run/vmrt/volumes/{VOLUME}", "/v")
    await output(client, "a", "busybox ln -s /run/vmrt /v/link && ls /v && touch /v/vmrt", [whole])
    storage = pb.Storage(name="s", volume_path=f"{VOLUME}/link")
    with pytest.raises(errors.NotFoundError, match="No such file"):
        await output(client, "b", "true", [bind("/run/vmrt/containers/b/storage/s", "/p")], storages=[storage])


async def test_files_are_published_in_versions(client: AgentClient) -> None:
    with pytest.raises(errors.NotFoundError, match="not made"):
        await client.publish_files(pb.PublishFilesRequest(name=VOLUME, version="..1"))
    await client.make_volume(pb.MakeVolumeRequest(name=VOLUME, root=OWNER))
    whole = bind(f"/run/vmrt/volumes/{VOLUME}", "/v", "ro")
    for version, text in (("..1", b"one\n"), ("..2", b"two\n")):
        file = pb.VolumeFile(path="key", data=text, owner=pb.FileOwner(mode=0o640, gid=2000))
        await client.publish_files(pb.PublishFilesRequest(name=VOLUME, version=version, begin=True, files=[file]))
        commit = pb.PublishFilesRequest(name=VOLUME, version=version, commit=True, links={"key": "..data/key"})
        commit.directory.CopyFrom(pb.FileOwner(mode=0o755))
        await client.publish_files(commit)
        listing = await output(client, "c", "cat /v/key; ls -A /v; touch /v/x 2>/dev/null || echo read-only", [whole])
        assert listing == f"{text.decode()}{version}\n..data\nkey\nread-only\n"


async def test_a_disk_that_is_not_there_leaves_no_volume(client: AgentClient) -> None:
    disk = pb.DiskVolume(serial="absent", fstype="ext4")
    with pytest.raises(errors.NotFoundError, match="no disk with this serial"):
        await client.make_volume(pb.MakeVolumeRequest(name="cd", disk=disk), timeout_s=2)
    with pytest.raises(errors.InvalidArgumentError, match="'fuse'"):
        await client.make_volume(pb.MakeVolumeRequest(name="cd", disk=pb.DiskVolume(serial="x", fstype="fuse")))
    await client.release_volume("cd")
    with pytest.raises(errors.InvalidArgumentError, match="no volume's name"):
        await client.make_volume(pb.MakeVolumeRequest(name="../x"))
    await client.make_volume(pb.MakeVolumeRequest(name="cd", root=OWNER))
