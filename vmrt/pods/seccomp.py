"""Seccomp profiles: from the containers format to what an OCI runtime takes.

The RuntimeDefault profile is the one that the distribution installs (Debian: golang-github-containers-common,
/usr/share/containers/seccomp.json). Its rules carry conditions (`includes`/`excludes` on capabilities, architectures
and kernel versions) that the OCI runtime specification does not know; `resolve` decides them. A Localhost profile may
be in either form. The filter is always applied in the guest.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from vmrt.errors import FailedPreconditionError, InvalidArgumentError
from vmrt.model import ProfileType, SecurityProfile

DEFAULT_PROFILES = (Path("/etc/containers/seccomp.json"), Path("/usr/share/containers/seccomp.json"))
PROFILE_LIMIT_BYTES = 1024 * 1024

# The names that profiles use for our architecture: Go's, and libseccomp's.
_ARCH = "amd64"
_SCMP_ARCH = "SCMP_ARCH_X86_64"


def _kernel(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def _applies(rule: Mapping[str, Any], capabilities: Collection[str], kernel: tuple[int, ...]) -> bool:
    includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
    if includes.get("arches") and _ARCH not in includes["arches"]:
        return False
    if includes.get("caps") and not set(includes["caps"]) <= set(capabilities):
        return False
    if includes.get("minKernel") and kernel < _kernel(includes["minKernel"]):
        return False
    if _ARCH in (excludes.get("arches") or ()):
        return False
    if set(excludes.get("caps") or ()) & set(capabilities):
        return False
    return not (excludes.get("minKernel") and kernel >= _kernel(excludes["minKernel"]))


def resolve(profile: Mapping[str, Any], capabilities: Collection[str], kernel_release: str) -> dict[str, Any]:
    """Return the OCI `linux.seccomp` object (runtime-spec, config-linux.md) that `profile` means here.

    `capabilities` are the container's, as "CAP_...". Raises `InvalidArgumentError` for a profile of the wrong shape.
    """
    try:
        kernel = _kernel(kernel_release)
        rules = []
        for rule in profile.get("syscalls") or []:
            if not _applies(rule, capabilities, kernel):
                continue
            names = list(rule.get("names") or ([rule["name"]] if rule.get("name") else []))
            if not names:
                continue
            out: dict[str, Any] = {"names": names, "action": rule["action"]}
            if rule.get("args"):
                out["args"] = rule["args"]
            if rule.get("errnoRet") is not None:
                out["errnoRet"] = rule["errnoRet"]
            rules.append(out)
        result: dict[str, Any] = {"defaultAction": profile["defaultAction"], "syscalls": rules}
        if profile.get("defaultErrnoRet") is not None:
            result["defaultErrnoRet"] = profile["defaultErrnoRet"]
        architectures = list(profile.get("architectures") or [])
        for entry in profile.get("archMap") or []:
            if entry["architecture"] == _SCMP_ARCH:
                architectures = [_SCMP_ARCH, *(entry.get("subArchitectures") or [])]
        if architectures:
            result["architectures"] = architectures
        if profile.get("flags"):
            result["flags"] = list(profile["flags"])
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise InvalidArgumentError(f"the seccomp profile has not the form of one: {e!r}") from e
    return result


def read(profile: SecurityProfile) -> dict[str, Any]:
    """Read the JSON that a RUNTIME_DEFAULT or LOCALHOST profile names. Blocks for a file of at most 1 MiB."""
    if profile.type is ProfileType.LOCALHOST:
        path = Path(profile.localhost_ref.removeprefix("localhost/"))
        if not path.is_absolute():
            path = Path("/var/lib/kubelet/seccomp") / path
        if ".." in path.parts:
            raise InvalidArgumentError(f"seccomp.localhost_ref {profile.localhost_ref!r} contains '..'")
        candidates: tuple[Path, ...] = (path,)
    else:
        candidates = DEFAULT_PROFILES
    for candidate in candidates:
        try:
            with candidate.open("rb") as file:
                data = file.read(PROFILE_LIMIT_BYTES + 1)
        except OSError:
            continue
        if len(data) > PROFILE_LIMIT_BYTES:
            raise InvalidArgumentError(f"the seccomp profile {candidate} is larger than {PROFILE_LIMIT_BYTES} octets")
        try:
            parsed = json.loads(data)
        except ValueError as e:
            raise InvalidArgumentError(f"the seccomp profile {candidate} is not JSON: {e}") from e
        if not isinstance(parsed, dict):
            raise InvalidArgumentError(f"the seccomp profile {candidate} is not a JSON object")
        return parsed
    if profile.type is ProfileType.LOCALHOST:
        raise InvalidArgumentError(f"cannot read the seccomp profile {candidates[0]}", hint="it must be on this node")
    raise FailedPreconditionError(
        "RuntimeDefault seccomp was asked for, but no default profile is installed",
        hint=f"looked for {' and '.join(str(c) for c in candidates)}; Debian: golang-github-containers-common",
    )
