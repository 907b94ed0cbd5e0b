"""The distribution's kernel: out of its bzImage, and checked for what containers need.

A bzImage is a decompressor around the real kernel. QEMU can start the ELF inside directly through the PVH entry point
(xen, docs/misc/pvh.pandoc; qboot.rom jumps there), which saves the decompression in every boot.
"""

from __future__ import annotations

import bz2
import ctypes
import gzip
import lzma
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vmrt.errors import VmrtError

PHASE = "guest image kernel"

# The image is a vmlinux of some 50 MB; more than this is a damaged length field.
_LIMIT = 512 * 1024 * 1024
_LZ4_BLOCK = 8 * 1024 * 1024


def vmlinux(bzimage: bytes, *, name: str = "bzImage") -> bytes:
    """Return the ELF kernel inside a bzImage.

    Where it lies is told by the setup header (kernel, Documentation/arch/x86/boot.rst: setup_sects, payload_offset,
    payload_length; protocol 2.08 or later). Raises `VmrtError` for anything else than a bzImage with an ELF inside.
    """
    if len(bzimage) < 0x250 or bzimage[0x202:0x206] != b"HdrS":
        raise VmrtError("not an x86 bzImage", phase=PHASE, resource=name)
    (protocol,) = struct.unpack_from("<H", bzimage, 0x206)
    if protocol < 0x0208:
        raise VmrtError(f"boot protocol {protocol:#06x} has no payload fields", phase=PHASE, resource=name)
    setup_sectors = bzimage[0x1F1] or 4
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    payload = bzimage[start : start + length]
    if len(payload) != length or length < 8:
        raise VmrtError("the payload is cut short", phase=PHASE, resource=name)
    try:
        elf = _decompress(payload)
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as e:
        raise VmrtError(f"cannot decompress the payload: {e}", phase=PHASE, resource=name) from e
    if elf[:4] != b"\x7fELF":
        raise VmrtError("the payload is no ELF file", phase=PHASE, resource=name)
    return elf


def _decompress(payload: bytes) -> bytes:
    # gzip ends itself; behind the others the kernel's build appends the size of the result (scripts/Makefile.lib).
    body, (size,) = payload[:-4], struct.unpack_from("<I", payload, len(payload) - 4)
    match payload[:4]:
        case b"\x7fELF":
            return payload
        case magic if magic[:2] == b"\x1f\x8b":
            return gzip.decompress(payload)
        case b"\xfd7zX":
            return lzma.decompress(body, lzma.FORMAT_XZ)
        case b"\x5d\x00\x00\x00" | b"\x5d\x00\x00\x80":
            return lzma.LZMADecompressor(lzma.FORMAT_ALONE).decompress(body)
        case magic if magic[:3] == b"BZh":
            return bz2.decompress(body)
        case b"\x02\x21\x4c\x18":
            return _lz4_legacy(body[4:], size)
        case b"\x28\xb5\x2f\xfd":
            return _zstd(body, size)
        case magic:
            raise ValueError(f"unknown compression, first octets {magic.hex()}")


# LZ4 and Zstandard are not in the standard library; apt and dpkg link these libraries, so every Debian has them.
def _library(name: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(name)
    except OSError as e:
        raise ValueError(f"{name} is missing: install it") from e


def _lz4_legacy(blocks: bytes, size: int) -> bytes:
    """Decompress the body of lz4's legacy frame: blocks of at most 8 MiB, each behind its compressed length."""
    if size > _LIMIT:
        raise ValueError(f"{size} octets are too many")
    decompress = _library("liblz4.so.1").LZ4_decompress_safe
    out = bytearray()
    block = ctypes.create_string_buffer(_LZ4_BLOCK)
    position = 0
    while position < len(blocks):
        if position + 4 > len(blocks):
            raise ValueError("a block is cut short")
        (length,) = struct.unpack_from("<I", blocks, position)
        chunk = blocks[position + 4 : position + 4 + length]
        if len(chunk) != length:
            raise ValueError("a block is cut short")
        count = decompress(chunk, block, length, _LZ4_BLOCK)
        if count < 0:
            raise ValueError(f"damaged block at {position}")
        out += memoryview(block)[:count]
        position += 4 + length
        if len(out) > size:
            break
    if len(out) != size:
        raise ValueError(f"{len(out)} octets instead of {size}")
    return bytes(out)


def _zstd(frame: bytes, size: int) -> bytes:
    if size > _LIMIT:
        raise ValueError(f"{size} octets are too many")
    library = _library("libzstd.so.1")
    library.ZSTD_decompress.restype = ctypes.c_size_t
    library.ZSTD_decompress.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t]
    out = ctypes.create_string_buffer(size)
    count = library.ZSTD_decompress(out, size, frame, len(frame))
    if count != size:
        raise ValueError("damaged frame")
    return out.raw


@dataclass(frozen=True, slots=True)
class Requirement:
    """One line of firmware/kernel.required: an option, the values that do ("y", "ym"), and what needs it."""

    option: str
    values: str
    reason: str


def parse_required(text: str) -> tuple[Requirement, ...]:
    """Parse lines of OPTION VALUES REASON...; # starts a comment line. Raises `VmrtError` with the line's number."""
    requirements = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        words = line.split(maxsplit=2)
        if len(words) != 3 or not words[0].startswith("CONFIG_") or words[1] not in ("y", "m", "ym"):
            raise VmrtError(f"line {number} is not CONFIG_X y|m|ym REASON", phase=PHASE, resource="kernel.required")
        requirements.append(Requirement(*words))
    return tuple(requirements)


def parse_config(text: str) -> dict[str, str]:
    """Parse a kernel's .config into option -> value; options that are not set are absent."""
    return dict(line.split("=", 1) for line in text.splitlines() if line.startswith("CONFIG_") and "=" in line)


def missing(config: Mapping[str, str], required: Iterable[Requirement]) -> list[Requirement]:
    """Return the requirements that `config` does not meet."""
    return [r for r in required if config.get(r.option, "n") not in tuple(r.values)]


def check_config(config_file: Path, required_file: Path) -> None:
    """Raise `VmrtError` naming every option that the kernel lacks, with what needs it."""
    lacking = missing(parse_config(config_file.read_text()), parse_required(required_file.read_text()))
    if lacking:
        names = "; ".join(f"{r.option} ({r.reason})" for r in lacking)
        raise VmrtError(
            f"the kernel lacks {names}",
            phase=PHASE,
            resource=config_file.name,
            hint=f"what a guest kernel needs is listed in {required_file}",
        )
