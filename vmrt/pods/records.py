"""What is remembered of a sandbox and a container, and the moves they may make.

Sandbox:

    CREATING --> READY --> NOT_READY --> REMOVING --> (gone)
        |                      ^
        +--> (gone: undone)    +-- stopped, or its VM died

Container:

    CREATING --> CREATED --> RUNNING --> EXITED --> REMOVING --> (gone)
        |            |                     ^           ^
        |            +-- start failed -----+           |
        +--> (gone: undone)        any but CREATING ---+

UNKNOWN is a container whose end nobody saw: its VM went while the daemon was down.
CREATING and REMOVING records exist for recovery only and are never listed.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vmrt.errors import IllegalTransitionError
from vmrt.model import ContainerSpec, SandboxSpec


class SandboxState(enum.Enum):
    """A sandbox's states; READY and NOT_READY are CRI's."""

    CREATING = "creating"
    READY = "ready"
    NOT_READY = "not-ready"
    REMOVING = "removing"


class ContainerState(enum.Enum):
    """A container's states; CREATED, RUNNING, EXITED and UNKNOWN are CRI's."""

    CREATING = "creating"
    CREATED = "created"
    RUNNING = "running"
    EXITED = "exited"
    UNKNOWN = "unknown"
    REMOVING = "removing"


SANDBOX_MOVES: Mapping[SandboxState, frozenset[SandboxState]] = {
    SandboxState.CREATING: frozenset({SandboxState.READY}),
    SandboxState.READY: frozenset({SandboxState.NOT_READY}),
    SandboxState.NOT_READY: frozenset({SandboxState.REMOVING}),
    SandboxState.REMOVING: frozenset(),
}

CONTAINER_MOVES: Mapping[ContainerState, frozenset[ContainerState]] = {
    ContainerState.CREATING: frozenset({ContainerState.CREATED}),
    ContainerState.CREATED: frozenset({ContainerState.RUNNING, ContainerState.EXITED, ContainerState.REMOVING}),
    ContainerState.RUNNING: frozenset({ContainerState.EXITED, ContainerState.UNKNOWN, ContainerState.REMOVING}),
    ContainerState.EXITED: frozenset({ContainerState.REMOVING}),
    ContainerState.UNKNOWN: frozenset({ContainerState.EXITED, ContainerState.REMOVING}),
    ContainerState.REMOVING: frozenset(),
}


@dataclass(frozen=True, slots=True)
class SandboxRecord:
    """One sandbox. Times are nanoseconds since the epoch; `phases_ms` is how long each part of its start took."""

    id: str
    spec: SandboxSpec
    state: SandboxState
    created_ns: int
    vm_id: str
    tap: str
    ips: tuple[str, ...] = ()
    guest_version: str = ""
    # The VM's size; 0 in a record of a version that did not keep it.
    vcpus: int = 0
    memory_bytes: int = 0
    # Its VM is kept to some of the host's CPUs or memory nodes, or is about to be.
    confined: bool = False
    # Why it is not ready, for people: "stopped", "the VM's QEMU was killed (signal 9)".
    reason: str = ""
    # False until VM, network and scratch disk are known to be gone.
    released: bool = False
    phases_ms: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The name that must be unique: what kubelet takes a pod's sandbox by."""
        s = self.spec
        return f"{s.name}_{s.namespace}_{s.uid}_{s.attempt}"

    def moved(self, state: SandboxState, **changes: Any) -> SandboxRecord:
        """Return the record in a new state; `IllegalTransitionError`, with both named, for a move not in the table."""
        _check("sandbox", self.id, self.state, state, SANDBOX_MOVES)
        return replace(self, state=state, **changes)


@dataclass(frozen=True, slots=True)
class ContainerRecord:
    """One container. Times are nanoseconds since the epoch, 0 when it has not come to that."""

    id: str
    sandbox_id: str
    spec: ContainerSpec
    state: ContainerState
    created_ns: int
    image_id: str
    image_ref: str
    log_path: str = ""  # absolute; "" when the client wants no log
    stop_signal: str = "SIGTERM"
    layer_serials: tuple[str, ...] = ()
    # For each of spec.mounts the id of the image that it mounts, "" for a host path; () when none mounts an image.
    volume_image_ids: tuple[str, ...] = ()
    block_serials: tuple[str, ...] = ()
    started_ns: int = 0
    finished_ns: int = 0
    exit_code: int = 0
    reason: str = ""
    message: str = ""
    uid: int = 0
    gid: int = 0
    supplemental_groups: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """The name that must be unique within its sandbox."""
        return f"{self.spec.name}_{self.spec.attempt}"

    def moved(self, state: ContainerState, **changes: Any) -> ContainerRecord:
        """Return the record in a new state; `IllegalTransitionError`, with both named, for a move not in the table."""
        _check("container", self.id, self.state, state, CONTAINER_MOVES)
        return replace(self, state=state, **changes)


def _check(kind: str, record_id: str, old: Any, new: Any, moves: Mapping[Any, frozenset[Any]]) -> None:
    if new not in moves[old]:
        raise IllegalTransitionError(
            f"a {kind} that is {old.value} cannot become {new.value}", resource=f"{kind} {record_id}"
        )
