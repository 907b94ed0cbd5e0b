"""One delegate, seen through its socket: its calls, what it has at present, and whether it answers.

Rules:
- kubelet lists every second, so a list never waits for a delegate longer than `LIST_S`, and that once: a delegate that
  does not answer a list, or for its status, is down; its last lists stand for it until a task of ours reaches it again.
- What only asks is refused at once while the delegate is down; what changes something is always tried, since nobody
  but the delegate can know whether it works again.
- The delegate's own errors pass as they are, code and first words, for kubelet reads both; where it is the delegate
  that fails to answer, the message says which, and where.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import grpc
import grpc.aio

from vmrt.config import HandlerConfig
from vmrt.cri.delegates import routing
from vmrt.cri.runtime_service import cgroup_driver
from vmrt.errors import Code, VmrtError
from vmrt.proto.runtime.v1 import api_pb2 as cri
from vmrt.proto.runtime.v1 import api_pb2_grpc as cri_grpc

log = logging.getLogger(__name__)

LIST_S = 2.0
QUERY_S = 10.0
_PAUSES_S = (0.1, 2.0)  # between attempts to reach a delegate that is down: the first one, and the longest
# Twice what the interface's clients take, so that a reply that is too long for them is told by them.
_MESSAGE_LIMIT_BYTES = 32 * 1024 * 1024


class DelegateError(VmrtError):
    """A delegate refused a call, or did not answer it; the code is the delegate's own."""

    code = Code.UNKNOWN

    def __init__(
        self, message: str, *, code: Code = Code.UNKNOWN, phase: str = "", resource: str = "", hint: str = ""
    ) -> None:
        super().__init__(message, phase=phase, resource=resource, hint=hint)
        self.code = code


class Kind(enum.Enum):
    """What a delegate has lists of."""

    SANDBOXES = "sandbox"
    CONTAINERS = "container"
    IMAGES = "image"


_LISTS: Mapping[Kind, tuple[str, type[Any], str]] = {
    Kind.SANDBOXES: ("ListPodSandbox", cri.ListPodSandboxRequest, "items"),
    Kind.CONTAINERS: ("ListContainers", cri.ListContainersRequest, "containers"),
    Kind.IMAGES: ("ListImages", cri.ListImagesRequest, "images"),
}


def report(task: asyncio.Task[None]) -> None:
    """Log the error that a background task has ended with: it is a defect, and nobody waits for the task."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("%s has ended", task.get_name(), exc_info=error)


class Delegate:
    """A runtime behind `endpoint`, for one or more of our handlers. `open` once, `close` once."""

    def __init__(self, endpoint: str, handlers: Mapping[str, HandlerConfig]) -> None:
        self.endpoint = endpoint
        self.handlers = dict(handlers)
        # Why it does not answer; "" while it does.
        self.problem = "it has not been asked yet"
        self.status = cri.StatusResponse()
        self._lists: dict[Kind, Sequence[Any]] = dict.fromkeys(Kind, ())
        self._ids: dict[Kind, frozenset[str]] = dict.fromkeys(Kind, frozenset())
        # Made by us since the last list was asked for: id to when.
        self._learnt: dict[tuple[Kind, str], float] = {}
        self._network: cri.RuntimeConfig | None = None
        self._recovery: asyncio.Task[None] | None = None
        self._channel: grpc.aio.Channel | None = None
        self._stubs: tuple[Any, ...] = ()

    @property
    def name(self) -> str:
        """For people: the handlers that it serves, as configured."""
        return ", ".join(self.handlers)

    def __str__(self) -> str:
        return f"{self.name} ({self.endpoint})"

    async def open(self) -> None:
        """Connect, and learn what it runs; one that does not answer is down, which is no error."""
        self._channel = grpc.aio.insecure_channel(
            self.endpoint,
            options=(
                ("grpc.enable_http_proxy", 0),
                ("grpc.default_authority", "localhost"),
                ("grpc.max_receive_message_length", _MESSAGE_LIMIT_BYTES),
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.min_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 1000),
            ),
        )
        self._stubs = (cri_grpc.RuntimeServiceStub(self._channel), cri_grpc.ImageServiceStub(self._channel))
        try:
            await self._learn(LIST_S)
        except DelegateError as e:
            self._fail(e)
        else:
            log.info("delegate %s answers", self)

    async def close(self) -> None:
        """Ask no more."""
        if self._recovery is not None:
            self._recovery.cancel()
            await asyncio.gather(self._recovery, return_exceptions=True)
        if self._channel is not None:
            await self._channel.close()

    # --- calls ---

    async def call(self, method: str, request: Any, timeout_s: float | None) -> Any:
        """Make one call of either service; None waits as long as our own client does. Raises `DelegateError`."""
        try:
            return await self._method(method)(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as e:
            raise self._translated(method, e) from e

    async def query(self, method: str, request: Any, timeout_s: float = QUERY_S) -> Any:
        """Make a call that changes nothing: at once refused while the delegate is down, else within `timeout_s`."""
        if self.problem:
            raise self.down()
        return await self.call(method, request, timeout_s)

    def follow(self, method: str, request: Any) -> Any:
        """Begin a streaming call; its messages are `received`, its end is `cancel()`."""
        return self._method(method)(request)

    async def received(self, method: str, call: Any) -> AsyncIterator[Any]:
        """Yield what a streaming call sends. Raises `DelegateError`."""
        try:
            async for message in call:
                yield message
        except grpc.aio.AioRpcError as e:
            raise self._translated(method, e) from e

    def down(self) -> DelegateError:
        """Return the error of a call that was not made because the delegate is down."""
        return DelegateError(
            self.problem, code=Code.UNAVAILABLE, phase="delegate", resource=str(self), hint="`vmrt doctor` asks it"
        )

    def _method(self, name: str) -> Any:
        runtime, images = self._stubs
        return getattr(images if hasattr(images, name) else runtime, name)

    def _translated(self, method: str, error: grpc.aio.AioRpcError) -> DelegateError:
        number = error.code().value[0]
        code = Code(number) if number in set(Code) else Code.UNKNOWN
        details = (error.details() or "").strip() or error.code().name
        if code is Code.UNAVAILABLE or details == "Deadline Exceeded":
            what = "does not answer" if code is Code.UNAVAILABLE else "did not answer in time"
            return DelegateError(
                f"{what} to {method}: {details}",
                code=code,
                phase="delegate",
                resource=str(self),
                hint="`vmrt doctor` asks it",
            )
        return DelegateError(details, code=code, hint=f"said by the delegate {self}")

    # --- what it has ---

    async def listed(self, kind: Kind) -> Sequence[Any]:
        """Return all its sandboxes, containers or images, as clients may see them; the last known ones when it is down.

        The messages are shared: not to be changed.
        """
        if not self.problem:
            try:
                await self._fetch(kind, LIST_S)
            except DelegateError as e:
                self._fail(e)
        return self._lists[kind]

    def known(self, kind: Kind) -> Sequence[Any]:
        """Return what it had when it was last asked."""
        return self._lists[kind]

    def find(self, kind: Kind, wanted: str) -> list[str]:
        """Return the ids it is known to have that are, or begin with, `wanted`."""
        ids = self._ids[kind] | {ident for of, ident in self._learnt if of is kind}
        return [wanted] if wanted in ids else [ident for ident in ids if ident.startswith(wanted)]

    def learn(self, kind: Kind, ident: str) -> None:
        """Note what it has just made for us."""
        self._learnt[kind, ident] = time.monotonic()

    def forget(self, kind: Kind, ident: str) -> None:
        """Note what it has just removed for us, so that it is in no list should the delegate go down now."""
        self._learnt.pop((kind, ident), None)
        if kind is Kind.SANDBOXES:
            for container in self._lists[Kind.CONTAINERS]:
                if container.pod_sandbox_id == ident:
                    self.forget(Kind.CONTAINERS, container.id)
        self._take(kind, [item for item in self._lists[kind] if item.id != ident])

    async def _fetch(self, kind: Kind, timeout_s: float) -> None:
        method, request, attribute = _LISTS[kind]
        began = time.monotonic()
        items = list(getattr(await self.call(method, request(), timeout_s), attribute))
        if kind is Kind.SANDBOXES:
            items = [routing.unmark(item, self.handlers) for item in items]
        self._learnt = {key: at for key, at in self._learnt.items() if key[0] is not kind or at >= began}
        self._take(kind, items)

    def _take(self, kind: Kind, items: Sequence[Any]) -> None:
        self._lists[kind] = items
        self._ids[kind] = frozenset(item.id for item in items)

    # --- whether it answers ---

    async def refresh_status(self) -> None:
        """Ask for its conditions and features, to be remembered in `status`; one that does not answer is down."""
        if not self.problem:
            try:
                self.status = await self.call("Status", cri.StatusRequest(), LIST_S)
            except DelegateError as e:
                self._fail(e)

    def require_known(self) -> None:
        """Raise `DelegateError` unless it has told, at some time, what it offers."""
        if not self.status.status.conditions:
            raise self.down()

    def features(self, handler: str) -> cri.RuntimeHandlerFeatures:
        """Return what it said to offer for one of our handlers; nothing when it did not say."""
        theirs = self.handlers[handler].delegate_handler
        return next(
            (h.features for h in self.status.runtime_handlers if h.name == theirs), cri.RuntimeHandlerFeatures()
        )

    async def configure(self, config: cri.RuntimeConfig) -> None:
        """Pass on kubelet's runtime configuration; one that is down gets it when it answers again."""
        self._network = config
        await self._configure()

    async def _configure(self) -> None:
        if self._network is None:
            return
        try:
            await self.call("UpdateRuntimeConfig", cri.UpdateRuntimeConfigRequest(runtime_config=self._network), LIST_S)
        except DelegateError as e:
            log.warning("delegate %s did not take kubelet's runtime configuration: %s", self, e.message)

    def _fail(self, error: DelegateError) -> None:
        if not self.problem or self._recovery is None:
            log.warning("delegate %s is down, its last lists are shown: %s", self, error.message)
        self.problem = error.message
        if self._recovery is None or self._recovery.done():
            self._recovery = asyncio.create_task(self._recover(), name=f"recovery of delegate {self.name}")
            self._recovery.add_done_callback(report)

    async def _recover(self) -> None:
        pause, longest = _PAUSES_S
        while True:
            await asyncio.sleep(pause)
            try:
                await self._learn(QUERY_S)
            except DelegateError as e:
                self.problem = e.message
                pause = min(2 * pause, longest)
                continue
            log.info("delegate %s answers again", self)
            await self._configure()
            if not self.problem:  # it may have failed again meanwhile, and this is the one task that would see to it
                return

    async def _learn(self, timeout_s: float) -> None:
        """Ask for everything; it is up when all has been answered."""
        self.status = await self.call("Status", cri.StatusRequest(), timeout_s)
        for kind in Kind:
            await self._fetch(kind, timeout_s)
        self.problem = ""
        with contextlib.suppress(DelegateError):  # older ones do not have it
            driver = (await self.call("RuntimeConfig", cri.RuntimeConfigRequest(), timeout_s)).linux.cgroup_driver
            if driver != cgroup_driver():
                log.warning(
                    "delegate %s takes cgroup_parent as %s has it, kubelet is told %s: make them agree",
                    *(self, cri.CgroupDriver.Name(driver), cri.CgroupDriver.Name(cgroup_driver())),
                )
