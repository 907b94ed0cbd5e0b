"""Progress of long daemon work: a bar on a terminal, now and then a plain line otherwise. Always on stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING

import click

from vmrt.cli.output import printable, size

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

# In a log file or CI, one line per step and at most one more every this many seconds is what helps.
PLAIN_INTERVAL_S = 10.0


class Reporter:
    """Shows the steps of one piece of work; use as a context manager. `quiet` shows nothing."""

    def __init__(self, title: str, *, quiet: bool = False) -> None:
        self.title = printable(title)
        self.quiet = quiet
        self._live: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._plain_said: dict[str, float] = {}

    def __enter__(self) -> Reporter:
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            self._live = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=30),
                DownloadColumn(),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, what: str, done: int, total: int) -> None:
        """Show that step `what` has reached `done` of `total` octets; total 0 while unknown."""
        if self.quiet:
            return
        what = printable(what).replace("\n", " ")
        if self._live is not None:
            if what not in self._tasks:
                self._tasks[what] = self._live.add_task(what, total=None)
            self._live.update(self._tasks[what], completed=done, total=total or None)
            return
        now = time.monotonic()
        said = self._plain_said.get(what)
        if said is None or now - said >= PLAIN_INTERVAL_S:
            self._plain_said[what] = now
            amount = f": {size(done)} of {size(total)}" if total and done else ""
            click.echo(f"{self.title}: {what}{amount}", err=True)


@contextlib.contextmanager
def status(text: str, *, quiet: bool = False) -> Iterator[None]:
    """Show a spinner with a text on a terminal; nothing elsewhere, because nothing there would take it away again."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(Text(printable(text))):
        yield
