"""`vmrt guest`: build, show and tidy the guest image that VMs boot."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmrt.cli.command import Command
from vmrt.cli.output import emit_json, emit_table, size

if TYPE_CHECKING:
    from vmrt.model import GuestImage


class GuestGroup(Command, click.Group):
    """The group's class: what `Command` gives every command, for a group."""


@click.group(cls=GuestGroup)
def guest() -> None:
    """Build and inspect the guest image that VMs boot."""


def _default_directory() -> Path:
    from vmrt import config

    return config.load().guest_image_dir


@guest.command(
    cls=Command,
    examples="""
    vmrt guest build
    vmrt guest build --output ./guest --json
    vmrt guest build --kernel tuned
    """,
)
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), help="Image directory [<root>/guest].")
@click.option("--cache", type=click.Path(path_type=Path, file_okay=False), help="Where fetched packages are kept.")
@click.option(
    "--kernel",
    "kernel_choice",
    type=click.Choice(("auto", "tuned", "distribution")),
    default="auto",
    show_default=True,
    help="tuned is compiled where it is missing; auto takes it where it was compiled.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the image as JSON.")
def build(output: Path | None, cache: Path | None, kernel_choice: str, as_json: bool) -> None:
    """Build the guest image from the distribution's packages; at once where nothing has changed.

    Needs no root. The new version becomes current atomically: VMs and daemons that run keep theirs.
    """
    from vmrt import guest_image
    from vmrt.cli.progress import Reporter

    output = (output or _default_directory()).absolute()
    with Reporter("guest image", quiet=as_json) as reporter:
        work = guest_image.build(output, progress=reporter.update, cache=cache, kernel_choice=kernel_choice)
        image = asyncio.run(work)
    if as_json:
        emit_json(_fields(image))
    else:
        click.echo(str(image.kernel.parent))


@guest.command()
@click.argument("directory", type=click.Path(path_type=Path), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--no-verify", is_flag=True, help="Compare the files' sizes only, not their contents.")
def info(directory: Path | None, as_json: bool, no_verify: bool) -> None:
    """Show the guest image in DIRECTORY [<root>/guest] and check that this vmrt can boot it."""
    from vmrt import guest_image

    image = guest_image.load((directory or _default_directory()).absolute(), verify=not no_verify)
    if as_json:
        emit_json(_fields(image))
        return
    rows = [
        ["version", image.version],
        ["agent protocol", str(image.protocol)],
        ["kernel release", image.kernel_release],
        ["kernel", _file(image.kernel)],
        ["initramfs", _file(image.initramfs) if image.initramfs else "none"],
        ["root image", _file(image.rootfs)],
        ["command line", image.cmdline],
    ]
    emit_table(["what", "value"], rows)


@guest.command()
@click.argument("directory", type=click.Path(path_type=Path), required=False)
def prune(directory: Path | None) -> None:
    """Remove the versions in DIRECTORY [<root>/guest] that are neither current nor used by a daemon."""
    from vmrt import guest_image

    for version in guest_image.prune((directory or _default_directory()).absolute()):
        click.echo(version)


def _file(path: Path) -> str:
    return f"{path} ({size(path.stat().st_size)})"


def _fields(image: GuestImage) -> dict[str, object]:
    return {
        field.name: str(value) if isinstance(value := getattr(image, field.name), Path) else value
        for field in dataclasses.fields(image)
    }
