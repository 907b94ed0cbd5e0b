"""Manifests, indexes and configurations: JSON from a registry or archive, checked and made into our types. Pure.

Both families are read: OCI (image-spec, manifest.md, image-index.md, config.md) and Docker's schema 2 (distribution,
"Image Manifest Version 2, Schema 2"), which differ in media types only. Schema 1 is refused by name.
"""

from __future__ import annotations

import platform as host_platform
from collections.abc import Sequence

import msgspec

from vmrt.errors import ImageError
from vmrt.images.reference import is_digest
from vmrt.model import ImageConfig

MANIFEST_LIMIT_BYTES = 4 << 20
CONFIG_LIMIT_BYTES = 8 << 20
# overlayfs takes at most 500 lower layers (fs/overlayfs, OVL_MAX_STACK); one of them may be a correction (inherit.py).
LAYER_LIMIT = 499

_ARCHITECTURES = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "armv7l": "arm",
    "ppc64le": "ppc64le",
    "s390x": "s390x",
    "riscv64": "riscv64",
}
# The variants a plain host of an architecture can run, best first (image-spec, image-index.md, "Platform Variants").
_VARIANTS = {"amd64": ("", "v1"), "arm64": ("v8", ""), "arm": ("v7", "v6", "")}


def host_architecture() -> str:
    """Return this machine's architecture by Go's name."""
    machine = host_platform.machine()
    return _ARCHITECTURES.get(machine, machine)


class Platform(msgspec.Struct, frozen=True):
    """What a manifest in an index is for."""

    architecture: str = ""
    os: str = ""
    variant: str = ""


class Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    """A pointer to a blob (image-spec, descriptor.md)."""

    digest: str
    size: int
    media_type: str = ""
    platform: Platform | None = None
    annotations: dict[str, str] | None = None


class _Document(msgspec.Struct, rename="camel"):
    schema_version: int = 2
    media_type: str = ""
    config: Descriptor | None = None
    layers: list[Descriptor] | None = None
    manifests: list[Descriptor] | None = None


class Manifest(msgspec.Struct, frozen=True):
    """One image's manifest."""

    config: Descriptor
    layers: tuple[Descriptor, ...]


class Index(msgspec.Struct, frozen=True):
    """A list of manifests."""

    manifests: tuple[Descriptor, ...]


def parse(data: bytes, resource: str) -> Manifest | Index:
    """Read a manifest or an index. Raises `ImageError` naming `resource`."""
    try:
        document = msgspec.json.decode(data, type=_Document)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise ImageError(f"malformed manifest: {e}", phase="manifest", resource=resource) from e
    if document.schema_version != 2:
        raise ImageError(
            f"manifests of schema {document.schema_version} are not supported",
            phase="manifest",
            resource=resource,
            hint="push the image again with a current tool",
        )
    if document.manifests is not None:
        if document.layers is not None or document.config is not None:
            raise ImageError("the manifest is an index and an image at once", phase="manifest", resource=resource)
        _check(document.manifests, resource)
        return Index(tuple(document.manifests))
    if document.config is None or document.layers is None:
        raise ImageError("the manifest names no configuration or no layers", phase="manifest", resource=resource)
    _check([document.config, *document.layers], resource)
    if len(document.layers) > LAYER_LIMIT:
        raise ImageError(f"the image has more than {LAYER_LIMIT} layers", phase="manifest", resource=resource)
    return Manifest(document.config, tuple(document.layers))


def _check(descriptors: Sequence[Descriptor], resource: str) -> None:
    for descriptor in descriptors:
        if not is_digest(descriptor.digest) or descriptor.size < 0:
            raise ImageError(
                f"the manifest holds a malformed descriptor {descriptor.digest[:80]!r}",
                phase="manifest",
                resource=resource,
                hint="digests must be sha256",
            )


def choose(index: Index, resource: str) -> Descriptor:
    """Return the manifest of an index that is for this machine; `ImageError` says what there is instead."""
    architecture = host_architecture()
    variants = _VARIANTS.get(architecture, ("",))
    candidates = [
        (variants.index(p.variant), position)
        for position, descriptor in enumerate(index.manifests)
        if (p := descriptor.platform) is not None
        and p.os == "linux"
        and p.architecture == architecture
        and p.variant in variants
    ]
    if candidates:
        return index.manifests[min(candidates)[1]]
    # An index of a single image without a platform is what OCI layouts on disk usually have.
    plain = [d for d in index.manifests if d.platform is None]
    if len(plain) == 1 and len(index.manifests) == 1:
        return plain[0]
    offered = sorted({f"{p.os}/{p.architecture}" for d in index.manifests if (p := d.platform) and p.os != "unknown"})
    raise ImageError(
        f"no image for linux/{architecture}", phase="manifest", resource=resource, hint=f"it has {', '.join(offered)}"
    )


class _RunConfig(msgspec.Struct, rename="pascal"):
    # Docker writes null where a list or map is empty.
    entrypoint: list[str] | None = None
    cmd: list[str] | None = None
    env: list[str] | None = None
    working_dir: str | None = None
    user: str | None = None
    stop_signal: str | None = None
    labels: dict[str, str] | None = None
    volumes: dict[str, object] | None = None


class _RootFs(msgspec.Struct):
    type: str = "layers"
    diff_ids: list[str] | None = None


class _Configuration(msgspec.Struct):
    architecture: str = ""
    os: str = ""
    config: _RunConfig | None = None
    rootfs: _RootFs | None = None


def parse_config(data: bytes, resource: str) -> tuple[ImageConfig, tuple[str, ...]]:
    """Read an image's configuration; return its run-time part and its diff IDs, base first."""
    try:
        document = msgspec.json.decode(data, type=_Configuration)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise ImageError(f"malformed image configuration: {e}", phase="configuration", resource=resource) from e
    if document.rootfs is None or document.rootfs.type != "layers":
        raise ImageError("the configuration names no layers", phase="configuration", resource=resource)
    host = host_architecture()
    if document.os not in ("", "linux") or document.architecture not in ("", host):
        raise ImageError(
            f"the image is for {document.os or 'linux'}/{document.architecture}, this machine is linux/{host}",
            phase="configuration",
            resource=resource,
        )
    diff_ids = tuple(document.rootfs.diff_ids or ())
    for diff_id in diff_ids:
        if not is_digest(diff_id):
            raise ImageError(f"malformed diff ID {diff_id[:80]!r}", phase="configuration", resource=resource)
    run = document.config or _RunConfig()
    return (
        ImageConfig(
            entrypoint=tuple(run.entrypoint or ()),
            cmd=tuple(run.cmd or ()),
            env=tuple(run.env or ()),
            working_dir=run.working_dir or "",
            user=run.user or "",
            stop_signal=run.stop_signal or "",
            labels=run.labels or {},
            volumes=tuple(sorted(run.volumes or {})),
        ),
        diff_ids,
    )
