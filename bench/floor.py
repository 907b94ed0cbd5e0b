"""The floor: the same kernel, root image and agent started by bare QEMU, without libvirt, CNI or CRI.

The machine has the devices that a pod's has and no others; the clock runs from the start of the processes to the
agent's ready notice. What vmrt adds to this is vmrt's own cost.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vmrt.agent.layout import READY_PORT
from vmrt.hypervisor import virtiofsd
from vmrt.hypervisor.domain import EMULATED_CMDLINE, EMULATED_CPU_WITHOUT, QBOOT
from vmrt.model import GuestImage

_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Bare:
    """A started bare VM."""

    boot_s: float
    qemu_pid: int
    helper_pid: int
    vsock: Path
    pids: tuple[int, ...]  # QEMU and its helpers


@dataclass(frozen=True, slots=True)
class Extra:
    """Devices that not every bare VM needs: a share with its virtiofsd, a scratch disk, image layers."""

    virtiofsd: Path
    share: Path
    scratch: Path
    layers: tuple[Path, ...]

    def devices(self, directory: Path) -> tuple[list[str], list[dict[str, object]]]:
        """Return QEMU's arguments for the back ends, and the devices: as vmrt's domain has them."""
        disks = [("scratch", self.scratch, "cache=unsafe,discard=unmap")]
        disks += [(f"l-{number}", path, "readonly=on") for number, path in enumerate(self.layers)]
        arguments = ["-chardev", f"socket,id=share,path={directory}/fs"]
        devices: list[dict[str, object]] = [
            {"driver": "vhost-user-fs-pci", "chardev": "share", "tag": "share", "queue-size": 1024, "addr": "0x7"}
        ]
        for unit, (serial, path, options) in enumerate(disks):
            arguments += ["-drive", f"id=d{unit},if=none,format=raw,file={path},{options}"]
            devices.append({"driver": "scsi-hd", "bus": "scsi.0", "lun": unit, "drive": f"d{unit}", "serial": serial})
        return arguments, devices

    def serve(self, directory: Path) -> subprocess.Popen[bytes]:
        """Start virtiofsd as vmrt does."""
        usage = subprocess.run([self.virtiofsd, "--help"], check=False, capture_output=True, text=True)
        rust = virtiofsd.is_rust(usage.stdout + usage.stderr)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(directory / "fs"))
            listener.listen(1)
            command = virtiofsd.command(self.virtiofsd, self.share, listener.fileno(), rust=rust)
            return subprocess.Popen(
                command,
                pass_fds=(listener.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )


def _devices(guest: GuestImage, directory: Path, tap: str, extra: Extra | None) -> list[str]:
    devices: list[dict[str, object]] = [
        {"driver": "virtio-blk-pci", "drive": "root", "serial": "vmrt-root", "addr": "0x2"},
        {"driver": "virtio-scsi-pci", "id": "scsi", "addr": "0x3"},
        {"driver": "virtio-rng-pci", "rng": "rng", "addr": "0x4"},
        {"driver": "virtio-net-pci", "netdev": "net", "romfile": "", "addr": "0x5"},
        {"driver": "vhost-user-vsock-pci", "chardev": "vsock", "addr": "0x6"},
    ]
    arguments = [
        "-object", "memory-backend-memfd,id=mem,size=512M,share=on",
        "-object", "rng-builtin,id=rng",
        "-drive", f"id=root,if=none,format=raw,readonly=on,file={guest.rootfs}",
        "-netdev", f"tap,id=net,ifname={tap},script=no,downscript=no,vhost=off",
        "-chardev", f"socket,id=vsock,path={directory}/vhost",
        "-chardev", f"file,id=console,path={directory}/console",
        "-serial", "chardev:console",
    ]  # fmt: skip
    if extra is not None:
        more, more_devices = extra.devices(directory)
        arguments += more
        devices += more_devices
    for device in devices:
        arguments += ["-device", json.dumps({"bus": "pcie.0", **device})]
    return arguments


def _command(guest: GuestImage, devices: list[str], *, kvm: bool, firmware: Path | None, extra: str = "") -> list[str]:
    accelerator = "kvm" if kvm else "tcg"
    initramfs = ["-initrd", str(guest.initramfs)] if guest.initramfs else []
    cpu = "host" if kvm else ",".join(("max", *(f"{name}=off" for name in EMULATED_CPU_WITHOUT)))
    emulated = "" if kvm else "".join(f" {word}" for word in EMULATED_CMDLINE)
    return [
        "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-machine", f"q35,accel={accelerator},memory-backend=mem,vmport=off,hpet={'off' if kvm else 'on'}",
        "-cpu", cpu, "-smp", "1", "-m", "512M",
        *(["-bios", str(firmware)] if firmware else []), "-kernel", str(guest.kernel), *initramfs,
        "-append", f"{guest.cmdline} console=ttyS0 panic=-1{emulated}{extra}", *devices,
    ]  # fmt: skip


@contextlib.contextmanager
def bare_vm(
    guest: GuestImage,
    directory: Path,
    vhost_device_vsock: Path,
    *,
    number: int,
    kvm: bool,
    extra: Extra | None = None,
    firmware: Path | None = QBOOT,
) -> Iterator[Bare]:
    """Boot a bare VM in `directory` and yield it when its agent is ready; kill it at the end.

    `number` tells those of one process apart; `firmware` None is QEMU's own choice (SeaBIOS). Raises `RuntimeError`
    with the console's end when it does not come up within a minute.
    """
    directory.mkdir(parents=True)
    devices = _devices(guest, directory, f"vtb{os.getpid()}x{number}", extra)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(directory / f"vsock_{READY_PORT}"))
    listener.listen(1)
    listener.settimeout(_TIMEOUT_S)
    began = time.monotonic()
    helper = subprocess.Popen(
        [vhost_device_vsock, "--guest-cid=3", f"--socket={directory}/vhost", f"--uds-path={directory}/vsock"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    helpers = [helper] if extra is None else [helper, extra.serve(directory)]
    while not (directory / "vhost").exists():
        time.sleep(0.001)
    qemu = subprocess.Popen(
        _command(guest, devices, kvm=kvm, firmware=firmware),
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        try:
            connection, _ = listener.accept()
        except TimeoutError as e:
            console = directory / "console"
            end = console.read_text(errors="replace")[-2000:] if console.exists() else ""
            raise RuntimeError(f"the bare VM did not come up; its console ends:\n{end}") from e
        boot_s = time.monotonic() - began
        connection.close()
        pids = (qemu.pid, *(process.pid for process in helpers))
        yield Bare(boot_s, qemu.pid, helper.pid, directory / "vsock", pids)
    finally:
        for process in (qemu, *helpers):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.wait()
        if qemu.stderr is not None:
            qemu.stderr.close()
        listener.close()


def kernel_alone_s(guest: GuestImage, directory: Path, *, number: int, kvm: bool, firmware: Path | None) -> float:
    """Return how long a VM lives whose kernel finds no program to start: QEMU, firmware and kernel, and no more.

    With `panic=-1` and `-no-reboot` its panic is QEMU's end. It has all the devices but the vsock, whose helper it
    would need. Raises `RuntimeError` when it ends otherwise.
    """
    directory.mkdir(parents=True)
    devices = _devices(guest, directory, f"vtk{os.getpid()}x{number}", None)
    for option in ("-chardev", "-device"):  # the vsock's
        index = next(i for i, word in enumerate(devices) if word == option and "vsock" in devices[i + 1])
        del devices[index : index + 2]
    command = _command(guest, devices, kvm=kvm, firmware=firmware, extra=" init=/absent rdinit=/absent")
    began = time.monotonic()
    subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=_TIMEOUT_S)
    lasted_s = time.monotonic() - began
    said = (directory / "console").read_text(errors="replace")
    if "Kernel panic" not in said:
        raise RuntimeError(f"the kernel did not end by its panic; its console ends:\n{said[-2000:]}")
    return lasted_s


def processor_ms(pids: Iterable[int]) -> float:
    """Return the processor time that processes have used, in user and kernel mode (proc_pid_stat(5))."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks * 1000 / os.sysconf("SC_CLK_TCK")


def pss_bytes(pid: int) -> int:
    """Return a process's proportional set size (kernel Documentation/filesystems/proc.rst, smaps_rollup)."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0
