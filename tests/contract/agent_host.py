"""Runs the agent's own servers, containers and streams on this machine: no VM, the real crun, overlayfs and cgroup v2.

Started as a program inside `unshare -mpfu`, so it is PID 1 of a PID namespace as it is in a guest, with its own mounts:
an empty /run, and /sys/fs/cgroup with the machine's cgroup v2 hierarchy (which may have no controllers). What differs
from a guest is what the hypervisor would give: sockets are Unix sockets in DIRECTORY, and a layer is a directory
there instead of a disk, the programs are vmrt-exec, vmrt-pause and vmrt-zygote.so there.
What the agent tells its console goes to DIRECTORY/agent.log.

    agent_host.py DIRECTORY
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from pathlib import Path
from typing import Any

from vmrt.agent import cgroups, console, disks, kernel, layout, process, rehearsal, server, service

CGROUP_PREFIX = "vmrt-test-"


class DirectoryLayers(disks.Layers):
    """Layers that lie in directories."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory

    def _mount(self, serial: str, deadline: float) -> disks._Layer:
        return disks._Layer(str(self._directory / serial), serial)


def _without_resources(spec: dict[str, Any]) -> dict[str, Any]:
    del spec["linux"]["resources"]
    return spec


def main(directory: Path) -> None:
    """Serve until killed."""
    for target, fstype in (("/run", "tmpfs"), ("/sys/fs/cgroup", "cgroup2")):
        with contextlib.suppress(OSError):
            kernel.umount(target)
        kernel.mount(fstype, target, fstype)
    # This machine may have no controllers, and not let crun load a filter for devices.
    whole = rehearsal._specification
    rehearsal._specification = lambda: _without_resources(whole())
    told = (directory / "agent.log").open("a", buffering=1)
    console._write = told.write  # type: ignore[assignment]
    # The hierarchy is the machine's: hosts that run side by side must not meet.
    layout.EXEC_PROGRAM = str(directory / "vmrt-exec")
    layout.PAUSE_PROGRAM = str(directory / "vmrt-pause")
    layout.REHEARSAL_ROOT = str(directory / "base")
    layout.ZYGOTE_LIBRARY = str(directory / "vmrt-zygote.so")
    cgroups.PARENT = f"/{CGROUP_PREFIX}{directory.name}-{directory.stat().st_ino}"
    for path in (layout.RUN, layout.SANDBOX, layout.CONTAINERS, layout.SCRATCH):
        Path(path).mkdir(parents=True, exist_ok=True)
    cgroups.set_up()
    reaper = process.Reaper()
    agent = service.Service(reaper)
    agent.layers = DirectoryLayers(directory)
    agent.containers._layers = agent.layers
    agent.sandbox.configured = True
    agent.booted.set()
    calls = server.CallServer(agent.call)
    for port, serve in ((layout.CALL_PORT, calls.serve), (layout.STREAM_PORT, agent.streams.serve)):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(directory / str(port)))
        listener.listen(64)
        acceptor = server.Acceptor(listener, 64, trusted=lambda peer: True)
        threading.Thread(target=acceptor.run, args=(serve,), daemon=True).start()
    print("listening", flush=True)
    reaper.run()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
