"""bzImage to ELF in every compression that kernels use, and the check of the kernel's configuration."""

from __future__ import annotations

import bz2
import contextlib
import ctypes
import gzip
import lzma
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmrt.errors import VmrtError
from vmrt.guest_image import kernel
from vmrt.guest_image.builder import REQUIRED

ELF = b"\x7fELF" + bytes(range(256)) * 50


def bzimage(payload: bytes, *, setup_sectors: int = 3, offset: int = 77, protocol: int = 0x020F) -> bytes:
    """Build an image with the fields of the setup header that matter (boot.rst)."""
    image = bytearray((setup_sectors + 1) * 512)
    image[0x1F1] = setup_sectors
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, protocol)
    struct.pack_into("<II", image, 0x248, offset, len(payload))
    return bytes(image) + bytes(offset) + payload + b"the rest of the decompressor"


def sized(compressed: bytes) -> bytes:
    return compressed + struct.pack("<I", len(ELF))


def lz4_legacy(data: bytes) -> bytes:
    """Compress as `lz4 -l` does: blocks behind their lengths."""
    library = ctypes.CDLL("liblz4.so.1")
    out = b"\x02\x21\x4c\x18"
    for start in range(0, len(data), 8 << 20):
        block = data[start : start + (8 << 20)]
        room = library.LZ4_compressBound(len(block))
        buffer = ctypes.create_string_buffer(room)
        count = library.LZ4_compress_default(block, buffer, len(block), room)
        out += struct.pack("<I", count) + buffer.raw[:count]
    return out


def zstd(data: bytes) -> bytes:
    library = ctypes.CDLL("libzstd.so.1")
    library.ZSTD_compressBound.restype = library.ZSTD_compress.restype = ctypes.c_size_t
    library.ZSTD_compressBound.argtypes = [ctypes.c_size_t]
    library.ZSTD_compress.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int]
    buffer = ctypes.create_string_buffer(library.ZSTD_compressBound(len(data)))
    count = library.ZSTD_compress(buffer, len(buffer), data, len(data), 3)
    return buffer.raw[:count]


PAYLOADS = {
    "none": ELF,
    "gzip": gzip.compress(ELF, mtime=0),
    "xz": sized(lzma.compress(ELF)),
    "lzma": sized(lzma.compress(ELF, lzma.FORMAT_ALONE)),
    "bzip2": sized(bz2.compress(ELF)),
    "lz4": sized(lz4_legacy(ELF)),
    "zstd": sized(zstd(ELF)),
}


@pytest.mark.parametrize("compression", PAYLOADS)
def test_the_elf_comes_out(compression: str) -> None:
    assert kernel.vmlinux(bzimage(PAYLOADS[compression])) == ELF


def test_lz4_of_several_blocks() -> None:
    elf = b"\x7fELF" + bytes(9 << 20)
    assert kernel.vmlinux(bzimage(lz4_legacy(elf) + struct.pack("<I", len(elf)))) == elf


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "not an x86 bzImage"),
        (bytes(4096), "not an x86 bzImage"),
        (bzimage(ELF, protocol=0x0207), "boot protocol 0x0207"),
        (bzimage(ELF)[:2500], "cut short"),
        (bzimage(b"????" + ELF), "unknown compression, first octets 3f3f3f3f"),
        (bzimage(gzip.compress(b"no kernel", mtime=0)), "no ELF file"),
        (bzimage(PAYLOADS["lz4"][:-4] + struct.pack("<I", 5)), "octets instead of 5"),
        (bzimage(PAYLOADS["lz4"][:-4] + b"\xff\xff\xff\xff"), "too many"),
        (bzimage(PAYLOADS["zstd"][:-4] + struct.pack("<I", 5)), "damaged frame"),
    ],
)
def test_damage_is_named(image: bytes, message: str) -> None:
    with pytest.raises(VmrtError, match=message):
        kernel.vmlinux(image)


@given(st.sampled_from(sorted(PAYLOADS)), st.integers(0, 1 << 16), st.binary(min_size=1, max_size=8))
def test_no_damage_ends_otherwise(compression: str, offset: int, junk: bytes) -> None:
    payload = bytearray(PAYLOADS[compression])
    offset %= len(payload)
    payload[offset : offset + len(junk)] = junk
    with contextlib.suppress(VmrtError):
        assert kernel.vmlinux(bzimage(bytes(payload))).startswith(b"\x7fELF")


def test_a_lacking_option_is_named_with_its_reason(tmp_path: Path) -> None:
    required, config = tmp_path / "kernel.required", tmp_path / "config-6.1"
    required.write_text("# why\n\nCONFIG_A y the start\nCONFIG_B ym pods with\tB\nCONFIG_C m only as module\n")
    config.write_text('CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=y\nCONFIG_STRING="a=b"\n')
    with pytest.raises(VmrtError) as caught:
        kernel.check_config(config, required)
    assert "lacks CONFIG_B (pods with\tB); CONFIG_C (only as module)" in str(caught.value)
    assert "CONFIG_A" not in str(caught.value)
    config.write_text("CONFIG_A=y\nCONFIG_B=m\nCONFIG_C=m\n")
    kernel.check_config(config, required)


@pytest.mark.parametrize("line", ["CONFIG_A", "CONFIG_A y", "A y reason", "CONFIG_A n reason"])
def test_a_bad_line_is_refused_with_its_number(line: str) -> None:
    with pytest.raises(VmrtError, match="line 2"):
        kernel.parse_required(f"# first\n{line}\n")


def test_the_list_covers_what_containers_need() -> None:
    """The issue's own list; each must be refused when absent."""
    requirements = kernel.parse_required(REQUIRED.read_text())
    options = {r.option for r in requirements}
    assert len(options) == len(requirements), "an option is listed twice"
    for word in (
        *("NAMESPACES", "USER_NS", "PID_NS", "NET_NS", "IPC_NS", "UTS_NS", "CGROUPS", "MEMCG", "CGROUP_PIDS"),
        *("CFS_BANDWIDTH", "CPUSETS", "SECCOMP_FILTER", "OVERLAY_FS", "BRIDGE", "POSIX_MQUEUE", "SYSVIPC", "NF_TABLES"),
    ):
        assert f"CONFIG_{word}" in options
        present = {r.option: r.values[0] for r in requirements if r.option != f"CONFIG_{word}"}
        assert [r.option for r in kernel.missing(present, requirements)] == [f"CONFIG_{word}"]
