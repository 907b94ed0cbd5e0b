"""The command line as a user types it, against a real daemon."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from demo import busybox_image
from demo.daemon import CHECKOUT, Daemon
from tests.e2e.conftest import IMAGE, Pod


def vmrt(daemon: Daemon, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "vmrt", "--socket", str(daemon.socket), *arguments],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        timeout=120,
        cwd=CHECKOUT,
    )
    assert done.returncode == status, (arguments, done.returncode, done.stdout, done.stderr)
    return done


def test_run_streams_both_outputs_and_hands_on_the_exit_code(daemon: Daemon) -> None:
    script = "echo out; echo err >&2; echo $WHO; exit 3"
    done = vmrt(daemon, "run", "-e", "WHO=me", IMAGE, "sh", "-c", script, status=3)
    assert (done.stdout, done.stderr) == ("out\nme\n", "err\n")
    assert "run-" not in vmrt(daemon, "pods", "-q").stdout


def test_lists_inspect_exec_and_logs(daemon: Daemon, pod: Pod) -> None:
    container = pod.run("sh", "-c", "echo hello; sleep 1000", name="cli")
    pods = json.loads(vmrt(daemon, "pods", "--json").stdout)
    assert pod.id in json.dumps(pods)
    assert container[:13] in vmrt(daemon, "ps").stdout
    assert IMAGE in vmrt(daemon, "images", "--json").stdout
    assert vmrt(daemon, "exec", container[:13], "echo", "from", "inside").stdout == "from inside\n"
    assert vmrt(daemon, "exec", container, "sh", "-c", "exit 5", status=5).stdout == ""
    assert vmrt(daemon, "logs", container).stdout == "hello\n"
    inspected = json.loads(vmrt(daemon, "inspect", pod.id).stdout)
    assert "boot" in json.dumps(inspected)
    assert pod.id in json.dumps(inspected)
    vmrt(daemon, "stop", container)
    vmrt(daemon, "rm", container)
    assert container[:13] not in vmrt(daemon, "ps", "-a").stdout


def test_load_images_and_remove(daemon: Daemon, tmp_path: Path) -> None:
    name = "docker.io/library/loaded:1"
    layer = busybox_image.layer({"only": busybox_image.File(b"this")})
    image_id = busybox_image.write_layout(tmp_path / "layout", name, [layer], {})
    vmrt(daemon, "load", str(tmp_path / "layout"))
    listed = {image["id"]: image for image in json.loads(vmrt(daemon, "images", "--json").stdout)}
    assert name in json.dumps(listed[image_id])
    vmrt(daemon, "rmi", name)
    assert image_id not in vmrt(daemon, "images", "--json").stdout
    vmrt(daemon, "load", "/nonexistent", status=1)


def test_errors_are_one_line(daemon: Daemon, tmp_path: Path) -> None:
    for arguments in (
        ("inspect", "nothing-of-that-name"),
        ("pull", "UPPER/Case"),
        ("run", "--pull", "never", "absent:1"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "vmrt", "--socket", str(daemon.socket), *arguments],
            capture_output=True, text=True, check=False, cwd=CHECKOUT, timeout=60,
        )  # fmt: skip
        assert done.returncode not in (0, 2), arguments
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert "Traceback" not in done.stderr
    nobody = subprocess.run(
        [sys.executable, "-m", "vmrt", "--socket", str(tmp_path / "no.sock"), "pods"],
        capture_output=True, text=True, check=False, cwd=CHECKOUT, timeout=60,
    )  # fmt: skip
    assert nobody.returncode == 1
    assert "no.sock" in nobody.stderr


def test_doctor_knows_this_machine(daemon: Daemon) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vmrt", "--socket", str(daemon.socket), "doctor", "--json"],
        capture_output=True, text=True, check=False, cwd=CHECKOUT, timeout=120,
    )  # fmt: skip
    findings = {f["name"]: f for f in json.loads(done.stdout)}
    for name in ("qemu", "libvirt", "vsock", "tap", "cni", "skopeo"):
        assert findings[name]["status"] == "ok", findings[name]
