"""What the gRPC edge needs of the pods room, as Protocols; `vmrt.pods.service.PodService` is the one implementation.

The edge resolves a client's abbreviated ids with `sandbox` and `container` first: all other methods take complete ids.
Cancelling a call must leave the pods room consistent: a create that is cancelled is rolled back, a stop goes on.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from vmrt.model import ContainerSpec, LinuxResources, SandboxSpec
from vmrt.pods.lifecycle import Event
from vmrt.pods.records import ContainerRecord, SandboxRecord
from vmrt.pods.stats import Figures
from vmrt.streaming.targets import Request


class ExecResult(Protocol):
    """What a finished command left; `exit_code` is 128 + n for an end by signal n."""

    @property
    def stdout(self) -> bytes: ...  # noqa: D102
    @property
    def stderr(self) -> bytes: ...  # noqa: D102
    @property
    def exit_code(self) -> int: ...  # noqa: D102


class RuntimeStatus(Protocol):
    """The two conditions of CRI's Status, each with a CamelCase reason and a message; `info` has JSON values."""

    @property
    def runtime_ready(self) -> bool: ...  # noqa: D102
    @property
    def runtime_reason(self) -> str: ...  # noqa: D102
    @property
    def runtime_message(self) -> str: ...  # noqa: D102
    @property
    def network_ready(self) -> bool: ...  # noqa: D102
    @property
    def network_reason(self) -> str: ...  # noqa: D102
    @property
    def network_message(self) -> str: ...  # noqa: D102
    @property
    def info(self) -> Mapping[str, str]: ...  # noqa: D102


class StreamUrls(Protocol):
    """The streaming server."""

    def url(self, request: Request) -> str:
        """Return a URL that serves this request once, within a minute. Raises `ExhaustedError`."""
        ...


class Pods(Protocol):
    """Sandboxes and containers. Every method raises a `VmrtError`; `NotFoundError` for an id that is not known."""

    async def run_sandbox(self, spec: SandboxSpec) -> str:
        """Start a sandbox and return its id; it is ready then, or nothing of it is left."""
        ...

    async def stop_sandbox(self, sandbox_id: str) -> None:
        """Stop the containers and release VM and network. Idempotent."""
        ...

    async def remove_sandbox(self, sandbox_id: str) -> None:
        """Remove sandbox and containers by force. Idempotent."""
        ...

    @property
    def generation(self) -> int | None:
        """A number that changes with every change of a record; None when there are records that change unseen."""
        ...

    def sandbox(self, sandbox_id: str) -> SandboxRecord:
        """Find by id or unique prefix. From memory."""
        ...

    def sandboxes(self) -> Sequence[SandboxRecord]:
        """Return all records, oldest first. From memory."""
        ...

    async def create_container(self, sandbox_id: str, spec: ContainerSpec) -> str:
        """Create a container in a ready sandbox and return its id."""
        ...

    async def start_container(self, container_id: str) -> None:
        """Start a created container."""
        ...

    async def stop_container(self, container_id: str, timeout_s: float) -> None:
        """Send the stop signal, after `timeout_s` SIGKILL; return when it has ended. Idempotent."""
        ...

    async def remove_container(self, container_id: str) -> None:
        """Remove by force. Idempotent."""
        ...

    def container(self, container_id: str) -> ContainerRecord:
        """Find by id or unique prefix. From memory."""
        ...

    def containers(self) -> Sequence[ContainerRecord]:
        """Return all records, oldest first. From memory."""
        ...

    async def exec_sync(self, container_id: str, args: Sequence[str], timeout_s: float) -> ExecResult:
        """Run a command to its end; 0 is no limit, else `DeadlineError` after `timeout_s` with the command killed."""
        ...

    async def reopen_log(self, container_id: str) -> None:
        """Go over to a new log file; on return it exists and the old one gets no more bytes."""
        ...

    async def update_container(self, container_id: str, change: LinuxResources) -> None:
        """Change limits, all or nothing; what `change` does not set stays."""
        ...

    async def update_sandbox(
        self, sandbox_id: str, overhead: LinuxResources | None, resources: LinuxResources | None
    ) -> None:
        """Take a pod's new sums; `ExhaustedError` when its VM is too small for them."""
        ...

    async def figures(self, sandbox_ids: Iterable[str]) -> Mapping[str, Figures]:
        """Return what sandboxes use, at most a second old, or the last that was heard of one whose VM is gone."""
        ...

    @property
    def writable_layers(self) -> Path:
        """The directory on the host whose file system holds the containers' writable layers."""
        ...

    def events(self) -> AsyncIterator[Event]:
        """Yield what happens to sandboxes and containers from now on."""
        ...

    async def set_pod_ranges(self, cidrs: Sequence[str]) -> None:
        """Remember the node's pod CIDRs."""
        ...

    async def status(self) -> RuntimeStatus:
        """Say whether pods can be run."""
        ...

    async def sandbox_info(self, sandbox_id: str) -> Mapping[str, str]:
        """Return details for a person, JSON values."""
        ...

    async def container_info(self, container_id: str) -> Mapping[str, str]:
        """Return details for a person, JSON values."""
        ...
