"""`virtiofsd`: the file share of one VM, a vhost-user device that serves one host directory.

Two programs have the name: QEMU's own in C (Debian 12, up to QEMU 7.2) and its Rust successor; they differ in how the
directory is named. Either gets its socket from us, bound and listening, so that QEMU never comes too early. It runs as
root in a sandbox of its own making (mount, PID and network namespaces, pivot_root into the share, few capabilities): it
has to act as any file owner inside the share and can see nothing outside it. Volumes are mounted in its
namespace, which is there once QEMU has connected, and appear in the guest.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from vmrt import spawn
from vmrt.errors import ProcessError, VmError
from vmrt.spawn import ProcessId

# The Rust one first: it is the maintained one.
CANDIDATES = (Path("/usr/libexec/virtiofsd"), Path("/usr/lib/virtiofsd"), Path("/usr/lib/qemu/virtiofsd"))


def find(configured: str) -> Path:
    """Return the configured binary, else the first that is installed; `VmError` when there is none."""
    candidates = (Path(configured),) if configured else CANDIDATES
    for candidate in candidates:
        if os.access(candidate, os.X_OK):
            return candidate
    raise VmError(
        f"no virtiofsd at {', '.join(str(path) for path in candidates)}",
        phase="boot",
        hint="install qemu-system-common (Debian 12) or virtiofsd, or set hypervisor.virtiofsd",
    )


def is_rust(help_text: str) -> bool:
    """Tell the two programs apart by what `--help` prints."""
    return "--shared-dir" in help_text


def command(binary: Path, share: Path, fd: int, *, rust: bool) -> tuple[str, ...]:
    """Return the command line. Submounts are announced: two file systems may use one inode number.

    The guest asks for a name anew each time (timeout=0), so what the host renames is seen at once; contents stay cached
    while size and times stay. The Rust program has no such option: names are up to 1 s old there; its --cache=never
    would cost shared mmap. Nobody in the guest can make a device node that the host would honour.
    """
    if rust:
        return (
            str(binary),
            f"--fd={fd}",
            f"--shared-dir={share}",
            "--sandbox=namespace",
            "--announce-submounts",
            "--xattr",
            "--cache=auto",
            "--modcaps=-mknod",
        )
    options = (
        f"source={share},sandbox=namespace,announce_submounts,xattr,cache=auto,timeout=0,modcaps=-mknod,log_level=err"
    )
    return (str(binary), "-f", f"--fd={fd}", "-o", options)


async def start(binary: Path, share: Path, socket_path: Path, owner: tuple[int, int]) -> ProcessId:
    """Bind the socket (QEMU's user may connect) and start the program with it."""
    if "," in str(share):
        raise VmError(f"the share directory {share} has a comma in its name", phase="boot")
    usage = await spawn.run((binary, "--help"), check=False, timeout_s=10.0)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _bind(listener, socket_path, owner)
        rust = is_rust((usage.stdout + usage.stderr).decode(errors="replace"))
        return spawn.detached(
            command(binary, share, listener.fileno(), rust=rust),
            pass_fds=(listener.fileno(),),
        )
    except OSError as e:
        raise VmError(f"cannot bind {socket_path}: {e.strerror}", phase="boot") from e
    except ProcessError as e:
        raise VmError(e.message, phase="boot", resource=str(binary)) from e
    finally:
        listener.close()


def _bind(listener: socket.socket, path: Path, owner: tuple[int, int]) -> None:
    path.unlink(missing_ok=True)
    listener.bind(str(path))
    path.chmod(0o600)
    os.chown(path, *owner)
    listener.listen(1)
