"""Host paths as a CRI client names them: what kubelet's own say, and how they are opened.

kubelet keeps a pod's volumes below `<its root>/pods/<uid>/volumes/<plugin>/<volume>`, with "~" for "/" in the plugin's
name (k8s.io/kubernetes, pkg/kubelet/kubelet_getters.go).
"""

from __future__ import annotations

import ctypes
import os
import re
import struct
from dataclasses import dataclass

from vmrt.libc import check, libc

_SYS_OPENAT2 = 437
# openat2(2)
_RESOLVE_NO_MAGICLINKS, _RESOLVE_BENEATH = 0x02, 0x08
_VOLUME = re.compile(r"(?P<directory>/(?:[^/]+/)*pods/[^/]+/volumes/(?P<plugin>[^/]+)/[^/]+)(?:/+(?P<rest>.*))?")
_EMPTY_DIR = "kubernetes.io~empty-dir"


@dataclass(frozen=True, slots=True)
class PodVolume:
    """A path in one of kubelet's volumes: the volume's directory, its plugin, and the rest of the path ("")."""

    directory: str
    plugin: str
    rest: str


def pod_volume(path: str) -> PodVolume | None:
    """Return what a path says when it is one of kubelet's volumes or lies in one."""
    match = _VOLUME.fullmatch(path)
    if match is None or any(part in (".", "..") for part in match["directory"].split("/")):
        return None
    return PodVolume(match["directory"], match["plugin"], (match["rest"] or "").strip("/"))


def is_empty_dir(path: str) -> bool:
    """Whether a path is, or lies in, an emptyDir."""
    volume = pod_volume(path)
    return volume is not None and volume.plugin == _EMPTY_DIR


def open_path(path: str) -> int:
    """Open a path (O_PATH), links followed; the descriptor is what everything after acts on.

    Below one of kubelet's volumes a container may have made the links, and may be making others now: there, no link and
    no ".." leads out of the volume (openat2(2), RESOLVE_BENEATH), EXDEV says so. Raises `OSError`.
    """
    volume = pod_volume(path)
    if volume is None or not volume.rest:
        return os.open(path, os.O_PATH | os.O_CLOEXEC)
    base = os.open(volume.directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return open_beneath(base, volume.rest, os.O_PATH)
    finally:
        os.close(base)


def open_beneath(base: int, path: str, flags: int) -> int:
    """Open `path` in the directory `base`; what would lead out of it fails with EXDEV. Raises `OSError`."""
    how = struct.pack("QQQ", flags | os.O_CLOEXEC, 0, _RESOLVE_BENEATH | _RESOLVE_NO_MAGICLINKS)
    size = ctypes.c_size_t(len(how))
    return check(libc().syscall(ctypes.c_long(_SYS_OPENAT2), base, os.fsencode(path), how, size), path)
