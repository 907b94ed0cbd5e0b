"""The namespaces of a pod that has a user namespace (user_namespaces(7)); without one the guest's own are the pod's.

A network, IPC, UTS or PID namespace belongs to the user namespace in which it was made, and that decides what the
containers' capabilities are worth in it. So all are made together, by one process, and named by bind mounts in layout.
"""

from __future__ import annotations

import contextlib
import os

from vmrt.agent import kernel, layout, status

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vmrt.agent import agent_pb2 as pb
    from vmrt.agent.process import Child, Reaper

# In the order in which a thread may enter them.
_ENTERED = (
    (layout.POD_NETWORK_NAMESPACE, "net", kernel.CLONE_NEWNET),
    (layout.POD_IPC_NAMESPACE, "ipc", kernel.CLONE_NEWIPC),
    (layout.POD_UTS_NAMESPACE, "uts", kernel.CLONE_NEWUTS),
)
_ALL = kernel.CLONE_NEWUSER | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS


def exist() -> bool:
    """Whether this pod has namespaces beside the guest's."""
    return os.path.exists(layout.POD_USER_NAMESPACE)  # noqa: PTH110


@contextlib.contextmanager
def entered() -> Iterator[None]:
    """Have the calling thread in the pod's network, IPC and UTS namespaces, be they the guest's or not."""
    if not exist():
        yield
        return
    with contextlib.ExitStack() as stack:
        for path, name, kind in _ENTERED:
            own = os.open(f"/proc/thread-self/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, own)
            pods = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                kernel.setns(pods, kind)
            finally:
                os.close(pods)
            stack.callback(kernel.setns, own, kind)
        yield


def make(reaper: Reaper, mapping: pb.UserNamespace, sleep: Callable[[], None]) -> Child:
    """Make all namespaces and name them; return PID 1 of the new PID namespace, a fork in which `sleep` runs.

    Two forks: the first leaves all our namespaces and waits for its mapping, the second is then born into the new PID
    namespace. The first one ends at once; nobody can be born into its place.
    """
    ours, theirs = os.pipe()
    go_read, go = os.pipe()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, ours)
        stack.callback(os.close, go)

        def fork() -> int:
            pid = os.fork()
            if pid == 0:
                _leave(theirs, go_read, sleep)
            return pid

        with reaper.adopting():
            try:
                kernel.load()  # not in the child: the loader's lock may be held by a thread that is not there
                first = reaper.register(fork)
            finally:
                os.close(theirs)
                os.close(go_read)
            told = os.read(ours, 64)
            if told != b"left":
                raise status.AgentError(status.INTERNAL, f"cannot make a user namespace: {told.decode()}")
            _write(f"/proc/{first.pid}/uid_map", f"0 {mapping.first_uid} {mapping.uids}")
            _write(f"/proc/{first.pid}/gid_map", f"0 {mapping.first_gid} {mapping.gids}")
            os.write(go, b"!")
            told = os.read(ours, 64)
            if not told.isdigit():
                raise status.AgentError(status.INTERNAL, f"cannot enter the user namespace: {told.decode()}")
            holder = reaper.adopt(int(told))
        first.wait()
    _name(holder.pid)
    return holder


def _name(pid: int) -> None:
    for path, name in (
        (layout.POD_PID_NAMESPACE, "pid"),
        (layout.POD_NETWORK_NAMESPACE, "net"),
        (layout.POD_IPC_NAMESPACE, "ipc"),
        (layout.POD_UTS_NAMESPACE, "uts"),
        (layout.POD_USER_NAMESPACE, "user"),  # the last: `exist` asks for it
    ):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))
        kernel.mount(f"/proc/{pid}/ns/{name}", path, "", kernel.MS_BIND)


def _leave(told: int, go: int, sleep: Callable[[], None]) -> None:
    """Be the first fork; does not return. No other thread of the agent exists here."""
    try:
        kernel.unshare(_ALL)
        os.write(told, b"left")
        if os.read(go, 1):
            changed, change = os.pipe()
            pid = os.fork()
            if pid == 0:
                # Nothing may stay of the guest's root: containers of the pod may trace this process.
                os.setgroups([])
                os.setresgid(0, 0, 0)
                os.setresuid(0, 0, 0)
                os.write(change, b"!")
                sleep()
            os.close(change)
            os.write(told, str(pid).encode() if os.read(changed, 1) else b"its process 1 ended")
    except OSError as e:
        os.write(told, (e.strerror or "?").encode()[:64])
    finally:
        os._exit(0)


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
