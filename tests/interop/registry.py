"""A registry on loopback: Debian's docker-registry, with one image in it."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def registry(directory: Path, layout: Path, reference: str) -> Iterator[str]:
    """Serve the image of an OCI layout; yield its reference, `reference` with the registry's address before it.

    `directory` takes the registry's files and a registries.conf that allows plain HTTP to it.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    directory.mkdir()
    config = directory / "config.yml"
    config.write_text(
        f"version: 0.1\nlog: {{level: error}}\nhttp: {{addr: {address}}}\n"
        f"storage: {{filesystem: {{rootdirectory: {directory}/data}}}}\n"
    )
    (directory / "registries.conf").write_text(f'[[registry]]\nlocation = "{address}"\ninsecure = true\n')
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(["docker-registry", "serve", str(config)], stdout=log, stderr=log)
    try:
        _wait(process, address, directory / "log")
        whole = f"{address}/{reference}"
        subprocess.run(
            ["skopeo", "copy", "--quiet", "--dest-tls-verify=false", f"oci:{layout}", f"docker://{whole}"], check=True
        )
        yield whole
    finally:
        process.terminate()
        process.wait()


def _wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    host, _, port = address.partition(":")
    deadline = time.monotonic() + 30
    while True:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"docker-registry did not start: {log.read_text()}")
        time.sleep(0.05)
