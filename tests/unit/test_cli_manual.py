"""docs/cli.md is the reference: it names every command and every option, and none that does not exist."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from vmrt.cli.app import COMMANDS, cli

MANUAL = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
# Documented by their own pages.
ELSEWHERE = {"serve", "guest"}


def section(name: str) -> str:
    found = re.search(rf"^### vmrt {name}\b.*?(?=^##|\Z)", MANUAL, re.MULTILINE | re.DOTALL)
    assert found, f"docs/cli.md has no section on {name}"
    return found[0]


def options(command: click.Command) -> set[str]:
    return {
        option
        for param in command.params
        if isinstance(param, click.Option)
        for option in (*param.opts, *param.secondary_opts)
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_explained(name: str) -> None:
    text = section(name)
    if name not in ELSEWHERE:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        assert set(re.findall(r"`(--?[a-z][a-z-]*)", text)) == options(command)


def test_the_root_is_explained() -> None:
    text = MANUAL[MANUAL.index("**Global options**") : MANUAL.index("## Running")]
    assert options(cli) <= set(re.findall(r"`(--?[a-zA-Z][a-z-]*)", text))


def test_the_checks_are_explained() -> None:
    from vmrt.cli.checks import findings
    from vmrt.cli.facts import Facts

    text = section("doctor")
    assert [each.name for each in findings(Facts()) if each.name not in text] == []
