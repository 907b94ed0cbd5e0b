"""AppArmor profiles for containers: found and compiled on the host, loaded into the kernel of the pod's guest.

RuntimeDefault is `DEFAULT_PROFILE` below. A Localhost profile is one of the host's: as the host's kernel has it loaded
(`policy/profiles/*/raw_data` of apparmorfs, which is what apparmor_parser(8) once loaded), else one that a file of
/etc/apparmor.d names, compiled for the guest. The host's kernel need not have AppArmor itself.

The compiler has to know what the guest's kernel can mediate: `FEATURES` is what Linux 6.1 says of itself below
/sys/kernel/security/apparmor/features, in the form that `apparmor_parser --features-file` takes.
"""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmrt import spawn
from vmrt.errors import FailedPreconditionError, InvalidArgumentError, ProcessError
from vmrt.model import ProfileType, SecurityContext

LOADED = Path("/sys/kernel/security/apparmor/policy/profiles")
FILES = Path("/etc/apparmor.d")
POLICY_LIMIT_BYTES = 2 * 1024 * 1024
_TEXT_LIMIT_BYTES = 1024 * 1024
_PHASE = "apparmor"
_COMPILED_LIMIT = 32
_COMPILE_TIMEOUT_S = 30.0

DEFAULT_NAME = "vmrt-default"
# What containers may do by default: all that their capabilities and namespaces let them, but for mounts, the switches
# of the kernel below /proc and /sys, and signals to and traces of what is not of the same profile. Deny rules win.
DEFAULT_PROFILE = f"""
profile {DEFAULT_NAME} flags=(attach_disconnected,mediate_deleted) {{
  capability,
  network,
  file,
  umount,

  deny mount,

  # Only shared memory's limits below /proc/sys; nothing that is no process's elsewhere in /proc.
  deny /proc/* w,
  deny /proc/{{acpi,asound,bus,driver,fs,irq,scsi,tty}}/** wklx,
  deny /proc/sys/{{[^k]**,k[^e]**}} wklx,
  deny /proc/sys/kernel/{{[^s]**,s[^h]**,sh[^m]**}} wklx,
  deny /proc/{{kcore,kmem,mem,sysrq-trigger}} rwklx,

  # The container's cgroups alone below /sys.
  deny /sys/{{[^f]**,f[^s]**}} wklx,
  deny /sys/fs/{{[^c]**,c[^g]**}} wklx,
  deny /sys/{{firmware,kernel/security}}/** rwklx,

  signal (receive) peer=unconfined,
  signal (send, receive) peer={DEFAULT_NAME},
  ptrace (read, readby, trace, tracedby) peer={DEFAULT_NAME},
}}
"""

_FEATURES: dict[str, Any] = {
    "query": {"label": {"multi_transaction": "yes", "data": "yes", "perms": "allow deny audit quiet"}},
    "signal": {
        "mask": "hup int quit ill trap abrt bus fpe kill usr1 segv usr2 pipe alrm term stkflt chld cont stop stp ttin"
        " ttou urg xcpu xfsz vtalrm prof winch io pwr sys emt lost"
    },
    "ptrace": {"mask": "read trace"},
    "caps": {
        "mask": "chown dac_override dac_read_search fowner fsetid kill setgid setuid setpcap linux_immutable"
        " net_bind_service net_broadcast net_admin net_raw ipc_lock ipc_owner sys_module sys_rawio sys_chroot"
        " sys_ptrace sys_pacct sys_admin sys_boot sys_nice sys_resource sys_time sys_tty_config mknod lease audit_write"
        " audit_control setfcap mac_override mac_admin syslog wake_alarm block_suspend audit_read perfmon bpf"
        " checkpoint_restore"
    },
    "rlimit": {
        "mask": "cpu fsize data stack core rss nproc nofile memlock as locks sigpending msgqueue nice rtprio rttime"
    },
    "capability": "0xffffff",
    "namespaces": {"pivot_root": "no", "profile": "yes"},
    "mount": {"mask": "mount umount pivot_root"},
    "network_v8": {
        "af_mask": "unspec unix inet ax25 ipx appletalk netrom bridge atmpvc x25 inet6 rose netbeui security key"
        " netlink packet ash econet atmsvc rds sna irda pppox wanpipe llc ib mpls can tipc bluetooth iucv rxrpc isdn"
        " phonet ieee802154 caif alg nfc vsock kcm qipcrtr smc xdp mctp"
    },
    "file": {"mask": "create read write exec append mmap_exec link lock"},
    "domain": {
        "version": "1.2",
        "computed_longest_left": "yes",
        "post_nnp_subset": "yes",
        "fix_binfmt_elf_mmap": "yes",
        "stack": "yes",
        "change_profile": "yes",
        "change_onexec": "yes",
        "change_hatv": "yes",
        "change_hat": "yes",
        "attach_conditions": {"xattr": "yes"},
    },
    "policy": {
        "outofband": "0x000001",
        "set_load": "yes",
        "versions": {"v8": "yes", "v7": "yes", "v6": "yes", "v5": "yes"},
    },
}


@dataclass(frozen=True, slots=True)
class Policy:
    """A profile's name, and the compiled policy that defines it (policy/.replace of apparmorfs takes it whole)."""

    name: str
    binary: bytes


_compiled: dict[tuple[str, int], bytes] = {}


def features(tree: dict[str, Any] = _FEATURES) -> str:
    """Return a features file: each name with its value, or with what is below it, in braces."""
    lines = (
        f"{name} {{{features(below)}}}" if isinstance(below, dict) else f"{name} {{{below}\n}}"
        for name, below in tree.items()
    )
    return "\n".join(lines) + "\n"


async def policy(security: SecurityContext) -> Policy | None:
    """Return what the container's process is to be confined by; None for nothing (unset, Unconfined, privileged).

    Raises `InvalidArgumentError` for a Localhost profile that this host does not have.
    """
    profile = security.apparmor
    if profile is None or profile.type is ProfileType.UNCONFINED or security.privileged:
        return None
    if profile.type is ProfileType.RUNTIME_DEFAULT:
        return Policy(DEFAULT_NAME, await _compile(DEFAULT_NAME, 0, DEFAULT_PROFILE))
    name = profile.localhost_ref
    binary = await asyncio.to_thread(loaded, name)
    if binary is None:
        binary = await _from_files(name)
    if binary is None:
        raise InvalidArgumentError(
            f"the AppArmor profile {name!r} is not on this node",
            phase=_PHASE,
            hint=f"neither loaded in the host's kernel nor named by a file of {FILES}",
        )
    if len(binary) > POLICY_LIMIT_BYTES:
        raise InvalidArgumentError(
            f"the AppArmor profile {name!r} has {len(binary)} octets, more than {POLICY_LIMIT_BYTES}", phase=_PHASE
        )
    return Policy(name, binary)


def loaded(name: str) -> bytes | None:
    """Return the policy with which the host's kernel was given the profile; None where it has none of that name."""
    try:
        entries = sorted(LOADED.iterdir())
    except OSError:
        return None  # no AppArmor, or not ours to see
    for entry in entries:
        try:
            if (entry / "name").read_text().rstrip("\n") == name:
                return (entry / "raw_data").read_bytes()
        except OSError:
            continue  # it has gone, or the kernel keeps no raw data
    return None


def candidates(name: str) -> list[Path]:
    """Return the files of /etc/apparmor.d that contain the name and are not disabled there."""
    found = []
    try:
        entries = sorted(FILES.iterdir())
    except OSError:
        return []
    for path in entries:
        if not path.is_file() or (FILES / "disable" / path.name).exists():
            continue
        if path.stat().st_size <= _TEXT_LIMIT_BYTES and name in path.read_text(errors="replace"):
            found.append(path)
    return found


async def _from_files(name: str) -> bytes | None:
    for path in await asyncio.to_thread(candidates, name):
        try:
            names = await _parser("--names", path)
        except ProcessError:
            continue  # a file that the parser refuses defines nothing
        if name in names.stdout.decode(errors="replace").splitlines():
            return await _compile(str(path), path.stat().st_mtime_ns, path)
    return None


async def _compile(key: str, version: int, source: str | Path) -> bytes:
    """Compile a profile's text, or a file, for the guest's kernel; what was compiled before is remembered."""
    if (binary := _compiled.get((key, version))) is not None:
        return binary
    with tempfile.NamedTemporaryFile("w", prefix="vmrt-apparmor-") as file:
        file.write(features())
        file.flush()
        done = await _parser("--skip-kernel-load", "--skip-cache", "--stdout", "--features-file", file.name, source)
    if not done.stdout:
        raise FailedPreconditionError(f"apparmor_parser made nothing of the profile {key}", phase=_PHASE)
    while len(_compiled) >= _COMPILED_LIMIT:
        del _compiled[next(iter(_compiled))]
    _compiled[key, version] = done.stdout
    return done.stdout


async def _parser(*arguments: str | Path) -> spawn.Completed:
    *options, source = arguments
    text = source.encode() if isinstance(source, str) else None
    argv: list[str | Path] = ["apparmor_parser", *options, *([source] if text is None else [])]
    try:
        return await spawn.run(argv, input_bytes=text, timeout_s=_COMPILE_TIMEOUT_S, phase=_PHASE)
    except ProcessError as e:
        if e.status < 0:
            e.hint = "AppArmor profiles are compiled by apparmor_parser; Debian: apparmor"
        raise
