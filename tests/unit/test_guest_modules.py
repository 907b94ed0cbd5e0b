"""Which modules, in which order."""

from __future__ import annotations

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


def test_names() -> None:
    assert modules.module_name("kernel/drivers/char/hw_random/virtio-rng.ko.zst") == "virtio_rng"


def test_what_boots_early_is_optional_too() -> None:
    """A modprobe in the guest must find the modules that the initramfs has loaded, or it fails on their dependants."""
    prefixes = tuple(prefix.rstrip("/") for prefix in modules.OPTIONAL)
    for needed in ("drivers/block/virtio_blk", "drivers/net/virtio_net", "drivers/scsi/sd_mod", "drivers/virtio"):
        assert any(prefix.startswith(needed) for prefix in prefixes), needed
