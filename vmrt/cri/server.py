"""The gRPC server: CRI's two services and the command line's, on one Unix socket.

The socket is for root and its group (0660): who can reach it is root on this host. A socket that was left behind is
removed only when nobody answers on it; at the end only the one we made is removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from vmrt.config import SOCKET_PATH_LIMIT, Config
from vmrt.cri.answers import KEPT, Answers
from vmrt.cri.control_service import ControlService
from vmrt.cri.delegates.compose import compose
from vmrt.cri.image_service import ImageService
from vmrt.cri.outcome import with_outcome
from vmrt.cri.ports import Pods, StreamUrls
from vmrt.cri.runtime_service import REPLY_LIMIT_BYTES, RuntimeService
from vmrt.errors import AlreadyExistsError, ConfigError
from vmrt.pods.drivers import ImageStore
from vmrt.proto.runtime.v1 import api_pb2_grpc as cri_grpc
from vmrt.proto.vmrt.v1 import control_pb2_grpc as control_grpc

log = logging.getLogger(__name__)

# At debug level grpc logs every turn of its own loop, which would bury what we log.
logging.getLogger("grpc").setLevel(logging.INFO)

_KEPT_SERVICE = "runtime.v1.RuntimeService"
_SOCKET_MODE = 0o660
_PROBE_TIMEOUT_S = 2.0


class CriServer:
    """One server: `open` once, `close` once."""

    def __init__(self, config: Config, pods: Pods, images: ImageStore, streams: StreamUrls) -> None:
        self._socket = config.socket_path
        self._ours: tuple[int, int] | None = None
        self._server = grpc.aio.server(
            options=(
                ("grpc.max_receive_message_length", REPLY_LIMIT_BYTES),
                ("grpc.max_send_message_length", REPLY_LIMIT_BYTES),
            ),
        )
        services = compose(
            config,
            pods,
            images,
            RuntimeService(pods, tuple(config.of_vms().handlers), streams, config.hypervisor.cgroup_driver),
            ImageService(images),
            ControlService(pods, images),
        )
        self._directory = services.directory
        # What delegates have changes without our records: then no answer is kept.
        answers = Answers(lambda: pods.generation if services.directory is None else None)
        wrapping: Any = _Wrapping(self._server, answers)
        cri_grpc.add_RuntimeServiceServicer_to_server(services.runtime, wrapping)
        cri_grpc.add_ImageServiceServicer_to_server(services.image, wrapping)
        control_grpc.add_ControlServicer_to_server(services.control, wrapping)

    async def open(self) -> None:
        """Bind and serve.

        `AlreadyExistsError` when another daemon answers on the socket, `ConfigError` when it cannot be bound.
        """
        await clear_stale(self._socket)
        if self._directory is not None:
            await self._directory.open()
        # Until the mode is set nobody but root may connect. The mask is the process's, so it is held for one call.
        mask = os.umask(0o077)
        try:
            self._server.add_insecure_port(f"unix://{self._socket}")
        except RuntimeError as e:
            raise ConfigError(
                f"listen: cannot bind: {e}", resource=str(self._socket), hint="is the directory there and writable?"
            ) from e
        finally:
            os.umask(mask)
        self._socket.chmod(_SOCKET_MODE)
        self._ours = _identity(self._socket)
        await self._server.start()

    async def close(self, grace_s: float = 5.0) -> None:
        """Take no more calls, let running ones finish for `grace_s`, cancel the rest, remove the socket."""
        await self._server.stop(grace_s)
        if self._directory is not None:
            await self._directory.close()
        if self._ours is not None and _identity(self._socket) == self._ours:
            _remove(self._socket)


class _Wrapping:
    """Stands in for the server where grpc's generated code adds a service: its handlers are wrapped on their way."""

    def __init__(self, server: grpc.aio.Server, answers: Answers) -> None:
        self._server = server
        self._answers = answers

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Do nothing: the same handlers come to the other method, by their names."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Add a service's handlers to the server."""
        wrapped = {
            name: with_outcome(
                f"/{service}/{name}",
                self._answers.handler(name, handler) if service == _KEPT_SERVICE and name in KEPT else handler,
            )
            for name, handler in handlers.items()
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, wrapped),))


async def clear_stale(socket: Path) -> None:
    """Make way for a socket: its directory exists afterwards, and nothing that nobody answers on is at its path."""
    if not _prepare(socket):
        return
    try:
        async with asyncio.timeout(_PROBE_TIMEOUT_S):
            _, writer = await asyncio.open_unix_connection(socket)
    except (ConnectionRefusedError, FileNotFoundError):
        log.info("removing the stale socket %s", socket)
        _remove(socket)
        return
    except TimeoutError:
        pass  # its backlog is full: somebody is there, however slow
    else:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    raise AlreadyExistsError(
        "another daemon answers on the socket", resource=str(socket), hint="stop it, or choose another --listen"
    )


def _prepare(socket: Path) -> bool:
    """Make the directory and say whether a socket is there; raise `ConfigError` for what cannot become one."""
    length = len(os.fsencode(socket))
    if length > SOCKET_PATH_LIMIT:
        raise ConfigError(
            f"listen: the socket path is {length} octets long, the kernel takes at most {SOCKET_PATH_LIMIT}",
            resource=str(socket),
            hint="choose a shorter path",
        )
    try:
        socket.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        mode = socket.lstat().st_mode
    except FileNotFoundError:
        return False
    except OSError as e:
        raise ConfigError(f"listen: {e.strerror}: {e.filename}", resource=str(socket)) from e
    if not stat.S_ISSOCK(mode):
        raise ConfigError("listen: the path exists and is no socket", resource=str(socket), hint="remove it yourself")
    return True


def _remove(socket: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        socket.unlink()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
