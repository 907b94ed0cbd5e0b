"""Huge pages for a container: reserved in this guest's memory when it is created, given back with it.

A guest has none of its own accord (kernel Documentation/admin-guide/mm/hugetlbpage.rst); the hugetlb controller then
limits who takes them.
"""

from __future__ import annotations

import os
import threading

from vmrt.agent import status

TYPE_CHECKING = False
if TYPE_CHECKING:
    import contextlib
    from typing import Any

_UNITS_KB = {"KB": 1, "MB": 1024, "GB": 1024**2, "TB": 1024**3}
_SPARE_KB = 16 * 1024  # what reservations leave to the guest
_lock = threading.Lock()


def reserve(spec: dict[str, Any], undo: contextlib.ExitStack, pools: str = "/sys/kernel/mm/hugepages") -> None:
    """Reserve what an OCI specification's linux.resources.hugepageLimits allow, and register the release.

    Raises `AgentError`: FAILED_PRECONDITION for a size the guest does not have, RESOURCE_EXHAUSTED for want of memory.
    """
    for limit in spec["linux"].get("resources", {}).get("hugepageLimits", []):
        name, octets = str(limit["pageSize"]), int(limit["limit"])
        size_kb = int(name[:-2]) * _UNITS_KB[name[-2:]]
        pages = -(-octets // (size_kb * 1024))
        path = f"{pools}/hugepages-{size_kb}kB/nr_hugepages"
        if not os.path.exists(path):  # noqa: PTH110
            raise status.AgentError(
                status.FAILED_PRECONDITION, f"hugepage_limits: the guest has no huge pages of {name}"
            )
        with _lock:
            had = _read(path)
            # Not by trying: the kernel would first take all memory there is from everybody else.
            got = min(pages, max(0, available_kb() - _SPARE_KB) // size_kb)
            if got == pages:
                _write(path, had + pages)
                got = _read(path) - had
            if got < pages:
                _write(path, had)
                raise status.AgentError(
                    status.RESOURCE_EXHAUSTED, f"hugepage_limits: the VM has room for {got} of {pages} pages of {name}"
                )
        undo.callback(_release, path, pages)


def available_kb() -> int:
    """Return the memory that can be had without swapping (proc_meminfo(5)), in KiB."""
    with open("/proc/meminfo") as file:  # noqa: PTH123
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1])
    return 0


def _release(path: str, pages: int) -> None:
    with _lock:
        _write(path, max(0, _read(path) - pages))


def _read(path: str) -> int:
    with open(path) as file:  # noqa: PTH123
        return int(file.read())


def _write(path: str, pages: int) -> None:
    with open(path, "w") as file:  # noqa: PTH123
        file.write(str(pages))
