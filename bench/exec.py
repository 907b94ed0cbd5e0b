"""Stage "exec": an exec's streams beside a bare vsock echo of the same VM, and the time to its first octet.

The echo is a small C program in a container. Three sides send the same octets and take them back, in turn: the echo,
`cat` by the agent's stream protocol, and `cat` as a client of the streaming server gets it (WebSocket).

The first octet is that of `echo`, from the Exec call on, beside `crun exec` of the same in the guest: run by a program
that goes from a privileged container to where the agent is, and timed there.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from bench.samples import Samples
from bench.stand import Bench, Stage, create_request, sandbox_config
from demo import busybox_image
from demo.daemon import Daemon
from vmrt.agent.crun import STATE
from vmrt.agent.layout import STDIN_WINDOW
from vmrt.agent_client import AgentClient
from vmrt.cli.connections import Tls, websocket
from vmrt.errors import VmrtError
from vmrt.proto.runtime.v1 import api_pb2 as cri
from vmrt.streaming.websocket import STDIN, STDOUT

ECHO, AGENT, DAEMON, CRUN = "vsock echo", "agent's stream", "streaming server", "crun exec"
RATE, FIRST = "MB/s there and back", "first octet, ms"
# The rate's ratio is turned round, because a limit is an upper one: at least half is at most twice.
RATE_LIMIT = 2.0
FIRST_LIMIT = 2.0

_IMAGE = "docker.io/library/vmrt-bench-echo:latest"
_PROGRAMS = ("vsock_echo", "guest_exec")
_PORT = 5000
_BYTES = 16 * 1024 * 1024
_PIECE = 64 * 1024
_ROUNDS, _FIRSTS = 5, 15
_START_S = 60.0

Exchange = Callable[[int], Awaitable[float]]


def build_image(directory: Path) -> None:
    """Write the busybox image with the C programs as an OCI layout. Raises `CalledProcessError` or `OSError`."""
    programs = {}
    for name in _PROGRAMS:
        program = directory.with_suffix(f".{name}")
        source = Path(__file__).with_name(f"{name}.c")
        subprocess.run(["gcc", "-O2", "-static", "-s", "-o", program, source], check=True)
        programs[f"bin/{name}"] = busybox_image.File(program.read_bytes(), 0o755)
    layers = [busybox_image.layer(busybox_image.busybox()), busybox_image.layer(programs)]
    busybox_image.write_layout(directory, _IMAGE, layers, {"Env": ["PATH=/bin"], "Cmd": ["sh"]})


class Rig:
    """One pod with what is to be measured: an echo, a container for execs, and one that may go where the agent is."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        runtime = daemon.runtime
        config = sandbox_config("exec")
        config.linux.security_context.privileged = True
        self.pod = runtime.RunPodSandbox(cri.RunPodSandboxRequest(config=config)).pod_sandbox_id
        status = runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=self.pod, verbose=True))
        vm = json.loads(status.info["vm"])["id"]
        self.vsock = daemon.root / "vms" / vm / "s" / "vsock"
        self.plain = self._container(config, "plain", ["sleep", "100000"])
        self._container(config, "echo", ["vsock_echo", str(_PORT)])
        self.guest = self._container(config, "guest", ["sleep", "100000"], in_guest=True)
        self.agent = AgentClient(self.dial, vm)

    def _container(self, config: cri.PodSandboxConfig, name: str, command: list[str], *, in_guest: bool = False) -> str:
        request = create_request(self.pod, config, name)
        request.config.image.image = _IMAGE
        request.config.command[:] = command
        if in_guest:
            security = request.config.linux.security_context
            security.privileged = True
            security.namespace_options.pid = cri.NODE
        container = str(self.daemon.runtime.CreateContainer(request).container_id)
        self.daemon.runtime.StartContainer(cri.StartContainerRequest(container_id=container))
        return container

    async def dial(self, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect to a vsock port of the guest. Raises `OSError` when nobody listens."""
        reader, writer = await asyncio.open_unix_connection(self.vsock, limit=4 * _PIECE)
        writer.write(b"CONNECT %d\n" % port)
        if not (await reader.readline()).startswith(b"OK "):
            writer.close()
            raise ConnectionRefusedError(f"vsock port {port} of the guest")
        return reader, writer

    # --- rates --------------------------------------------------------------------------------------------------------

    async def echo(self, size: int) -> float:
        """Return the seconds that so many octets take by the echo."""
        async with asyncio.timeout(_START_S):
            while True:
                try:
                    reader, writer = await self.dial(_PORT)
                    break
                except OSError:  # the program has not come to listen yet
                    await asyncio.sleep(0.1)
        began = time.monotonic()
        # Never more on the way than an exec's stdin may have: a vhost-device-vsock whose one direction is full holds
        # back the other one, and an echo then stands still for good.
        sent = received = 0
        while received < size:
            while sent < size and sent + _PIECE - received <= STDIN_WINDOW:
                writer.write(bytes(_PIECE))
                sent += _PIECE
            await writer.drain()
            data = await reader.read(4 * _PIECE)
            received += len(data)
            if not data:
                break
        taken = time.monotonic() - began
        writer.close()
        return _whole(taken, size - received)

    async def by_agent(self, size: int) -> float:
        """Return the seconds that so many octets take through `cat`, by the agent's stream."""
        async with self.agent.exec(self.plain, ["cat"], stdin=True) as session:
            began = time.monotonic()

            async def send() -> None:
                for _ in range(size // _PIECE):
                    await session.write_stdin(bytes(_PIECE))
                await session.close_stdin()

            sending = asyncio.create_task(send())
            left = size - sum([len(data) async for _, data in session])
            taken = time.monotonic() - began
            await sending
        return _whole(taken, left)

    async def by_daemon(self, size: int) -> float:
        """Return the seconds that so many octets take through `cat`, by the daemon's streaming server."""
        async with websocket(await self._url(["cat"], stdin=True), Tls()) as socket:
            began = time.monotonic()

            async def send() -> None:
                for _ in range(size // _PIECE):
                    await socket.send(bytes([STDIN]) + bytes(_PIECE))
                await socket.send(bytes([255, STDIN]))

            sending = asyncio.create_task(send())
            left, channel = size, None
            async for piece, last in socket.messages():
                data = piece if isinstance(piece, bytes) else piece.encode()
                if channel is None and data:
                    channel, data = data[0], data[1:]
                left -= len(data) if channel == STDOUT else 0
                channel = None if last else channel
            taken = time.monotonic() - began
            await sending
        return _whole(taken, left)

    async def _url(self, command: list[str], *, stdin: bool = False) -> str:
        request = cri.ExecRequest(container_id=self.plain, cmd=command, stdin=stdin, stdout=True, stderr=True)
        return str((await asyncio.to_thread(self.daemon.runtime.Exec, request)).url)

    # --- the first octet ----------------------------------------------------------------------------------------------

    async def first_by_agent(self) -> float:
        """Return the seconds from opening the stream of `echo` to its first octet."""
        began = time.monotonic()
        async with self.agent.exec(self.plain, ["echo", "x"]) as session:
            async for _ in session:
                return time.monotonic() - began
        raise VmrtError("echo printed nothing", phase="bench exec")

    async def first_by_daemon(self) -> float:
        """Return the seconds from the Exec call for `echo` to its first octet."""
        began = time.monotonic()
        async with websocket(await self._url(["echo", "x"]), Tls()) as socket:
            async for piece, _ in socket.messages():
                if isinstance(piece, bytes) and len(piece) > 1 and piece[0] == STDOUT:
                    return time.monotonic() - began
        raise VmrtError("echo printed nothing", phase="bench exec")

    async def first_by_crun(self) -> float:
        """Return the seconds from starting `crun exec` of `echo` in the guest to its first octet."""
        crun = ["crun", "--root", STATE, "--cgroup-manager=cgroupfs", "exec", self.plain, "echo", "x"]
        told = {False: b"", True: b""}
        async with self.agent.exec(self.guest, ["guest_exec", *crun]) as session:
            async for is_stderr, data in session:
                told[is_stderr] += data
        if not told[False]:
            raise VmrtError(f"crun exec: {told[True].decode(errors='replace')}", phase="bench exec")
        return int(told[False]) / 1e9


def _whole(taken: float, left: int) -> float:
    if left:
        raise VmrtError(f"{left} octets did not come back", phase="bench exec")
    return taken


async def _measure(rig: Rig, samples: Samples) -> None:
    sides: dict[str, Exchange] = {ECHO: rig.echo, AGENT: rig.by_agent, DAEMON: rig.by_daemon}
    for exchange in sides.values():
        await exchange(_PIECE)
    for _ in range(_ROUNDS):
        for whose, exchange in sides.items():
            samples.add(whose, RATE, _BYTES / 1e6 / await exchange(_BYTES))
    for _ in range(_FIRSTS):
        samples.add(AGENT, FIRST, await rig.first_by_agent() * 1000)
        samples.add(DAEMON, FIRST, await rig.first_by_daemon() * 1000)
        samples.add(CRUN, FIRST, await rig.first_by_crun() * 1000)
    await rig.agent.close()


def measure(daemon: Daemon, samples: Samples) -> None:
    """Measure in a pod of a running daemon that has the image of `build_image`; the pod is removed."""
    rig = Rig(daemon)
    # A loop of its own: the caller may have one.
    failures: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(_measure(rig, samples))
        except BaseException as e:
            failures.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    daemon.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=rig.pod))
    daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=rig.pod))
    if failures:
        raise failures[0]


def _stage(bench: Bench) -> None:
    image = bench.scratch / "echo"
    build_image(image)
    bench.cold.load(image)
    measure(bench.cold, bench.samples)
    for whose in (AGENT, DAEMON):
        bench.samples.compare(f"exec there and back: vsock echo / {whose}", (ECHO, RATE), (whose, RATE), RATE_LIMIT)
    for whose in (AGENT, DAEMON):
        bench.samples.compare(f"first octet: {whose} / crun exec", (whose, FIRST), (CRUN, FIRST), FIRST_LIMIT)


STAGE = Stage("exec", "an exec's streams beside a vsock echo, and its first octet", _stage)
