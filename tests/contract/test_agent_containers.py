"""Containers, execs and output as the agent serves them, with the real crun on this machine (see conftest.py)."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from vmrt import errors
from vmrt.agent import agent_pb2 as pb
from vmrt.agent_client import AgentClient

TIMEOUT_S = 30


def oci(args: list[str], **process: Any) -> bytes:
    kernel = ["nosuid", "noexec", "nodev"]
    return json.dumps(
        {
            "ociVersion": "1.0.2",
            "process": {"args": args, "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}, **process},
            "root": {"path": "rootfs"},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc", "options": kernel},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
                {
                    "destination": "/dev/pts",
                    "type": "devpts",
                    "source": "devpts",
                    "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"],
                },
            ],
            "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "cgroup"}]},
        }
    ).encode()


async def create(client: AgentClient, name: str, args: list[str], **options: Any) -> pb.CreateContainerResponse:
    process = options.pop("process", {})
    request = pb.CreateContainerRequest(
        container_id=name, layer_serials=["base"], oci_spec=oci(args, **process), **options
    )
    return await client.create_container(request)


async def run(client: AgentClient, name: str, args: list[str], **options: Any) -> None:
    await create(client, name, args, **options)
    await client.start_container(name)


async def exits(client: AgentClient, name: str) -> pb.ExitFrame:
    async for event in client.events(0):
        if event.exit.container_id == name:
            return event.exit.exit
    raise AssertionError("the events ended")


async def execute(client: AgentClient, name: str, *args: str, **options: Any) -> tuple[int, bytes, bytes]:
    out = {False: b"", True: b""}
    async with client.exec(name, args, **options) as session:
        async for stderr, data in session:
            out[stderr] += data
    return await session.exit_code(), out[False], out[True]


async def log_of(client: AgentClient, name: str) -> tuple[bytes, bytes]:
    out = {False: b"", True: b""}
    async with client.output(name) as output:
        async for chunk in output:
            out[chunk.stderr] += chunk.data
            await output.ack(len(out[False]), len(out[True]))
    return out[False], out[True]


async def test_a_container_runs_as_its_user_prints_and_exits(client: AgentClient) -> None:
    script = "echo out; echo err >&2; id -u; id -G; pwd; echo $HOME; exit 3"
    user = pb.User(username="app", supplemental_groups=[77])
    made = await create(
        client, "c", ["sh", "-c", script], user=user, process={"cwd": "/made/here"}, create_working_dir=True
    )
    assert (made.uid, made.gid, list(made.supplemental_groups)) == (1000, 1000, [1000, 2000, 77])
    (info,) = (await client.list_containers()).containers
    assert (info.container_id, info.state) == ("c", pb.ContainerInfo.CREATED)
    await client.start_container("c")
    ended = await exits(client, "c")
    assert (ended.code, ended.signal) == (3, 0)
    out, err = await log_of(client, "c")
    assert err == b"err\n"
    first, uid, groups, cwd, home = out.decode().splitlines()
    assert (first, uid, cwd, home) == ("out", "1000", "/made/here", "/home/app")
    assert sorted(groups.split()) == ["1000", "2000", "77"]
    (info,) = (await client.list_containers()).containers
    assert (info.state, info.exit.code) == (pb.ContainerInfo.EXITED, 3)
    with pytest.raises(errors.FailedPreconditionError, match="is exited, not created"):
        await client.start_container("c")
    await client.remove_container("c")
    await client.remove_container("c")
    assert not (await client.list_containers()).containers


@pytest.mark.parametrize(
    ("args", "process", "options", "text"),
    [
        (["absent"], {}, {}, "absent"),
        (["/bin/absent"], {}, {}, "absent"),
        (["true"], {"cwd": "/absent"}, {}, "working directory /absent"),
        (["true"], {}, {"user": pb.User(username="nobody")}, "user 'nobody' is not in the image"),
        ([], {}, {}, "args is empty"),
    ],
)
async def test_a_create_that_cannot_be_names_the_reason_and_leaves_nothing(
    client: AgentClient, args: list[str], process: dict[str, Any], options: dict[str, Any], text: str
) -> None:
    with pytest.raises(errors.InvalidArgumentError, match=text):
        await create(client, "c", args, process=process, **options)
    assert not (await client.list_containers()).containers
    await run(client, "c", ["true"])  # the name is free again
    assert (await exits(client, "c")).code == 0


async def test_a_name_is_taken_once(client: AgentClient) -> None:
    await create(client, "c", ["true"])
    with pytest.raises(errors.AlreadyExistsError):
        await create(client, "c", ["true"])


async def test_exec(client: AgentClient) -> None:
    with pytest.raises(errors.NotFoundError):
        await execute(client, "c", "true")
    await create(client, "c", ["sleep", "1000"])
    with pytest.raises(errors.FailedPreconditionError, match="is created, not running"):
        await execute(client, "c", "true")
    await client.start_container("c")
    assert await execute(client, "c", "sh", "-c", "echo a; echo b >&2; exit 9") == (9, b"a\n", b"b\n")
    with pytest.raises(errors.InvalidArgumentError, match="absent"):
        await execute(client, "c", "absent")
    code, out, _ = await execute(client, "c", "sh", "-c", "stty size; echo $TERM", tty=True, window=(100, 30))
    assert (code, out.split()) == (0, [b"30", b"100", b"xterm"])
    assert await execute(client, "c", "sh", "-c", "kill -9 $$") == (137, b"", b"")


async def test_exec_carries_stdin_and_its_end_whole(client: AgentClient) -> None:
    await run(client, "c", ["sleep", "1000"])
    data = os.urandom(2_000_000)
    received = bytearray()
    async with client.exec("c", ["cat"], stdin=True) as session:

        async def feed() -> None:
            await session.write_stdin(data)
            await session.close_stdin()

        feeding = asyncio.create_task(feed())
        async for _, part in session:
            received += part
        await feeding
    assert received == data


async def test_an_exec_goes_on_after_the_end_of_its_output(client: AgentClient) -> None:
    await run(client, "c", ["sleep", "1000"])
    async with client.exec("c", ["sh", "-c", "exec >&- 2>&-; read code; exit $code"], stdin=True) as session:
        await asyncio.sleep(0.1)  # the end of its output has been noticed
        await session.write_stdin(b"7\n")
        assert [chunk async for chunk in session] == []
    assert await session.exit_code() == 7


async def test_an_exec_whose_client_goes_is_killed_with_all_it_started(client: AgentClient) -> None:
    await run(client, "c", ["sleep", "1000"])
    async with client.exec("c", ["sh", "-c", "sleep 4321 & echo up; sleep 4321"]) as session:
        assert await anext(aiter(session)) == (False, b"up\n")
        # Alive now: what follows is not the absence of something that never was.
        assert await sleepers(client) == 2
    async with asyncio.timeout(TIMEOUT_S):
        while await sleepers(client):
            await asyncio.sleep(0.05)
    assert (await client.list_containers()).containers[0].state == pb.ContainerInfo.RUNNING


async def sleepers(client: AgentClient) -> int:
    script = "for p in /proc/[0-9]*; do cat $p/cmdline 2>/dev/null; echo; done"
    _, out, _ = await execute(client, "c", "sh", "-c", script)
    return out.count(b"sleep\0004321\0")


async def test_an_exec_does_not_wait_for_what_it_left_in_the_background(client: AgentClient) -> None:
    await run(client, "c", ["sleep", "1000"])
    async with asyncio.timeout(TIMEOUT_S):
        assert await execute(client, "c", "sh", "-c", "sleep 1000 & echo done") == (0, b"done\n", b"")


async def test_exec_signals_reach_the_process(client: AgentClient) -> None:
    await run(client, "c", ["sleep", "1000"])
    script = "trap 'echo caught; exit 5' TERM; echo up; while :; do sleep 0.05; done"
    async with client.exec("c", ["sh", "-c", script]) as session:
        seen = b""
        async for _, data in session:
            if data == b"up\n":
                await session.signal(15)
            seen += data
    assert (seen, await session.exit_code()) == (b"up\ncaught\n", 5)


async def test_signals_and_kill_all(client: AgentClient) -> None:
    await run(client, "c", ["sh", "-c", "trap 'exit 6' TERM; echo up; while :; do sleep 0.05; done"])
    async with client.output("c") as output:
        assert (await anext(aiter(output))).data == b"up\n"
    await client.signal_container("c", 15)
    assert (await exits(client, "c")).code == 6
    await client.signal_container("c", 15)  # has exited: no error
    await run(client, "d", ["sleep", "1000"])
    await client.signal_container("d", 9, everyone=True)
    assert (await exits(client, "d")).signal == 9
    with pytest.raises(errors.InvalidArgumentError):
        await client.signal_container("d", 0)


async def test_no_output_is_lost_over_broken_connections_and_a_full_buffer(client: AgentClient) -> None:
    await run(client, "c", ["sh", "-c", "seq 1 100000; echo end"], output_buffer_bytes=65536)
    whole = b"".join(b"%d\n" % number for number in range(1, 100001)) + b"end\n"
    received = b""
    connections = 0
    ended = False
    while not ended:
        connections += 1
        async with client.output("c", len(received), 0) as output:
            chunks = 0
            async for chunk in output:
                if chunk.eof:
                    ended = True
                    break
                assert chunk.offset == len(received)
                received += chunk.data
                await output.ack(len(received), 0)
                chunks += 1
                if chunks == 10:
                    break
    assert received == whole
    assert connections > 1


async def test_output_stays_until_it_is_acknowledged(client: AgentClient) -> None:
    await run(client, "c", ["echo", "hello"])
    await exits(client, "c")
    for _ in range(2):
        async with client.output("c") as output:
            assert (await anext(aiter(output))).data == b"hello\n"
    assert await log_of(client, "c") == (b"hello\n", b"")
    async with client.output("c", 6, 0) as output:
        assert (await anext(aiter(output))).eof


async def test_attach_once_gives_stdin_and_its_end(client: AgentClient) -> None:
    await run(client, "c", ["cat"], stdin=True, stdin_once=True)
    async with client.attach("c", stdin=True) as session:
        await session.write_stdin(b"through")
        await session.close_stdin()
        assert b"".join([data async for _, data in session]) == b"through"
        assert await session.exit_code() == 0
    assert await log_of(client, "c") == (b"through", b"")


async def test_attach_to_a_terminal(client: AgentClient) -> None:
    await run(client, "c", ["sh"], stdin=True, process={"terminal": True})
    async with client.attach("c", stdin=True) as session:
        await session.resize(77, 22)
        await session.write_stdin(b"stty size; exit 4\n")
        shown = b"".join([data async for _, data in session])
        assert b"22 77" in shown
        assert await session.exit_code() == 4


async def test_a_container_without_log_is_never_blocked(client: AgentClient) -> None:
    await run(client, "c", ["sh", "-c", "seq 1 200000"], discard_output=True, output_buffer_bytes=4096)
    async with asyncio.timeout(TIMEOUT_S):
        assert (await exits(client, "c")).code == 0


async def test_stats_count_the_writable_layer(client: AgentClient) -> None:
    await run(client, "c", ["sh", "-c", "seq 1 50000 > /file; echo written; sleep 1000"])
    async with client.output("c") as output:
        assert (await anext(aiter(output))).data == b"written\n"
    (stat,) = (await client.container_stats()).stats
    assert stat.container_id == "c"
    assert stat.writable_used_bytes >= 250_000
    assert stat.writable_inodes_used >= 1
    assert not (await client.container_stats(["other"])).stats


async def test_shutdown_kills_everything_and_keeps_the_output(client: AgentClient) -> None:
    await run(client, "c", ["sh", "-c", "echo last; sleep 1000"])
    async with client.output("c") as output:
        assert (await anext(aiter(output))).data == b"last\n"
    await client.shutdown(timeout_s=20)
    assert (await exits(client, "c")).signal == 9
    assert await log_of(client, "c") == (b"last\n", b"")


async def volume_of(client: AgentClient, name: str, sub_path: str, command: list[str]) -> tuple[bytes, bytes]:
    """Run a command in a container that has an image's `sub_path` at /v; return what it wrote."""
    spec = json.loads(oci(command))
    source = f"/run/vmrt/containers/{name}/storage/v"
    spec["mounts"].append({"destination": "/v", "type": "bind", "source": source, "options": ["rbind", "ro"]})
    storage = pb.Storage(name="v", readonly=True, image=pb.ImageStorage(layer_serials=["volume"], sub_path=sub_path))
    request = pb.CreateContainerRequest(
        container_id=name, layer_serials=["base"], oci_spec=json.dumps(spec).encode(), storages=[storage]
    )
    await client.create_container(request)
    await client.start_container(name)
    return await log_of(client, name)


async def test_an_image_as_a_volume(client: AgentClient, tmp_path: Path) -> None:
    layer = tmp_path / "volume"
    (layer / "models/small").mkdir(parents=True)
    (layer / "models/small/weights").write_text("42\n")
    (layer / "models/latest").symlink_to("/models/small")  # an absolute link means the image's own root
    (layer / "out").symlink_to("../../../../../etc")
    (layer / "file").write_text("single\n")
    assert await volume_of(client, "all", "", ["sh", "-c", "ls /v; touch /v/x"]) == (
        b"file\nmodels\nout\n",
        b"touch: /v/x: Read-only file system\n",
    )
    assert (await volume_of(client, "sub", "models/small", ["cat", "/v/weights"]))[0] == b"42\n"
    assert (await volume_of(client, "link", "models/latest", ["cat", "/v/weights"]))[0] == b"42\n"
    assert (await volume_of(client, "file", "file", ["cat", "/v"]))[0] == b"single\n"
    for number, bad in enumerate(("absent", "out", "out/passwd", "models/../../x", "/models", "file/x")):
        with pytest.raises(errors.ImageVolumeError, match=r"^ImageVolumeMountFailed: storage v: "):
            await volume_of(client, f"bad{number}", bad, ["true"])
