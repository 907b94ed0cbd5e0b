"""Device nodes of this guest for a container: from /dev, or a disk by its serial, into the OCI specification."""

from __future__ import annotations

import os
import stat

from vmrt.agent import agent_pb2 as pb
from vmrt.agent import disks, status

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    from vmrt.agent.process import Reaper

# Nodes that appear with their driver, which may be a module.
_MODULES = {"/dev/fuse": "fuse", "/dev/net/tun": "tun", "/dev/loop-control": "loop", "/dev/kvm": "kvm"}
# What every container's /dev has of its own (runtime-spec, "default devices"), and what is no device.
_OWN = frozenset(
    f"/dev/{name}"
    for name in ("null", "zero", "full", "random", "urandom", "tty", "console", "ptmx", "pts", "shm", "mqueue", "fd")
)
_MODPROBE_S = 10.0
MAX_NODES = 4096


class Node:
    """One device node to make in a container."""

    __slots__ = ("guest_path", "mode", "number", "path", "permissions")

    def __init__(self, path: str, guest_path: str, info: os.stat_result, permissions: str) -> None:
        self.path = path
        self.guest_path = guest_path
        self.mode = info.st_mode
        self.number = (os.major(info.st_rdev), os.minor(info.st_rdev))
        self.permissions = permissions

    @property
    def kind(self) -> str:
        """Return its type as the runtime-spec spells it."""
        return "b" if stat.S_ISBLK(self.mode) else "c"


def resolve(wanted: Sequence[pb.DeviceNode], reaper: Reaper, deadline: float) -> list[Node]:
    """Find the nodes that a request names. Raises `AgentError` for one that this guest does not have."""
    nodes = []
    for device in wanted:
        source = _source(device, reaper, deadline)
        try:
            info = os.stat(source)  # noqa: PTH116
        except OSError as e:
            raise status.AgentError(
                status.FAILED_PRECONDITION, f"device {device.path}: the guest has no {source}: {e.strerror}"
            ) from e
        if not stat.S_ISCHR(info.st_mode) and not stat.S_ISBLK(info.st_mode):
            raise status.AgentError(
                status.INVALID_ARGUMENT, f"device {device.path}: {source} is no device of the guest"
            )
        nodes.append(Node(device.path, source, info, device.permissions or "rwm"))
    return nodes


def _source(device: pb.DeviceNode, reaper: Reaper, deadline: float) -> str:
    if device.WhichOneof("source") == "disk_serial":
        disks.check_serial(device.disk_serial)
        return disks.wait_for(device.disk_serial, deadline)
    path = device.guest_path
    if not path.startswith("/dev/") or ".." in path.split("/"):
        raise status.AgentError(status.INVALID_ARGUMENT, f"device {device.path}: {path[:200]!r} is not below /dev")
    if path in _MODULES and not os.path.exists(path):  # noqa: PTH110
        reaper.spawn(["/sbin/modprobe", "-q", _MODULES[path]]).wait(_MODPROBE_S)
    return path


def everything(root: str = "/dev") -> list[Node]:
    """Return all device nodes below /dev but those that a container's /dev has of its own."""
    return [Node(path, path, info, "rwm") for path, info in _walk(root)]


def _walk(root: str) -> Iterator[tuple[str, os.stat_result]]:
    pending, count = [root], 0
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.path in _OWN or count >= MAX_NODES:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                    continue
                info = entry.stat(follow_symlinks=False)
                if stat.S_ISCHR(info.st_mode) or stat.S_ISBLK(info.st_mode):
                    count += 1
                    yield entry.path, info


def add(spec: dict[str, Any], nodes: Sequence[Node], *, bind: bool) -> None:
    """Add nodes to an OCI specification: as nodes, or as bind mounts of the guest's where none can be made (`bind`).

    In a user namespace mknod(2) is not for anybody.
    """
    linux = spec["linux"]
    rules = linux.setdefault("resources", {}).setdefault("devices", [])
    for node in nodes:
        major, minor = node.number
        rules.append({"allow": True, "type": node.kind, "major": major, "minor": minor, "access": node.permissions})
        if bind:
            spec.setdefault("mounts", []).append(
                {"destination": node.path, "type": "bind", "source": node.guest_path, "options": ["bind", "rw"]}
            )
        else:
            linux.setdefault("devices", []).append(
                {
                    "path": node.path,
                    "type": node.kind,
                    "major": major,
                    "minor": minor,
                    "fileMode": stat.S_IMODE(node.mode),
                    "uid": 0,
                    "gid": 0,
                }
            )
