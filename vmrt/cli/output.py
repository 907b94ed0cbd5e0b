"""How the command line prints: tables, JSON, sizes and ages.

Rules: a terminal gets a rich table, a pipe gets plain aligned columns with the same cells, a script gets JSON. What
comes from the daemon, a registry or a guest may hold terminal escape sequences, so every cell goes through `printable`;
only `logs`, `exec` and `run` pass a container's octets on as they are, as is their job.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime

import click

SHORT_ID = 13

# C0 controls without tab and newline, DEL, and C1 controls, which some terminals obey (ECMA-48).
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Return `text` with control characters (except tab and newline) shown as U+FFFD."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def short_id(identifier: str) -> str:
    """Return the first 13 characters of an id, without a digest's algorithm."""
    return identifier.removeprefix("sha256:")[:SHORT_ID]


def size(count: int) -> str:
    """Return a number of octets in a unit a person reads: 512B, 1.5kB, 23MB (powers of 1000, as image sizes go)."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.4g}TB"


def age(created_ns: int, now_ns: int | None = None) -> str:
    """Return how long ago a moment (Unix time in nanoseconds) was: "5 seconds ago"; "-" for 0."""
    if created_ns <= 0:
        return "-"
    seconds = max(0, (time.time_ns() if now_ns is None else now_ns) - created_ns) // 10**9
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = seconds // length
            return f"{count} {unit}{'s' if count != 1 else ''} ago"
    return f"{seconds} second{'s' if seconds != 1 else ''} ago"


def rfc3339(moment_ns: int) -> str | None:
    """Return a Unix time in nanoseconds as RFC 3339 with all nine digits, None for 0."""
    if moment_ns <= 0:
        return None
    seconds, nanos = divmod(moment_ns, 10**9)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{nanos:09d}Z"


def emit_json(value: object) -> None:
    """Print JSON: indented, non-ASCII and control characters escaped, keys in the order given."""
    click.echo(json.dumps(value, indent=2))


def emit_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: drawn by rich on a terminal, plain aligned columns in a pipe."""
    cells = [[printable(cell).replace("\n", " ").replace("\t", " ") for cell in row] for row in rows]
    if sys.stdout.isatty():
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
        for index, heading in enumerate(headings):
            # The first column is what gets copied: never cut it. Long names and references fold.
            table.add_column(heading, no_wrap=index == 0, overflow="fold")
        for row in cells:
            table.add_row(*(Text(cell) for cell in row))
        Console().print(table)
        return
    for line in aligned([list(headings), *cells]):
        click.echo(line)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines with columns three spaces apart; empty cells become "-" so that columns can be counted."""
    filled = [[cell or "-" for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*filled, strict=True)]
    return ["   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in filled]
