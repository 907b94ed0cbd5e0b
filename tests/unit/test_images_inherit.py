"""Directories that a layer does not name: what containers see is held to a model that unpacks the tars one by one."""

import os
import sqlite3
import stat
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_erofs_reader import Node, Reader
from test_images_layer import DIR, Member, chunks, tar_of
from test_images_store import load_one, opened, sha, write_layout

from vmrt.errors import ImageError
from vmrt.images import inherit, layer
from vmrt.images.erofs import ErofsError
from vmrt.images.erofs_tree import ErofsTree

Seen = dict[bytes, tuple[object, ...]]


# --- the model: tars unpacked one over the other ----------------------------------------------------------------------


@dataclass
class Thing:
    """A directory with `below`, or a file with `data`."""

    attributes: tuple[object, ...] = (0o755, 0, 0, 0, ())
    data: bytes | None = None
    below: dict[str, "Thing"] = field(default_factory=dict)


def attributes_of(member: Member) -> tuple[object, ...]:
    xattrs = tuple(sorted((k.removeprefix("SCHILY.xattr.").encode(), v.encode()) for k, v in member.pax.items()))
    return (member.mode, member.uid, member.gid, int(member.mtime) * 10**9, xattrs)


def parent_of(root: Thing, parts: Sequence[str]) -> Thing:
    """Walk to a directory; missing ones, and files in the way, become new directories."""
    for part in parts:
        below = root.below.get(part)
        if below is None or below.data is not None:
            below = root.below[part] = Thing()
        root = below
    return root


def unpack(root: Thing, members: Sequence[Member]) -> None:
    """Apply one layer as a root file system sees it: first what it takes away from those below, then what it brings."""
    split = [(member, [part for part in member.name.split("/") if part not in ("", ".")]) for member in members]
    for _, parts in split:
        if not parts or not parts[-1].startswith(".wh."):
            continue
        at: Thing | None = root
        for part in parts[:-1]:
            at = at.below.get(part) if at is not None else None
        if at is not None and parts[-1] == ".wh..wh..opq":
            at.below.clear()
        elif at is not None:
            at.below.pop(parts[-1].removeprefix(".wh."), None)
    for member, parts in split:
        parent = parent_of(root, parts[:-1])
        if not parts:
            root.attributes = attributes_of(member)
        elif parts[-1].startswith(".wh."):
            pass
        elif member.type == DIR:
            parent_of(parent, parts[-1:]).attributes = attributes_of(member)
        else:
            parent.below[parts[-1]] = Thing(attributes_of(member), member.data)


def listed(thing: Thing, path: bytes = b"") -> Seen:
    found: Seen = {path: (*thing.attributes, thing.data)}
    for name, below in thing.below.items():
        found |= listed(below, path + b"/" + name.encode())
    return found


# --- overlayfs (kernel, Documentation/filesystems/overlayfs.rst) ------------------------------------------------------


def seen(node: Node) -> tuple[object, ...]:
    shown = tuple(sorted(i for i in node.xattrs.items() if not i[0].startswith(b"trusted.overlay.")))
    data = None if stat.S_ISDIR(node.mode) else node.data
    return (stat.S_IMODE(node.mode), node.uid, node.gid, node.mtime_ns, shown, data)


def overlay(layers: Sequence[dict[bytes, Node]], path: bytes = b"") -> Seen:
    """Return the merged view of `layers`, topmost first, all of which have the directory `path`."""
    found: Seen = {path: seen(layers[0][path])}
    merged: list[dict[bytes, Node]] = []
    for nodes in layers:
        merged.append(nodes)
        if nodes[path].xattrs.get(b"trusted.overlay.opaque") == b"y":
            break
    children = {p for nodes in merged for p in nodes if p and p.rpartition(b"/")[0] == path}
    for child in sorted(children):
        having = [nodes for nodes in merged if child in nodes]
        top = having[0][child]
        if stat.S_ISCHR(top.mode) and top.rdev == (0, 0):
            continue
        if not stat.S_ISDIR(top.mode):
            found[child] = seen(top)
            continue
        directories = []
        for nodes in having:
            if not stat.S_ISDIR(nodes[child].mode):
                break
            directories.append(nodes)
        found |= overlay(directories, child)
    return found


def shown(directory: Path, layers: Sequence[Sequence[Member]]) -> tuple[Seen, dict[bytes, Node] | None]:
    """Convert layers, put them together, and return what overlayfs shows, and the correction."""
    paths = []
    for number, members in enumerate(layers):
        paths.append(directory / f"{number}.erofs")
        with paths[-1].open("w+b") as file:
            layer.convert(chunks(tar_of(*members), 1 << 20), file.fileno())
    target = directory / "correction"
    made = layer.write_correction(paths, target, "image x", threading.Event())
    correction = None
    if made is not None:
        assert made == (sha(target.read_bytes()), target.stat().st_size)
        correction = Reader(target.read_bytes()).nodes
        paths.append(target)
    assert target.exists() == (made is not None)
    return overlay([Reader(path.read_bytes()).nodes for path in reversed(paths)]), correction


def check(directory: Path, layers: Sequence[Sequence[Member]]) -> dict[bytes, Node] | None:
    root = Thing()
    for members in layers:
        unpack(root, members)
    view, correction = shown(directory, layers)
    assert view == listed(root)
    if correction is not None:
        assert all(stat.S_ISDIR(node.mode) for node in correction.values())
        assert not any(name.startswith(b"trusted.overlay.") for node in correction.values() for name in node.xattrs)
    return correction


def named(name: str, mode: int = 0o751, **fields: object) -> Member:
    return Member(name, type=DIR, mode=mode, uid=7, gid=8, mtime=1_234_567_890, **fields)  # type: ignore[arg-type]


CASES: dict[str, tuple[list[list[Member]], set[bytes] | None]] = {
    "nothing to inherit": ([[Member("t/a")], [Member("t/b")]], None),
    "named above": ([[named("t")], [named("t", 0o700), Member("t/x")]], None),
    "only in one layer": ([[named("t"), Member("t/a")], [Member("other/x")]], None),
    "inherited": ([[named("t")], [Member("t/x")]], {b"", b"/t"}),
    "a temporary directory for everyone": ([[named("tmp", 0o1777)], [Member("tmp/x")]], {b"", b"/tmp"}),
    "the root": ([[named("./", 0o700)], [Member("x")]], {b""}),
    "through a layer that does not name it": ([[named("t")], [Member("t/x")], [Member("t/y")]], {b"", b"/t"}),
    "from the nearest": ([[named("t")], [named("t", 0o700)], [Member("t/y")]], {b"", b"/t"}),
    "named above the one that does not": ([[named("t")], [Member("t/x")], [named("t", 0o500)]], None),
    "deep, the parents with it": (
        [[named("a", 0o711), named("a/b", 0o722), named("a/b/c", 0o733)], [named("a", 0o700), Member("a/b/c/x")]],
        {b"", b"/a", b"/a/b", b"/a/b/c"},
    ),
    "extended attributes": ([[named("t", pax={"SCHILY.xattr.user.k": "v"})], [Member("t/x")]], {b"", b"/t"}),
    "the same attributes": ([[Member("t", type=DIR, mode=0o755)], [Member("t/x")]], None),
    "removed": ([[named("t"), Member("t/a")], [Member(".wh.t")]], None),
    "removed and made by one layer": ([[named("t"), Member("t/a")], [Member(".wh.t"), Member("t/x")]], None),
    "removed and made later": ([[named("t"), Member("t/a")], [Member(".wh.t")], [Member("t/x")]], None),
    "removed, made, and named below that": (
        [[named("t")], [Member(".wh.t"), named("t", 0o700)], [Member("t/x")]],
        {b"", b"/t"},
    ),
    "a removed parent": ([[named("t"), named("t/u")], [Member(".wh.t")], [Member("t/u/x")]], None),
    "a whiteout in it": ([[named("t"), Member("t/a")], [Member("t/.wh.a")]], {b"", b"/t"}),
    "replaced by a file": ([[named("t")], [Member("t", b"file")]], None),
    "a file in between": ([[named("t")], [Member("t", b"file")], [Member("t/x")]], None),
    "opaque": ([[named("t"), Member("t/a")], [Member("t/.wh..wh..opq"), Member("t/x")]], {b"", b"/t"}),
    "below an opaque one": ([[named("t/u")], [named("t"), Member("t/.wh..wh..opq"), Member("t/u/x")]], None),
    "opaque in between": (
        [[named("t"), named("t/u")], [Member("t/.wh..wh..opq"), named("t/v")], [Member("t/u/x"), Member("t/v/x")]],
        {b"", b"/t", b"/t/v"},
    ),
    "an opaque root": ([[named("./", 0o700), named("t")], [Member(".wh..wh..opq"), Member("t/x")]], {b""}),
    "what was removed stays so": (
        [[named("t"), Member("t/a"), named("t/gone"), Member("t/gone/b")], [Member("t/.wh.gone"), Member("t/.wh.a")]],
        {b"", b"/t"},
    ),
    "large directories": (
        [[named(f"t/d{n:04}", 0o700 | n % 64) for n in range(700)], [Member(f"t/d{n:04}/x") for n in range(5, 700)]],
        {b"", b"/t", *(b"/t/d%04d" % n for n in range(5, 700))},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_overlayfs_shows(tmp_path: Path, case: str) -> None:
    layers, expected = CASES[case]
    correction = check(tmp_path, layers)
    assert (None if correction is None else set(correction)) == expected


@st.composite
def layers(draw: st.DrawFn) -> list[list[Member]]:
    """Layers over few names, so that they meet; no path twice in one layer, and nothing below its own files."""
    paths = st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map("/".join)
    made = []
    for _ in range(draw(st.integers(1, 4))):
        members: dict[str, Member] = {}
        files: set[str] = set()
        for _ in range(draw(st.integers(0, 6))):
            path = draw(paths)
            kind = draw(st.sampled_from(["file", "directory", "directory", "whiteout", "opaque", "root"]))
            parents = {path[:at] for at in range(1, len(path), 2)}
            if (kind == "opaque" and path in files) or parents & files:
                continue
            if kind == "whiteout":
                parent, _, name = path.rpartition("/")
                members.setdefault(f"{parent}/.wh.{name}".lstrip("/"), Member(f"{parent}/.wh.{name}".lstrip("/")))
            elif kind == "opaque":
                members.setdefault(f"{path}/.wh..wh..opq", Member(f"{path}/.wh..wh..opq"))
            elif kind == "root":
                members.setdefault("./", named("./", draw(st.integers(0, 0o7777))))
            elif kind == "directory":
                note = draw(st.sampled_from([{}, {"SCHILY.xattr.user.k": "v"}]))
                if path not in files:
                    members.setdefault(path, named(path, draw(st.integers(0, 0o7777)), pax=note))
            elif path not in members and not any(used.startswith(path + "/") for used in members):
                files.add(path)
                members[path] = Member(path, draw(st.binary(max_size=3)))
        made.append(list(members.values()))
    return made


@settings(max_examples=400, deadline=None)
@given(layers())
@example([[named("a"), named("a/b")], [Member("a/.wh..wh..opq"), Member(".wh.a"), Member("a/b/c")], [Member("a/b/x")]])
def test_any_layers(layers: list[list[Member]]) -> None:
    with TemporaryDirectory() as directory:
        check(Path(directory), layers)


# --- the images that are read back ------------------------------------------------------------------------------------


def test_damaged_images_are_refused(tmp_path: Path) -> None:
    paths = []
    for number in range(2):
        paths.append(tmp_path / f"{number}.erofs")
        with paths[-1].open("w+b") as file:
            layer.convert(chunks(tar_of(named("t", pax={"SCHILY.xattr.user.k": "v"}), Member("t/x"))), file.fileno())
    whole = paths[0].read_bytes()
    outcomes = set()
    # What is zero stays so: padding, mostly.
    for at in (at for at in range(1024, len(whole)) if whole[at]):
        for value in (0, 0x7F, 0xFF):
            broken = bytearray(whole)
            broken[at] = value
            paths[0].write_bytes(broken)
            try:
                inherit.correction([ErofsTree(path) for path in paths], threading.Event())
                outcomes.add("read")
            except ErofsError:
                outcomes.add("refused")
    assert outcomes == {"read", "refused"}
    paths[0].write_bytes(whole[:1200])
    with pytest.raises(ImageError, match=r"cannot put the layers together: 0\.erofs is damaged or cut short"):
        layer.write_correction(paths, tmp_path / "correction", "image x", threading.Event())


def test_an_image_that_would_take_too_much_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inherit, "ENTRY_LIMIT", 10)
    many = [Member(f"t/{n}") for n in range(9)]
    assert shown(tmp_path, [many])[1] is None
    with pytest.raises(ImageError, match="have more than 10 entries"):
        shown(tmp_path, [many, many])


def test_a_stopped_look_leaves_no_file(tmp_path: Path) -> None:
    stop = threading.Event()
    shown(tmp_path, [[named("t")], [Member("t/x")]])
    (tmp_path / "correction").unlink()
    stop.set()
    paths = [tmp_path / "0.erofs", tmp_path / "1.erofs"]
    assert layer.write_correction(paths, tmp_path / "correction", "image x", stop) is None
    assert not (tmp_path / "correction").exists()


# --- the store --------------------------------------------------------------------------------------------------------

BASE, TOP, OTHER = (
    tar_of(named("tmp", 0o1777)),
    tar_of(Member("tmp/x", b"x")),
    tar_of(Member("tmp/y", b"y")),
)


async def test_the_store_puts_the_correction_on_top(tmp_path: Path) -> None:
    files = tmp_path / "images/layers"
    async with opened(tmp_path) as store:
        store.collect()
        one = await load_one(store, write_layout(tmp_path / "1", [("app:1", [BASE, TOP])]))
        assert [sha(BASE), sha(TOP)] == [made.diff_id for made in one.layers[:2]]
        (correction,) = one.layers[2:]
        data = correction.path.read_bytes()
        assert (correction.diff_id, correction.size_bytes) == (sha(data), len(data))
        assert correction.path.name == f"{correction.diff_id[7:]}.erofs"
        assert stat.S_IMODE(correction.path.stat().st_mode) == 0o444
        assert Reader(data).nodes[b"/tmp"].mode == stat.S_IFDIR | 0o1777
        # Two images that need the same correction share it, and it goes with the last one.
        two = await load_one(store, write_layout(tmp_path / "2", [("app:2", [BASE, OTHER])]))
        assert two.layers[2] == correction
        assert len(list(files.iterdir())) == 4
        await store.remove("app:1")
        assert correction.path.exists()
    async with opened(tmp_path) as store:
        assert store.list() == [two]
        store.collect()
        assert correction.path.exists()
        store.retain(two.id, "container")
        await store.remove("app:2")
        assert correction.path.exists()
        store.release("container")
        assert os.listdir(files) == []  # noqa: PTH208


async def test_an_image_without_its_correction_is_dropped(tmp_path: Path) -> None:
    layout = write_layout(tmp_path / "1", [("app:1", [BASE, TOP])])
    async with opened(tmp_path) as store:
        one = await load_one(store, layout)
    one.layers[2].path.unlink()
    async with opened(tmp_path) as store:
        assert store.list() == []
        assert await load_one(store, layout) == one
        assert one.layers[2].path.exists()


async def test_layers_of_the_first_version_are_converted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = write_layout(tmp_path / "1", [("app:1", [BASE, TOP])])
    with monkeypatch.context() as before:
        before.setattr(layer, "IMPLIED", b"user.ignored")  # such layers say nothing of directories that nobody names
        async with opened(tmp_path) as store:
            assert len((await load_one(store, layout)).layers) == 2
    with sqlite3.connect(tmp_path / "images/images.db") as database:
        database.execute("PRAGMA user_version=1")
    database.close()
    async with opened(tmp_path) as store:
        (old,) = store.list()
        assert len(old.layers) == 2
        assert len((await load_one(store, layout)).layers) == 3
