"""KVM or software emulation: decided by booting, not by looking.

A host may have `/dev/kvm` and yet be unable to run a stock kernel under it (nested or para-virtualised hosts), or have
it for root only. So QEMU is run as it will be run later (same user, `-cpu host`), with a deadline:

1. `firmware`: a ROM of our own, whose reset vector writes one octet to QEMU's isa-debug-exit device. It shows that the
   user may open KVM, that a vCPU can be set up with the host's features, and that it executes.
2. `kernel`: the guest's own kernel without a root file system. It must get as far as the panic that says so.

Verdicts are kept in a file for as long as the host's boot, the QEMU binary, `/dev/kvm`'s permissions and the kernel
stay the same.
"""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vmrt import spawn
from vmrt.errors import DeadlineError, ProcessError, VmError
from vmrt.hypervisor.domain import QBOOT

log = logging.getLogger(__name__)

KVM_DEVICE = Path("/dev/kvm")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_FIRMWARE_DEADLINE_S = 5.0
_KERNEL_DEADLINE_S = 10.0
_EXIT_PORT = 0xF4
_EXIT_OCTET = 0x42
# isa-debug-exit ends QEMU with this status (QEMU, hw/misc/debugexit.c).
_EXIT_STATUS = (_EXIT_OCTET << 1 | 1) & 0xFF
_ROM_BYTES = 64 * 1024
_RESET_VECTOR = 0xFFF0
_PANIC = b"Kernel panic"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether KVM works; `reason` says why not."""

    usable: bool
    reason: str = ""


def probe_rom() -> bytes:
    """Return a 64 KiB firmware that is executed from its reset vector and ends QEMU."""
    code = bytes(
        (
            *(0xB0, _EXIT_OCTET),  # mov al, imm8
            *(0xE6, _EXIT_PORT),  # out imm8, al
            0xF4,  # hlt
            *(0xEB, 0xFD),  # jmp to the hlt
        )
    )
    rom = bytearray(_ROM_BYTES)
    rom[_RESET_VECTOR : _RESET_VECTOR + len(code)] = code
    return bytes(rom)


class KvmProbe:
    """Asks whether KVM works, each question once per boot of the host."""

    def __init__(self, emulator: Path, user: str, group: str, cache: Path) -> None:
        self._emulator = emulator
        self._user = user
        self._group = group
        self._cache = cache

    async def firmware(self) -> Verdict:
        """Run the ROM."""
        if not _exists(KVM_DEVICE):
            return Verdict(False, f"{KVM_DEVICE} does not exist")
        return await self._cached("firmware", self._run_firmware)

    async def kernel(self, kernel: Path) -> Verdict:
        """Boot this kernel until it misses its root file system."""
        return await self._cached(f"kernel {kernel} {_version(kernel)}", lambda: self._run_kernel(kernel))

    async def _run_firmware(self) -> Verdict:
        exit_device = f"isa-debug-exit,iobase={_EXIT_PORT:#x},iosize=1"
        with _rom_file() as rom:
            status, output = await self._qemu(("-m", "16", "-bios", rom, "-device", exit_device), _FIRMWARE_DEADLINE_S)
        if status == _EXIT_STATUS:
            return Verdict(True)
        if status is None:
            return Verdict(False, f"a guest of four instructions did not end within {_FIRMWARE_DEADLINE_S:g} s")
        return Verdict(False, _last_line(output) or f"QEMU ended with status {status}")

    async def _run_kernel(self, kernel: Path) -> Verdict:
        status, output = await self._qemu(
            (
                *("-m", "256", "-bios", str(QBOOT), "-kernel", str(kernel), "-append", "console=ttyS0 panic=-1 quiet"),
                *("-serial", "stdio", "-no-reboot"),
            ),
            _KERNEL_DEADLINE_S,
        )
        if _PANIC in output:
            return Verdict(True)
        if status is None:
            return Verdict(False, f"the guest's kernel did not start within {_KERNEL_DEADLINE_S:g} s")
        return Verdict(False, _last_line(output) or f"QEMU ended with status {status}")

    async def _qemu(self, arguments: tuple[str, ...], deadline_s: float) -> tuple[int | None, bytes]:
        """Run QEMU under KVM as the unprivileged user; return its status (None: killed at the deadline) and output."""
        argv = (
            *("setpriv", f"--reuid={self._user}", f"--regid={self._group}", "--init-groups", "--no-new-privs", "--"),
            *(str(self._emulator), "-nodefaults", "-no-user-config", "-display", "none", "-sandbox", "on"),
            *("-machine", "q35", "-accel", "kvm", "-cpu", "host", *arguments),
        )
        try:
            done = await spawn.run(argv, timeout_s=deadline_s, check=False, phase="kvm probe")
        except DeadlineError:
            return None, b""
        except ProcessError as e:
            return -1, str(e).encode()
        return done.status, done.stdout + done.stderr

    async def _cached(self, question: str, ask: Callable[[], Awaitable[Verdict]]) -> Verdict:
        ground = self._ground()
        answers = _read_answers(self._cache, ground)
        if question in answers:
            return answers[question]
        verdict = await ask()
        answers[question] = verdict
        _write_answers(self._cache, ground, answers)
        return verdict

    def _ground(self) -> str:
        """Return what an answer depends on besides its question."""
        device = KVM_DEVICE.stat()
        return " ".join(
            (
                _BOOT_ID.read_text().strip(),
                f"{device.st_mode:o} {device.st_uid} {device.st_gid} {device.st_ctime_ns}",
                _version(self._emulator),
                self._user,
            )
        )


@contextlib.contextmanager
def _rom_file() -> Iterator[str]:
    """Put the ROM where QEMU's user can read it."""
    with tempfile.NamedTemporaryFile(prefix="vmrt-probe-", suffix=".rom") as rom:
        rom.write(probe_rom())
        rom.flush()
        Path(rom.name).chmod(0o644)
        yield rom.name


def _exists(path: Path) -> bool:
    return path.exists()


def _version(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


class Accelerator:
    """What this daemon's VMs run on. `setting` is hypervisor.accelerator: "auto", "kvm" or "tcg"."""

    def __init__(self, setting: str, probe: KvmProbe) -> None:
        self._setting = setting
        self._probe = probe
        self.name = "tcg"

    async def choose(self) -> None:
        """Decide; `VmError` where KVM is asked for and does not work."""
        if self._setting != "tcg":
            self.name = "kvm"
            self._heed(await self._probe.firmware())

    async def prove(self, kernel: Path) -> None:
        """Let a kernel that will be booted under KVM show that it boots; emulation from here on when it does not."""
        if self.name == "kvm":
            self._heed(await self._probe.kernel(kernel))

    def _heed(self, verdict: Verdict) -> None:
        if verdict.usable:
            return
        if self._setting == "kvm":
            raise VmError(
                f"KVM does not work: {verdict.reason}",
                phase="kvm probe",
                hint='set hypervisor.accelerator = "auto" to allow software emulation',
            )
        self.name = "tcg"
        log.warning(
            "no usable KVM (%s): VMs run under software emulation, many times slower; `vmrt doctor` tells more",
            verdict.reason,
        )


def _read_answers(cache: Path, ground: str) -> dict[str, Verdict]:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        raw = json.loads(cache.read_text())
        if raw["ground"] == ground:
            return {question: Verdict(bool(a["usable"]), str(a["reason"])) for question, a in raw["answers"].items()}
    return {}


def _write_answers(cache: Path, ground: str, answers: dict[str, Verdict]) -> None:
    raw = {question: {"usable": verdict.usable, "reason": verdict.reason} for question, verdict in answers.items()}
    temporary = cache.with_suffix(".tmp")
    temporary.write_text(json.dumps({"ground": ground, "answers": raw}, indent=1))
    temporary.replace(cache)


def _last_line(output: bytes) -> str:
    lines = output.decode(errors="replace").strip().splitlines()
    return lines[-1][:500] if lines else ""
