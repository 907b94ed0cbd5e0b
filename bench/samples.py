"""What was measured, by whose it is and what it is, and the ratios that are made of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

WARM, COLD, CONTAINERD, FLOOR = "vmrt, warm", "vmrt, cold", "containerd", "bare QEMU"

T = TypeVar("T")

Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Ratio:
    """A median over another one, and what it may be at most (None: nothing was promised)."""

    name: str
    of: Key
    to: Key
    limit: float | None = None


class Samples:
    """Durations in milliseconds and sizes in MB by (whose, what)."""

    def __init__(self) -> None:
        self.values: dict[Key, list[float]] = {}
        self.ratios: list[Ratio] = []

    def add(self, whose: str, what: str, value: float) -> None:
        """Note one value."""
        self.values.setdefault((whose, what), []).append(value)

    def timed(self, whose: str, what: str, call: Callable[[], T]) -> T:
        """Time one call, in milliseconds."""
        began = time.monotonic()
        result = call()
        self.add(whose, what, (time.monotonic() - began) * 1000)
        return result

    def compare(self, name: str, of: Key, to: Key, limit: float | None = None) -> None:
        """Have a ratio of two medians reported; it is left out when one side was not measured."""
        self.ratios.append(Ratio(name, of, to, limit))

    def median(self, key: Key) -> float:
        """Return the median of a name's values."""
        return statistics.median(self.values[key])

    def p99(self, key: Key) -> float:
        """Return the 99th percentile (nearest rank; of few values the largest)."""
        values = sorted(self.values[key])
        return values[-(-len(values) * 99 // 100) - 1]

    def phases(self) -> dict[str, dict[str, float]]:
        """Return the medians of the values named "phase: ...", by whose they are."""
        found: dict[str, dict[str, float]] = {}
        for whose, what in self.values:
            if what.startswith("phase: "):
                found.setdefault(whose, {})[what.removeprefix("phase: ")] = self.median((whose, what))
        return found

    def table(self) -> str:
        """Return one line for each name: median, 99th percentile, least value, count."""
        lines = [f"{'whose':<12} {'what':<34} {'median':>9} {'p99':>9} {'min':>9}    n"]
        for key, values in self.values.items():
            figures = f"{self.median(key):9.2f} {self.p99(key):9.2f} {min(values):9.2f}"
            lines.append(f"{key[0]:<12} {key[1]:<34} {figures}  {len(values):3}")
        return "\n".join(lines)

    def measured_ratios(self) -> list[tuple[Ratio, float]]:
        """Return the ratios whose both sides were measured, with their values."""
        return [
            (ratio, self.median(ratio.of) / self.median(ratio.to))
            for ratio in self.ratios
            if ratio.of in self.values and ratio.to in self.values
        ]
