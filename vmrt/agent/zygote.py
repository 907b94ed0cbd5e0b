"""crun, loaded once: its commands run in copies of a process that has never run one (vmrt/guest_image/zygote.c).

What loading crun's libraries costs an emulated guest, more than crun's own work, is so paid once per VM, while nobody
waits. A command is still a process of its own, started as `Reaper.spawn` would start it: `tests/contract/
test_agent_zygote.py` compares the two. Where the zygote cannot be had, crun is executed as any other program.
"""

from __future__ import annotations

import _socket
import errno
import os
import struct
import threading

from vmrt.agent import console, layout
from vmrt.agent.process import DEVNULL, ENVIRONMENT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmrt.agent.process import Child, Reaper

# Until the loader is done, on a guest whose processor others use.
_ANSWER_S = 60.0
_ANSWER = struct.Struct("<cI")
# A zygote that ends is made anew; one that keeps ending is left alone.
_TRIES = 3


class Zygote:
    """Starts crun's commands. Safe to be used by several threads."""

    def __init__(self, reaper: Reaper) -> None:
        self._reaper = reaper
        self._lock = threading.Lock()
        self._requests: _socket.socket | None = None
        self._tries_left = _TRIES

    def spawn(self, argv: Sequence[str], *, stdin: int, stdout: int, stderr: int) -> Child:
        """Start a crun command as a child of ours, as `Reaper.spawn` does. Raises `OSError`."""
        request = b"".join(os.fsencode(word) + b"\0" for word in argv)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC) if DEVNULL in (stdin, stdout, stderr) else DEVNULL
        try:
            streams = [null if fd == DEVNULL else fd for fd in (stdin, stdout, stderr)]
            # Adopting before asking: the command may have ended before its pid is read.
            with self._reaper.adopting():
                pid = self._ask(request, streams)
                if pid:
                    return self._reaper.adopt(pid)
        finally:
            if null != DEVNULL:
                os.close(null)
        return self._reaper.spawn(argv, stdin=stdin, stdout=stdout, stderr=stderr)

    def _ask(self, request: bytes, streams: Sequence[int]) -> int:
        """Return the pid of a new command, 0 when there is no zygote. Raises `OSError` when it refuses or is mute."""
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack(f"={len(streams)}i", *streams))]
        with self._lock:
            while self._tries_left:
                try:
                    if self._requests is None:
                        self._requests = self._load()
                    self._requests.sendmsg([request], rights, _socket.MSG_NOSIGNAL)
                    answer = self._requests.recv(_ANSWER.size)
                except TimeoutError:
                    self._forget("does not answer")
                    raise  # the command may run: a second one would be one too many
                except OSError as e:
                    self._forget(e.strerror or str(e))
                    continue
                if len(answer) == _ANSWER.size:
                    kind, number = _ANSWER.unpack(answer)
                    if kind == b"P":
                        return int(number)
                    raise OSError(number, os.strerror(number), "crun")
                self._forget("has ended")
        return 0

    def _load(self) -> _socket.socket:
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        try:
            if not os.access(layout.ZYGOTE_LIBRARY, os.R_OK):
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), layout.ZYGOTE_LIBRARY)
            environment = {**ENVIRONMENT, "LD_PRELOAD": layout.ZYGOTE_LIBRARY}
            number = theirs.fileno()
            self._reaper.spawn(["crun", str(number)], inherit=(number,), env=environment)
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.settimeout(_ANSWER_S)
        return ours

    def _forget(self, why: str) -> None:
        self._tries_left -= 1
        console.log(f"crun's zygote: {why}")
        if self._requests is not None:
            self._requests.close()
            self._requests = None
