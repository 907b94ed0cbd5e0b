"""How large a pod's VM is: a pure function of what CRI says about the pod.

kubelet sends the sum of the containers' limits (`linux.resources`) and the RuntimeClass's overhead; memory is 0 there
when any container is unlimited, and then the configured default applies. What the guest's kernel and agent need comes
on top, so that a container can use what it was promised: a fixed part, and the kernel's note of every page. Of the
RuntimeClass's overhead the guest gets what QEMU does not use itself: both together have to stay below the limit that
kubelet makes of the two sums.

Huge pages are no part of a memory limit (the kernel accounts them apart), nor of the sums: they come on top while a
container that may have them exists. Where a pod told no sums, what its living containers are limited to stands in.

A limit is no request: a VM is never larger than the host, or than the operator allows.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from vmrt.config import HandlerConfig, HypervisorConfig
from vmrt.model import LinuxResources, SandboxSpec

_MIB = 1024**2
_ALIGN = 2 * _MIB
# Linux adds memory by such blocks (x86-64, Documentation/admin-guide/mm/memory-hotplug.rst): of one that does not fit
# whole into what can be plugged, nothing can.
_BLOCK = 128 * 1024**2
_PERIOD_US = 100_000  # what the kernel takes when none is named
# What QEMU and a VM's helpers take beside the guest's memory.
_VMM_BYTES = 64 * _MIB
# What the guest's kernel keeps of its memory: 64 octets a page of 4 KiB (struct page), with rounding.
_NOTES_SHARE = 48
_UNITS = {"K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}  # of cgroups' names of page sizes: "2MB"
# What a VM can be enlarged to costs a little even when it is not: for each CPU in the guest, for each page in QEMU.
_LIKELY_VCPUS = 32
_LIKELY_MEMORY_BYTES = 32 * 1024**3


def unasked(config: HypervisorConfig, handler: HandlerConfig) -> tuple[int, int]:
    """Return the size of a VM whose pod asks for nothing: what the warm pool boots."""
    return size(SandboxSpec(name="", uid="", namespace=""), config, handler)


def size(spec: SandboxSpec, config: HypervisorConfig, handler: HandlerConfig) -> tuple[int, int]:
    """Return (vcpus, memory in octets, a multiple of 2 MiB) of a pod's VM; at most what `most` says."""
    wanted_vcpus, wanted_bytes = asked(spec, config, handler)
    most_vcpus, most_bytes = most(config)
    return min(wanted_vcpus, most_vcpus), min(wanted_bytes, max(most_bytes, _least(config)))


def asked(spec: SandboxSpec, config: HypervisorConfig, handler: HandlerConfig) -> tuple[int, int]:
    """Return (vcpus, octets) that the pod's limits come to, whatever the host has."""
    vcpus = handler.vcpus or config.default_vcpus
    memory = handler.memory_bytes or config.default_memory_bytes
    limits, overhead = spec.resources, spec.overhead or LinuxResources()
    if limits is not None:
        if limits.cpu_quota_us > 0:
            millis = _millicpus(limits) + _millicpus(overhead)
            vcpus = max(vcpus, -(-millis // 1000))
        if limits.memory_limit_bytes > 0:
            memory = limits.memory_limit_bytes + _guests_own(config, overhead, limits.memory_limit_bytes)
    memory = max(memory, _least(config))
    return vcpus, -(-memory // _ALIGN) * _ALIGN


def needed(
    spec: SandboxSpec,
    config: HypervisorConfig,
    handler: HandlerConfig,
    containers: Sequence[LinuxResources],
    reserved: Iterable[LinuxResources],
) -> tuple[int, int]:
    """Return (vcpus, octets) that a pod comes to with these living containers.

    `reserved` are the limits of all containers whose huge pages are set apart: until they are removed.
    """
    vcpus, memory = asked(spec, config, handler)
    sums, overhead = spec.resources or LinuxResources(), spec.overhead or LinuxResources()
    if sums.cpu_quota_us <= 0 and (millis := sum(_millicpus(limits) for limits in containers)):
        vcpus = max(vcpus, -(-(millis + _millicpus(overhead)) // 1000))
    if sums.memory_limit_bytes <= 0 and (limit := sum(limits.memory_limit_bytes for limits in containers)):
        memory = max(memory, limit + _guests_own(config, overhead, limit))
    huge = sum(hugepage_bytes(limits) for limits in reserved)
    memory += huge + huge // _NOTES_SHARE
    return vcpus, -(-memory // _ALIGN) * _ALIGN


def hugepage_bytes(limits: LinuxResources) -> int:
    """Return the memory that is set apart for a container's huge pages: whole pages of each size."""
    total = 0
    for limit in limits.hugepage_limits:
        page = int(limit.page_size[:-2]) * _UNITS[limit.page_size[-2]]
        total += -(-limit.limit_bytes // page) * page if page else 0
    return total


def most(config: HypervisorConfig) -> tuple[int, int]:
    """Return (vcpus, octets) that a VM may have: what is configured, else what the host has."""
    vcpus = config.max_vcpus or os.cpu_count() or 1
    memory = config.max_memory_bytes or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return vcpus, memory // _ALIGN * _ALIGN


def reach(vcpus: int, memory_bytes: int, config: HypervisorConfig) -> tuple[int, int]:
    """Return (vcpus, octets) that a VM which boots with this size can be enlarged to, by whole memory blocks."""
    most_vcpus, most_bytes = most(config)
    likely_vcpus = config.max_vcpus or min(most_vcpus, _LIKELY_VCPUS)
    likely_bytes = config.max_memory_bytes or min(most_bytes, _LIKELY_MEMORY_BYTES)
    return max(vcpus, likely_vcpus), memory_bytes + max(0, likely_bytes - memory_bytes) // _BLOCK * _BLOCK


def _guests_own(config: HypervisorConfig, overhead: LinuxResources, promised_bytes: int) -> int:
    own = config.overhead_memory_bytes + promised_bytes // _NOTES_SHARE
    return max(own, overhead.memory_limit_bytes - _VMM_BYTES)


def _least(config: HypervisorConfig) -> int:
    return -(-(config.overhead_memory_bytes + 32 * _MIB) // _ALIGN) * _ALIGN


def _millicpus(limits: LinuxResources) -> int:
    return max(0, limits.cpu_quota_us) * 1000 // (limits.cpu_period_us or _PERIOD_US)
