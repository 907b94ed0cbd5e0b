"""A layer's blob: read, hashed and decompressed in one thread while another converts what comes out.

Bounds: a blob gives at most `RATIO_LIMIT` times its size (deflate itself cannot reach 1033), so a small download cannot
fill a disk. Both digests are of what was really read: the blob's as stored, the diff ID of the uncompressed tar
(image-spec, config.md, "Layer DiffID").
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import functools
import hashlib
import os
import queue
import threading
import zlib
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from vmrt import spawn
from vmrt.errors import ImageError, ProcessError
from vmrt.images import layer

CHUNK_BYTES = 1 << 20
QUEUE_CHUNKS = 4
RATIO_LIMIT = 1100
RATIO_FREE_BYTES = 64 << 20


class Compression(enum.Enum):
    """How a blob is compressed, told by its first octets (media types lie)."""

    NONE = b""
    GZIP = b"\x1f\x8b"
    ZSTD = b"\x28\xb5\x2f\xfd"


@dataclass(frozen=True, slots=True)
class Blob:
    """A run of octets in a file: a whole file, or a member of an archive."""

    path: Path
    offset: int
    size: int

    def open(self) -> int:
        """Return a file descriptor; a symbolic link in the last place is refused."""
        try:
            return os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as e:
            raise ImageError(f"cannot read {self.path.name}: {e.strerror}", phase="read blob") from e

    def read(self, limit: int) -> bytes:
        """Return the whole of a small blob; refuse one beyond `limit`."""
        if self.size > limit:
            raise ImageError(f"{self.path.name} has {self.size} bytes, more than the {limit} that are taken")
        fd = self.open()
        try:
            return _pread(fd, self.size, self.offset)
        finally:
            os.close(fd)

    def compression(self) -> Compression:
        """Look at the first octets."""
        fd = self.open()
        try:
            magic = _pread(fd, min(4, self.size), self.offset)
        finally:
            os.close(fd)
        return next((c for c in (Compression.GZIP, Compression.ZSTD) if magic.startswith(c.value)), Compression.NONE)

    def copy_to(self, path: Path) -> Blob:
        """Write the blob into a file of its own."""
        source, target = self.open(), os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            at = 0
            while at < self.size:
                at += os.copy_file_range(source, target, self.size - at, self.offset + at) or _short(self.path)
        except OSError as e:
            raise layer.disk_error(e, str(path)) from e
        finally:
            os.close(source)
            os.close(target)
        return Blob(path, 0, self.size)


@dataclass(frozen=True, slots=True)
class ConvertedBlob:
    """What became of a blob: its two digests, and its image's size and whether it hides everything below."""

    blob_digest: str
    diff_id: str
    size_bytes: int
    opaque_root: bool


class Stopped(Exception):
    """The conversion was told to stop."""


class LayerStream:
    """The uncompressed tar of one blob, as an iterator of chunks with the digests at its end.

    `tar_fd`, when given, is where the uncompressed tar comes from instead (a decompressor's pipe); the blob is then
    read for its digest only. `stop` ends the iteration with `Stopped`.
    """

    def __init__(
        self,
        blob: Blob,
        compression: Compression,
        stop: threading.Event,
        *,
        tar_fd: int = -1,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self._blob = blob
        self._compression = compression
        self._stop = stop
        self._tar_fd = tar_fd
        self._progress = progress
        self._queue: queue.Queue[bytes | BaseException | None] = queue.Queue(QUEUE_CHUNKS)
        self._abandoned = threading.Event()
        self._blob_hash = hashlib.sha256()
        self._diff_hash = hashlib.sha256()
        self._produced = 0

    @property
    def blob_digest(self) -> str:
        """Digest of the blob as stored; valid after the last chunk."""
        return f"sha256:{self._blob_hash.hexdigest()}"

    @property
    def diff_id(self) -> str:
        """Digest of the uncompressed tar; valid after the last chunk."""
        return f"sha256:{self._diff_hash.hexdigest()}"

    def __iter__(self) -> Generator[bytes, None, None]:
        """Close the generator when leaving early: only that ends the thread and frees what it has open."""
        producer = threading.Thread(target=self._produce, name="image-layer", daemon=True)
        producer.start()
        try:
            while (item := self._queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self._abandoned.set()
            with contextlib.suppress(queue.Empty):
                while True:
                    self._queue.get_nowait()
            producer.join()

    def _produce(self) -> None:
        try:
            fd = self._blob.open()
            try:
                self._feed(fd)
            finally:
                os.close(fd)
        except Exception as e:  # handed to the consuming thread, which raises it
            self._put(e)

    def _feed(self, fd: int) -> None:
        raw = self._raw(fd)
        match self._compression:
            case Compression.NONE:
                source = raw
            case Compression.GZIP:
                source = _gunzip(raw)
            case Compression.ZSTD:
                source = self._pipe(raw)
        bound = RATIO_LIMIT * self._blob.size + RATIO_FREE_BYTES
        for chunk in source:
            self._produced += len(chunk)
            if self._produced > bound:
                raise ImageError(f"the layer grows beyond {RATIO_LIMIT} times its size", phase="decompress")
            if self._compression is not Compression.NONE:
                self._diff_hash.update(chunk)
            if not self._put(chunk):
                return
        if self._compression is Compression.NONE:
            self._diff_hash = self._blob_hash
        self._put(None)

    def _put(self, item: bytes | Exception | None) -> bool:
        """Hand something over; False when nobody is there to take it any more."""
        while not self._abandoned.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=0.05)
                return True
        return False

    def _raw(self, fd: int) -> Iterator[bytes]:
        at, end = self._blob.offset, self._blob.offset + self._blob.size
        while at < end:
            if self._stop.is_set():
                raise Stopped
            chunk = os.pread(fd, min(CHUNK_BYTES, end - at), at)
            if not chunk:
                _short(self._blob.path)
            at += len(chunk)
            self._blob_hash.update(chunk)
            if self._progress is not None:
                self._progress(len(chunk))
            yield chunk

    def _pipe(self, raw: Iterator[bytes]) -> Iterator[bytes]:
        while chunk := os.read(self._tar_fd, CHUNK_BYTES):
            if self._stop.is_set():
                raise Stopped
            yield chunk
        for _ in raw:
            pass


def _gunzip(raw: Iterator[bytes]) -> Iterator[bytes]:
    """Decompress a chain of gzip members (RFC 1952, 2.2)."""
    member = zlib.decompressobj(wbits=31)
    try:
        for data in raw:
            while data:
                if member.eof:
                    member = zlib.decompressobj(wbits=31)
                out = member.decompress(data, CHUNK_BYTES)
                data = member.unused_data if member.eof else member.unconsumed_tail
                if out:
                    yield out
        # What zlib still holds back when its input ended exactly at a chunk's limit.
        while not member.eof and (out := member.decompress(b"", CHUNK_BYTES)):
            yield out
    except zlib.error as e:
        raise ImageError(f"broken gzip data: {e}", phase="decompress") from e
    if not member.eof:
        raise ImageError("the gzip data is cut short", phase="decompress")


async def convert(
    blob: Blob, target: Path, executor: Executor, *, name: str, progress: Callable[[int], None] | None = None
) -> ConvertedBlob:
    """Turn a blob into an image at `target` (must not exist; mode 0444, synced).

    On failure or cancellation `target` is removed, and no thread or process of ours goes on. `progress` is called from
    a thread with the octets of the blob read since the last call.
    """
    compression = blob.compression()
    stop = threading.Event()
    async with contextlib.AsyncExitStack() as stack:
        read_fd = -1
        if compression is Compression.ZSTD:
            read_fd = await _unzstd(blob, target, stack)
        stream = LayerStream(blob, compression, stop, tar_fd=read_fd, progress=progress)
        loop = asyncio.get_running_loop()
        running = loop.run_in_executor(executor, functools.partial(_write, stream, target, name))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            stop.set()
            with contextlib.suppress(Exception):
                await running
            with contextlib.suppress(FileNotFoundError):
                os.unlink(target)  # noqa: PTH108 - pathlib's form is not for async functions
            raise


async def _unzstd(blob: Blob, target: Path, stack: contextlib.AsyncExitStack) -> int:
    """Start zstd on the blob; return the reading end of its output. Both go when the stack is unwound."""
    if blob.offset:
        whole = target.with_suffix(".zst")
        stack.callback(whole.unlink, missing_ok=True)
        blob = await asyncio.to_thread(blob.copy_to, whole)
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    stack.callback(os.close, read_fd)
    try:
        process = await stack.enter_async_context(
            spawn.piped(["zstd", "--decompress", "--quiet", "--stdout", blob.path], stdout_fd=write_fd)
        )
    except ProcessError as e:
        raise ImageError(f"a zstd layer needs the zstd program: {e}", phase="decompress") from e
    finally:
        os.close(write_fd)
    if process.stdin is not None:
        process.stdin.close()
    drain = asyncio.create_task(_zstd_errors(process))
    # Unwound before the pipe's end is closed: a failure that the converter could only see as a short archive.
    stack.push_async_exit(_ZstdVerdict(drain))
    return read_fd


async def _zstd_errors(process: spawn.Child) -> str:
    text = await process.stderr.read(4096) if process.stderr is not None else b""
    return "" if await process.wait() == 0 else text.decode(errors="replace").strip() or "zstd failed"


class _ZstdVerdict:
    """On the way out, raise what zstd complained about; the truncated archive it caused is then the cause."""

    def __init__(self, verdict: asyncio.Task[str]) -> None:
        self._verdict = verdict

    async def __aenter__(self) -> None:
        """Nothing to enter."""

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is not None and not isinstance(error, ImageError):
            self._verdict.cancel()
            return
        done, _pending = await asyncio.wait([self._verdict], timeout=1.0 if error is not None else None)
        if not done:
            self._verdict.cancel()
        elif complaint := self._verdict.result():
            raise ImageError(f"broken zstd data: {complaint}", phase="decompress") from error


def _write(stream: LayerStream, target: Path, name: str) -> ConvertedBlob:
    try:
        fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
    except OSError as e:
        raise layer.disk_error(e, name) from e
    try:
        with contextlib.closing(iter(stream)) as chunks:
            converted = layer.write(chunks, fd, name=name)
        os.fchmod(fd, 0o444)
        return ConvertedBlob(stream.blob_digest, stream.diff_id, converted.size_bytes, converted.opaque_root)
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def digest(data: bytes) -> str:
    """Return the sha256 digest as OCI writes it."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _pread(fd: int, size: int, offset: int) -> bytes:
    out = bytearray()
    while len(out) < size:
        chunk = os.pread(fd, size - len(out), offset + len(out))
        if not chunk:
            raise ImageError("a blob is shorter than its descriptor says", phase="read blob")
        out += chunk
    return bytes(out)


def _short(path: Path) -> int:
    raise ImageError(f"{path.name} is shorter than its descriptor says", phase="read blob")
