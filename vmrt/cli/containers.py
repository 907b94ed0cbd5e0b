"""The commands that concern containers: `ps`, `exec`, `logs`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmrt.cli.app import Options, Seconds, own_failure
from vmrt.cli.command import Command
from vmrt.cli.complete import container_names
from vmrt.cli.output import age, emit_json, emit_table, rfc3339, short_id
from vmrt.cli.params import detach_keys_option
from vmrt.errors import Code, FailedPreconditionError, VmrtError

if TYPE_CHECKING:
    from vmrt.cli.client import Daemon
    from vmrt.proto.runtime.v1 import api_pb2

DAEMON_PATIENCE_S = 60.0


def state_name(state: int) -> str:
    """Return CRI's ContainerState or PodSandboxState number as one lower-case word."""
    return {0: "created", 1: "running", 2: "exited"}.get(state, "unknown")


def image_name(spec: api_pb2.ImageSpec) -> str:
    """Return what a person calls the image of a container."""
    name = spec.user_specified_image or spec.image
    return short_id(name) if name.startswith("sha256:") else name


@click.command(
    cls=Command,
    examples="""
    vmrt ps
    vmrt ps -a --pod web                ended ones of pod web, too
    vmrt ps --json | jq -r '.[].image'
    """,
)
@click.option("-a", "--all", "everything", is_flag=True, help="Show containers that are not running, too.")
@click.option("-q", "--quiet", is_flag=True, help="Print ids only, in full.")
@click.option("--pod", default="", metavar="POD", help="Only the containers of this pod (id, prefix or name).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def ps(options: Options, everything: bool, quiet: bool, pod: str, as_json: bool) -> None:
    """List running containers, newest first.

    ATTEMPT counts how often kubelet has started the container anew. IMAGE is the name that was asked for.
    """
    from vmrt.cli.client import Daemon, containers_of, pods_of
    from vmrt.cli.lookup import find_pod
    from vmrt.proto.runtime.v1 import api_pb2

    with Daemon(options) as daemon:
        owners = {each.id: each for each in pods_of(daemon)}
        found = containers_of(daemon)
    if pod:
        wanted = find_pod(list(owners.values()), pod).id
        found = [container for container in found if container.pod_sandbox_id == wanted]
    if not everything:
        found = [container for container in found if container.state == api_pb2.CONTAINER_RUNNING]
    nobody = api_pb2.PodSandbox()
    if as_json:
        emit_json([_as_json(each, owners.get(each.pod_sandbox_id, nobody)) for each in found])
    elif quiet:
        for container in found:
            click.echo(container.id)
    else:
        emit_table(
            ["CONTAINER", "IMAGE", "CREATED", "STATE", "NAME", "ATTEMPT", "POD ID", "POD"],
            [
                [
                    short_id(each.id),
                    image_name(each.image),
                    age(each.created_at),
                    state_name(each.state),
                    each.metadata.name,
                    str(each.metadata.attempt),
                    short_id(each.pod_sandbox_id),
                    owners.get(each.pod_sandbox_id, nobody).metadata.name,
                ]
                for each in found
            ],
        )


def _as_json(container: api_pb2.Container, owner: api_pb2.PodSandbox) -> dict[str, object]:
    return {
        "id": container.id,
        "name": container.metadata.name,
        "attempt": container.metadata.attempt,
        "state": state_name(container.state),
        "created_at": rfc3339(container.created_at),
        "image": image_name(container.image),
        "image_id": container.image_id or container.image_ref,
        "pod_id": container.pod_sandbox_id,
        "pod_name": owner.metadata.name,
        "pod_namespace": owner.metadata.namespace,
        "labels": dict(sorted(container.labels.items())),
        "annotations": dict(sorted(container.annotations.items())),
    }


def locate(daemon: Daemon, wanted: str) -> api_pb2.Container:
    """Return the one container that a person means."""
    from vmrt.cli.client import containers_of, pods_of
    from vmrt.cli.lookup import find_container

    return find_container(containers_of(daemon), pods_of(daemon), wanted)


@click.command(
    "exec",
    context_settings={"allow_interspersed_args": False},
    cls=Command,
    examples="""
    vmrt exec web cat /etc/hostname
    vmrt exec web sh -c 'ls /proc/*/exe'
    vmrt exec --time-limit 5 mypod/sidecar true
    """,
)
@click.option("-i", "--stdin", "want_stdin", is_flag=True, help="Give the command our stdin.")
@click.option("-t", "--tty", "want_tty", is_flag=True, help="Give the command a terminal.")
@detach_keys_option("command")
@click.option(
    "--time-limit",
    type=Seconds(),
    metavar="SECONDS",
    default="0",
    help="Kill the command after this long; without it, it may run for ever.",
)
@click.argument("container", shell_complete=container_names)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="COMMAND [ARG]...")
@click.pass_obj
def exec_(
    options: Options,
    want_stdin: bool,
    want_tty: bool,
    detach_keys: str,
    time_limit: float | None,
    container: str,
    command: tuple[str, ...],
) -> None:
    """Run a command in a running container.

    The command runs without a shell, with the container's user, environment and working directory. Its exit status
    becomes that of vmrt; 125 means that vmrt itself failed. With -i or -t its output arrives as it is written, and it
    is killed when vmrt ends first, unless you detach from it; without, it is shown once the command has ended, at most
    16 MiB of each stream.
    """
    from vmrt.cli.client import Daemon
    from vmrt.proto.runtime.v1 import api_pb2

    if want_stdin or want_tty:
        if time_limit is not None:
            raise click.UsageError("--time-limit does not go with -i and -t.")
        from vmrt.cli.interactive import exec_interactively

        raise SystemExit(
            exec_interactively(options, container, command, stdin=want_stdin, tty=want_tty, detach_keys=detach_keys)
        )
    with own_failure(), Daemon(options) as daemon:
        target = locate(daemon, container)
        limit = 0 if time_limit is None else max(1, round(time_limit))
        request = api_pb2.ExecSyncRequest(container_id=target.id, cmd=command, timeout=limit)
        answer = daemon.call(daemon.runtime.ExecSync, request, timeout_s=None)
    for stream, octets in ((sys.stdout.buffer, answer.stdout), (sys.stderr.buffer, answer.stderr)):
        stream.write(octets)
        stream.flush()
    raise SystemExit(answer.exit_code)


@click.command(
    cls=Command,
    examples="""
    vmrt logs web
    vmrt logs -f --tail 20 web
    vmrt logs -t mypod/sidecar 2>/dev/null
    """,
)
@click.option("-f", "--follow", is_flag=True, help="Go on until the container has ended.")
@click.option("-t", "--timestamps", is_flag=True, help="Begin every line with its time.")
@click.option("-n", "--tail", type=click.IntRange(min=0), metavar="N", help="Begin with the last N lines.")
@click.argument("container", shell_complete=container_names)
@click.pass_obj
def logs(options: Options, follow: bool, timestamps: bool, tail: int | None, container: str) -> None:
    """Show what a container has written: its stdout on stdout, its stderr on stderr, octet by octet.

    The log is read from the file that the container's log_path names, so this has to run on the daemon's machine, as a
    user who may read that file. A container whose pod was made without a log directory has no log. With --follow,
    rotations of the file are followed, too.
    """
    from vmrt.cli.client import Daemon
    from vmrt.cli.logfile import Printer, last_lines, opened

    with Daemon(options) as daemon:
        target = locate(daemon, container)
        status = container_status(daemon, target.id)
        if not status.log_path:
            raise FailedPreconditionError(f"container {short_id(target.id)} has no log: its pod has no log directory")
        path = Path(status.log_path)
        printer = Printer(sys.stdout.buffer, sys.stderr.buffer, timestamps=timestamps)
        try:
            with opened(path) as reader:
                if not follow and not path.exists():
                    raise FailedPreconditionError(f"container {short_id(target.id)}: its log {path} does not exist")
                if tail is None:
                    for entries in reader.available():
                        printer.write(entries)
                else:
                    pieces = (entry for entries in reader.available() for entry in entries)
                    printer.write(last_lines(pieces, tail))
                if follow:
                    for entries in reader.follow(Watch(daemon, target.id)):
                        printer.write(entries)
                if reader.parser.skipped:
                    click.echo(f"vmrt: {reader.parser.skipped} lines of {path} are not CRI log lines", err=True)
        except PermissionError as e:
            raise VmrtError(f"not allowed to read {path}", hint="run as root, e.g. with sudo") from e
        except KeyboardInterrupt:
            raise SystemExit(130) from None


def container_status(daemon: Daemon, identifier: str) -> api_pb2.ContainerStatus:
    """Ask for one container's status."""
    from vmrt.proto.runtime.v1 import api_pb2

    request = api_pb2.ContainerStatusRequest(container_id=identifier)
    return daemon.call(daemon.runtime.ContainerStatus, request).status


class Watch:
    """Says whether one container may still write: it is created or running. A removed one may not.

    Containers outlive the daemon, so a daemon that goes away is waited for, `DAEMON_PATIENCE_S` long.
    """

    def __init__(self, daemon: Daemon, identifier: str) -> None:
        self._daemon = daemon
        self._identifier = identifier
        self._away_since: float | None = None

    def __call__(self) -> bool:
        """Ask. Raises `VmrtError`."""
        from vmrt.proto.runtime.v1 import api_pb2

        try:
            state = container_status(self._daemon, self._identifier).state
        except VmrtError as e:
            if e.code is Code.NOT_FOUND:
                return False
            if e.code is not Code.UNAVAILABLE:
                raise
            now = time.monotonic()
            if self._away_since is None:
                self._away_since = now
                click.echo("vmrt: the daemon is away; the container goes on, waiting", err=True)
            if now - self._away_since > DAEMON_PATIENCE_S:
                raise
            return True
        self._away_since = None
        return state in (api_pb2.CONTAINER_CREATED, api_pb2.CONTAINER_RUNNING)
