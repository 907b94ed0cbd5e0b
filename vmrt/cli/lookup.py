"""What a person types, turned into the one pod or container meant.

Rules, in this order: a full id; a name; a unique prefix of an id. A pod's name may be given as NAMESPACE/NAME, a
container's as POD/NAME. Of several attempts of one container (kubelet restarts them as attempt 1, 2, ...) the newest is
meant. A pod with a single container may stand for it, so what `vmrt run` prints can be given to every command. Anything
else that is ambiguous is an error that lists the candidates; nothing is ever guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vmrt.cli.output import short_id
from vmrt.errors import InvalidArgumentError, NotFoundError

if TYPE_CHECKING:
    from vmrt.proto.runtime.v1 import api_pb2

    Pod = api_pb2.PodSandbox
    Container = api_pb2.Container


def pod_candidates(pods: Sequence[Pod], wanted: str) -> list[Pod]:
    """Return the pods that `wanted` may mean: one for a full id, all with the name, else all with the id prefix."""
    exact = [pod for pod in pods if pod.id == wanted]
    named = [pod for pod in pods if wanted in (pod.metadata.name, f"{pod.metadata.namespace}/{pod.metadata.name}")]
    return exact or named or [pod for pod in pods if wanted and pod.id.startswith(wanted)]


def container_candidates(containers: Sequence[Container], pods: Sequence[Pod], wanted: str) -> list[Container]:
    """Return the containers that `wanted` may mean, as `pod_candidates` does, older attempts left out."""
    exact = [container for container in containers if container.id == wanted]
    if exact:
        return exact
    pod_part, slash, name = wanted.rpartition("/")
    within = {pod.id for pod in pod_candidates(pods, pod_part)} if slash else None
    named = [
        container
        for container in containers
        if container.metadata.name == name and (within is None or container.pod_sandbox_id in within)
    ]
    if named:
        newest: dict[str, Container] = {}
        for container in named:
            rival = newest.get(container.pod_sandbox_id)
            if rival is None or rival.metadata.attempt < container.metadata.attempt:
                newest[container.pod_sandbox_id] = container
        return list(newest.values())
    return [container for container in containers if wanted and container.id.startswith(wanted)]


def find_pod(pods: Sequence[Pod], wanted: str) -> Pod:
    """Return the one pod meant, or raise `NotFoundError` or `InvalidArgumentError`."""
    found = pod_candidates(pods, wanted)
    if not found:
        raise NotFoundError(f"no pod {wanted!r}", hint="`vmrt pods` lists them")
    if len(found) > 1:
        raise _ambiguous(
            wanted, [f"{short_id(pod.id)} ({pod.metadata.namespace}/{pod.metadata.name})" for pod in found]
        )
    return found[0]


def find_container(containers: Sequence[Container], pods: Sequence[Pod], wanted: str) -> Container:
    """Return the one container meant, or raise `NotFoundError` or `InvalidArgumentError`."""
    found = container_candidates(containers, pods, wanted)
    if not found:
        owners = pod_candidates(pods, wanted)
        if len(owners) == 1:
            inside = [container for container in containers if container.pod_sandbox_id == owners[0].id]
            names = sorted({container.metadata.name for container in inside})
            if len(names) == 1:
                return max(inside, key=lambda container: container.metadata.attempt)
            raise NotFoundError(
                f"pod {wanted!r} has {len(names)} containers" + (f": {', '.join(names)}" if names else ""),
                hint="name one as POD/CONTAINER" if names else "",
            )
        raise NotFoundError(f"no container {wanted!r}", hint="`vmrt ps -a` lists them")
    if len(found) > 1:
        owner = {pod.id: pod.metadata.name for pod in pods}
        raise _ambiguous(
            wanted,
            [f"{short_id(each.id)} ({owner.get(each.pod_sandbox_id, '?')}/{each.metadata.name})" for each in found],
        )
    return found[0]


def find_either(containers: Sequence[Container], pods: Sequence[Pod], wanted: str) -> Pod | Container:
    """Return the pod meant, else the container meant."""
    if pod_candidates(pods, wanted):
        # An id prefix that fits a pod and a container is ambiguous; a name is looked for among pods first.
        by_prefix = [each for each in containers if wanted and each.id.startswith(wanted)]
        pod = find_pod(pods, wanted)
        if by_prefix and wanted not in (pod.id, pod.metadata.name, f"{pod.metadata.namespace}/{pod.metadata.name}"):
            raise _ambiguous(wanted, [f"pod {short_id(pod.id)}", *(f"container {short_id(e.id)}" for e in by_prefix)])
        return pod
    if not container_candidates(containers, pods, wanted):
        raise NotFoundError(f"no pod or container {wanted!r}", hint="`vmrt pods` and `vmrt ps -a` list them")
    return find_container(containers, pods, wanted)


def _ambiguous(wanted: str, candidates: Sequence[str]) -> InvalidArgumentError:
    shown = ", ".join(candidates[:5]) + (f" and {len(candidates) - 5} more" if len(candidates) > 5 else "")
    return InvalidArgumentError(f"{wanted!r} is ambiguous: {shown}")
