"""Kernel modules: which ones, in which order.

Two sets. EARLY is what the initramfs loads before the agent starts: the paths to the root disk, to the daemon (vsock)
and to what nearly every pod uses, so that no call has to wait for a modprobe. OPTIONAL goes into the root image with
`modules.dep` and the alias tables; the kernel asks for those itself through /sbin/modprobe (nftables, bridge, veth...).
"""

from __future__ import annotations

import gzip
import lzma
import re
import tempfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from vmrt import spawn
from vmrt.errors import VmrtError

PHASE = "guest image modules"

EARLY: tuple[str, ...] = (
    "virtio_pci",
    "virtio_blk",
    "erofs",
    "vmw_vsock_virtio_transport",
    "virtio_net",
    "virtio_scsi",
    "sd_mod",
    "overlay",
    "virtiofs",
    "virtio_rng",
    # Memory: what is plugged, and what the guest has freed (vmrt/hypervisor/domain.py).
    "virtio_mem",
    "virtio_balloon",
)

# Path prefixes below kernel/; whatever they depend on comes with them.
OPTIONAL: tuple[str, ...] = (
    "arch/x86/crypto/",
    "crypto/",
    "drivers/block/loop.ko",
    "drivers/block/nbd.ko",
    "drivers/block/virtio_blk.ko",
    "drivers/char/hw_random/virtio-rng.ko",
    "drivers/char/virtio_console.ko",
    "drivers/md/dm-mod.ko",
    "drivers/net/bonding/",
    "drivers/net/dummy.ko",
    "drivers/net/geneve.ko",
    "drivers/net/ifb.ko",
    "drivers/net/ipvlan/",
    "drivers/net/macvlan.ko",
    "drivers/net/macvtap.ko",
    "drivers/net/tap.ko",
    "drivers/net/tun.ko",
    "drivers/net/veth.ko",
    "drivers/net/virtio_net.ko",
    "drivers/net/vrf.ko",
    "drivers/net/vxlan/",
    "drivers/net/wireguard/",
    "drivers/nvdimm/",
    "drivers/scsi/sd_mod.ko",
    "drivers/scsi/virtio_scsi.ko",
    "drivers/virtio/",
    "fs/autofs/",
    "fs/binfmt_misc.ko",
    "fs/erofs/",
    "fs/fuse/",
    "fs/isofs/",
    "fs/lockd/",
    "fs/nfs/",
    "fs/nfs_common/",
    "fs/nls/",
    "fs/overlayfs/",
    "fs/squashfs/",
    "fs/udf/",
    "fs/xfs/",
    "lib/",
    "net/",
)

_HINT = "renamed in this kernel? see EARLY and OPTIONAL in vmrt/guest_image/modules.py"

# Where a kernel package has its modules.
_DIRECTORIES = ("usr/lib/modules", "lib/modules")

# How the standard library reads what a module file's ending names (kernel: MODULE_COMPRESS_GZIP, MODULE_COMPRESS_XZ).
_DECOMPRESS = {".gz": gzip.decompress, ".xz": lzma.decompress}

_DEP_LINE = re.compile(r"^(kernel/\S+\.ko(?:\.\w+)?):(.*)$", re.MULTILINE)


def parse_dep(text: str) -> dict[str, tuple[str, ...]]:
    """Parse modules.dep: path -> paths it needs, the nearest first (modules.dep(5))."""
    return {path: tuple(needs.split()) for path, needs in _DEP_LINE.findall(text)}


def module_name(path: str) -> str:
    """Return the name the kernel knows a module file by: "kernel/x/virtio-rng.ko" is virtio_rng."""
    return PurePosixPath(path).name.split(".", 1)[0].replace("-", "_")


def in_load_order(
    names: Sequence[str], dep: Mapping[str, tuple[str, ...]], built_in: frozenset[str] = frozenset()
) -> list[str]:
    """Return the paths to load, each after what it needs; what is built into the kernel needs no loading.

    Raises `VmrtError` naming a module that is not there.
    """
    by_name = {module_name(path): path for path in dep}
    there_already = {module_name(path) for path in built_in}
    order: dict[str, None] = {}
    for name in names:
        if name in there_already:
            continue
        if name not in by_name:
            raise VmrtError(f"the kernel package has no module {name}", phase=PHASE, hint=_HINT)
        path = by_name[name]
        for needed in (*reversed(dep[path]), path):
            order.setdefault(needed)
    return list(order)


def selected(
    prefixes: Iterable[str], dep: Mapping[str, tuple[str, ...]], built_in: frozenset[str] = frozenset()
) -> list[str]:
    """Return, sorted, the paths under the prefixes with all that they need; some may be built into the kernel.

    Raises `VmrtError` for a prefix that names a file the kernel does not have.
    """
    chosen: set[str] = set()
    for prefix in prefixes:
        full = f"kernel/{prefix}"
        matches = [path for path in dep if path.startswith(full)]
        if not matches and not prefix.endswith("/") and full not in built_in:
            raise VmrtError(f"the kernel package has no module {full}", phase=PHASE, hint=_HINT)
        for path in matches:
            chosen.update((path, *dep[path]))
    return sorted(chosen)


def directory(package: Path) -> Path:
    """Return where an unpacked kernel package has its modules: Debian 13's are in /usr/lib, earlier ones' in /lib."""
    places = [package / name for name in _DIRECTORIES]
    return next((place for place in places if place.is_dir()), places[0])


def built_in(package: Path, release: str) -> frozenset[str]:
    """Return the paths of the modules that an unpacked kernel package's kernel has in itself: kernel/x/y.ko."""
    return frozenset((directory(package) / release / "modules.builtin").read_text().split())


async def depmod_dry(package: Path, release: str) -> dict[str, tuple[str, ...]]:
    """Return the dependencies of all modules of an unpacked kernel package, writing nothing there."""
    source = directory(package)
    # depmod looks in one of the two places only, which one was decided when it was compiled.
    with tempfile.TemporaryDirectory(prefix="vmrt-depmod-") as view:
        (Path(view) / "usr/lib").mkdir(parents=True)
        (Path(view) / "usr/lib/modules").symlink_to(source.resolve())
        (Path(view) / "lib").symlink_to("usr/lib")
        argv = ["/sbin/depmod", "-n", "-b", view, release]
        output = await spawn.run(argv, timeout_s=300, phase=PHASE, resource=release)
    dep = parse_dep(output.text())
    if not dep:
        raise VmrtError("depmod found no modules", phase=PHASE, resource=f"{source}/{release}")
    return dep


async def depmod(base: Path, release: str) -> None:
    """Write modules.dep and its companions below `base`/lib/modules/`release`."""
    await spawn.run(["/sbin/depmod", "-b", base, release], timeout_s=300, phase=PHASE, resource=release)


def uncompressed_name(path: str) -> str:
    """Return the name of a module file without the ending of its compression: x.ko.xz is x.ko."""
    return f"{path.partition('.ko')[0]}.ko"


def read(path: Path) -> bytes:
    """Return a module, decompressed: Debian 13 compresses them, and finit_module(2) as init.c calls it does not."""
    if path.suffix != ".ko" and path.suffix not in _DECOMPRESS:
        raise VmrtError(f"unknown compression {path.suffix}", phase=PHASE, resource=path.name)
    data = path.read_bytes()
    try:
        return data if path.suffix == ".ko" else _DECOMPRESS[path.suffix](data)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as e:
        raise VmrtError(f"cannot decompress it: {e}", phase=PHASE, resource=path.name) from e


# kernel, scripts/sign-file.c and include/linux/module_signature.h: the module, the signature, struct module_signature
# (whose last field is the signature's length, big endian), and this.
_SIGNATURE_MAGIC = b"~Module signature appended~\n"
_SIGNATURE_STRUCT_BYTES = 12


def without_signature(module: bytes) -> bytes:
    """Return a module without the signature appended to it; one that has none is returned unchanged.

    Verifying the RSA signatures of two dozen modules took 0.2 s of an emulated boot and guards nothing here: the kernel
    that would verify them comes from the same host directory as they do, and the manifest's digests cover both.
    """
    if not module.endswith(_SIGNATURE_MAGIC):
        return module
    end = len(module) - len(_SIGNATURE_MAGIC)
    length = int.from_bytes(module[end - 4 : end], "big")
    start = end - _SIGNATURE_STRUCT_BYTES - length
    if start <= 0:
        raise VmrtError(f"damaged module signature of {length} octets", phase=PHASE)
    return module[:start]
