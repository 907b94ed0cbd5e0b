"""oom_score_adj: which pod the host's OOM killer takes first.

kubelet gives it to each container by the pod's quality of service: -997 for a guaranteed pod's, 1000 for a best-effort
one's. In the guest it chooses among the pod's processes. To the host a pod is one QEMU with its helpers, and they get
the lowest of the living containers': who kills a VM takes its most protected container, too. A pod between two
containers keeps what it had.
"""

from __future__ import annotations

import logging

from vmrt.errors import VmGoneError, VmrtError
from vmrt.pods.records import SandboxState
from vmrt.pods.table import LiveSandbox, PodTable

log = logging.getLogger(__name__)


def wanted(table: PodTable, sandbox: LiveSandbox) -> int | None:
    """Return the value of a pod's VM; None while no container says one."""
    values = [live.record.spec.resources.oom_score_adj for live in table.containers_of(sandbox.id) if live.counts]
    return min(values, default=None)


async def settle(table: PodTable, sandbox: LiveSandbox) -> None:
    """Give a pod's VM what its containers want now. What the host refuses is logged: no container fails by it."""
    async with sandbox.confine_lock:
        value = wanted(table, sandbox)
        if value is None or value == sandbox.oom_score_adj or sandbox.record.state is not SandboxState.READY:
            return
        try:
            await table.hypervisor.weigh(sandbox.record.vm_id, value)
            sandbox.oom_score_adj = value
        except VmGoneError:
            pass
        except VmrtError as e:
            log.warning("sandbox %s: the OOM score of its VM stays what it was: %s", sandbox.id[:13], e)


def settle_later(table: PodTable, sandbox_id: str) -> None:
    """Settle in the background, after a container's end."""
    sandbox = table.sandboxes.get(sandbox_id)
    if sandbox is not None and wanted(table, sandbox) not in (None, sandbox.oom_score_adj):
        table.background(settle(table, sandbox), f"OOM score {sandbox_id[:13]}")
