"""The commands that concern images: `images`, `pull`, `load`, `rmi`."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmrt.cli import credentials
from vmrt.cli.app import Failure, Options
from vmrt.cli.command import Command
from vmrt.cli.complete import image_names
from vmrt.cli.output import emit_json, emit_table, printable, short_id, size
from vmrt.errors import NotFoundError, VmrtError
from vmrt.model import RegistryAuth

if TYPE_CHECKING:
    from vmrt.cli.client import Daemon
    from vmrt.cli.progress import Reporter
    from vmrt.proto.runtime.v1 import api_pb2
    from vmrt.proto.vmrt.v1 import control_pb2


def split_tag(reference: str) -> tuple[str, str]:
    """Return (name, tag) of a complete tagged reference."""
    head, slash, last = reference.rpartition("/")
    name, _, tag = last.partition(":")
    return f"{head}{slash}{name}", tag


@click.command(
    cls=Command,
    examples="""
    vmrt images
    vmrt images docker.io/library/alpine:3.20
    vmrt rmi $(vmrt images -q)          remove all images
    """,
)
@click.argument("reference", default="", shell_complete=image_names)
@click.option("-q", "--quiet", is_flag=True, help="Print ids only, in full.")
@click.option("--digests", is_flag=True, help="Show the digests of the images' manifests.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def images(options: Options, reference: str, quiet: bool, digests: bool, as_json: bool) -> None:
    """List images, or those that REFERENCE names.

    An image with several tags has a line for each. SIZE is what its layers occupy on disk as block images; layers that
    images share are counted for each of them.
    """
    from vmrt.cli.client import Daemon
    from vmrt.proto.runtime.v1 import api_pb2

    request = api_pb2.ListImagesRequest()
    if reference:
        request.filter.image.image = reference
    with Daemon(options) as daemon:
        found = list(daemon.call(daemon.images.ListImages, request).images)
    found.sort(key=lambda image: (min(image.repo_tags, default="~"), image.id))
    if as_json:
        emit_json(
            [
                {
                    "id": image.id,
                    "repo_tags": list(image.repo_tags),
                    "repo_digests": list(image.repo_digests),
                    "size_bytes": image.size,
                    "pinned": image.pinned,
                }
                for image in found
            ]
        )
    elif quiet:
        for image in found:
            click.echo(printable(image.id))
    else:
        emit_table(
            ["IMAGE", "TAG", "IMAGE ID", "SIZE"] + (["DIGEST"] if digests else []),
            [row for image in found for row in _rows(image, digests)],
        )


def _rows(image: api_pb2.Image, digests: bool) -> Iterable[list[str]]:
    names = [split_tag(tag) for tag in image.repo_tags]
    if not names:
        names = [(digest.partition("@")[0], "<none>") for digest in image.repo_digests] or [("<none>", "<none>")]
    for name, tag in names:
        row = [name, tag, short_id(image.id), size(image.size)]
        if digests:
            row.append(next((d.partition("@")[2] for d in image.repo_digests if d.partition("@")[0] == name), ""))
        yield row


@click.command(
    cls=Command,
    examples="""
    vmrt pull alpine:3.20
    vmrt pull --authfile ~/.docker/config.json registry.example.com/team/app:1
    vmrt pull -u alice --password-stdin registry.example.com/app <password.txt
    """,
)
@click.argument("reference")
@click.option("--authfile", type=click.Path(path_type=Path), help="Docker-style auth file (containers-auth.json).")
@click.option("--creds-file", type=click.Path(path_type=Path), help="File that holds one line USERNAME:PASSWORD.")
@click.option("--username", "-u", default="", help="User name; the password is asked for on the terminal.")
@click.option("--password-stdin", is_flag=True, help="Read the password from standard input instead.")
@click.option("-q", "--quiet", is_flag=True, help="No progress; print the image's id only.")
@click.pass_obj
def pull(
    options: Options,
    reference: str,
    authfile: Path | None,
    creds_file: Path | None,
    username: str,
    password_stdin: bool,
    quiet: bool,
) -> None:
    """Fetch an image from a registry and convert its layers to block images.

    The registry is always asked, so a tag that has moved is followed. Layers that are here already are not fetched
    again. Mirrors, unqualified names and signature policy are skopeo's: registries.conf and policy.json. Without
    credential options, the daemon's own credential files are used. A password is never taken from the command line,
    where every user of the machine could read it.
    """
    from vmrt.cli.client import Daemon
    from vmrt.cli.progress import Reporter

    auth = credentials.collect(
        reference, authfile=authfile, creds_file=creds_file, username=username, password_stdin=password_stdin
    )
    with Daemon(options) as daemon, Reporter("pull", quiet=quiet) as reporter:
        image = pull_image(daemon, reference, reporter, auth)
    _say(image, quiet, "pulled")


@click.command(
    cls=Command,
    examples="""
    vmrt load app.tar
    vmrt load ./oci-layout --tag app:dev
    docker save app:dev | vmrt load -
    """,
)
@click.argument("path")
@click.option(
    "--tag", "-t", default="", metavar="NAME[:TAG]", help="Name for an image that the archive leaves unnamed."
)
@click.option("-q", "--quiet", is_flag=True, help="No progress; print the images' ids only.")
@click.pass_obj
def load(options: Options, path: str, tag: str, quiet: bool) -> None:
    """Import images from PATH: an OCI layout (directory or tar), or an archive of `docker save`.

    PATH is read by the daemon, so it has to be on the daemon's machine and readable by it; "-" reads an archive from
    standard input.
    """
    from vmrt.cli.client import Daemon
    from vmrt.cli.progress import Reporter
    from vmrt.proto.vmrt.v1 import control_pb2

    with Daemon(options) as daemon, tempfile.TemporaryDirectory(prefix="vmrt-load-") as spool:
        if path == "-":
            if sys.stdin.isatty():
                raise click.UsageError("Standard input is a terminal; give it an archive.")
            source = Path(spool) / "stdin.tar"
            with source.open("wb") as archive:
                shutil.copyfileobj(sys.stdin.buffer, archive)
        else:
            source = Path(path).absolute()
            if not source.exists():
                raise NotFoundError(f"{path}: no such file or directory")
        with Reporter("load", quiet=quiet) as reporter:
            request = control_pb2.LoadImagesRequest(path=str(source), tag=tag)
            loaded = _attend(daemon.stream(daemon.control.LoadImages, request), reporter)
    if not loaded:
        raise NotFoundError(f"{path} holds no image")
    for image in loaded:
        _say(image, quiet, "loaded")


@click.command(
    cls=Command,
    examples="""
    vmrt rmi alpine:3.20
    vmrt rmi 4f06b3a2c1d0
    """,
)
@click.argument("references", nargs=-1, required=True, metavar="IMAGE...", shell_complete=image_names)
@click.option("-f", "--force", is_flag=True, help="An image that does not exist is no error.")
@click.pass_obj
def rmi(options: Options, references: tuple[str, ...], force: bool) -> None:
    """Remove images, by reference, digest or id.

    All names of an image go with it, as CRI wants it. Containers that use the image keep running: their layers stay on
    disk until the last of them is removed.
    """
    from vmrt.cli.client import Daemon
    from vmrt.proto.runtime.v1 import api_pb2

    failed = 0
    with Daemon(options) as daemon:
        for reference in references:
            try:
                image = find_image(daemon, reference)
                if image is not None:
                    spec = api_pb2.ImageSpec(image=image.id)
                    daemon.call(daemon.images.RemoveImage, api_pb2.RemoveImageRequest(image=spec))
                    click.echo(printable(f"removed {', '.join(image.repo_tags) or image.id}"))
                elif not force:
                    raise NotFoundError(f"no image {reference!r}", hint="`vmrt images` lists them")
            except VmrtError as e:
                Failure(printable(str(e))).show()
                failed += 1
    if failed:
        raise SystemExit(1)


def find_image(daemon: Daemon, reference: str) -> api_pb2.Image | None:
    """Ask for an image by reference, digest or id; None when it is absent."""
    from vmrt.proto.runtime.v1 import api_pb2

    request = api_pb2.ImageStatusRequest(image=api_pb2.ImageSpec(image=reference))
    answer = daemon.call(daemon.images.ImageStatus, request)
    return answer.image if answer.HasField("image") else None


def pull_image(
    daemon: Daemon, reference: str, reporter: Reporter, auth: RegistryAuth | None = None
) -> control_pb2.ImageSummary:
    """Pull with progress; cancelled with the caller. Raises `VmrtError`."""
    from vmrt.proto.vmrt.v1 import control_pb2

    request = control_pb2.PullImageRequest(reference=reference)
    if auth is not None:
        request.auth.CopyFrom(
            control_pb2.RegistryAuth(
                username=auth.username,
                password=auth.password,
                auth=auth.auth,
                server_address=auth.server_address,
                identity_token=auth.identity_token,
                registry_token=auth.registry_token,
            )
        )
    pulled = _attend(daemon.stream(daemon.control.PullImage, request), reporter)
    if not pulled:
        raise VmrtError(f"the daemon ended the pull of {reference} without naming an image")
    return pulled[-1]


def _attend(events: Iterable[control_pb2.ImageEvent], reporter: Reporter) -> list[control_pb2.ImageSummary]:
    """Show the progress of a stream of image events and return its images."""
    arrived = []
    for event in events:
        if event.WhichOneof("event") == "progress":
            reporter.update(event.progress.what, event.progress.done, event.progress.total)
        elif event.WhichOneof("event") == "image":
            arrived.append(event.image)
    return arrived


def _say(image: control_pb2.ImageSummary, quiet: bool, verb: str) -> None:
    if quiet:
        click.echo(printable(image.id))
    else:
        name = ", ".join(image.repo_tags) or ", ".join(image.repo_digests) or "untagged image"
        click.echo(printable(f"{verb} {name} ({short_id(image.id)}, {size(image.size_bytes)})"))
