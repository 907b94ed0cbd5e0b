"""Connections to the daemon's streaming server: WebSocket v5 for processes, SPDY/3.1 for ports, with or without TLS."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from urllib.parse import urlsplit

import h11
import wsproto
from wsproto import events
from wsproto.utilities import RemoteProtocolError

from vmrt.errors import ConfigError, UnavailableError
from vmrt.streaming import spdy
from vmrt.streaming.spdy_session import SpdySession
from vmrt.streaming.stream import PeerGoneError, SocketTransport
from vmrt.streaming.websocket import V5, WebSocket

_CONNECT_TIMEOUT_S = 30.0
# What servers answer to a WebSocket whose protocol they do not know: Bad Request, Forbidden, Upgrade Required.
_NOT_SPOKEN = (400, 403, 426)


@dataclass(frozen=True, slots=True)
class Tls:
    """Files for a streaming server with TLS: whom to trust ("" is the system's CAs), and what to show it."""

    ca: str = ""
    cert: str = ""
    key: str = ""

    def context(self) -> ssl.SSLContext:
        """Return the client's settings. Raises `ConfigError`."""
        try:
            context = ssl.create_default_context(cafile=self.ca or None)
            # On by default since Python 3.13; kubectl and other clients take CAs without a key identifier.
            context.verify_flags &= ~ssl.VERIFY_X509_STRICT
            if self.cert:
                context.load_cert_chain(self.cert, self.key or None)
        except (OSError, ssl.SSLError) as e:
            raise ConfigError(f"cannot use the TLS files: {e}", resource=self.cert or self.ca) from e
        return context


class NotSpokenError(UnavailableError):
    """The streaming server does not speak the protocol that was asked for; the URL is used up."""


async def _connected(url: str, tls: Tls) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    parts = urlsplit(url)
    context = tls.context() if parts.scheme == "https" else None
    try:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            return await asyncio.open_connection(parts.hostname, parts.port, ssl=context)
    except (OSError, TimeoutError) as e:
        raise UnavailableError(
            f"cannot connect: {e}", phase="stream", resource=f"{parts.scheme}://{parts.netloc}",
            hint="this has to run where the daemon's address can be reached, and to trust its certificate (--tls-ca)",
        ) from e  # fmt: skip


def _refused(status: int, body: bytes = b"") -> UnavailableError:
    return UnavailableError(
        f"the daemon's streaming server answered {status}: {body.decode(errors='replace').strip()}", phase="stream"
    )


@contextlib.asynccontextmanager
async def websocket(url: str, tls: Tls) -> AsyncIterator[WebSocket]:
    """Open a v5 session. Raises `VmrtError`."""
    reader, writer = await _connected(url, tls)
    transport = SocketTransport(reader, writer)
    connection = wsproto.WSConnection(wsproto.ConnectionType.CLIENT)
    parts = urlsplit(url)
    try:
        await transport.write(connection.send(events.Request(host=parts.netloc, target=parts.path, subprotocols=[V5])))
        while (answer := next(iter(connection.events()), None)) is None:
            if not (data := await transport.read()):
                raise UnavailableError("the daemon closed the connection", phase="stream")
            connection.receive_data(data)
        if isinstance(answer, events.RejectConnection):
            if answer.status_code in _NOT_SPOKEN:
                raise NotSpokenError(f"the streaming server does not speak {V5}: it answered {answer.status_code}")
            raise _refused(answer.status_code)
        yield WebSocket(transport, connection)
    except (PeerGoneError, RemoteProtocolError) as e:
        raise UnavailableError(f"the connection ended: {e}", phase="stream") from e
    finally:
        await transport.close()


@contextlib.asynccontextmanager
async def spdy_session(url: str, protocol: str, tls: Tls) -> AsyncIterator[SpdySession]:
    """Open a SPDY/3.1 session as a client. Raises `VmrtError`."""
    reader, writer = await _connected(url, tls)
    transport = SocketTransport(reader, writer)
    parts = urlsplit(url)
    http = h11.Connection(h11.CLIENT)
    headers = [("Host", parts.netloc), ("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1")]
    request = h11.Request(method="POST", target=parts.path, headers=[*headers, ("X-Stream-Protocol-Version", protocol)])
    reading = None
    try:
        await transport.write((http.send(request) or b"") + (http.send(h11.EndOfMessage()) or b""))
        while (answer := http.next_event()) is h11.NEED_DATA:
            http.receive_data(await transport.read())
        if not isinstance(answer, h11.InformationalResponse) or answer.status_code != 101:
            raise _refused(getattr(answer, "status_code", 0))
        transport.give_back(http.trailing_data[0])
        session = SpdySession(transport, spdy.Connection(client=True))
        reading = asyncio.create_task(session.run())
        yield session
    except (PeerGoneError, h11.ProtocolError) as e:
        raise UnavailableError(f"the connection ended: {e}", phase="stream") from e
    finally:
        if reading is not None:
            reading.cancel()
            await asyncio.wait([reading])
        await transport.close()
