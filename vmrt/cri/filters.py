"""Which records a list shows: pure predicates. The conditions of a filter must all hold; an empty one holds for all.

Records being created or removed are shown to nobody. An id may be abbreviated; labels must match exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vmrt.cri.fields import refuse
from vmrt.cri.statuses import CONTAINER_STATES, SANDBOX_STATES
from vmrt.pods.records import ContainerRecord, ContainerState, SandboxRecord, SandboxState
from vmrt.proto.runtime.v1 import api_pb2 as cri

_HIDDEN_SANDBOXES = frozenset({SandboxState.CREATING, SandboxState.REMOVING})
_HIDDEN_CONTAINERS = frozenset({ContainerState.CREATING, ContainerState.REMOVING})


def select_sandboxes(records: Sequence[SandboxRecord], wanted: cri.PodSandboxFilter) -> list[SandboxRecord]:
    """Return the records that ListPodSandbox shows for a filter, in their order."""
    state = wanted.state.state if wanted.HasField("state") else None
    if state is not None and state not in cri.PodSandboxState.values():
        refuse("filter.state.state", f"has the unknown value {state}")
    labels = dict(wanted.label_selector)
    return [
        record
        for record in records
        if record.state not in _HIDDEN_SANDBOXES
        and record.id.startswith(wanted.id)
        and (state is None or SANDBOX_STATES[record.state] == state)
        and has_labels(record.spec.labels, labels)
    ]


def select_containers(records: Sequence[ContainerRecord], wanted: cri.ContainerFilter) -> list[ContainerRecord]:
    """Return the records that ListContainers shows for a filter, in their order."""
    state = wanted.state.state if wanted.HasField("state") else None
    if state is not None and state not in cri.ContainerState.values():
        refuse("filter.state.state", f"has the unknown value {state}")
    labels = dict(wanted.label_selector)
    return [
        record
        for record in records
        if record.state not in _HIDDEN_CONTAINERS
        and record.id.startswith(wanted.id)
        and record.sandbox_id.startswith(wanted.pod_sandbox_id)
        and (state is None or CONTAINER_STATES[record.state] == state)
        and has_labels(record.spec.labels, labels)
    ]


def has_labels(labels: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Say whether every wanted label is there with the wanted value."""
    return all(labels.get(key) == value for key, value in wanted.items())
