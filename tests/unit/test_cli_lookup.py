from __future__ import annotations

import pytest

from vmrt.cli.lookup import find_container, find_either, find_pod
from vmrt.errors import InvalidArgumentError, NotFoundError, VmrtError
from vmrt.proto.runtime.v1 import api_pb2


def pod(identifier: str, name: str, namespace: str = "default") -> api_pb2.PodSandbox:
    return api_pb2.PodSandbox(id=identifier, metadata=api_pb2.PodSandboxMetadata(name=name, namespace=namespace))


def container(identifier: str, owner: str, name: str, attempt: int = 0) -> api_pb2.Container:
    metadata = api_pb2.ContainerMetadata(name=name, attempt=attempt)
    return api_pb2.Container(id=identifier, pod_sandbox_id=owner, metadata=metadata)


PODS = [
    pod("a111", "web"),
    pod("a222", "web", "prod"),
    pod("b333", "db"),
    pod("d444", "empty"),
    pod("e555", "cafe"),  # a name that is an id's prefix, too
    pod("cafe9", "other"),
]
CONTAINERS = [
    container("c001", "a111", "app"),
    container("c002", "a111", "side"),
    container("c003", "a222", "app"),
    container("f004", "b333", "postgres", 0),
    container("f005", "b333", "postgres", 1),
    container("b336", "cafe9", "clash"),
]


@pytest.mark.parametrize(
    ("wanted", "identifier"),
    [
        ("a111", "a111"),
        ("a1", "a111"),
        ("db", "b333"),
        ("prod/web", "a222"),
        ("default/web", "a111"),
        ("cafe", "e555"),  # a name wins over a prefix
        ("cafe9", "cafe9"),
    ],
)
def test_find_pod(wanted: str, identifier: str) -> None:
    assert find_pod(PODS, wanted).id == identifier


@pytest.mark.parametrize(
    ("wanted", "identifier"),
    [
        ("c001", "c001"),
        ("side", "c002"),
        ("b333/postgres", "f005"),  # by the pod's id
        ("postgres", "f005"),  # the newest attempt
        ("f004", "f004"),  # unless an older one is named by id
        ("prod/web/app", "c003"),
        ("db", "f005"),  # a pod with one container stands for it
        ("other", "b336"),
    ],
)
def test_find_container(wanted: str, identifier: str) -> None:
    assert find_container(CONTAINERS, PODS, wanted).id == identifier


@pytest.mark.parametrize(
    ("wanted", "identifier"),
    [("db", "b333"), ("side", "c002"), ("b3333", None), ("b333", "b333"), ("b336", "b336"), ("db/postgres", "f005")],
)
def test_find_either(wanted: str, identifier: str | None) -> None:
    if identifier is None:
        with pytest.raises(NotFoundError):
            find_either(CONTAINERS, PODS, wanted)
    else:
        assert find_either(CONTAINERS, PODS, wanted).id == identifier


@pytest.mark.parametrize(
    ("finder", "wanted", "error", "says"),
    [
        ("pod", "web", InvalidArgumentError, "'web' is ambiguous: a111 (default/web), a222 (prod/web)"),
        ("pod", "a", InvalidArgumentError, "a111"),
        ("pod", "nothing", NotFoundError, "no pod 'nothing'"),
        ("pod", "", NotFoundError, "no pod ''"),
        ("container", "app", InvalidArgumentError, "c001 (web/app), c003 (web/app)"),
        ("container", "c00", InvalidArgumentError, "ambiguous"),
        ("container", "default/web", NotFoundError, "has 2 containers: app, side"),
        ("container", "empty", NotFoundError, "has 0 containers"),
        ("container", "x/app", NotFoundError, "no container 'x/app'"),
        ("container", "", NotFoundError, "no container ''"),
        ("either", "b33", InvalidArgumentError, "pod b333, container b336"),
        ("either", "", NotFoundError, "no pod or container"),
    ],
)
def test_what_is_not_found(finder: str, wanted: str, error: type[VmrtError], says: str) -> None:
    with pytest.raises(error) as caught:
        if finder == "pod":
            find_pod(PODS, wanted)
        elif finder == "container":
            find_container(CONTAINERS, PODS, wanted)
        else:
            find_either(CONTAINERS, PODS, wanted)
    assert says in str(caught.value)


def test_a_long_list_of_candidates_is_cut() -> None:
    pods = [pod(f"{number:04x}ff", "same", f"ns{number}") for number in range(9)]
    with pytest.raises(InvalidArgumentError, match="and 4 more"):
        find_pod(pods, "same")
