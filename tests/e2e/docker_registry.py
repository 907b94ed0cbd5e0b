"""Debian's docker-registry as a fixture's object, and a client that pushes to it."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import subprocess
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

import bcrypt
from test_images_store import config_of, sha

MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
USER, PASSWORD = "somebody", "correct horse"


class Registry:
    """A docker-registry process; `log` has a line for each request."""

    def __init__(self, directory: Path, *, users: bool = False, auth: Mapping[str, object] | None = None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.host = f"127.0.0.1:{probe.getsockname()[1]}"
        self.directory = directory
        self.log = directory / "log"
        self.headers: dict[str, str] = {}
        config: dict[str, object] = {
            "version": 0.1,
            "storage": {"filesystem": {"rootdirectory": str(directory / "data")}},
            "http": {"addr": self.host},
        }
        if auth is not None:
            config["auth"] = dict(auth)
        if users:
            hashed = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4, b"2a")).decode()
            (directory / "htpasswd").write_text(f"{USER}:{hashed}\n")
            config["auth"] = {"htpasswd": {"realm": "test", "path": str(directory / "htpasswd")}}
            self.headers["Authorization"] = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        (directory / "config.yml").write_text(json.dumps(config))
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                ["docker-registry", "serve", directory / "config.yml"], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", int(self.host[10:]))):
                return
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def http(self, method: str, path: str, data: bytes | None = None, kind: str = "application/octet-stream") -> str:
        url = path if "://" in path else f"http://{self.host}/v2/{path}"
        request = urllib.request.Request(url, data, {**self.headers, "Content-Type": kind}, method=method)
        with urllib.request.urlopen(request) as answer:
            return str(answer.headers["Location"] or "")

    def blob(self, repository: str, data: bytes) -> dict[str, object]:
        place = self.http("POST", f"{repository}/blobs/uploads/", b"")
        self.http("PUT", f"{place}{'&' if '?' in place else '?'}digest={sha(data)}", data)
        return {"digest": sha(data), "size": len(data)}

    def push(self, repository: str, tag: str, layers: Sequence[bytes], **config: object) -> str:
        """Push an image of uncompressed layers; return its manifest's digest."""
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {
                "mediaType": "application/vnd.docker.container.image.v1+json",
                **self.blob(repository, config_of(layers, **config)),
            },
            "layers": [
                {
                    "mediaType": "application/vnd.docker.image.rootfs.diff.tar.gzip",
                    **self.blob(repository, gzipped(data)),
                }
                for data in layers
            ],
        }
        return self.manifest(repository, tag, manifest, MANIFEST)

    def manifest(self, repository: str, tag: str, document: object, kind: str) -> str:
        data = json.dumps(document).encode()
        self.http("PUT", f"{repository}/manifests/{tag}", data, kind)
        return sha(data)

    def requests(self, method: str, part: str) -> int:
        """Count the requests of a method whose path has a part."""
        return sum(f'"{method} ' in line and part in line for line in self.log.read_text().splitlines())


def gzipped(data: bytes) -> bytes:
    return subprocess.run(["gzip", "-1nc"], input=data, capture_output=True, check=True).stdout
