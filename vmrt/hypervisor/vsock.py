r"""The two ways to a guest's vsock, behind one small interface.

- hybrid: `vhost-device-vsock` puts the guest's vsock on a Unix socket. The host connects, writes
  ``CONNECT <port>\n`` and reads ``OK <port>\n`` (Firecracker's docs/vsock.md, which the device follows); the guest's
  connections to host port P arrive at the socket ``<path>_P``, where we listen before the VM starts.
- kernel: vhost_vsock and AF_VSOCK (vsock(7)). The listener is shared by all VMs and tells them apart by the peer's CID,
  which the guest cannot choose.

The ready notice is all that a guest sends uninvited: one HELLO frame (proto/agent.proto), bounded and time-limited.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from vmrt.agent import agent_pb2 as pb
from vmrt.agent.frames import HEADER, Frame, FrameError
from vmrt.agent.layout import READY_PORT
from vmrt.errors import VmError
from vmrt.hypervisor.domain import VsockDevice

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]

KERNEL_DEVICE = Path("/dev/vhost-vsock")
# The guest's own CID behind a hybrid device: each device is a world of its own, so all guests may have the first one.
HYBRID_GUEST_CID = 3
_NOTICE_LIMIT_BYTES = 4096
_NOTICE_TIMEOUT_S = 10.0
_ANSWER_LIMIT_BYTES = 32
# Notices of guests whose CID libvirt has not told us yet.
_UNCLAIMED_LIMIT = 64


class Vsock(Protocol):
    """One VM's vsock as the driver uses it. `VmError` when the guest or the transport fails."""

    @property
    def device(self) -> VsockDevice:
        """What the domain needs."""
        ...

    async def listen(self) -> None:
        """Be there for the ready notice. Called before the VM starts."""
        ...

    def started(self, cid: int | None) -> None:
        """Take the CID that libvirt gave the running domain (None behind a hybrid device)."""
        ...

    async def ready(self) -> pb.ReadyNotice:
        """Wait for the notice, for as long as the caller lets it."""
        ...

    async def dial(self, port: int) -> Connection:
        """Connect to a port in the guest. The caller sets the time limit."""
        ...

    async def close(self) -> None:
        """Stop listening. Open connections are the callers' own."""
        ...


async def read_notice(reader: asyncio.StreamReader) -> pb.ReadyNotice:
    """Read one HELLO frame with a `ReadyNotice` from a hostile peer; `VmError` for anything else."""
    try:
        async with asyncio.timeout(_NOTICE_TIMEOUT_S):
            kind, length = HEADER.unpack(await reader.readexactly(HEADER.size))
            if kind != pb.HELLO or length > _NOTICE_LIMIT_BYTES:
                raise VmError(f"the guest's first frame is of type {kind} with {length} octets, not a ready notice")
            return Frame(kind, await reader.readexactly(length)).parse(pb.ReadyNotice)
    except TimeoutError as e:
        raise VmError(f"the guest's ready notice did not end within {_NOTICE_TIMEOUT_S:g} s") from e
    except (asyncio.IncompleteReadError, ConnectionError) as e:
        raise VmError("the guest's ready notice broke off") from e
    except FrameError as e:
        raise VmError(f"the guest's ready notice: {e}") from e


class HybridVsock:
    """A guest behind its own `vhost-device-vsock`."""

    def __init__(self, vsock: Path, ready: Path, vhost: Path, owner: tuple[int, int]) -> None:
        self._vsock = vsock
        self._ready_path = ready
        self._vhost = vhost
        self._owner = owner
        self._server: asyncio.Server | None = None
        self._notice: asyncio.Future[pb.ReadyNotice] | None = None

    @property
    def device(self) -> VsockDevice:
        """The vhost-user device of this VM."""
        return VsockDevice(self._vhost)

    async def listen(self) -> None:
        """Bind the socket at which the guest's connections to `READY_PORT` arrive."""
        self._notice = asyncio.get_running_loop().create_future()
        # Not served at once: a cancellation in start_unix_server would lose the bound socket.
        self._server = await asyncio.start_unix_server(self._accept, self._ready_path, backlog=4, start_serving=False)
        self._ready_path.chmod(0o600)
        os.chown(self._ready_path, *self._owner)
        await self._server.start_serving()

    def started(self, cid: int | None) -> None:
        """Nothing to learn: the CID is the same for all."""

    async def ready(self) -> pb.ReadyNotice:
        """Wait for the first notice and stop listening."""
        if self._notice is None:
            raise VmError("nobody listens for the ready notice", phase="boot")
        try:
            return await asyncio.shield(self._notice)
        finally:
            await self.close()

    async def dial(self, port: int) -> Connection:
        """Connect through the device's Unix socket."""
        try:
            reader, writer = await asyncio.open_unix_connection(self._vsock)
        except OSError as e:
            raise VmError(f"cannot reach the vsock device: {e.strerror or e}", phase="dial") from e
        try:
            writer.write(b"CONNECT %d\n" % port)
            answer = await _line(reader)
        except BaseException:
            writer.close()
            raise
        if not answer.startswith(b"OK "):
            writer.close()
            raise VmError(f"nobody listens on vsock port {port} of the guest", phase="dial")
        return reader, writer

    async def close(self) -> None:
        """Unbind."""
        if self._server is not None:
            self._server.close()
            self._server = None
            self._ready_path.unlink(missing_ok=True)
        if self._notice is not None and not self._notice.done():
            self._notice.cancel()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            _settle(self._notice, await read_notice(reader))
        except VmError as e:
            _settle(self._notice, e)
        finally:
            writer.close()


class KernelVsockListener:
    """The host's one AF_VSOCK listener for ready notices, shared by all VMs of this daemon."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None
        self._readers: set[asyncio.Task[None]] = set()
        self._notices: dict[int, asyncio.Future[pb.ReadyNotice]] = {}

    def open(self) -> None:
        """Bind. `VmError` when another daemon has the port."""
        listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        try:
            listener.setblocking(False)
            listener.bind((socket.VMADDR_CID_ANY, READY_PORT))
            listener.listen(64)
        except OSError as e:
            listener.close()
            raise VmError(
                f"cannot listen on vsock port {READY_PORT}: {e.strerror}",
                phase="open",
                hint='one daemon a host can use the kernel\'s vsock: set hypervisor.vsock = "vhost-user" for others',
            ) from e
        self.serve(listener, lambda address: int(address[0]))

    def serve(self, listener: socket.socket, cid_of: Callable[[tuple[int, ...]], int]) -> None:
        """Accept on a bound socket; `cid_of` reads the peer's CID from its address."""
        self._socket = listener
        self._task = asyncio.create_task(self._accept(listener, cid_of))

    async def close(self) -> None:
        """Stop listening."""
        tasks = [task for task in (self._task, *self._readers) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def notice_of(self, cid: int) -> asyncio.Future[pb.ReadyNotice]:
        """Return what will hold, or holds already, the notice of the guest with this CID."""
        if cid not in self._notices:
            if len(self._notices) >= _UNCLAIMED_LIMIT:
                self._notices.pop(next(iter(self._notices))).cancel()
            self._notices[cid] = asyncio.get_running_loop().create_future()
        return self._notices[cid]

    def forget(self, cid: int) -> None:
        """Drop the notice of a guest that is served or gone: CIDs are used again."""
        if (notice := self._notices.pop(cid, None)) is not None:
            notice.cancel()

    async def _accept(self, listener: socket.socket, cid_of: Callable[[tuple[int, ...]], int]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, address = await loop.sock_accept(listener)
            task = asyncio.create_task(self._read(connection, cid_of(address)))
            self._readers.add(task)
            task.add_done_callback(self._readers.discard)

    async def _read(self, connection: socket.socket, cid: int) -> None:
        reader, writer = await asyncio.open_connection(sock=connection)
        try:
            _settle(self.notice_of(cid), await read_notice(reader))
        except VmError as e:
            _settle(self.notice_of(cid), e)
        finally:
            writer.close()


class KernelVsock:
    """A guest behind the kernel's vhost_vsock."""

    def __init__(self, listener: KernelVsockListener) -> None:
        self._listener = listener
        self._cid: int | None = None

    @property
    def device(self) -> VsockDevice:
        """Have libvirt's own vsock device, which finds a free CID."""
        return VsockDevice(None)

    async def listen(self) -> None:
        """Nothing to bind: the listener is there for all VMs."""

    def started(self, cid: int | None) -> None:
        """Take the CID."""
        if cid is None:
            raise VmError("libvirt gave the VM no vsock CID", phase="boot")
        self._cid = cid

    async def ready(self) -> pb.ReadyNotice:
        """Wait for the notice from our CID."""
        cid = self._known_cid()
        try:
            return await asyncio.shield(self._listener.notice_of(cid))
        finally:
            self._listener.forget(cid)

    async def dial(self, port: int) -> Connection:
        """Connect with AF_VSOCK."""
        connection = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        try:
            connection.setblocking(False)
            await asyncio.get_running_loop().sock_connect(connection, (self._known_cid(), port))
            return await asyncio.open_connection(sock=connection)
        except OSError as e:
            connection.close()
            raise VmError(f"cannot connect to vsock port {port} of the guest: {e.strerror or e}", phase="dial") from e
        except BaseException:
            connection.close()
            raise

    async def close(self) -> None:
        """Forget the CID: another VM may get it next."""
        if self._cid is not None:
            self._listener.forget(self._cid)

    def _known_cid(self) -> int:
        if self._cid is None:
            raise VmError("the VM has no vsock CID yet", phase="dial")
        return self._cid


async def _line(reader: asyncio.StreamReader) -> bytes:
    """Read the device's one-line answer; b"" when it closes instead."""
    line = bytearray()
    while len(line) < _ANSWER_LIMIT_BYTES:
        with contextlib.suppress(ConnectionError):
            octet = await reader.read(1)
            if octet == b"\n":
                return bytes(line)
            if octet:
                line += octet
                continue
        return b""
    raise VmError(f"the vsock device answered more than {_ANSWER_LIMIT_BYTES} octets", phase="dial")


def _settle(future: asyncio.Future[pb.ReadyNotice] | None, outcome: pb.ReadyNotice | VmError) -> None:
    """Keep the first outcome; a guest that connects again changes nothing."""
    if future is None or future.done():
        return
    if isinstance(outcome, VmError):
        future.set_exception(outcome)
        # Marked as seen: a boot that ended for another reason never asks for it.
        future.exception()
    else:
        future.set_result(outcome)
