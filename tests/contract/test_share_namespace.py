"""Volumes in the mount namespace of a real virtiofsd, without a VM: what the host sees of them, and their ends."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vmrt import spawn
from vmrt.errors import VmGoneError, VmrtError
from vmrt.hypervisor import virtiofsd
from vmrt.model import Mount, Propagation
from vmrt.pods import share_namespace, volumes
from vmrt.spawn import ProcessId

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

VM, CONTAINER, OTHER = "vm-1", "c" * 64, "d" * 64


@pytest.fixture
async def share(tmp_path: Path) -> AsyncIterator[ProcessId]:
    """A virtiofsd that has a client, as when QEMU has connected; its share is sealed."""
    try:
        binary = virtiofsd.find(os.environ.get("VMRT_VIRTIOFSD", ""))  # Debian's, or the one that is to be tried
    except VmrtError as e:
        pytest.skip(e.message)
    process = await virtiofsd.start(binary, volumes.make(tmp_path, VM), tmp_path / "socket", (0, 0))
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "socket"))
            own, deadline = Path("/proc/self/ns/mnt").readlink(), time.monotonic() + 60
            # Its root is another one when it has settled down.
            while Path(f"/proc/{process.pid}/ns/mnt").readlink() == own or len(mountinfo(process)) != 1:
                assert time.monotonic() < deadline, "virtiofsd made no namespace"
                await asyncio.sleep(0.01)
            volumes.seal(process)
            yield process
    finally:
        spawn.kill_group(process.pid)
        while spawn.alive(process):
            await asyncio.sleep(0.01)


def mountinfo(process: ProcessId | None = None) -> list[str]:
    return Path(f"/proc/{process.pid if process else 'self'}/mountinfo").read_text().splitlines()


def inside(process: ProcessId, name: str) -> Path:
    """A path of the share as virtiofsd sees it."""
    return Path(f"/proc/{process.pid}/root/{name}")


def bind(root: Path, share: ProcessId, *mounts: Mount, container: str = CONTAINER) -> list[str]:
    return [Path(b.guest_source).name for b in volumes.bind(root, VM, container, mounts, share)]


@contextmanager
def tmpfs(place: Path) -> Iterator[Path]:
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def test_the_root_is_sealed(share: ProcessId) -> None:
    (root,) = mountinfo(share)
    assert {"ro", "nosuid", "nodev"} <= set(root.split()[5].split(","))
    assert root.split()[6] == "-"  # neither shared nor anybody's slave
    with pytest.raises(OSError, match="Read-only"):
        inside(share, "new").mkdir()


def test_the_hosts_mount_table_shows_nothing_and_its_directories_are_free(share: ProcessId, tmp_path: Path) -> None:
    before = mountinfo()
    volume = tmp_path / "volume"
    (volume / "sub").mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", volume / "sub"], check=True)
    (volume / "sub/file").touch()
    (name,) = bind(tmp_path, share, Mount("/v", str(volume)))
    # What the host unmounts stays the container's, as with any mount that is not to follow; and the host may remove
    # where it was, also the volume itself.
    subprocess.run(["umount", volume / "sub"], check=True)
    assert mountinfo() == before
    assert len(mountinfo(share)) == 3
    assert (inside(share, name) / "sub/file").exists()
    (volume / "sub").rmdir()
    assert not (inside(share, name) / "sub").exists()
    volume.rmdir()
    volumes.unbind(tmp_path, VM, CONTAINER, share)
    assert len(mountinfo(share)) == 1
    assert mountinfo() == before
    assert list(volumes.served(tmp_path, VM).iterdir()) == []


def test_one_mount_for_all_who_want_the_same(share: ProcessId, tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    plain, readonly = Mount("/v", str(volume)), Mount("/r", str(volume), readonly=True)
    first = bind(tmp_path, share, plain, readonly)
    assert bind(tmp_path, share, plain, container=OTHER) == first[:1]
    (inside(share, first[0]) / "file").touch()
    with pytest.raises(OSError, match="Read-only"):
        (inside(share, first[1]) / "file").touch()
    volumes.unbind(tmp_path, VM, CONTAINER, share)
    assert (inside(share, first[0]) / "file").exists()
    assert len(mountinfo(share)) == 2
    volumes.unbind(tmp_path, VM, OTHER, share)
    assert len(mountinfo(share)) == 1


def test_mounts_of_the_host_follow_where_asked(share: ProcessId, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "slave") as volume:
        subprocess.run(["mount", "--make-rshared", volume], check=True)
        mounts = Mount("/s", str(volume), propagation=Propagation.HOST_TO_CONTAINER), Mount("/p", str(volume))
        follows, private = bind(tmp_path, share, *mounts)
        with tmpfs(volume / "later") as later:
            (later / "seen").touch()
            assert (inside(share, follows) / "later/seen").exists()
            assert not (inside(share, private) / "later/seen").exists()
        assert not (inside(share, follows) / "later/seen").exists()
        # Gone with one call, whatever has come to be mounted below.
        with tmpfs(volume / "again"):
            volumes.unbind(tmp_path, VM, CONTAINER, share)
        assert len(mountinfo(share)) == 1


def test_files_and_stacked_mounts(share: ProcessId, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    (name,) = bind(tmp_path, share, Mount("/f", str(file), readonly=True))
    assert inside(share, name).read_text() == "x"
    with share_namespace.of(share) as namespace:
        assert namespace.mounts_at(name) == 1
        assert namespace.mounts_at(name[:-1]) == 0
        namespace.detach(name)
        namespace.detach(name)
        namespace.detach("never-there")
        assert namespace.mounts_at(name) == 0
    volumes.unbind(tmp_path, VM, CONTAINER, share)


def test_the_end_of_virtiofsd(share: ProcessId, tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    bind(tmp_path, share, Mount("/v", str(volume)))
    with share_namespace.of(share) as namespace:
        spawn.kill_group(share.pid)
        while spawn.alive(share):
            time.sleep(0.01)
        with pytest.raises(VmGoneError):
            namespace.mounts_at("x")
    with pytest.raises(VmGoneError):
        bind(tmp_path, share, Mount("/v", str(volume)), container=OTHER)
    for container in (CONTAINER, OTHER):
        volumes.unbind(tmp_path, VM, container, share)
    volumes.remove(tmp_path, VM)
    assert volumes.vm_ids(tmp_path) == []


def test_a_process_in_our_own_namespace_is_none_to_mount_in(tmp_path: Path) -> None:
    """As before QEMU has connected: what is meant for the share must never be mounted on the host."""
    own = spawn.identify(os.getpid())
    assert own is not None
    before = mountinfo()
    with pytest.raises(VmrtError, match="no mount namespace of its own"):
        bind(tmp_path, own, Mount("/v", str(tmp_path)))
    with pytest.raises(VmGoneError):
        bind(tmp_path, ProcessId(own.pid, own.start_ticks + 1), Mount("/v", str(tmp_path)), container=OTHER)
    assert mountinfo() == before
