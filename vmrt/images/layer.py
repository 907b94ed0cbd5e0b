"""A layer's tar stream turned into one read-only EROFS image that overlayfs takes as a lower directory.

Rules (image-spec, layer.md; where it is silent, containerd's archive package is followed):

- ``.wh.X`` becomes overlayfs's whiteout, a character device 0/0, unless the layer itself brings X; an X that is a
  directory is then made opaque, because what lay below it is gone.
- ``.wh..wh..opq`` becomes ``trusted.overlay.opaque=y`` on its directory (kernel, Documentation/filesystems/
  overlayfs.rst); other ``.wh..wh.*`` names are aufs's own and are left out, with what is below them.
- A later entry replaces an earlier one of the same path; a directory meeting a directory only changes its attributes.
- Parents that no entry names (the root, too) are made, root's and 0755, and marked: a lower layer may know better
  (inherit.py). A parent that is a symbolic link of this layer is followed inside the layer, as containerd does; one
  that is any other kind of file is refused.
- Leading "/" and "./" are dropped; "..", empty names, NUL and over-long names are refused, by name.
- A hard link's target must be an earlier entry of this layer and no directory.
- ``trusted.overlay.*`` attributes of the archive are dropped (they would steer the guest's overlay), as are those that
  Linux has no place for.

One layer is converted once, without those below it: a parent that is a symbolic link in a *lower* layer is not seen.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import stat
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vmrt.errors import ExhaustedError, ImageError
from vmrt.images import erofs, inherit
from vmrt.images.erofs_tree import ErofsTree
from vmrt.images.inherit import IMPLIED, OPAQUE
from vmrt.images.tar import Entry, Kind, TarError, TarReader

ENTRY_LIMIT = 2_000_000
PATH_LIMIT = 4095
SYMLINK_FOLLOW_LIMIT = 40
_WHITEOUT = b".wh."
_OPAQUE_MARK = b".wh..wh..opq"
_AUFS = b".wh..wh."

_MODES = {
    Kind.FILE: stat.S_IFREG,
    Kind.SYMLINK: stat.S_IFLNK,
    Kind.CHAR: stat.S_IFCHR,
    Kind.BLOCK: stat.S_IFBLK,
    Kind.FIFO: stat.S_IFIFO,
    Kind.DIRECTORY: stat.S_IFDIR,
}
_UNNAMED = erofs.Attributes(stat.S_IFDIR | 0o755)


class LayerError(ValueError):
    """The layer breaks a rule above; the text names the entry."""


@dataclass(frozen=True, slots=True)
class Converted:
    """What a conversion made. `opaque_root`: the layer hides everything below it."""

    size_bytes: int
    opaque_root: bool


@dataclass(slots=True, eq=False)
class _Leaf:
    """Anything but a directory. `target` is a symbolic link's."""

    nid: int
    mode: int
    target: bytes = b""


@dataclass(slots=True, eq=False)
class _Folder:
    """A directory. `implied`: no entry names it, and this layer does not replace it either."""

    attributes: erofs.Attributes = _UNNAMED
    implied: bool = True
    children: dict[bytes, _Leaf | _Folder] = field(default_factory=dict)
    whiteouts: set[bytes] = field(default_factory=set)
    opaque: bool = False


def convert(chunks: Iterator[bytes], fd: int, *, name: str = "layer") -> Converted:
    """Read an uncompressed tar to its end and write its image into the empty file `fd` (not synced).

    Raises `ImageError` naming `name` and the entry for a layer that is refused, `ExhaustedError` for a full disk.
    Blocking: run it in a thread.
    """
    try:
        return _Layer(fd).read(TarReader(chunks))
    except (TarError, LayerError, erofs.ErofsError) as e:
        raise ImageError(f"cannot convert the layer: {e}", phase="convert", resource=name) from e
    except OSError as e:
        raise disk_error(e, name) from e


def disk_error(error: OSError, resource: str) -> ExhaustedError | ImageError:
    """Translate an error of the file system that holds the store."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ExhaustedError(
            "no space left on device",
            phase="store image",
            resource=resource,
            hint="remove images, or give the daemon's root more space",
        )
    return ImageError(f"{error.strerror or error}", phase="store image", resource=resource)


class _Layer:
    def __init__(self, fd: int) -> None:
        self._writer = erofs.ErofsWriter(fd)
        self._root = _Folder()

    def read(self, reader: TarReader) -> Converted:
        for count, entry in enumerate(reader, 1):
            if count > ENTRY_LIMIT:
                raise LayerError(f"more than {ENTRY_LIMIT} entries")
            try:
                self._add(entry, reader)
            except erofs.ErofsError as e:
                raise LayerError(f"{_show(entry.name)}: {e}") from e
        size = self._writer.finish(self._tree())
        return Converted(size, self._root.opaque)

    def _add(self, entry: Entry, reader: TarReader) -> None:
        parts = split(entry.name)
        if any(part.startswith(_AUFS) and part != _OPAQUE_MARK for part in parts):
            return
        if any(part.startswith(_WHITEOUT) for part in parts[:-1]):
            raise LayerError(f"{_show(entry.name)}: something below a whiteout")
        if not parts:
            if entry.kind is not Kind.DIRECTORY:
                raise LayerError(f"{_show(entry.name)}: the root must be a directory")
            self._root.attributes, self._root.implied = _attributes(entry), False
            return
        folder, last = self._folder(parts[:-1], entry.name), parts[-1]
        if last == _OPAQUE_MARK:
            folder.opaque = True
        elif last.startswith(_WHITEOUT):
            hidden = last.removeprefix(_WHITEOUT)
            if hidden in (b"", b".", b".."):
                raise LayerError(f"{_show(entry.name)}: a whiteout of nothing")
            folder.whiteouts.add(hidden)
        elif entry.kind is Kind.DIRECTORY:
            present = folder.children.get(last)
            if not isinstance(present, _Folder):
                present = folder.children[last] = _Folder()
            present.attributes, present.implied = _attributes(entry), False
        elif entry.kind is Kind.LINK:
            folder.children[last] = self._linked(entry)
        else:
            folder.children[last] = self._leaf(entry, reader)

    def _leaf(self, entry: Entry, reader: TarReader) -> _Leaf:
        attributes = _attributes(entry)
        if entry.kind is Kind.FILE:
            return _Leaf(self._writer.file(attributes, entry.size, reader.data(), entry.extents), attributes.mode)
        if entry.kind is Kind.SYMLINK:
            return _Leaf(self._writer.symlink(attributes, entry.linkname), attributes.mode, entry.linkname)
        return _Leaf(self._writer.special(attributes), attributes.mode)

    def _linked(self, entry: Entry) -> _Leaf:
        parts = split(entry.linkname)
        what = f"{_show(entry.name)}: hard link to {_show(entry.linkname)}"
        if not parts:
            raise LayerError(f"{what}, a directory")
        target = self._folder(parts[:-1], entry.name, make=False)
        leaf = target.children.get(parts[-1]) if target else None
        if leaf is None:
            raise LayerError(f"{what}, which this layer does not hold before it")
        if isinstance(leaf, _Folder):
            raise LayerError(f"{what}, a directory")
        # An entry that links a name to itself changes nothing.
        if parts != split(entry.name):
            self._writer.link(leaf.nid)
        return leaf

    def _folder(self, parts: list[bytes], name: bytes, *, make: bool = True) -> _Folder:
        """Walk to a directory, making what is missing and following the layer's own symbolic links inside the layer.

        With `make` False a missing directory gives an empty one that is not part of the tree.
        """
        trail = [self._root]
        rest = parts[::-1]
        follows = 0
        while rest:
            part = rest.pop()
            if part == b"..":  # only ever from a symbolic link's target
                trail = trail[:-1] or trail
                continue
            child = trail[-1].children.get(part)
            if child is None:
                child = _Folder()
                if make:
                    trail[-1].children[part] = child
            if isinstance(child, _Folder):
                trail.append(child)
                continue
            follows += 1
            if not child.target or follows > SYMLINK_FOLLOW_LIMIT:
                raise LayerError(f"{_show(name)}: the parent {_show(part)} is no directory")
            if child.target.startswith(b"/"):
                trail = [self._root]
            rest.extend(p for p in reversed(child.target.split(b"/")) if p not in (b"", b"."))
        return trail[-1]

    def _tree(self) -> erofs.Directory:
        """Return the writer's view of the tree, whiteouts and opaque marks included."""
        whiteout: tuple[int, int] | None = None
        root = erofs.Directory(self._root.attributes)
        stack = [(self._root, root)]
        while stack:
            folder, directory = stack.pop()
            if marks := {mark: b"y" for mark, on in ((OPAQUE, folder.opaque), (IMPLIED, folder.implied)) if on}:
                xattrs = {**(folder.attributes.xattrs or {}), **marks}
                directory.attributes = dataclasses.replace(folder.attributes, xattrs=xattrs)
            for name in folder.whiteouts:
                present = folder.children.get(name)
                if isinstance(present, _Folder):
                    present.opaque, present.implied = True, False
                elif present is None:
                    if whiteout is None:
                        whiteout = self._writer.special(erofs.Attributes(stat.S_IFCHR)), stat.S_IFCHR
                    else:
                        self._writer.link(whiteout[0])
                    directory.children[name] = whiteout
            for name, child in folder.children.items():
                if isinstance(child, _Folder):
                    below = erofs.Directory(child.attributes, directory)
                    directory.children[name] = below
                    stack.append((child, below))
                else:
                    directory.children[name] = child.nid, child.mode
        return root


def split(name: bytes) -> list[bytes]:
    """Return a path's components, "." and empty ones dropped; raise `LayerError` for one that is refused."""
    if not name:
        raise LayerError("an entry without a name")
    if b"\0" in name:
        raise LayerError(f"{_show(name)}: NUL in a name")
    if len(name) > PATH_LIMIT:
        raise LayerError(f"{_show(name)}: a path of {len(name)} octets")
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    for part in parts:
        if part == b"..":
            raise LayerError(f'{_show(name)}: ".." in a path')
        if len(part) > erofs.NAME_LIMIT:
            raise LayerError(f"{_show(name)}: a name of {len(part)} octets")
    return parts


def _attributes(entry: Entry) -> erofs.Attributes:
    for what, value in (("owner", entry.uid), ("group", entry.gid)):
        # 2^32 - 1 means "no owner" to the kernel.
        if not 0 <= value < 0xFFFFFFFF:
            raise LayerError(f"{_show(entry.name)}: the {what} {value} is out of range")
    rdev = 0
    if entry.kind is Kind.CHAR or entry.kind is Kind.BLOCK:
        rdev = erofs.encode_rdev(entry.major, entry.minor)
    xattrs = None
    if entry.xattrs:
        xattrs = {name: value for name, value in entry.xattrs.items() if _wanted(name)}
    return erofs.Attributes(_MODES[entry.kind] | entry.mode, entry.uid, entry.gid, entry.mtime_ns, rdev, xattrs)


def _wanted(name: bytes) -> bool:
    return erofs.knows_xattr(name) and not name.startswith((b"trusted.overlay.", b"user.overlay."))


def _show(name: bytes) -> str:
    text = name.decode(errors="backslashreplace")
    return repr(text if len(text) <= 120 else f"{text[:117]}...")


def write(chunks: Iterable[bytes], fd: int, *, name: str = "layer") -> Converted:
    """Convert and bring the image to the disk."""
    converted = convert(iter(chunks), fd, name=name)
    try:
        os.fsync(fd)
    except OSError as e:
        raise disk_error(e, name) from e
    return converted


def write_correction(layers: Sequence[Path], target: Path, name: str, stop: threading.Event) -> tuple[str, int] | None:
    """Write the layer that `inherit.correction` finds for these (base first) to `target`, as `blob.convert` does.

    Returns its digest and size; None, and no file, when none is needed or `stop` was set.
    """
    try:
        root = inherit.correction([ErofsTree(path) for path in layers], stop)
        if root is None:
            return None
        with target.open("x+b", buffering=0) as file:
            size = erofs.ErofsWriter(file.fileno()).finish(root)
            os.fchmod(file.fileno(), 0o444)
            os.fsync(file.fileno())
            file.seek(0)
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}", size
    except (inherit.MergeError, erofs.ErofsError) as e:
        raise ImageError(f"cannot put the layers together: {e}", phase="store image", resource=name) from e
    except OSError as e:
        raise disk_error(e, name) from e
