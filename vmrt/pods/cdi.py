"""CDI devices: names that stand for what a vendor's specification on this host says to change in a container.

Container Device Interface 1.0 (cncf-tags/container-device-interface, SPEC.md). Specifications are JSON or YAML files of
/etc/cdi and /var/run/cdi; of two that define a device the one of the later directory counts, two of one directory are a
conflict. What they may change here: environment, device nodes, mounts and additional groups. Hooks would run on the
host, beside a container that is in another kernel: they are refused by name, and so is what else means nothing in a VM.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from vmrt.errors import InvalidArgumentError, UnsupportedError, VmrtError
from vmrt.model import ContainerSpec, Device, Mount, SecurityContext

DIRECTORIES = (Path("/etc/cdi"), Path("/var/run/cdi"))
_PHASE = "CDI"
_FILE_LIMIT_BYTES = 4 * 1024 * 1024
_DEFAULT_PERMISSIONS = "rwm"


class DeviceNode(msgspec.Struct, frozen=True):
    """containerEdits.deviceNodes; its numbers are the host's and of no use in a guest."""

    path: str
    hostPath: str = ""
    permissions: str = ""


class CdiMount(msgspec.Struct, frozen=True):
    """containerEdits.mounts."""

    hostPath: str
    containerPath: str
    options: list[str] = []


class Edits(msgspec.Struct, frozen=True):
    """containerEdits: what is to be changed in a container."""

    env: list[str] = []
    deviceNodes: list[DeviceNode] = []
    mounts: list[CdiMount] = []
    additionalGids: list[int] = []
    hooks: list[Any] = []
    netDevices: list[Any] = []
    intelRdt: dict[str, Any] | None = None


class CdiDevice(msgspec.Struct, frozen=True):
    """One device of a specification."""

    name: str
    containerEdits: Edits


class Specification(msgspec.Struct, frozen=True):
    """One file: a vendor's devices of one class."""

    cdiVersion: str
    kind: str
    devices: list[CdiDevice]
    containerEdits: Edits = Edits()


def parse(data: bytes, path: Path) -> Specification:
    """Parse a specification; `path` ends in .json or .yaml. Raises `VmrtError` naming what is wrong where."""
    try:
        if path.suffix == ".json":
            found = msgspec.json.decode(data, type=Specification)
        else:
            found = msgspec.yaml.decode(data, type=Specification)
    except (msgspec.MsgspecError, ImportError) as e:
        raise VmrtError(f"the CDI specification {path} cannot be read: {e}", phase=_PHASE) from e
    if not re.fullmatch(r"(0|1)\.\d+\.\d+", found.cdiVersion):
        raise VmrtError(f"the CDI specification {path} has the unknown version {found.cdiVersion!r}", phase=_PHASE)
    return found


def find(names: Sequence[str], directories: Sequence[Path]) -> list[tuple[str, Path, list[Edits]]]:
    """Return for each device its name, its file, and its edits: the specification's own, once, before the device's.

    Blocks. Raises `InvalidArgumentError` for a device that no file or more than one defines. A file that cannot be read
    fails only those who ask for a device that is nowhere else.
    """
    broken: list[VmrtError] = []
    known: dict[str, list[tuple[Path, Specification, CdiDevice]]] = {}
    for directory in directories:
        here: dict[str, list[tuple[Path, Specification, CdiDevice]]] = {}
        for path in _files(directory):
            try:
                specification = parse(_read(path), path)
            except VmrtError as e:
                broken.append(e)
                continue
            for device in specification.devices:
                here.setdefault(f"{specification.kind}={device.name}", []).append((path, specification, device))
        known |= here
    found, general = [], set[Path]()
    for name in names:
        definitions = known.get(name, [])
        if not definitions:
            raise InvalidArgumentError(
                f"no CDI specification defines the device {name!r}",
                phase=_PHASE,
                hint=str(broken[0]) if broken else f"looked into {' and '.join(map(str, directories))}",
            )
        if len(definitions) > 1:
            files = " and ".join(str(path) for path, _, _ in definitions)
            raise InvalidArgumentError(f"the CDI device {name!r} is defined by {files}", phase=_PHASE)
        path, specification, device = definitions[0]
        edits = [] if path in general else [specification.containerEdits]
        general.add(path)
        found.append((name, path, [*edits, device.containerEdits]))
    return found


def applied(spec: ContainerSpec, directories: Sequence[Path] = DIRECTORIES) -> ContainerSpec:
    """Return the container with its CDI devices' edits made. Blocks. Raises `UnsupportedError` and as `find` does."""
    envs, devices, mounts = list(spec.envs), list(spec.devices), list(spec.mounts)
    groups = list(spec.security.supplemental_groups)
    for name, path, all_edits in find(spec.cdi_devices, directories):
        for edits in all_edits:
            for what, value in (("hooks", edits.hooks), ("netDevices", edits.netDevices), ("intelRdt", edits.intelRdt)):
                if value:
                    raise UnsupportedError(
                        f"the CDI device {name!r} wants {what}, which act on the host's kernel, not on the guest's",
                        phase=_PHASE,
                        resource=str(path),
                    )
            for line in edits.env:
                key, separator, content = line.partition("=")
                if not key or not separator:
                    raise InvalidArgumentError(
                        f"the CDI device {name!r} sets {line[:64]!r}, which is no NAME=value",
                        phase=_PHASE,
                        resource=str(path),
                    )
                envs.append((key, content))
            devices += [
                Device(node.path, node.hostPath or node.path, node.permissions or _DEFAULT_PERMISSIONS)
                for node in edits.deviceNodes
            ]
            mounts += [
                Mount(mount.containerPath, mount.hostPath, readonly="ro" in mount.options) for mount in edits.mounts
            ]
            groups += edits.additionalGids
    security: SecurityContext = replace(spec.security, supplemental_groups=tuple(dict.fromkeys(groups)))
    return replace(spec, envs=tuple(envs), devices=tuple(devices), mounts=tuple(mounts), security=security)


def _files(directory: Path) -> Iterator[Path]:
    try:
        entries = sorted(directory.iterdir())
    except OSError:
        return
    for path in entries:
        if path.suffix in (".json", ".yaml") and path.is_file():
            yield path


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_FILE_LIMIT_BYTES + 1)
    except OSError as e:
        raise VmrtError(f"the CDI specification {path} cannot be read: {e.strerror}", phase=_PHASE) from e
    if len(data) > _FILE_LIMIT_BYTES:
        raise VmrtError(f"the CDI specification {path} is larger than {_FILE_LIMIT_BYTES} octets", phase=_PHASE)
    return data
