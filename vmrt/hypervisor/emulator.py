"""Which program libvirt is told to run as QEMU.

Where `/dev/kvm` exists and QEMU's user may not open it, QEMU itself cannot be given to libvirt 9: its capability probe
runs QEMU with CAP_DAC_OVERRIDE, so the probe sees KVM; the check whether the cached answer is still good asks as the
plain user, who does not. So libvirt throws the answer away at every look, some 20 times a domain, 4 s each.

The way out that leaves the host's device as its owner wants it: a wrapper that gives the capability up before it
becomes QEMU. The probe then sees what every VM will see, and the answer stays good.
"""

from __future__ import annotations

import os
import shlex
import stat
from pathlib import Path

from vmrt.hypervisor.accel import KVM_DEVICE
from vmrt.hypervisor.access import QemuUser, permits


def wrapper_script(emulator: Path) -> str:
    """Return the wrapper: same process, same arguments, no ambient capability."""
    program = shlex.quote(str(emulator))
    return f'#!/bin/sh\nexec setpriv --ambient-caps=-all --inh-caps=-all -- {program} "$@"\n'


def needs_wrapper(status: os.stat_result | None, user: QemuUser) -> bool:
    """Say whether `/dev/kvm` (None: absent) is there, but not for this user."""
    return status is not None and not permits(status, user, os.R_OK | os.W_OK)


def for_libvirt(emulator: Path, directory: Path, user: QemuUser) -> Path:
    """Return `emulator`, or a wrapper of it in `directory` where this host needs one."""
    try:
        status = KVM_DEVICE.stat()
    except OSError:
        status = None
    if not needs_wrapper(status, user):
        return emulator
    wrapper = directory / emulator.name
    text = wrapper_script(emulator)
    # Written only when it differs: libvirt keys its cached capabilities to the program's change time.
    if not wrapper.is_file() or wrapper.read_text() != text or stat.S_IMODE(wrapper.stat().st_mode) != 0o755:
        directory.mkdir(parents=True, exist_ok=True)
        wrapper.write_text(text)
        wrapper.chmod(0o755)
    return wrapper
