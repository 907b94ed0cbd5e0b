"""Registry credentials for one pull, from where they do not show up in `ps`: a file, standard input or a prompt.

Sources: a docker-style auth file (containers-auth.json(5)), a file holding ``USERNAME:PASSWORD``, or a user name whose
password is read from stdin or asked for. Without any of them the daemon uses its own skopeo credential files.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from vmrt.errors import InvalidArgumentError
from vmrt.model import RegistryAuth

# The key under which docker keeps Docker Hub's credentials.
_DOCKER_HUB_KEYS = ("docker.io", "index.docker.io", "https://index.docker.io/v1/")


def registry_and_path(reference: str) -> tuple[str, str]:
    """Return (registry, repository path) of an image reference, with docker.io for names without a registry.

    The first component is a registry when it holds a dot or a colon or is "localhost" (as distribution has it).
    """
    name = reference.partition("@")[0]
    first, slash, rest = name.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        registry, path = first, rest
    else:
        registry, path = "docker.io", name if slash else f"library/{name}"
    head, _, last = path.rpartition("/")
    last = last.partition(":")[0]
    return registry, f"{head}/{last}" if head else last


def collect(
    reference: str, *, authfile: Path | None, creds_file: Path | None, username: str, password_stdin: bool
) -> RegistryAuth | None:
    """Return the credentials the options name, None when they name none. Raises `InvalidArgumentError`."""
    if sum((authfile is not None, creds_file is not None, bool(username))) > 1:
        raise click.UsageError("Give one of --authfile, --creds-file and --username.")
    if password_stdin and not username:
        raise click.UsageError("--password-stdin needs --username.")
    if authfile is not None:
        return from_authfile(authfile, reference)
    if creds_file is not None:
        line = _read(creds_file).strip("\r\n")
        user, colon, password = line.partition(":")
        if not colon or not user or "\n" in line:
            raise InvalidArgumentError(f"{creds_file} does not hold one line USERNAME:PASSWORD")
        return RegistryAuth(username=user, password=password)
    if username:
        if password_stdin:
            password = sys.stdin.read().rstrip("\r\n")
        else:
            password = click.prompt(f"Password of {username}", hide_input=True, err=True)
        if not password:
            raise InvalidArgumentError("the password is empty")
        return RegistryAuth(username=username, password=password)
    return None


def from_authfile(path: Path, reference: str) -> RegistryAuth:
    """Return the most specific entry of a docker-style auth file for a reference."""
    try:
        content: Any = json.loads(_read(path))
    except ValueError as e:
        raise InvalidArgumentError(f"{path} is not JSON: {e}") from e
    auths = content.get("auths") if isinstance(content, dict) else None
    registry, repository = registry_and_path(reference)
    keys = [f"{registry}/{repository}"]
    while "/" in repository:
        repository = repository.rpartition("/")[0]
        keys.append(f"{registry}/{repository}")
    keys += [registry, f"https://{registry}", f"https://{registry}/v1/", f"https://{registry}/v2/"]
    if registry in _DOCKER_HUB_KEYS:
        keys += _DOCKER_HUB_KEYS
    if not isinstance(auths, dict):
        auths = {}
    for key in keys:
        entry = auths.get(key)
        if not isinstance(entry, dict):
            continue
        auth, token = entry.get("auth", ""), entry.get("identitytoken", "")
        if isinstance(auth, str) and isinstance(token, str) and (auth or token):
            return RegistryAuth(auth=auth, identity_token=token, server_address=registry)
    hint = ""
    if isinstance(content, dict) and (content.get("credsStore") or content.get("credHelpers")):
        hint = "the file names a credential helper; those are read by skopeo on the daemon's side only"
    raise InvalidArgumentError(f"{path} has no credentials for {registry}", hint=hint)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as e:
        raise InvalidArgumentError(f"cannot read {path}: {getattr(e, 'strerror', '') or 'not UTF-8 text'}") from e
