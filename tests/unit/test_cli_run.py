from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from cli_daemon import FakeDaemon, Process, serving, vmrt

from vmrt.cli.run import default_name
from vmrt.proto.runtime.v1 import api_pb2
from vmrt.proto.vmrt.v1 import control_pb2

IMAGE = "docker.io/library/app:1"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    # The log directories of `run` are made in here.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    with serving(tmp_path) as daemon:
        daemon.add_image(IMAGE)
        yield daemon


def leftovers(fake: FakeDaemon) -> list[str]:
    return [*fake.pods, *(path.name for path in Path(tempfile.gettempdir()).iterdir())]


def test_output_and_exit_code_are_the_containers(fake: FakeDaemon) -> None:
    def script(process: Process) -> int:
        process.write(b"one\ntwo \xff\x00 no newline")
        process.write(b"oh\n", stderr=True)
        return 7

    fake.script = script
    result = vmrt(fake, "run", IMAGE)
    assert result.exit_code == 7
    assert result.stdout_bytes == b"one\ntwo \xff\x00 no newline"
    assert result.stderr_bytes == b"oh\n"
    assert leftovers(fake) == []


def test_output_comes_while_the_container_runs(fake: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    from vmrt.cli.logfile import Printer

    seen = threading.Event()
    write = Printer.write

    def spy(self: Printer, entries: object) -> None:
        write(self, entries)  # type: ignore[arg-type]
        seen.set()

    monkeypatch.setattr(Printer, "write", spy)

    def script(process: Process) -> int:
        process.write(b"first\n")
        # Ends only once the first line has been printed.
        return 0 if seen.wait(30) else 1

    fake.script = script
    assert vmrt(fake, "run", IMAGE).exit_code == 0


def test_what_is_asked_for_reaches_the_daemon(fake: FakeDaemon) -> None:
    result = vmrt(
        fake,
        *("run", "--name", "web", "-e", "A=1=2", "-e", "FROM_ENV", "-e", "UNSET_HERE", "--entrypoint", "/bin/x"),
        *("-w", "/srv", "--user", "7:8", "-m", "256m", "--cpus", "1.5", "--handler", "vm"),
        *("-p", "8080:80", "-p", "127.0.0.1:53:53/udp", "-p", "[::1]:81:81", IMAGE, "--flag", "-x", "arg"),
        env={"FROM_ENV": "yes"},
    )
    assert result.exit_code == 0, result.output
    [request] = fake.called(api_pb2.RunPodSandboxRequest)
    assert request.runtime_handler == "vm"
    pod = request.config
    assert (pod.metadata.name, pod.hostname, pod.metadata.namespace) == ("web", "web", "default")
    assert [(p.host_ip, p.host_port, p.container_port, p.protocol) for p in pod.port_mappings] == [
        ("", 8080, 80, api_pb2.TCP),
        ("127.0.0.1", 53, 53, api_pb2.UDP),
        ("::1", 81, 81, api_pb2.TCP),
    ]
    [config] = fake.configs.values()
    assert list(config.command) == ["/bin/x"]
    assert list(config.args) == ["--flag", "-x", "arg"]
    assert config.working_dir == "/srv"
    assert [(env.key, env.value) for env in config.envs] == [("A", b"1=2"), ("FROM_ENV", b"yes")]
    security = config.linux.security_context
    assert (security.run_as_user.value, security.run_as_group.value) == (7, 8)
    assert security.namespace_options.pid == api_pb2.CONTAINER
    for limits in (config.linux.resources, pod.linux.resources):
        assert limits.memory_limit_in_bytes == 256 * 1024**2
        assert (limits.cpu_quota, limits.cpu_period) == (150_000, 100_000)
    assert config.image.image == fake.images[0].id


def test_user_name_and_no_group(fake: FakeDaemon) -> None:
    assert vmrt(fake, "run", "--user", "nobody", IMAGE).exit_code == 0
    [config] = fake.configs.values()
    assert config.linux.security_context.run_as_username == "nobody"
    assert not config.linux.security_context.HasField("run_as_user")
    assert not config.linux.security_context.HasField("run_as_group")


def pulled(identifier: str = "sha256:" + "f" * 64) -> list[control_pb2.ImageEvent]:
    return [
        control_pb2.ImageEvent(progress=control_pb2.Progress(what="copying", done=5, total=10)),
        control_pb2.ImageEvent(image=control_pb2.ImageSummary(id=identifier)),
    ]


@pytest.mark.parametrize(
    ("image", "policy", "pulls"),
    [(IMAGE, "missing", 0), (IMAGE, "always", 1), (IMAGE, "never", 0), ("absent:1", "missing", 1)],
)
def test_pull_policy(fake: FakeDaemon, image: str, policy: str, pulls: int) -> None:
    fake.pull_events = pulled()
    result = vmrt(fake, "run", "--pull", policy, image)
    assert result.exit_code == 0, result.output
    assert len(fake.called(control_pb2.PullImageRequest)) == pulls
    assert ("copying" in result.stderr) == (pulls == 1)
    assert result.stdout == ""


def test_absent_image_that_may_not_be_pulled(fake: FakeDaemon) -> None:
    result = vmrt(fake, "run", "--pull", "never", "absent:1")
    assert result.exit_code == 125
    assert "no image 'absent:1'" in result.stderr
    assert not fake.called(api_pb2.RunPodSandboxRequest)


@pytest.mark.parametrize("step", ["RunPodSandbox", "CreateContainer", "StartContainer"])
def test_a_failing_step_leaves_nothing(fake: FakeDaemon, step: str) -> None:
    fake.fail[step] = (grpc.StatusCode.INVALID_ARGUMENT, "boot: it is broken")
    result = vmrt(fake, "run", IMAGE)
    assert result.exit_code == 125
    assert result.stderr == "vmrt: boot: it is broken\n"
    assert leftovers(fake) == []


def test_ctrl_c_stops_and_cleans_up(fake: FakeDaemon) -> None:
    followed = threading.Event()
    fake.before["ContainerStatus"] = lambda context: followed.set()

    def script(process: Process) -> int:
        process.write(b"up\n")
        followed.wait(30)
        os.kill(os.getpid(), signal.SIGINT)
        process.stopped.wait(30)
        process.write(b"last words\n")
        return 143

    fake.script = script
    before = signal.getsignal(signal.SIGINT)
    result = vmrt(fake, "run", IMAGE)
    assert result.exit_code == 130
    assert result.stdout == "up\nlast words\n"
    [stop] = fake.called(api_pb2.StopContainerRequest)
    assert stop.timeout == 10
    assert leftovers(fake) == []
    assert signal.getsignal(signal.SIGINT) is before


def test_second_ctrl_c_does_not_wait_for_the_grace_period(fake: FakeDaemon) -> None:
    stopping = threading.Event()

    def stop(context: grpc.ServicerContext) -> None:
        context.add_callback(cancelled.set)
        stopping.set()
        cancelled.wait(30)

    def script(process: Process) -> int:
        followed.wait(30)
        os.kill(os.getpid(), signal.SIGINT)
        stopping.wait(30)
        os.kill(os.getpid(), signal.SIGINT)
        process.stopped.wait(30)
        return 137

    followed, cancelled = threading.Event(), threading.Event()
    fake.before["ContainerStatus"] = lambda context: followed.set()
    fake.before["StopContainer"] = stop
    fake.script = script
    assert vmrt(fake, "run", IMAGE).exit_code == 130
    assert cancelled.is_set()
    assert leftovers(fake) == []


def test_signal_while_the_pod_is_being_made(fake: FakeDaemon) -> None:
    cancelled = threading.Event()

    def interrupt(context: grpc.ServicerContext) -> None:
        # The daemon has made the pod and not answered yet: the worst moment.
        context.add_callback(cancelled.set)
        os.kill(os.getpid(), signal.SIGTERM)
        cancelled.wait(30)

    fake.before["RunPodSandbox"] = interrupt
    result = vmrt(fake, "run", IMAGE)
    assert result.exit_code == 143
    assert cancelled.is_set()
    assert leftovers(fake) == []


def test_detached_pod_stays_until_removed_with_its_log(fake: FakeDaemon) -> None:
    def script(process: Process) -> int:
        process.write(b"hello\n")
        process.stopped.wait(30)
        return 0

    fake.script = script
    result = vmrt(fake, "run", "-d", "--name", "db", IMAGE)
    assert result.exit_code == 0
    [identifier] = fake.pods
    assert result.stdout == f"{identifier}\n"
    assert len(leftovers(fake)) == 2
    followed = vmrt(fake, "logs", "db")
    assert followed.stdout == "hello\n"
    assert vmrt(fake, "rm", "db").exit_code == 1
    assert vmrt(fake, "rm", "-f", "db").exit_code == 0
    assert leftovers(fake) == []


def test_keep(fake: FakeDaemon) -> None:
    result = vmrt(fake, "run", "--keep", "--name", "kept", IMAGE)
    assert result.exit_code == 0
    assert [pod.metadata.name for pod in fake.pods.values()] == ["kept"]
    assert "vmrt rm -f kept" in result.stderr


def test_rm_deletes_no_directory_named_by_a_stranger(fake: FakeDaemon, tmp_path: Path) -> None:
    pod = fake.add_pod("a" * 64, "evil", labels={"vmrt.dev/run": "x"}, state=api_pb2.SANDBOX_NOTREADY)
    pod.metadata.uid = "../../victim"
    victim = tmp_path / "victim"
    victim.mkdir()
    assert vmrt(fake, "rm", "evil").exit_code == 0
    assert victim.is_dir()


def test_a_terminal_is_needed_for_a_terminal(fake: FakeDaemon) -> None:
    result = vmrt(fake, "run", "-it", IMAGE)
    assert result.exit_code == 2
    assert "needs a terminal" in result.stderr
    result = vmrt(fake, "run", "-i", "--detach-keys", "ctrl-", IMAGE)
    assert result.exit_code == 2
    assert "is no key" in result.stderr
    assert not fake.calls


def test_a_detached_container_is_made_for_a_later_attach(fake: FakeDaemon) -> None:
    assert vmrt(fake, "run", "-d", "-it", IMAGE).exit_code == 0
    [config] = fake.configs.values()
    assert (config.stdin, config.tty, config.stdin_once) == (True, True, False)


@pytest.mark.parametrize(
    ("image", "name"),
    [
        ("alpine", "alpine-012345"),
        ("registry.example:5000/Team/My_App:1.2", "my-app-012345"),
        ("app@sha256:" + "0" * 64, "app-012345"),
        ("___", "pod-012345"),
    ],
)
def test_default_name(image: str, name: str) -> None:
    assert default_name(image, "0123456789") == name
