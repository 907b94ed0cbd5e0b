"""Sockets of the C module `_socket`.

The standard `socket` module wraps the same objects, but its import builds dozens of enum members: 0.13 s of an emulated
guest's boot. Objects of either kind work everywhere in the agent, which is how tests run it over socket pairs.
"""

from __future__ import annotations

import _socket
import os
import select

# linux/vm_sockets.h
CID_ANY = 0xFFFFFFFF
CID_HOST = 2
_BUFFER_SIZE, _BUFFER_MAX_SIZE = 0, 2
# What the host may have on its way on a connection. With the kernel's 256 KiB a whole window of stdin would fit but for
# its frames' headers, and each turn of a session would be followed by one for 20 octets.
_BUFFER_BYTES = 512 * 1024


def packet_bytes(release: str) -> int:
    """Return how much to give a vsock at once in a guest with this kernel (uname(2)).

    Linux makes one packet of each send(2), of 64 KiB at the most. Since 6.3 a packet is a socket buffer, and newer
    kernels (seen with 6.12.118) take memory in pieces for one that does not fit into 32 KiB with what they keep about
    it (net/vmw_vsock, virtio_vsock_alloc_skb). vhost-device-vsock 0.3.0 drops such a one: it looks in one place only.
    """
    version = release.split("-", 1)[0].split(".")
    try:
        old = (int(version[0]), int(version[1])) < (6, 3)
    except (ValueError, IndexError):
        old = False
    return (64 if old else 31) * 1024


PACKET_BYTES = packet_bytes(os.uname().release)


def listen_vsock(port: int, backlog: int = 1024) -> _socket.socket:
    """Listen on a vsock port. Raises `OSError`.

    The kernel refuses what does not fit the backlog: it holds all the streams that there may be, for a port-forward's
    client can open hundreds at one moment.
    """
    listener = _socket.socket(_socket.AF_VSOCK, _socket.SOCK_STREAM)
    try:
        for option in (_BUFFER_MAX_SIZE, _BUFFER_SIZE):  # the connections have the listener's
            listener.setsockopt(_socket.AF_VSOCK, option, _BUFFER_BYTES)
        listener.bind((CID_ANY, port))
        listener.listen(backlog)
    except OSError:
        listener.close()
        raise
    return listener


def accept(listener: _socket.socket) -> tuple[_socket.socket, object]:
    """Return (connection, peer address), the connection blocking and close-on-exec. Raises `OSError`."""
    fd, peer = listener._accept()  # type: ignore[attr-defined]  # typeshed does not know it; socket.accept() is this
    return _socket.socket(fileno=fd), peer


def is_host(peer: object) -> bool:
    """Whether a vsock peer address is the host's: a container can open AF_VSOCK too, but has another CID."""
    return isinstance(peer, tuple) and len(peer) == 2 and peer[0] == CID_HOST


def send_all(connection: _socket.socket, data: bytes, timeout_s: float) -> None:
    """Send everything on a blocking socket. Raises `OSError`, also when the peer takes nothing for `timeout_s`.

    Not by SO_SNDTIMEO: Python's setsockopt() takes only 64-bit numbers for a vsock.
    """
    view = memoryview(data)
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLOUT)
    while view:
        try:
            view = view[connection.send(view[:PACKET_BYTES], _socket.MSG_DONTWAIT) :]
        except BlockingIOError:
            if not poll.poll(timeout_s * 1000):
                raise TimeoutError(f"the peer has taken nothing for {timeout_s:g} s") from None
