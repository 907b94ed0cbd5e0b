"""Mappings of ids: as the kernel takes them, and as descriptors of user namespaces."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmrt.model import IdMapping
from vmrt.pods import idmap


def test_lines() -> None:
    assert idmap.lines([IdMapping(100000, 0, 65536), IdMapping(5, 65536, 1)]) == "0 100000 65536\n65536 5 1\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="mappings of other users need root")
def test_one_namespace_for_each_mapping() -> None:
    a, b = (IdMapping(100000, 0, 65536),), (IdMapping(200000, 0, 65536),)
    with idmap.UserNamespaces() as namespaces:
        first = namespaces.get(a, a)
        assert namespaces.get(a, a) == first
        assert namespaces.get(a, b) != first
        assert Path(f"/proc/self/fd/{first}").readlink() != Path("/proc/self/ns/user").readlink()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(first)
