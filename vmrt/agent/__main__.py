"""PID 1 of the guest: `python3 -I -S -B -c ...` (vmrt/guest_image/initramfs.py).

Order: listen, so that the host's first connection is taken at the earliest moment; then the mounts, in a thread; then
the ready notice. The main thread is the reaper. An error that the agent cannot live with goes to the console with its
traceback, and the machine is powered off: a VM that is gone is something the host sees and understands.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time

from vmrt.agent import agent_pb2 as pb
from vmrt.agent import console, frames, layout, process, server, service, sockets

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from collections.abc import Callable

_READY_TRIES = 20


def _fatal(error: BaseException, where: str) -> None:
    """Tell the console and power off; does not return in a guest."""
    import traceback

    console.panic(f"fatal: {where}\n{''.join(traceback.format_exception(error))}")
    console.panic("powering off")
    service.power_off()


def _critical(where: str, work: Callable[[], None]) -> threading.Thread:
    """Run `work` in a thread whose failure is the agent's."""

    def run() -> None:
        try:
            work()
        except BaseException as e:
            _fatal(e, where)

    thread = threading.Thread(target=run, name=where, daemon=True)
    thread.start()
    return thread


def _send_ready() -> None:
    """Tell the host that we listen; one that does not want to know is no error."""
    import _socket

    notice = pb.ReadyNotice(protocol=layout.PROTOCOL_VERSION, version=service.guest_version())
    for _ in range(_READY_TRIES):
        connection = _socket.socket(_socket.AF_VSOCK, _socket.SOCK_STREAM)
        try:
            connection.settimeout(5.0)
            connection.connect((sockets.CID_HOST, layout.READY_PORT))
            connection.sendall(frames.encode(pb.HELLO, notice.SerializeToString()))
        except OSError:
            connection.close()
            time.sleep(0.1)
            continue
        with contextlib.suppress(OSError):
            # Until the host closes: data in flight is lost when a vsock transport sees the close first.
            connection.shutdown(_socket.SHUT_WR)
            connection.recv(1)
        connection.close()
        return
    console.log("nobody took the ready notice")


def run(
    calls: _socket.socket,
    stream_listener: _socket.socket,
    *,
    trusted: Callable[[object], bool],
    boot: Callable[[], None],
) -> None:
    """Serve on two listeners for ever; `boot` prepares the system and may take its time."""
    listening_us = time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1000
    reaper = process.Reaper()
    agent = service.Service(reaper, listening_us=listening_us)
    call_server = server.CallServer(agent.call)
    # One above the server's own limit: it has to see a connection in order to close the oldest.
    call_acceptor = server.Acceptor(calls, server.MAX_CALL_CONNECTIONS + 8, trusted=trusted)
    stream_acceptor = server.Acceptor(stream_listener, server.MAX_STREAMS, trusted=trusted)

    def serve_stream(connection: _socket.socket) -> None:
        agent.booted.wait()
        agent.streams.serve(connection)

    def bring_up() -> None:
        boot()
        agent.booted.set()
        console.log(f"ready {time.clock_gettime(time.CLOCK_BOOTTIME):.2f} s after the kernel's start")
        _send_ready()
        agent.warm_up()

    _critical("boot", bring_up)
    _critical("calls", lambda: call_acceptor.run(call_server.serve))
    _critical("streams", lambda: stream_acceptor.run(serve_stream))
    reaper.run()


def main() -> None:
    """Be PID 1."""
    try:
        os.umask(0o022)
        os.chdir("/")
        calls = sockets.listen_vsock(layout.CALL_PORT)
        stream_listener = sockets.listen_vsock(layout.STREAM_PORT)

        def boot() -> None:
            from vmrt.agent import boot as system

            system.mount_all()

        run(calls, stream_listener, trusted=sockets.is_host, boot=boot)
    except BaseException as e:
        _fatal(e, "main")


if __name__ == "__main__":
    main()
