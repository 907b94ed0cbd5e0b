"""Manifests: written, read back, and refused when anything is wrong with the image."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmrt import guest_image
from vmrt.agent.layout import PROTOCOL_VERSION
from vmrt.errors import FailedPreconditionError, NotFoundError, VmrtError
from vmrt.guest_image import manifest


def make(output: Path, version: str, *, protocol: int = PROTOCOL_VERSION, initramfs: bool = True) -> Path:
    """Write a small image."""
    directory = output / version
    directory.mkdir(parents=True)
    for name in ("vmlinux", "initramfs.cpio", "root.erofs"):
        (directory / name).write_bytes(f"{version} {name}".encode())
    document = manifest.Manifest(
        version=version,
        protocol=protocol,
        kernel_release="6.1.0-1",
        cmdline="console=ttyS0",
        filesystem="erofs",
        kernel=manifest.describe(directory / "vmlinux"),
        initramfs=manifest.describe(directory / "initramfs.cpio") if initramfs else None,
        rootfs=manifest.describe(directory / "root.erofs"),
        inputs={"packages": []},
    )
    (directory / manifest.FILE).write_text(manifest.dumps(document))
    return directory


def test_load_follows_current_once(tmp_path: Path) -> None:
    make(tmp_path, "v1")
    make(tmp_path, "v2")
    manifest.point_current(tmp_path, "v1")
    image = guest_image.load(tmp_path)
    manifest.point_current(tmp_path, "v2")
    assert (image.version, image.protocol, image.kernel_release) == ("v1", PROTOCOL_VERSION, "6.1.0-1")
    assert image.kernel.read_bytes() == b"v1 vmlinux", "a loaded image must not change with `current`"
    assert image.rootfs == (tmp_path / "v1" / "root.erofs").resolve()
    assert guest_image.load(tmp_path).version == "v2"
    assert guest_image.load(tmp_path / "v1").version == "v1"


def test_an_image_without_initramfs(tmp_path: Path) -> None:
    assert guest_image.load(make(tmp_path, "v1", initramfs=False)).initramfs is None


def test_no_image(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(NotFoundError, match="vmrt guest build"):
            guest_image.load(path)


def test_another_protocol_is_refused_with_both_numbers(tmp_path: Path) -> None:
    directory = make(tmp_path, "v1", protocol=PROTOCOL_VERSION + 6)
    with pytest.raises(FailedPreconditionError, match=f"speaks protocol {PROTOCOL_VERSION + 6}, .* {PROTOCOL_VERSION}"):
        guest_image.load(directory)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    directory = make(tmp_path, "v1")
    root = directory / "root.erofs"
    root.write_bytes(b"v1 root.erofX")
    with pytest.raises(VmrtError, match=r"root\.erofs.*not what was built"):
        guest_image.load(directory)
    root.write_bytes(b"v1 root.erofs")
    guest_image.load(directory)
    root.write_bytes(b"longer than before")
    with pytest.raises(VmrtError, match=r"root\.erofs.*18 octets, the manifest says 13"):
        guest_image.load(directory, verify=False)
    root.unlink()
    with pytest.raises(VmrtError, match=r"root\.erofs.*No such file"):
        guest_image.load(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "manifest format 99, this vmrt reads 1"),
        ({"protocol": "1"}, "damaged manifest"),
        ({"cmdline": 3}, "damaged manifest"),
        ({"files": {}}, "damaged manifest"),
        ({"files": {"kernel": {"name": "../../etc/shadow", "size": 1, "sha256": ""}}}, "no plain file name"),
    ],
)
def test_bad_manifests_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    directory = make(tmp_path, "v1")
    fields = json.loads((directory / manifest.FILE).read_text())
    (directory / manifest.FILE).write_text(json.dumps({**fields, **change}))
    with pytest.raises(VmrtError, match=message):
        guest_image.load(directory)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
_KEYS = ["version", "protocol", "kernel_release", "cmdline", "filesystem", "files", "inputs"]


@given(st.dictionaries(st.sampled_from(_KEYS), _JSON), st.text(max_size=20))
def test_any_text_is_a_manifest_or_a_vmrt_error(fields: dict[str, object], junk: str) -> None:
    for text in (junk, json.dumps({"format": manifest.FORMAT, **fields})):
        with contextlib.suppress(VmrtError):
            manifest.loads(text, resource="fuzz")


def test_prune_spares_current_and_held(tmp_path: Path) -> None:
    for version in ("v1", "v2", "v3"):
        make(tmp_path, version)
    manifest.point_current(tmp_path, "v3")
    (tmp_path / "not-an-image").mkdir()
    with guest_image.hold(guest_image.load(tmp_path / "v1")):
        assert guest_image.prune(tmp_path) == ["v2"]
    assert guest_image.prune(tmp_path) == ["v1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["current", "not-an-image", "v3"]
    assert guest_image.load(tmp_path).version == "v3"


def test_the_text_is_reproducible(tmp_path: Path) -> None:
    first, second = make(tmp_path / "a", "v1"), make(tmp_path / "b", "v1")
    assert (first / manifest.FILE).read_bytes() == (second / manifest.FILE).read_bytes()
    assert manifest.read(first) == manifest.read(second)
