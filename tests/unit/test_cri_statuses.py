"""Protobuf out, and which records a list shows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vmrt.cri import filters, specs, statuses
from vmrt.errors import InvalidArgumentError
from vmrt.model import (
    ContainerSpec,
    HugepageLimit,
    Image,
    ImageConfig,
    LinuxResources,
    Mount,
    NamespaceMode,
    NamespaceOptions,
    Propagation,
    SandboxSpec,
    SecurityContext,
)
from vmrt.pods.records import ContainerRecord, ContainerState, SandboxRecord, SandboxState
from vmrt.proto.runtime.v1 import api_pb2 as cri


def sandbox(record_id: str, state: SandboxState = SandboxState.READY, **labels: str) -> SandboxRecord:
    spec = SandboxSpec(name="web", uid="u1", namespace="default", attempt=2, labels=labels, annotations={"a": "b\n"})
    return SandboxRecord(record_id, spec, state, 1234, "vm-1", "tap1", ips=("10.1.0.2", "fd00::2"))


def container(
    record_id: str, sandbox_id: str = "aa", state: ContainerState = ContainerState.RUNNING, **labels: str
) -> ContainerRecord:
    spec = ContainerSpec(name="main", image="sha256:img", attempt=1, user_specified_image="busybox", labels=labels)
    return ContainerRecord(record_id, sandbox_id, spec, state, 5, "sha256:img", "sha256:img")


def test_sandbox_status() -> None:
    record = sandbox("aa", app="x")
    record = replace(record, spec=replace(record.spec, runtime_handler="big"))
    status = statuses.sandbox_status(record)
    # kubelet makes a pod anew whose handler or network mode is not told as it was asked for.
    assert statuses.sandbox_item(record).runtime_handler == status.runtime_handler == "big"
    assert status.linux.namespaces.options.network == cri.POD
    assert (status.id, status.state, status.created_at) == ("aa", cri.SANDBOX_READY, 1234)
    assert status.metadata == cri.PodSandboxMetadata(name="web", uid="u1", namespace="default", attempt=2)
    assert (status.network.ip, [ip.ip for ip in status.network.additional_ips]) == ("10.1.0.2", ["fd00::2"])
    assert (dict(status.labels), dict(status.annotations)) == ({"app": "x"}, {"a": "b\n"})


def test_sandbox_without_addresses_still_has_a_network() -> None:
    status = statuses.sandbox_status(replace(sandbox("aa"), ips=()))
    assert status.HasField("network")
    assert (status.network.ip, len(status.network.additional_ips)) == ("", 0)


def test_namespaces_are_told_as_asked_for() -> None:
    options = NamespaceOptions(pid=NamespaceMode.TARGET, target_id="t")
    record = sandbox("aa")
    record = replace(record, spec=replace(record.spec, security=SecurityContext(namespaces=options)))
    told = statuses.sandbox_status(record).linux.namespaces.options
    assert (told.network, told.pid, told.ipc, told.target_id) == (cri.POD, cri.TARGET, cri.POD, "t")


def test_container_status() -> None:
    record = container("cc")
    record = replace(
        record,
        spec=replace(
            record.spec,
            mounts=(Mount("/data", "/srv", readonly=True, propagation=Propagation.HOST_TO_CONTAINER),),
            resources=LinuxResources(cpu_shares=2, hugepage_limits=(HugepageLimit("2MB", 4),), unified={"a.b": "c"}),
        ),
        started_ns=6,
        finished_ns=7,
        exit_code=137,
        reason="OOMKilled",
        message="m",
        uid=1,
        gid=2,
        supplemental_groups=(3,),
        log_path="/var/log/x.log",
        stop_signal="SIGRTMIN+3",
    )
    status = statuses.container_status(record)
    assert (status.created_at, status.started_at, status.finished_at) == (5, 6, 7)
    assert (status.exit_code, status.reason, status.message) == (137, "OOMKilled", "m")
    assert status.image == cri.ImageSpec(image="sha256:img", user_specified_image="busybox")
    assert status.image_ref == status.image_id == "sha256:img"
    assert list(status.mounts) == [
        cri.Mount(
            container_path="/data", host_path="/srv", readonly=True, propagation=cri.PROPAGATION_HOST_TO_CONTAINER
        )
    ]
    assert status.resources.linux == cri.LinuxContainerResources(
        cpu_shares=2, hugepage_limits=[cri.HugepageLimit(page_size="2MB", limit=4)], unified={"a.b": "c"}
    )
    assert status.user.linux == cri.LinuxContainerUser(uid=1, gid=2, supplemental_groups=[3])
    assert (status.log_path, status.stop_signal) == ("/var/log/x.log", cri.SIGRTMINPLUS3)


def test_image_volume_is_told_with_its_image_id() -> None:
    mounts = (
        Mount("/h", "/srv"),
        Mount("/i", readonly=True, image="x:1", user_specified_image="x", image_sub_path="a"),
    )
    record = container("cc")
    record = replace(record, spec=replace(record.spec, mounts=mounts), volume_image_ids=("", "sha256:vol"))
    host, volume = statuses.container_status(record).mounts
    assert not host.HasField("image")
    assert volume == cri.Mount(
        container_path="/i",
        readonly=True,
        image=cri.ImageSpec(image="x:1", user_specified_image="x", image_ref="sha256:vol"),
        image_sub_path="a",
    )
    # A record of a version that did not have them.
    record = replace(record, spec=replace(record.spec, mounts=mounts[:1]), volume_image_ids=())
    assert [m.host_path for m in statuses.container_status(record).mounts] == ["/srv"]


def test_every_state_has_its_number() -> None:
    assert set(statuses.SANDBOX_STATES) == set(SandboxState)
    assert set(statuses.CONTAINER_STATES) == set(ContainerState)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("SIGTERM", cri.SIGTERM),
        ("term", cri.SIGTERM),
        (" SIGQUIT ", cri.SIGQUIT),
        ("9", cri.SIGKILL),
        ("SIGRTMIN+15", cri.SIGRTMINPLUS15),
        ("rtmax-1", cri.SIGRTMAXMINUS1),
        ("37", cri.SIGRTMINPLUS3),
        ("64", cri.SIGRTMAX),
        ("", cri.RUNTIME_DEFAULT),
        ("0", cri.RUNTIME_DEFAULT),
        ("999999", cri.RUNTIME_DEFAULT),
        ("SIGNONSENSE", cri.RUNTIME_DEFAULT),
    ],
)
def test_stop_signal(name: str, number: int) -> None:
    assert statuses.stop_signal(name) == number


def test_every_signal_goes_out_and_comes_back() -> None:
    for value in cri.Signal.values():
        assert statuses.stop_signal(specs.signal_name(value)) == value


@pytest.mark.parametrize(
    ("user", "uid", "name"),
    [
        ("", None, ""),
        ("1002", 1002, ""),
        ("1003:1004", 1003, ""),
        ("0", 0, ""),
        ("www-data", None, "www-data"),
        ("www-data:1004", None, "www-data"),
        ("٣", None, "٣"),
        ("9" * 400, 9999999999, ""),
    ],
)
def test_image_user(user: str, uid: int | None, name: str) -> None:
    assert statuses.image_user(user) == (uid, name)
    image = statuses.image_message(Image("sha256:x", ("t",), ("d",), 0, ImageConfig(user=user), (), pinned=True))
    assert image.HasField("uid") == (uid is not None)
    assert (image.uid.value, image.username, image.size, image.pinned) == (uid or 0, name, 1, True)


def test_translations_are_remembered_while_the_record_is_the_same() -> None:
    translated = statuses.Translated(statuses.sandbox_item)
    first, second = sandbox("aa"), sandbox("bb")
    translated.refresh([first, second])
    item = translated.of(first)
    translated.refresh([first])
    assert translated.of(first) is item
    assert translated.of(second) is not translated.of(second), "a forgotten record is translated anew"
    changed = first.moved(SandboxState.NOT_READY)
    translated.refresh([changed])
    assert translated.of(changed).state == cri.SANDBOX_NOTREADY


SANDBOXES = [
    sandbox("aa1", app="x", tier="front"),
    sandbox("aa2", SandboxState.NOT_READY, app="x"),
    sandbox("bb1", app="y"),
    sandbox("cc1", SandboxState.CREATING, app="x"),
    sandbox("cc2", SandboxState.REMOVING, app="x"),
]


@pytest.mark.parametrize(
    ("wanted", "ids"),
    [
        (cri.PodSandboxFilter(), ["aa1", "aa2", "bb1"]),
        (cri.PodSandboxFilter(id="aa"), ["aa1", "aa2"]),
        (cri.PodSandboxFilter(id="aa1"), ["aa1"]),
        (cri.PodSandboxFilter(id="cc"), []),
        (cri.PodSandboxFilter(id="zz"), []),
        (cri.PodSandboxFilter(state=cri.PodSandboxStateValue(state=cri.SANDBOX_READY)), ["aa1", "bb1"]),
        (cri.PodSandboxFilter(state=cri.PodSandboxStateValue(state=cri.SANDBOX_NOTREADY)), ["aa2"]),
        (cri.PodSandboxFilter(label_selector={"app": "x"}), ["aa1", "aa2"]),
        (cri.PodSandboxFilter(label_selector={"app": "x", "tier": "front"}), ["aa1"]),
        (cri.PodSandboxFilter(label_selector={"app": "x", "tier": ""}), []),
        (cri.PodSandboxFilter(id="bb", label_selector={"app": "x"}), []),
    ],
)
def test_sandbox_filter(wanted: cri.PodSandboxFilter, ids: list[str]) -> None:
    assert [record.id for record in filters.select_sandboxes(SANDBOXES, wanted)] == ids


CONTAINERS = [
    container("c1", "aa1", app="x"),
    container("c2", "aa1", ContainerState.EXITED, app="y"),
    container("d1", "bb1", ContainerState.CREATED, app="x"),
    container("d2", "bb1", ContainerState.UNKNOWN),
    container("e1", "bb1", ContainerState.CREATING),
    container("e2", "bb1", ContainerState.REMOVING),
]


def _state(state: cri.ContainerState.ValueType) -> cri.ContainerStateValue:
    return cri.ContainerStateValue(state=state)


@pytest.mark.parametrize(
    ("wanted", "ids"),
    [
        (cri.ContainerFilter(), ["c1", "c2", "d1", "d2"]),
        (cri.ContainerFilter(id="c"), ["c1", "c2"]),
        (cri.ContainerFilter(pod_sandbox_id="bb"), ["d1", "d2"]),
        (cri.ContainerFilter(state=_state(cri.CONTAINER_CREATED)), ["d1"]),
        (cri.ContainerFilter(state=_state(cri.CONTAINER_RUNNING)), ["c1"]),
        (cri.ContainerFilter(state=_state(cri.CONTAINER_EXITED)), ["c2"]),
        (cri.ContainerFilter(state=_state(cri.CONTAINER_UNKNOWN)), ["d2"]),
        (cri.ContainerFilter(label_selector={"app": "x"}), ["c1", "d1"]),
        (cri.ContainerFilter(label_selector={"app": "x"}, pod_sandbox_id="aa1", id="c1"), ["c1"]),
        (cri.ContainerFilter(label_selector={"app": "x"}, pod_sandbox_id="aa1", id="d"), []),
    ],
)
def test_container_filter(wanted: cri.ContainerFilter, ids: list[str]) -> None:
    assert [record.id for record in filters.select_containers(CONTAINERS, wanted)] == ids


def test_filter_with_an_unknown_state() -> None:
    with pytest.raises(InvalidArgumentError, match=r"filter\.state\.state has the unknown value 9"):
        filters.select_sandboxes([], cri.PodSandboxFilter(state=cri.PodSandboxStateValue(state=9)))  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match=r"filter\.state\.state has the unknown value 9"):
        filters.select_containers([], cri.ContainerFilter(state=cri.ContainerStateValue(state=9)))  # type: ignore[arg-type]
