"""Hot-plug of a running VM's network cards beyond its first: a pod has them when its plugins make several interfaces.

They stay for the VM's life, as a pod's interfaces do.
"""

from __future__ import annotations

from vmrt.errors import ExhaustedError
from vmrt.hypervisor import domain
from vmrt.hypervisor.libvirt_host import LibvirtHost
from vmrt.hypervisor.vm import Vm


async def attach(host: LibvirtHost, vm: Vm, tap: str, mac: str, queues: int) -> None:
    """Plug a NIC with this address on a tap that is in the host's namespace; one on that tap already stays."""
    async with vm.nics_lock:
        nics, free = domain.nics_in(await host.live_xml(vm.domain))
        if tap in nics:
            return
        if not free:
            raise ExhaustedError(
                f"the VM has {len(nics)} network cards and no place for another",
                phase="attach NIC",
                resource=f"vm {vm.vm_id}",
                hint="hypervisor.extra_nics is how many a VM can be given beside its first",
            )
        await host.attach(vm.domain, domain.nic_xml(tap, mac, queues, free[0]), "attach NIC")
