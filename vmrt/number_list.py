"""The kernel's lists of CPUs and memory nodes: "0-3,7" (cpuset(7), "List format")."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

# More CPUs than any Linux can have (CONFIG_NR_CPUS): a list is bounded before a range of it is spelt out.
LIMIT = 8192
_LIST = re.compile(r"\d{1,9}(-\d{1,9})?(,\d{1,9}(-\d{1,9})?)*", re.ASCII)


def parse(text: str) -> frozenset[int]:
    """Return the numbers of a list; `ValueError`, with what is wrong in words, for one that is none."""
    if not _LIST.fullmatch(text):
        raise ValueError("not a list as in '0-3,7' (cpuset(7))")
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        low, high = int(first), int(last or first)
        if low > high:
            raise ValueError(f"its range {part} goes backwards")
        if high >= LIMIT:
            raise ValueError(f"{high} is more than any kernel has")
        found.update(range(low, high + 1))
    return frozenset(found)


def read(file: Path) -> frozenset[int]:
    """Return the numbers in one of sysfs's files; {0} where there is none: a kernel without NUMA lists no nodes."""
    try:
        return parse(file.read_text().strip())
    except (OSError, ValueError):
        return frozenset((0,))


def spelt(numbers: Iterable[int]) -> str:
    """Return the shortest list of these numbers; "" for none."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)
