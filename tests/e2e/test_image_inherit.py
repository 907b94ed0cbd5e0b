"""Directories that a layer does not name, mounted by the kernel: the unit tests' cases hold for the real overlayfs."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_images_inherit import CASES, Seen, Thing, listed, shown, unpack


def walk(top: bytes, path: bytes = b"") -> Iterator[tuple[bytes, tuple[object, ...]]]:
    at = top + path
    status = os.lstat(at)
    xattrs = tuple(sorted((os.fsencode(name), os.getxattr(at, name)) for name in os.listxattr(at)))
    attributes = (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns, xattrs)
    if stat.S_ISDIR(status.st_mode):
        yield path, (*attributes, None)
        for name in os.listdir(at):  # noqa: PTH208 - these names are bytes
            yield from walk(top, path + b"/" + name)
    else:
        yield path, (*attributes, Path(os.fsdecode(at)).read_bytes())


# The store does not even attach what lies below an opaque root; overlayfs knows no such thing.
@pytest.mark.skipif("erofs" not in Path("/proc/filesystems").read_text(), reason="this kernel has no EROFS")
@pytest.mark.parametrize("case", [name for name in CASES if name != "an opaque root"])
def test_what_the_kernel_shows(tmp_path: Path, case: str) -> None:
    layers, _ = CASES[case]
    root = Thing()
    for members in layers:
        unpack(root, members)
    wanted: Seen = listed(root)
    _, correction = shown(tmp_path, layers)
    images = [tmp_path / f"{number}.erofs" for number in range(len(layers))]
    images += [tmp_path / "correction"] if correction is not None else []
    mounted: list[Path] = []

    def mount(*arguments: str | Path) -> None:
        subprocess.run(["mount", *arguments], check=True)
        mounted.append(Path(arguments[-1]))

    writable, merged = tmp_path / "writable", tmp_path / "merged"
    for directory in (*(tmp_path / str(number) for number in range(len(images))), writable, merged):
        directory.mkdir()
    try:
        for number, image in enumerate(images):
            mount("-t", "erofs", "-o", "ro,loop", image, tmp_path / str(number))
        mount("-t", "tmpfs", "tmpfs", writable)
        for name in ("upper", "work"):
            (writable / name).mkdir()
        lower = ":".join(str(path) for path in reversed(mounted[:-1]))
        options = f"lowerdir={lower},upperdir={writable}/upper,workdir={writable}/work"
        mount("-t", "overlay", "-o", options, "overlay", merged)
        found = dict(walk(os.fsencode(merged)))
        # The root is the upper directory's; the agent copies the topmost layer's attributes to it.
        assert {path: what for path, what in found.items() if path} == {p: w for p, w in wanted.items() if p}
        for path, what in wanted.items():
            if path and what[-1] is None:
                os.chmod(os.fsencode(merged) + path, 0o700)  # noqa: PTH101 - this path is bytes
                copied = os.listxattr(os.fsencode(writable / "upper") + path)
                assert not any("implied" in name for name in copied)
    finally:
        for directory in reversed(mounted):
            subprocess.run(["umount", directory], check=True)
