"""The agent's servers on this machine for the contract tests: fixtures (see agent_host.py)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.contract.agent_host import CGROUP_PREFIX
from vmrt import spawn
from vmrt.agent_client import AgentClient
from vmrt.guest_image import initramfs

REPOSITORY = Path(__file__).parents[2]
TIMEOUT_S = 30
# fmt: off
_APPLETS = (
    "cat", "echo", "env", "id", "kill", "ls", "pwd", "readlink", "seq", "sh", "sleep", "stat", "stty", "touch", "true",
    "yes",
)
# fmt: on


def make_root(layer: Path) -> None:
    """A root file system of the machine's busybox with the libraries it needs."""
    program = shutil.which("busybox")
    assert program is not None
    for name in ("bin", "dev", "etc", "proc", "sys", "tmp"):
        (layer / name).mkdir(parents=True)
    shutil.copy(program, layer / "bin/busybox")
    for name in _APPLETS:
        (layer / "bin" / name).symlink_to("busybox")
    listing = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
    for library in re.findall(r"(/\S+)", listing):
        target = layer / library.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, target)
    (layer / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n")
    (layer / "etc/group").write_text("root:x:0:\nextra:x:2000:app\n")


@pytest.fixture(scope="module")
def root_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if os.geteuid() != 0:
        pytest.skip("containers need root")
    missing = [name for name in ("crun", "busybox", "unshare") if shutil.which(name) is None]
    if missing:
        assert os.environ.get("CI") != "true", f"{missing} not installed"
        pytest.skip(f"{missing} not installed")
    layer = tmp_path_factory.mktemp("layers") / "base"
    make_root(layer)
    return layer


def _compiled(directory: Path, name: str, source: Path) -> Path:
    program = directory / name
    program.write_bytes(asyncio.run(initramfs.compile_program(source)))
    program.chmod(0o755)
    return program


@pytest.fixture(scope="module")
def exec_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _compiled(tmp_path_factory.mktemp("programs"), "vmrt-exec", initramfs.EXEC_SOURCE)


@pytest.fixture(scope="module")
def pause_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _compiled(tmp_path_factory.mktemp("programs"), "vmrt-pause", initramfs.PAUSE_SOURCE)


@pytest.fixture(scope="module")
def zygote_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _compiled(tmp_path_factory.mktemp("programs"), "vmrt-zygote.so", initramfs.ZYGOTE_SOURCE)


@dataclass(frozen=True)
class AgentHost:
    """A running agent: its client, its PID 1 as this machine numbers it, the root that process sees, its cgroup."""

    client: AgentClient
    pid: int
    cgroup: Path

    @property
    def root(self) -> Path:
        return Path(f"/proc/{self.pid}/root")


@pytest.fixture
async def client(agent_host: AgentHost) -> AgentClient:
    return agent_host.client


@pytest.fixture
async def agent_host(
    root_layer: Path, exec_program: Path, pause_program: Path, zygote_library: Path, tmp_path: Path
) -> AsyncIterator[AgentHost]:
    (tmp_path / "vmrt-pause").symlink_to(pause_program)
    async with running_agent(tmp_path, root_layer, exec_program, zygote_library) as running:
        yield running


@contextlib.asynccontextmanager
async def running_agent(
    tmp_path: Path, root_layer: Path, exec_program: Path, zygote_library: Path | None
) -> AsyncIterator[AgentHost]:
    """Run an agent in `tmp_path`; afterwards nothing of its containers may be left. Without the library, no zygote."""
    (tmp_path / "base").symlink_to(root_layer)
    (tmp_path / "vmrt-exec").symlink_to(exec_program)
    if zygote_library is not None:
        (tmp_path / "vmrt-zygote.so").symlink_to(zygote_library)
    program = [sys.executable, "-m", "tests.contract.agent_host", str(tmp_path)]
    async with spawn.piped(
        ["unshare", "-mpfu", "--mount-proc", "--propagation", "private", "--kill-child", *program],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    ) as host:
        assert host.stdout is not None
        assert host.stderr is not None
        log = asyncio.create_task(host.stderr.read())
        async with asyncio.timeout(TIMEOUT_S):
            line = await host.stdout.readline()
        assert line == b"listening\n", await log

        async def dial(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            return await asyncio.open_unix_connection(tmp_path / str(port))

        agent = AgentClient(dial, "host")
        try:
            async with asyncio.timeout(100):
                pid = await inner_pid(host.pid)
                # Named as agent_host does it: in the machine's hierarchy other runs of these tests have theirs.
                name = f"{CGROUP_PREFIX}{tmp_path.name}-{tmp_path.stat().st_ino}"
                running = AgentHost(agent, pid, Path(f"/proc/{pid}/root/sys/fs/cgroup") / name)
                yield running
            for info in (await agent.list_containers()).containers:
                await agent.remove_container(info.container_id)
            # Nothing of a removed container may be left where the guest would run out of it.
            inner = running.root
            left = inner / "run/vmrt"
            assert list((left / "containers").iterdir()) == []
            assert list((left / "scratch").iterdir()) == []
            assert [path.name for path in left.iterdir() if path.name.startswith(("crun.", "tty."))] == []
            running.cgroup.rmdir()  # fails unless every container's cgroup is gone
        finally:
            await agent.close()
            log.cancel()


async def inner_pid(pid: int) -> int:
    children = await asyncio.to_thread(Path(f"/proc/{pid}/task/{pid}/children").read_text)
    return int(children.split()[0])
