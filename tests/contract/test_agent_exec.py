"""An exec's process beside the one that `crun exec` starts in the same container, observable by observable."""

from __future__ import annotations

import array
import asyncio
import contextlib
import json
import os
import re
import socket
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.contract.conftest import TIMEOUT_S, AgentHost
from tests.contract.test_agent_containers import execute, oci
from vmrt import errors
from vmrt.agent import agent_pb2 as pb

# What differs between any two processes.
_VOLATILE = ("Name", "State", "Tgid", "Ngid", "Pid", "PPid", "NStgid", "NSpid", "NSpgid", "NSsid", "FDSize", "SigQ")
_COUNTERS = ("Vm", "Rss", "Huge", "voluntary", "nonvoluntary", "Hugetlb")

# Everything that a process can see of how it was started, in one command. The shell reads its status itself: one that
# waits for a child has its signals blocked.
_PROBE = r"""
while IFS= read -r line; do echo "$line"; done < /proc/$$/status
echo "--- limits"; cat /proc/$$/limits; echo "--- cgroup"; cat /proc/$$/cgroup
echo "--- namespaces"; for n in cgroup ipc mnt net pid time user uts; do readlink /proc/$$/ns/$n; done
echo "--- env"; env; echo "--- cwd"; pwd; readlink /proc/$$/cwd; readlink /proc/$$/root; echo "--- umask"; umask
echo "--- label"; cat /proc/$$/attr/current 2>/dev/null
echo "--- fds"; ls /proc/$$/fd; echo "--- session"; cat /proc/$$/stat
"""
_FILTER: dict[str, Any] = {
    "defaultAction": "SCMP_ACT_ALLOW",
    "architectures": ["SCMP_ARCH_X86_64"],
    "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13}],
}
_DEFAULT = ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_KILL", "CAP_SETGID", "CAP_SETUID", "CAP_NET_BIND_SERVICE"]


def _capabilities(names: list[str], ambient: list[str] | None = None) -> dict[str, list[str]]:
    ambient = ambient or []
    sets = {kind: names for kind in ("bounding", "effective", "permitted")}
    return {**sets, "inheritable": ambient, "ambient": ambient}


# Name -> (additions to the process, additions to linux, the root's, user).
SPECS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], pb.User]] = {
    "nothing": ({}, {}, {}, pb.User()),
    "default capabilities": ({"capabilities": _capabilities(_DEFAULT)}, {}, {}, pb.User()),
    "all dropped, a user with groups": (
        {"capabilities": _capabilities([]), "cwd": "/tmp"},
        {},
        {},
        pb.User(username="app", supplemental_groups=[77, 78]),
    ),
    "a user with an ambient capability": (
        {"capabilities": _capabilities(_DEFAULT, ["CAP_NET_BIND_SERVICE"])},
        {},
        {},
        pb.User(username="app"),
    ),
    "seccomp": ({"capabilities": _capabilities(_DEFAULT)}, {"seccomp": _FILTER}, {}, pb.User()),
    "seccomp and no new privileges for a user": (
        {"capabilities": _capabilities(_DEFAULT), "noNewPrivileges": True},
        {"seccomp": {**_FILTER, "flags": ["SECCOMP_FILTER_FLAG_LOG"]}},
        {},
        pb.User(username="app"),
    ),
    "read-only, limits, umask, variables": (
        {
            "capabilities": _capabilities(_DEFAULT),
            "rlimits": [
                {"type": "RLIMIT_NOFILE", "soft": 64, "hard": 128},
                {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
            ],
            "user": {"uid": 0, "gid": 0, "umask": 0o027},
            "env": ["PATH=/absent:/bin", "HOME=/elsewhere", "EMPTY=", "SPACES=a b  c"],
            "oomScoreAdj": 500,
        },
        {},
        {"readonly": True},
        pb.User(),
    ),
    "a user namespace": (
        {"capabilities": _capabilities(_DEFAULT)},
        {
            "uidMappings": [{"containerID": 0, "hostID": 100000, "size": 65536}],
            "gidMappings": [{"containerID": 0, "hostID": 100000, "size": 65536}],
            "seccomp": _FILTER,
        },
        {},
        pb.User(),
    ),
    "a user in a user namespace": (
        {"capabilities": _capabilities(_DEFAULT), "noNewPrivileges": True},
        {
            "uidMappings": [{"containerID": 0, "hostID": 100000, "size": 65536}],
            "gidMappings": [{"containerID": 0, "hostID": 100000, "size": 65536}],
        },
        {},
        pb.User(username="app", supplemental_groups=[77]),
    ),
    "no pid namespace": ({"capabilities": _capabilities(_DEFAULT)}, {"no pid namespace": True}, {}, pb.User()),
}  # fmt: skip


def _spec(name: str) -> tuple[bytes, pb.User]:
    process, linux, root, user = SPECS[name]
    spec = json.loads(oci(["sleep", "1000"], **process))
    spec["root"].update(root)
    linux = dict(linux)
    if linux.pop("no pid namespace", False):
        spec["linux"]["namespaces"] = [n for n in spec["linux"]["namespaces"] if n["type"] != "pid"]
    if "uidMappings" in linux:
        spec["linux"]["namespaces"].append({"type": "user"})
    spec["linux"].update(linux)
    return json.dumps(spec).encode(), user


async def _running(host: AgentHost, name: str) -> int:
    """Run a container of the named specification; return its main process as the agent numbers it."""
    spec, user = _spec(name)
    request = pb.CreateContainerRequest(container_id="c", layer_serials=["base"], oci_spec=spec, user=user)
    made = await host.client.create_container(request)
    await host.client.start_container("c")
    # crun cannot join a process of another user namespace that has not become the container's program yet.
    async with asyncio.timeout(TIMEOUT_S):
        while (host.root / f"proc/{made.pid}/comm").read_text() != "sleep\n":
            await asyncio.sleep(0.01)
    return made.pid


def _inside(host: AgentHost, *command: str) -> list[str]:
    return ["nsenter", f"--target={host.pid}", "--mount", "--pid", "--uts", *command]


async def _crun_exec(host: AgentHost, args: list[str], directory: Path, *, tty: bool) -> str:
    """Run `crun exec` as the agent did before it had a program of its own; return what the process prints."""
    config = json.loads((host.root / "run/vmrt/containers/c/config.json").read_text())
    process = {**config["process"], "args": args, "terminal": tty}
    if tty:
        process["env"] = [*process["env"], "TERM=xterm"]
        process["consoleSize"] = {"width": 91, "height": 17}
    file = directory / "process.json"
    file.write_text(json.dumps(process))
    crun = [
        "crun",
        "--root=/run/vmrt/crun",
        "--cgroup-manager=cgroupfs",
        "exec",
        f"--process={file}",
        "--cgroup=exec-0",
    ]
    leaf = host.cgroup / "c" / "exec-0"
    leaf.mkdir()
    try:
        if not tty:
            done = await asyncio.to_thread(
                subprocess.run, _inside(host, *crun, "c"), stdin=subprocess.DEVNULL, capture_output=True, text=True
            )
            assert (done.returncode, done.stderr) == (0, "")
            return done.stdout
        return await asyncio.to_thread(_on_a_console, _inside(host, *crun, "--detach"), directory / "console")
    finally:
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                with contextlib.suppress(OSError):
                    leaf.rmdir()
                    break
                await asyncio.sleep(0.05)


def _on_a_console(command: list[str], path: Path) -> str:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        listener.settimeout(TIMEOUT_S)
        subprocess.run([*command, f"--console-socket={path}", "c"], stdin=subprocess.DEVNULL, check=True)
        with listener.accept()[0] as connection:
            _, ancillary, _, _ = connection.recvmsg(4096, socket.CMSG_SPACE(4))
    (master,) = array.array("i", ancillary[0][2])
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the last slave is closed
        while data := os.read(master, 65536):
            shown += data
    os.close(master)
    return shown.decode()


def _observables(text: str) -> dict[str, object]:
    """Cut the probe's output into what must be alike."""
    status, *sections = text.replace("\r", "").split("--- ")
    found: dict[str, object] = {}
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if name not in _VOLATILE and not name.startswith(_COUNTERS):
            found[name] = value.split()
    # Less what this process was given itself, which crun hands on: make's children ignore glibc's internal signal 32.
    given = re.search(r"SigIgn:\s*(\w+)", Path("/proc/self/status").read_text())
    ignored = re.search(r"^SigIgn:\s*(\w+)", status, re.MULTILINE)
    assert given is not None
    assert ignored is not None
    found["SigIgn"] = int(ignored[1], 16) & ~int(given[1], 16)
    for section in sections:
        name, _, body = section.partition("\n")
        found[name] = body.splitlines()
    (line,) = (line for line in found["session"] if line)  # type: ignore[attr-defined]
    # Behind the name: state, parent, process group, session, terminal, its foreground group.
    pid, fields = int(line.split()[0]), line.rpartition(")")[2].split()
    group, session, terminal = (int(field) for field in fields[2:5])
    found["session"] = {"leads its group": group == pid, "leads its session": session == pid, "terminal": terminal}
    found["cgroup"] = [line.rpartition("/exec-")[0] for line in found["cgroup"]]  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("name", SPECS)
async def test_an_exec_is_what_crun_exec_would_make_it(agent_host: AgentHost, name: str, tmp_path: Path) -> None:
    pid = await _running(agent_host, name)
    args = ["sh", "-c", _PROBE]
    theirs = _observables(await _crun_exec(agent_host, args, tmp_path, tty=False))
    code, out, err = await execute(agent_host.client, "c", *args)
    assert (code, err) == (0, b"")
    ours = _observables(out.decode())
    # crun 1.8 gives only a terminal's exec a session of its own, crun 1.21 and runc each.
    assert ours.pop("session") == {"leads its group": True, "leads its session": True, "terminal": 0}
    del theirs["session"]
    assert ours == theirs
    # Not compared, because crun leaves an exec at its own value: ours has the container's.
    _, score, _ = await execute(agent_host.client, "c", "cat", "/proc/self/oom_score_adj")
    main = (agent_host.root / f"proc/{pid}/oom_score_adj").read_text()
    assert score.decode() == main


@pytest.mark.parametrize("name", ["nothing", "all dropped, a user with groups", "a user in a user namespace"])
async def test_a_terminal_is_what_crun_exec_would_make_it(agent_host: AgentHost, name: str, tmp_path: Path) -> None:
    await _running(agent_host, name)
    args = ["sh", "-c", _PROBE + "echo '--- stty'; stty -a; stat -L -c '%F %u %g %a' /proc/$$/fd/0"]
    theirs = _observables(await _crun_exec(agent_host, args, tmp_path, tty=True))
    code, out, _ = await execute(agent_host.client, "c", *args, tty=True, window=(91, 17))
    assert code == 0
    ours = _observables(out.decode())
    assert ours.pop("session") == {**theirs.pop("session"), "terminal": 34816}  # type: ignore[dict-item]
    assert ours == theirs


async def test_a_filter_acts_in_an_exec(agent_host: AgentHost) -> None:
    await _running(agent_host, "seccomp")
    code, _, err = await execute(agent_host.client, "c", "touch", "/tmp/file")
    assert code == 0, err
    code, _, err = await execute(agent_host.client, "c", "busybox", "mkdir", "/tmp/directory")
    assert code != 0
    assert b"Permission denied" in err


async def test_a_filter_is_compiled_once(agent_host: AgentHost) -> None:
    """The second container of a profile has the same filter, which crun was given and did not compile."""
    await _running(agent_host, "seccomp")
    spec, user = _spec("seccomp")
    request = pb.CreateContainerRequest(container_id="d", layer_serials=["base"], oci_spec=spec, user=user)
    await agent_host.client.create_container(request)
    await agent_host.client.start_container("d")
    state = agent_host.root / "run/vmrt/crun"
    assert (state / "d/seccomp.bpf").read_bytes() == (state / "c/seccomp.bpf").read_bytes() != b""
    annotations = [json.loads((state / name / "config.json").read_text()).get("annotations", {}) for name in "cd"]
    assert ["run.oci.seccomp_bpf_data" in found for found in annotations] == [False, True]
    for name in ("c", "d"):
        code, _, err = await execute(agent_host.client, name, "busybox", "mkdir", "/tmp/directory")
        assert code != 0
        assert b"Permission denied" in err
    # The main process has it too, not only what is executed later.
    (info,) = [info for info in (await agent_host.client.list_containers()).containers if info.container_id == "d"]
    status = (agent_host.root / f"proc/{info.pid}/status").read_text()
    assert "Seccomp:\t2\n" in status


async def test_no_exec_without_the_filter_that_the_container_has(agent_host: AgentHost) -> None:
    await _running(agent_host, "seccomp")
    (agent_host.root / "run/vmrt/crun/c/seccomp.bpf").unlink()
    with pytest.raises(errors.AgentError, match="seccomp filter"):
        await execute(agent_host.client, "c", "true")


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["absent"], r"executable file `absent` not found in \$PATH: No such file"),
        (["/bin/absent"], "`/bin/absent` not found"),
        (["/etc"], "open executable `/etc`: Operation not permitted"),
        (["/etc/passwd"], "open executable `/etc/passwd`: Permission denied"),
        (["../broken"], "exec `../broken`: Exec format error"),
        (["a\0b"], "a zero octet"),
    ],
)
async def test_a_command_that_cannot_be_is_named_and_leaves_nothing(
    agent_host: AgentHost, args: list[str], text: str
) -> None:
    pid = await _running(agent_host, "default capabilities")
    broken = agent_host.root / f"proc/{pid}/root/broken"
    broken.write_bytes(b"\0\1\2\3")
    broken.chmod(0o755)
    with pytest.raises(errors.InvalidArgumentError, match=text):
        await execute(agent_host.client, "c", *args)
    assert not list((agent_host.cgroup / "c").glob("exec-*"))


async def test_a_working_directory_that_is_gone_is_named(agent_host: AgentHost) -> None:
    spec = json.loads(oci(["sleep", "1000"], cwd="/tmp/here"))
    request = pb.CreateContainerRequest(
        container_id="c", layer_serials=["base"], oci_spec=json.dumps(spec).encode(), create_working_dir=True
    )
    made = await agent_host.client.create_container(request)
    await agent_host.client.start_container("c")
    (agent_host.root / f"proc/{made.pid}/root/tmp/here").rmdir()
    with pytest.raises(errors.InvalidArgumentError, match="chdir `/tmp/here`: No such file or directory"):
        await execute(agent_host.client, "c", "true")


async def test_the_way_in_cannot_be_led_astray(agent_host: AgentHost) -> None:
    """A container that replaces /dev/ptmx by a file of its own gets no terminal out of us, and no root's write."""
    pid = await _running(agent_host, "default capabilities")
    ptmx = agent_host.root / f"proc/{pid}/root/dev/ptmx"
    ptmx.unlink()
    ptmx.write_text("bait")
    with pytest.raises(errors.AgentError, match="no terminal multiplexer"):
        await execute(agent_host.client, "c", "true", tty=True)
    ptmx.unlink()
    ptmx.symlink_to("/etc/passwd")
    with pytest.raises(errors.AgentError, match="no terminal multiplexer"):
        await execute(agent_host.client, "c", "true", tty=True)


async def test_an_exec_sees_no_descriptor_of_ours_and_cannot_write_the_program(agent_host: AgentHost) -> None:
    """What an interpreter line leads to is the exec program itself, inside the container, with nothing to do there."""
    pid = await _running(agent_host, "default capabilities")
    trap = agent_host.root / f"proc/{pid}/root/bin/trap"
    trap.write_text("#!/proc/self/exe\n")
    trap.chmod(0o755)
    code, out, err = await execute(agent_host.client, "c", "trap")
    assert (code, out, err) == (2, b"", b"")
    code, out, _ = await execute(agent_host.client, "c", "sh", "-c", "ls /proc/$$/fd; readlink /proc/$$/fd/0")
    assert (code, out.split()) == (0, [b"0", b"1", b"2", b"/dev/null"])
    assert stat.S_IMODE(trap.stat().st_mode) == 0o755
