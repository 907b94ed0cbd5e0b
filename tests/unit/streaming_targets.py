"""A pod in memory for the streaming server's tests: processes and connections that do as they are told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from vmrt.errors import InvalidArgumentError, NotFoundError, UnavailableError
from vmrt.streaming.targets import AttachRequest, ExecRequest


class FakeProcess:
    """`cat`, `fail`, `flood` and `sleep`, by the name of the command."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.stdin: asyncio.Queue[bytes] = asyncio.Queue(4)
        self.sizes: list[tuple[int, int]] = []
        self.resized = asyncio.Event()
        self.written = 0
        self.closed = False
        self.taken = 0

    async def __aiter__(self) -> AsyncIterator[tuple[bool, bytes]]:
        if self.name == "cat":
            while data := await self.stdin.get():
                yield False, data
            yield True, b"end of file"
        elif self.name == "fail":
            yield True, b"failing"
        elif self.name == "flood":
            while True:
                self.written += 32768
                yield False, b"x" * 32768
        elif self.name == "size":
            await self.resized.wait()
            yield False, repr(self.sizes[-1]).encode()
        elif self.name == "vanish":
            raise UnavailableError("the connection ended before the process")
        else:
            await asyncio.Event().wait()

    async def exit_code(self) -> int:
        return 7 if self.name == "fail" else 0

    async def write_stdin(self, data: bytes) -> None:
        self.taken += len(data)
        await self.stdin.put(data)

    async def close_stdin(self) -> None:
        await self.stdin.put(b"")

    async def resize(self, width: int, height: int) -> None:
        self.sizes.append((width, height))
        self.resized.set()


class FakeConnection:
    """An echo that half-closes, or one that is reset at the first octet on port 2."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._octets: asyncio.Queue[bytes] = asyncio.Queue(4)

    async def read(self) -> bytes:
        data = await self._octets.get()
        if data and self.port == 2:
            raise UnavailableError("the connection was reset")
        return data

    async def write(self, data: bytes) -> None:
        await self._octets.put(data)

    async def write_eof(self) -> None:
        await self._octets.put(b"")


class FakeTargets:
    """Port 1 refuses; the command "absent" does not exist."""

    def __init__(self) -> None:
        self.processes: list[FakeProcess] = []
        self.connections = 0
        self.left = asyncio.Event()

    @asynccontextmanager
    async def exec(self, request: ExecRequest) -> AsyncIterator[FakeProcess]:
        if request.args[0] == "absent":
            raise InvalidArgumentError("exec: absent: no such file")
        process = FakeProcess(request.args[0])
        self.processes.append(process)
        try:
            yield process
        finally:
            process.closed = True
            self.left.set()

    @asynccontextmanager
    async def attach(self, request: AttachRequest) -> AsyncIterator[FakeProcess]:
        process = FakeProcess("fail")
        self.processes.append(process)
        yield process

    @asynccontextmanager
    async def dial(self, sandbox_id: str, port: int) -> AsyncIterator[FakeConnection]:
        if port == 1:
            raise NotFoundError("nothing answers on port 1 of the pod")
        self.connections += 1
        yield FakeConnection(port)
