"""How large a pod's VM is: a pure function of what CRI says about the pod.

kubelet sends the sum of the containers' limits (`linux.resources`) and the RuntimeClass's overhead; memory is 0 there
when any container is unlimited, and then the configured default applies. What the guest's kernel and agent need comes
on top, so that a container can use what it was promised.
"""

from __future__ import annotations

import os

from vmrt.config import HandlerConfig, HypervisorConfig
from vmrt.model import SandboxSpec

_ALIGN = 2 * 1024**2


def unasked(config: HypervisorConfig, handler: HandlerConfig) -> tuple[int, int]:
    """Return the size of a VM whose pod asks for nothing: what the warm pool boots."""
    return size(SandboxSpec(name="", uid="", namespace=""), config, handler)


def size(spec: SandboxSpec, config: HypervisorConfig, handler: HandlerConfig) -> tuple[int, int]:
    """Return (vcpus, memory in octets, a multiple of 2 MiB); at most the host's CPUs."""
    vcpus = handler.vcpus or config.default_vcpus
    memory = handler.memory_bytes or config.default_memory_bytes
    limits = spec.resources
    if limits is not None:
        if limits.cpu_quota_us > 0 and limits.cpu_period_us > 0:
            vcpus = max(vcpus, -(-limits.cpu_quota_us // limits.cpu_period_us))
        if limits.memory_limit_bytes > 0:
            memory = limits.memory_limit_bytes + config.overhead_memory_bytes
    memory = max(memory, config.overhead_memory_bytes + 32 * 1024**2)
    return min(vcpus, os.cpu_count() or 1), -(-memory // _ALIGN) * _ALIGN
