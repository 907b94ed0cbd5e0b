"""The composition root: the only place that names concrete drivers."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path

from vmrt import __version__
from vmrt.config import Config

log = logging.getLogger("vmrt")

# Calls may take 30 s to undo what they have begun; systemd kills after 90.
_STOP_LIMIT_S = 50.0


def main() -> None:
    """Run the `vmrt` command line."""
    import vmrt.cli
    from vmrt.cli.app import cli

    vmrt.cli.daemon = serve_and_exit
    vmrt.cli.kvm_failure = kvm_failure
    cli(prog_name="vmrt")


async def kvm_failure(config: Config) -> str:
    """Boot a tiny guest under KVM; return why it does not work, "" when it does."""
    from vmrt.hypervisor.accel import KvmProbe

    h = config.hypervisor
    with tempfile.TemporaryDirectory(prefix="vmrt-doctor-") as cache:
        probe = KvmProbe(h.qemu_binary, h.qemu_user, h.qemu_group, Path(cache) / "kvm.json")
        verdict = await probe.firmware()
    return "" if verdict.usable else verdict.reason or "QEMU did not say why"


async def serve(config: Config) -> None:
    """Run the daemon until SIGTERM or SIGINT; pods outlive it.

    Raises `VmrtError` when it cannot start (root in use, no guest image, socket taken, libvirt or CNI broken).
    """
    # libvirt's embedded driver forks in this process to start QEMU; grpc's fork handlers abort that child.
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
    # Imported here so that the command line's other commands start without libvirt, pyroute2 and grpc.
    from vmrt import guest_image, realtime
    from vmrt.cri.server import CriServer
    from vmrt.errors import VmrtError
    from vmrt.hypervisor.libvirt_driver import LibvirtHypervisor
    from vmrt.images.store import ImageStore
    from vmrt.loop_monitor import LoopMonitor
    from vmrt.model import GuestImage
    from vmrt.netbridge import NetBridge
    from vmrt.pods.service import PodService
    from vmrt.pods.streams import PodStreams
    from vmrt.pods.table import PodTable, instance_tag
    from vmrt.store import RootLock, Store
    from vmrt.streaming.server import StreamServer

    async with contextlib.AsyncExitStack() as stack:
        config.root.mkdir(mode=0o711, parents=True, exist_ok=True)
        lock = RootLock(config.root)
        stack.callback(lock.release)
        store = Store(config.root / "state.db")
        stack.callback(store.close)
        instance = instance_tag(config.root)

        verified: set[str] = set()

        def guest(handler: str) -> GuestImage:
            # Read for every boot, so that a new image needs no restart; hashed (0.1 s) once per version.
            directory = config.handler_guest_dir(handler)
            image = guest_image.load(directory, verify=False)
            if image.version not in verified:
                guest_image.load(directory)
                stack.enter_context(guest_image.hold(image))
                verified.add(image.version)
            return image

        # The rooms of VMs know nothing of delegates: those are the CRI edge's alone.
        vms = config.of_vms()
        for name in vms.handlers:
            # Hashed now, while nobody waits. An image that is missing is told by Status and by every start.
            with contextlib.suppress(VmrtError):
                guest(name)

        asyncio.get_running_loop().set_default_executor(realtime.executor("any"))
        if config.log.level == "debug":
            monitor = LoopMonitor()
            monitor.start()
            stack.callback(monitor.stop)
        hypervisor = LibvirtHypervisor(config.hypervisor, config.root, instance)
        network = NetBridge(config.network, config.root, instance, tap_queues=config.hypervisor.nic_queues)
        images = ImageStore(config.root / "images", config.images)
        for driver in (hypervisor, network, images):
            stack.push_async_callback(driver.close)
            await driver.open()
        table = PodTable(vms, store, hypervisor, network, images, guest)
        pods = PodService(table)
        stack.push_async_callback(pods.close)
        await pods.open()
        images.collect()
        streams = StreamServer(config.streaming, PodStreams(table))
        stack.push_async_callback(streams.close)
        await streams.open()
        server = CriServer(config, pods, images, streams)
        stack.push_async_callback(server.close)
        await server.open()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        # What was made until here stays: the collector need not go through it again and again, tens of milliseconds.
        gc.collect()
        gc.freeze()
        if config.realtime and (why := realtime.enter()):
            log.info("the event loop has no real-time priority: %s", why)
        log.info("vmrt %s serves CRI on %s (%s)", __version__, config.listen, hypervisor.accelerator)
        await stop.wait()
        log.info("stopping; running pods go on")
        realtime.leave()
        # A thread that libvirt does not let go must not keep us: the next daemon settles what is left.
        faulthandler.dump_traceback_later(_STOP_LIMIT_S, exit=True)


async def serve_and_exit(config: Config) -> None:
    """Run the daemon and end the process. Everything is closed by then; threads that libvirt holds are not waited for.

    The interpreter would join them, in the loop's executor and again at its own exit.
    """
    await serve(config)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
    sys.exit(0)
