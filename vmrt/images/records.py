"""What the store knows, in SQLite (WAL) under its root: images, layers, and which blob gave which layer.

The tables are read once, by `Records.open`; after that memory answers and every change is written through in one
transaction. Not for use from more than one thread.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from vmrt.errors import ImageError

SCHEMA_VERSION = 2
_SCHEMA = """
CREATE TABLE image (id TEXT PRIMARY KEY, record BLOB NOT NULL) STRICT;
CREATE TABLE layer (diff_id TEXT PRIMARY KEY, size_bytes INTEGER NOT NULL, opaque_root INTEGER NOT NULL) STRICT;
CREATE TABLE blob (digest TEXT PRIMARY KEY, diff_id TEXT NOT NULL) STRICT;
"""
# Layers written under version 1 lack the marks of inherit.py: the next pull or load has to convert their blobs anew.
_FROM_VERSION_1 = "DELETE FROM blob;"


class ImageRecord(msgspec.Struct, frozen=True):
    """One image. `config` is its configuration as the registry has it; `removed` hides it while someone retains it.

    `correction` is the layer that goes on top of those of the image itself, "" for none (inherit.py).
    """

    id: str
    config: str
    diff_ids: tuple[str, ...]
    tags: frozenset[str] = frozenset()
    digests: frozenset[str] = frozenset()
    removed: bool = False
    correction: str = ""

    @property
    def stack(self) -> tuple[str, ...]:
        """Every layer that the image needs, base first."""
        return (*self.diff_ids, self.correction) if self.correction else self.diff_ids


class LayerRecord(msgspec.Struct, frozen=True):
    """One layer image: converted, and named by its diff ID; or a correction, named by the image's own digest."""

    diff_id: str
    size_bytes: int
    opaque_root: bool


class Records:
    """The records; `images`, `layers` and `blobs` are to be read only, changes go through the methods."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._database: sqlite3.Connection | None = None
        self.images: dict[str, ImageRecord] = {}
        self.layers: dict[str, LayerRecord] = {}
        self.blobs: dict[str, str] = {}

    def open(self) -> None:
        """Open or make the database and read it."""
        try:
            self._database = database = sqlite3.connect(self._path, isolation_level=None)
            database.execute("PRAGMA journal_mode=WAL")
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version == 0:
                database.executescript(f"BEGIN;{_SCHEMA}PRAGMA user_version={SCHEMA_VERSION};COMMIT;")
            elif version == 1:
                database.executescript(f"BEGIN;{_FROM_VERSION_1}PRAGMA user_version={SCHEMA_VERSION};COMMIT;")
            elif version != SCHEMA_VERSION:
                raise ImageError(
                    f"the image records have version {version}, this vmrt reads {SCHEMA_VERSION}",
                    phase="open records",
                    resource=str(self._path),
                    hint="they were written by another vmrt; remove the images directory to start anew",
                )
            for (record,) in database.execute("SELECT record FROM image"):
                image = msgspec.json.decode(record, type=ImageRecord)
                self.images[image.id] = image
            for diff_id, size_bytes, opaque_root in database.execute("SELECT * FROM layer"):
                self.layers[diff_id] = LayerRecord(diff_id, size_bytes, bool(opaque_root))
            self.blobs = dict(database.execute("SELECT * FROM blob"))
        except ImageError:
            self.close()
            raise
        except (sqlite3.Error, msgspec.DecodeError) as e:
            self.close()
            raise ImageError(
                f"cannot read the image records: {e}", phase="open records", resource=str(self._path)
            ) from e

    def close(self) -> None:
        """Close the database."""
        if self._database is not None:
            self._database.close()
            self._database = None

    def put_images(self, images: Iterable[ImageRecord], drop: Iterable[str] = ()) -> None:
        """Write images and drop others, all or none."""
        images, drop = list(images), list(drop)
        self._write(
            [("INSERT OR REPLACE INTO image VALUES (?, ?)", (i.id, msgspec.json.encode(i))) for i in images]
            + [("DELETE FROM image WHERE id = ?", (image_id,)) for image_id in drop]
        )
        for image in images:
            self.images[image.id] = image
        for image_id in drop:
            self.images.pop(image_id, None)

    def put_layer(self, layer: LayerRecord, blob_digest: str = "") -> None:
        """Write a layer and the blob it came from ("" for none)."""
        values = layer.diff_id, layer.size_bytes, int(layer.opaque_root)
        statements: list[tuple[str, tuple[object, ...]]] = [("INSERT OR REPLACE INTO layer VALUES (?, ?, ?)", values)]
        if blob_digest:
            statements.append(("INSERT OR REPLACE INTO blob VALUES (?, ?)", (blob_digest, layer.diff_id)))
        self._write(statements)
        self.layers[layer.diff_id] = layer
        if blob_digest:
            self.blobs[blob_digest] = layer.diff_id

    def drop_layers(self, diff_ids: Iterable[str]) -> None:
        """Forget layers and the blobs they came from."""
        gone = set(diff_ids)
        self._write(
            [("DELETE FROM layer WHERE diff_id = ?", (diff_id,)) for diff_id in gone]
            + [("DELETE FROM blob WHERE diff_id = ?", (diff_id,)) for diff_id in gone]
        )
        for diff_id in gone:
            self.layers.pop(diff_id, None)
        self.blobs = {blob: diff_id for blob, diff_id in self.blobs.items() if diff_id not in gone}

    def _write(self, statements: Sequence[tuple[str, tuple[object, ...]]]) -> None:
        if self._database is None:
            raise ImageError("the image store is closed", phase="write records", resource=str(self._path))
        if not statements:
            return
        try:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                for statement, values in statements:
                    self._database.execute(statement, values)
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise
        except sqlite3.Error as e:
            raise ImageError(
                f"cannot write the image records: {e}", phase="write records", resource=str(self._path)
            ) from e
