"""The agent's listeners: ttRPC calls on one port, streams on the other.

A thread accepts, one reads each connection, one runs each call. Everything is bounded: connections, calls at a time,
message lengths (by the decoder), the time that a send may wait for a host that does not read. A connection that breaks
the protocol is closed; nothing that arrives ends the agent.
"""

from __future__ import annotations

import _socket
import contextlib
import threading

from vmrt.agent import console, sockets, status, ttrpc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmrt.agent import agent_pb2 as pb

    Call = Callable[[pb.TtrpcRequest], bytes]

MAX_CALL_CONNECTIONS = 16
MAX_STREAMS = 1024
MAX_CALLS = 64
_READ = 65536
_SEND_TIMEOUT_S = 30


class CallConnection:
    """One ttRPC connection."""

    def __init__(self, connection: _socket.socket, call: Call, slots: threading.Semaphore) -> None:
        self._connection = connection
        self._call = call
        self._slots = slots
        self._decoder = ttrpc.ServerDecoder()
        self._send_lock = threading.Lock()

    def serve(self) -> None:
        """Serve it until the host closes it or breaks the protocol. Never raises."""
        try:
            while data := self._connection.recv(_READ):
                for message in self._decoder.feed(data):
                    self._dispatch(message)
        except ttrpc.ProtocolError as e:
            console.log(f"calls: {e}")
            if e.stream_id % 2:
                self._send(ttrpc.failure(e.stream_id, status.RESOURCE_EXHAUSTED, str(e)))
        except OSError:
            pass  # reset by the host
        finally:
            self.close()

    def close(self) -> None:
        """Close the connection; calls that run go on, their answers go nowhere."""
        # shutdown() first: it wakes a thread that is blocked in recv(), which close() does not.
        with contextlib.suppress(OSError):
            self._connection.shutdown(_socket.SHUT_RDWR)
        with self._send_lock, contextlib.suppress(OSError):
            self._connection.close()

    def _dispatch(self, message: ttrpc.Message) -> None:
        if not self._slots.acquire(blocking=False):
            text = f"the agent runs {MAX_CALLS} calls already"
            self._send(ttrpc.failure(message.stream_id, status.RESOURCE_EXHAUSTED, text))
            return
        try:
            threading.Thread(target=self._run, args=(message,), daemon=True).start()
        except RuntimeError as e:  # no memory for a thread
            self._slots.release()
            self._send(ttrpc.failure(message.stream_id, status.RESOURCE_EXHAUSTED, str(e)))

    def _run(self, message: ttrpc.Message) -> None:
        method = "?"
        try:
            envelope = ttrpc.parse_request(message)
            method = envelope.method[:100]
            answer = ttrpc.response(message.stream_id, self._call(envelope))
        except status.AgentError as e:
            answer = ttrpc.failure(message.stream_id, e.code, e.message)
        except Exception as e:
            import traceback

            where = traceback.extract_tb(e.__traceback__)[-1]
            console.log(f"{method}: {type(e).__name__}: {e} at {where.filename}:{where.lineno}")
            error = status.AgentError(status.INTERNAL, f"agent: {method}: {type(e).__name__}: {e}")
            answer = ttrpc.failure(message.stream_id, error.code, error.message)
        finally:
            self._slots.release()
        self._send(answer)

    def _send(self, data: bytes) -> None:
        with self._send_lock:
            try:
                sockets.send_all(self._connection, data, _SEND_TIMEOUT_S)
            except OSError:
                # Gone, or it has not read for _SEND_TIMEOUT_S: half a message makes the connection useless.
                with contextlib.suppress(OSError):
                    self._connection.shutdown(_socket.SHUT_RDWR)


class Acceptor:
    """Accepts on one listener and gives each connection of the host a thread."""

    def __init__(self, listener: _socket.socket, limit: int, *, trusted: Callable[[object], bool]) -> None:
        self._listener = listener
        self._limit = limit
        self._trusted = trusted
        self._lock = threading.Lock()
        self._open = 0

    def run(self, serve: Callable[[_socket.socket], None]) -> None:
        """Accept for ever. Raises `OSError` when the listener fails."""
        while True:
            try:
                connection, peer = sockets.accept(self._listener)
            except ConnectionError:
                continue  # it went away while it waited
            if not self._trusted(peer):
                console.log(f"refused a connection from {peer}: not the host")
                connection.close()
                continue
            with self._lock:
                admitted = self._open < self._limit
                self._open += admitted
            if not admitted:
                console.log(f"refused a connection: {self._limit} are open")
                connection.close()
                continue
            try:
                threading.Thread(target=self._serve, args=(connection, serve), daemon=True).start()
            except RuntimeError as e:
                console.log(f"refused a connection: {e}")
                connection.close()
                self._ended()

    def _serve(self, connection: _socket.socket, serve: Callable[[_socket.socket], None]) -> None:
        try:
            serve(connection)
        except Exception as e:
            console.log(f"connection: {type(e).__name__}: {e}")
            connection.close()
        finally:
            self._ended()

    def _ended(self) -> None:
        with self._lock:
            self._open -= 1


class CallServer:
    """All ttRPC connections; a new one over the limit ends the oldest, so that dead ones cannot lock the host out."""

    def __init__(self, call: Call, limit: int = MAX_CALL_CONNECTIONS) -> None:
        self._call = call
        self._limit = limit
        self._slots = threading.Semaphore(MAX_CALLS)
        self._lock = threading.Lock()
        self._connections: list[CallConnection] = []

    def serve(self, connection: _socket.socket) -> None:
        """Serve one connection to its end. Never raises."""
        mine = CallConnection(connection, self._call, self._slots)
        with self._lock:
            self._connections.append(mine)
            oldest = self._connections.pop(0) if len(self._connections) > self._limit else None
        if oldest is not None:
            console.log(f"calls: more than {self._limit} connections: the oldest is closed")
            oldest.close()
        try:
            mine.serve()
        finally:
            with self._lock:
                if mine in self._connections:
                    self._connections.remove(mine)
