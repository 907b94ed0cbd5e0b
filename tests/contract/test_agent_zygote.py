"""crun's commands out of the zygote beside ones of a crun of their own, observable by observable."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contract.conftest import TIMEOUT_S, AgentHost, running_agent
from tests.contract.test_agent_containers import execute, log_of
from tests.contract.test_agent_exec import SPECS, _spec
from vmrt import errors
from vmrt.agent import agent_pb2 as pb

# What a container's main process sees of how it was made.
_PROBE = r"""
cat /proc/$$/status; echo "=== limits"; cat /proc/$$/limits; echo "=== cgroup"; cat /proc/$$/cgroup
echo "=== namespaces"; for n in cgroup ipc mnt net pid time user uts; do readlink /proc/$$/ns/$n; done
echo "=== env"; env; echo "=== cwd"; pwd; readlink /proc/$$/cwd; readlink /proc/$$/root; echo "=== umask"; umask
echo "=== label"; cat /proc/$$/attr/current 2>/dev/null; echo "=== scores"; cat /proc/$$/oom_score_adj
echo "=== fds"; ls -l /proc/$$/fd; echo "=== mounts"; cat /proc/$$/mountinfo; echo "=== devices"; ls -l /dev
echo "=== session"; cat /proc/$$/stat
"""
# What a hook sees of itself and of the crun that started it; the zygote's own descriptor must be nowhere.
_HOOK = r"""
for p in $$ $PPID; do
  echo "=== $n status"; cat /proc/$p/status; echo "=== $n limits"; cat /proc/$p/limits
  echo "=== $n cgroup"; cat /proc/$p/cgroup; echo "=== $n fds"; ls -l /proc/$p/fd
  echo "=== $n cwd"; readlink /proc/$p/cwd; echo "=== $n exe"; readlink /proc/$p/exe
  echo "=== $n session"; cat /proc/$p/stat
  n=crun
done
echo "=== env"; env; echo "=== umask"; umask
"""
_VOLATILE = ("Tgid", "Ngid", "Pid", "PPid", "NStgid", "NSpid", "NSpgid", "NSsid", "FDSize", "SigQ", "State")
_COUNTERS = ("Vm", "Rss", "Huge", "voluntary", "nonvoluntary", "Hugetlb", "Threads")


@pytest.fixture
async def plain_host(root_layer: Path, exec_program: Path, tmp_path: Path) -> AsyncIterator[AgentHost]:
    """An agent without the zygote's library: it executes crun for each command."""
    directory = tmp_path / "plain"
    directory.mkdir()
    async with running_agent(directory, root_layer, exec_program, None) as running:
        yield running


def _sections(text: str, host: AgentHost) -> dict[str, object]:
    """Cut a probe's output into what must be alike; `host` is the agent that the process belongs to."""
    first, *rest = ("=== status\n" + text if not text.lstrip().startswith("===") else text).lstrip().split("=== ")[1:]
    ours = {str(path.readlink()) for path in Path(f"/proc/{host.pid}/ns").iterdir()}
    found: dict[str, object] = {}
    for section in (first, *rest):
        name, _, body = section.partition("\n")
        lines = [line for line in body.splitlines() if line]
        kind = name.split()[-1]
        if kind == "status":
            lines = [
                line for line in lines if line.partition(":")[0] not in _VOLATILE and not line.startswith(_COUNTERS)
            ]
        elif kind == "namespaces":
            lines = ["the agent's" if line in ours else line.partition(":")[0] for line in lines]
        elif kind in ("fds", "devices"):
            # Mode, owner, name, target; an inode, a date or a size say nothing.
            lines = [re.sub(r"\d+\]", "]", " ".join([*line.split()[:4], *line.split()[8:]])) for line in lines]
            lines = [line for line in lines if not line.startswith("total")]
        elif kind == "mounts":
            fields = [line.split() for line in lines]
            lines = [
                f"{f[4]} {f[5]} {re.sub('[0-9]+', '', ' '.join(f[6 : f.index('-')]))} {f[f.index('-') + 1]}"
                for f in fields
            ]
        elif kind == "session":
            pid, stat = lines[0].split()[0], lines[0].rpartition(")")[2].split()
            lines = [
                f"group {stat[2] == pid} session {stat[3] == pid} terminal {stat[4]} nice {stat[16]} exit {stat[35]}"
            ]
        elif kind == "cgroup":
            lines = [re.sub(rf"/{re.escape(host.cgroup.name)}\b", "/agent", line) for line in lines]
        found[name] = lines
    return found


async def _outcome(host: AgentHost, name: str) -> tuple[dict[str, object], dict[str, object]]:
    """Return what the main process of a container of the named specification saw, and what its hook saw."""
    text, user = _spec(name)
    spec: dict[str, Any] = json.loads(text)
    spec["process"]["args"] = ["sh", "-c", _PROBE]
    hook = {"path": "/bin/sh", "args": ["sh", "-c", f"n=hook; ({_HOOK}) > /run/hook 2>&1"]}
    spec["hooks"] = {"createRuntime": [hook]}
    request = pb.CreateContainerRequest(
        container_id="c", layer_serials=["base"], oci_spec=json.dumps(spec).encode(), user=user
    )
    await host.client.create_container(request)
    await host.client.start_container("c")
    out, err = await log_of(host.client, "c")
    assert err == b""
    hooked = (host.root / "run/hook").read_text()
    await host.client.remove_container("c")
    return _sections(out.decode(), host), _sections(hooked, host)


def _zygotes(host: AgentHost) -> list[int]:
    """Return the zygotes of an agent, as this machine numbers processes."""
    children = Path(f"/proc/{host.pid}/task")
    pids = [int(pid) for task in children.iterdir() for pid in (task / "children").read_text().split()]
    # A container's process is a copy of the zygote until it executes its command, but in the container's cgroup.
    pids = [pid for pid in pids if host.cgroup.name not in Path(f"/proc/{pid}/cgroup").read_text()]
    return [pid for pid in pids if re.fullmatch(rb"crun\0\d+\0", Path(f"/proc/{pid}/cmdline").read_bytes())]


async def _create(host: AgentHost, name: str) -> None:
    spec, user = _spec("default capabilities")
    request = pb.CreateContainerRequest(container_id=name, layer_serials=["base"], oci_spec=spec, user=user)
    await host.client.create_container(request)
    await host.client.start_container(name)


@pytest.mark.parametrize("name", SPECS)
async def test_a_container_is_what_a_crun_of_its_own_would_make_it(
    agent_host: AgentHost, plain_host: AgentHost, name: str
) -> None:
    theirs, their_hook = await _outcome(plain_host, name)
    ours, our_hook = await _outcome(agent_host, name)
    assert (len(_zygotes(agent_host)), len(_zygotes(plain_host))) == (1, 0)
    assert ours == theirs
    assert our_hook == their_hook
    assert {"status", "fds", "mounts", "session"} <= ours.keys()
    assert {"hook fds", "crun fds", "crun exe", "env"} <= our_hook.keys()


async def test_one_zygote_serves_all_and_is_made_anew(agent_host: AgentHost) -> None:
    await asyncio.gather(*(_create(agent_host, f"c{n}") for n in range(4)))
    (first,) = _zygotes(agent_host)
    os.kill(first, signal.SIGKILL)
    await _create(agent_host, "after")
    (second,) = _zygotes(agent_host)
    assert second != first
    code, out, _ = await execute(agent_host.client, "after", "echo", "here")
    assert (code, out) == (0, b"here\n")


async def test_a_zygote_that_keeps_ending_is_done_without(agent_host: AgentHost, tmp_path: Path) -> None:
    library = tmp_path / "vmrt-zygote.so"
    library.unlink()
    library.write_bytes(b"no library")  # the loader says so and starts crun, which knows no such command
    for number in range(3):
        await _create(agent_host, f"c{number}")
    assert _zygotes(agent_host) == []


async def test_a_refusal_of_cruns_is_told(agent_host: AgentHost) -> None:
    spec = json.loads(_spec("nothing")[0])
    spec["process"]["args"] = ["absent"]
    request = pb.CreateContainerRequest(container_id="c", layer_serials=["base"], oci_spec=json.dumps(spec).encode())
    with pytest.raises(errors.InvalidArgumentError, match=r"executable file `absent` not found in \$PATH"):
        await agent_host.client.create_container(request)
    assert len(_zygotes(agent_host)) == 1


class _Requests:
    """A zygote and the socket on which it is asked."""

    def __init__(self, library: Path) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(TIMEOUT_S)
        with theirs:
            self.process = subprocess.Popen(
                ["crun", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                env={"PATH": os.environ["PATH"], "LD_PRELOAD": str(library)},
            )

    def ask(self, data: bytes, descriptors: list[int]) -> bytes:
        socket.send_fds(self.socket, [data], descriptors)
        return self.socket.recv(64)

    def version(self) -> None:
        """Have crun tell its version, in a child of this process."""
        reader, writer = os.pipe()
        answer = self.ask(b"crun\0--version\0", [writer] * 3)
        os.close(writer)
        with open(reader, "rb") as file:  # noqa: PTH123
            assert file.read().startswith(b"crun version ")
        assert answer[:1] == b"P"
        assert os.waitstatus_to_exitcode(os.waitpid(int.from_bytes(answer[1:], "little"), 0)[1]) == 0

    def descriptors(self) -> list[str]:
        return sorted(path.name for path in Path(f"/proc/{self.process.pid}/fd").iterdir())


@pytest.fixture
def requests(root_layer: Path, zygote_library: Path) -> Iterator[_Requests]:
    made = _Requests(zygote_library)
    yield made
    made.socket.close()
    assert made.process.wait(TIMEOUT_S) == 0  # the end of the requests is its end


@pytest.mark.parametrize(
    ("data", "descriptors", "number"),
    [
        (b"crun\0--version", 3, 22),  # no end
        (b"crun\0--version\0", 0, 22),
        (b"crun\0--version\0", 2, 22),
        (b"crun\0--version\0", 4, 22),
        (b"crun\0" * 65, 3, 7),
        (b"c" * 20000 + b"\0", 3, 22),
    ],
)
def test_what_is_no_request_is_refused(requests: _Requests, data: bytes, descriptors: int, number: int) -> None:
    requests.version()
    held = requests.descriptors()
    with open(os.devnull, "rb") as null:  # noqa: PTH123
        assert requests.ask(data, [null.fileno()] * descriptors) == b"E" + number.to_bytes(4, "little")
    # It goes on, with nothing of the last request.
    assert requests.descriptors() == held
    requests.version()
