"""What the streaming server needs of the pods room, as Protocols, and what its URLs stand for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ExecRequest:
    """One more process in a container, and which of its streams the client wants."""

    container_id: str
    args: tuple[str, ...]
    stdin: bool
    stdout: bool
    stderr: bool
    tty: bool


@dataclass(frozen=True, slots=True)
class AttachRequest:
    """A container's main process, and which of its streams the client wants."""

    container_id: str
    stdin: bool
    stdout: bool
    stderr: bool
    tty: bool


@dataclass(frozen=True, slots=True)
class PortForwardRequest:
    """A pod's loopback. `ports` are for clients that name none themselves (the older WebSocket protocol)."""

    sandbox_id: str
    ports: tuple[int, ...] = ()


Request = ExecRequest | AttachRequest | PortForwardRequest


class Process(Protocol):
    """A process's streams. Iterating yields (is stderr, octets) to the end. All raise `VmrtError`."""

    def __aiter__(self) -> AsyncIterator[tuple[bool, bytes]]: ...

    async def exit_code(self) -> int:
        """Return the exit code: 128 + n when signal n killed it."""
        ...

    async def write_stdin(self, data: bytes) -> None:
        """Send octets, waiting while the process takes none."""
        ...

    async def close_stdin(self) -> None:
        """Send end of file."""
        ...

    async def resize(self, width: int, height: int) -> None:
        """Set the terminal's size."""
        ...


class Dialled(Protocol):
    """A TCP connection inside the pod. All raise `VmrtError`."""

    async def read(self) -> bytes:
        """Return the next octets, nothing at the other side's end of file."""
        ...

    async def write(self, data: bytes) -> None:
        """Send octets, waiting while the other side takes none."""
        ...

    async def write_eof(self) -> None:
        """Half-close."""
        ...


class Targets(Protocol):
    """Where streams lead.

    Entering what is returned raises `VmrtError` when it cannot be opened; leaving it closes it: an exec whose process
    still runs is killed then.
    """

    def exec(self, request: ExecRequest) -> AbstractAsyncContextManager[Process]:
        """Run a process."""
        ...

    def attach(self, request: AttachRequest) -> AbstractAsyncContextManager[Process]:
        """Join a container's main process."""
        ...

    def dial(self, sandbox_id: str, port: int) -> AbstractAsyncContextManager[Dialled]:
        """Connect to a TCP port of the pod's loopback."""
        ...
