"""Assembles a small OCI image from this machine's own Debian packages: busybox, its libraries, and a user database.

The result is an OCI image layout directory (image-spec, image-layout.md). Same packages, same digests: entries are
sorted, owned by root and dated alike. Used by the demonstration and by the end-to-end tests; needs no registry.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

DATE = 1767225600  # 2026-01-01, in place of anything that changes from run to run

PASSWD = b"root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1::/usr/sbin:/bin/false\nnobody:x:65534:65534::/home:/bin/false\n"
GROUP = b"root:x:0:\ndaemon:x:1:\nextra:x:50000:nobody\nnobody:x:65534:\n"


@dataclass(frozen=True, slots=True)
class File:
    """A regular file (or, with `target`, a hard link to another path of the same layer)."""

    data: bytes = b""
    mode: int = 0o644
    target: str = ""


@dataclass(frozen=True, slots=True)
class Directory:
    """A directory with its mode."""

    mode: int = 0o755


Entries = Mapping[str, File | Directory]


def layer(entries: Entries) -> bytes:
    """Return an uncompressed tar; missing parents are added, hard links follow their targets."""
    everything: dict[str, File | Directory] = {}
    for name, entry in entries.items():
        for parent in reversed(Path(name).parents):
            if str(parent) != ".":
                everything.setdefault(str(parent), Directory())
        everything[name] = entry
    ordered = sorted(everything.items(), key=lambda item: (isinstance(item[1], File) and bool(item[1].target), item[0]))
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, entry in ordered:
            info = tarfile.TarInfo(name)
            info.mtime, info.mode = DATE, getattr(entry, "mode", 0o755)
            match entry:
                case Directory():
                    info.type = tarfile.DIRTYPE
                    tar.addfile(info)
                case File(target=target) if target:
                    info.type, info.linkname = tarfile.LNKTYPE, target
                    tar.addfile(info)
                case File(data=data):
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def busybox() -> dict[str, File | Directory]:
    """Return the root file system: busybox under the name of each of its applets, and the libraries it needs.

    Raises `FileNotFoundError` when Debian's busybox package is not installed.
    """
    program = shutil.which("busybox")
    if program is None:
        raise FileNotFoundError("busybox is not installed (Debian package busybox)")
    entries: dict[str, File | Directory] = {
        "dev": Directory(),
        "home": Directory(),
        "proc": Directory(),
        "sys": Directory(),
        "root": Directory(0o700),
        "tmp": Directory(0o1777),
        "var/run": Directory(),
        "etc/passwd": File(PASSWD),
        "etc/group": File(GROUP),
        "bin/busybox": File(Path(program).read_bytes(), 0o755),
        "srv/index.html": File(b"hello from a container in a virtual machine\n"),
    }
    for library in _libraries(program):
        entries[library.lstrip("/")] = File(Path(library).read_bytes(), 0o755)
    applets = subprocess.run([program, "--list"], capture_output=True, text=True, check=True).stdout.split()
    for applet in applets:
        if applet != "busybox":
            entries[f"bin/{applet}"] = File(mode=0o755, target="bin/busybox")
    return entries


def _libraries(program: str) -> list[str]:
    """Return the paths at which the loader wants a program's libraries; a static program has none."""
    ldd = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
    return [word for line in ldd.splitlines() for word in line.split() if word.startswith("/")]


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def write_layout(directory: Path, reference: str, layers: Sequence[bytes], config: Mapping[str, object]) -> str:
    """Write one image as an OCI layout into an empty or absent `directory`; return its id (the config's digest)."""
    blobs = directory / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes, media_type: str) -> dict[str, object]:
        digest = _digest(data)
        (blobs / digest.removeprefix("sha256:")).write_bytes(data)
        return {"mediaType": media_type, "digest": digest, "size": len(data)}

    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
    body = {
        "created": "2026-01-01T00:00:00Z",
        "architecture": machine,
        "os": "linux",
        "config": dict(config),
        "rootfs": {"type": "layers", "diff_ids": [_digest(data) for data in layers]},
        "history": [{"created": "2026-01-01T00:00:00Z", "created_by": "vmrt"} for _ in layers],
    }
    config_blob = put(json.dumps(body, sort_keys=True).encode(), "application/vnd.oci.image.config.v1+json")
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config_blob,
        "layers": [
            put(gzip.compress(data, compresslevel=6, mtime=0), "application/vnd.oci.image.layer.v1.tar+gzip")
            for data in layers
        ],
    }
    entry = put(json.dumps(manifest, sort_keys=True).encode(), "application/vnd.oci.image.manifest.v1+json")
    entry["annotations"] = {"org.opencontainers.image.ref.name": reference}
    index = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [entry]}
    (directory / "index.json").write_text(json.dumps(index, sort_keys=True))
    (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return str(config_blob["digest"])


def write_busybox(directory: Path, reference: str = "docker.io/library/vmrt-demo:latest") -> str:
    """Write the busybox image as an OCI layout; return its id."""
    path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return write_layout(directory, reference, [layer(busybox())], {"Env": [path], "Cmd": ["sh"]})
