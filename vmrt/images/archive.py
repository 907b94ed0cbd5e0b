"""Images in files: OCI image layouts (directory or tar; image-spec, image-layout.md) and docker archives (docker save).

An archive is only ever looked into: its members are found by name in an index, or as plain files of a directory, and no
name in it makes us open anything else. A tar inside gzip is unpacked into the caller's private directory first.
"""

from __future__ import annotations

import contextlib
import posixpath
import stat
import tarfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from vmrt.errors import ImageError, NotFoundError
from vmrt.images import manifest as manifests
from vmrt.images.blob import Blob, Compression, LayerStream, digest
from vmrt.images.layer import disk_error
from vmrt.images.manifest import CONFIG_LIMIT_BYTES, MANIFEST_LIMIT_BYTES, Descriptor, Index, Manifest

MEMBER_LIMIT = 200_000
_REF_NAME = "org.opencontainers.image.ref.name"
# Docker and containerd write the whole name here, and only the tag into ref.name.
_FULL_NAME = "io.containerd.image.name"
_ATTESTATION = "vnd.docker.reference.type"


@dataclass(frozen=True, slots=True)
class ArchivedImage:
    """One image of an archive. `layers` are (blob, digest or ""), base first; `names` as the archive has them."""

    config: bytes
    config_digest: str
    layers: tuple[tuple[Blob, str], ...]
    names: tuple[str, ...]


class _Files(Protocol):
    def find(self, name: str) -> Blob | None: ...


class _Layout:
    """The plain files of a directory; symbolic links are not followed, neither to files nor to directories."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def find(self, name: str) -> Blob | None:
        path = self._path
        parts = name.split("/")
        try:
            for number, part in enumerate(parts, 1):
                path = path / part
                status = path.lstat()
                if stat.S_ISLNK(status.st_mode):
                    raise ImageError(f"{name} is a symbolic link", phase="read layout", resource=str(self._path))
                wanted = stat.S_ISREG if number == len(parts) else stat.S_ISDIR
                if not wanted(status.st_mode):
                    raise ImageError(f"{name} is no plain file", phase="read layout", resource=str(self._path))
        except FileNotFoundError:
            return None
        except OSError as e:
            raise ImageError(f"cannot read {name}: {e.strerror}", phase="read layout", resource=str(self._path)) from e
        return Blob(path, 0, status.st_size)


class _Archive:
    """The members of an uncompressed tar file, by name. Links inside it are looked up among its members."""

    def __init__(self, path: Path) -> None:
        self._blobs: dict[str, Blob] = {}
        self._links: dict[str, str] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for count, member in enumerate(tar):
                    if count >= MEMBER_LIMIT:
                        raise ImageError(f"the archive has more than {MEMBER_LIMIT} members", phase="read archive")
                    name = posixpath.normpath(member.name)
                    if member.issym():
                        self._links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
                    elif member.islnk():
                        self._links[name] = posixpath.normpath(member.linkname)
                    elif member.isreg() and not member.issparse():
                        self._blobs[name] = Blob(path, member.offset_data, member.size)
        except (tarfile.TarError, OSError, ValueError) as e:
            raise ImageError(f"not a tar archive: {e}", phase="read archive", resource=str(path)) from e

    def find(self, name: str) -> Blob | None:
        name = posixpath.normpath(name)
        return self._blobs.get(name) or self._blobs.get(self._links.get(name, ""))


def read(path: Path, directory: Path) -> list[ArchivedImage]:
    """Return the images that `path` holds for this machine. Blocking.

    `directory` is private, on the store's file system, and must live as long as the blobs are used.
    Raises `ImageError` for what is neither kind, or not whole.
    """
    try:
        is_directory = stat.S_ISDIR(path.stat().st_mode)
    except OSError as e:
        raise NotFoundError(f"cannot read {path}: {e.strerror}", phase="load") from e
    # The one symbolic link that is followed is the operator's own, to the archive.
    files: _Files = _Layout(path) if is_directory else _Archive(_plain_tar(path.resolve(), directory))
    if files.find("oci-layout") and files.find("index.json"):
        return _oci(files, path)
    if files.find("manifest.json"):
        return _docker(files, path)
    raise ImageError(
        "neither an OCI image layout nor a docker archive", phase="load", resource=str(path), hint="no index.json in it"
    )


def _plain_tar(path: Path, directory: Path) -> Path:
    blob = Blob(path, 0, path.stat().st_size)
    match blob.compression():
        case Compression.NONE:
            return path
        case Compression.ZSTD:
            raise ImageError(
                "zstd archives are not read", phase="load", resource=str(path), hint="unpack it with zstd -d"
            )
        case Compression.GZIP:
            target = directory / "archive.tar"
            try:
                stream = iter(LayerStream(blob, Compression.GZIP, threading.Event()))
                with target.open("xb") as out, contextlib.closing(stream) as chunks:
                    for chunk in chunks:
                        out.write(chunk)
            except OSError as e:
                raise disk_error(e, str(path)) from e
            return target


# --- OCI layouts ------------------------------------------------------------------------------------------------------


def _oci(files: _Files, path: Path) -> list[ArchivedImage]:
    top = manifests.parse(_read(files, "index.json", MANIFEST_LIMIT_BYTES, path), str(path))
    if not isinstance(top, Index):
        raise ImageError("index.json is no index", phase="load", resource=str(path))
    names: dict[str, list[str]] = {}
    order: dict[str, Descriptor] = {}
    for descriptor in top.manifests:
        platform, annotations = descriptor.platform, descriptor.annotations or {}
        if _ATTESTATION in annotations:
            continue
        if platform and (platform.os, platform.architecture) != ("linux", manifests.host_architecture()):
            continue
        order.setdefault(descriptor.digest, descriptor)
        name = annotations.get(_FULL_NAME) or annotations.get(_REF_NAME)
        if name:
            names.setdefault(descriptor.digest, []).append(name)
    if not order:
        raise ImageError(
            f"the layout holds no image for linux/{manifests.host_architecture()}", phase="load", resource=str(path)
        )
    return [_oci_image(files, descriptor, names.get(key, []), path) for key, descriptor in order.items()]


def _oci_image(files: _Files, descriptor: Descriptor, names: list[str], path: Path) -> ArchivedImage:
    document = manifests.parse(_verified(files, descriptor, MANIFEST_LIMIT_BYTES, path), str(path))
    if isinstance(document, Index):
        chosen = manifests.choose(document, str(path))
        document = manifests.parse(_verified(files, chosen, MANIFEST_LIMIT_BYTES, path), str(path))
    if not isinstance(document, Manifest):
        raise ImageError("an index inside an index inside the layout's", phase="load", resource=str(path))
    config = _verified(files, document.config, CONFIG_LIMIT_BYTES, path)
    layers = []
    for layer in document.layers:
        blob = _blob(files, layer.digest, path)
        if blob.size != layer.size:
            raise ImageError(f"{layer.digest} has {blob.size} bytes instead of {layer.size}", resource=str(path))
        layers.append((blob, layer.digest))
    return ArchivedImage(config, document.config.digest, tuple(layers), tuple(names))


def _blob(files: _Files, name: str, path: Path) -> Blob:
    blob = files.find(f"blobs/{name.replace(':', '/')}")
    if blob is None:
        raise ImageError(f"the blob {name} is missing", phase="load", resource=str(path))
    return blob


def _verified(files: _Files, descriptor: Descriptor, limit: int, path: Path) -> bytes:
    data = _blob(files, descriptor.digest, path).read(limit)
    if digest(data) != descriptor.digest:
        raise ImageError(
            f"the blob {descriptor.digest} has the digest {digest(data)}", phase="verify", resource=str(path)
        )
    return data


# --- docker archives --------------------------------------------------------------------------------------------------


class _DockerImage(msgspec.Struct, rename="pascal"):
    config: str
    layers: list[str]
    repo_tags: list[str] | None = None


def _docker(files: _Files, path: Path) -> list[ArchivedImage]:
    data = _read(files, "manifest.json", MANIFEST_LIMIT_BYTES, path)
    try:
        documents = msgspec.json.decode(data, type=list[_DockerImage])
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise ImageError(f"malformed manifest.json: {e}", phase="load", resource=str(path)) from e
    if not documents:
        raise ImageError("the archive holds no image", phase="load", resource=str(path))
    images = []
    for document in documents:
        if len(document.layers) > manifests.LAYER_LIMIT:
            raise ImageError(f"more than {manifests.LAYER_LIMIT} layers", phase="load", resource=str(path))
        layers = []
        for name in document.layers:
            blob = files.find(name) if _inside(name) else None
            if blob is None:
                raise ImageError(f"the layer {name!r} is not in the archive", phase="load", resource=str(path))
            layers.append((blob, ""))
        if not _inside(document.config):
            raise ImageError(f"the configuration {document.config!r} is not in the archive", resource=str(path))
        config = _read(files, document.config, CONFIG_LIMIT_BYTES, path)
        # docker save names the configuration by its digest; the image's id is computed, never believed.
        stem = posixpath.basename(document.config).removesuffix(".json")
        named = f"sha256:{stem}" if len(stem) == 64 else ""
        images.append(ArchivedImage(config, named, tuple(layers), tuple(document.repo_tags or ())))
    return images


def _inside(name: str) -> bool:
    return bool(name) and not name.startswith("/") and ".." not in name.split("/")


def _read(files: _Files, name: str, limit: int, path: Path) -> bytes:
    blob = files.find(name)
    if blob is None:
        raise ImageError(f"{name!r} is missing", phase="load", resource=str(path))
    return blob.read(limit)
