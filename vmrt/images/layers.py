"""The layer files of a store: each made once, named by its diff ID, and held while somebody works with it.

A correction (inherit.py) is a layer file like any other, but named by its own digest.

A file is under its name only when it is whole, verified and synced. Records are changed by the event loop's thread
only; conversions run in the executor's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vmrt.errors import ImageError
from vmrt.images.blob import Blob, convert
from vmrt.images.layer import disk_error, write_correction
from vmrt.images.records import LayerRecord, Records


class Layers:
    """The directory of layer images."""

    def __init__(self, directory: Path, staging: Path, records: Records, executor: ThreadPoolExecutor) -> None:
        self.directory = directory
        self._staging = staging
        self._records = records
        self._executor = executor
        self._held: Counter[str] = Counter()
        self._blob_locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    def path(self, diff_id: str) -> Path:
        """Return where a layer's image is or would be."""
        return self.directory / f"{diff_id.removeprefix('sha256:')}.erofs"

    def missing(self) -> list[str]:
        """Return the recorded layers whose files are gone."""
        present = {path.name for path in self.directory.iterdir()}
        return [diff_id for diff_id in self._records.layers if self.path(diff_id).name not in present]

    def sweep(self, needed: set[str]) -> None:
        """Delete the recorded layers that are neither needed nor held."""
        gone = [d for d in self._records.layers if d not in needed and d not in self._held]
        if gone:
            self._records.drop_layers(gone)
            for diff_id in gone:
                self._discard(self.path(diff_id))

    def sweep_unrecorded(self) -> None:
        """Delete files that a crash left without a record."""
        for path in self.directory.iterdir():
            diff_id = f"sha256:{path.stem}"
            if diff_id not in self._records.layers and diff_id not in self._held:
                self._discard(path)

    @contextlib.contextmanager
    def work(self, directory: Path, name: str) -> Iterator[Work]:
        """Yield a sink for one pull or load; what it touches is held until the end. `directory` is private to it."""
        work = Work(self, directory, name)
        try:
            yield work
        finally:
            self._held.subtract(work.held)
            self._held += Counter()  # drops what is zero

    def _discard(self, path: Path) -> None:
        """Take a file out of the store at once, and delete it in a thread: large files take their time."""
        away = self._staging / f"gone-{secrets.token_hex(8)}"
        with contextlib.suppress(FileNotFoundError):
            path.rename(away)
            self._executor.submit(away.unlink, missing_ok=True)

    def _known(self, blob_digest: str) -> str | None:
        return self._records.blobs.get(blob_digest)

    async def _convert(self, blob: Blob, blob_digest: str, work: Work, progress: list[int]) -> str:
        def count(octets: int) -> None:
            progress[0] += octets

        # Two pulls that share a layer convert it once.
        lock = self._blob_locks.setdefault(blob_digest or secrets.token_hex(8), asyncio.Lock())
        async with lock:
            if (diff_id := work.known(blob_digest)) is not None:
                return diff_id
            image = work.directory / f"{secrets.token_hex(8)}.erofs"
            done = await convert(blob, image, self._executor, name=work.name, progress=count)
            if blob_digest and done.blob_digest != blob_digest:
                raise ImageError(
                    f"a layer has the digest {done.blob_digest} instead of {blob_digest}",
                    phase="verify",
                    resource=work.name,
                )
            record = LayerRecord(done.diff_id, done.size_bytes, done.opaque_root)
            await self._admit(image, record, blob_digest or done.blob_digest, work)
            return done.diff_id

    async def _admit(self, image: Path, record: LayerRecord, blob_digest: str, work: Work) -> None:
        """Move a whole and synced file to its name, and record it."""
        self._hold([record.diff_id], work)
        try:
            os.rename(image, self.path(record.diff_id))  # noqa: PTH104 - pathlib's form is not for async functions
            await asyncio.get_running_loop().run_in_executor(self._executor, _fsync_directory, self.directory)
        except OSError as e:
            raise disk_error(e, work.name) from e
        self._records.put_layer(record, blob_digest)

    async def _correct(self, diff_ids: Sequence[str], work: Work) -> str:
        image = work.directory / f"{secrets.token_hex(8)}.erofs"
        paths = [self.path(diff_id) for diff_id in diff_ids]
        stop = threading.Event()
        running = asyncio.get_running_loop().run_in_executor(
            self._executor, write_correction, paths, image, work.name, stop
        )
        try:
            made = await asyncio.shield(running)
        except asyncio.CancelledError:
            # The directory it writes to is about to go.
            stop.set()
            await asyncio.wait([running])
            raise
        if made is None:
            return ""
        name, size_bytes = made
        if name in self._records.layers:
            self._hold([name], work)
        else:
            await self._admit(image, LayerRecord(name, size_bytes, opaque_root=False), "", work)
        return name

    def _hold(self, diff_ids: Iterable[str], work: Work) -> None:
        for diff_id in diff_ids:
            work.held[diff_id] += 1
            self._held[diff_id] += 1


class Work:
    """The layers of one running pull or load. Implements `vmrt.images.pull.LayerSink`."""

    def __init__(self, layers: Layers, directory: Path, name: str) -> None:
        self._layers = layers
        self.directory = directory
        self.name = name
        self.held: Counter[str] = Counter()

    def known(self, blob_digest: str) -> str | None:
        """Return the diff ID that this blob gave earlier, and hold that layer."""
        diff_id = self._layers._known(blob_digest)
        if diff_id is not None:
            self._layers._hold([diff_id], self)
        return diff_id

    async def add(self, blob: Blob, blob_digest: str, progress: list[int]) -> str:
        """Convert a blob unless that was done already; return its diff ID."""
        return await self._layers._convert(blob, blob_digest, self, progress)

    async def correct(self, diff_ids: Sequence[str]) -> str:
        """Return the layer to put on top of these (base first, held by this work), made if need be; "" for none."""
        return await self._layers._correct(diff_ids, self)


def _fsync_directory(path: Path) -> None:
    """Bring renames in a directory to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
