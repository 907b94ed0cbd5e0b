"""User namespaces of the host that stand for nothing but a mapping of ids: what mount_setattr(2) takes an idmap from.

The kernel has no call that makes a mapping alone. A helper process leaves our user namespace and gets its mapping; the
descriptor of its namespace is all that is kept of it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from vmrt import spawn
from vmrt.errors import VmrtError
from vmrt.model import IdMapping

_PATIENCE_S = 10.0


def lines(mappings: Sequence[IdMapping]) -> str:
    """Return mappings as uid_map and gid_map take them (user_namespaces(7))."""
    return "".join(f"{m.container_id} {m.host_id} {m.length}\n" for m in mappings)


class UserNamespaces:
    """Descriptors of user namespaces, one for each pair of mappings, closed at the end of a `with` block."""

    def __init__(self) -> None:
        self._made: dict[tuple[tuple[IdMapping, ...], tuple[IdMapping, ...]], int] = {}

    def __enter__(self) -> Self:
        """Begin without any."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close all."""
        for fd in self._made.values():
            os.close(fd)
        self._made.clear()

    def get(self, uids: tuple[IdMapping, ...], gids: tuple[IdMapping, ...]) -> int:
        """Return a descriptor, ours to close. Blocks for some milliseconds. Raises `VmrtError`."""
        if (uids, gids) not in self._made:
            self._made[uids, gids] = _make(uids, gids)
        return self._made[uids, gids]


def _make(uids: Sequence[IdMapping], gids: Sequence[IdMapping]) -> int:
    # It ends by itself should nobody come back to end it.
    try:
        with spawn.holding(["unshare", "--user", "--", "sleep", "60"]) as pid:
            proc = Path(f"/proc/{pid}")
            deadline = time.monotonic() + _PATIENCE_S
            while (proc / "ns/user").readlink() == Path("/proc/self/ns/user").readlink():
                if time.monotonic() > deadline:
                    raise VmrtError("unshare(1) made no user namespace in time", phase="volumes")
                time.sleep(0.001)
            (proc / "uid_map").write_text(lines(uids))
            (proc / "gid_map").write_text(lines(gids))
            return os.open(proc / "ns/user", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as e:
        raise VmrtError(
            f"cannot make a user namespace for the mapping: {e.strerror}",
            phase="volumes",
            hint="does `unshare --user true` work? See the sysctl user.max_user_namespaces",
        ) from e
