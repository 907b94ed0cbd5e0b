"""One pull: from a reference on a registry to converted layers and a verified configuration.

Layers are converted while others still come down. Nothing here touches the store's records but through `LayerSink`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vmrt.errors import ImageError
from vmrt.images import manifest as manifests
from vmrt.images.blob import Blob, digest
from vmrt.images.manifest import Descriptor, Manifest
from vmrt.images.skopeo import Session

POLL_S = 0.03

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total)."""


class LayerSink(Protocol):
    """Where layers go."""

    def known(self, blob_digest: str) -> str | None:
        """Return the diff ID that this blob gave earlier, and keep that layer until the work is over."""
        ...

    async def add(self, blob: Blob, blob_digest: str, progress: list[int]) -> str:
        """Convert a blob of this digest ("" when it has none) and return its diff ID. `progress[0]` counts octets."""
        ...


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a pull or an archive gave: everything is verified and every layer is in the store."""

    image_id: str
    config: bytes
    diff_ids: tuple[str, ...]


async def fetch(session: Session, directory: Path, sink: LayerSink, report: Progress, name: str) -> tuple[Fetched, str]:
    """Fetch what the session's reference names; return it and the digest the registry knows it by.

    `directory` takes the blobs and is the caller's to remove, whatever happens.
    """
    top = await session.manifest()
    chosen, chosen_digest = manifests.parse(top, name), digest(top)
    if not isinstance(chosen, Manifest):
        chosen_digest = manifests.choose(chosen, name).digest
        chosen = manifests.parse(await session.manifest(chosen_digest), name)
        if not isinstance(chosen, Manifest):
            raise ImageError("an index inside an index", phase="manifest", resource=name)
    try:
        async with asyncio.TaskGroup() as group:
            config_task = group.create_task(session.config(chosen_digest))
            layers_task = group.create_task(_layers(session, chosen_digest, chosen, directory, sink, report, name))
    except BaseExceptionGroup as errors:
        raise first(errors) from None
    return verify(config_task.result(), chosen.config.digest, layers_task.result(), name), digest(top)


def first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the one error of a task group that a caller should see: those that follow are cancellations' echoes."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def verify(config: bytes, config_digest: str, diff_ids: list[str], name: str) -> Fetched:
    """Check a configuration against its digest ("": none is known) and the layers against the configuration."""
    image_id = digest(config)
    if config_digest and image_id != config_digest:
        raise ImageError(
            f"the configuration has the digest {image_id} instead of {config_digest}", phase="verify", resource=name
        )
    _, expected = manifests.parse_config(config, name)
    if len(expected) != len(diff_ids):
        raise ImageError(
            f"the configuration names {len(expected)} layers, the manifest {len(diff_ids)}",
            phase="verify",
            resource=name,
        )
    for number, (want, got) in enumerate(zip(expected, diff_ids, strict=True), 1):
        if want != got:
            raise ImageError(f"layer {number} has the diff ID {got} instead of {want}", phase="verify", resource=name)
    return Fetched(image_id, config, expected)


async def _layers(
    session: Session,
    manifest_digest: str,
    manifest: Manifest,
    directory: Path,
    sink: LayerSink,
    report: Progress,
    name: str,
) -> list[str]:
    blobs = directory / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    diff_ids: dict[str, str] = {}
    wanted: dict[str, Descriptor] = {}
    for descriptor in manifest.layers:
        diff_id = sink.known(descriptor.digest)
        if diff_id is None:
            wanted[descriptor.digest] = descriptor
            continue
        diff_ids[descriptor.digest] = diff_id
        placeholder = blobs / descriptor.digest.removeprefix("sha256:")
        placeholder.touch()
        with placeholder.open("r+b") as file:
            file.truncate(descriptor.size)
    total = sum(descriptor.size for descriptor in wanted.values())
    # One counter for each layer: conversions count in threads of their own.
    converted = {blob_digest: [0] for blob_digest in wanted}

    async def convert(descriptor: Descriptor, path: Path) -> None:
        size = (await asyncio.to_thread(path.stat)).st_size
        if size != descriptor.size:
            raise ImageError(f"a layer has {size} bytes instead of {descriptor.size}", phase="verify", resource=name)
        diff_ids[descriptor.digest] = await sink.add(
            Blob(path, 0, size), descriptor.digest, converted[descriptor.digest]
        )

    async with asyncio.TaskGroup() as group:
        copying = group.create_task(session.copy(manifest_digest, blobs.parent))
        waiting, conversions = dict(wanted), set[asyncio.Task[None]]()
        while True:
            ended = copying.done()
            for blob_digest, descriptor in list(waiting.items()):
                path = blobs / blob_digest.removeprefix("sha256:")
                if path.exists():
                    del waiting[blob_digest]
                    conversions.add(group.create_task(convert(descriptor, path)))
            report("download", total if ended else min(total, _downloaded(directory, wanted)), total)
            report("convert", sum(count for (count,) in converted.values()), total)
            if ended and (waiting or all(task.done() for task in conversions)):
                break
            await asyncio.wait(
                {copying, *conversions} - {t for t in (copying, *conversions) if t.done()}, timeout=POLL_S
            )
        if waiting:
            raise ImageError(
                f"the registry did not give the layer {next(iter(waiting))}", phase="fetch layers", resource=name
            )
    return [diff_ids[descriptor.digest] for descriptor in manifest.layers]


def _downloaded(directory: Path, wanted: dict[str, Descriptor]) -> int:
    """Count what is there of the wanted blobs: whole ones by name, the others as skopeo's temporary files."""
    done = sum(d.size for d in wanted.values() if (directory / "blobs/sha256" / d.digest[7:]).exists())
    for path in (directory / "layout").glob("oci-put-blob*"):
        try:
            done += path.stat().st_size
        except FileNotFoundError:
            continue
    return done
