"""`vmrt serve`: the daemon."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from pathlib import Path

import click

import vmrt.cli
from vmrt import config as configuration
from vmrt.cli.command import Command
from vmrt.errors import VmrtError


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def _set_up_logging(config: configuration.LogConfig) -> None:
    handler = logging.StreamHandler(sys.stderr)
    if config.format == "json":
        handler.setFormatter(_JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    logging.basicConfig(level=config.level.upper(), handlers=[handler], force=True)
    # Its debug lines hold every netlink message whole. A filter, because pyroute2 sets its logger's level itself.
    handler.addFilter(lambda record: record.levelno > logging.DEBUG or not record.name.startswith("pyroute2"))


@click.command(
    cls=Command,
    examples="""
    vmrt serve
    vmrt serve --root /srv/vmrt --listen unix:///run/vmrt2.sock
    vmrt serve --config ./test.toml --log-level debug
    vmrt serve --check
    """,
)
@click.option(
    "--config",
    "config_files",
    type=click.Path(path_type=Path, dir_okay=False),
    multiple=True,
    help="TOML file to read instead of /etc/vmrt/config.toml and config.d; may be given several times, later ones win.",
)
@click.option("--root", type=click.Path(path_type=Path), help="Directory for state, images and VMs.")
@click.option("--listen", metavar="unix:///PATH", help="Socket to serve CRI on.")
@click.option("--guest", type=click.Path(path_type=Path), help="Directory of the guest image (`vmrt guest build`).")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="Least level to log.")
@click.option("--check", is_flag=True, help="Check the configuration and exit.")
def serve(
    config_files: tuple[Path, ...],
    root: Path | None,
    listen: str | None,
    guest: Path | None,
    log_level: str | None,
    check: bool,
) -> None:
    """Serve CRI v1 until SIGTERM; running pods outlive the daemon.

    Several daemons can live on one machine when each has its own --root and --listen. Options win over files. Stopping
    or upgrading the daemon touches no pod: the next one adopts the running VMs of its root.
    """
    if vmrt.cli.daemon is None:
        raise click.ClickException("the daemon is started as `vmrt serve` or `python -m vmrt serve` only")
    overrides: dict[str, object] = {}
    if root is not None:
        overrides["root"] = root.absolute()
    if listen is not None:
        overrides["listen"] = listen if "://" in listen else f"unix://{Path(listen).absolute()}"
    if guest is not None:
        overrides["guest_dir"] = str(guest.absolute())
    if log_level is not None:
        overrides["log"] = {"level": log_level}
    try:
        config = configuration.load(list(config_files) or None, overrides)
        if check:
            click.echo("the configuration is good")
            return
        _set_up_logging(config.log)
        asyncio.run(vmrt.cli.daemon(config))
    except VmrtError as e:
        raise click.ClickException(str(e)) from e
