"""The command `cp`: files and trees in and out of a running container, by the tar of its image.

One exec session carries an archive; a thread of ours packs or unpacks at the other end of a pipe. In the container the
names are that container's own affair. On this side they are `unpack`'s, which trusts nothing.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import stat
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmrt.cli.app import Options
from vmrt.cli.command import Command
from vmrt.cli.complete import container_names
from vmrt.cli.containers import locate
from vmrt.cli.output import printable
from vmrt.cli.signals import Interrupted, Signals
from vmrt.errors import Code, InvalidArgumentError, VmrtError

if TYPE_CHECKING:
    from vmrt.cli.client import Daemon

# What ends an archive, which is all of an empty one.
_EMPTY_ARCHIVE = bytes(1024)


@dataclass(frozen=True, slots=True)
class Place:
    """One end of a copy; `container` "" is this machine."""

    container: str
    path: str


def place(text: str) -> Place:
    """Return what an argument means: CONTAINER:PATH, or a path here, if it begins with / or . or holds no colon."""
    if text.startswith(("/", ".")) or ":" not in text:
        return Place("", text)
    container, _, path = text.partition(":")
    if not container or not path:
        raise click.UsageError(f"{text!r} is not CONTAINER:PATH; a local name with a colon begins with ./")
    return Place(container, path)


@click.command(
    "cp",
    cls=Command,
    examples="""
    vmrt cp web:/etc/nginx ./            the directory nginx, here
    vmrt cp site/. web:/srv/www          what is in site, into /srv/www
    vmrt cp fix.conf mypod/web:/etc/app.conf
    vmrt cp db:/dump - | zstd >dump.tar.zst
    """,
)
@click.option("-a", "--archive", is_flag=True, help="Give files in the container the owners they have here.")
@click.argument("source", shell_complete=container_names)
@click.argument("destination", shell_complete=container_names)
@click.pass_obj
def copy(options: Options, archive: bool, source: str, destination: str) -> None:
    """Copy SOURCE to DESTINATION; one of them is CONTAINER:PATH or POD/CONTAINER:PATH, the other a path here.

    As with cp -r, a directory that exists is copied into, and a name that does not is what the copy is called; SOURCE/.
    is what is in a directory. Links are copied as links. - is a tar stream on stdin or stdout instead. The container's
    image has to have tar. Relative paths in a container begin at its working directory.
    """
    from vmrt.cli.client import Daemon

    start, end = place(source), place(destination)
    if bool(start.container) == bool(end.container):
        raise click.UsageError("one of the two has to be in a container: CONTAINER:PATH")
    if start.container and archive:
        raise click.UsageError("--archive is for copies into a container: files here are always yours")
    try:
        with Signals() as signals, Daemon(options, signals.check) as daemon:
            remote = start if start.container else end
            tar = RemoteTar(options, daemon, locate(daemon, remote.container).id, signals.check)
            if start.container:
                copy_out(tar, start.path, end.path)
            else:
                copy_in(tar, start.path, end.path, archive=archive)
    except Interrupted as e:
        raise SystemExit(128 + e.signum) from None


class RemoteTar:
    """Runs tar in one container."""

    def __init__(self, options: Options, daemon: Daemon, container_id: str, checkpoint: Callable[[], None]) -> None:
        self._options = options
        self._daemon = daemon
        self._container_id = container_id
        self._checkpoint = checkpoint

    def run(self, args: Sequence[str], *, stdin_fd: int = -1, stdout_fd: int = -1) -> tuple[int, str]:
        """Run it between descriptors; return its exit code and what it has said. Raises `VmrtError`, `OSError`."""
        from vmrt.cli.interactive import tls_of
        from vmrt.cli.streams import Hooks, Wanted, process
        from vmrt.proto.runtime.v1 import api_pb2

        request = api_pb2.ExecRequest(
            container_id=self._container_id,
            cmd=["tar", *args],
            stdin=stdin_fd >= 0,
            stdout=stdout_fd >= 0,
            stderr=True,
        )
        said = bytearray()
        wanted = Wanted(stdin_fd >= 0, False, stdin_fd=stdin_fd, stdout_fd=stdout_fd, collected=said)
        try:
            url = self._daemon.call(self._daemon.runtime.Exec, request).url
            status = process(url, wanted, tls_of(self._options), Hooks(checkpoint=self._checkpoint))
        except VmrtError:
            self._check_for_tar()
            raise
        return status, printable(said.decode(errors="replace").strip())

    def checked(self, args: Sequence[str], *, stdin_fd: int = -1, stdout_fd: int = -1) -> None:
        """Run it; a failure is a `VmrtError` with what tar has said."""
        status, said = self.run(args, stdin_fd=stdin_fd, stdout_fd=stdout_fd)
        if status:
            raise VmrtError(f"tar in the container ended with {status}: {said or 'it said nothing'}", phase="copy")
        if said:
            click.echo(f"vmrt: tar in the container says: {said}", err=True)

    def is_directory(self, path: str) -> bool:
        """Say whether files can be unpacked into `path`: only a directory can be changed into."""
        with _pipe() as (reading, writing):
            os.write(writing.fd, _EMPTY_ARCHIVE)
            writing.close()
            return self.run(["-x", "-f", "-", "-C", path], stdin_fd=reading.fd)[0] == 0

    def _check_for_tar(self) -> None:
        """Raise a clearer error where the container has no tar."""
        from vmrt.proto.runtime.v1 import api_pb2

        request = api_pb2.ExecSyncRequest(container_id=self._container_id, cmd=["tar", "--help"], timeout=30)
        try:
            self._daemon.call(self._daemon.runtime.ExecSync, request)
        except VmrtError as e:
            if e.code is Code.INVALID_ARGUMENT:
                raise InvalidArgumentError(
                    "cp needs the program tar in the container's image, and there is none",
                    hint="copy through a volume, or with `vmrt exec -i` and what the image has",
                ) from e


# --- out of a container -----------------------------------------------------------------------------------------------


def copy_out(tar: RemoteTar, path: str, destination: str) -> None:
    """Copy a container's path here. Raises `VmrtError`."""
    from vmrt.cli.unpack import Unpacker, chunks

    directory, base = _split(path)
    args = ["-c", "-f", "-", "-C", directory, f"./{base}" if base else "."]
    if destination == "-":
        if os.isatty(1):
            raise click.UsageError("a tar stream is nothing for a terminal: redirect it.")
        sys.stdout.flush()
        tar.checked(args, stdout_fd=1)
        return
    target = Path(destination)
    if target.is_dir():
        below, name = target, base
    elif destination.endswith("/") or not target.parent.is_dir():
        missing = target if target.parent.is_dir() else target.parent
        raise InvalidArgumentError("there is no such directory", phase="copy", resource=str(missing))
    else:
        below, name = target.parent, target.name
        if not base:
            target.mkdir()
            below, name = target, ""
    unpacker = Unpacker(below, base, name, lambda text: click.echo(f"vmrt: {printable(text)}", err=True))
    with contextlib.closing(unpacker), _pipe() as (reading, writing):
        work = _Worker(lambda: unpacker.run(chunks(reading.fd)), reading)
        with work.blamed_first():
            try:
                tar.checked(args, stdout_fd=writing.fd)
            finally:
                writing.close()
        if not work.result:
            raise VmrtError("the container sent nothing", phase="copy", resource=path)


# --- into a container -------------------------------------------------------------------------------------------------


def copy_in(tar: RemoteTar, source: str, path: str, *, archive: bool) -> None:
    """Copy a path of this machine into a container. Raises `VmrtError`."""
    extract = ["-x", *([] if archive else ["-o"]), "-f", "-"]
    if source == "-":
        if os.isatty(0):
            raise click.UsageError("a tar stream has to come from somewhere: redirect stdin.")
        tar.checked([*extract, "-C", path], stdin_fd=0)
        return
    contents = source == "." or source.endswith(("/.", "/..")) or source == ".."
    local = Path(source)
    try:
        kind = local.lstat().st_mode if not source.endswith("/") else local.stat().st_mode
    except OSError as e:
        raise VmrtError(f"cannot read {source}: {e.strerror or e}", phase="copy") from e
    if tar.is_directory(path):
        directory, name = path, "." if contents else (local.name or ".")
    elif path.endswith("/") and not stat.S_ISDIR(kind):
        raise InvalidArgumentError("there is no such directory in the container", phase="copy", resource=path)
    else:
        directory, name = _split(path)
    with _pipe() as (reading, writing):
        work = _Worker(lambda: _pack(local, name or ".", writing.fd), writing)
        with work.blamed_first():
            try:
                tar.checked([*extract, "-C", directory], stdin_fd=reading.fd)
            finally:
                reading.close()


def _pack(source: Path, name: str, fd: int) -> int:
    """Write a file or tree as an archive under `name`; return how many entries it has."""
    count = 0

    def chosen(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        nonlocal count
        if not (info.isreg() or info.isdir() or info.issym() or info.islnk()):
            click.echo(f"vmrt: {info.name} is left out: a device node or FIFO", err=True)
            return None
        count += 1
        info.uname = info.gname = ""  # by number: names mean others in there
        return info

    # GNU's form: what busybox knows of POSIX's is only that it is to be skipped.
    with open(fd, "wb", closefd=False) as sink, tarfile.open(fileobj=sink, mode="w|", format=tarfile.GNU_FORMAT) as out:
        out.add(source, name, filter=chosen)
    return count


# --- pipes ------------------------------------------------------------------------------------------------------------


class _End:
    """One end of a pipe, closed once; `fd` is -1 then."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[_End, _End]]:
    reading, writing = (_End(fd) for fd in os.pipe())
    try:
        yield reading, writing
    finally:
        reading.close()
        writing.close()


class _Worker:
    """A thread at one end of a pipe, which it closes: so a failure of either side ends the other."""

    def __init__(self, work: Callable[[], int], end: _End) -> None:
        self.result = 0
        self._error: Exception | None = None
        self._work = work
        self._end = end
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = self._work()
        except Exception as e:
            self._error = e
        finally:
            self._end.close()

    @contextlib.contextmanager
    def blamed_first(self) -> Iterator[None]:
        """Raise this thread's error rather than what the other side makes of it; wait for it where all is well."""
        try:
            yield
        except (VmrtError, OSError) as e:
            self._thread.join(10)
            if self._error is not None and not isinstance(self._error, BrokenPipeError):
                raise _ours(self._error) from e
            raise _ours(e) from e
        self._thread.join()
        if self._error is not None:
            raise _ours(self._error)


def _ours(error: Exception) -> Exception:
    if isinstance(error, VmrtError):
        return error
    if isinstance(error, OSError | tarfile.TarError):
        return VmrtError(f"copying failed: {error}", phase="copy")
    return error


def _split(path: str) -> tuple[str, str]:
    """Return (directory, name) of a path in a container; the name is "" where the path is the directory itself."""
    trimmed = path.rstrip("/") or "/"
    if trimmed == "/" or posixpath.basename(trimmed) in (".", ".."):
        return trimmed, ""
    directory, base = posixpath.split(trimmed)
    return directory or ".", base
