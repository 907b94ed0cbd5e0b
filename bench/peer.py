"""The peer: Debian's containerd with runc, started by the benchmark on a private root, with vmrt's kind of network."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from demo import containerd
from demo.containerd import Containerd as Peer
from demo.containerd import version

__all__ = ["Peer", "running", "version"]


@contextlib.contextmanager
def running(root: Path) -> Iterator[Peer]:
    """Run a containerd in the absent directory `root`; its pods, processes and bridge are gone at the end."""
    with containerd.running(root, containerd.Bridge("vmrt-bench-ctrd", "10.240.250.0/24")) as peer:
        yield peer
