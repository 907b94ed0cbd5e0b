"""Checks of single protobuf fields: each takes the value and the field's path, and refuses by that path.

Everything a client sends is bounded here, before it reaches a record, a command or the guest. Messages read as
"config.metadata.name is empty"; values are quoted shortened, and never where they may be secret.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from typing import NoReturn

from vmrt.errors import InvalidArgumentError, UnsupportedError

PATH_LIMIT = 4096  # PATH_MAX
TEXT_LIMIT = 4096
# Labels and annotations together are at most 256 KiB in Kubernetes; other clients get the same with room to spare.
MAP_LIMIT = 1024 * 1024
ID_LIMIT = 2**32 - 2  # 2**32 - 1 is "no change" in setresuid(2)

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# Metadata names: whatever a client likes, as long as it is one word that can stand in a log line and a key.
_NAME = re.compile(r"[^\s/\x00-\x1f\x7f]+")
_HOSTNAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_RESOLV_WORD = re.compile(r"[^\s#;\x00-\x1f\x7f]+")


def refuse(path: str, problem: str, *, hint: str = "") -> NoReturn:
    """Raise the error for a field that is wrong."""
    raise InvalidArgumentError(f"{path} {problem}", hint=hint)


def unsupported(path: str, problem: str, *, hint: str = "") -> NoReturn:
    """Raise the error for a field that is right but cannot be honoured."""
    raise UnsupportedError(f"{path} {problem}", hint=hint)


def short(value: object) -> str:
    """Quote a value for a message, at most some 64 characters of it."""
    quoted = repr(value)
    return quoted if len(quoted) <= 64 else f"{quoted[:61]}..."


def octets(value: str) -> int:
    """Return the length in UTF-8."""
    return len(value.encode())


def text(value: str, path: str, *, required: bool = False, limit: int = TEXT_LIMIT) -> str:
    """Check a single line of text, of at most `limit` octets, without control characters."""
    if required and not value:
        refuse(path, "is empty")
    if octets(value) > limit:
        refuse(path, f"is {octets(value)} octets long, more than {limit}")
    if found := _CONTROL.search(value):
        refuse(path, f"contains the control character {found.group()!r}")
    return value


def argument(value: str, path: str, *, limit: int = 128 * 1024) -> str:
    """Check a string for execve(2): anything but NUL, at most MAX_ARG_STRLEN octets."""
    if "\0" in value:
        refuse(path, "contains a NUL character")
    if octets(value) > limit:
        refuse(path, f"is {octets(value)} octets long, more than {limit}")
    return value


def name(value: str, path: str, *, limit: int = 253) -> str:
    """Check a metadata name: one word, required."""
    text(value, path, required=True, limit=limit)
    if not _NAME.fullmatch(value):
        refuse(path, f"is {short(value)}; white space and '/' cannot be part of it")
    return value


def hostname(value: str, path: str) -> str:
    """Check a host name, 64 octets at most (HOST_NAME_MAX, gethostname(2)); "" is let through."""
    text(value, path, limit=64)
    if value and not _HOSTNAME.fullmatch(value):
        refuse(path, f"is {short(value)}, which is no host name (RFC 1123)")
    return value


def absolute_path(value: str, path: str, *, required: bool = False) -> str:
    """Check an absolute path without ".." in it; "" is let through unless `required`."""
    text(value, path, required=required, limit=PATH_LIMIT)
    if value and not value.startswith("/"):
        refuse(path, f"is {short(value)}, not an absolute path")
    return _no_parent(value, path)


def relative_path(value: str, path: str) -> str:
    """Check a path that must stay below the directory it will be joined to; "" is let through."""
    text(value, path, limit=PATH_LIMIT)
    if value.startswith("/"):
        refuse(path, f"is {short(value)}, not a relative path")
    return _no_parent(value, path)


def _no_parent(value: str, path: str) -> str:
    if ".." in value.split("/"):
        refuse(path, f"is {short(value)}; '..' cannot be part of it")
    return value


def address(value: str, path: str, *, required: bool = True) -> str:
    """Check an IPv4 or IPv6 address, with a zone where it needs one."""
    text(value, path, required=required, limit=64)
    if value:
        try:
            ipaddress.ip_address(value)
        except ValueError:
            refuse(path, f"is {short(value)}, which is no IP address")
    return value


def resolv_word(value: str, path: str) -> str:
    """Check a word for resolv.conf(5): no white space and nothing that begins a comment."""
    text(value, path, required=True, limit=256)
    if not _RESOLV_WORD.fullmatch(value):
        refuse(path, f"is {short(value)}, which cannot stand in resolv.conf")
    return value


def number(value: int, path: str, least: int, most: int) -> int:
    """Check a range, both ends included."""
    if not least <= value <= most:
        refuse(path, f"is {value}, not between {least} and {most}")
    return value


def user_id(value: int, path: str) -> int:
    """Check a user or group id."""
    return number(value, path, 0, ID_LIMIT)


def few(values: Iterable[object], path: str, most: int) -> None:
    """Check how many elements a repeated field has."""
    count = sum(1 for _ in values)
    if count > most:
        refuse(path, f"has {count} elements, more than {most}")


def mapping(values: Mapping[str, str], path: str) -> dict[str, str]:
    """Copy labels or annotations, unchanged; bounded as a whole."""
    size = sum(octets(key) + octets(value) for key, value in values.items())
    if size > MAP_LIMIT:
        refuse(path, f"is {size} octets in all, more than {MAP_LIMIT}")
    if "" in values:
        refuse(path, "has an empty key")
    return dict(values)
