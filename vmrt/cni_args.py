"""What CNI plugins are told of a pod: CNI_ARGS, and the arguments of the capabilities that they declare.

Sources: CNI's CONVENTIONS.md; for the bandwidth annotations and their limits Kubernetes' documentation of network
plugins ("Support traffic shaping"), for quantities its resource.Quantity.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from vmrt.errors import NetworkError
from vmrt.model import SandboxSpec

Json = dict[str, Any]

INGRESS, EGRESS = "kubernetes.io/ingress-bandwidth", "kubernetes.io/egress-bandwidth"
# Bits per second: Kubernetes' own limits, 1k and 1P.
_RATES = (1000, 10**15)
# The plugin keeps a burst, in octets, in 32 bits; a second's worth lets short answers through at full speed.
_BURST_BITS = 2**31 - 1
_QUANTITY = re.compile(r"([0-9]{1,19}(?:\.[0-9]{1,9})?)(?:([numkMGTPE]|[KMGTPE]i)|[eE]([+-]?[0-9]{1,2}))?")


def cni_args(sandbox_id: str, spec: SandboxSpec) -> str:
    """Return CNI_ARGS with the keys that Kubernetes' runtimes have always given."""
    pairs = {
        "IgnoreUnknown": "1",
        "K8S_POD_NAMESPACE": spec.namespace,
        "K8S_POD_NAME": spec.name,
        "K8S_POD_INFRA_CONTAINER_ID": sandbox_id,
        "K8S_POD_UID": spec.uid,
    }
    for key, value in pairs.items():
        if any(c in ";=" or not c.isprintable() for c in value):
            raise NetworkError(
                f"{key} {value!r} cannot be given to a plugin: ';', '=' and control codes separate arguments",
                phase="cni add",
                resource=f"sandbox {sandbox_id}",
            )
    return ";".join(f"{key}={value}" for key, value in pairs.items())


def capability_args(spec: SandboxSpec, pod_ranges: Sequence[str] = ()) -> Json:
    """Return what a plugin gets that declares the capability (CONVENTIONS.md, and containerd's for annotations).

    `pod_ranges` are the node's pod CIDRs as kubelet has told them. Raises `NetworkError` for a malformed bandwidth.
    """
    args: Json = {}
    mappings = [
        {
            "hostPort": mapping.host_port,
            "containerPort": mapping.container_port,
            "protocol": mapping.protocol.value,
            "hostIP": mapping.host_ip,
        }
        for mapping in spec.port_mappings
        if mapping.host_port
    ]
    if mappings:
        args["portMappings"] = mappings
    if bandwidth := _bandwidth(spec):
        args["bandwidth"] = bandwidth
    if pod_ranges:
        args["ipRanges"] = [[{"subnet": cidr}] for cidr in pod_ranges]
    if spec.cgroup_parent:
        args["cgroupPath"] = spec.cgroup_parent
    if spec.annotations:
        args["io.kubernetes.cri.pod-annotations"] = dict(spec.annotations)
    if spec.dns is not None:
        args["dns"] = {
            "servers": list(spec.dns.servers),
            "searches": list(spec.dns.searches),
            "options": list(spec.dns.options),
        }
    return args


def _bandwidth(spec: SandboxSpec) -> Json:
    limits: Json = {}
    for annotation, name in ((INGRESS, "ingress"), (EGRESS, "egress")):
        if text := spec.annotations.get(annotation):
            rate = quantity(text)
            if rate is None or not _RATES[0] <= rate <= _RATES[1]:
                raise NetworkError(
                    f"the annotation {annotation} is {text!r}: a number of bits per second from 1k to 1P is needed",
                    phase="cni add",
                    resource=f"pod {spec.namespace}/{spec.name}",
                )
            limits |= {f"{name}Rate": rate, f"{name}Burst": min(rate, _BURST_BITS)}
    return limits


def quantity(text: str) -> int | None:
    """Return a Kubernetes quantity ("10M", "1.5Gi", "1e6") as a whole number, rounded up; None for anything else."""
    match = _QUANTITY.fullmatch(text)
    if match is None:
        return None
    number, suffix, exponent = match.groups()
    value = Decimal(number)
    if exponent is not None:
        value = value.scaleb(int(exponent))
    elif suffix and suffix.endswith("i"):
        value *= 1024 ** ("KMGTPE".index(suffix[0]) + 1)
    elif suffix:
        value = value.scaleb({"n": -9, "u": -6, "m": -3}.get(suffix) or 3 * ("kMGTPE".index(suffix) + 1))
    return int(value.to_integral_value(rounding="ROUND_CEILING"))
