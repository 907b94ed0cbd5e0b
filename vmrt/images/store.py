"""The image store: names, images, and one read-only EROFS image per layer, all under one directory.

    <root>/images.db            the records (records.py)
    <root>/layers/<hex>.erofs   one per diff ID or correction, mode 0444, there only when whole and synced
    <root>/staging/<random>/    private to one pull or load, removed with it; what is left at `open` is removed then

Rules:
- Everything that `get` and `list` say comes from memory, and every change of the records is made by the event loop's
  thread between two awaits; so there are no locks but the ones that keep work from being done twice.
- A layer's file is deleted when no image names it, nobody retains it, and no running pull or load holds it. Who retains
  what is not recorded: the pods say it again after a restart, and only `collect` (called once they have) deletes first.
- A blob once converted is known by its digest and is neither fetched nor converted again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from vmrt.config import ImageConfig
from vmrt.errors import ConfigError, DeadlineError, ImageError, InvalidArgumentError, NotFoundError, UnavailableError
from vmrt.images import archive, bearer, manifest, pull
from vmrt.images.layer import disk_error
from vmrt.images.layers import Layers, Work
from vmrt.images.pull import Fetched, Progress
from vmrt.images.records import ImageRecord, Records
from vmrt.images.reference import Reference, id_prefix
from vmrt.images.reference import parse as parse_reference
from vmrt.images.skopeo import Session, bearer_token
from vmrt.model import Image, LayerImage, RegistryAuth

log = logging.getLogger(__name__)

PROGRESS_S = 0.1
T = TypeVar("T")


class _Flight:
    """One running pull and those who wait for it."""

    def __init__(self) -> None:
        self.task: asyncio.Task[str] | None = None
        self.waiters = 0
        self.listeners: list[Progress] = []

    def report(self, what: str, done: int, total: int) -> None:
        for listener in self.listeners:
            listener(what, done, total)


class ImageStore:
    """The images under one directory. Implements `vmrt.pods.drivers.ImageStore`."""

    def __init__(self, root: Path, config: ImageConfig) -> None:
        self._root = root
        self._config = config
        self._pinned = frozenset(self._pin(name) for name in config.pinned)
        self._staging = root / "staging"
        self._records = Records(root / "images.db")
        self._executor = ThreadPoolExecutor(max(2, os.cpu_count() or 1), "image")
        self._layers = Layers(root / "layers", self._staging, self._records, self._executor)
        self._images: dict[str, Image] = {}
        self._names: dict[str, str] = {}
        self._retained: dict[str, set[str]] = {}
        self._flights: dict[tuple[str, RegistryAuth | None], _Flight] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._collecting = False
        self._closed = False

    # --- life --------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Read the records and remove what interrupted work left. Nothing that may be retained is deleted yet."""
        try:
            for directory in (self._root, self._layers.directory, self._staging):
                directory.mkdir(parents=True, exist_ok=True)
            self._staging.chmod(0o700)
            await self._in_thread(_empty, self._staging)
        except OSError as e:
            raise disk_error(e, str(self._root)) from e
        self._records.open()
        if gone := self._layers.missing():
            log.warning("image layers are missing on disk, their images are removed: %s", ", ".join(sorted(gone)))
            self._records.drop_layers(gone)
        # A broken image is a removed one: containers that were made of it may still retain it.
        self._change(
            [
                record
                if all(diff_id in self._records.layers for diff_id in record.stack)
                else msgspec.structs.replace(record, tags=frozenset(), digests=frozenset(), removed=True)
                for record in self._records.images.values()
            ]
        )

    async def close(self) -> None:
        """Cancel running pulls and loads, wait for them, and close the records."""
        self._closed = True
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await asyncio.to_thread(self._executor.shutdown)
        self._records.close()

    def collect(self) -> None:
        """Delete layers that nobody needs, from now on at once. Call it when all who retain have said so."""
        self._collecting = True
        self._layers.sweep_unrecorded()
        self._sweep()

    # --- asking ------------------------------------------------------------------------------------------------------

    def get(self, reference: str) -> Image | None:
        """Find by id, tag, digest, short name or unique id prefix, in this order; None when absent."""
        digits = id_prefix(reference)
        if digits is not None and len(digits) == 64:
            return self._images.get(f"sha256:{digits}")
        try:
            found = self._names.get(self._parse(reference).canonical)
        except InvalidArgumentError:
            if digits is None:
                raise
            found = None
        if found is None and digits is not None:
            matches = [image_id for image_id in self._images if image_id.startswith(f"sha256:{digits}")]
            found = matches[0] if len(matches) == 1 else None
        return None if found is None else self._images[found]

    def list(self, reference: str = "") -> Sequence[Image]:
        """Return all images (or the one that `reference` names), ordered by id."""
        if reference:
            image = self.get(reference)
            return [] if image is None else [image]
        return [image for _, image in sorted(self._images.items())]

    def configuration(self, image_id: str) -> str:
        """Return an image's whole configuration, the JSON as its registry or archive has it."""
        record = self._records.images.get(image_id)
        if record is None or record.removed:
            raise NotFoundError("no such image", resource=f"image {image_id}")
        return record.config

    async def usage(self) -> tuple[Path, int, int]:
        """Return (directory, octets on disk, inodes) of the store."""

        def measure() -> tuple[int, int]:
            used = inodes = 0
            for directory, names, files in os.walk(self._root):
                for name in (".", *names, *files) if directory == str(self._root) else (*names, *files):
                    with contextlib.suppress(FileNotFoundError):
                        status = Path(directory, name).lstat()
                        used += status.st_blocks * 512
                        inodes += 1
            return used, inodes

        used, inodes = await self._in_thread(measure)
        return self._root, used, inodes

    # --- changing ----------------------------------------------------------------------------------------------------

    async def pull(
        self, reference: str, auth: RegistryAuth | None = None, *, progress: Progress | None = None
    ) -> Image:
        """Fetch and convert, always asking the registry; see `vmrt.pods.drivers.ImageStore`.

        Concurrent pulls of one reference with the same credentials are one; it is cancelled when its last caller is.
        """
        self._check_open()
        wanted = self._parse(reference)
        key = (wanted.canonical, auth)
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = _Flight()
            flight.task = self._start(self._pull(wanted, auth, flight.report))
            flight.task.add_done_callback(lambda _, ended=flight: self._land(key, ended))  # type: ignore[misc]
        task = flight.task
        assert task is not None
        flight.waiters += 1
        if progress is not None:
            flight.listeners.append(progress)
        try:
            image_id = await asyncio.shield(task)
        except asyncio.CancelledError:
            if self._closed and task.done():
                raise UnavailableError("the image store is closing", phase="pull", resource=f"image {wanted}") from None
            raise
        finally:
            flight.waiters -= 1
            if progress is not None:
                flight.listeners.remove(progress)
            if not flight.waiters and not task.done():
                # A pull that comes now must not join one that is being cancelled.
                self._land(key, flight)
                task.cancel()
                await asyncio.wait([task])
        image = self._images.get(image_id)
        if image is None:
            raise ImageError("the image was removed while it was pulled", phase="pull", resource=f"image {wanted}")
        return image

    async def load(self, path: Path, *, tag: str = "", progress: Progress | None = None) -> Sequence[Image]:
        """Import every image for this machine that an archive holds; `tag` names it instead of the archive's names."""
        self._check_open()
        given = self._parse(tag) if tag else None
        if given is not None and given.digest:
            raise InvalidArgumentError(f"a loaded image cannot be named by the digest {given.digest}")
        task = self._start(self._load(path, given, progress))
        try:
            ids = await asyncio.shield(task)
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait([task])
            raise
        return [image for image_id in ids if (image := self._images.get(image_id)) is not None]

    async def remove(self, reference: str) -> None:
        """Remove the image with all its names; absent is no error."""
        self._check_open()
        image = self.get(reference)
        if image is None:
            return
        record = self._records.images[image.id]
        self._change([msgspec.structs.replace(record, tags=frozenset(), digests=frozenset(), removed=True)])
        self._sweep()

    def retain(self, image_id: str, user: str) -> None:
        """Keep the image's layers on disk for `user`, also those of a removed image. Repeating it is no error."""
        if image_id not in self._records.images:
            raise NotFoundError("no such image", phase="retain", resource=f"image {image_id}")
        self._retained.setdefault(user, set()).add(image_id)

    def release(self, user: str) -> None:
        """Undo all that `user` retains."""
        if self._retained.pop(user, None) is not None:
            self._sweep()

    # --- work --------------------------------------------------------------------------------------------------------

    async def _pull(self, wanted: Reference, auth: RegistryAuth | None, report: Progress) -> str:
        timeout_s = self._config.pull_timeout_s or None
        name = f"image {wanted}"
        try:
            async with asyncio.timeout(timeout_s), self._workspace() as directory, self._door(wanted, auth) as door:
                with self._hold(directory, name) as work:
                    session = Session(wanted, auth, self._config, directory, door)
                    fetched, digest = await pull.fetch(session, directory, work, report, name)
                    tags = frozenset() if wanted.digest else frozenset((wanted.canonical,))
                    correction = await work.correct(fetched.diff_ids)
                    self._admit(fetched, correction, tags, frozenset((wanted.at(digest),)))
        except TimeoutError as e:
            raise DeadlineError(f"not finished within {timeout_s:g} s", phase="pull", resource=name) from e
        except OSError as e:
            raise disk_error(e, name) from e
        log.info("pulled %s: %s", wanted, fetched.image_id)
        return fetched.image_id

    async def _load(self, path: Path, given: Reference | None, progress: Progress | None) -> Sequence[str]:
        loaded = []
        async with self._workspace() as directory:
            images = await self._in_thread(archive.read, path, directory)
            if given is not None and len(images) > 1:
                raise InvalidArgumentError(f"{path} holds {len(images)} images, one tag cannot name them")
            names = [
                frozenset((given.canonical,))
                if given is not None
                else frozenset(self._parse(name).canonical for name in image.names)
                for image in images
            ]
            for image, tags in zip(images, names, strict=True):
                with self._hold(directory, str(path)) as work:
                    total, done = sum(blob.size for blob, _ in image.layers), [0]
                    ticker = self._start(_tick(progress, done, total)) if progress is not None else None
                    try:
                        diff_ids = [
                            work.known(blob_digest) or await work.add(blob, blob_digest, done)
                            for blob, blob_digest in image.layers
                        ]
                    finally:
                        if ticker is not None:
                            ticker.cancel()
                    if progress is not None:
                        progress("convert", total, total)
                    fetched = pull.verify(image.config, image.config_digest, diff_ids, str(path))
                    self._admit(fetched, await work.correct(fetched.diff_ids), tags, frozenset())
                    loaded.append(fetched.image_id)
                    log.info("loaded %s from %s: %s", ", ".join(sorted(tags)) or "an unnamed image", path, loaded[-1])
        return loaded

    @contextlib.asynccontextmanager
    async def _workspace(self) -> AsyncIterator[Path]:
        directory = self._staging / secrets.token_hex(8)
        try:
            directory.mkdir(mode=0o700)
        except OSError as e:
            raise disk_error(e, str(directory)) from e
        try:
            yield directory
        finally:
            # Not cancellable: credentials are in there.
            await asyncio.shield(self._in_thread(lambda: shutil.rmtree(directory, ignore_errors=True)))

    @contextlib.asynccontextmanager
    async def _door(self, wanted: Reference, auth: RegistryAuth | None) -> AsyncIterator[bearer.Door | None]:
        """Open a door for skopeo where the credentials are a bearer token (bearer.py)."""
        token = bearer_token(auth, wanted.registry)
        if not token:
            yield None
            return
        plain = bearer.insecure(self._config.registries_conf, wanted.name)
        async with bearer.opened(wanted.registry, token, plain=plain) as door:
            yield door

    @contextlib.contextmanager
    def _hold(self, directory: Path, name: str) -> Iterator[Work]:
        try:
            with self._layers.work(directory, name) as work:
                yield work
        finally:
            self._sweep()

    def _admit(self, fetched: Fetched, correction: str, tags: frozenset[str], digests: frozenset[str]) -> None:
        """Record an image under its names; a tag leaves the image that had it."""
        changed = []
        for record in self._records.images.values():
            if record.id == fetched.image_id or not record.tags & tags:
                continue
            rest = record.tags - tags
            # Without any name nobody can ask for it any more.
            removed = record.removed or not (rest or record.digests)
            changed.append(msgspec.structs.replace(record, tags=rest, removed=removed))
        before = self._records.images.get(fetched.image_id)
        changed.append(
            ImageRecord(
                fetched.image_id,
                fetched.config.decode(),
                fetched.diff_ids,
                tags | (before.tags if before else frozenset()),
                digests | (before.digests if before else frozenset()),
                correction=correction,
            )
        )
        self._change(changed)

    def _change(self, changed: Sequence[ImageRecord]) -> None:
        """Write records and bring the answers of `get` and `list` up to date."""
        self._records.put_images(changed)
        for record in changed:
            if record.removed:
                self._images.pop(record.id, None)
            else:
                self._images[record.id] = self._view(record)
        self._names = {
            name: image.id for image in self._images.values() for name in (*image.repo_tags, *image.repo_digests)
        }

    def _view(self, record: ImageRecord) -> Image:
        config, _ = manifest.parse_config(record.config.encode(), record.id)
        layers = [self._records.layers[diff_id] for diff_id in record.stack]
        # What is below a layer whose root is opaque cannot be seen, and overlayfs would show it all the same.
        bottom = max((i for i, layer in enumerate(layers) if layer.opaque_root), default=0)
        # overlayfs takes no directory twice; the upper of two equal layers shows all that the lower one could.
        shown = {layer.diff_id: layer for layer in reversed(layers[bottom:])}
        return Image(
            id=record.id,
            repo_tags=tuple(sorted(record.tags)),
            repo_digests=tuple(sorted(record.digests)),
            size_bytes=sum(layer.size_bytes for layer in set(layers)) + len(record.config),
            config=config,
            layers=tuple(
                LayerImage(layer.diff_id, self._layers.path(layer.diff_id), layer.size_bytes)
                for layer in reversed(shown.values())
            ),
            pinned=not self._pinned.isdisjoint(record.tags | record.digests),
        )

    def _sweep(self) -> None:
        """Drop removed images that nobody retains, and layers that nothing needs."""
        if not self._collecting or self._closed:
            return
        retained = {image_id for images in self._retained.values() for image_id in images}
        dead = [record.id for record in self._records.images.values() if record.removed and record.id not in retained]
        if dead:
            self._records.put_images([], drop=dead)
        needed = {diff_id for record in self._records.images.values() for diff_id in record.stack}
        self._layers.sweep(needed)

    def _pin(self, name: str) -> str:
        try:
            return self._parse(name).canonical
        except InvalidArgumentError as e:
            raise ConfigError(f"images.pinned: {e.message}") from e

    def _parse(self, text: str) -> Reference:
        return parse_reference(text, self._config.default_registry)

    def _check_open(self) -> None:
        if self._closed:
            raise UnavailableError("the image store is closed")

    def _land(self, key: tuple[str, RegistryAuth | None], flight: _Flight) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]

    def _start(self, work: Coroutine[object, object, T]) -> asyncio.Task[T]:
        """Run work that `close` has to end."""
        task = asyncio.create_task(work)
        self._tasks.add(task)

        def ended(done: asyncio.Task[T]) -> None:
            self._tasks.discard(done)
            # Whoever waited may be gone; an error nobody asks for is no reason for a warning.
            if not done.cancelled():
                done.exception()

        task.add_done_callback(ended)
        return task

    async def _in_thread(self, work: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work, *arguments)


def _empty(directory: Path) -> None:
    for left in directory.iterdir():
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink()


async def _tick(progress: Progress, done: list[int], total: int) -> None:
    while True:
        progress("convert", done[0], total)
        await asyncio.sleep(PROGRESS_S)
