"""`vhost-device-vsock` (rust-vmm): the vsock device of one VM where the host kernel has no vhost_vsock.

It runs as QEMU's user in a session of its own and outlives the daemon. Its output goes nowhere: a guest could make it
write without end. The command is logged, to be tried by hand.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from vmrt import spawn
from vmrt.errors import ProcessError, VmError
from vmrt.hypervisor.record import VmPaths
from vmrt.hypervisor.vsock import HYBRID_GUEST_CID
from vmrt.spawn import ProcessId

_START_TIMEOUT_S = 5.0
# What a guest may have on its way to the host on one connection: twice what the agent sends in one turn. With the
# device's own 64 KiB a guest waits for room with every frame.
_TX_BYTES = 512 * 1024


def command(binary: Path, paths: VmPaths) -> tuple[str, ...]:
    """Return the command line."""
    return (
        str(binary),
        f"--guest-cid={HYBRID_GUEST_CID}",
        f"--socket={paths.vhost_vsock}",
        f"--uds-path={paths.vsock}",
        f"--tx-buffer-size={_TX_BYTES}",
    )


def start(binary: Path, paths: VmPaths, owner: tuple[int, int]) -> ProcessId:
    """Start it; `wait_listening` comes next."""
    try:
        return spawn.detached(command(binary, paths), owner=owner)
    except ProcessError as e:
        raise VmError(
            e.message,
            phase="boot",
            resource=str(binary),
            hint="needed where /dev/vhost-vsock is absent: `make setup` builds it; see hypervisor.vhost_device_vsock",
        ) from e


async def wait_listening(process: ProcessId, binary: Path, paths: VmPaths) -> None:
    """Return when both of its sockets exist; QEMU connects to the one at its start."""
    try:
        async with asyncio.timeout(_START_TIMEOUT_S):
            while not (paths.vhost_vsock.is_socket() and paths.vsock.is_socket()):
                if not spawn.alive(process):
                    raise VmError(
                        "vhost-device-vsock ended at once",
                        phase="boot",
                        hint=f"try it by hand: {spawn.pasteable(command(binary, paths))}",
                    )
                await asyncio.sleep(0.005)
    except TimeoutError as e:
        raise VmError(f"vhost-device-vsock made no socket within {_START_TIMEOUT_S:g} s", phase="boot") from e
