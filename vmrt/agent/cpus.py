"""The guest's CPUs: which of those that the host has plugged are online.

Source: Linux, Documentation/core-api/cpu_hotplug.rst. A CPU that has just been plugged is present and offline. The host
plugs and never unplugs: what the pod no longer needs is put offline here. CPU 0 always stays.
"""

from __future__ import annotations

import os
import time

from vmrt.agent import status

DIRECTORY = "/sys/devices/system/cpu"
_LOOK_AGAIN_S = 0.01


def parse(text: str) -> list[int]:
    """Return the CPUs of a list such as "0-2,4" (Documentation/admin-guide/cputopology.rst)."""
    found: list[int] = []
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            found.extend(range(int(first), int(last or first) + 1))
    return found


def set_online(wanted: int, deadline: float, directory: str = DIRECTORY) -> int:
    """Bring the first `wanted` CPUs online and the others offline; return how many are online.

    Waits until `deadline` (monotonic) for as many to be present. Raises `AgentError`; what was online before is online
    again then.
    """
    if wanted < 1:
        raise status.AgentError(status.INVALID_ARGUMENT, f"{wanted} CPUs: at least one has to be online")
    while len(present := parse(_read(f"{directory}/present"))) < wanted:
        if time.monotonic() >= deadline:
            raise status.AgentError(status.DEADLINE_EXCEEDED, f"the guest has {len(present)} CPUs, not {wanted}")
        time.sleep(_LOOK_AGAIN_S)
    before = set(parse(_read(f"{directory}/online")))
    keep = set(present[:wanted])
    changed: list[tuple[int, bool]] = []
    try:
        for cpu in sorted(keep - before):
            _switch(directory, cpu, online=True, deadline=deadline)
            changed.append((cpu, False))
        for cpu in sorted(before - keep, reverse=True):
            _switch(directory, cpu, online=False, deadline=deadline)
            changed.append((cpu, True))
    except OSError as e:
        for cpu, online in reversed(changed):
            _switch(directory, cpu, online=online, deadline=deadline)
        raise status.from_os_error(e, f"bring CPUs to {wanted}") from e
    return len(parse(_read(f"{directory}/online")))


def _switch(directory: str, cpu: int, *, online: bool, deadline: float) -> None:
    path = f"{directory}/cpu{cpu}/online"
    # Present is told a moment before the device is there; and the kernel may be busy with another one.
    while True:
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, b"1" if online else b"0")
                return
            finally:
                os.close(fd)
        except (FileNotFoundError, BlockingIOError, PermissionError):
            if time.monotonic() >= deadline:
                raise
            time.sleep(_LOOK_AGAIN_S)
        except OSError as e:
            if e.errno != 16 or time.monotonic() >= deadline:  # EBUSY
                raise
            time.sleep(_LOOK_AGAIN_S)


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:  # noqa: PTH123
        return file.read()
