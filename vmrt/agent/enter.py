"""One more process in a running container: the plan for the exec program, and its start (vmrt/guest_image/exec.c).

What `crun exec` would give the process, taken from the container's completed specification; the seccomp filter is the
one that crun compiled for the container. The program enters the namespaces of the container's main process and leaves
us the process as a child. Where `crun exec` leaves a process at the agent's own oom_score_adj, it has the container's.
"""

from __future__ import annotations

import _socket
import contextlib
import os
import struct

from vmrt.agent import layout, status

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from vmrt.agent.process import Child, Exit, Reaper

TIMEOUT_S = 60.0
_REPORT_BYTES = 2048
# Namespace of the runtime-spec -> setns(2) flag. The network one is the guest's own unless a specification says else.
_NAMESPACES = {
    "mount": 0x00020000,
    "cgroup": 0x02000000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "network": 0x40000000,
    "time": 0x00000080,
}
# capabilities(7), by number.
# fmt: off
_CAPABILITIES = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
    "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
    "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
    "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
    "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF",
    "CHECKPOINT_RESTORE",
)
# setrlimit(2), by number (asm-generic/resource.h).
_LIMITS = (
    "CPU", "FSIZE", "DATA", "STACK", "CORE", "RSS", "NPROC", "NOFILE", "MEMLOCK", "AS", "LOCKS", "SIGPENDING",
    "MSGQUEUE", "NICE", "RTPRIO", "RTTIME",
)
# fmt: on
_SETS = (("B", "bounding"), ("P", "permitted"), ("E", "effective"), ("I", "inheritable"), ("A", "ambient"))
# seccomp(2)
_FILTER_FLAGS = {
    "SECCOMP_FILTER_FLAG_TSYNC": 1,
    "SECCOMP_FILTER_FLAG_LOG": 2,
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW": 4,
    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV": 32,
}
_DEFAULT_FILTER_FLAGS = 4  # as crun, where a profile names none
_DEFAULT_UMASK = 0o022


def capability_mask(names: Sequence[str]) -> int:
    """Return a capability set as a number; names that we do not know are left out, as crun does."""
    mask = 0
    for name in names:
        short = name.upper().removeprefix("CAP_")
        if short in _CAPABILITIES:
            mask |= 1 << _CAPABILITIES.index(short)
    return mask


def template(spec: dict[str, Any], filter_path: str) -> bytes:
    """Return the part of a plan that all execs in a container share; `spec` is the one that crun was given.

    Raises `AgentError` (UNIMPLEMENTED) for what the exec program does not know: an exec with less than the container
    has would be a hole.
    """
    process, linux = spec["process"], spec["linux"]
    seccomp = linux.get("seccomp")
    for name, wanted in (
        ("process.selinuxLabel", process.get("selinuxLabel")),
        ("process.scheduler", process.get("scheduler")),
        ("process.ioPriority", process.get("ioPriority")),
        ("linux.personality", linux.get("personality")),
        ("linux.seccomp.listenerPath", seccomp and seccomp.get("listenerPath")),
    ):
        if wanted:
            raise status.AgentError(status.UNIMPLEMENTED, f"exec: a container with {name} takes no exec")
    user = process.get("user", {})
    sets = process.get("capabilities") or {}
    kinds = {namespace["type"] for namespace in linux.get("namespaces", [])}
    records = [f"N{sum(_NAMESPACES[kind] for kind in kinds)}"]
    if "user" in kinds:
        records.append("U")
    if seccomp:
        flags = seccomp.get("flags")
        number = _DEFAULT_FILTER_FLAGS if flags is None else sum({_FILTER_FLAGS[flag] for flag in flags})
        records += [f"S{filter_path}", f"F{number}"]
    if process.get("apparmorProfile"):
        records.append(f"L{process['apparmorProfile']}")
    if process.get("oomScoreAdj"):
        records.append(f"O{process['oomScoreAdj']}")
    for limit in process.get("rlimits", []):
        records.append(f"R{_LIMITS.index(limit['type'].removeprefix('RLIMIT_'))} {limit['soft']} {limit['hard']}")
    records += [f"u{user.get('uid', 0)}", f"g{user.get('gid', 0)}", f"m{user.get('umask', _DEFAULT_UMASK)}"]
    records += [f"x{gid}" for gid in user.get("additionalGids", [])]
    records += [f"{letter}{capability_mask(sets.get(name, []))}" for letter, name in _SETS]
    if process.get("noNewPrivileges"):
        records.append("n")
    records.append(f"c{process['cwd'] or '/'}")
    records += [f"e{line}" for line in process.get("env", [])]
    return _encode(records)


def plan(shared: bytes, args: Sequence[str], cgroup: str, *, window: tuple[int, int] | None = None) -> bytes:
    """Return a whole plan: the container's template and what is this exec's own. Raises `AgentError`.

    With `window`, columns and rows, the process has a terminal of that size.
    """
    records = [f"G{cgroup}/cgroup.procs", *(f"a{word}" for word in args)]
    if window is not None:
        columns, rows = (min(size, 65535) for size in window)
        records.append(f"t{rows} {columns}")
        if b"\0eTERM=" not in shared:
            records.append("eTERM=xterm")
    return shared + _encode(records)


def _encode(records: Sequence[str]) -> bytes:
    if any("\0" in record for record in records):
        raise status.AgentError(status.INVALID_ARGUMENT, "exec: a zero octet in an argument, a variable or a path")
    return "".join(f"{record}\0" for record in records).encode(errors="surrogateescape")


class Started:
    """A process that the exec program has left us; `master` is its terminal, -1 without one."""

    def __init__(self, child: Child, master: int) -> None:
        self.child = child
        self.master = master


def start(
    reaper: Reaper,
    target: Child,
    wanted: bytes,
    what: str,
    *,
    stdin: int,
    stdout: int,
    stderr: int,
    on_exit: Callable[[Exit], None],
    timeout_s: float = TIMEOUT_S,
) -> Started:
    """Start the process of the plan `wanted` beside `target`, a container's main process.

    Returns when its program runs. Raises `AgentError`, INVALID_ARGUMENT when the command or directory is to blame;
    then nothing of it runs, or it is in the plan's cgroup for the caller to kill.
    """
    with contextlib.ExitStack() as ours:
        try:
            pidfd = reaper.pidfd(target)
            ours.callback(os.close, pidfd)
            file = os.memfd_create("exec-plan")
            ours.callback(os.close, file)
            # One write takes all of it: a memfd does that, or is out of memory.
            if os.write(file, wanted) != len(wanted):
                raise OSError(28, os.strerror(28))
            report, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
            ours.callback(report.close)
            try:
                ours.enter_context(reaper.adopting())
                descriptors = (file, theirs.fileno(), pidfd)
                argv = [layout.EXEC_PROGRAM, *map(str, descriptors)]
                reaper.spawn(argv, stdin=stdin, stdout=stdout, stderr=stderr, inherit=descriptors)
            finally:
                theirs.close()
        except ProcessLookupError as e:
            raise status.AgentError(status.FAILED_PRECONDITION, f"{what}: the container has exited") from e
        except OSError as e:
            raise status.from_os_error(e, f"{what}: start {layout.EXEC_PROGRAM}") from e
        pid, master = _follow(report, what, timeout_s)
        return Started(reaper.adopt(pid, on_exit), master)


def _follow(report: _socket.socket, what: str, timeout_s: float) -> tuple[int, int]:
    """Return (pid, terminal) once the report ends, which execve(2) does. Raises `AgentError`."""
    pid = 0
    with contextlib.ExitStack() as unwanted:
        master = -1
        report.settimeout(timeout_s)
        while True:
            try:
                message, ancillary, _, _ = report.recvmsg(
                    _REPORT_BYTES, _socket.CMSG_SPACE(4), _socket.MSG_CMSG_CLOEXEC
                )
            except TimeoutError:
                text = f"{what}: the process was not started within {timeout_s:.0f} s"
                raise status.AgentError(status.DEADLINE_EXCEEDED, text) from None
            kind = message[:1]
            if kind == b"E" and len(message) >= 6:
                number = int.from_bytes(message[2:6], "little")
                text = f"{what}: {message[6:].decode(errors='replace')}: {os.strerror(number)}"
                blame = status.INVALID_ARGUMENT if message[1:2] == b"c" else status.INTERNAL
                raise status.AgentError(blame, text)
            if kind == b"P" and len(message) == 5:
                pid = int.from_bytes(message[1:], "little")
            elif kind == b"T" and ancillary and master < 0:
                master = struct.unpack("=i", ancillary[0][2][:4])[0]
                unwanted.callback(os.close, master)
            elif not message:
                break
        if pid == 0:
            raise status.AgentError(status.INTERNAL, f"{what}: {layout.EXEC_PROGRAM} ended without a word")
        unwanted.pop_all()
        return pid, master
