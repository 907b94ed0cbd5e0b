"""The command line's end of the daemon's socket: typed stubs, one place where gRPC's errors become ours.

A call that is interrupted (Ctrl-C, SIGTERM) is cancelled before the interruption goes on, so that the daemon rolls back
what it was doing. The main thread never waits inside grpc, where an exception out of a signal handler could leave a
lock held: it waits for an event or a queue of ours, and calls `checkpoint` meanwhile.

Whether a daemon is there at all is asked of the socket itself first: connect(2) says exactly why not (absent, nobody
listening, not allowed), gRPC only that it is unavailable.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vmrt.cli.app import Options
from vmrt.errors import Code, InvalidArgumentError, UnavailableError, VmrtError

if TYPE_CHECKING:
    import grpc

    from vmrt.proto.runtime.v1 import api_pb2, api_pb2_grpc
    from vmrt.proto.vmrt.v1 import control_pb2_grpc

Request = TypeVar("Request")
Response = TypeVar("Response")

# Kubelet's limit (cri-client), and what the daemon keeps its replies under.
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
# How long a signal may go unnoticed.
CHECKPOINT_INTERVAL_S = 0.1


class DaemonError(VmrtError):
    """The daemon answered a call with an error; `code` is the gRPC status, the message is the daemon's own."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code


def socket_path(given: str) -> Path:
    """Return the path of the daemon's socket: what was given, else the configuration's, else the default."""
    from vmrt.config import DEFAULT_FILE, DEFAULT_SOCKET, SOCKET_PATH_LIMIT

    if given:
        path = Path(given.removeprefix("unix://"))
        if "://" in given.removeprefix("unix://"):
            raise InvalidArgumentError(f"--socket takes a path or unix:///PATH, not {given!r}")
    elif DEFAULT_FILE.parent.is_dir():
        from vmrt.config import load
        from vmrt.errors import ConfigError

        # A broken or unreadable configuration is the daemon's to report; the default socket may still answer.
        path = DEFAULT_SOCKET
        with contextlib.suppress(ConfigError):
            path = load().socket_path
    else:
        path = DEFAULT_SOCKET
    # connect(2) takes relative paths, gRPC's resolver only absolute ones.
    path = path.absolute()
    if len(os.fsencode(path)) > SOCKET_PATH_LIMIT:
        raise InvalidArgumentError(
            f"socket path is {len(os.fsencode(path))} octets long, the kernel takes at most {SOCKET_PATH_LIMIT}",
            resource=str(path),
        )
    return path


def check_listening(path: Path) -> None:
    """Raise `UnavailableError`, saying why and what to do, unless somebody listens on the socket."""
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    probe.settimeout(5)
    start = "start it with `sudo vmrt serve`, or name another socket with --socket or $VMRT_SOCKET"
    try:
        probe.connect(str(path))
    except FileNotFoundError as e:
        raise UnavailableError(f"no daemon on {path}: there is no such socket", hint=start) from e
    except ConnectionRefusedError as e:
        raise UnavailableError(f"no daemon on {path}: nobody listens on that socket", hint=start) from e
    except PermissionError as e:
        raise UnavailableError(f"not allowed to use {path}", hint="run as root, e.g. with sudo") from e
    except OSError as e:
        raise UnavailableError(f"cannot connect to {path}: {e.strerror or e}", hint=start) from e
    finally:
        probe.close()


class Daemon:
    """A connection to the daemon. Use as a context manager.

    Every call raises `VmrtError`, or what `checkpoint` raises: that is called before and, ten times a second, during
    each call, which is cancelled when it raises.
    """

    def __init__(self, options: Options, checkpoint: Callable[[], None] = lambda: None) -> None:
        self._checkpoint = checkpoint
        self.path = socket_path(options.socket)
        self.timeout_s = options.timeout_s
        check_listening(self.path)
        # gRPC's C core writes notices of its own to stderr; a command line must not.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        import grpc

        from vmrt.proto.runtime.v1 import api_pb2_grpc
        from vmrt.proto.vmrt.v1 import control_pb2_grpc

        self._grpc = grpc
        self._channel = grpc.insecure_channel(
            f"unix://{self.path}",
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES * 2),
                ("grpc.default_authority", "localhost"),
                # A daemon that is restarted is back within seconds.
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 1000),
            ],
        )
        self.runtime: api_pb2_grpc.RuntimeServiceStub = api_pb2_grpc.RuntimeServiceStub(self._channel)
        self.images: api_pb2_grpc.ImageServiceStub = api_pb2_grpc.ImageServiceStub(self._channel)
        self.control: control_pb2_grpc.ControlStub = control_pb2_grpc.ControlStub(self._channel)

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def call(
        self,
        method: grpc.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        *,
        timeout_s: float | None = -1,
    ) -> Response:
        """Make one call. `timeout_s` -1 takes --timeout, None waits for ever. Raises `DaemonError`."""
        limit = self.timeout_s if timeout_s == -1 else timeout_s
        return self.call_all(method, [request], timeout_s=limit)[0]

    def call_all(
        self,
        method: grpc.UnaryUnaryMultiCallable[Request, Response],
        requests: Sequence[Request],
        *,
        timeout_s: float | None,
    ) -> list[Response]:
        """Make the same call several times side by side; raise the first error once all have ended."""
        self._checkpoint()
        futures = [method.future(request, timeout=timeout_s) for request in requests]
        try:
            for future in futures:
                self._wait(future)
        except BaseException:
            for future in futures:
                future.cancel()
            raise
        for future in futures:
            error = future.exception()
            if isinstance(error, self._grpc.RpcError):
                raise self._translated(error) from error
        return [future.result() for future in futures]

    def _wait(self, future: grpc.Future[Response]) -> None:
        done = threading.Event()
        future.add_done_callback(lambda _: done.set())
        while not done.wait(CHECKPOINT_INTERVAL_S):
            self._checkpoint()

    def stream(self, method: grpc.UnaryStreamMultiCallable[Request, Response], request: Request) -> Iterator[Response]:
        """Yield what a streaming call sends, without a time limit; leaving the loop cancels it."""
        answers = method(request)
        arrived: queue.SimpleQueue[Response | BaseException | None] = queue.SimpleQueue()

        def receive() -> None:
            try:
                for answer in answers:
                    arrived.put(answer)
                arrived.put(None)
            except BaseException as e:
                arrived.put(e)

        threading.Thread(target=receive, daemon=True).start()
        try:
            while True:
                self._checkpoint()
                try:
                    answer = arrived.get(timeout=CHECKPOINT_INTERVAL_S)
                except queue.Empty:
                    continue
                if answer is None:
                    return
                if isinstance(answer, self._grpc.RpcError):
                    raise self._translated(answer) from answer
                if isinstance(answer, BaseException):
                    raise answer
                yield answer
        finally:
            answers.cancel()

    def _translated(self, error: Any) -> VmrtError:
        status: grpc.StatusCode = error.code()
        number: int = status.value[0]
        code = Code(number) if number in Code.__members__.values() else Code.UNKNOWN
        details = (error.details() or "").strip()
        if code is Code.UNAVAILABLE:
            # The daemon's own word, if it is there to say one; else the socket's, which is clearer than gRPC's.
            try:
                check_listening(self.path)
            except UnavailableError as e:
                return e
        if code is Code.DEADLINE_EXCEEDED and details.lower() in ("deadline exceeded", ""):
            details = f"the daemon did not answer within {self.timeout_s:g} s (see --timeout)"
        if code is Code.UNIMPLEMENTED and not details:
            details = f"the daemon on {self.path} does not implement this call"
        return DaemonError(code, details or status.name.lower().replace("_", " "))


def pods_of(daemon: Daemon) -> list[api_pb2.PodSandbox]:
    """Return all pods, newest first."""
    from vmrt.proto.runtime.v1 import api_pb2

    answer = daemon.call(daemon.runtime.ListPodSandbox, api_pb2.ListPodSandboxRequest())
    return sorted(answer.items, key=lambda pod: (-pod.created_at, pod.id))


def containers_of(daemon: Daemon) -> list[api_pb2.Container]:
    """Return all containers, newest first."""
    from vmrt.proto.runtime.v1 import api_pb2

    answer = daemon.call(daemon.runtime.ListContainers, api_pb2.ListContainersRequest())
    return sorted(answer.containers, key=lambda container: (-container.created_at, container.id))
