"""The command `doctor`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmrt.cli.app import Options
from vmrt.cli.command import Command
from vmrt.cli.output import emit_json, printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmrt.cli.checks import Finding


@click.command(
    cls=Command,
    examples="""
    sudo vmrt doctor
    vmrt doctor --config ./test.toml
    vmrt doctor --json | jq -r '.[] | select(.status != "ok") | .mend'
    """,
)
@click.option(
    "--config",
    "config_files",
    type=click.Path(path_type=Path, dir_okay=False),
    multiple=True,
    help="TOML file to read instead of /etc/vmrt/config.toml and config.d, as for `vmrt serve`.",
)
@click.option("--root", type=click.Path(path_type=Path), help="Check for a daemon with this root.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def doctor(options: Options, config_files: tuple[Path, ...], root: Path | None, as_json: bool) -> None:
    """Check what this machine has for running pods, and say what to do about what it lacks.

    Each line is "ok", "warn" (pods run, with less) or "fail" (pods do not run), with what it costs and how to mend it.
    No daemon is needed. Nothing is changed: what is tried is tried in throw-away directories and namespaces. The exit
    status is 1 when a check fails.
    """
    import asyncio

    from vmrt import config as configuration
    from vmrt.cli.checks import Status, findings
    from vmrt.cli.facts import gather

    overrides: dict[str, object] = {} if root is None else {"root": root.absolute()}
    config = configuration.load(list(config_files) or None, overrides)
    if not options.socket and config_files:
        options = Options(str(config.socket_path), options.timeout_s, options.debug)
    results = list(findings(asyncio.run(gather(config, options))))
    if as_json:
        emit_json(
            [
                {
                    "name": each.name,
                    "status": each.status.value,
                    "detail": each.detail,
                    "costs": each.costs,
                    "mend": each.mend,
                }
                for each in results
            ]
        )
    else:
        _print(results)
    if any(each.status is Status.FAIL for each in results):
        raise SystemExit(1)


def _print(results: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    width = max(len(each.name) for each in results)
    style = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    for each in results:
        line = Text(f"{each.status.value:<4}", style=style[each.status.value])
        console.print(line + Text(f"  {each.name:<{width}}  {printable(each.detail)}", style=""))
        for label, text in (("costs", each.costs), ("mend", each.mend)):
            if text:
                console.print(Text(f"{'':<{width + 8}}{label}: {printable(text)}", style=""))
    bad = {status: sum(each.status.value == status for each in results) for status in ("fail", "warn")}
    if bad["fail"]:
        console.print(f"{bad['fail']} of {len(results)} checks fail, {bad['warn']} warn")
    else:
        console.print(f"{len(results)} checks, {bad['warn']} warn: pods can run here")
