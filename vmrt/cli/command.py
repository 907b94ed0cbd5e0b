"""A click command that teaches by example: its help page ends with an Examples section, printed as written."""

from __future__ import annotations

import inspect
from typing import Any

import click


class Command(click.Command):
    """A command with `examples`: one a line, the explanation after two or more spaces."""

    def __init__(self, *args: Any, examples: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = inspect.cleandoc(examples).splitlines()

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, then what click has to say."""
        if self.examples:
            with formatter.section("Examples"):
                for line in self.examples:
                    formatter.write(f"{'':>{formatter.current_indent}}{line}\n")
        super().format_epilog(ctx, formatter)
