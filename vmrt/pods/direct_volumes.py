"""Direct-assigned volumes: a block device whose file system the guest mounts, instead of the host.

A CSI driver that knows Kata Containers' way writes, for the path that kubelet will name,

    <volumes.direct_dir>/<base64url of the path>/mountInfo.json

and mounts nothing on the host. Source: kata-containers, docs/design/direct-blk-device-assignment.md.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from vmrt.agent import agent_pb2 as pb
from vmrt.errors import InvalidArgumentError, UnsupportedError
from vmrt.pods.block_device import BlockDevice, block_device

_PHASE = "volumes"
_FILE = "mountInfo.json"
_MAX_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Direct:
    """A file system on a host block device, mounted in the guest."""

    device: BlockDevice
    fstype: str
    options: tuple[str, ...] = ()
    fs_group: int | None = None
    on_root_mismatch: bool = False

    @property
    def name(self) -> str:
        """The guest's name of the volume."""
        return self.device.volume_name

    def request(self) -> pb.MakeVolumeRequest:
        """Return the call that has the agent mount it."""
        disk = pb.DiskVolume(
            serial=self.device.serial,
            fstype=self.fstype,
            readonly=self.device.readonly,
            options=self.options,
            on_root_mismatch=self.on_root_mismatch,
        )
        if self.fs_group is not None:
            disk.fs_group = self.fs_group
        return pb.MakeVolumeRequest(name=self.name, disk=disk)


def find(directory: str, host_path: str, field: str) -> Direct | None:
    """Return the direct volume behind a host path, None when there is none.

    Raises `InvalidArgumentError`, `UnsupportedError` naming the field for one that cannot be mounted.
    """
    if not directory:
        return None
    name = base64.urlsafe_b64encode(os.fsencode(host_path)).decode()
    if len(name) > 255:
        return None
    path = Path(directory) / name / _FILE
    try:
        with path.open("rb") as file:
            return parse(file.read(_MAX_BYTES + 1), f"{field}: {path}")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as e:
        raise InvalidArgumentError(f"{field}: {path}: {e.strerror}", phase=_PHASE) from e


def parse(text: bytes, what: str) -> Direct:
    """Return the volume that a mountInfo.json tells of; errors as of `find`, beginning with `what`."""
    if len(text) > _MAX_BYTES:
        raise InvalidArgumentError(f"{what} has more than {_MAX_BYTES} octets", phase=_PHASE)
    info = None
    with contextlib.suppress(ValueError):
        info = json.loads(text)
    if not isinstance(info, dict):
        raise InvalidArgumentError(f"{what} is no JSON object", phase=_PHASE)
    kind = info.get("volume-type", "block")
    if kind not in ("block", "directvol"):
        raise UnsupportedError(f"{what}: volume-type {kind!r}; vmrt takes 'block'", phase=_PHASE)
    device, fstype = info.get("device"), info.get("fstype")
    options, metadata = info.get("options") or [], info.get("metadata") or {}
    if not isinstance(device, str) or not device.startswith("/") or not isinstance(fstype, str) or not fstype:
        raise InvalidArgumentError(f"{what}: device and fstype must be an absolute path and a name", phase=_PHASE)
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise InvalidArgumentError(f"{what}: options must be a list of strings", phase=_PHASE)
    if not isinstance(metadata, dict):
        raise InvalidArgumentError(f"{what}: metadata must be an object", phase=_PHASE)
    group = metadata.get("fsGroup")
    if group is not None and not (isinstance(group, str) and group.isdigit() and int(group) < 2**32 - 1):
        raise InvalidArgumentError(f"{what}: metadata.fsGroup must be a number in a string", phase=_PHASE)
    found = block_device(device, what, readonly="ro" in options)
    if found is None:
        raise InvalidArgumentError(f"{what}: {device} is no block device", phase=_PHASE)
    # kubelet's words for fsGroupChangePolicy
    on_root_mismatch = metadata.get("fsGroupChangePolicy") == "OnRootMismatch"
    return Direct(found, fstype, tuple(options), None if group is None else int(group), on_root_mismatch)
