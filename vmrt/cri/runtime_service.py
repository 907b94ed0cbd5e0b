"""CRI's RuntimeService: each call translates, asks the pods room once, and translates back.

Errors are raised as they come; `vmrt.cri.outcome` maps them, those of the calls that are still to come too.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import vmrt
from vmrt.cri import fields, filters, specs, statuses
from vmrt.cri.outcome import unimplemented
from vmrt.cri.ports import Pods, StreamUrls
from vmrt.cri.stats_service import StatsCalls
from vmrt.errors import FailedPreconditionError, NotFoundError
from vmrt.pods.records import ContainerState, SandboxState
from vmrt.pods.streams import ATTACHABLE, RUNNING, require_state
from vmrt.proto.runtime.v1 import api_pb2 as cri
from vmrt.proto.runtime.v1 import api_pb2_grpc as cri_grpc
from vmrt.streaming.targets import AttachRequest, ExecRequest, PortForwardRequest

log = logging.getLogger(__name__)

# What kubelet's client takes as one message; a reply's other fields and framing need a little of it.
REPLY_LIMIT_BYTES = 16 * 1024 * 1024
_OUTPUT_LIMIT_BYTES = REPLY_LIMIT_BYTES - 4096
# Longer than any pod lives, shorter than what float seconds and timers can hold.
_TIMEOUT_LIMIT_S = 10 * 365 * 86400


def cgroup_driver(setting: str = "auto", mark: Path = Path("/run/systemd/system")) -> cri.CgroupDriver.ValueType:
    """Return how cgroup_parent is to be spelt: as configured, else systemd's way where it is running (sd_booted(3))."""
    systemd = setting == "systemd" or (setting == "auto" and mark.is_dir())
    return cri.SYSTEMD if systemd else cri.CGROUPFS


def fit_output(stdout: bytes, stderr: bytes, limit: int = _OUTPUT_LIMIT_BYTES) -> tuple[bytes, bytes]:
    """Cut a command's output to `limit` octets together; neither stream takes from the other's half without need."""
    half = limit // 2
    stdout_room = max(half, limit - len(stderr))
    stdout = stdout[:stdout_room]
    return stdout, stderr[: limit - len(stdout)]


class RuntimeService(StatsCalls, cri_grpc.RuntimeServiceServicer):
    """`handlers` are the names of the configured RuntimeClass handlers, `driver` is the configured cgroup driver."""

    def __init__(self, pods: Pods, handlers: Sequence[str], streams: StreamUrls, driver: str = "auto") -> None:
        self._pods = pods
        self._streams = streams
        self._handlers = tuple(handlers)
        self._features = statuses.Features()
        self._driver = cgroup_driver(driver)
        self._sandbox_items = statuses.Translated(statuses.sandbox_item)
        self._container_items = statuses.Translated(statuses.container_item)

    # --- the runtime ---

    async def Version(self, request: cri.VersionRequest, context: Any) -> cri.VersionResponse:
        """Kubelet compares `version` with its own constant, "0.1.0", which is not the version of the interface."""
        return cri.VersionResponse(
            version="0.1.0", runtime_name="vmrt", runtime_version=vmrt.__version__, runtime_api_version="v1"
        )

    async def Status(self, request: cri.StatusRequest, context: Any) -> cri.StatusResponse:
        """Conditions, handlers, features."""
        status = await self._pods.status()
        return statuses.runtime_status(status, self._handlers, self._features, verbose=request.verbose)

    async def RuntimeConfig(self, request: cri.RuntimeConfigRequest, context: Any) -> cri.RuntimeConfigResponse:
        """Say the cgroup driver."""
        return cri.RuntimeConfigResponse(linux=cri.LinuxRuntimeConfiguration(cgroup_driver=self._driver))

    async def UpdateRuntimeConfig(
        self, request: cri.UpdateRuntimeConfigRequest, context: Any
    ) -> cri.UpdateRuntimeConfigResponse:
        """Take the node's pod ranges, one of each family at most; CNI plugins that ask for them are told."""
        path = "runtime_config.network_config.pod_cidr"
        if text := fields.text(request.runtime_config.network_config.pod_cidr, path):
            await self._pods.set_pod_ranges(specs.pod_ranges(text, path))
        return cri.UpdateRuntimeConfigResponse()

    # --- pod sandboxes ---

    async def RunPodSandbox(self, request: cri.RunPodSandboxRequest, context: Any) -> cri.RunPodSandboxResponse:
        """Create and start."""
        spec = specs.sandbox_spec(request.config, request.runtime_handler, self._handlers)
        return cri.RunPodSandboxResponse(pod_sandbox_id=await self._pods.run_sandbox(spec))

    async def StopPodSandbox(self, request: cri.StopPodSandboxRequest, context: Any) -> cri.StopPodSandboxResponse:
        """Stop; one that is not there is stopped."""
        with contextlib.suppress(NotFoundError):
            await self._pods.stop_sandbox(self._sandbox_id(request.pod_sandbox_id))
        return cri.StopPodSandboxResponse()

    async def RemovePodSandbox(
        self, request: cri.RemovePodSandboxRequest, context: Any
    ) -> cri.RemovePodSandboxResponse:
        """Remove; one that is not there is removed."""
        with contextlib.suppress(NotFoundError):
            await self._pods.remove_sandbox(self._sandbox_id(request.pod_sandbox_id))
        return cri.RemovePodSandboxResponse()

    async def PodSandboxStatus(
        self, request: cri.PodSandboxStatusRequest, context: Any
    ) -> cri.PodSandboxStatusResponse:
        """From memory, but for verbose details."""
        record = self._pods.sandbox(_id(request.pod_sandbox_id, "pod_sandbox_id"))
        info = await self._pods.sandbox_info(record.id) if request.verbose else None
        # One picture: records do not change between here and the answer.
        record = self._pods.sandbox(record.id)
        return cri.PodSandboxStatusResponse(
            status=statuses.sandbox_status(record),
            info=info,
            containers_statuses=[statuses.container_status(c) for c in self._containers_of(record.id)],
            timestamp=time.time_ns(),
        )

    async def ListPodSandbox(self, request: cri.ListPodSandboxRequest, context: Any) -> cri.ListPodSandboxResponse:
        """From memory."""
        records = self._pods.sandboxes()
        self._sandbox_items.refresh(records)
        chosen = filters.select_sandboxes(records, request.filter)
        return cri.ListPodSandboxResponse(items=[self._sandbox_items.of(record) for record in chosen])

    # --- containers ---

    async def CreateContainer(self, request: cri.CreateContainerRequest, context: Any) -> cri.CreateContainerResponse:
        """Create. The request's copy of the sandbox's configuration is not used: the record has what was run."""
        sandbox = self._pods.sandbox(_id(request.pod_sandbox_id, "pod_sandbox_id"))
        spec = specs.container_spec(request.config, sandbox.spec)
        return cri.CreateContainerResponse(container_id=await self._pods.create_container(sandbox.id, spec))

    async def StartContainer(self, request: cri.StartContainerRequest, context: Any) -> cri.StartContainerResponse:
        """Start."""
        await self._pods.start_container(self._container_id(request.container_id))
        return cri.StartContainerResponse()

    async def StopContainer(self, request: cri.StopContainerRequest, context: Any) -> cri.StopContainerResponse:
        """Stop; one that is not there is stopped."""
        # kubelet's clock arithmetic can give a negative grace period; it means the same as none.
        timeout_s = max(0, min(request.timeout, _TIMEOUT_LIMIT_S))
        with contextlib.suppress(NotFoundError):
            await self._pods.stop_container(self._container_id(request.container_id), float(timeout_s))
        return cri.StopContainerResponse()

    async def RemoveContainer(self, request: cri.RemoveContainerRequest, context: Any) -> cri.RemoveContainerResponse:
        """Remove; one that is not there is removed."""
        with contextlib.suppress(NotFoundError):
            await self._pods.remove_container(self._container_id(request.container_id))
        return cri.RemoveContainerResponse()

    async def ListContainers(self, request: cri.ListContainersRequest, context: Any) -> cri.ListContainersResponse:
        """From memory."""
        records = self._pods.containers()
        self._container_items.refresh(records)
        chosen = filters.select_containers(records, request.filter)
        return cri.ListContainersResponse(containers=[self._container_items.of(record) for record in chosen])

    async def ContainerStatus(self, request: cri.ContainerStatusRequest, context: Any) -> cri.ContainerStatusResponse:
        """From memory, but for verbose details."""
        record = self._pods.container(_id(request.container_id, "container_id"))
        info = await self._pods.container_info(record.id) if request.verbose else None
        return cri.ContainerStatusResponse(status=statuses.container_status(record), info=info)

    async def ExecSync(self, request: cri.ExecSyncRequest, context: Any) -> cri.ExecSyncResponse:
        """Run a command to its end."""
        args = specs.command(request.cmd, "cmd")
        timeout_s = fields.number(request.timeout, "timeout", 0, _TIMEOUT_LIMIT_S)
        result = await self._pods.exec_sync(self._container_id(request.container_id), args, float(timeout_s))
        stdout, stderr = fit_output(result.stdout, result.stderr)
        return cri.ExecSyncResponse(stdout=stdout, stderr=stderr, exit_code=result.exit_code)

    async def ReopenContainerLog(
        self, request: cri.ReopenContainerLogRequest, context: Any
    ) -> cri.ReopenContainerLogResponse:
        """Go over to a new log file."""
        await self._pods.reopen_log(self._container_id(request.container_id))
        return cri.ReopenContainerLogResponse()

    # --- streaming: a URL for the client to connect to ---

    async def Exec(self, request: cri.ExecRequest, context: Any) -> cri.ExecResponse:
        """Prepare a session of one more process; whether the container has the command is seen when it begins."""
        container_id = self._in_state(request.container_id, "exec", RUNNING)
        _check_streams(request)
        args = specs.command(request.cmd, "cmd")
        wanted = ExecRequest(container_id, args, request.stdin, request.stdout, request.stderr, request.tty)
        return cri.ExecResponse(url=self._streams.url(wanted))

    async def Attach(self, request: cri.AttachRequest, context: Any) -> cri.AttachResponse:
        """Prepare a session on the main process of a container that is running, or about to be started."""
        container_id = self._in_state(request.container_id, "attach", ATTACHABLE)
        _check_streams(request)
        wanted = AttachRequest(container_id, request.stdin, request.stdout, request.stderr, request.tty)
        return cri.AttachResponse(url=self._streams.url(wanted))

    async def PortForward(self, request: cri.PortForwardRequest, context: Any) -> cri.PortForwardResponse:
        """Prepare a session to the pod's loopback; clients of today name the port when they connect."""
        record = self._pods.sandbox(_id(request.pod_sandbox_id, "pod_sandbox_id"))
        if record.state is not SandboxState.READY:
            raise FailedPreconditionError(
                f"the sandbox is {record.state.value}, port-forward needs a ready one", resource=f"sandbox {record.id}"
            )
        fields.few(request.port, "port", 128)
        ports = tuple(fields.number(port, f"port[{i}]", 1, 65535) for i, port in enumerate(request.port))
        return cri.PortForwardResponse(url=self._streams.url(PortForwardRequest(record.id, ports)))

    # --- to come; clients know to fall back, or to say so, on UNIMPLEMENTED ---

    CheckpointContainer = unimplemented("CheckpointContainer")

    def _sandbox_id(self, value: str) -> str:
        return self._pods.sandbox(_id(value, "pod_sandbox_id")).id

    def _container_id(self, value: str) -> str:
        return self._pods.container(_id(value, "container_id")).id

    def _in_state(self, value: str, verb: str, states: frozenset[ContainerState]) -> str:
        record = self._pods.container(_id(value, "container_id"))
        require_state(record.state, record.id, verb, states)
        return record.id


def _check_streams(request: cri.ExecRequest | cri.AttachRequest) -> None:
    """Hold a request to what api.proto says: something must be streamed, and a terminal has one output."""
    if not (request.stdin or request.stdout or request.stderr):
        fields.refuse("stdin, stdout and stderr", "are all false: one of them is needed")
    if request.tty and request.stderr:
        fields.refuse("tty", "and stderr are both true: a terminal's output is all stdout")


def _id(value: str, path: str) -> str:
    # No bound beyond a line's: what is not an id of ours is not found.
    return fields.text(value, path, required=True, limit=1024)
