"""What CNI plugins are told of a pod."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmrt import cni_args as cni
from vmrt.errors import NetworkError
from vmrt.model import DnsConfig, PortMapping, Protocol, SandboxSpec

SPEC = SandboxSpec("web-0", "uid-1", "default")


def test_arguments_name_the_pod() -> None:
    assert cni.cni_args("id1", SPEC) == (
        "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=id1;K8S_POD_UID=uid-1"
    )
    for bad in ("a;b", "a=b", "a\nb"):
        with pytest.raises(NetworkError, match="K8S_POD_NAMESPACE"):
            cni.cni_args("id1", replace(SPEC, namespace=bad))


def test_capabilities_given() -> None:
    assert cni.capability_args(SPEC) == {}
    ports = (PortMapping(Protocol.UDP, 53, 5353, "127.0.0.1"), PortMapping(Protocol.TCP, 80))
    args = cni.capability_args(replace(SPEC, port_mappings=ports, dns=DnsConfig(("192.0.2.1",))))
    assert args["portMappings"] == [{"hostPort": 5353, "containerPort": 53, "protocol": "udp", "hostIP": "127.0.0.1"}]
    assert args["dns"] == {"servers": ["192.0.2.1"], "searches": [], "options": []}
    assert cni.capability_args(replace(SPEC, cgroup_parent="/kubepods/pod1")) == {"cgroupPath": "/kubepods/pod1"}


def test_bandwidth_is_taken_from_the_annotations() -> None:
    limited = replace(SPEC, annotations={cni.INGRESS: "10M", cni.EGRESS: "8Gi"})
    args = cni.capability_args(limited)
    assert args["bandwidth"] == {
        "ingressRate": 10_000_000,
        "ingressBurst": 10_000_000,
        "egressRate": 8 * 1024**3,
        "egressBurst": 2**31 - 1,
    }
    assert args["io.kubernetes.cri.pod-annotations"] == limited.annotations
    assert cni.capability_args(replace(SPEC, annotations={cni.EGRESS: "1e6"}))["bandwidth"]["egressRate"] == 10**6


@pytest.mark.parametrize("text", ["fast", "-1", "999", "2P", "1 M", "1MB", ".5M", "1e99"])
def test_a_bandwidth_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(NetworkError, match="ingress-bandwidth"):
        cni.capability_args(replace(SPEC, annotations={cni.INGRESS: text}))


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1), ("1.5k", 1500), ("1Ki", 1024), ("0.5Mi", 524288), ("100m", 1), ("1E", 10**18), ("2e3", 2000), ("5n", 1)],
)
def test_quantities(text: str, value: int) -> None:
    assert cni.quantity(text) == value


@given(st.text(max_size=12))
def test_any_text_is_a_quantity_or_none(text: str) -> None:
    value = cni.quantity(text)
    assert value is None or value >= 0


def test_pod_ranges_are_a_set_of_each() -> None:
    args = cni.capability_args(SPEC, ("10.0.3.0/24", "fd00:3::/64"))
    assert args["ipRanges"] == [[{"subnet": "10.0.3.0/24"}], [{"subnet": "fd00:3::/64"}]]
