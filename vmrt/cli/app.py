"""The root of the `vmrt` command line: global options, lazily loaded subcommands, and errors as one line.

Rules: this module and every command module import only click and the standard library at the top, so that `vmrt --help`
and shell completion stay instant; grpc, rich and the generated stubs are imported by the function that needs them, and
libvirt or pyroute2 only by `serve` and `doctor`. A command raises `VmrtError` (or lets one through); the root prints it
as one line and exits with 1. Usage errors exit with 2, as click has it.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import click

from vmrt import __version__
from vmrt.cli.command import Command
from vmrt.cli.output import printable
from vmrt.errors import VmrtError

# name -> (module, attribute, line in `vmrt --help`). The order is the order of the help page.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "run": ("vmrt.cli.run", "run", "Run an image in a VM of its own and show its output."),
    "pods": ("vmrt.cli.pods", "pods", "List pods."),
    "ps": ("vmrt.cli.containers", "ps", "List containers."),
    "exec": ("vmrt.cli.containers", "exec_", "Run a command in a running container."),
    "attach": ("vmrt.cli.interactive", "attach", "Join a running container's input and output."),
    "port-forward": ("vmrt.cli.interactive", "port_forward", "Reach TCP ports inside a pod from this machine."),
    "cp": ("vmrt.cli.copy", "copy", "Copy files between this machine and a container."),
    "logs": ("vmrt.cli.containers", "logs", "Show a container's output."),
    "inspect": ("vmrt.cli.pods", "inspect", "Show all that is known of a pod or container, as JSON."),
    "trace": ("vmrt.cli.trace", "trace", "Show where a pod's start went, phase by phase."),
    "stop": ("vmrt.cli.pods", "stop", "Stop pods or containers."),
    "rm": ("vmrt.cli.pods", "rm", "Remove pods or containers."),
    "images": ("vmrt.cli.images", "images", "List images."),
    "pull": ("vmrt.cli.images", "pull", "Fetch an image from a registry."),
    "load": ("vmrt.cli.images", "load", "Import an image from an archive or OCI layout."),
    "rmi": ("vmrt.cli.images", "rmi", "Remove images."),
    "serve": ("vmrt.cli.serve", "serve", "Run the daemon."),
    "guest": ("vmrt.cli.guest", "guest", "Build and inspect the guest image that VMs boot."),
    "doctor": ("vmrt.cli.doctor", "doctor", "Check what this machine has, and how to mend what it lacks."),
    "completion": ("vmrt.cli.completion", "completion", "Print a shell completion script."),
}


@dataclass(frozen=True, slots=True)
class Options:
    """The global options, as `ctx.obj`. `socket` "" means the configured one; `timeout_s` None means no limit.

    The `tls` files are for the streaming server; "" is the system's CAs, and no certificate of our own.
    """

    socket: str = ""
    timeout_s: float | None = None
    debug: bool = False
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""


class LazyGroup(Command, click.Group):
    """A group whose commands are imported when they are called, not when help lists them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command; None for an unknown name."""
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or name the nearest one in the usage error."""
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise click.UsageError(f"No such command {args[0]!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the command list from the table, importing nothing."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, _, summary) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; turn what the rooms raise into one line on stderr and status 1."""
        try:
            return super().invoke(ctx)
        except VmrtError as e:
            if ctx.params.get("debug"):
                raise
            raise Failure(printable(str(e))) from e


class Failure(click.ClickException):
    """A command that failed: `vmrt: MESSAGE` on stderr, exit status 1."""

    def show(self, file: Any = None) -> None:
        """Print the line."""
        click.echo(f"vmrt: {self.format_message()}", file=file, err=file is None)


class OwnFailure(Failure):
    """A failure of vmrt itself in `run` and `exec`, told apart from the command's by its status, as docker does."""

    exit_code = 125


@contextlib.contextmanager
def own_failure() -> Iterator[None]:
    """Exit with 125 on a `VmrtError`."""
    try:
        yield
    except VmrtError as e:
        if click.get_current_context().find_root().params.get("debug"):
            raise
        raise OwnFailure(printable(str(e))) from e


class Seconds(click.ParamType[float | None]):
    """A length of time in seconds; 0 means "no limit" and becomes None."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | None:
        """Parse a non-negative number."""
        if value is None or isinstance(value, float):
            return value
        try:
            seconds = float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number of seconds.", param, ctx)
        if not 0 <= seconds < 1e9:
            self.fail(f"{value!r} is not a sensible number of seconds.", param, ctx)
        return seconds or None


@click.group(
    cls=LazyGroup,
    examples="""
    vmrt doctor                       what this machine has, and how to mend what it lacks
    vmrt serve &                      start the daemon
    vmrt run alpine uname -r          a VM boots, prints its kernel's release and is gone
    vmrt ps -a                        all containers, ended ones too
    vmrt --socket /run/b.sock pods    ask a daemon that listens elsewhere
    """,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="`vmrt COMMAND --help` explains a command.",
)
@click.option(
    "--socket",
    "--address",
    "socket",
    metavar="PATH",
    envvar="VMRT_SOCKET",
    default="",
    help="The daemon's socket: a path or unix:///PATH. Default: $VMRT_SOCKET, else the configuration's `listen`, "
    "else /run/vmrt/vmrt.sock.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=Seconds(),
    metavar="SECONDS",
    default="120",
    show_default=True,
    help="Give up on a call to the daemon after this long; 0 waits for ever. Pulls, loads and exec have no limit.",
)
@click.option(
    "--tls-ca",
    envvar="VMRT_TLS_CA",
    default="",
    metavar="FILE",
    help="CAs to trust where the streaming server has TLS, instead of the system's.",
)
@click.option("--tls-cert", envvar="VMRT_TLS_CERT", default="", metavar="FILE", help="Our certificate for it.")
@click.option(
    "--tls-key", envvar="VMRT_TLS_KEY", default="", metavar="FILE", help="Its key, if it is not in the same file."
)
@click.option("--debug", is_flag=True, help="Show tracebacks instead of one-line errors.")
@click.version_option(__version__, "-V", "--version", prog_name="vmrt", message="%(prog)s %(version)s")
@click.pass_context
def cli(
    ctx: click.Context,
    socket: str,
    timeout_s: float | None,
    tls_ca: str,
    tls_cert: str,
    tls_key: str,
    debug: bool,
) -> None:
    """Run Kubernetes pods, each in its own lightweight virtual machine.

    vmrt serves the Kubernetes Container Runtime Interface (CRI v1); kubelet and crictl use it through its socket, and
    so do the commands below. Pods and containers are named by id, by a unique prefix of their id, or by name.
    """
    ctx.obj = Options(socket, timeout_s, debug, tls_ca, tls_cert, tls_key)
