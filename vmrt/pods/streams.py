"""Exec, attach and port-forward streams: the pods room's side of the streaming server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

from vmrt.agent_client import AgentClient, DialSession, Session
from vmrt.errors import FailedPreconditionError
from vmrt.pods.records import ContainerState
from vmrt.pods.table import PodTable

RUNNING = frozenset({ContainerState.RUNNING})
ATTACHABLE = frozenset({ContainerState.CREATED, ContainerState.RUNNING})


class _Exec(Protocol):
    @property
    def container_id(self) -> str: ...
    @property
    def args(self) -> Sequence[str]: ...
    @property
    def stdin(self) -> bool: ...
    @property
    def tty(self) -> bool: ...


class _Attach(Protocol):
    @property
    def container_id(self) -> str: ...
    @property
    def stdin(self) -> bool: ...


class PodStreams:
    """Opens streams into pods. State is checked when a stream is opened: a URL may be older than the container's end.

    Entering what is returned raises `VmrtError`; leaving it closes the stream, and kills an exec's process.
    """

    def __init__(self, table: PodTable) -> None:
        self._table = table

    @asynccontextmanager
    async def exec(self, request: _Exec) -> AsyncIterator[Session]:
        """Run one more process in a running container; a command that it lacks is `InvalidArgumentError`."""
        agent = self._agent(request.container_id, "exec")
        async with agent.exec(request.container_id, request.args, tty=request.tty, stdin=request.stdin) as session:
            yield session

    @asynccontextmanager
    async def attach(self, request: _Attach) -> AsyncIterator[Session]:
        """Join the main process of a container that is running, or not started yet: nothing is missed then."""
        agent = self._agent(request.container_id, "attach", ATTACHABLE)
        async with agent.attach(request.container_id, stdin=request.stdin) as session:
            yield session

    def dial(self, sandbox_id: str, port: int) -> AbstractAsyncContextManager[DialSession]:
        """Connect to a TCP port of a pod's loopback."""
        return self._table.sandbox(sandbox_id).need_agent().dial_port(port)

    def _agent(self, container_id: str, verb: str, states: frozenset[ContainerState] = RUNNING) -> AgentClient:
        live = self._table.container(container_id)
        require_state(live.record.state, container_id, verb, states)
        return self._table.sandboxes[live.record.sandbox_id].need_agent()


def require_state(
    state: ContainerState, container_id: str, verb: str, states: frozenset[ContainerState] = RUNNING
) -> None:
    """Raise `FailedPreconditionError` unless a container is in one of `states`."""
    if state not in states:
        raise FailedPreconditionError(
            f"the container is {state.value}, {verb} needs a running one", resource=f"container {container_id}"
        )
