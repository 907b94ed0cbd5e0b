"""The streaming server: HTTP requests for a token's URL, upgraded to SPDY/3.1 or to a WebSocket.

    {http|https}://ADDRESS:PORT/{exec|attach|portforward}/TOKEN

SPDY clients POST, WebSocket clients GET; both methods are taken from both. A token is used up by the request that is
going to be upgraded; one that is refused before that (wrong method, no common protocol) leaves it. An unknown, used or
expired token is 404. Sessions have no idle time-out. A session whose client makes no streams for 30 s is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
import ssl
from dataclasses import dataclass
from http import HTTPStatus

import h11

from vmrt.config import StreamingConfig
from vmrt.errors import ConfigError, UnavailableError
from vmrt.streaming import upgrade
from vmrt.streaming.stream import PeerGoneError, SocketTransport
from vmrt.streaming.targets import AttachRequest, ExecRequest, PortForwardRequest, Request, Targets
from vmrt.streaming.tokens import Tokens

log = logging.getLogger(__name__)

_KINDS: dict[str, type] = {"exec": ExecRequest, "attach": AttachRequest, "portforward": PortForwardRequest}
_REQUEST_TIMEOUT_S = 30.0
_TLS_TIMEOUT_S = 30.0
_HEADER_BYTES = 16 * 1024
_MAX_CONNECTIONS = 2048
_STOP_GRACE_S = 5.0
# Below the default of asyncio: with what the kernel holds, a stream that nobody reads stays far below 1 MiB.
_WRITE_BUFFER_BYTES = 128 * 1024


class StreamServer:
    """One server: `open` once, `close` once."""

    def __init__(self, config: StreamingConfig, targets: Targets) -> None:
        self._config = config
        self._targets = targets
        self._tokens = Tokens()
        self._server: asyncio.Server | None = None
        self._base = ""
        self._stopping = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Listen. Raises `ConfigError` when that cannot be."""
        config = self._config
        tls = tls_context(config)
        try:
            self._server = await asyncio.start_server(
                self._connected,
                config.address,
                config.port,
                ssl=tls,
                ssl_handshake_timeout=_TLS_TIMEOUT_S if tls else None,
                limit=64 * 1024,
                start_serving=True,
            )
        except OSError as e:
            raise ConfigError(
                f"streaming: cannot listen: {e.strerror or e}", resource=f"{config.address} port {config.port}"
            ) from e
        port = self._server.sockets[0].getsockname()[1]
        self._base = f"{'https' if tls else 'http'}://{_authority(config.address)}:{port}"
        log.info("exec, attach and port-forward on %s", self._base)

    async def close(self) -> None:
        """Take no more clients, tell those there that the daemon stops, and drop them after a short while."""
        self._stopping.set()
        if self._server is not None:
            self._server.close()
        tasks = set(self._tasks)
        if tasks:
            await asyncio.wait(tasks, timeout=_STOP_GRACE_S)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    def url(self, request: Request) -> str:
        """Return a URL that serves this request once, within a minute. Raises `ExhaustedError`."""
        if self._server is None or self._stopping.is_set():
            raise UnavailableError("the streaming server is not running", phase="stream")
        kind = next(kind for kind, shape in _KINDS.items() if isinstance(request, shape))
        return f"{self._base}/{kind}/{self._tokens.add(request)}"

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        writer.transport.set_write_buffer_limits(_WRITE_BUFFER_BYTES)
        _keep_alive(writer)
        transport = SocketTransport(reader, writer)
        try:
            if len(self._tasks) > _MAX_CONNECTIONS:
                raise _Refused(HTTPStatus.SERVICE_UNAVAILABLE, "too many streaming connections", retry_after_s=60)
            await self._serve(transport)
        except _Refused as e:
            log.info("streaming: refused with %d: %s", e.status, e.text)
            with contextlib.suppress(PeerGoneError):
                await transport.write(e.response())
        except PeerGoneError:
            pass
        except asyncio.CancelledError:
            # Cancelled by `close` only, and asyncio logs a cancelled connection task as an error.
            pass
        except Exception:
            log.exception("streaming: internal error")
        finally:
            await transport.close()

    async def _serve(self, transport: SocketTransport) -> None:
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=_HEADER_BYTES)
        request = await _read_request(http, transport)
        headers = upgrade.Headers(request.headers)
        if request.method not in (b"GET", b"POST"):
            raise _Refused(HTTPStatus.METHOD_NOT_ALLOWED, "GET or POST", more=[("Allow", "GET, POST")])
        kind, token = _split(request.target)
        wanted = self._tokens.peek(token)
        if wanted is None or not isinstance(wanted, _KINDS[kind]):
            raise _Refused(HTTPStatus.NOT_FOUND, "no such session: a URL serves one request, within a minute")
        try:
            session = upgrade.negotiate(request, headers, wanted)
        except upgrade.NegotiationError as e:
            raise _Refused(e.status, str(e), more=e.headers) from e
        # Nothing has been awaited since `peek`: the token is still there.
        self._tokens.take(token)
        await transport.write(session.accept(http))
        leftover, _ = http.trailing_data
        transport.give_back(leftover)
        log.info("streaming: %s by %s", kind, session.name)
        await session.serve(transport, self._targets, wanted, self._stopping)


def _keep_alive(writer: asyncio.StreamWriter) -> None:
    """Have the kernel ask after a client that says nothing: sessions have no idle time-out, vanished clients do."""
    connection = writer.get_extra_info("socket")
    for level, option, value in (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
    ):
        with contextlib.suppress(OSError):
            connection.setsockopt(level, option, value)


@dataclass
class _Refused(Exception):
    """An HTTP answer that is no upgrade."""

    status: HTTPStatus
    text: str
    more: list[tuple[str, str]] | None = None
    retry_after_s: int = 0

    def response(self) -> bytes:
        body = f"{self.text}\n".encode()
        headers = [
            ("Content-Type", "text/plain; charset=utf-8"),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
            *(self.more or []),
        ]
        if self.retry_after_s:
            headers.append(("Retry-After", str(self.retry_after_s)))
        head = f"HTTP/1.1 {self.status.value} {self.status.phrase}\r\n"
        return (head + "".join(f"{name}: {value}\r\n" for name, value in headers) + "\r\n").encode("latin-1") + body


async def _read_request(http: h11.Connection, transport: SocketTransport) -> h11.Request:
    try:
        async with asyncio.timeout(_REQUEST_TIMEOUT_S):
            request = await _next_event(http, transport)
            if not isinstance(request, h11.Request):
                raise PeerGoneError("closed before a request")
            end = await _next_event(http, transport)
    except TimeoutError as e:
        raise _Refused(HTTPStatus.REQUEST_TIMEOUT, "no request in time") from e
    except h11.RemoteProtocolError as e:
        raise _Refused(HTTPStatus(e.error_status_hint), str(e)) from e
    if not isinstance(end, h11.EndOfMessage):
        raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "the request has a body")
    if sum(len(name) + len(value) for name, value in request.headers) + len(request.target) > _HEADER_BYTES:
        raise _Refused(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"more than {_HEADER_BYTES} octets of headers")
    return request


async def _next_event(http: h11.Connection, transport: SocketTransport) -> object:
    while (event := http.next_event()) is h11.NEED_DATA:
        http.receive_data(await transport.read())
    return event


def _split(target: bytes) -> tuple[str, str]:
    """Return (kind, token) of a request target. Raises `_Refused`."""
    path = target.decode("latin-1").partition("?")[0]
    parts = path.split("/")
    if len(parts) != 3 or parts[0] or parts[1] not in _KINDS:
        raise _Refused(HTTPStatus.NOT_FOUND, "there is /exec/TOKEN, /attach/TOKEN and /portforward/TOKEN")
    return parts[1], parts[2]


def _authority(address: str) -> str:
    """Return the host of the URLs: what the server listens on, or the loopback where that is every address."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    if ip.is_unspecified:
        ip = ipaddress.ip_address("127.0.0.1" if ip.version == 4 else "::1")
    return f"[{ip}]" if ip.version == 6 else str(ip)


def tls_context(config: StreamingConfig) -> ssl.SSLContext | None:
    """Return the server's TLS settings, None without a certificate. Raises `ConfigError`."""
    if not config.tls_cert:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(config.tls_cert, config.tls_key or None)
        if config.client_ca:
            context.load_verify_locations(config.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as e:
        raise ConfigError(f"streaming: cannot use the TLS files: {e}", resource=config.tls_cert) from e
    return context
