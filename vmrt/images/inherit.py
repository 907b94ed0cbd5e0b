"""The attributes of directories that a layer's tar does not name.

A tar with `t/x` and no entry for `t` says nothing about t: where a lower layer has t, its owner, mode, time and
extended attributes stay (containerd's archive.Apply copies them from the parent snapshots). Layers are converted one by
one and shared between images, so a layer's own t cannot know; and overlayfs shows a merged directory with the
attributes of the topmost layer that has it. So conversion marks such directories (`IMPLIED`), and when an image is put
together, `correction` compares: if any directory would be shown wrongly, it returns a tree that holds those directories
and their parents, all with the attributes they should have, to be one more layer on top of all others.

Why that layer changes nothing else: it holds only directories that the other layers show as directories, none opaque,
so overlayfs merges each with exactly what it showed before (kernel, Documentation/filesystems/overlayfs.rst, "Merged
directories" and "whiteouts and opaque directories").

What counts as "lower layer has t", going down from the topmost layer:
- anything but a directory (a whiteout, too) ends the search: that t was another one;
- a t that was removed and made again by one layer (``.wh.t`` beside ``t/x``) is new and not marked;
- an opaque mark inside t hides what t held, but t is still the same directory: the search goes on;
- within an opaque directory only its own layer and those above count.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from vmrt.images.erofs import Attributes, Directory
from vmrt.images.erofs_tree import ErofsTree

OPAQUE = b"trusted.overlay.opaque"
# In overlayfs's own name space, which it neither shows to containers nor copies up.
IMPLIED = b"trusted.overlay.vmrt.implied"
# Entries of shared directories, all layers together: what one look at an image may take of memory.
ENTRY_LIMIT = 4_000_000


class MergeError(ValueError):
    """The image's layers cannot be put together; the text says why."""


@dataclass(frozen=True, slots=True)
class _Part:
    """One layer's share of a directory; `attributes` without the marks."""

    tree: ErofsTree
    nid: int
    attributes: Attributes
    implied: bool
    opaque: bool


@dataclass(slots=True, eq=False)
class _Node:
    """A directory of the merged view. `made` once it belongs to the correction."""

    name: bytes
    parent: _Node | None
    attributes: Attributes
    made: Directory | None = None


def correction(layers: Sequence[ErofsTree], stop: threading.Event) -> Directory | None:
    """Return the tree to put on top of `layers` (base first) for `ErofsWriter.finish`; None when all is right.

    Only directories that at least two layers have are read. Blocking; None also when `stop` is set meanwhile. Raises
    `MergeError` for an image beyond `ENTRY_LIMIT`, `ErofsError` and OSError.
    """
    shares = [_part(tree, tree.root) for tree in reversed(layers)]
    if not shares:
        return None
    top = _Node(b"", None, _inherited(shares))
    found, left = False, ENTRY_LIMIT
    stack = [(top, shares)]
    while stack:
        if stop.is_set():
            return None
        node, shares = stack.pop()
        if node.attributes != shares[0].attributes:
            found = True
            _make(node)
        listings = _listings(shares, left)
        left -= sum(len(entries) for _, entries in listings)
        for name, below in _merged(listings):
            stack.append((_Node(name, node, _inherited(below)), below))
    return _make(top) if found else None


def _part(tree: ErofsTree, nid: int) -> _Part:
    attributes = tree.attributes(nid)
    xattrs = dict(attributes.xattrs or {})
    implied, opaque = xattrs.pop(IMPLIED, None) is not None, xattrs.pop(OPAQUE, None) is not None
    return _Part(tree, nid, replace(attributes, xattrs=xattrs or None), implied, opaque)


def _inherited(shares: Sequence[_Part]) -> Attributes:
    """Return the attributes of the topmost layer that names the directory, or of the topmost when none does."""
    return next((part.attributes for part in shares if not part.implied), shares[0].attributes)


_Listing = tuple[ErofsTree, dict[bytes, tuple[int, bool]]]


def _listings(shares: Sequence[_Part], limit: int) -> list[_Listing]:
    """Return what each layer has in a directory, topmost first, down to an opaque mark; nothing for a single layer."""
    visible = shares[: next((i for i, part in enumerate(shares, 1) if part.opaque), len(shares))]
    listings: list[_Listing] = []
    if len(visible) > 1:
        for part in visible:
            listings.append((part.tree, part.tree.entries(part.nid)))
            limit -= len(listings[-1][1])
            if limit < 0:
                raise MergeError(f"directories that layers share have more than {ENTRY_LIMIT} entries")
    return listings


def _merged(listings: Sequence[_Listing]) -> Iterator[tuple[bytes, list[_Part]]]:
    """Yield the directories below that more than one layer has a share of, with the shares, topmost first."""
    names = {name for _, entries in listings[:-1] for name, (_, is_directory) in entries.items() if is_directory}
    for name in sorted(names):
        below = []
        for tree, entries in listings:
            if name not in entries:
                continue
            nid, is_directory = entries[name]
            if not is_directory:
                break
            below.append(_part(tree, nid))
        if len(below) > 1:
            yield name, below


def _make(node: _Node) -> Directory:
    """Take a directory and its parents into the correction."""
    trail: list[_Node] = []
    at: _Node | None = node
    while at is not None and at.made is None:
        trail.append(at)
        at = at.parent
    parent = at.made if at is not None else None
    for at in reversed(trail):
        at.made = Directory(at.attributes, parent)
        if parent is not None:
            parent.children[at.name] = at.made
        parent = at.made
    assert node.made is not None
    return node.made
