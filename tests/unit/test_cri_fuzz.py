"""Whatever a client sends, the edge answers with a spec or with an InvalidArgument error, and with nothing else."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings

from vmrt.cri import specs, statuses
from vmrt.errors import InvalidArgumentError
from vmrt.model import ContainerSpec, SandboxSpec, SecurityContext
from vmrt.pods.records import ContainerRecord, ContainerState, SandboxRecord, SandboxState
from vmrt.proto.runtime.v1 import api_pb2 as cri

# Half of what is drawn looks like what clients send: otherwise nothing would come past the first check.
PLAUSIBLE = ["", "web", "/srv/data", "main/0.log", "10.0.0.1", "localhost/x", "NET_ADMIN", "0-3", "2MB", "memory.high"]
TEXT = st.one_of(st.sampled_from(PLAUSIBLE), st.text(max_size=20))
NUMBERS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.CPPTYPE_INT32: st.integers(-(2**31), 2**31 - 1) | st.integers(0, 3),
    FieldDescriptor.CPPTYPE_INT64: st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 3),
    FieldDescriptor.CPPTYPE_UINT32: st.integers(0, 2**32 - 1) | st.integers(0, 3),
    FieldDescriptor.CPPTYPE_UINT64: st.integers(0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_ENUM: st.sampled_from([0, 0, 0, 1, 2, 3, 77, -1]),
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
    FieldDescriptor.CPPTYPE_DOUBLE: st.floats(),
}


USUAL: dict[str, list[Any]] = {
    "container_path": ["/data", "/"],
    "host_path": ["/srv/data"],
    "working_dir": ["/srv", ""],
    "log_directory": ["/var/log/pods"],
    "log_path": ["main/0.log"],
    "masked_paths": ["/proc/kcore"],
    "readonly_paths": ["/proc/sys"],
    "servers": ["10.0.0.10", "fd00::a"],
    "host_ip": ["", "127.0.0.1"],
    "page_size": ["2MB"],
    "cpuset_cpus": ["0-3,7"],
    "cpuset_mems": ["0"],
    "key": ["PATH"],
    "add_capabilities": ["NET_ADMIN", "ALL"],
    "drop_capabilities": ["ALL"],
    "container_port": [80],
    "host_port": [0, 8080],
    "cpu_period": [0, 100_000],
    "cpu_quota": [-1, 50_000],
    "length": [65536],
}


def scalar(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.type == FieldDescriptor.TYPE_BYTES:
        anything: st.SearchStrategy[Any] = st.binary(max_size=20)
    elif field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        anything = TEXT
    else:
        anything = NUMBERS[field.cpp_type]
    if field.name not in USUAL:
        return anything
    usual = st.sampled_from(USUAL[field.name])
    return st.one_of(usual, usual, usual, usual, usual, usual, anything)


@st.composite
def messages(draw: st.DrawFn, descriptor: Descriptor, chance: int = 2) -> Any:
    """Draw a message, each field present with a chance of one in `chance`."""
    message = GetMessageClass(descriptor)()
    for field in descriptor.fields:
        if draw(st.integers(1, chance)) != 1:
            continue
        kind = field.message_type
        if kind is not None and kind.GetOptions().map_entry:
            getattr(message, field.name).update(draw(st.dictionaries(TEXT, TEXT, max_size=2)))
        elif kind is not None and field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(messages(kind, chance), max_size=2)))
        elif kind is not None:
            getattr(message, field.name).CopyFrom(draw(messages(kind, chance)))
        elif field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(scalar(field), max_size=2)))
        else:
            setattr(message, field.name, draw(scalar(field)))
    return message


# Sparse messages come through whole, dense ones reach the odd corners.
def requests(descriptor: Descriptor) -> st.SearchStrategy[Any]:
    return st.sampled_from([2, 5, 12]).flatmap(lambda chance: messages(descriptor, chance))


SETTINGS = settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@SETTINGS
@given(requests(cri.RunPodSandboxRequest.DESCRIPTOR), st.booleans())
def test_any_sandbox_request(request: cri.RunPodSandboxRequest, named: bool) -> None:
    if named:
        request.config.metadata.CopyFrom(cri.PodSandboxMetadata(name="n", uid="u", namespace="d"))
        request.runtime_handler = ""
    try:
        spec = specs.sandbox_spec(request.config, request.runtime_handler, ("vm",))
    except InvalidArgumentError as error:
        assert str(error).startswith(("config", "runtime_handler"))
    else:
        record = SandboxRecord("id", spec, SandboxState.READY, 1, "vm", "tap")
        status = statuses.sandbox_status(record)
        assert status.metadata.name == request.config.metadata.name
        assert dict(status.annotations) == dict(request.config.annotations)
        assert statuses.sandbox_item(record).SerializeToString()


@SETTINGS
@given(requests(cri.CreateContainerRequest.DESCRIPTOR), st.booleans(), st.booleans())
def test_any_container_request(request: cri.CreateContainerRequest, named: bool, privileged: bool) -> None:
    if named:
        request.config.metadata.CopyFrom(cri.ContainerMetadata(name="n"))
        request.config.image.image = "i"
        for device in request.config.devices:
            device.permissions = "rw"
        for cdi_device in request.config.CDI_devices:
            cdi_device.name = "vendor.com/class=name"
    sandbox = SandboxSpec(name="p", uid="u", namespace="n", security=SecurityContext(privileged=privileged))
    try:
        spec = specs.container_spec(request.config, sandbox)
    except InvalidArgumentError as error:
        assert str(error).startswith("config")
    else:
        # An ImageSpec that names no image means nothing, and is not given back.
        for mount in request.config.mounts:
            mount.ClearField("image")
        status = statuses.container_status(container(spec))
        assert list(status.mounts) == list(request.config.mounts)
        assert status.resources.linux == request.config.linux.resources
        assert statuses.container_item(container(spec)).SerializeToString()


@SETTINGS
@given(requests(cri.LinuxContainerResources.DESCRIPTOR))
def test_any_resources(limits: cri.LinuxContainerResources) -> None:
    try:
        specs.resources(limits, "linux")
    except InvalidArgumentError as error:
        assert str(error).startswith("linux.")


@SETTINGS
@given(st.lists(messages(cri.Mount.DESCRIPTOR, 3), max_size=3))
def test_any_mounts(mounts: list[cri.Mount]) -> None:
    config = cri.ContainerConfig(metadata=cri.ContainerMetadata(name="n"), image=cri.ImageSpec(image="i"))
    for mount in mounts:
        mount.container_path = mount.container_path or "/data"
        mount.host_path = mount.host_path or "/srv"
    config.mounts.extend(mounts)
    try:
        spec = specs.container_spec(config, SandboxSpec(name="p", uid="u", namespace="n"))
    except InvalidArgumentError as error:
        assert str(error).startswith("config.mounts[")
    else:
        assert [mount.container_path for mount in spec.mounts] == [mount.container_path for mount in mounts]


def container(spec: ContainerSpec) -> ContainerRecord:
    return ContainerRecord("c", "s", spec, ContainerState.RUNNING, 1, "sha256:x", "sha256:x")
