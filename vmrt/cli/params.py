"""Types of command line values that click does not bring (sizes, published ports, variables, users), shared options."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)
_FACTOR = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}
_PORT = re.compile(
    r"(?:(?:\[(?P<v6>[0-9a-fA-F:.]+)\]|(?P<v4>[0-9.]+)):)?"
    r"(?P<host>[0-9]{1,5}):(?P<container>[0-9]{1,5})(?:/(?P<protocol>tcp|udp|sctp))?"
)
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\$?")
# uid_t without its -1 (chown(2) gives that another meaning), and what CRI's int64 is checked against.
_MAX_ID = 2**32 - 2

_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])


def detach_keys_option(left: str) -> Callable[[_Decorated], _Decorated]:
    """Return the option `--detach-keys` of a command that can be left, with `left` running on."""
    return click.option(
        "--detach-keys",
        default="ctrl-p,ctrl-q",
        show_default=True,
        metavar="KEYS",
        help=f'With -it, what to type to leave the {left} running; "" for nothing.',
    )


class Size(click.ParamType[int]):
    """A number of octets: 512m, 1.5g, 1073741824. Units are powers of 1024, as docker's --memory has them."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return octets."""
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(str(value))
        if match is None or (octets := int(float(match[1]) * _FACTOR[match[2].lower()])) >= 2**63:
            self.fail(f"{value!r} is not a size such as 512m or 1.5g.", param, ctx)
        return octets


@dataclass(frozen=True, slots=True)
class Port:
    """One published port."""

    host_port: int
    container_port: int
    protocol: str = "tcp"
    host_ip: str = ""


class PublishedPort(click.ParamType[Port]):
    """[HOST_IP:]HOST_PORT:CONTAINER_PORT[/tcp|udp|sctp]; an IPv6 address in brackets."""

    name = "port"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Port:
        """Return the port."""
        if isinstance(value, Port):
            return value
        match = _PORT.fullmatch(str(value))
        if match is None:
            self.fail(f"{value!r} is not [IP:]HOST_PORT:CONTAINER_PORT[/tcp|udp|sctp].", param, ctx)
        host_ip = match["v6"] or match["v4"] or ""
        try:
            if host_ip:
                ipaddress.ip_address(host_ip)
        except ValueError:
            self.fail(f"{value!r}: {host_ip!r} is not an IP address.", param, ctx)
        ports = int(match["host"]), int(match["container"])
        if not all(0 < port < 65536 for port in ports):
            self.fail(f"{value!r}: a port is a number from 1 to 65535.", param, ctx)
        return Port(*ports, match["protocol"] or "tcp", host_ip)


class Variable(click.ParamType[tuple[str, str] | None]):
    """KEY=VALUE, or KEY for the value that vmrt itself was given; None for a KEY that is not set there."""

    name = "variable"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str] | None:
        """Return (key, value)."""
        if value is None or isinstance(value, tuple):
            return value
        key, equals, text = str(value).partition("=")
        if not key or "\0" in str(value):
            self.fail(f"{value!r} is not KEY=VALUE.", param, ctx)
        if not equals:
            return (key, os.environ[key]) if key in os.environ else None
        return key, text


@dataclass(frozen=True, slots=True)
class UserChoice:
    """Whom to run as: a uid or a user name of the image, and maybe a gid."""

    uid: int | None = None
    name: str = ""
    gid: int | None = None


class User(click.ParamType[UserChoice]):
    """UID[:GID] or NAME[:GID]. CRI has no group names."""

    name = "user"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> UserChoice:
        """Return the choice."""
        if isinstance(value, UserChoice):
            return value
        user, colon, group = str(value).partition(":")
        gid = self._number(group, "gid", param, ctx) if colon else None
        if user.isascii() and user.isdigit():
            return UserChoice(uid=self._number(user, "uid", param, ctx), gid=gid)
        if not _USER.fullmatch(user):
            self.fail(f"{user!r} is not a user name or uid.", param, ctx)
        return UserChoice(name=user, gid=gid)

    def _number(self, text: str, what: str, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if not (text.isascii() and text.isdigit()) or int(text) > _MAX_ID:
            self.fail(f"{text!r} is not a {what} (a number up to {_MAX_ID}).", param, ctx)
        return int(text)
