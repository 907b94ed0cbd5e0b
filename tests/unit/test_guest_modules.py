"""Which modules, in which order."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path

import pytest

from vmrt.errors import VmrtError
from vmrt.guest_image import modules

# As depmod writes it: what is needed, nearest first.
DEP = """\
kernel/drivers/virtio/virtio.ko: kernel/drivers/virtio/virtio_ring.ko
kernel/drivers/virtio/virtio_ring.ko:
kernel/drivers/block/virtio_blk.ko: kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko
kernel/drivers/char/hw_random/virtio-rng.ko: kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko
kernel/net/x.ko.xz: kernel/lib/y.ko.xz
kernel/lib/y.ko.xz:
alias virtio:d00000002v* virtio_blk
# a comment
"""


def test_order_puts_each_after_what_it_needs_and_once() -> None:
    dep = modules.parse_dep(DEP)
    order = modules.in_load_order(["virtio_blk", "virtio_rng"], dep)
    assert order == [
        "kernel/drivers/virtio/virtio_ring.ko",
        "kernel/drivers/virtio/virtio.ko",
        "kernel/drivers/block/virtio_blk.ko",
        "kernel/drivers/char/hw_random/virtio-rng.ko",
    ]


def test_selection_brings_dependencies() -> None:
    dep = modules.parse_dep(DEP)
    assert modules.selected(["net/"], dep) == ["kernel/lib/y.ko.xz", "kernel/net/x.ko.xz"]
    assert modules.selected(["nothing/"], dep) == []


def test_absent_modules_are_named() -> None:
    dep = modules.parse_dep(DEP)
    with pytest.raises(VmrtError, match="no module erofs"):
        modules.in_load_order(["erofs"], dep)
    with pytest.raises(VmrtError, match=r"no module kernel/drivers/net/veth\.ko"):
        modules.selected(["drivers/net/veth.ko"], dep)


def test_what_a_kernel_has_in_itself_is_neither_missing_nor_loaded(tmp_path: Path) -> None:
    """Debian 13's cloud kernel has virtio_pci, virtiofs and virtio_console built in, Debian 12's has modules."""
    release = tmp_path / "usr/lib/modules/6.12"
    release.mkdir(parents=True)
    (release / "modules.builtin").write_text("kernel/drivers/virtio/virtio_pci.ko\nkernel/drivers/char/virtio-c.ko\n")
    built_in = modules.built_in(tmp_path, "6.12")
    dep = modules.parse_dep(DEP)
    assert modules.in_load_order(["virtio_pci", "virtio_c"], dep, built_in) == []
    assert modules.selected(["drivers/char/virtio-c.ko"], dep, built_in) == []
    with pytest.raises(VmrtError, match="no module erofs"):
        modules.in_load_order(["erofs"], dep, built_in)
    with pytest.raises(VmrtError, match=r"no module kernel/drivers/char/x\.ko"):
        modules.selected(["drivers/char/x.ko"], dep, built_in)


def test_names() -> None:
    assert modules.module_name("kernel/drivers/char/hw_random/virtio-rng.ko.zst") == "virtio_rng"
    assert modules.uncompressed_name("kernel/net/x.ko.xz") == "kernel/net/x.ko"
    assert modules.uncompressed_name("x.ko") == "x.ko"


@pytest.mark.parametrize("place", ["lib/modules", "usr/lib/modules"])
def test_where_a_kernel_package_has_its_modules(tmp_path: Path, place: str) -> None:
    (tmp_path / "usr/lib").mkdir(parents=True)
    (tmp_path / place).mkdir(parents=True)
    assert modules.directory(tmp_path) == tmp_path / place


def test_modules_are_read_decompressed(tmp_path: Path) -> None:
    module = b"\x7fELF and so on"
    files = {"x.ko": module, "x.ko.xz": lzma.compress(module), "x.ko.gz": gzip.compress(module)}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        assert modules.read(tmp_path / name) == module


@pytest.mark.parametrize(("name", "data"), [("x.ko.xz", b"no xz"), ("x.ko.gz", b"no gzip"), ("x.ko.br", b"what")])
def test_what_cannot_be_decompressed_is_named(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(VmrtError, match="compress") as caught:
        modules.read(tmp_path / name)
    assert caught.value.resource == name


def test_what_boots_early_is_optional_too() -> None:
    """A modprobe in the guest must find the modules that the initramfs has loaded, or it fails on their dependants."""
    prefixes = tuple(prefix.rstrip("/") for prefix in modules.OPTIONAL)
    for needed in ("drivers/block/virtio_blk", "drivers/net/virtio_net", "drivers/scsi/sd_mod", "drivers/virtio"):
        assert any(prefix.startswith(needed) for prefix in prefixes), needed
