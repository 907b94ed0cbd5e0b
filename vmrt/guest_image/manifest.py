"""The manifest: what a built guest image is, and the checks before a daemon boots VMs from it.

Layout of an image directory:

    DIR/current -> <version>           replaced atomically by a build
    DIR/<version>/manifest.json        and the files it names

A running daemon keeps the version that it loaded: `load` resolves `current` once, and `hold` keeps `prune` off it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmrt.agent import layout
from vmrt.errors import FailedPreconditionError, NotFoundError, VmrtError
from vmrt.model import GuestImage

PHASE = "guest image"
FORMAT = 1
FILE = "manifest.json"
CURRENT = "current"
_REBUILD = "build it again with `vmrt guest build`"


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One file of an image, with what it must be."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of manifest.json; `inputs` names what the image was made of (packages, tools, digests)."""

    version: str
    protocol: int
    kernel_release: str
    cmdline: str
    filesystem: str
    kernel: ImageFile
    initramfs: ImageFile | None
    rootfs: ImageFile
    inputs: Mapping[str, Any]

    @property
    def files(self) -> tuple[ImageFile, ...]:
        """Return the image's files."""
        return tuple(file for file in (self.kernel, self.initramfs, self.rootfs) if file is not None)


def describe(path: Path) -> ImageFile:
    """Measure a finished file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return ImageFile(path.name, path.stat().st_size, digest)


def dumps(manifest: Manifest) -> str:
    """Return manifest.json's text: sorted keys, so that it is reproducible too."""

    def entry(file: ImageFile | None) -> dict[str, object] | None:
        return None if file is None else {"name": file.name, "size": file.size_bytes, "sha256": file.sha256}

    fields = {
        "format": FORMAT,
        "version": manifest.version,
        "protocol": manifest.protocol,
        "kernel_release": manifest.kernel_release,
        "cmdline": manifest.cmdline,
        "filesystem": manifest.filesystem,
        "files": {
            "kernel": entry(manifest.kernel),
            "initramfs": entry(manifest.initramfs),
            "rootfs": entry(manifest.rootfs),
        },
        "inputs": manifest.inputs,
    }
    return json.dumps(fields, indent=1, sort_keys=True) + "\n"


def loads(text: str, *, resource: str) -> Manifest:
    """Parse manifest.json. Raises `VmrtError` for anything that is not one of our FORMAT."""
    try:
        fields = json.loads(text)
        if fields["format"] != FORMAT:
            raise FailedPreconditionError(
                f"manifest format {fields['format']}, this vmrt reads {FORMAT}",
                phase=PHASE,
                resource=resource,
                hint=_REBUILD,
            )
        files = fields["files"]
        return Manifest(
            version=_text(fields["version"]),
            protocol=_count(fields["protocol"]),
            kernel_release=_text(fields["kernel_release"]),
            cmdline=_text(fields["cmdline"]),
            filesystem=_text(fields["filesystem"]),
            kernel=_file(files["kernel"]),
            initramfs=None if files["initramfs"] is None else _file(files["initramfs"]),
            rootfs=_file(files["rootfs"]),
            inputs=dict(fields["inputs"]),
        )
    except (ValueError, KeyError, TypeError) as e:
        raise VmrtError(f"damaged manifest: {e!r}", phase=PHASE, resource=resource, hint=_REBUILD) from e


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(f"{value!r} is no count")
    return value


def _file(entry: Mapping[str, Any]) -> ImageFile:
    name = _text(entry["name"])
    if "/" in name or name in ("", ".", ".."):
        raise ValueError(f"{name!r} is no plain file name")
    return ImageFile(name, _count(entry["size"]), _text(entry["sha256"]))


def directory_of(image: Path) -> Path:
    """Return the version directory that `image` means: itself, or what its `current` points at.

    Raises `NotFoundError` when there is no image.
    """
    for candidate in (image / CURRENT, image):
        if (candidate / FILE).is_file():
            return candidate.resolve()
    raise NotFoundError(
        "there is no guest image", phase=PHASE, resource=str(image), hint="make it with `vmrt guest build`"
    )


def read(directory: Path) -> Manifest:
    """Read the manifest in a version directory."""
    try:
        text = (directory / FILE).read_text()
    except (OSError, UnicodeDecodeError) as e:
        raise VmrtError(f"cannot read {FILE}: {e}", phase=PHASE, resource=str(directory), hint=_REBUILD) from e
    return loads(text, resource=str(directory))


def load(image: Path, *, verify: bool = True) -> GuestImage:
    """Return the image in a directory, checked against what this vmrt can drive.

    Sizes are always compared, contents where `verify` (some 0.1 s). Raises `NotFoundError` when there is none,
    `FailedPreconditionError` when its agent speaks another protocol, `VmrtError` when a file is damaged.
    """
    directory = directory_of(image)
    manifest = read(directory)
    if manifest.protocol != layout.PROTOCOL_VERSION:
        raise FailedPreconditionError(
            f"its agent speaks protocol {manifest.protocol}, this vmrt speaks {layout.PROTOCOL_VERSION}",
            phase=PHASE,
            resource=str(directory),
            hint=_REBUILD,
        )
    for file in manifest.files:
        _check(directory / file.name, file, verify)
    initramfs = manifest.initramfs
    return GuestImage(
        version=manifest.version,
        protocol=manifest.protocol,
        kernel=directory / manifest.kernel.name,
        initramfs=None if initramfs is None else directory / initramfs.name,
        rootfs=directory / manifest.rootfs.name,
        cmdline=manifest.cmdline,
        kernel_release=manifest.kernel_release,
    )


def _check(path: Path, expected: ImageFile, verify: bool) -> None:
    try:
        size = path.stat().st_size
        digest = describe(path).sha256 if verify and size == expected.size_bytes else expected.sha256
    except OSError as e:
        raise VmrtError(f"cannot read it: {e.strerror}", phase=PHASE, resource=str(path), hint=_REBUILD) from e
    if size != expected.size_bytes:
        raise VmrtError(
            f"it has {size} octets, the manifest says {expected.size_bytes}",
            phase=PHASE,
            resource=str(path),
            hint=_REBUILD,
        )
    if digest != expected.sha256:
        raise VmrtError("its content is not what was built", phase=PHASE, resource=str(path), hint=_REBUILD)


def point_current(output: Path, version: str) -> None:
    """Make `version` the current one, atomically."""
    staged = output / f".{CURRENT}.{os.getpid()}"
    staged.unlink(missing_ok=True)
    staged.symlink_to(version)
    staged.replace(output / CURRENT)


@contextlib.contextmanager
def hold(image: GuestImage) -> Iterator[None]:
    """Keep `prune` off this image, for as long as VMs may be booted from it. The lock dies with the process."""
    with (image.rootfs.parent / FILE).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def prune(output: Path) -> list[str]:
    """Remove the versions that are neither current nor held; return their names.

    VMs that run from a removed version go on: QEMU has its files open.
    """
    current = directory_of(output).name
    removed = []
    for directory in sorted(output.iterdir()):
        if directory.is_symlink() or directory.name == current or not (directory / FILE).is_file():
            continue
        with (directory / FILE).open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(directory)
            removed.append(directory.name)
    return removed
