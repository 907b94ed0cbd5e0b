from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import threading
from collections.abc import Iterator
from pathlib import Path

import click
import grpc
import pytest
from cli_daemon import FakeDaemon, serving, vmrt
from click.testing import CliRunner

from vmrt import __version__
from vmrt.cli.app import COMMANDS, cli
from vmrt.cli.command import Command
from vmrt.proto.runtime.v1 import api_pb2
from vmrt.proto.vmrt.v1 import control_pb2

POD, OTHER = "aaa1" + "0" * 60, "aaa2" + "0" * 60
WEB, SIDE = "ccc1" + "0" * 60, "ccc2" + "0" * 60
TALKING = [
    *(["pods"], ["ps"], ["images"], ["exec", "x", "true"], ["logs", "x"], ["inspect", "x"], ["stop", "x"]),
    *(["rm", "x"], ["rmi", "x"], ["pull", "x"], ["run", "x"]),
]
# Written by others, with their own way of showing examples.
FOREIGN = {"serve", "guest"}


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeDaemon]:
    with serving(tmp_path) as daemon:
        yield daemon


@pytest.fixture
def house(fake: FakeDaemon, tmp_path: Path) -> FakeDaemon:
    """Pod "web" with containers "web" and "side", and a stopped pod "old" in another namespace."""
    fake.add_pod(POD, "web")
    fake.add_pod(OTHER, "old", "prod", state=api_pb2.SANDBOX_NOTREADY)
    fake.add_container(WEB, POD, "app", log=tmp_path / "app.log")
    fake.add_container(SIDE, POD, "side", state=api_pb2.CONTAINER_EXITED)
    return fake


# --- the root -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in FOREIGN])
def test_every_command_teaches(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert isinstance(command, Command)
    assert command.help and len(command.help) > 40
    assert command.examples and any(line.startswith(("vmrt", "sudo vmrt")) for line in command.examples)
    result = vmrt(None, name, "--help")
    assert result.exit_code == 0
    assert "Examples:" in result.stdout
    assert all(line in result.stdout for line in command.examples)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in FOREIGN])
def test_every_example_parses(name: str) -> None:
    """Each example's command line, up to its first shell operator, is one that the parser takes."""
    command = cli.get_command(click.Context(cli), name)
    assert isinstance(command, Command)
    for line in command.examples:
        lexer = shlex.shlex(re.split(r"\s{2,}", line)[0], posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(itertools.takewhile(lambda word: not set(word) & set("();<>|&"), lexer))
        words = words[words[0] == "sudo" : len(words) - (words[-1] in ("2", "$"))]
        if words[:2] == ["vmrt", name]:
            command.make_context(name, words[2:], parent=click.Context(cli))


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_help_lists_every_command_and_imports_none(args: list[str]) -> None:
    result = vmrt(None, *args)
    assert "Examples:" in result.output
    for name, (_, _, summary) in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(summary)}", result.output, re.MULTILINE)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in FOREIGN])
def test_starting_a_command_imports_nothing_heavy(name: str) -> None:
    import asyncio
    import sys

    from vmrt import spawn

    script = (
        f"import sys; from vmrt.cli.app import cli, COMMANDS; import importlib; "
        f"importlib.import_module(COMMANDS[{name!r}][0]); "
        f"print(*sorted({{'grpc', 'libvirt', 'pyroute2', 'rich', 'asyncio', 'google.protobuf'}} & set(sys.modules)))"
    )
    done = asyncio.run(spawn.run([sys.executable, "-c", script]))
    assert done.text().split() == []


def test_version() -> None:
    assert vmrt(None, "--version").stdout == f"vmrt {__version__}\n"


def test_unknown_command_names_the_nearest() -> None:
    result = vmrt(None, "imagse")
    assert result.exit_code == 2
    assert "Did you mean 'images'?" in result.stderr


@pytest.mark.parametrize("args", TALKING, ids=lambda args: args[0])
def test_no_daemon_is_one_line_that_says_what_to_do(args: list[str], tmp_path: Path) -> None:
    result = vmrt(None, "--socket", str(tmp_path / "none.sock"), *args)
    assert result.exit_code == (125 if args[0] in ("run", "exec") else 1)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert f"no daemon on {tmp_path}/none.sock" in result.stderr
    assert "vmrt serve" in result.stderr


def test_socket_that_nobody_listens_on(tmp_path: Path) -> None:
    import socket

    path = tmp_path / "dead.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    result = vmrt(None, "pods", env={"VMRT_SOCKET": f"unix://{path}"})
    assert result.exit_code == 1
    assert "nobody listens" in result.stderr


@pytest.mark.parametrize("where", ["/" + "x" * 120, "tcp://127.0.0.1:1"])
def test_impossible_socket(where: str) -> None:
    result = vmrt(None, "--socket", where, "pods")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1


def test_relative_socket_path(fake: FakeDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert vmrt(None, "--socket", fake.socket.name, "pods").exit_code == 0


def test_debug_shows_the_traceback(fake: FakeDaemon) -> None:
    result = CliRunner().invoke(cli, ["--debug", "--socket", str(fake.socket), "inspect", "nothing"])
    assert type(result.exception).__name__ == "NotFoundError"


def test_timeout_says_so(fake: FakeDaemon) -> None:
    release = threading.Event()

    def hang(context: grpc.ServicerContext) -> None:
        context.add_callback(release.set)
        release.wait(30)

    fake.before["ListPodSandbox"] = hang
    result = vmrt(fake, "--timeout", "0.2", "pods")
    assert result.exit_code == 1
    assert "did not answer within 0.2 s" in result.stderr


def test_terminal_escapes_in_an_error_are_defused(fake: FakeDaemon) -> None:
    fake.fail["ListPodSandbox"] = (grpc.StatusCode.INTERNAL, "evil \x1b]0;title\x07 text")
    result = vmrt(fake, "pods")
    assert "\x1b" not in result.output
    assert "evil" in result.stderr


# --- lists --------------------------------------------------------------------------------------------------------


def test_pods_table(house: FakeDaemon) -> None:
    result = vmrt(house, "pods")
    assert result.exit_code == 0
    lines = [re.split(r" {3,}", line) for line in result.stdout.splitlines()]
    assert lines[0] == ["POD ID", "CREATED", "STATE", "NAME", "NAMESPACE", "ATTEMPT", "IP", "HANDLER"]
    assert [POD[:13], "ready", "web", "default", "0", "10.1.2.3", "vm"] in [[line[0], *line[2:]] for line in lines]
    assert len({line.index("HANDLER") if "HANDLER" in line else None for line in lines if "HANDLER" in line}) == 1


def test_pods_json_and_filters(house: FakeDaemon) -> None:
    everything = json.loads(vmrt(house, "pods", "--json").stdout)
    assert {pod["name"] for pod in everything} == {"web", "old"}
    [ready] = json.loads(vmrt(house, "pods", "--state", "ready", "--json").stdout)
    assert ready["id"] == POD
    assert ready["ips"] == ["10.1.2.3", "fd00::3"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z", ready["created_at"])
    assert vmrt(house, "pods", "--name", "old", "-q").stdout == f"{OTHER}\n"


def test_pod_that_goes_between_list_and_status(house: FakeDaemon) -> None:
    house.fail["PodSandboxStatus"] = (grpc.StatusCode.NOT_FOUND, "gone")
    assert vmrt(house, "pods").exit_code == 0


def test_ps(house: FakeDaemon) -> None:
    assert vmrt(house, "ps", "-q").stdout == f"{WEB}\n"
    assert set(vmrt(house, "ps", "-aq").stdout.split()) == {WEB, SIDE}
    assert vmrt(house, "ps", "-a", "--pod", "old", "-q").stdout == ""
    [entry] = json.loads(vmrt(house, "ps", "--json").stdout)
    assert (entry["name"], entry["pod_name"], entry["state"]) == ("app", "web", "running")
    assert entry["image"] == "docker.io/library/app:1"
    assert "docker.io/library/app:1" in vmrt(house, "ps").stdout


def test_hostile_names_do_not_reach_the_terminal(fake: FakeDaemon) -> None:
    fake.add_pod(POD, "a\x1b[31mb\nc")
    assert "\x1b" not in vmrt(fake, "pods").stdout
    assert len(vmrt(fake, "pods").stdout.splitlines()) == 2


def test_images(fake: FakeDaemon) -> None:
    fake.add_image("docker.io/library/app:1", "docker.io/library/app:latest")
    fake.add_image(identifier="sha256:" + "f" * 64, size=999)
    lines = [re.split(r" {3,}", line) for line in vmrt(fake, "images").stdout.splitlines()]
    assert lines[1:] == [
        ["docker.io/library/app", "1", "e" * 13, "12.3MB"],
        ["docker.io/library/app", "latest", "e" * 13, "12.3MB"],
        ["<none>", "<none>", "f" * 13, "999B"],
    ]
    assert len(vmrt(fake, "images", "-q").stdout.split()) == 2
    [image] = json.loads(vmrt(fake, "images", "--json", "docker.io/library/app:1").stdout)
    assert image["size_bytes"] == 12_345_678


# --- one container ------------------------------------------------------------------------------------------------


def test_exec_passes_output_and_status(house: FakeDaemon) -> None:
    house.execute = lambda request: api_pb2.ExecSyncResponse(stdout=b"\x00out", stderr=b"err\xff", exit_code=3)
    result = vmrt(house, "exec", "app", "sh", "-c", "exit 3", "--help")
    assert (result.stdout_bytes, result.stderr_bytes, result.exit_code) == (b"\x00out", b"err\xff", 3)
    [request] = house.called(api_pb2.ExecSyncRequest)
    assert (request.container_id, list(request.cmd), request.timeout) == (WEB, ["sh", "-c", "exit 3", "--help"], 0)


def test_exec_failure_of_ours_is_125(house: FakeDaemon) -> None:
    house.fail["ExecSync"] = (grpc.StatusCode.DEADLINE_EXCEEDED, "command timed out after 5 s")
    result = vmrt(house, "exec", "--time-limit", "5", "app", "sleep", "9")
    assert result.exit_code == 125
    assert result.stderr == "vmrt: command timed out after 5 s\n"
    assert house.called(api_pb2.ExecSyncRequest)[0].timeout == 5


def test_exec_with_a_terminal_needs_one(house: FakeDaemon) -> None:
    result = vmrt(house, "exec", "-it", "app", "sh")
    assert result.exit_code == 2
    assert "needs a terminal on stdin" in result.stderr
    result = vmrt(house, "exec", "-i", "--time-limit", "3", "app", "sh")
    assert result.exit_code == 2
    assert "--time-limit" in result.stderr
    assert not house.calls


LOG = b"".join(
    (
        b"2026-01-01T00:00:01Z stdout F one\n",
        b"2026-01-01T00:00:02Z stderr F two\n",
        b"2026-01-01T00:00:03Z stdout P thr\n",
        b"garbage\n",
        b"2026-01-01T00:00:04Z stdout F ee\n",
    )
)


def test_logs(house: FakeDaemon, tmp_path: Path) -> None:
    (tmp_path / "app.log").write_bytes(LOG)
    result = vmrt(house, "logs", "app")
    assert result.stdout == "one\nthree\n"
    assert "two\n" in result.stderr
    assert "1 lines of" in result.stderr
    assert vmrt(house, "logs", "--tail", "1", "app").stdout == "three\n"
    assert vmrt(house, "logs", "--tail", "0", "app").stdout == ""
    timed = vmrt(house, "logs", "-t", "app").stdout
    assert timed == "2026-01-01T00:00:01Z one\n2026-01-01T00:00:03Z three\n"


def test_logs_follow_until_the_end(house: FakeDaemon, tmp_path: Path) -> None:
    log = tmp_path / "app.log"
    log.write_bytes(LOG)
    asked = 0

    def later(context: grpc.ServicerContext) -> None:
        nonlocal asked
        asked += 1
        if asked == 3:
            log.rename(tmp_path / "app.log.1")
            log.write_bytes(b"2026-01-01T00:00:05Z stdout F after rotation\n")
            house.containers[WEB].state = api_pb2.CONTAINER_EXITED

    house.before["ContainerStatus"] = later
    result = vmrt(house, "logs", "-f", "--tail", "1", "app")
    assert result.exit_code == 0
    assert result.stdout == "three\nafter rotation\n"


def test_logs_follow_waits_for_a_daemon_that_is_restarted(house: FakeDaemon, tmp_path: Path) -> None:
    (tmp_path / "app.log").write_bytes(LOG)
    asked = 0

    def away(context: grpc.ServicerContext) -> None:
        nonlocal asked
        asked += 1
        house.fail.pop("ContainerStatus", None)
        if asked in (2, 3):
            house.fail["ContainerStatus"] = (grpc.StatusCode.UNAVAILABLE, "the daemon is stopping")
        elif asked == 4:
            house.containers[WEB].state = api_pb2.CONTAINER_EXITED

    house.before["ContainerStatus"] = away
    result = vmrt(house, "logs", "-f", "app")
    assert (result.exit_code, asked) == (0, 4)
    assert result.stdout == "one\nthree\n"
    assert result.stderr.count("the daemon is away") == 1


def test_logs_follow_does_not_wait_for_ever(house: FakeDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vmrt.cli import containers

    monkeypatch.setattr(containers, "DAEMON_PATIENCE_S", -1)
    (tmp_path / "app.log").write_bytes(LOG)
    asked = 0

    def away(context: grpc.ServicerContext) -> None:
        nonlocal asked
        asked += 1
        if asked == 2:
            house.fail["ContainerStatus"] = (grpc.StatusCode.UNAVAILABLE, "the daemon is stopping")

    house.before["ContainerStatus"] = away
    result = vmrt(house, "logs", "-f", "app")
    assert result.exit_code == 1
    assert result.stderr.endswith("vmrt: the daemon is stopping\n")


@pytest.mark.parametrize(("name", "says"), [("app", "does not exist"), ("side", "no log directory")])
def test_logs_that_are_not_there(house: FakeDaemon, name: str, says: str) -> None:
    result = vmrt(house, "logs", name)
    assert result.exit_code == 1
    assert says in result.stderr


# --- pods and containers ------------------------------------------------------------------------------------------


def test_inspect(house: FakeDaemon) -> None:
    answer = json.loads(vmrt(house, "inspect", "web").stdout)
    assert answer == {"kind": "sandbox", "id": POD, "phases": {"boot": 2.5}}
    vmrt(house, "inspect", "web/side")
    assert [request.id for request in house.called(control_pb2.InspectRequest)] == [POD, SIDE]


@pytest.mark.parametrize("command", ["inspect", "stop", "rm", "exec", "logs"])
def test_ambiguous_and_unknown_targets(house: FakeDaemon, command: str) -> None:
    house.add_container("ccc3" + "0" * 60, OTHER, "app")
    tail = ["true"] if command == "exec" else []
    for target, says in (("ccc", "'ccc' is ambiguous"), ("nothing", "'nothing'"), ("", "''")):
        result = vmrt(house, command, target, *tail)
        assert result.exit_code == (125 if command == "exec" else 1)
        assert result.stderr.count("\n") == 1
        assert says in result.stderr


def test_stop_a_pod_stops_its_containers_first(house: FakeDaemon) -> None:
    result = vmrt(house, "stop", "-t", "3", "web")
    assert (result.exit_code, result.stdout) == (0, "web\n")
    kinds = [type(call).__name__ for call in house.calls if type(call).__name__.startswith("Stop")]
    assert kinds == ["StopContainerRequest", "StopPodSandboxRequest"]
    [request] = house.called(api_pb2.StopContainerRequest)
    assert (request.container_id, request.timeout) == (WEB, 3)


def test_a_failed_stop_does_not_end_the_others(house: FakeDaemon) -> None:
    result = vmrt(house, "stop", "nothing", "old")
    assert result.exit_code == 1
    assert result.stdout == "old\n"
    assert "no pod or container 'nothing'" in result.stderr


def test_a_container_that_will_not_stop_is_named(house: FakeDaemon) -> None:
    house.fail["StopContainer"] = (grpc.StatusCode.UNKNOWN, "agent is gone")
    result = vmrt(house, "stop", "app")
    assert result.exit_code == 1
    assert result.stderr == "vmrt: app: agent is gone\n"


def test_rm(house: FakeDaemon) -> None:
    refused = vmrt(house, "rm", "web", "old", "web/side")
    assert refused.exit_code == 1
    assert "the pod is running" in refused.stderr
    assert refused.stdout == "old\nweb/side\n"
    assert set(house.pods) == {POD}
    assert set(house.containers) == {WEB}
    assert vmrt(house, "rm", "app").exit_code == 1
    assert vmrt(house, "rm", "-f", "app", "nothing").exit_code == 0
    assert vmrt(house, "rm", "-f", POD[:5]).exit_code == 0
    assert not house.pods and not house.containers


def test_rm_of_nothing(fake: FakeDaemon) -> None:
    assert vmrt(fake, "rm").exit_code == 2
    assert vmrt(fake, "rm", "-f").exit_code == 0  # vmrt rm -f $(vmrt pods -q) with no pods


# --- images -------------------------------------------------------------------------------------------------------


def image_events() -> list[control_pb2.ImageEvent]:
    return [
        control_pb2.ImageEvent(progress=control_pb2.Progress(what="copying layer 1", done=0, total=2_000_000)),
        control_pb2.ImageEvent(progress=control_pb2.Progress(what="copying layer 1", done=1_000_000, total=2_000_000)),
        control_pb2.ImageEvent(progress=control_pb2.Progress(what="converting")),
        control_pb2.ImageEvent(
            image=control_pb2.ImageSummary(id="sha256:" + "e" * 64, repo_tags=["app:1"], size_bytes=2_000_000)
        ),
    ]


def test_pull(fake: FakeDaemon) -> None:
    fake.pull_events = image_events()
    result = vmrt(fake, "pull", "app:1")
    assert result.stdout == f"pulled app:1 ({'e' * 13}, 2MB)\n"
    # One plain line a step: not a terminal.
    assert result.stderr == "pull: copying layer 1\npull: converting\n"
    quiet = vmrt(fake, "pull", "-q", "app:1")
    assert (quiet.stdout, quiet.stderr) == ("sha256:" + "e" * 64 + "\n", "")


@pytest.mark.parametrize(
    ("options", "stdin", "expected"),
    [
        ([], None, None),
        (["--username", "al", "--password-stdin"], b"s3cret\n", ("al", "s3cret", "")),
        (["--creds-file", "creds"], None, ("bo", "pa:ss", "")),
        (["--authfile", "auth.json"], None, ("", "", "YTpi")),
    ],
)
def test_pull_credentials(
    fake: FakeDaemon,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    stdin: bytes | None,
    expected: tuple[str, str, str] | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("creds").write_text("bo:pa:ss\n")
    Path("auth.json").write_text(json.dumps({"auths": {"reg.example": {"auth": "YTpi"}}}))
    fake.pull_events = image_events()
    result = vmrt(fake, "pull", *options, "reg.example/app:1", stdin=stdin)
    assert result.exit_code == 0, result.output
    [request] = fake.called(control_pb2.PullImageRequest)
    assert request.HasField("auth") == (expected is not None)
    if expected:
        assert (request.auth.username, request.auth.password, request.auth.auth) == expected


def test_pull_asks_for_the_password(fake: FakeDaemon) -> None:
    fake.pull_events = image_events()
    result = vmrt(fake, "pull", "-u", "al", "app", stdin=b"hidden\n")
    assert fake.called(control_pb2.PullImageRequest)[0].auth.password == "hidden"
    assert "hidden" not in result.output


def test_failed_pull(fake: FakeDaemon) -> None:
    fake.fail["PullImage"] = (grpc.StatusCode.UNKNOWN, "RegistryUnavailable: connection refused")
    result = vmrt(fake, "pull", "app")
    assert (result.exit_code, result.stderr) == (1, "vmrt: RegistryUnavailable: connection refused\n")
    del fake.fail["PullImage"]
    assert vmrt(fake, "pull", "app").exit_code == 1  # a stream that ends without an image


def test_load(fake: FakeDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("app.tar").write_bytes(b"tar")
    fake.pull_events = image_events()
    result = vmrt(fake, "load", "app.tar", "--tag", "app:dev")
    assert result.exit_code == 0
    assert result.stdout.startswith("loaded app:1")
    [request] = fake.called(control_pb2.LoadImagesRequest)
    assert (request.path, request.tag) == (str(tmp_path / "app.tar"), "app:dev")


def test_load_from_stdin(fake: FakeDaemon) -> None:
    fake.pull_events = image_events()
    seen: list[bytes] = []

    def look(context: grpc.ServicerContext) -> None:
        seen.append(Path(fake.called(control_pb2.LoadImagesRequest)[-1].path).read_bytes())

    fake.before["LoadImages"] = look
    assert vmrt(fake, "load", "-", stdin=b"\x00tar\xff").exit_code == 0
    assert seen == [b"\x00tar\xff"]
    assert not Path(fake.called(control_pb2.LoadImagesRequest)[-1].path).exists()


def test_load_of_nothing(fake: FakeDaemon, tmp_path: Path) -> None:
    assert "no such file" in vmrt(fake, "load", str(tmp_path / "no.tar")).stderr
    (tmp_path / "empty").mkdir()
    result = vmrt(fake, "load", str(tmp_path / "empty"))
    assert result.exit_code == 1
    assert "holds no image" in result.stderr


def test_rmi(fake: FakeDaemon) -> None:
    fake.add_image("app:1")
    result = vmrt(fake, "rmi", "absent", "app:1")
    assert result.exit_code == 1
    assert result.stdout == "removed app:1\n"
    assert "no image 'absent'" in result.stderr
    assert fake.images == []
    assert vmrt(fake, "rmi", "-f", "absent").exit_code == 0


# --- completion ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(shell: str) -> None:
    result = vmrt(None, "completion", shell)
    assert result.exit_code == 0
    assert f"_VMRT_COMPLETE={shell}_complete" in result.stdout
    assert len(result.stdout.splitlines()) > 10


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("vmrt p", {"pods", "port-forward", "ps", "pull"}),
        ("vmrt --socket {socket} stop w", {"web"}),
        ("vmrt --socket {socket} exec a", {"app"}),
        ("vmrt --socket {socket} exec ccc1", {WEB}),
        ("vmrt --socket {socket} rmi docker", {"docker.io/library/app:1"}),
        ("vmrt --socket /nonexistent.sock stop w", set()),
    ],
)
def test_completions(house: FakeDaemon, words: str, expected: set[str]) -> None:
    house.add_image("docker.io/library/app:1")
    line = words.format(socket=house.socket)
    env = {"_VMRT_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    result = CliRunner().invoke(cli, [], env=env, prog_name="vmrt")
    assert {entry.partition(",")[2] for entry in result.stdout.split()} == expected


def test_broken_pipe_is_quiet(house: FakeDaemon) -> None:
    """`vmrt pods | head -0`: the reader is gone before anything is written."""
    import asyncio
    import sys

    from vmrt import spawn

    reader, writer = os.pipe()
    os.close(reader)

    async def piped() -> tuple[int, bytes]:
        argv = [sys.executable, "-m", "vmrt", "--socket", str(house.socket), "pods"]
        async with spawn.piped(argv, stdout_fd=writer) as process:
            assert process.stderr is not None
            return await process.wait(), await process.stderr.read()

    try:
        status, stderr = asyncio.run(piped())
    finally:
        os.close(writer)
    assert stderr == b""
    assert status == 1
