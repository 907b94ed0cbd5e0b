"""What a pod and its containers may ask of their guest's kernel: devices, namespaces, profiles, limits.

Cases share pods where isolation is not what is tested: a VM costs more than all that is asked here.
"""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

from demo.daemon import Daemon
from tests.e2e.conftest import Pod, run_pod
from vmrt.proto.runtime.v1 import api_pb2 as cri


@pytest.fixture(scope="module")
def privileged(daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pod]:
    """A pod whose containers may be privileged."""
    linux = cri.LinuxPodSandboxConfig(security_context=cri.LinuxSandboxSecurityContext(privileged=True))
    pod = run_pod(daemon, tmp_path_factory.mktemp("logs"), "privileged", linux=linux)
    yield pod
    daemon.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod.id))
    daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod.id))


def container_linux(**fields: object) -> cri.LinuxContainerConfig:
    """Return a container's Linux part, with a PID namespace of its own unless `fields` say otherwise."""
    context = cri.LinuxContainerSecurityContext(namespace_options=cri.NamespaceOption(pid=cri.CONTAINER))
    context.MergeFrom(cri.LinuxContainerSecurityContext(**fields))  # type: ignore[arg-type]
    return cri.LinuxContainerConfig(security_context=context)


def refused(pod: Pod, **fields: object) -> str:
    """Return the message with which a container is refused."""
    with pytest.raises(grpc.RpcError) as caught:
        pod.create("true", **fields)  # type: ignore[arg-type]
    return str(caught.value.details())


def device(host: str, inside: str = "", permissions: str = "rwm") -> cri.Device:
    return cri.Device(host_path=host, container_path=inside or host, permissions=permissions)


def test_devices_of_the_guest(pod: Pod) -> None:
    """They are the guest's, under the name asked for, with the permissions asked for."""
    script = """
        stat -c '%n %F %t:%T' /dev/fuse /dev/tunnel
        : < /dev/tunnel && echo may be read
        (: <> /dev/tunnel) 2>&1 | grep -o 'Operation not permitted'
        [ -e /dev/net/tun ] || echo only under the name asked for
    """
    devices = [device("/dev/fuse"), device("/dev/net/tun", "/dev/tunnel", "r")]
    told = pod.output("sh", "-c", script, devices=devices)
    assert told.splitlines() == [
        "/dev/fuse character special file a:e5",
        "/dev/tunnel character special file a:c8",
        "may be read",
        "Operation not permitted",
        "only under the name asked for",
    ]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/dev/ptmx", "config.devices[0].host_path is '/dev/ptmx', a character device of the host's kernel"),
        ("/dev/vhost-vsock", "device /dev/vhost-vsock: the guest has no /dev/vhost-vsock"),
        ("/dev/nothing", "config.devices[0].host_path is '/dev/nothing': No such file or directory"),
    ],
)
def test_a_device_that_cannot_be(pod: Pod, path: str, message: str) -> None:
    assert message in refused(pod, devices=[device(path)])


def test_privileged_has_the_guests_devices(privileged: Pod) -> None:
    script = "test -b /dev/vda && test -c /dev/kmsg && head -c 1 /dev/vda | wc -c && ls /dev/vda /dev/rtc0 | wc -l"
    linux = container_linux(privileged=True)
    assert privileged.output("sh", "-c", script, linux=linux).split() == ["1", "2"]
    assert privileged.output("sh", "-c", "ls /dev/vda /dev/rtc0 2>/dev/null | wc -l").split() == ["0"]
