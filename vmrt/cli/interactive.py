"""The commands over the streaming server: `attach`, `port-forward`, and `exec` with -i or -t."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from vmrt.cli.app import Options, own_failure
from vmrt.cli.command import Command
from vmrt.cli.complete import container_names
from vmrt.cli.params import detach_keys_option
from vmrt.cli.signals import Interrupted, Signals

if TYPE_CHECKING:
    from vmrt.cli.connections import Tls
    from vmrt.cli.streams import Wanted


def check_terminal(stdin: bool, tty: bool) -> None:
    """Refuse -it without a terminal."""
    if stdin and tty and not os.isatty(0):
        raise click.UsageError("-t with -i needs a terminal on stdin: leave -t out for a pipe or file.")


def detach_octets(keys: str, *, stdin: bool, tty: bool) -> bytes:
    """Return what is to be typed to leave: nothing where there is no terminal to type on."""
    from vmrt.cli.streams import detach_sequence

    try:
        octets = detach_sequence(keys)
    except ValueError as e:
        raise click.BadParameter(f"{e} is no key: as in ctrl-p,ctrl-q or ctrl-],x", param_hint="--detach-keys") from e
    return octets if stdin and tty else b""


def tls_of(options: Options) -> Tls:
    """Return the TLS files of the global options."""
    from vmrt.cli.connections import Tls

    return Tls(options.tls_ca, options.tls_cert, options.tls_key)


def join(options: Options, url: Callable[[], str], wanted: Wanted, left: str) -> int:
    """Run a session with our stdio; return the exit code. Detaching says `left`, a signal's is 128 + its number."""
    from vmrt.cli.streams import Detached, Hooks, process

    try:
        with Signals() as signals:
            return process(url(), wanted, tls_of(options), Hooks(checkpoint=signals.check), url)
    except Detached:
        click.echo(f"\r\nvmrt: detached{left}", err=True)
        return 0
    except Interrupted as e:
        return 128 + e.signum


def exec_interactively(
    options: Options, container: str, command: Sequence[str], *, stdin: bool, tty: bool, detach_keys: str
) -> int:
    """Run a command with our stdio and return its exit code."""
    from vmrt.cli.client import Daemon
    from vmrt.cli.containers import locate
    from vmrt.cli.streams import Wanted
    from vmrt.proto.runtime.v1 import api_pb2

    check_terminal(stdin, tty)
    keys = detach_octets(detach_keys, stdin=stdin, tty=tty)
    with own_failure(), Daemon(options) as daemon:
        request = api_pb2.ExecRequest(
            container_id=locate(daemon, container).id,
            cmd=command,
            stdin=stdin,
            stdout=True,
            stderr=not tty,
            tty=tty,
        )
        return join(
            options,
            lambda: daemon.call(daemon.runtime.Exec, request).url,
            Wanted(stdin, tty, keys),
            "; the command goes on",
        )


@click.command(
    cls=Command,
    examples="""
    vmrt attach web                        its output from now on
    vmrt attach -i shell < script.sh
    vmrt attach -it shell                  Ctrl-P Ctrl-Q leaves it running
    """,
)
@click.option(
    "-i", "--stdin", "want_stdin", is_flag=True, help="Give the container our stdin, if it was made with one."
)
@click.option("-t", "--tty", "want_tty", is_flag=True, help="The container has a terminal: make ours a raw one.")
@detach_keys_option("container")
@click.argument("container", shell_complete=container_names)
@click.pass_obj
def attach(options: Options, want_stdin: bool, want_tty: bool, detach_keys: str, container: str) -> None:
    """Show a running container's output from now on, and give it our input.

    Ends with the container. Ctrl-C ends vmrt, and leaves the container running, unless -it makes it a key like others.
    """
    from vmrt.cli.client import Daemon
    from vmrt.cli.containers import locate
    from vmrt.cli.streams import Wanted
    from vmrt.proto.runtime.v1 import api_pb2

    check_terminal(want_stdin, want_tty)
    keys = detach_octets(detach_keys, stdin=want_stdin, tty=want_tty)
    with own_failure(), Daemon(options) as daemon:
        request = api_pb2.AttachRequest(
            container_id=locate(daemon, container).id,
            stdin=want_stdin,
            stdout=True,
            stderr=not want_tty,
            tty=want_tty,
        )
        status = join(
            options,
            lambda: daemon.call(daemon.runtime.Attach, request).url,
            Wanted(want_stdin, want_tty, keys),
            "; the container goes on",
        )
    raise SystemExit(status)


class PortPair(click.ParamType[tuple[int, int]]):
    """`REMOTE`, `LOCAL:REMOTE` or `:REMOTE`."""

    name = "ports"

    def convert(
        self, value: str | tuple[int, int], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        """Parse a pair; local 0 is any free port."""
        if isinstance(value, tuple):
            return value
        local, colon, remote = value.rpartition(":")
        texts = (local or "0", remote) if colon else (remote, remote)
        if not all(text.isascii() and text.isdigit() and int(text) < 65536 for text in texts) or not int(texts[1]):
            self.fail(f"{value!r} is not PORT, LOCAL:PORT or :PORT.", param, ctx)
        return int(texts[0]), int(texts[1])


@click.command(
    "port-forward",
    cls=Command,
    examples="""
    vmrt port-forward web 8080:80 &  curl http://127.0.0.1:8080/
    vmrt port-forward db :5432             on any free port, which is printed
    """,
)
@click.option("--address", default="127.0.0.1", show_default=True, metavar="IP", help="Where to listen.")
@click.argument("pod")
@click.argument("ports", nargs=-1, required=True, type=PortPair(), metavar="[LOCAL:]PORT...")
@click.pass_obj
def port_forward(options: Options, address: str, pod: str, ports: tuple[tuple[int, int], ...]) -> None:
    """Make TCP ports of a pod's own loopback reachable on this machine, until Ctrl-C.

    A server that listens on 127.0.0.1 only, inside the pod, is reached too.
    """
    import asyncio

    from vmrt.cli.client import Daemon, pods_of
    from vmrt.cli.lookup import find_pod
    from vmrt.cli.streams import forward_ports
    from vmrt.proto.runtime.v1 import api_pb2

    with Daemon(options) as daemon:
        target = find_pod(pods_of(daemon), pod)
        request = api_pb2.PortForwardRequest(pod_sandbox_id=target.id)
        url = daemon.call(daemon.runtime.PortForward, request).url
    try:
        asyncio.run(forward_ports(url, address, ports, click.echo, tls_of(options)))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
