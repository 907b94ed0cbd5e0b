"""Just enough of ELF64 to ask a file which shared libraries it needs (System V ABI, generic, chapter 5).

The root image holds no package manager and no dependency metadata: the closure over DT_NEEDED is what makes sure that
everything in it can start.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_DT_NULL, _DT_NEEDED, _DT_STRTAB = 0, 1, 5


@dataclass(frozen=True, slots=True)
class Needs:
    """The DT_NEEDED names in their order, and the program interpreter ("" for a library or a static program)."""

    libraries: tuple[str, ...]
    interpreter: str


def is_elf(head: bytes) -> bool:
    """Say whether `head` starts a little-endian 64-bit ELF file."""
    return head[:6] == b"\x7fELF\x02\x01"


def needs(image: bytes) -> Needs:
    """Return what a program or library needs. Raises ValueError for a damaged file."""
    if not is_elf(image):
        raise ValueError("not a little-endian 64-bit ELF file")
    try:
        return _needs(image)
    except (struct.error, OverflowError, IndexError, UnicodeDecodeError) as e:
        raise ValueError(f"damaged ELF file: {e}") from e


def _needs(image: bytes) -> Needs:
    (table,) = struct.unpack_from("<Q", image, 32)
    entry_size, count = struct.unpack_from("<HH", image, 54)
    loads: list[tuple[int, int, int]] = []
    dynamic = (0, 0)
    interpreter = ""
    for index in range(count):
        kind, _, offset, address, _, in_file = struct.unpack_from("<IIQQQQ", image, table + index * entry_size)
        if kind == _PT_LOAD:
            loads.append((address, offset, in_file))
        elif kind == _PT_DYNAMIC:
            dynamic = (offset, in_file)
        elif kind == _PT_INTERP:
            interpreter = image[offset : offset + in_file].rstrip(b"\0").decode()
    names: list[int] = []
    strings = 0
    for position in range(dynamic[0], dynamic[0] + dynamic[1], 16):
        tag, value = struct.unpack_from("<QQ", image, position)
        if tag == _DT_NULL:
            break
        if tag == _DT_NEEDED:
            names.append(value)
        elif tag == _DT_STRTAB:
            strings = _file_offset(value, loads)
    return Needs(tuple(_string(image, strings + name) for name in names), interpreter)


def _file_offset(address: int, loads: list[tuple[int, int, int]]) -> int:
    for start, offset, in_file in loads:
        if start <= address < start + in_file:
            return address - start + offset
    raise ValueError(f"address {address:#x} is in no segment")


def _string(image: bytes, offset: int) -> str:
    end = image.find(b"\0", offset)
    if offset >= len(image) or end < 0:
        raise ValueError("a name lies outside the file")
    return image[offset:end].decode()
