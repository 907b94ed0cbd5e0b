"""WebSocket sessions: the channel protocols of exec, attach and port-forward, and SPDY carried in messages.

A message is one octet, the channel, and the octets of that channel; in the base64 variants both are text, the channel
a digit. v5.channel.k8s.io adds a half-close: a message of 255 and the channel that has ended. In the tunnel
(SPDY/3.1+portforward.k8s.io) the messages, end to end, are a SPDY connection.

wsproto does the framing. Messages are handed on in pieces as they arrive, so that their length needs no bound.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import logging
from collections.abc import AsyncIterator, Iterable

import wsproto
from wsproto import events
from wsproto.utilities import LocalProtocolError

from vmrt.streaming.stream import Budget, Inbox, PeerGoneError, Transport, watch

log = logging.getLogger(__name__)

V5 = "v5.channel.k8s.io"
TUNNEL = "SPDY/3.1+portforward.k8s.io"
# "" is what a client gets that names no protocol.
REMOTECOMMAND = (V5, "v4.channel.k8s.io", "v4.base64.channel.k8s.io", "channel.k8s.io", "base64.channel.k8s.io", "")
PORTFORWARD = (TUNNEL, "v4.channel.k8s.io", "v4.base64.channel.k8s.io")

STDIN, STDOUT, STDERR, ERROR, RESIZE = range(5)
_CLOSE = 255
_NORMAL, _PROTOCOL_ERROR = 1000, 1002
# Of the codes for private use (RFC 6455, 7.4.2): the client goes away, and an exec's process is to go on.
DETACHED = 4001


class WebSocket:
    """An open WebSocket over a transport, either role."""

    def __init__(self, transport: Transport, connection: wsproto.WSConnection) -> None:
        self._transport = transport
        self._connection = connection
        self._close_sent = False
        self.close_code = 0  # the peer's, once it has closed

    async def messages(self) -> AsyncIterator[tuple[bytes | str, bool]]:
        """Yield (piece of a message, whether it is the last one) until the connection ends. Pings are answered."""
        while True:
            for event in self._connection.events():
                if isinstance(event, events.BytesMessage | events.TextMessage):
                    data = event.data
                    yield data if isinstance(data, str) else bytes(data), event.message_finished
                elif isinstance(event, events.Ping):
                    await self._send(event.response())
                elif isinstance(event, events.CloseConnection):
                    self.close_code = event.code
                    if not self._close_sent:
                        self._close_sent = True
                        with contextlib.suppress(PeerGoneError):
                            await self._send(event.response())
                    return
            data = await self._transport.read()
            if not data:
                return
            try:
                self._connection.receive_data(data)
            except LocalProtocolError:
                return  # closed by both ends

    async def send(self, data: bytes | str) -> None:
        """Send one message, waiting while the client takes none. Raises `PeerGoneError`."""
        message = events.TextMessage(data=data) if isinstance(data, str) else events.BytesMessage(data=data)
        await self._send(message)

    async def hung_up(self) -> None:
        """Wait until the client has closed its end, read or not."""
        await self._transport.hung_up()

    async def ping(self) -> None:
        """Ask for a sign of life. Raises `PeerGoneError`."""
        await self._send(events.Ping())

    async def close(self, code: int = _NORMAL, reason: str = "") -> None:
        """Begin the closing handshake; `messages` sees its end. Harmless when the connection has gone."""
        if not self._close_sent:
            self._close_sent = True
            with contextlib.suppress(PeerGoneError):
                await self._send(events.CloseConnection(code=code, reason=reason))

    async def _send(self, event: events.Event) -> None:
        try:
            data = self._connection.send(event)
        except LocalProtocolError as e:
            raise PeerGoneError("the WebSocket is closed") from e
        await self._transport.write(data)


class Channel:
    """One channel of a session."""

    def __init__(self, session: ChannelSession, number: int) -> None:
        self.number = number
        self.inbox = Inbox(session.budget)
        self._session = session

    async def read(self) -> bytes:
        """Return the next octets."""
        return await self.inbox.get()

    async def write(self, data: bytes) -> None:
        """Send octets as one message."""
        if data:
            await self._session.send(self.number, data)

    async def close(self) -> None:
        """Do nothing: no protocol has a way to say it to a client but the end of the session."""

    async def reset(self) -> None:
        """Take no more."""
        await self.inbox.discard()


class ChannelSession:
    """A WebSocket whose messages belong to channels. `run` reads it to its end; `gone` is set then."""

    def __init__(self, socket: WebSocket, protocol: str, channels: Iterable[int], readable: Iterable[int]) -> None:
        """`readable` are those of the channels that the client may write to; others' data are thrown away."""
        self._socket = socket
        self._half_close = protocol == V5
        self._text = "base64" in protocol
        self.budget = Budget()
        self.channels = {number: Channel(self, number) for number in channels}
        self._readable = frozenset(readable)
        self.gone = asyncio.Event()

    @property
    def detached(self) -> bool:
        """Whether the client has gone and wants the process to go on."""
        return self._socket.close_code == DETACHED

    async def run(self) -> None:
        """Serve what the client sends until its end. Never raises but for cancellation."""
        decoder = _TextMessage() if self._text else _BinaryMessage()
        watching = asyncio.create_task(watch(self._socket, self.gone))
        try:
            async for piece, last in self._socket.messages():
                for channel, data in decoder.feed(piece, last):
                    await self._deliver(channel, data)
        except _MessageError as e:
            log.info("WebSocket: the client broke the protocol: %s", e)
            await self._socket.close(_PROTOCOL_ERROR, str(e))
        except PeerGoneError:
            pass
        finally:
            watching.cancel()
            self.gone.set()
            for each in self.channels.values():
                await each.inbox.end(reset=True)

    async def _deliver(self, number: int, data: bytes) -> None:
        if self._half_close and number == _CLOSE:
            for closed in data:
                if closed in self._readable and closed in self.channels:
                    await self.channels[closed].inbox.end()
        elif number in self._readable and number in self.channels:
            await self.channels[number].inbox.put(data)

    async def send(self, number: int, data: bytes) -> None:
        """Send one message on a channel. Raises `PeerGoneError`."""
        if self._text:
            await self._socket.send(f"{number}{base64.b64encode(data).decode()}")
        else:
            await self._socket.send(bytes([number]) + data)

    async def finish(self, linger_s: float) -> None:
        """End the session with a normal close, and wait `linger_s` for the client's."""
        for channel in self.channels.values():
            await channel.inbox.discard()
        await self._socket.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(linger_s):
                await self.gone.wait()


class _MessageError(Exception):
    """A message that the subprotocol does not have."""


class _BinaryMessage:
    """Binary messages in pieces: the first octet of each message is its channel."""

    def __init__(self) -> None:
        self._channel: int | None = None

    def feed(self, piece: bytes | str, last: bool) -> Iterable[tuple[int, bytes]]:
        if isinstance(piece, str):
            raise _MessageError("text where binary messages are due")
        found = []
        if self._channel is None and piece:
            self._channel, piece = piece[0], piece[1:]
        if self._channel is not None and piece:
            found.append((self._channel, piece))
        if last:
            self._channel = None
        return found


class _TextMessage:
    """Text messages in pieces: a digit, then base64 (RFC 4648, padded or not) in groups of four characters."""

    def __init__(self) -> None:
        self._channel: int | None = None
        self._rest = ""

    def feed(self, piece: bytes | str, last: bool) -> Iterable[tuple[int, bytes]]:
        text = piece if isinstance(piece, str) else piece.decode("ascii", "replace")
        if self._channel is None and text:
            if not "0" <= text[0] <= "9":
                raise _MessageError("a message that begins with no channel")
            self._channel, text = int(text[0]), text[1:]
        text = self._rest + text
        whole = len(text) if last else len(text) // 4 * 4
        text, self._rest = text[:whole], text[whole:]
        found = []
        if self._channel is not None and text:
            try:
                data = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
            except (binascii.Error, ValueError) as e:
                raise _MessageError("a message that is no base64") from e
            found.append((self._channel, data))
        if last:
            self._channel = None
            self._rest = ""
        return found


class TunnelTransport:
    """A WebSocket's binary messages as one byte stream."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket
        self._messages = socket.messages()

    async def read(self) -> bytes:
        """Return the next octets."""
        try:
            async for piece, _ in self._messages:
                if isinstance(piece, str):
                    await self._socket.close(_PROTOCOL_ERROR, "text where binary messages are due")
                    return b""
                if piece:
                    return piece
        except PeerGoneError:
            pass
        return b""

    async def write(self, data: bytes) -> None:
        """Send octets."""
        await self._socket.send(data)

    async def close(self) -> None:
        """Begin the closing handshake."""
        await self._socket.close()

    async def hung_up(self) -> None:
        """Wait until the client has closed its end, read or not."""
        await self._socket.hung_up()
