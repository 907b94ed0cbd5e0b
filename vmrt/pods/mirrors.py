"""ConfigMaps, Secrets and their like as copies in the guest's memory that follow the host's.

FUSE carries no inotify events, and programs that watch their configuration wait for them. So each such volume is read
here and written again by the agent, in kubelet's order: containers see whole versions and the events of each step. The
host's inotify says when. What changes while the daemon is down follows when it starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from vmrt.agent import agent_pb2 as pb
from vmrt.agent_client import AgentClient
from vmrt.errors import VmGoneError, VmrtError
from vmrt.pods import atomic_writer, host_paths
from vmrt.pods.inotify import Inotify

log = logging.getLogger(__name__)

_RETRY_S = 5.0
# kubelet's plugins that write with the atomic writer.
PLUGINS = frozenset(f"kubernetes.io~{name}" for name in ("configmap", "secret", "projected", "downward-api"))

Agent = Callable[[], AgentClient]


def name_of(path: str) -> str:
    """Return the guest's name of the volume at a host path."""
    return hashlib.sha256(path.encode(errors="surrogateescape")).hexdigest()[:24]


@dataclass(slots=True, eq=False)
class _Mirror:
    path: str
    agent: Agent
    watch: int = -1
    version: str = ""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    task: asyncio.Task[None] | None = None


class Mirrors:
    """The copies that this daemon keeps, by sandbox and host path."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._inotify = Inotify(self._on_change)
        self._mirrors: dict[str, dict[str, _Mirror]] = {}

    async def follow(self, sandbox_id: str, path: str, agent: Agent) -> str:
        """Have the guest's copy of the volume at `path` be as it is now, and follow it; return the guest's name of it.

        `agent` returns the sandbox's agent or raises `VmGoneError`. "" when kubelet's atomic writer did not fill it, or
        it cannot be watched: the share may serve it, or say what is wrong with it.
        Raises `ExhaustedError` for one that is too large, what calls to the agent raise, and `VmrtError`.
        """
        mirrors = self._mirrors.setdefault(sandbox_id, {})
        mirror = mirrors.get(path) or _Mirror(path, agent)
        mirrors[path] = mirror
        try:
            async with mirror.lock:
                # Watched before it is read: no change is missed.
                mirror.watch = await self._watch(path)
                whole = mirror.watch >= 0 and await self._synchronise(mirror)
        except BaseException:
            if mirror.task is None:
                self._drop(sandbox_id, mirror)
            raise
        if not whole:
            self._drop(sandbox_id, mirror)
            return ""
        if mirror.task is None:
            mirror.task = asyncio.create_task(self._keep(mirror), name=f"mirror {path}")
        return name_of(path)

    def forget(self, sandbox_id: str) -> None:
        """Follow nothing for a sandbox any more."""
        for mirror in list(self._mirrors.get(sandbox_id, {}).values()):
            self._drop(sandbox_id, mirror)

    async def close(self) -> None:
        """Follow nothing any more; wait until the tasks have ended."""
        tasks = [m.task for mirrors in self._mirrors.values() for m in mirrors.values() if m.task is not None]
        for sandbox_id in list(self._mirrors):
            self.forget(sandbox_id)
        await asyncio.gather(*tasks, return_exceptions=True)
        self._inotify.close()

    def _drop(self, sandbox_id: str, mirror: _Mirror) -> None:
        mirrors = self._mirrors.get(sandbox_id, {})
        if mirrors.get(mirror.path) is mirror:
            del mirrors[mirror.path]
        if not mirrors:
            self._mirrors.pop(sandbox_id, None)
        if mirror.task is not None:
            mirror.task.cancel()
        if not any(other.watch == mirror.watch for all_ in self._mirrors.values() for other in all_.values()):
            self._inotify.forget(mirror.watch)

    async def _watch(self, path: str) -> int:
        try:
            fd = await asyncio.to_thread(host_paths.open_path, path)
            try:
                return self._inotify.watch(f"/proc/self/fd/{fd}")
            finally:
                # Not kept: it would hold kubelet's tmpfs busy.
                os.close(fd)
        except OSError as e:
            # ENOSPC: fs.inotify.max_user_watches
            log.warning("%s cannot be watched, containers get no inotify events: %s", path, e.strerror)
            return -1

    def _on_change(self, watch: int) -> None:
        for mirrors in self._mirrors.values():
            for mirror in mirrors.values():
                if mirror.watch == watch:
                    mirror.changed.set()

    async def _keep(self, mirror: _Mirror) -> None:
        while True:
            await mirror.changed.wait()
            mirror.changed.clear()
            try:
                async with mirror.lock:
                    if not await self._synchronise(mirror):
                        log.warning(
                            "%s: no atomic writer's volume any more; containers keep what they have", mirror.path
                        )
            except VmGoneError:
                return
            except VmrtError as e:
                log.warning("%s: containers keep the old version: %s", mirror.path, e)
                mirror.changed.set()
                await asyncio.sleep(_RETRY_S)

    async def _synchronise(self, mirror: _Mirror) -> bool:
        """Bring the guest's copy up to date. False when the host's directory is no volume of an atomic writer."""
        snapshot = await asyncio.to_thread(_read, mirror.path, self._limit_bytes)
        if snapshot is None:
            return False
        agent = mirror.agent()
        name = name_of(mirror.path)
        if not mirror.version:
            await agent.make_volume(pb.MakeVolumeRequest(name=name, root=snapshot.root.message()))
        for request in atomic_writer.requests(name, snapshot, files=mirror.version != snapshot.version):
            await agent.publish_files(request)
        mirror.version = snapshot.version
        return True


def _read(path: str, limit_bytes: int) -> atomic_writer.Snapshot | None:
    try:
        root = host_paths.open_path(path)
    except FileNotFoundError:
        return None
    except OSError as e:
        raise VmrtError(f"cannot open it: {e.strerror}", phase="volumes", resource=path) from e
    try:
        with contextlib.suppress(NotADirectoryError, FileNotFoundError):
            return atomic_writer.read(root, limit_bytes)
        return None
    except OSError as e:
        raise VmrtError(f"cannot read it: {e.strerror}", phase="volumes", resource=path) from e
    finally:
        os.close(root)
