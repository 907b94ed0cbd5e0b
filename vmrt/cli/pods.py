"""The commands that concern pods, and those that take a pod or a container: `pods`, `inspect`, `stop`, `rm`."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmrt.cli.app import Failure, Options
from vmrt.cli.command import Command
from vmrt.cli.complete import targets
from vmrt.cli.output import age, emit_json, emit_table, printable, rfc3339, short_id
from vmrt.errors import FailedPreconditionError, VmrtError

if TYPE_CHECKING:
    from vmrt.cli.client import Daemon
    from vmrt.proto.runtime.v1 import api_pb2

# The label that `vmrt run` gives its pods; the value is the pod's uid.
RUN_LABEL = "vmrt.dev/run"
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def run_log_directory(uid: str) -> Path | None:
    """Return the log directory of the pod that `vmrt run` made under this uid; None for a uid it cannot have made.

    The path follows from the uid alone. A pod's labels and log_directory come from whoever made it, so neither may ever
    decide what `vmrt rm` deletes.
    """
    return Path(tempfile.gettempdir()) / f"vmrt-run-{uid}" if _UUID.fullmatch(uid) else None


@click.command(
    cls=Command,
    examples="""
    vmrt pods
    vmrt pods --state ready --json
    vmrt rm -f $(vmrt pods -q)          remove all pods
    """,
)
@click.option("-a", "--all", "everything", is_flag=True, help="Accepted for the habit's sake: all pods are shown.")
@click.option("-q", "--quiet", is_flag=True, help="Print ids only, in full.")
@click.option("--state", type=click.Choice(["ready", "notready"]), help="Only pods in this state.")
@click.option("--name", default="", help="Only pods with this name.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def pods(options: Options, everything: bool, quiet: bool, state: str | None, name: str, as_json: bool) -> None:
    """List pods, newest first.

    Each line is one virtual machine, or a pod that a delegate runs. A pod is "ready" while its VM runs, and "notready"
    once it has been stopped or its VM has died.
    """
    from vmrt.cli.client import Daemon, pods_of

    with Daemon(options) as daemon:
        found = [
            pod
            for pod in pods_of(daemon)
            if (not name or pod.metadata.name == name) and (state is None or _state(pod) == state)
        ]
        addresses = {} if quiet else {pod.id: _addresses(daemon, pod) for pod in found}
    if as_json:
        emit_json([_as_json(pod, addresses[pod.id]) for pod in found])
    elif quiet:
        for pod in found:
            click.echo(pod.id)
    else:
        emit_table(
            ["POD ID", "CREATED", "STATE", "NAME", "NAMESPACE", "ATTEMPT", "IP", "HANDLER"],
            [
                [
                    short_id(pod.id),
                    age(pod.created_at),
                    _state(pod),
                    pod.metadata.name,
                    pod.metadata.namespace,
                    str(pod.metadata.attempt),
                    addresses[pod.id][0] if addresses[pod.id] else "",
                    pod.runtime_handler,
                ]
                for pod in found
            ],
        )


def _state(pod: api_pb2.PodSandbox) -> str:
    return {0: "ready", 1: "notready"}.get(pod.state, "unknown")


def _addresses(daemon: Daemon, pod: api_pb2.PodSandbox) -> list[str]:
    from vmrt.cli.client import DaemonError
    from vmrt.errors import Code
    from vmrt.proto.runtime.v1 import api_pb2

    try:
        request = api_pb2.PodSandboxStatusRequest(pod_sandbox_id=pod.id)
        network = daemon.call(daemon.runtime.PodSandboxStatus, request).status.network
    except DaemonError as e:
        # Removed since it was listed; or run by a delegate that is down, which a list can still be made of.
        if e.code in (Code.NOT_FOUND, Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED):
            return []
        raise
    return [ip for ip in (network.ip, *(each.ip for each in network.additional_ips)) if ip]


def _as_json(pod: api_pb2.PodSandbox, addresses: Sequence[str]) -> dict[str, object]:
    return {
        "id": pod.id,
        "name": pod.metadata.name,
        "namespace": pod.metadata.namespace,
        "uid": pod.metadata.uid,
        "attempt": pod.metadata.attempt,
        "state": _state(pod),
        "created_at": rfc3339(pod.created_at),
        "ips": list(addresses),
        "handler": pod.runtime_handler,
        "labels": dict(sorted(pod.labels.items())),
        "annotations": dict(sorted(pod.annotations.items())),
    }


@click.command(
    cls=Command,
    examples="""
    vmrt inspect web
    vmrt inspect mypod/sidecar
    vmrt inspect 3f2a9c01d4be | jq .
    """,
)
@click.argument("target", shell_complete=targets)
@click.pass_obj
def inspect(options: Options, target: str) -> None:
    """Show all that the daemon knows about one pod or container, as JSON.

    This is for a person who wants to understand what happened; its keys may change with any release. Scripts take
    `pods --json` and `ps --json`.
    """
    from vmrt.cli.client import Daemon
    from vmrt.proto.vmrt.v1 import control_pb2

    with Daemon(options) as daemon:
        found = locate(daemon, target)
        answer = daemon.call(daemon.control.Inspect, control_pb2.InspectRequest(id=found.id))
    try:
        content = json.loads(answer.json)
    except ValueError as e:
        raise VmrtError(f"the daemon's answer is not JSON: {e}") from e
    emit_json({"kind": answer.kind, **content} if isinstance(content, dict) else content)


@click.command(
    cls=Command,
    examples="""
    vmrt stop web
    vmrt stop --time 0 mypod/sidecar
    """,
)
@click.option(
    "-t",
    "--time",
    "grace_s",
    type=click.IntRange(0, 86400),
    metavar="SECONDS",
    default=10,
    show_default=True,
    help="How long containers may take to end after their stop signal before they are killed.",
)
@click.argument("names", nargs=-1, required=True, metavar="TARGET...", shell_complete=targets)
@click.pass_obj
def stop(options: Options, grace_s: int, names: tuple[str, ...]) -> None:
    """Stop pods or containers. What is stopped already is no error.

    The containers get their stop signal and are killed when the grace period is over; a pod's VM and network go next.
    Logs and states stay until `vmrt rm`. A name is looked for among pods first; POD/CONTAINER names a container.
    """
    _each(options, names, lambda daemon, found: stop_target(daemon, found, grace_s))


@click.command(
    cls=Command,
    examples="""
    vmrt stop web && vmrt rm web
    vmrt rm -f $(vmrt pods -q)          remove all pods
    """,
)
@click.option("-f", "--force", is_flag=True, help="Stop what is running, at once; what does not exist is no error.")
@click.argument("names", nargs=-1, metavar="TARGET...", shell_complete=targets)
@click.pass_obj
def rm(options: Options, force: bool, names: tuple[str, ...]) -> None:
    """Remove pods (with all their containers) or single containers.

    What is running is refused without --force.
    """
    if not names and not force:
        raise click.UsageError("Missing argument 'TARGET...'.")
    _each(options, names, lambda daemon, found: remove_target(daemon, found, force), missing_ok=force)


def locate(daemon: Daemon, wanted: str) -> api_pb2.PodSandbox | api_pb2.Container:
    """Return the one pod or container that a person means."""
    from vmrt.cli.client import containers_of, pods_of
    from vmrt.cli.lookup import find_either

    return find_either(containers_of(daemon), pods_of(daemon), wanted)


def _each(
    options: Options,
    names: Sequence[str],
    action: Callable[[Daemon, api_pb2.PodSandbox | api_pb2.Container], None],
    *,
    missing_ok: bool = False,
) -> None:
    """Do something to every target, going on after a failure; print what was done, exit 1 when any failed."""
    from vmrt.cli.client import Daemon
    from vmrt.errors import NotFoundError

    failed = False
    with Daemon(options) as daemon:
        for name in names:
            try:
                action(daemon, locate(daemon, name))
                click.echo(printable(name))
            except NotFoundError as e:
                if not missing_ok:
                    failed = True
                    Failure(printable(str(e))).show()
            except VmrtError as e:
                if options.debug:
                    raise
                failed = True
                Failure(printable(f"{name}: {e}")).show()
    if failed:
        raise SystemExit(1)


def stop_target(daemon: Daemon, found: api_pb2.PodSandbox | api_pb2.Container, grace_s: int) -> None:
    """Stop a container, or a pod after the containers in it."""
    from vmrt.cli.client import containers_of
    from vmrt.proto.runtime.v1 import api_pb2

    if isinstance(found, api_pb2.Container):
        stop_containers(daemon, [found.id], grace_s)
        return
    running = [
        each.id
        for each in containers_of(daemon)
        if each.pod_sandbox_id == found.id and each.state == api_pb2.CONTAINER_RUNNING
    ]
    stop_containers(daemon, running, grace_s)
    daemon.call(daemon.runtime.StopPodSandbox, api_pb2.StopPodSandboxRequest(pod_sandbox_id=found.id))


def stop_containers(daemon: Daemon, identifiers: Sequence[str], grace_s: int) -> None:
    """Stop containers side by side, so that their grace periods do not add up."""
    from vmrt.proto.runtime.v1 import api_pb2

    limit = None if daemon.timeout_s is None else daemon.timeout_s + grace_s
    requests = [api_pb2.StopContainerRequest(container_id=each, timeout=grace_s) for each in identifiers]
    daemon.call_all(daemon.runtime.StopContainer, requests, timeout_s=limit)


def remove_target(daemon: Daemon, found: api_pb2.PodSandbox | api_pb2.Container, force: bool) -> None:
    """Remove a pod or container; a running one only by force."""
    from vmrt.proto.runtime.v1 import api_pb2

    if isinstance(found, api_pb2.Container):
        if found.state == api_pb2.CONTAINER_RUNNING and not force:
            raise FailedPreconditionError("the container is running", hint="stop it first, or use rm -f")
        daemon.call(daemon.runtime.RemoveContainer, api_pb2.RemoveContainerRequest(container_id=found.id))
        return
    if found.state == api_pb2.SANDBOX_READY and not force:
        raise FailedPreconditionError("the pod is running", hint="stop it first, or use rm -f")
    remove_pod(daemon, found.id)
    if RUN_LABEL in found.labels and (directory := run_log_directory(found.metadata.uid)):
        shutil.rmtree(directory, ignore_errors=True)


def remove_pod(daemon: Daemon, identifier: str) -> None:
    """Stop and remove a pod."""
    from vmrt.proto.runtime.v1 import api_pb2

    daemon.call(daemon.runtime.StopPodSandbox, api_pb2.StopPodSandboxRequest(pod_sandbox_id=identifier))
    daemon.call(daemon.runtime.RemovePodSandbox, api_pb2.RemovePodSandboxRequest(pod_sandbox_id=identifier))
