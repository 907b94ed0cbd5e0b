"""The plan of an exec: what the exec program is told of a container, and what it refuses to be told."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from vmrt.agent import enter, status
from vmrt.guest_image import initramfs
from vmrt.pods import oci


def spec(process: dict[str, Any] | None = None, linux: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "process": {
            "args": ["main"],
            "cwd": "/",
            "env": ["PATH=/bin"],
            "user": {"uid": 0, "gid": 0},
            **(process or {}),
        },
        "linux": {"namespaces": [{"type": "mount"}, {"type": "cgroup"}], **(linux or {})},
    }


def records(plan: bytes) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    assert plan.endswith(b"\0")
    for record in plan.decode().split("\0")[:-1]:
        found.setdefault(record[0], []).append(record[1:])
    return found


def test_a_plan_holds_all_of_the_containers_process() -> None:
    container = spec(
        {
            "cwd": "/work",
            "env": ["A=1", "PATH=/bin", "A=2"],
            "user": {"uid": 7, "gid": 8, "additionalGids": [8, 9], "umask": 0o77},
            "capabilities": {
                "bounding": ["CAP_CHOWN", "CAP_KILL"],
                "effective": ["CAP_CHOWN"],
                "ambient": ["CAP_NONE"],
            },
            "noNewPrivileges": True,
            "apparmorProfile": "local",
            "oomScoreAdj": -998,
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1, "hard": 2**64 - 1}],
        },
        {
            "seccomp": {"defaultAction": "SCMP_ACT_ALLOW", "flags": ["SECCOMP_FILTER_FLAG_LOG"]},
            "namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "user"}],
        },
    )
    whole = records(enter.plan(enter.template(container, "/f"), ["ls", ""], "/c/exec-1", window=(100, 70000)))
    assert whole == {
        "N": [str(0x20000 | 0x20000000 | 0x10000000)],
        "U": [""],
        "S": ["/f"],
        "F": ["2"],
        "L": ["local"],
        "O": ["-998"],
        "R": [f"7 1 {2**64 - 1}"],
        "u": ["7"],
        "g": ["8"],
        "m": ["63"],
        "x": ["8", "9"],
        "B": [str(1 | 1 << 5)],
        "P": ["0"],
        "E": ["1"],
        "I": ["0"],
        "A": ["0"],
        "n": [""],
        "c": ["/work"],
        "e": ["A=1", "PATH=/bin", "A=2", "TERM=xterm"],
        "a": ["ls", ""],
        "G": ["/c/exec-1/cgroup.procs"],
        "t": ["65535 100"],
    }


def test_a_plan_says_nothing_of_what_the_container_has_not() -> None:
    plain = records(enter.plan(enter.template(spec(), "/f"), ["ls"], "/c"))
    assert set(plain) == set("NugmBPEIAceaG")
    assert plain["m"] == [str(0o022)]
    filtered = records(enter.template(spec(linux={"seccomp": {"defaultAction": "SCMP_ACT_ALLOW"}}), "/f"))
    assert filtered["F"] == ["4"]
    with_term = enter.template(spec({"env": ["TERM=dumb"]}), "")
    assert records(enter.plan(with_term, ["ls"], "/c", window=(1, 1)))["e"] == ["TERM=dumb"]


@pytest.mark.parametrize(
    ("process", "linux"),
    [
        ({"selinuxLabel": "a:b:c"}, {}),
        ({"scheduler": {"policy": "SCHED_FIFO"}}, {}),
        ({"ioPriority": {"class": "IOPRIO_CLASS_RT"}}, {}),
        ({}, {"personality": {"domain": "LINUX32"}}),
        ({}, {"seccomp": {"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/s"}}),
    ],
)
def test_what_the_exec_program_does_not_know_is_refused(process: dict[str, Any], linux: dict[str, Any]) -> None:
    with pytest.raises(status.AgentError) as caught:
        enter.template(spec(process, linux), "/f")
    assert caught.value.code == status.UNIMPLEMENTED


def test_a_zero_octet_ends_no_record_early() -> None:
    with pytest.raises(status.AgentError, match="zero octet"):
        enter.plan(b"", ["ls", "a\0u0"], "/c")
    with pytest.raises(status.AgentError, match="zero octet"):
        enter.template(spec({"env": ["A=\0n"]}), "/f")


def test_the_agent_knows_the_capabilities_that_the_host_writes() -> None:
    assert enter.capability_mask(oci.ALL_CAPABILITIES) == 2 ** len(oci.ALL_CAPABILITIES) - 1
    for number, name in enumerate(oci.ALL_CAPABILITIES):
        assert enter.capability_mask([name]) == 1 << number


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (b"", b"plan: empty"),
        (b"aecho", b"plan: the last record has no end"),
        (b"c/\0", b"plan: no argument or no directory"),
        (b"aecho\0", b"plan: no argument or no directory"),
        (b"c/\0aecho\0?\0", b"plan: unknown record: ?"),
        (b"c/\0aecho\0ux\0", b"plan: no number: x"),
        (b"c/\0aecho\0G/absent/procs\0", b"enter cgroup /absent/procs"),
        (b"c/\0aecho\0S/absent\0", b"seccomp filter /absent"),
    ],
)
def test_the_exec_program_refuses_what_is_no_plan(exec_program: Path, plan: bytes, text: bytes) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    file = os.memfd_create("plan")
    try:
        os.write(file, plan)
        pid = os.pidfd_open(os.getpid())
        argv = [str(exec_program), str(file), str(theirs.fileno()), str(pid)]
        with theirs:
            done = subprocess.run(argv, pass_fds=(file, theirs.fileno(), pid), capture_output=True, timeout=60)
        os.close(pid)
        assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")
        message = ours.recv(4096)
        assert (message[:2], message[6:]) == (b"Es", text)
        assert ours.recv(4096) == b""
    finally:
        os.close(file)
        ours.close()


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
def test_the_exec_program_does_nothing_for_others(exec_program: Path) -> None:
    assert subprocess.run([exec_program], capture_output=True, timeout=60).returncode == 2


@pytest.fixture(scope="module")
def exec_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    first, second = (asyncio.run(initramfs.compile_program(initramfs.EXEC_SOURCE)) for _ in range(2))
    assert first == second
    program = tmp_path_factory.mktemp("programs") / "vmrt-exec"
    program.write_bytes(first)
    program.chmod(0o755)
    return program
