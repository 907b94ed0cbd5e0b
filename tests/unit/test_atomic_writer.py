"""Volumes of kubelet's atomic writer: how they are read, sent in parts, and written again by the agent."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import pytest
from atomic_volume import write

from vmrt.agent import agent_pb2 as pb
from vmrt.agent import layout, status
from vmrt.agent import volumes as agent_volumes
from vmrt.errors import ExhaustedError
from vmrt.pods import atomic_writer
from vmrt.pods.inotify import Inotify

LIMIT = 1 << 20
NAME = "ab12"


def read(root: Path, limit: int = LIMIT) -> atomic_writer.Snapshot | None:
    fd = os.open(root, os.O_PATH)
    try:
        return atomic_writer.read(fd, limit)
    finally:
        os.close(fd)


def must(root: Path) -> atomic_writer.Snapshot:
    snapshot = read(root)
    assert snapshot is not None
    return snapshot


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the agent's code has the volume `NAME`: a directory instead of a tmpfs."""
    monkeypatch.setattr(layout, "VOLUMES", str(tmp_path / "guest"))
    monkeypatch.setattr(os.path, "ismount", lambda path: path == f"{tmp_path}/guest/{NAME}")
    monkeypatch.setattr(os, "fchown", lambda fd, uid, gid: None)
    (tmp_path / "guest" / NAME).mkdir(parents=True)
    return tmp_path / "guest" / NAME


@pytest.fixture
def host(tmp_path: Path) -> Path:
    (tmp_path / "host").mkdir()
    return tmp_path / "host"


def tree(root: Path) -> dict[str, object]:
    return {
        str(path.relative_to(root)): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def test_what_is_read_is_what_the_agent_writes(host: Path, guest: Path) -> None:
    agent = agent_volumes.Volumes()
    # Larger than a part and than what two parts hold, and empty.
    files = {"key": b"x", "empty": b"", "dir/sub/file": b"deep", "big": os.urandom(2_500_000)}
    write(host, "..v0", files)
    for name in ("key", "empty", "dir", "big"):
        (host / name).symlink_to(f"..data/{name}")
    fd = os.open(host, os.O_PATH)
    first = atomic_writer.read(fd, 8 << 20)
    os.close(fd)
    assert first is not None
    parts = list(atomic_writer.requests(NAME, first))
    assert len(parts) > 2
    assert max(part.ByteSize() for part in parts) < layout.MAX_MESSAGE_BYTES // 2
    for part in parts:
        assert part.commit == (part is parts[-1])
        agent.publish(part)
    assert tree(guest) == tree(host)
    # kubelet's next version, then the links it makes and removes, then the old version's end.
    write(host, "..v1", {"key": b"y", "new": b"n"})
    for part in atomic_writer.requests(NAME, must(host)):
        agent.publish(part)
    assert tree(guest) == tree(host)
    assert (guest / "..v0").is_dir()
    shutil.rmtree(host / "..v0")
    for part in atomic_writer.requests(NAME, must(host), files=False):
        agent.publish(part)
    assert tree(guest) == tree(host)
    (host / "new").symlink_to("..data/new")
    (host / "big").unlink()
    (last,) = atomic_writer.requests(NAME, must(host), files=False)
    agent.publish(last)
    assert tree(guest) == tree(host)
    agent.publish(last)  # repeated, as after a restart
    for part in atomic_writer.requests(NAME, must(host)):
        agent.publish(part)
    assert tree(guest) == tree(host)


def test_an_interrupted_version_is_begun_again(host: Path, guest: Path) -> None:
    agent = agent_volumes.Volumes()
    write(host, "..v0", {"a": b"1", "b": os.urandom(1_500_000)})
    fd = os.open(host, os.O_PATH)
    snapshot = atomic_writer.read(fd, 8 << 20)
    os.close(fd)
    assert snapshot is not None
    parts = list(atomic_writer.requests(NAME, snapshot))
    agent.publish(parts[0])
    assert not (guest / "..data").exists()  # nothing is seen before it is whole
    for part in parts:
        agent.publish(part)
    assert tree(guest) == tree(host)


def test_other_directories_are_not_taken_for_volumes(host: Path) -> None:
    assert read(host) is None
    write(host, "..v0", {"a": b"1"})
    assert read(host) is not None
    (host / "plain").touch()
    assert read(host) is None
    (host / "plain").unlink()
    (host / "elsewhere").symlink_to("/etc/passwd")
    assert read(host) is None
    (host / "elsewhere").unlink()
    for target in ("/etc", "../host", "..data", "..", "x"):
        (host / "..data").unlink()
        (host / "..data").symlink_to(target)
        assert read(host) is None, target


def test_reading_follows_no_link_and_is_bounded(host: Path, tmp_path: Path) -> None:
    write(host, "..v0", {"a": b"1" * 1000})
    with pytest.raises(ExhaustedError, match="mirror_limit_bytes"):
        read(host, 1000)
    (tmp_path / "secret").write_text("secret")
    (host / "..v0/link").symlink_to(tmp_path / "secret")
    with pytest.raises(OSError, match="symbolic link"):
        read(host)


def test_a_version_that_goes_while_it_is_read_is_read_again(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(host, "..v0", {"a": b"0"})
    real = os.readlink
    swapped: list[str] = []

    def swapping(path: str, *, dir_fd: int | None = None) -> str:
        target = real(path, dir_fd=dir_fd)
        if path == "..data" and not swapped:
            swapped.append(target)
            write(host, "..v1", {"a": b"1"})
            shutil.rmtree(host / "..v0")
        return target

    monkeypatch.setattr(os, "readlink", swapping)
    assert [entry.data for entry in must(host).entries] == [b"1"]


@pytest.mark.parametrize("path", ["../x", "/x", "a//b", "", "a/..", "."])
def test_the_agent_takes_no_path_that_leads_out(guest: Path, path: str) -> None:
    request = pb.PublishFilesRequest(name=NAME, version="..v", begin=True, files=[pb.VolumeFile(path=path, data=b"x")])
    with pytest.raises(status.AgentError, match="no path in a volume"):
        agent_volumes.Volumes().publish(request)


def test_the_agent_takes_no_name_that_is_none(guest: Path) -> None:
    agent = agent_volumes.Volumes()
    for fields in ({"name": "../x"}, {"name": ""}, {"version": "..data"}, {"version": "v"}, {"version": "../x"}):
        with pytest.raises(status.AgentError) as caught:
            agent.publish(pb.PublishFilesRequest(**{"name": NAME, "version": "..v", "begin": True, **fields}))  # type: ignore[arg-type]
        assert caught.value.code == status.INVALID_ARGUMENT
    with pytest.raises(status.AgentError, match="not made"):
        agent.publish(pb.PublishFilesRequest(name="ff", version="..v"))
    (guest / "..v").mkdir()
    with pytest.raises(status.AgentError, match="no file name"):
        agent.publish(pb.PublishFilesRequest(name=NAME, version="..w", begin=True, commit=True, links={"a/b": "x"}))


async def test_changes_of_names_are_told(tmp_path: Path) -> None:
    told: asyncio.Queue[int] = asyncio.Queue()
    inotify = Inotify(told.put_nowait)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    try:
        one, two = inotify.watch(str(tmp_path / "one")), inotify.watch(str(tmp_path / "two"))
        assert inotify.watch(str(tmp_path / "one")) == one != two
        (tmp_path / "two/new").touch()
        assert await told.get() == two
        (tmp_path / "one/new").touch()
        assert await told.get() == one
        inotify.forget(one)
        (tmp_path / "one/more").touch()
        (tmp_path / "two/more").touch()
        assert await told.get() == two
        (tmp_path / "two/more").unlink()
        assert await told.get() == two
        shutil.rmtree(tmp_path / "two")
        assert await told.get() == two
        with pytest.raises(FileNotFoundError):
            inotify.watch(str(tmp_path / "two"))
        assert told.empty()
    finally:
        inotify.close()
