"""Stage "boot": what each part of a boot costs, and what the tuned kernel and qboot save; bare VMs, in turn."""

from __future__ import annotations

import asyncio
from pathlib import Path

from bench import floor
from bench.stand import Bench, Stage
from vmrt import config, guest_image
from vmrt.hypervisor.domain import QBOOT
from vmrt.model import GuestImage

_KERNEL, _READY = "QEMU, firmware and kernel", "boot to ready"


def variants(bench: Bench) -> list[tuple[str, GuestImage, Path | None]]:
    """Return (name, guest image, firmware), the slowest first; without the tuned kernel where it was not compiled."""
    output = bench.scratch / "guest-distribution"
    distribution = asyncio.run(guest_image.build(output, kernel_choice="distribution"))
    found: list[tuple[str, GuestImage, Path | None]] = [
        ("distribution, SeaBIOS", distribution, None),
        ("distribution, qboot", distribution, QBOOT),
    ]
    if bench.guest.initramfs is None:  # docs/guest-image.md: the tuned kernel needs none
        found.append(("tuned, qboot", bench.guest, QBOOT))
    else:
        print("the tuned kernel was not compiled (make guest-tuned): left out")
    return found


def measure(bench: Bench) -> None:
    """Boot each variant once a round, whole and up to where its kernel would start the first program."""
    kvm = bench.accelerator == "kvm"
    helper = config.HypervisorConfig().vhost_device_vsock
    chosen = variants(bench)
    number = 0
    for _ in range(bench.rounds):
        for name, guest, firmware in chosen:
            number += 1
            directory = bench.scratch / f"boot{number}"
            alone_s = floor.kernel_alone_s(guest, directory / "k", number=number, kvm=kvm, firmware=firmware)
            bench.samples.add(name, _KERNEL, alone_s * 1000)
            with floor.bare_vm(guest, directory / "r", helper, number=number, kvm=kvm, firmware=firmware) as vm:
                bench.samples.add(name, _READY, vm.boot_s * 1000)
        print(".", end="", flush=True)
    names = [name for name, _, _ in chosen]
    for better, worse in zip(names[1:], names, strict=False):
        bench.samples.compare(f"boot to ready, {better} / {worse}", (better, _READY), (worse, _READY))


STAGE = Stage("boot", "a bare boot's parts, by kernel and firmware", measure)
