"""What the pods room needs of a hypervisor, a network and an image store, as Protocols.

The concrete drivers are named in `vmrt.__main__` only. The contract suite (`tests/contract`) holds every driver and its
one fake to what these docstrings say.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Protocol

from vmrt.model import Confinement, Disk, Image, PodNetwork, RegistryAuth, SandboxSpec, VmEvent, VmSize, VmSpec
from vmrt.spawn import ProcessId

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Hypervisor(Protocol):
    """Runs VMs. Every method may raise `VmError`; `VmGoneError` when the VM named does not (or no longer) exist.

    Cancelling any method leaves nothing half-made: what it created is undone before the cancellation goes on.
    """

    async def open(self) -> None:
        """Connect, learn the accelerator and vsock transport, adopt the VMs that run under our root."""
        ...

    async def close(self) -> None:
        """Disconnect. Running VMs go on."""
        ...

    @property
    def accelerator(self) -> str:
        """Return "kvm" or "tcg"."""
        ...

    async def boot(self, spec: VmSpec) -> None:
        """Start a VM and return when its agent has sent the ready notice.

        On failure, time-out or cancellation everything is undone; the error names the phase and carries the console.
        """
        ...

    async def destroy(self, vm_id: str) -> None:
        """Kill a VM and remove all that belongs to it on the host; a VM that does not exist is no error."""
        ...

    def list(self) -> Sequence[str]:
        """Return the ids of the VMs that run under our root, adopted ones included. From memory."""
        ...

    async def dial(self, vm_id: str, port: int, *, timeout_s: float = 5.0) -> Connection:
        """Open a vsock connection to a port in the guest."""
        ...

    async def attach_disk(self, vm_id: str, disk: Disk) -> None:
        """Hot-plug a disk; one that is attached already (same serial) is no error.

        `disk.path` may be a block device of the host: the guest then sees that device itself, read-only at the host's
        end when `disk.readonly`. Who owns the host's node does not matter, and it is left alone.
        """
        ...

    async def detach_disk(self, vm_id: str, serial: str) -> None:
        """Hot-unplug a disk; one that is not attached is no error."""
        ...

    async def resize_disk(self, vm_id: str, serial: str) -> int:
        """Tell the guest the size that an attached host block device has now; return it in octets."""
        ...

    async def attach_nic(self, vm_id: str, tap: str, mac: str) -> None:
        """Hot-plug a NIC on an existing tap; one on a tap of that name is no error. `ExhaustedError` without a port."""
        ...

    async def place(self, vm_id: str, cgroup_parent: str) -> None:
        """Put a VM's processes below a host cgroup (CRI cgroup_parent), which is made where it is missing.

        `InvalidArgumentError` for one that is no name of a cgroup. What the host has no controller for is told once, as
        a warning. `destroy` removes what this made.
        """
        ...

    async def confine(self, vm_id: str, wanted: Confinement) -> None:
        """Keep a VM, with helpers and threads made later, to CPUs and memory nodes of the host; the last call counts.

        `UnsupportedError` for memory nodes that cannot be kept to, `VmError` for what the host refuses. It is forgotten
        when the driver closes, though not undone: after `open` it has to be asked for again to hold for later threads.
        """
        ...

    async def weigh(self, vm_id: str, oom_score_adj: int) -> None:
        """Say how readily the host's OOM killer takes a VM with its helpers: -1000 (never) to 1000 (first), 0 at first.

        A value that the host does not allow becomes the nearest that it does. It outlives the driver.
        """
        ...

    async def resize(self, vm_id: str, vcpus: int, memory_bytes: int) -> VmSize:
        """Give a VM this size while it runs; return what it has then.

        Growing: all of it, or an error and what the VM had. `ExhaustedError`, before anything has changed, for more
        than its spec's maximum. The guest has the memory when this returns; new CPUs it has yet to bring online.
        Shrinking: memory as far as the guest lets go of it, which may go on afterwards; CPUs are never taken away.
        """
        ...

    async def size(self, vm_id: str) -> VmSize:
        """Return what a VM has, and what it can be enlarged to."""
        ...

    def events(self) -> AsyncIterator[VmEvent]:
        """Yield the ends of VMs, each once, also of those that ended while nobody listened since `open`."""
        ...

    def console_tail(self, vm_id: str, limit_bytes: int = 8192) -> str:
        """Return the end of what the guest wrote to its console, undecodable octets and control codes replaced."""
        ...

    def share_process(self, vm_id: str) -> ProcessId | None:
        """Return virtiofsd, in whose mount namespace the VM's volumes are; None for a VM without a share."""
        ...

    def processes(self, vm_id: str) -> Sequence[ProcessId]:
        """Return QEMU and its helpers (for memory figures and cgroups)."""
        ...


class Network(Protocol):
    """Gives pods their network. Methods raise `NetworkError`."""

    async def open(self) -> None:
        """Check the plugins and load the configuration."""
        ...

    async def close(self) -> None:
        """Release what `open` took; pods keep their network."""
        ...

    async def create_tap(self, name: str) -> None:
        """Create a persistent tap that QEMU's user may open; an existing one is no error."""
        ...

    async def delete_taps(self, names: Sequence[str]) -> None:
        """Delete taps in the host's netns; absent ones are no error."""
        ...

    async def setup(self, sandbox_id: str, spec: SandboxSpec, *, device_mac: str) -> PodNetwork:
        """Make the pod's netns, run CNI ADD, return addresses and the guest's configuration of them.

        The CNI result is on disk before this returns, and a failure half-way is undone by DEL before it raises.
        """
        ...

    async def join(self, sandbox_id: str, tap: str, interface: str = "") -> None:
        """Move the tap into the pod's netns and join it to one of its interfaces; "" is the pod's own."""
        ...

    async def teardown(self, sandbox_id: str) -> None:
        """Run CNI DEL with what ADD returned and remove the netns. Idempotent; works with nothing but the id."""
        ...

    def list(self) -> Sequence[str]:
        """Return the sandbox ids for which a netns or a cached CNI result exists under our root."""
        ...

    async def status(self) -> tuple[bool, str, str]:
        """Return (ready, reason, message) for CRI's NetworkReady condition."""
        ...

    async def set_pod_ranges(self, cidrs: Sequence[str]) -> None:
        """Remember the node's pod CIDRs, for networks whose addresses are given by the runtime's word."""
        ...


Progress = Callable[[str, int, int], None]
"""Called with (what, done, total) as work goes on; total 0 when unknown."""


class ImageStore(Protocol):
    """Fetches and keeps images. Methods raise `ImageError`; `InvalidArgumentError` for a reference that is none."""

    async def open(self) -> None:
        """Read the records and remove what interrupted work left."""
        ...

    async def close(self) -> None:
        """Finish or cancel running work."""
        ...

    async def pull(
        self, reference: str, auth: RegistryAuth | None = None, *, progress: Progress | None = None
    ) -> Image:
        """Fetch and convert; concurrent pulls of one reference are done once; cancellation leaves nothing."""
        ...

    async def load(self, path: Path, *, tag: str = "", progress: Progress | None = None) -> Sequence[Image]:
        """Import an OCI layout (directory or tar) or docker archive from a host path."""
        ...

    def get(self, reference: str) -> Image | None:
        """Find by id, unique id prefix, tag, digest or short name; None when absent. From memory."""
        ...

    def list(self, reference: str = "") -> Sequence[Image]:
        """Return all images (or those `reference` names), in a stable order. From memory."""
        ...

    async def remove(self, reference: str) -> None:
        """Remove the image with all its tags; absent is no error. Layers held by `retain` stay until released."""
        ...

    def retain(self, image_id: str, user: str) -> None:
        """Keep the image's layers on disk while `user` (a container id) exists. Also legal for a removed image."""
        ...

    def release(self, user: str) -> None:
        """Undo `retain`; layers that nobody holds and no image names are deleted."""
        ...

    async def usage(self) -> tuple[Path, int, int]:
        """Return (mount point directory, used bytes, inodes used) of the store."""
        ...
