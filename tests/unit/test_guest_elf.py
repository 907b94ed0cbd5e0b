"""DT_NEEDED, read from real files and from damaged ones."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmrt.guest_image import elf

PROGRAM = Path(sys.executable).resolve().read_bytes()


def test_a_real_program() -> None:
    needs = elf.needs(PROGRAM)
    assert "libc.so.6" in needs.libraries
    assert needs.interpreter.startswith("/lib")


def test_a_real_library() -> None:
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libm.so" in line}
    needs = elf.needs(Path(mapped.pop()).read_bytes())
    assert needs.libraries[0].startswith("libc.so") or "libc.so.6" in needs.libraries
    assert needs.interpreter == ""


@pytest.mark.parametrize("image", [b"", b"#!/bin/sh\n", b"\x7fELF\x01\x01" + bytes(100)])
def test_what_is_no_elf64_is_refused(image: bytes) -> None:
    assert not elf.is_elf(image)
    with pytest.raises(ValueError, match="not a little-endian 64-bit ELF"):
        elf.needs(image)


@given(st.integers(0, 1023), st.binary(min_size=1, max_size=16), st.integers(64, 4096))
def test_damage_is_a_value_error_or_harmless(offset: int, junk: bytes, size: int) -> None:
    image = bytearray(PROGRAM[:size])
    image[offset : offset + len(junk)] = junk
    with contextlib.suppress(ValueError):
        elf.needs(b"\x7fELF\x02\x01" + bytes(image)[6:])
