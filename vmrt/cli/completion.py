"""The command `completion`."""

from __future__ import annotations

import click

from vmrt.cli.command import Command


@click.command(
    cls=Command,
    examples="""
    vmrt completion bash >/etc/bash_completion.d/vmrt
    vmrt completion zsh >"${fpath[1]}/_vmrt"
    vmrt completion fish >~/.config/fish/completions/vmrt.fish
    source <(vmrt completion bash)      for this shell only
    """,
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script for a shell: commands, options, and names of pods, containers and images."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    root = ctx.find_root()
    script = kind(root.command, {}, "vmrt", "_VMRT_COMPLETE")
    # Not script.source(): for bash that runs the local bash to check its version, and the script may be for elsewhere.
    click.echo(script.source_template % script.source_vars())
