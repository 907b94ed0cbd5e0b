"""`make interop`: runs the Go tests here, which use the client libraries of kubelet, against a daemon of their own.

Arguments are passed on to `go test`: `python -m tests.interop -run TestStreaming`.

The daemon has an image, and a registry on loopback to pull it from. Where Go is absent or older than go.mod asks for,
this says so in one line and passes; under CI=true that is a failure, so that the tests cannot stop running unnoticed.
Without root there is no daemon, and the tests that need one are skipped.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from demo import busybox_image
from demo.daemon import Daemon
from demo.leftovers import snapshot
from tests.interop.registry import registry

HERE = Path(__file__).parent
IMAGE = "docker.io/library/vmrt-interop:latest"


def main() -> int:
    """Return the exit status: that of `go test`, or 1 for what was left behind."""
    in_ci = os.environ.get("CI") == "true"
    if reason := why_not():
        print(f"interop: not run: {reason}", file=sys.stderr if in_ci else sys.stdout)
        return 1 if in_ci else 0
    if os.geteuid() != 0:
        print("interop: without root there is no daemon: only what needs none is tested")
        return go_test({})
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vmrt-interop-")))
        busybox_image.write_busybox(scratch / "image", IMAGE)
        # Another image: removing an image removes all its names, and the containers' image has to stay.
        files = busybox_image.layer({"hello": busybox_image.File(b"pulled\n")})
        busybox_image.write_layout(scratch / "other", "docker.io/library/other:latest", [files], {"Cmd": ["/hello"]})
        pullable = stack.enter_context(registry(scratch / "registry", scratch / "other", "vmrt/interop:pulled"))
        settings = f'[images]\nregistries_conf = "{scratch}/registry/registries.conf"\n'
        daemon = stack.enter_context(Daemon("interop", settings))
        before = snapshot(daemon.root)
        daemon.start()
        daemon.load(scratch / "image")
        variables = {"VMRT_SOCKET": str(daemon.socket), "VMRT_TEST_IMAGE": IMAGE, "VMRT_TEST_PULL_IMAGE": pullable}
        status = go_test({**variables, "VMRT_INTEROP": "1"})
        daemon.remove_pods()
        daemon.stop()
        left = snapshot(daemon.root).added_since(before)
        if status or left:
            print(f"--- the end of the daemon's log ---\n{daemon.log()[-6000:]}", file=sys.stderr)
    for kind, lines in left.items():
        print(f"left behind, {kind}: {lines}", file=sys.stderr)
    return status or bool(left)


def why_not() -> str:
    """Return "" when Go is new enough."""
    found = re.search(r"^go (\S+)$", (HERE / "go.mod").read_text(), re.MULTILINE)
    assert found is not None, "go.mod names no version"
    wanted = found.group(1)
    if shutil.which("go") is None:
        return f"needs Go {wanted} or newer, there is none in PATH"
    asked = subprocess.run(
        ["go", "env", "GOVERSION"], env=environment({}), cwd=HERE.parent, capture_output=True, text=True
    )
    version = asked.stdout.strip().removeprefix("go")
    return (
        "" if numbers(version) >= numbers(wanted) else f"needs Go {wanted} or newer, PATH has {version or asked.stderr}"
    )


def numbers(version: str) -> tuple[int, ...]:
    """Return "1.26.0" as (1, 26, 0); what follows the numbers ("rc1") is left out."""
    return tuple(int(number) for number in re.findall(r"\d+", version.partition(" ")[0])[:3])


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """Return ours, with Go kept from fetching another toolchain."""
    return {**os.environ, "GOTOOLCHAIN": "local", **more}


def go_test(more: Mapping[str, str]) -> int:
    """Run the tests, their output ours; return the exit status."""
    argv = ["go", "test", "-count=1", "-timeout=20m", *(["-v"] if more else []), "./...", *sys.argv[1:]]
    return subprocess.run(argv, cwd=HERE, env=environment(more), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
