"""Records on disk: one SQLite database (WAL) under the daemon's root.

A record is a frozen dataclass, kept as one JSON document under its kind and id. Documents are written before the side
effect they announce, so whatever instant the daemon dies at, the next one finds at least what was intended.

`synchronous=NORMAL` is enough: the records must survive the daemon's death, which the page cache does; they need not
survive the host's, because no VM does either, and WAL keeps the database consistent through it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from vmrt.errors import ExhaustedError, FailedPreconditionError, VmrtError

SCHEMA_VERSION = 1

R = TypeVar("R")


def _encode(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(type(value))


def _decode(kind: type, value: Any) -> Any:
    if issubclass(kind, Path) and isinstance(value, str):
        return Path(value)
    raise NotImplementedError(kind)


class Store:
    """The database. Calls block for the time of a small write (tens of microseconds); use from one thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._encoder = msgspec.json.Encoder(enc_hook=_encode)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS records"
                " (kind TEXT, id TEXT, document BLOB NOT NULL, PRIMARY KEY (kind, id)) WITHOUT ROWID"
            )
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
        except (sqlite3.Error, OSError) as e:
            raise VmrtError(f"cannot open the record store: {e}", phase="start", resource=str(path)) from e
        if version not in (0, SCHEMA_VERSION):
            self._db.close()
            raise FailedPreconditionError(
                f"the record store has schema {version}, this vmrt reads {SCHEMA_VERSION}",
                phase="start",
                resource=str(path),
                hint="start the vmrt version that wrote it, remove its pods, then upgrade",
            )
        self._db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def put(self, kind: str, record_id: str, record: object) -> None:
        """Write or replace one record. Raises `ExhaustedError` when the disk is full."""
        with self._translated(record_id):
            self._db.execute(
                "INSERT INTO records VALUES (?, ?, ?)"
                " ON CONFLICT (kind, id) DO UPDATE SET document = excluded.document",
                (kind, record_id, self._encoder.encode(record)),
            )

    def delete(self, kind: str, record_id: str) -> None:
        """Delete one record; an absent one is no error."""
        with self._translated(record_id):
            self._db.execute("DELETE FROM records WHERE kind = ? AND id = ?", (kind, record_id))

    def load(self, kind: str, shape: type[R]) -> list[R]:
        """Return all records of a kind, decoded as `shape`. One that does not decode raises, naming it."""
        decoder = msgspec.json.Decoder(shape, dec_hook=_decode)
        records = []
        for record_id, document in self._db.execute("SELECT id, document FROM records WHERE kind = ?", (kind,)):
            try:
                records.append(decoder.decode(document))
            except msgspec.MsgspecError as e:
                raise VmrtError(
                    f"the record does not decode: {e}", phase="start", resource=f"{kind} {record_id} in {self._path}"
                ) from e
        return records

    @contextlib.contextmanager
    def _translated(self, record_id: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as e:
            kind = ExhaustedError if "full" in str(e) else VmrtError
            raise kind(
                f"cannot write the record: {e}", phase="record", resource=record_id, hint=f"look at {self._path.parent}"
            ) from e


class RootLock:
    """Holds a root directory for one daemon; the kernel releases it when the process ends, however it ends."""

    def __init__(self, root: Path) -> None:
        path = root / "vmrt.lock"
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            holder = os.pread(self._fd, 32, 0).decode(errors="replace").strip()
            os.close(self._fd)
            raise FailedPreconditionError(
                f"another vmrt daemon (pid {holder or 'unknown'}) uses this root",
                phase="start",
                resource=str(root),
                hint="stop it, or give this one its own --root and --listen",
            ) from e
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Give the root back."""
        os.close(self._fd)
