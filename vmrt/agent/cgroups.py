"""The containers' cgroups (cgroup v2, kernel Documentation/admin-guide/cgroup-v2.rst).

All containers live in /sys/fs/cgroup/vmrt/<container id>; every exec in a leaf below its container's, so that it can be
killed with all it started. The agent itself stays in the root cgroup, which may hold processes and controllers.
"""

from __future__ import annotations

import contextlib
import os
import time

ROOT = "/sys/fs/cgroup"
PARENT = "/vmrt"
# What a container may fork or keep busy while its cgroup is being emptied.
_REMOVE_TRIES = 100


def set_up() -> None:
    """Hand every controller the kernel has down to the containers' parent cgroup."""
    parent = ROOT + PARENT
    os.makedirs(parent, exist_ok=True)  # noqa: PTH103 - pathlib costs the guest's boot 40 ms
    for directory in (ROOT, parent):
        for controller in _read(f"{directory}/cgroup.controllers").split():
            with contextlib.suppress(OSError):  # one that cannot be delegated costs its limits only
                _write(f"{directory}/cgroup.subtree_control", f"+{controller}")


def path_of(container_id: str) -> str:
    """Return the path that goes into the OCI spec's linux.cgroupsPath."""
    return f"{PARENT}/{container_id}"


class Cgroup:
    """One container's cgroup or a leaf of it; all methods do nothing, or return 0, when it does not exist."""

    def __init__(self, container_id: str, leaf: str = "") -> None:
        self.path = f"{ROOT}{PARENT}/{container_id}" + (f"/{leaf}" if leaf else "")

    def kill(self) -> None:
        """Kill every process in it and below (cgroup.kill, Linux 5.14)."""
        with contextlib.suppress(OSError):
            _write(f"{self.path}/cgroup.kill", "1")

    def signal(self, number: int) -> int:
        """Signal every process in it and below; return how many there were."""
        count = 0
        for directory, _, _ in os.walk(self.path):
            for pid in _read(f"{directory}/cgroup.procs").split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), number)
                    count += 1
        return count

    def oom_kills(self) -> int:
        """Return how many of its processes any OOM killer has killed."""
        return self.keyed("memory.events").get("oom_kill", 0)

    def populated(self) -> bool:
        """Whether a process is in it or below."""
        return self.keyed("cgroup.events").get("populated", 0) != 0

    def keyed(self, name: str) -> dict[str, int]:
        """Return a flat keyed file ("name value" lines) as a dictionary."""
        values: dict[str, int] = {}
        for line in _read(f"{self.path}/{name}").splitlines():
            key, _, value = line.partition(" ")
            with contextlib.suppress(ValueError):
                values[key] = int(value)
        return values

    def number(self, name: str) -> int:
        """Return a file that holds one number."""
        try:
            return int(_read(f"{self.path}/{name}"))
        except ValueError:
            return 0

    def text(self, name: str) -> str:
        """Return a file as it is, "" when there is none: an absent controller is no error."""
        return _read(f"{self.path}/{name}")

    def processes(self) -> list[int]:
        """Return the processes in it and below."""
        return [
            int(pid)
            for directory, _, _ in os.walk(self.path)
            for pid in _read(f"{directory}/cgroup.procs").split()
            if pid != "0"  # one of a PID namespace that ours does not contain
        ]

    def remove(self) -> bool:
        """Kill what is left and remove it with its leaves; False when something would not die in about a second."""
        for _ in range(_REMOVE_TRIES):
            self.kill()
            try:
                for directory, _, _ in os.walk(self.path, topdown=False):
                    os.rmdir(directory)  # noqa: PTH106
                return True
            except FileNotFoundError:
                return True
            except OSError:
                time.sleep(0.01)
        return False

    def remove_if_empty(self) -> None:
        """Remove it unless processes are in it."""
        with contextlib.suppress(OSError):
            os.rmdir(self.path)  # noqa: PTH106


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:  # noqa: PTH123
            return file.read()
    except (OSError, UnicodeDecodeError):
        return ""


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
