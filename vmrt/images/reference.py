"""Image references: what a user may write, and the one full form of it. Pure.

The grammar is that of the distribution project (distribution/reference, "Grammar"):

    reference  := name [ ":" tag ] [ "@" digest ]
    name       := [ domain "/" ] path-component { "/" path-component }

A first component counts as a domain when it has a "." or ":", an upper-case letter, or is "localhost". A name without a
domain gets the default registry, on docker.io one of a single component goes below "library/", and a reference with
neither tag nor digest gets the tag "latest".
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vmrt.errors import InvalidArgumentError

DEFAULT_REGISTRY = "docker.io"
DEFAULT_TAG = "latest"
# distribution/reference: NameTotalLengthMax counts domain and path; tags have their own bound in the expression.
NAME_LIMIT = 255

_DOMAIN = re.compile(
    r"(?:(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])(?:\.(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9]))*"
    r"|\[[a-fA-F0-9:]+\])(?::[0-9]{1,5})?"
)
_COMPONENT = re.compile(r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[a-f0-9]{64}")
_ID = re.compile(r"[a-f0-9]{64}")
_ID_PREFIX = re.compile(r"(?:sha256:)?([a-f0-9]{1,64})")


@dataclass(frozen=True, slots=True)
class Reference:
    """A complete reference. With a digest the tag says nothing about content and is kept for messages only."""

    registry: str
    repository: str
    tag: str = ""
    digest: str = ""

    @property
    def name(self) -> str:
        """Registry and repository, as a record's key begins."""
        return f"{self.registry}/{self.repository}"

    @property
    def canonical(self) -> str:
        """The key under which an image is recorded: name@digest where there is a digest, else name:tag."""
        return self.at(self.digest) if self.digest else f"{self.name}:{self.tag}"

    def at(self, digest: str) -> str:
        """Return the same name with this digest."""
        return f"{self.name}@{digest}"

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return f"{self.name}{tag}" + (f"@{self.digest}" if self.digest else "")


def parse(text: str, default_registry: str = DEFAULT_REGISTRY) -> Reference:
    """Return the full form of what a user wrote; `InvalidArgumentError` names the text and the rule it breaks."""

    def refuse(why: str) -> InvalidArgumentError:
        return InvalidArgumentError(f"invalid image reference {text[:300]!r}: {why}")

    if not text:
        raise refuse("it is empty")
    rest, at, digest = text.partition("@")
    if at and not _DIGEST.fullmatch(digest):
        raise refuse("the digest must be sha256: and 64 lower-case hexadecimal digits")
    # A colon after the last slash starts a tag; one before it belongs to the domain's port.
    head, colon, tag = rest.rpartition(":")
    if not colon or "/" in tag:
        head, tag = rest, ""
    elif not _TAG.fullmatch(tag):
        raise refuse(f"the tag {tag[:140]!r} must be 1 to 128 of [A-Za-z0-9_.-], not beginning with . or -")
    first, slash, remainder = head.partition("/")
    if slash and (any(c in first for c in ".:[") or first == "localhost" or first.lower() != first):
        domain, path = first, remainder
        if not _DOMAIN.fullmatch(domain):
            raise refuse(f"{domain!r} is no registry's host[:port]")
    else:
        domain, path = default_registry, head
    if domain == "index.docker.io":
        domain = DEFAULT_REGISTRY
    if _ID.fullmatch(head):
        raise refuse("64 hexadecimal digits are an image id, not a name")
    for component in path.split("/"):
        if component.lower() != component:
            raise refuse("the repository name must be lower case")
        if not _COMPONENT.fullmatch(component):
            raise refuse(f"{component!r} is no path component (lower-case letters, digits, single separators . _ __ -)")
    if domain == DEFAULT_REGISTRY and "/" not in path:
        path = f"library/{path}"
    if len(domain) + 1 + len(path) > NAME_LIMIT:
        raise refuse(f"the name is longer than {NAME_LIMIT} characters")
    return Reference(domain, path, tag or ("" if digest else DEFAULT_TAG), digest)


def is_digest(text: str) -> bool:
    """Say whether this is a digest that we take: sha256 with 64 lower-case hexadecimal digits."""
    return _DIGEST.fullmatch(text) is not None


def id_prefix(text: str) -> str | None:
    """Return the hexadecimal digits of what may be an image id or its beginning, None for anything else."""
    match = _ID_PREFIX.fullmatch(text)
    return match.group(1) if match else None
