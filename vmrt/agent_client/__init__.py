"""The host's end of the agent protocol (proto/agent.proto): calls over ttRPC, streams over connections of their own.

Everything that the guest sends is hostile until checked: frames and messages are bounded by the decoders, types by the
frame's direction, texts are made printable, numbers are checked where they are used. Rules:

- one ttRPC connection, made on the first call and again after it broke; calls on it run at the same time;
- every call has a time limit; a call whose connection breaks fails with `UnavailableError`: whether it took effect is
  for the caller to find out (`list_containers`), so nothing is sent twice here;
- after `close`, and when dialling raises it, everything fails at once with `VmGoneError`.

Cancelling a call leaves it running in the guest; its answer is thrown away. Cancelling a stream closes it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from vmrt import errors
from vmrt.agent import agent_pb2 as pb
from vmrt.agent import layout, status
from vmrt.agent_client.calls import Calls, translate
from vmrt.agent_client.streams import DialSession, OutputSession, Session, Stream

__all__ = ["AgentClient", "Connection", "Dial", "DialSession", "OutputSession", "Session"]

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Dial = Callable[[int], Awaitable[Connection]]
M = TypeVar("M", bound=Message)

DEFAULT_TIMEOUT_S = 30.0


class AgentClient:
    """The agent of one VM. `dial` opens a connection to a port of that VM and may raise `VmrtError`s."""

    def __init__(self, dial: Dial, vm_id: str) -> None:
        self._dial = dial
        self.resource = f"VM {vm_id}"
        self._calls: Calls | None = None
        self._connecting = asyncio.Lock()
        self._streams: set[Stream] = set()
        self._closed = False

    async def close(self) -> None:
        """Close every connection; what waits fails with `VmGoneError`, and so does what comes."""
        self._closed = True
        for stream in list(self._streams):
            self.forget(stream)
            stream.close()
        if self._calls is not None:
            await self._calls.close("the VM is going away", errors.VmGoneError)

    # --- calls --------------------------------------------------------------------------------------------------------

    async def check(self, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> pb.CheckResponse:
        """Say who answers. Raises `AgentError` when the agent speaks another protocol number."""
        answer = await self._call("Check", pb.CheckRequest(), pb.CheckResponse, timeout_s)
        if answer.protocol != layout.PROTOCOL_VERSION:
            raise errors.AgentError(
                f"the guest's agent speaks protocol {answer.protocol}, this daemon {layout.PROTOCOL_VERSION}",
                phase="agent check",
                resource=self.resource,
                hint="build the guest image with this version: vmrt guest build",
            )
        return answer

    async def rehearse(self, *, timeout_s: float) -> None:
        """Have a guest without a pod do what its first pod would be the first to do. Raises for what it would leave."""
        await self._call("Rehearse", pb.RehearseRequest(), pb.RehearseResponse, timeout_s)

    async def configure_sandbox(
        self, request: pb.ConfigureSandboxRequest, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> pb.ConfigureSandboxResponse:
        """Make the guest one pod's."""
        return await self._call("ConfigureSandbox", request, pb.ConfigureSandboxResponse, timeout_s)

    async def create_container(
        self, request: pb.CreateContainerRequest, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> pb.CreateContainerResponse:
        """Make a container, all or nothing. A command or user that the image lacks is `InvalidArgumentError`."""
        return await self._call("CreateContainer", request, pb.CreateContainerResponse, timeout_s)

    async def start_container(self, container_id: str, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Run a created container's command."""
        request = pb.StartContainerRequest(container_id=container_id)
        await self._call("StartContainer", request, pb.StartContainerResponse, timeout_s)

    async def signal_container(
        self, container_id: str, number: int, everyone: bool = False, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> None:
        """Signal the main process, or every process; a container that has exited is no error."""
        request = pb.SignalContainerRequest(container_id=container_id, signal=number, all=everyone)
        await self._call("SignalContainer", request, pb.SignalContainerResponse, timeout_s)

    async def remove_container(self, container_id: str, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Kill and remove a container; an absent one is no error."""
        request = pb.RemoveContainerRequest(container_id=container_id)
        await self._call("RemoveContainer", request, pb.RemoveContainerResponse, timeout_s)

    async def list_containers(self, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> pb.ListContainersResponse:
        """List all containers with the number of the last event."""
        return await self._call("ListContainers", pb.ListContainersRequest(), pb.ListContainersResponse, timeout_s)

    async def container_stats(
        self, container_ids: Sequence[str] = (), *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> pb.ContainerStatsResponse:
        """Tell what containers (all without ids) use."""
        request = pb.ContainerStatsRequest(container_ids=container_ids)
        return await self._call("ContainerStats", request, pb.ContainerStatsResponse, timeout_s)

    async def update_container(
        self, container_id: str, oci_resources: bytes, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> None:
        """Change a container's limits (OCI LinuxResources, JSON)."""
        request = pb.UpdateContainerRequest(container_id=container_id, oci_resources=oci_resources)
        await self._call("UpdateContainer", request, pb.UpdateContainerResponse, timeout_s)

    async def make_volume(self, request: pb.MakeVolumeRequest, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Make a volume in the guest; one that is there stays as it is."""
        await self._call("MakeVolume", request, pb.MakeVolumeResponse, timeout_s)

    async def release_volume(self, name: str, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Write back and unmount a volume on a disk; one that is not there is no error."""
        await self._call("ReleaseVolume", pb.ReleaseVolumeRequest(name=name), pb.ReleaseVolumeResponse, timeout_s)

    async def publish_files(self, request: pb.PublishFilesRequest, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Send a part of a version of a volume's files."""
        await self._call("PublishFiles", request, pb.PublishFilesResponse, timeout_s)

    async def release_disk(self, serial: str, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Have the guest give up a layer disk; `FailedPreconditionError` while containers use it."""
        await self._call("ReleaseDisk", pb.ReleaseDiskRequest(serial=serial), pb.ReleaseDiskResponse, timeout_s)

    async def set_cpus(self, online: int, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Have exactly so many CPUs online, also ones that are being plugged."""
        request = pb.SetCpusRequest(online=online)
        await self._call("SetCpus", request, pb.SetCpusResponse, timeout_s)

    async def shutdown(self, *, timeout_s: float = 10.0) -> None:
        """Kill every container, write back and unmount its volumes."""
        request = pb.ShutdownRequest(timeout_ms=int(timeout_s * 800))
        await self._call("Shutdown", request, pb.ShutdownResponse, timeout_s)

    # --- streams ------------------------------------------------------------------------------------------------------

    def exec(
        self,
        container_id: str,
        args: Sequence[str],
        *,
        tty: bool = False,
        stdin: bool = False,
        window: tuple[int, int] | None = None,
        detach_kills: bool = True,
    ) -> Session:
        """Return a session, to be opened by `async with`, that runs one more process in a container.

        A command that the container lacks is `InvalidArgumentError`, raised by `async with`.
        """
        size = None if window is None else pb.WindowSize(width=window[0], height=window[1])
        hello = pb.StreamHello(
            exec=pb.ExecStream(
                container_id=container_id, args=args, tty=tty, stdin=stdin, window=size, detach_kills=detach_kills
            ),
            stdin_acks=True,
        )
        return Session(self, hello, "exec")

    def attach(self, container_id: str, *, stdin: bool = False) -> Session:
        """Return a session, to be opened by `async with`, on a container's main process."""
        request = pb.AttachStream(container_id=container_id, stdin=stdin)
        return Session(self, pb.StreamHello(attach=request, stdin_acks=True), "attach")

    def output(self, container_id: str, stdout_offset: int = 0, stderr_offset: int = 0) -> OutputSession:
        """Return a session, to be opened by `async with`, that follows a container's output from these offsets."""
        request = pb.OutputStream(container_id=container_id, stdout_offset=stdout_offset, stderr_offset=stderr_offset)
        return OutputSession(self, pb.StreamHello(output=request), "output")

    async def events(self, after: int = 0) -> AsyncGenerator[pb.Event, None]:
        """Yield the events behind number `after`, for ever. Raises `UnavailableError` when the connection ends."""
        stream = await self.open_stream(pb.StreamHello(events=pb.EventStream(after=after)), "events")
        try:
            while True:
                frame = await stream.next()
                if frame is None:
                    raise stream.unavailable("the agent closed the event stream")
                if frame.type != pb.EVENT:
                    raise stream.broken(f"frame of type {frame.type} on an event stream")
                event = stream.parse(frame, pb.Event)
                if event.sequence <= after:
                    raise stream.broken(f"event {event.sequence} after {after}")
                after = event.sequence
                yield event
        finally:
            self.forget(stream)
            stream.close()

    def dial_port(self, port: int) -> DialSession:
        """Return a session, to be opened by `async with`, on a TCP port of the pod's loopback.

        Opening raises `NotFoundError` when nothing answers there.
        """
        return DialSession(self, pb.StreamHello(dial=pb.DialStream(port=port), stdin_acks=True), f"dial port {port}")

    # --- connections --------------------------------------------------------------------------------------------------

    async def _call(self, method: str, request: Message, response: type[M], timeout_s: float) -> M:
        phase = f"agent {method}"
        try:
            async with asyncio.timeout(timeout_s):
                calls = await self._connection()
                payload = await calls.call(method, request.SerializeToString(), timeout_s)
        except TimeoutError as e:
            text = f"the agent did not answer within {timeout_s:g} s"
            raise errors.DeadlineError(text, phase=phase, resource=self.resource) from e
        except status.AgentError as e:
            raise translate(e.code, e.message, phase, self.resource) from e
        answer = response()
        try:
            answer.ParseFromString(payload)
        except DecodeError as e:
            text = f"the answer is no {response.__name__}"
            raise errors.AgentError(text, phase=phase, resource=self.resource) from e
        return answer

    def _check_open(self) -> None:
        if self._closed:
            raise errors.VmGoneError("the VM is going away", resource=self.resource)

    async def _connection(self) -> Calls:
        async with self._connecting:
            self._check_open()
            if self._calls is None or not self._calls.alive:
                reader, writer = await self._connect(layout.CALL_PORT)
                self._calls = Calls(reader, writer, self.resource)
            return self._calls

    async def _connect(self, port: int) -> Connection:
        try:
            reader, writer = await self._dial(port)
        except OSError as e:
            raise errors.UnavailableError(
                f"cannot connect to port {port} of the guest: {e}", phase="dial", resource=self.resource
            ) from e
        if self._closed:
            writer.close()
            self._check_open()
        return reader, writer

    async def open_stream(self, hello: pb.StreamHello, phase: str) -> Stream:
        """Open a stream; the caller closes it, and says so with `forget`."""
        self._check_open()
        reader, writer = await self._connect(layout.STREAM_PORT)
        stream = Stream(reader, writer, phase, self.resource)
        self._streams.add(stream)
        try:
            await stream.open(hello)
        except BaseException:
            self.forget(stream)
            with contextlib.suppress(OSError):
                stream.close()
            raise
        return stream

    def forget(self, stream: Stream) -> None:
        """Say that a stream is no longer this client's to close."""
        self._streams.discard(stream)
