"""From an HTTP request to a session: which protocol both ends speak, the answer to the upgrade, and who serves it.

SPDY clients offer versions in X-Stream-Protocol-Version, WebSocket clients in Sec-WebSocket-Protocol; the first one
offered that is ours is taken. v5 exists for WebSockets only: over SPDY it would be the same as v4.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Protocol
from urllib.parse import parse_qs

import h11
import wsproto
from wsproto import events
from wsproto.utilities import RemoteProtocolError

from vmrt.streaming import portforward, remotecommand, websocket
from vmrt.streaming.spdy_session import SpdySession, SpdyStream
from vmrt.streaming.stream import PeerGoneError, Transport
from vmrt.streaming.targets import AttachRequest, ExecRequest, PortForwardRequest, Request, Targets

SPDY = "SPDY/3.1"
PROTOCOL_HEADER = "X-Stream-Protocol-Version"
SPDY_REMOTECOMMAND = ("v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io")
SPDY_PORTFORWARD = ("portforward.k8s.io",)

STREAMS_TIMEOUT_S = 30.0
LINGER_S = 10.0
_STOPPING_LINGER_S = 2.0
_MAX_PORTS = 128


class NegotiationError(Exception):
    """No session can come of this request."""

    def __init__(self, status: HTTPStatus, text: str, headers: list[tuple[str, str]] | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.headers = headers or []


class Headers:
    """A request's headers by name."""

    def __init__(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        self._values: dict[bytes, list[str]] = {}
        for name, value in headers:
            self._values.setdefault(name.lower(), []).append(value.decode("latin-1"))

    def words(self, name: str) -> list[str]:
        """Return the comma-separated words of all headers of this name."""
        values = self._values.get(name.lower().encode(), [])
        return [word.strip() for value in values for word in value.split(",") if word.strip()]


class Session(Protocol):
    """What a request has become."""

    name: str

    def accept(self, http: h11.Connection) -> bytes:
        """Return the answer that switches protocols."""
        ...

    async def serve(self, transport: Transport, targets: Targets, request: Request, stopping: asyncio.Event) -> None:
        """Serve to the end."""
        ...


def negotiate(request: h11.Request, headers: Headers, wanted: Request) -> Session:
    """Choose the protocol. Raises `NegotiationError`."""
    upgrades = [word.lower() for word in headers.words("Upgrade")]
    if "upgrade" not in [word.lower() for word in headers.words("Connection")] or not upgrades:
        raise NegotiationError(HTTPStatus.BAD_REQUEST, f"an upgrade to {SPDY} or websocket has to be asked for")
    if "websocket" in upgrades:
        return _negotiate_websocket(request, headers, wanted)
    if SPDY.lower() not in upgrades:
        raise NegotiationError(HTTPStatus.BAD_REQUEST, f"neither {SPDY} nor websocket is among the upgrades")
    offered = headers.words(PROTOCOL_HEADER)
    ours = SPDY_PORTFORWARD if isinstance(wanted, PortForwardRequest) else SPDY_REMOTECOMMAND
    if not offered:
        raise NegotiationError(HTTPStatus.BAD_REQUEST, f"the header {PROTOCOL_HEADER} is missing")
    chosen = next((each for each in offered if each in ours), None)
    if chosen is None:
        raise NegotiationError(
            HTTPStatus.FORBIDDEN,
            f"none of the protocols that are offered is one of {', '.join(ours)}",
            [("X-Accepted-Stream-Protocol-Versions", each) for each in ours],
        )
    return SpdyUpgrade(chosen)


def _negotiate_websocket(request: h11.Request, headers: Headers, wanted: Request) -> Session:
    if request.method != b"GET":
        raise NegotiationError(HTTPStatus.METHOD_NOT_ALLOWED, "a WebSocket begins with GET", [("Allow", "GET")])
    connection = wsproto.WSConnection(wsproto.ConnectionType.SERVER)
    try:
        connection.initiate_upgrade_connection(list(request.headers), request.target)
        asked = next(iter(connection.events()), None)
    except (RemoteProtocolError, h11.ProtocolError, UnicodeError) as e:
        raise NegotiationError(HTTPStatus.BAD_REQUEST, f"no WebSocket handshake: {e}") from e
    if not isinstance(asked, events.Request):
        raise NegotiationError(HTTPStatus.BAD_REQUEST, "no WebSocket handshake")
    ours = websocket.PORTFORWARD if isinstance(wanted, PortForwardRequest) else websocket.REMOTECOMMAND
    offered = headers.words("Sec-WebSocket-Protocol")
    chosen = next((each for each in offered if each in ours), None)
    if chosen is None and (offered or "" not in ours):
        raise NegotiationError(
            HTTPStatus.BAD_REQUEST, f"no Sec-WebSocket-Protocol among {', '.join(each for each in ours if each)}"
        )
    query = request.target.decode("latin-1").partition("?")[2]
    ports: tuple[int, ...] = ()
    if isinstance(wanted, PortForwardRequest) and chosen != websocket.TUNNEL:
        ports = wanted.ports or _ports(query)
    return WebSocketUpgrade(connection, chosen or "", ports)


def _ports(query: str) -> tuple[int, ...]:
    """Return the ports of `?port=80&port=81,82`. Raises `NegotiationError`."""
    try:
        texts = [
            text for value in parse_qs(query, max_num_fields=_MAX_PORTS).get("port", []) for text in value.split(",")
        ]
        ports = tuple(int(text) for text in texts)
    except ValueError as e:
        raise NegotiationError(HTTPStatus.BAD_REQUEST, "the query's port is no number") from e
    if not ports or len(ports) > _MAX_PORTS or not all(0 < port < 65536 for port in ports):
        raise NegotiationError(HTTPStatus.BAD_REQUEST, "the query has to name ports: ?port=80")
    return ports


@dataclass
class SpdyUpgrade:
    """A SPDY/3.1 session."""

    protocol: str
    name: str = field(init=False)

    def __post_init__(self) -> None:
        """Name it for the log."""
        self.name = f"{SPDY} {self.protocol}"

    def accept(self, http: h11.Connection) -> bytes:
        """Return the 101."""
        headers = [("Connection", "Upgrade"), ("Upgrade", SPDY), (PROTOCOL_HEADER, self.protocol)]
        return http.send(h11.InformationalResponse(status_code=101, headers=headers)) or b""

    async def serve(self, transport: Transport, targets: Targets, request: Request, stopping: asyncio.Event) -> None:
        """Serve to the end."""
        session = SpdySession(transport)
        if isinstance(request, PortForwardRequest):
            await serve_portforward(session, targets, request, stopping)
            return
        reading = asyncio.create_task(session.run())
        try:
            streams = await _spdy_streams(session, request, self.protocol)
            await remotecommand.serve(
                targets,
                request,
                streams,
                status_json=self.protocol == SPDY_REMOTECOMMAND[0],
                gone=session.gone,
                stopping=stopping,
            )
            await session.finish(_linger_s(stopping))
        except PeerGoneError:
            pass
        finally:
            await _end(reading)


@dataclass
class WebSocketUpgrade:
    """A WebSocket session."""

    connection: wsproto.WSConnection
    protocol: str
    ports: tuple[int, ...] = ()
    name: str = field(init=False)

    def __post_init__(self) -> None:
        """Name it for the log."""
        self.name = f"WebSocket {self.protocol}"

    def accept(self, http: h11.Connection) -> bytes:
        """Return the 101."""
        answer = self.connection.send(events.AcceptConnection(subprotocol=self.protocol or None))
        # The HTTP connection that read the request has to know too, so that it gives back what came behind it.
        http.send(h11.InformationalResponse(status_code=101, headers=[]))
        return answer

    async def serve(self, transport: Transport, targets: Targets, request: Request, stopping: asyncio.Event) -> None:
        """Serve to the end."""
        socket = websocket.WebSocket(transport, self.connection)
        if not isinstance(request, PortForwardRequest):
            await self._remotecommand(socket, targets, request, stopping)
        elif self.protocol == websocket.TUNNEL:
            tunnel = websocket.TunnelTransport(socket)
            await serve_portforward(SpdySession(tunnel), targets, request, stopping)
            await tunnel.close()
        else:
            await self._portforward(socket, targets, request, stopping)

    async def _remotecommand(
        self,
        socket: websocket.WebSocket,
        targets: Targets,
        request: ExecRequest | AttachRequest,
        stopping: asyncio.Event,
    ) -> None:
        wanted = {
            websocket.STDIN: request.stdin,
            websocket.STDOUT: request.stdout,
            websocket.STDERR: request.stderr and not request.tty,
            websocket.ERROR: True,
            websocket.RESIZE: request.tty,
        }
        numbers = [number for number, wished in wanted.items() if wished]
        session = websocket.ChannelSession(socket, self.protocol, numbers, readable=(websocket.STDIN, websocket.RESIZE))
        get = session.channels.get
        streams = remotecommand.ProcessStreams(
            error=session.channels[websocket.ERROR],
            stdin=get(websocket.STDIN),
            stdout=get(websocket.STDOUT),
            stderr=get(websocket.STDERR),
            resize=get(websocket.RESIZE),
        )
        reading = asyncio.create_task(session.run())
        try:
            await remotecommand.serve(
                targets,
                request,
                streams,
                status_json=self.protocol.startswith(("v4.", "v5.")),
                gone=session.gone,
                stopping=stopping,
                # Clients wait for a first message to know that the session is there.
                opened=lambda: session.send(min(set(numbers) - {websocket.STDIN}), b""),
                kept=lambda: session.detached,
            )
            await session.finish(_linger_s(stopping))
        except PeerGoneError:
            pass
        finally:
            await _end(reading)

    async def _portforward(
        self, socket: websocket.WebSocket, targets: Targets, request: PortForwardRequest, stopping: asyncio.Event
    ) -> None:
        """Serve data on channel 2n, errors on 2n + 1 for the nth port; each begins with the port, little endian."""
        numbers = range(2 * len(self.ports))
        session = websocket.ChannelSession(socket, self.protocol, numbers, readable=numbers[::2])
        reading = asyncio.create_task(session.run())
        ends = [asyncio.create_task(event.wait()) for event in (session.gone, stopping)]
        forwards = []
        try:
            for index, port in enumerate(self.ports):
                for number in (2 * index, 2 * index + 1):
                    await session.send(number, port.to_bytes(2, "little"))
            for index, port in enumerate(self.ports):
                data, error = session.channels[2 * index], session.channels[2 * index + 1]
                work = portforward.forward(targets, request.sandbox_id, port, data, error)
                forwards.append(asyncio.create_task(work))
            every = asyncio.create_task(_all(forwards))
            await asyncio.wait([every, *ends], return_when=asyncio.FIRST_COMPLETED)
            await _end(every, *forwards)
            await session.finish(_linger_s(stopping))
        except PeerGoneError:
            pass
        finally:
            await _end(reading, *ends, *forwards)


async def serve_portforward(
    session: SpdySession, targets: Targets, request: PortForwardRequest, stopping: asyncio.Event
) -> None:
    """Serve a SPDY session of port-forward pairs to its end."""
    reading = asyncio.create_task(session.run())
    try:
        await portforward.SpdyPortForward(targets, request.sandbox_id, session).serve(stopping)
        await session.finish(_linger_s(stopping))
    finally:
        await _end(reading)


async def _spdy_streams(
    session: SpdySession, request: ExecRequest | AttachRequest, protocol: str
) -> remotecommand.ProcessStreams:
    """Accept the streams that this request has. Raises `PeerGoneError`, also when they do not come in time."""
    wanted = {"error"}
    wanted |= {kind for kind in ("stdin", "stdout", "stderr") if getattr(request, kind)}
    if request.tty:
        wanted.discard("stderr")
        if protocol in ("v4.channel.k8s.io", "v3.channel.k8s.io"):
            wanted.add("resize")
    found: dict[str, SpdyStream] = {}
    gone = asyncio.create_task(session.gone.wait())
    try:
        async with asyncio.timeout(STREAMS_TIMEOUT_S):
            while wanted - found.keys():
                coming = asyncio.create_task(session.accept())
                try:
                    await asyncio.wait([coming, gone], return_when=asyncio.FIRST_COMPLETED)
                    if not coming.done():
                        raise PeerGoneError("the client has gone")
                    stream = coming.result()
                finally:
                    coming.cancel()
                kind = stream.headers.get("streamtype", "")
                if kind not in wanted or kind in found:
                    await stream.reset()
                    continue
                await session.reply(stream)
                found[kind] = stream
    except TimeoutError as e:
        text = f"the streams {sorted(wanted - found.keys())} did not come within {STREAMS_TIMEOUT_S:g} s"
        if (error := found.get("error")) is not None:
            status = json.dumps(remotecommand.failure(text)) if protocol == SPDY_REMOTECOMMAND[0] else text
            await error.write(status.encode())
            await error.close()
        raise PeerGoneError(text) from e
    finally:
        gone.cancel()
    return remotecommand.ProcessStreams(**found)


async def _all(tasks: Iterable[asyncio.Task[None]]) -> None:
    await asyncio.wait(set(tasks))


async def _end(*tasks: asyncio.Task[None] | asyncio.Task[bool]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


def _linger_s(stopping: asyncio.Event) -> float:
    return _STOPPING_LINGER_S if stopping.is_set() else LINGER_S
