"""CRI's answers, out: records and images become protobuf messages. Pure functions of what they are given.

Clients check more than they say: created_at must not be 0, the network mode must be the one asked for (kubelet makes
the pod anew otherwise), image_id must equal Image.id, mounts must be exactly those asked for.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Generic, Protocol, TypeVar

from vmrt.cri.ports import RuntimeStatus
from vmrt.cri.security import NAMESPACE_MODES
from vmrt.cri.specs import PROPAGATIONS, SIGNALS
from vmrt.model import ContainerSpec, IdMapping, Image, LinuxResources, Mount, NamespaceMode, NamespaceOptions
from vmrt.pods.records import ContainerRecord, ContainerState, SandboxRecord, SandboxState
from vmrt.proto.runtime.v1 import api_pb2 as cri

# CREATING and REMOVING are in no list and no status (vmrt.pods.records); they are here so that the tables are whole.
SANDBOX_STATES: Mapping[SandboxState, cri.PodSandboxState.ValueType] = {
    SandboxState.CREATING: cri.SANDBOX_NOTREADY,
    SandboxState.READY: cri.SANDBOX_READY,
    SandboxState.NOT_READY: cri.SANDBOX_NOTREADY,
    SandboxState.REMOVING: cri.SANDBOX_NOTREADY,
}
CONTAINER_STATES: Mapping[ContainerState, cri.ContainerState.ValueType] = {
    ContainerState.CREATING: cri.CONTAINER_UNKNOWN,
    ContainerState.CREATED: cri.CONTAINER_CREATED,
    ContainerState.RUNNING: cri.CONTAINER_RUNNING,
    ContainerState.EXITED: cri.CONTAINER_EXITED,
    ContainerState.UNKNOWN: cri.CONTAINER_UNKNOWN,
    ContainerState.REMOVING: cri.CONTAINER_UNKNOWN,
}
_MODES = {ours: theirs for theirs, ours in NAMESPACE_MODES.items()}
_PROPAGATIONS = {ours: theirs for theirs, ours in PROPAGATIONS.items()}


@dataclass(frozen=True, slots=True)
class Features:
    """What vmrt does of the interface's optional parts; `handler` ones are said of every handler."""

    supplemental_groups_policy: bool = True
    user_namespaces_host_network: bool = False
    handler_recursive_read_only_mounts: bool = True
    handler_user_namespaces: bool = True


class _Identified(Protocol):
    @property
    def id(self) -> str: ...


_Record = TypeVar("_Record", bound=_Identified)
_Message = TypeVar("_Message")


class Translated(Generic[_Record, _Message]):
    """Remembers each record's translation: kubelet asks for all of them every second, and few have changed.

    Records are frozen, so one that is the same object has the same translation. Holds no more than the last list did.
    """

    def __init__(self, translate: Callable[[_Record], _Message]) -> None:
        self._translate = translate
        self._known: dict[str, tuple[_Record, _Message]] = {}

    def refresh(self, records: Iterable[_Record]) -> None:
        """Take over all records there are; those that are gone are forgotten."""
        known = self._known
        self._known = {
            record.id: (record, found[1])
            if (found := known.get(record.id)) is not None and found[0] is record
            else (record, self._translate(record))
            for record in records
        }

    def of(self, record: _Record) -> _Message:
        """Return a record's message, not to be changed."""
        found = self._known.get(record.id)
        return found[1] if found is not None and found[0] is record else self._translate(record)


def sandbox_metadata(record: SandboxRecord) -> cri.PodSandboxMetadata:
    """Return a sandbox's metadata."""
    spec = record.spec
    return cri.PodSandboxMetadata(name=spec.name, uid=spec.uid, namespace=spec.namespace, attempt=spec.attempt)


def sandbox_item(record: SandboxRecord) -> cri.PodSandbox:
    """Return a sandbox as ListPodSandbox shows it."""
    return cri.PodSandbox(
        id=record.id,
        metadata=sandbox_metadata(record),
        state=SANDBOX_STATES[record.state],
        created_at=record.created_ns,
        labels=record.spec.labels,
        annotations=record.spec.annotations,
        runtime_handler=record.spec.runtime_handler,
    )


def sandbox_status(record: SandboxRecord) -> cri.PodSandboxStatus:
    """Return a sandbox as PodSandboxStatus shows it."""
    first, *others = record.ips or ("",)
    return cri.PodSandboxStatus(
        id=record.id,
        metadata=sandbox_metadata(record),
        state=SANDBOX_STATES[record.state],
        created_at=record.created_ns,
        network=cri.PodSandboxNetworkStatus(ip=first, additional_ips=[cri.PodIP(ip=ip) for ip in others]),
        linux=cri.LinuxPodSandboxStatus(namespaces=cri.Namespace(options=_namespaces(record.spec.security.namespaces))),
        labels=record.spec.labels,
        annotations=record.spec.annotations,
        runtime_handler=record.spec.runtime_handler,
    )


def container_item(record: ContainerRecord) -> cri.Container:
    """Return a container as ListContainers shows it."""
    spec = record.spec
    return cri.Container(
        id=record.id,
        pod_sandbox_id=record.sandbox_id,
        metadata=cri.ContainerMetadata(name=spec.name, attempt=spec.attempt),
        image=_image_spec(spec),
        image_ref=record.image_ref,
        state=CONTAINER_STATES[record.state],
        created_at=record.created_ns,
        labels=spec.labels,
        annotations=spec.annotations,
        image_id=record.image_id,
    )


def container_status(record: ContainerRecord) -> cri.ContainerStatus:
    """Return a container as ContainerStatus shows it."""
    spec = record.spec
    return cri.ContainerStatus(
        id=record.id,
        metadata=cri.ContainerMetadata(name=spec.name, attempt=spec.attempt),
        state=CONTAINER_STATES[record.state],
        created_at=record.created_ns,
        started_at=record.started_ns,
        finished_at=record.finished_ns,
        exit_code=record.exit_code,
        image=_image_spec(spec),
        image_ref=record.image_ref,
        reason=record.reason,
        message=record.message,
        labels=spec.labels,
        annotations=spec.annotations,
        mounts=[
            _mount(mount, image_id)
            for mount, image_id in zip(spec.mounts, record.volume_image_ids or repeat(""), strict=False)
        ],
        log_path=record.log_path,
        resources=cri.ContainerResources(linux=_resources(spec.resources)),
        image_id=record.image_id,
        user=cri.ContainerUser(
            linux=cri.LinuxContainerUser(uid=record.uid, gid=record.gid, supplemental_groups=record.supplemental_groups)
        ),
        stop_signal=stop_signal(record.stop_signal),
    )


def stop_signal(name: str) -> cri.Signal.ValueType:
    """Return CRI's number for a signal as an image spells it: "SIGTERM", "term", "15", "SIGRTMIN+3".

    One that CRI has no number for becomes RUNTIME_DEFAULT.
    """
    text = name.strip().upper()
    if text.isdecimal() and len(text) < 4:
        try:
            text = signal.Signals(int(text)).name
        except ValueError:
            # Real-time signals between the ends have no name in Python; signal(7) counts them from SIGRTMIN.
            text = f"SIGRTMIN+{int(text) - signal.SIGRTMIN}"
    elif text and not text.startswith("SIG"):
        text = f"SIG{text}"
    return SIGNALS.get(text, cri.RUNTIME_DEFAULT)


def image_message(image: Image) -> cri.Image:
    """Return an image as ListImages and ImageStatus show it."""
    uid, username = image_user(image.config.user)
    return cri.Image(
        id=image.id,
        repo_tags=image.repo_tags,
        repo_digests=image.repo_digests,
        # Clients refuse an image of size 0; an image may honestly have no layers.
        size=max(1, image.size_bytes),
        uid=None if uid is None else cri.Int64Value(value=uid),
        username=username,
        pinned=image.pinned,
    )


def image_user(user: str) -> tuple[int | None, str]:
    """Split an image's USER ("", "name", "1000", "name:group", "1000:1000") into (numeric id or None, name)."""
    name = user.partition(":")[0]
    if name.isascii() and name.isdecimal():
        return int(name[:10]), ""
    return None, name


def runtime_status(
    status: RuntimeStatus, handlers: Sequence[str], features: Features, *, verbose: bool
) -> cri.StatusResponse:
    """Return the runtime's conditions and abilities; the default handler, "", is said besides the named ones."""
    handler_features = cri.RuntimeHandlerFeatures(
        recursive_read_only_mounts=features.handler_recursive_read_only_mounts,
        user_namespaces=features.handler_user_namespaces,
    )
    return cri.StatusResponse(
        status=cri.RuntimeStatus(
            conditions=[
                cri.RuntimeCondition(
                    type="RuntimeReady",
                    status=status.runtime_ready,
                    reason=status.runtime_reason,
                    message=status.runtime_message,
                ),
                cri.RuntimeCondition(
                    type="NetworkReady",
                    status=status.network_ready,
                    reason=status.network_reason,
                    message=status.network_message,
                ),
            ]
        ),
        info=status.info if verbose else None,
        runtime_handlers=[
            cri.RuntimeHandler(name=name, features=handler_features)
            for name in ("", *(handler for handler in handlers if handler))
        ],
        features=cri.RuntimeFeatures(
            supplemental_groups_policy=features.supplemental_groups_policy,
            user_namespaces_host_network=features.user_namespaces_host_network,
        ),
    )


def _image_spec(spec: ContainerSpec) -> cri.ImageSpec:
    return cri.ImageSpec(image=spec.image, user_specified_image=spec.user_specified_image)


def _namespaces(options: NamespaceOptions) -> cri.NamespaceOption:
    told = cri.NamespaceOption(
        network=_MODES[options.network],
        pid=_MODES[options.pid],
        ipc=_MODES[options.ipc],
        target_id=options.target_id,
    )
    if options.userns is NamespaceMode.POD:
        told.userns_options.MergeFrom(
            cri.UserNamespace(mode=cri.POD, uids=_mappings(options.uids), gids=_mappings(options.gids))
        )
    return told


def _mappings(mappings: Sequence[IdMapping]) -> list[cri.IDMapping]:
    return [cri.IDMapping(host_id=m.host_id, container_id=m.container_id, length=m.length) for m in mappings]


def _mount(mount: Mount, image_id: str) -> cri.Mount:
    image = None
    if mount.image:
        image = cri.ImageSpec(image=mount.image, user_specified_image=mount.user_specified_image, image_ref=image_id)
    return cri.Mount(
        image=image,
        image_sub_path=mount.image_sub_path,
        container_path=mount.container_path,
        host_path=mount.host_path,
        readonly=mount.readonly,
        selinux_relabel=mount.selinux_relabel,
        propagation=_PROPAGATIONS[mount.propagation],
        recursive_read_only=mount.recursive_read_only,
        uidMappings=_mappings(mount.uids),
        gidMappings=_mappings(mount.gids),
    )


def _resources(limits: LinuxResources) -> cri.LinuxContainerResources:
    return cri.LinuxContainerResources(
        cpu_period=limits.cpu_period_us,
        cpu_quota=limits.cpu_quota_us,
        cpu_shares=limits.cpu_shares,
        memory_limit_in_bytes=limits.memory_limit_bytes,
        oom_score_adj=limits.oom_score_adj,
        cpuset_cpus=limits.cpuset_cpus,
        cpuset_mems=limits.cpuset_mems,
        hugepage_limits=[cri.HugepageLimit(page_size=h.page_size, limit=h.limit_bytes) for h in limits.hugepage_limits],
        unified=limits.unified,
        memory_swap_limit_in_bytes=limits.memory_swap_limit_bytes,
    )
