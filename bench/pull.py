"""Stage "pull": PullImage of an image of 100 MB in 10 layers from a registry on loopback, conversion included."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

from bench.samples import COLD, CONTAINERD
from bench.stand import Bench, Stage
from demo import busybox_image
from demo.busybox_image import File
from vmrt.proto.runtime.v1 import api_pb2 as cri

LAYERS, LAYER_BYTES = 10, 10_000_000
_START_S = 30.0


@contextlib.contextmanager
def registry(directory: Path) -> Iterator[str]:
    """Run Debian's docker-registry on loopback; yield its HOST:PORT."""
    directory.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{probe.getsockname()[1]}"
    (directory / "config.yml").write_text(
        f"version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {directory}/data}}}}\n"
        f"http: {{addr: '{host}'}}\n"
    )
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            ["docker-registry", "serve", directory / "config.yml"], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        address, port = host.split(":")
        deadline = time.monotonic() + _START_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection((address, int(port))):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the registry did not start:\n{(directory / 'log').read_text()[-2000:]}")
            time.sleep(0.05)
        yield host
    finally:
        process.kill()
        process.wait()


def content(wanted_bytes: int) -> Iterator[bytes]:
    """Yield what images are full of, programs and text: this machine's Python library and shared objects, by name."""
    places = (Path(sysconfig.get_path("stdlib")), Path("/usr/lib/x86_64-linux-gnu"))
    for place in places:
        for path in sorted(place.rglob("*")):
            if wanted_bytes <= 0:
                return
            if path.is_file() and not path.is_symlink() and path.suffix != ".pyc":
                data = path.read_bytes()[:2_000_000]
                wanted_bytes -= len(data)
                yield data


def layers(mark: str) -> list[bytes]:
    """Return the layers' tars. `mark` makes them differ from other calls', so that no side has them already."""
    made: list[bytes] = []
    files: dict[str, File | busybox_image.Directory] = {}
    size = 0
    for number, data in enumerate(content(LAYERS * LAYER_BYTES)):
        files[f"srv/{len(made)}/{number}"] = File(data)
        size += len(data)
        if size >= LAYER_BYTES and len(made) < LAYERS - 1:
            made.append(busybox_image.layer({f"srv/{len(made)}/mark": File(mark.encode()), **files}))
            files, size = {}, 0
    made.append(busybox_image.layer({f"srv/{len(made)}/mark": File(mark.encode()), **files}))
    return made


def push(bench: Bench, host: str, number: int) -> str:
    """Make an image that no side has seen, and push it; return its reference."""
    layout = bench.scratch / f"pull{number}"
    reference = f"{host}/bench/pull:{number}"
    busybox_image.write_layout(layout, reference, layers(f"{number}"), {"Cmd": ["true"]})
    subprocess.run(
        ["skopeo", "copy", "--quiet", "--dest-tls-verify=false", f"oci:{layout}", f"docker://{reference}"],
        check=True,
        stdin=subprocess.DEVNULL,
    )
    return reference


def measure(bench: Bench) -> None:
    with registry(bench.scratch / "registry") as host:
        conf = bench.scratch / "registries.conf"
        conf.write_text(f'[[registry]]\nlocation = "{host}"\ninsecure = true\n')
        daemon = bench.daemon("pull", f'[images]\nregistries_conf = "{conf}"\n')
        for number in range(bench.rounds):
            request = cri.PullImageRequest(image=cri.ImageSpec(image=push(bench, host, number)))
            bench.samples.timed(COLD, "PullImage", lambda r=request: daemon.images.PullImage(r))  # type: ignore[misc]
            if bench.containerd is not None:
                images = bench.containerd.images
                bench.samples.timed(CONTAINERD, "PullImage", lambda r=request, i=images: i.PullImage(r))  # type: ignore[misc]
            print(".", end="", flush=True)
    what = f"PullImage, {LAYERS * LAYER_BYTES // 1_000_000} MB in {LAYERS} layers, vmrt / containerd"
    bench.samples.compare(what, (COLD, "PullImage"), (CONTAINERD, "PullImage"), 1.2)


STAGE = Stage("pull", "PullImage of 100 MB in 10 layers from a registry on loopback, beside containerd", measure)
