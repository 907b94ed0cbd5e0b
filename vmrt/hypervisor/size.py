"""The size of a running VM: CPUs by ACPI hot-plug, memory by the virtio-mem device that it was booted with.

CPUs are only ever added: QEMU 7.2 under emulation never hears that a guest has let go of one, and a CPU that the guest
has put offline costs an idle thread. What a VM has too many the agent keeps offline.

Memory is a request: the guest plugs and gives back in its own time, in pieces. Growing waits for it, and takes the
request back when it does not come; shrinking asks, waits a little, and says what is left.
"""

from __future__ import annotations

import asyncio
import contextlib

from vmrt.errors import ExhaustedError, VmError, VmrtError
from vmrt.hypervisor import domain
from vmrt.hypervisor.libvirt_host import LibvirtHost
from vmrt.hypervisor.vm import Vm
from vmrt.model import VmSize

_PLUG_TIMEOUT_S = 20.0
_UNPLUG_PATIENCE_S = 2.0
_LOOK_AGAIN_S = 0.02
_MIB = 1024**2


async def resize(host: LibvirtHost, vm: Vm, vcpus: int, memory_bytes: int) -> VmSize:
    """Enlarge a VM to at least this size, or ask it to give memory back; return what it has then.

    Raises `ExhaustedError`, and changes nothing, beyond what the VM was booted to be enlarged to; `VmError` when the
    guest does not take the memory, and then it has been asked to be as before.
    """
    async with vm.size_lock:
        xml = await host.live_xml(vm.domain)
        before = domain.size_in(xml)
        require_possible(before, vcpus, memory_bytes)
        memory_bytes = _rounded(before, memory_bytes)
        if memory_bytes != before.memory_bytes:
            await _set_memory(host, vm, xml, before, memory_bytes)
        if vcpus > before.vcpus:
            try:
                await host.set_vcpus(vm.domain, vcpus)
            except VmrtError:
                if memory_bytes > before.memory_bytes:
                    await _ask(host, vm, xml, before.memory_bytes)
                raise
        return domain.size_in(await host.live_xml(vm.domain))


def require_possible(size: VmSize, vcpus: int, memory_bytes: int) -> None:
    """Raise `ExhaustedError` for more than a VM can have."""
    if vcpus > size.max_vcpus:
        raise ExhaustedError(f"the VM can have at most {size.max_vcpus} CPUs, not {vcpus}")
    if memory_bytes > size.max_memory_bytes:
        most, wanted = size.max_memory_bytes // _MIB, -(-memory_bytes // _MIB)
        raise ExhaustedError(f"the VM can have at most {most} MiB of memory, not {wanted}")


async def _set_memory(host: LibvirtHost, vm: Vm, xml: str, before: VmSize, memory_bytes: int) -> None:
    grows = memory_bytes > before.memory_bytes
    try:
        await _ask(host, vm, xml, memory_bytes)
        async with asyncio.timeout(_PLUG_TIMEOUT_S if grows else _UNPLUG_PATIENCE_S):
            while True:
                has = domain.size_in(await host.live_xml(vm.domain)).memory_bytes
                if has >= memory_bytes if grows else has <= memory_bytes:
                    return
                await asyncio.sleep(_LOOK_AGAIN_S)
    except TimeoutError as e:
        if grows:
            await _ask(host, vm, xml, before.memory_bytes)
            raise VmError(
                f"the guest did not plug memory up to {memory_bytes // _MIB} MiB within {_PLUG_TIMEOUT_S:g} s,"
                f" it came to {has // _MIB} MiB",
                hint="the guest's kernel needs free memory of its own to manage more",
            ) from e
    except (VmrtError, asyncio.CancelledError):
        if grows:
            with contextlib.suppress(VmrtError):
                await _ask(host, vm, xml, before.memory_bytes)
        raise


def _rounded(size: VmSize, memory_bytes: int) -> int:
    """Return what the VM comes to: memory is plugged in whole units, above what it was booted with."""
    unit = domain.PLUG_UNIT_BYTES
    return size.min_memory_bytes + -(-max(0, memory_bytes - size.min_memory_bytes) // unit) * unit


async def _ask(host: LibvirtHost, vm: Vm, xml: str, memory_bytes: int) -> None:
    request = domain.memory_request_xml(xml, memory_bytes)
    if request is not None:
        await host.update(vm.domain, request)
