"""The command `run`: a pod, a container, its output, and nothing left behind.

Order and undo: the log directory, the pod and the container are made in this order and taken back in the opposite one.
The pod's removal is registered before the call that makes it, and finds the pod by the uid in its label, so a call that
was interrupted after the daemon had done it leaves nothing either. The log is read once more after the pod has been
stopped: nothing can be written after that, so nothing is missed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmrt.cli.app import Options, own_failure
from vmrt.cli.command import Command
from vmrt.cli.complete import image_names
from vmrt.cli.containers import Watch, container_status
from vmrt.cli.interactive import check_terminal, detach_octets, tls_of
from vmrt.cli.params import Port, PublishedPort, Size, User, UserChoice, Variable, detach_keys_option
from vmrt.cli.pods import RUN_LABEL, remove_pod, run_log_directory, stop_containers
from vmrt.cli.signals import Interrupted, Signals
from vmrt.errors import NotFoundError, VmrtError

if TYPE_CHECKING:
    from vmrt.cli.client import Daemon
    from vmrt.cli.logfile import LogReader, Printer
    from vmrt.proto.runtime.v1 import api_pb2

# How long a container may take to end after Ctrl-C; a second Ctrl-C cuts it short.
GRACE_S = 10
CPU_PERIOD_US = 100_000
# What kubelet hides from unprivileged containers (its "Default" proc mount type).
MASKED_PATHS = (
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
)
READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


@dataclass(frozen=True, slots=True)
class Wish:
    """What the command line asked for."""

    image: str
    command: tuple[str, ...]
    name: str
    envs: tuple[tuple[str, str], ...]
    entrypoint: str | None
    workdir: str
    user: UserChoice | None
    memory_bytes: int
    cpus: float
    ports: tuple[Port, ...]
    handler: str
    pull: str
    keep: bool
    detach: bool
    quiet: bool
    stdin: bool = False
    tty: bool = False
    detach_keys: bytes = b""


def default_name(image: str, uid: str) -> str:
    """Return a pod name made of the image's: a DNS label, made unique by the pod's uid."""
    base = image.partition("@")[0].rpartition("/")[2].partition(":")[0].lower()
    base = re.sub(r"[^a-z0-9]+", "-", base).strip("-")[:40].rstrip("-") or "pod"
    return f"{base}-{uid[:6]}"


def resources(wish: Wish) -> api_pb2.LinuxContainerResources:
    """Return the limits asked for in CRI's terms."""
    from vmrt.proto.runtime.v1 import api_pb2

    limits = api_pb2.LinuxContainerResources(memory_limit_in_bytes=wish.memory_bytes)
    if wish.cpus:
        limits.cpu_period = CPU_PERIOD_US
        limits.cpu_quota = max(1000, round(wish.cpus * CPU_PERIOD_US))
        limits.cpu_shares = max(2, round(wish.cpus * 1024))
    return limits


def pod_config(wish: Wish, uid: str, log_directory: Path) -> api_pb2.PodSandboxConfig:
    """Return the CRI configuration of the pod. The VM is sized by the container's limits."""
    from vmrt.proto.runtime.v1 import api_pb2

    hostname = re.sub(r"[^a-z0-9-]+", "-", wish.name.lower()).strip("-")[:63].rstrip("-")
    return api_pb2.PodSandboxConfig(
        metadata=api_pb2.PodSandboxMetadata(name=wish.name, uid=uid, namespace="default"),
        hostname=hostname or "pod",
        log_directory=str(log_directory),
        labels={RUN_LABEL: uid},
        port_mappings=[
            api_pb2.PortMapping(
                protocol=api_pb2.Protocol.Value(port.protocol.upper()),
                container_port=port.container_port,
                host_port=port.host_port,
                host_ip=port.host_ip,
            )
            for port in wish.ports
        ],
        linux=api_pb2.LinuxPodSandboxConfig(
            security_context=api_pb2.LinuxSandboxSecurityContext(
                namespace_options=api_pb2.NamespaceOption(pid=api_pb2.CONTAINER),
                seccomp=api_pb2.SecurityProfile(profile_type=api_pb2.SecurityProfile.RuntimeDefault),
            ),
            resources=resources(wish),
        ),
    )


def container_config(wish: Wish, image_id: str) -> api_pb2.ContainerConfig:
    """Return the CRI configuration of the container: --entrypoint is CRI's command, what follows the image its args."""
    from vmrt.proto.runtime.v1 import api_pb2

    security = api_pb2.LinuxContainerSecurityContext(
        namespace_options=api_pb2.NamespaceOption(pid=api_pb2.CONTAINER),
        seccomp=api_pb2.SecurityProfile(profile_type=api_pb2.SecurityProfile.RuntimeDefault),
        masked_paths=MASKED_PATHS,
        readonly_paths=READONLY_PATHS,
    )
    if wish.user is not None:
        security.run_as_username = wish.user.name
        if wish.user.uid is not None:
            security.run_as_user.value = wish.user.uid
        if wish.user.gid is not None:
            security.run_as_group.value = wish.user.gid
    return api_pb2.ContainerConfig(
        metadata=api_pb2.ContainerMetadata(name=wish.name),
        image=api_pb2.ImageSpec(image=image_id, user_specified_image=wish.image),
        command=[wish.entrypoint] if wish.entrypoint else [],
        args=wish.command,
        working_dir=wish.workdir,
        envs=[api_pb2.KeyValue(key=key, value=os.fsencode(value)) for key, value in wish.envs],
        log_path="0.log",
        stdin=wish.stdin,
        # A pipe's end is the container's; one may detach from a terminal and come back.
        stdin_once=wish.stdin and not wish.tty and not wish.detach,
        tty=wish.tty,
        linux=api_pb2.LinuxContainerConfig(resources=resources(wish), security_context=security),
    )


@click.command(
    context_settings={"allow_interspersed_args": False},
    cls=Command,
    examples="""
    vmrt run alpine uname -r
    vmrt run -e GREETING=hello -w /tmp alpine sh -c 'echo $GREETING from $PWD'
    vmrt run --memory 1g --cpus 2 -p 8080:80 --name web nginx
    vmrt run -d --name db postgres:16; vmrt logs -f db; vmrt rm -f db
    """,
)
@click.option("--name", default="", help="Name of the pod and its container. Default: made of the image's name.")
@click.option("-e", "--env", "envs", type=Variable(), multiple=True, metavar="KEY[=VALUE]", help="Set a variable.")
@click.option("--entrypoint", metavar="PROGRAM", help="Run this program instead of the image's entry point.")
@click.option("-w", "--workdir", default="", metavar="DIR", help="Working directory in the container.")
@click.option("-u", "--user", type=User(), metavar="USER[:GID]", help="User name or uid to run as.")
@click.option("-m", "--memory", type=Size(), default="0", metavar="SIZE", help="Memory limit, e.g. 512m; sizes the VM.")
@click.option("--cpus", type=click.FloatRange(min=0, max=1024), default=0, metavar="N", help="CPU limit, e.g. 1.5.")
@click.option(
    "-p",
    "--publish",
    "ports",
    type=PublishedPort(),
    multiple=True,
    metavar="[IP:]HOST:CTR[/PROTO]",
    help="Make a port of the container reachable on the host.",
)
@click.option("--handler", default="", help="Runtime handler (as in RuntimeClass). Default: the daemon's first.")
@click.option(
    "--pull",
    type=click.Choice(["missing", "always", "never"]),
    default="missing",
    show_default=True,
    help="When to fetch the image.",
)
@click.option("--rm/--keep", "remove", default=True, help="Remove the pod when the container has ended (default).")
@click.option("-d", "--detach", is_flag=True, help="Print the pod's id and leave it running; implies --keep.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.option("-i", "--stdin", "want_stdin", is_flag=True, help="Give the container our stdin; its end of file, too.")
@click.option("-t", "--tty", "want_tty", is_flag=True, help="Give the container a terminal; with -i ours becomes raw.")
@detach_keys_option("pod")
@click.argument("image", shell_complete=image_names)
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[COMMAND [ARG]...]")
@click.pass_obj
def run(
    options: Options,
    name: str,
    envs: tuple[tuple[str, str] | None, ...],
    entrypoint: str | None,
    workdir: str,
    user: UserChoice | None,
    memory: int,
    cpus: float,
    ports: tuple[Port, ...],
    handler: str,
    pull: str,
    remove: bool,
    detach: bool,
    quiet: bool,
    want_stdin: bool,
    want_tty: bool,
    detach_keys: str,
    image: str,
    command: tuple[str, ...],
) -> None:
    """Run IMAGE in a virtual machine of its own, show what it writes, and clean up.

    The image is fetched if it is absent. COMMAND replaces the image's default arguments. stdout and stderr arrive as
    they are written, octet by octet. The container's exit status becomes that of vmrt; 125 means that vmrt itself
    failed. Ctrl-C stops the container (a second one kills it), removes the pod and exits with 130; with -it it is a key
    like others. With -i or -t the output is streamed, so a restart of the daemon ends the run; with -d they only say
    what the container is made with, for `vmrt attach`.

    The daemon writes the container's log into a private directory below $TMPDIR, so vmrt and the daemon have to see
    the same one.
    """
    if not detach:
        check_terminal(want_stdin, want_tty)
    uid = str(uuid.uuid4())
    wish = Wish(
        image=image,
        command=command,
        name=name or default_name(image, uid.replace("-", "")),
        envs=tuple(each for each in envs if each is not None),
        entrypoint=entrypoint,
        workdir=workdir,
        user=user,
        memory_bytes=memory,
        cpus=cpus,
        ports=ports,
        handler=handler,
        pull=pull,
        keep=detach or not remove,
        detach=detach,
        quiet=quiet,
        stdin=want_stdin,
        tty=want_tty,
        detach_keys=detach_octets(detach_keys, stdin=want_stdin, tty=want_tty),
    )
    from vmrt.cli.client import Daemon

    try:
        with own_failure(), Signals() as signals, Daemon(options, signals.check) as daemon:
            status = _run(daemon, options, wish, uid, signals)
    except Interrupted as e:
        status = 128 + e.signum
    raise SystemExit(status)


def _run(daemon: Daemon, options: Options, wish: Wish, uid: str, signals: Signals) -> int:
    """Do it; return the container's exit code. Raises `VmrtError` and `Interrupted`, with everything undone."""
    from vmrt.cli.logfile import Printer, opened
    from vmrt.cli.progress import status
    from vmrt.proto.runtime.v1 import api_pb2

    image_id = obtain_image(daemon, wish)
    directory = run_log_directory(uid)
    assert directory is not None
    interactive = (wish.stdin or wish.tty) and not wish.detach
    with contextlib.ExitStack() as undo:
        try:
            undo.callback(shutil.rmtree, directory, ignore_errors=True)
            directory.mkdir(mode=0o700)
            reader = undo.enter_context(opened(directory / "0.log"))
            printer = Printer(sys.stdout.buffer, sys.stderr.buffer)
            undo.callback(_take_back, daemon, uid, reader, None if interactive else printer)
            pod = pod_config(wish, uid, directory)
            with status("starting the VM", quiet=wish.quiet):
                made = api_pb2.RunPodSandboxRequest(config=pod, runtime_handler=wish.handler)
                pod_id = daemon.call(daemon.runtime.RunPodSandbox, made).pod_sandbox_id
                created = api_pb2.CreateContainerRequest(
                    pod_sandbox_id=pod_id, config=container_config(wish, image_id), sandbox_config=pod
                )
                container_id = daemon.call(daemon.runtime.CreateContainer, created).container_id
                if not interactive:
                    daemon.call(daemon.runtime.StartContainer, api_pb2.StartContainerRequest(container_id=container_id))
            if wish.detach:
                click.echo(pod_id)
                undo.pop_all()
                return 0
            if interactive:
                if not _interact(daemon, options, wish, container_id, signals):
                    click.echo(f"\r\nvmrt: detached; `vmrt rm -f {wish.name}` removes the pod", err=True)
                    undo.pop_all()
                    return 0
            else:
                _show(daemon, container_id, reader, printer)
            final = container_status(daemon, container_id)
            if final.reason == "OOMKilled":
                click.echo("vmrt: the container was killed because it ran out of memory (see --memory)", err=True)
            if wish.keep:
                click.echo(f"vmrt: pod {wish.name} is kept; `vmrt rm -f {wish.name}` removes it", err=True)
                undo.pop_all()
            return final.exit_code
        finally:
            signals.hold()


def obtain_image(daemon: Daemon, wish: Wish) -> str:
    """Return the image's id, after fetching it where the policy says so."""
    from vmrt.cli.images import find_image, pull_image
    from vmrt.cli.progress import Reporter

    if wish.pull != "always":
        found = find_image(daemon, wish.image)
        if found is not None:
            return found.id
        if wish.pull == "never":
            raise NotFoundError(f"no image {wish.image!r}", hint="it is not fetched because of --pull never")
    with Reporter("pull", quiet=wish.quiet) as reporter:
        return pull_image(daemon, wish.image, reporter).id


def _show(daemon: Daemon, container_id: str, reader: LogReader, printer: Printer) -> None:
    """Print output until the container has ended; on a signal stop it first, printing on."""
    output = reader.follow(Watch(daemon, container_id))
    try:
        for entries in output:
            printer.write(entries)
    except Interrupted:
        _stop_softly(daemon, container_id)
        raise


def _stop_softly(daemon: Daemon, container_id: str) -> None:
    """Stop a container; one more signal ends the waiting."""
    click.echo(f"vmrt: stopping (up to {GRACE_S} s; once more kills at once)", err=True)
    with contextlib.suppress(Interrupted, VmrtError):
        stop_containers(daemon, [container_id], GRACE_S)


def _interact(daemon: Daemon, options: Options, wish: Wish, container_id: str, signals: Signals) -> bool:
    """Start the container with our stdio joined to it, and wait for its end; False when the person has detached.

    The session is there before the container runs, so nothing it writes is missed.
    """
    from vmrt.cli.streams import Detached, Hooks, Wanted, process
    from vmrt.proto.runtime.v1 import api_pb2

    def start() -> None:
        daemon.call(daemon.runtime.StartContainer, api_pb2.StartContainerRequest(container_id=container_id))

    request = api_pb2.AttachRequest(
        container_id=container_id, stdin=wish.stdin, stdout=True, stderr=not wish.tty, tty=wish.tty
    )
    url = daemon.call(daemon.runtime.Attach, request).url
    try:
        process(url, Wanted(wish.stdin, wish.tty, wish.detach_keys), tls_of(options), Hooks(start, signals.check))
    except Detached:
        return False
    except Interrupted:
        _stop_softly(daemon, container_id)
        raise
    # The daemon may hear of the end later than we do.
    running = Watch(daemon, container_id)
    while running():
        time.sleep(0.02)
    return True


def _take_back(daemon: Daemon, uid: str, reader: LogReader, printer: Printer | None) -> None:
    """Remove the pod made under `uid`, if there is one, and print what its log still holds, unless it is streamed."""
    for pod_id in _made_under(daemon, uid):
        remove_pod(daemon, pod_id)
    if printer is not None:
        for entries in reader.available():
            printer.write(entries)


def _made_under(daemon: Daemon, uid: str) -> Iterator[str]:
    from vmrt.proto.runtime.v1 import api_pb2

    request = api_pb2.ListPodSandboxRequest(filter=api_pb2.PodSandboxFilter(label_selector={RUN_LABEL: uid}))
    for pod in daemon.call(daemon.runtime.ListPodSandbox, request).items:
        if pod.metadata.uid == uid:
            yield pod.id
