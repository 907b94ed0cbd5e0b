"""Completions that ask the daemon: names of pods, containers and images.

A shell waits for these, so they take half a second at most and any failure is an empty list.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from vmrt.cli.client import Daemon

LIMIT_S = 0.5


def _daemon(ctx: click.Context) -> Daemon:
    from vmrt.cli.app import Options
    from vmrt.cli.client import Daemon

    root = ctx.find_root()
    return Daemon(Options(str(root.params.get("socket") or ""), LIMIT_S))


def _matching(names: Iterable[str], incomplete: str) -> list[str]:
    return sorted({name for name in names if name.startswith(incomplete)})


def container_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Complete containers by name, or by id once something is typed that fits one."""
    from vmrt.cli.client import containers_of
    from vmrt.errors import VmrtError

    try:
        with _daemon(ctx) as daemon:
            found = containers_of(daemon)
    except VmrtError:
        return []
    ids = [container.id for container in found] if incomplete else []
    return _matching([container.metadata.name for container in found], incomplete) or _matching(ids, incomplete)


def targets(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Complete pods and containers."""
    from vmrt.cli.client import pods_of
    from vmrt.errors import VmrtError

    try:
        with _daemon(ctx) as daemon:
            found = pods_of(daemon)
    except VmrtError:
        return []
    ids = [pod.id for pod in found] if incomplete else []
    pods = _matching([pod.metadata.name for pod in found], incomplete) or _matching(ids, incomplete)
    return _matching([*pods, *container_names(ctx, param, incomplete)], "")


def image_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Complete images by tag."""
    from vmrt.errors import VmrtError
    from vmrt.proto.runtime.v1 import api_pb2

    try:
        with _daemon(ctx) as daemon:
            found = daemon.call(daemon.images.ListImages, api_pb2.ListImagesRequest()).images
    except VmrtError:
        return []
    return _matching((tag for image in found for tag in image.repo_tags), incomplete)
