"""The calls of the Agent service: a method's name to its request class and what it does.

A handler gets its request and a deadline (monotonic seconds) and returns the response. It raises `AgentError` for
what it refuses; the server turns everything else into INTERNAL. Calls run to their end also when the caller is gone:
a daemon that died in the middle finds a container either whole or absent.
"""

from __future__ import annotations

import os
import threading
import time

from vmrt.agent import agent_pb2 as pb
from vmrt.agent import console, containers, disks, events, kernel, layout, rootfs, sandbox, status, streams

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from google.protobuf.message import Message

    from vmrt.agent.process import Reaper

SERVICE = "vmrt.agent.v1.Agent"
MAX_TIMEOUT_S = 300.0
DEFAULT_TIMEOUT_S = 60.0
RELEASE_FILE = "/etc/vmrt-guest-version"
# A VM that has not been given to a pod by then was booted ahead.
_PATIENCE_S = 0.3


class Service:
    """Everything the agent does on request."""

    def __init__(self, reaper: Reaper, *, listening_us: int = 0) -> None:
        self.listening_us = listening_us
        self._reaper = reaper
        self.booted = threading.Event()  # the mounts are made
        self.events = events.Events()
        self.layers = disks.Layers()
        self.sandbox = sandbox.Sandbox(reaper, self.layers)
        self.containers = containers.Containers(reaper, self.layers, self.events)
        self.streams = streams.Streams(self.containers, self.events, reaper)
        self._methods: dict[str, tuple[type[Message], Callable[[Any, float], Message]]] = {
            "Check": (pb.CheckRequest, self.check),
            "ConfigureSandbox": (pb.ConfigureSandboxRequest, self.configure_sandbox),
            "CreateContainer": (pb.CreateContainerRequest, self.create_container),
            "StartContainer": (pb.StartContainerRequest, self.start_container),
            "SignalContainer": (pb.SignalContainerRequest, self.signal_container),
            "RemoveContainer": (pb.RemoveContainerRequest, self.remove_container),
            "ListContainers": (pb.ListContainersRequest, self.list_containers),
            "ContainerStats": (pb.ContainerStatsRequest, self.container_stats),
            "UpdateContainer": (pb.UpdateContainerRequest, self.update_container),
            "MakeVolume": (pb.MakeVolumeRequest, self.make_volume),
            "ReleaseVolume": (pb.ReleaseVolumeRequest, self.release_volume),
            "PublishFiles": (pb.PublishFilesRequest, self.publish_files),
            "ReleaseDisk": (pb.ReleaseDiskRequest, self.release_disk),
            "SetCpus": (pb.SetCpusRequest, self.set_cpus),
            "Rehearse": (pb.RehearseRequest, self.rehearse),
            "Shutdown": (pb.ShutdownRequest, self.shutdown),
        }

    def call(self, envelope: pb.TtrpcRequest) -> bytes:
        """Run the call that a ttRPC request names; return the serialized response. Raises `AgentError`."""
        if envelope.service != SERVICE or envelope.method not in self._methods:
            name = f"{envelope.service[:100]}/{envelope.method[:100]}"
            raise status.AgentError(status.UNIMPLEMENTED, f"{name}: no such method")
        message, handler = self._methods[envelope.method]
        request = message()
        try:
            request.ParseFromString(envelope.payload)
        except Exception as e:  # protobuf's DecodeError, whichever implementation's
            text = f"{envelope.method}: the payload is no {message.__name__}: {e}"
            raise status.AgentError(status.INVALID_ARGUMENT, text) from e
        timeout_s = envelope.timeout_nano / 1e9 if envelope.timeout_nano > 0 else DEFAULT_TIMEOUT_S
        deadline = time.monotonic() + min(timeout_s, MAX_TIMEOUT_S)
        if not self.booted.wait(min(timeout_s, MAX_TIMEOUT_S)):
            raise status.AgentError(status.DEADLINE_EXCEEDED, "the guest has not finished booting")
        return handler(request, deadline).SerializeToString()

    def warm_up(self) -> None:
        """Do ahead what the first requests would wait for; runs in a thread, from the ready notice on.

        A pod that boots its own VM is configured at once, and nothing here may take the processor from that.
        """
        try:
            self.sandbox.prepare()
        except status.AgentError as e:
            console.log(f"prepare: {e}")  # configure meets it again, and tells the host
        self.sandbox.settled.wait(_PATIENCE_S)
        import fcntl  # noqa: F401
        import json  # noqa: F401
        import termios  # noqa: F401

        self.containers.crun.ask_version()

    def check(self, request: pb.CheckRequest, deadline: float) -> pb.CheckResponse:
        """Say who answers."""
        return pb.CheckResponse(
            protocol=layout.PROTOCOL_VERSION,
            version=guest_version(),
            kernel_release=os.uname().release,
            crun_version=self.containers.crun.version,
            boot_to_listening_us=self.listening_us,
            configured=self.sandbox.configured,
            memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            vcpus=os.cpu_count() or 1,
        )

    def configure_sandbox(self, request: pb.ConfigureSandboxRequest, deadline: float) -> pb.ConfigureSandboxResponse:
        """Make the guest one pod's."""
        self.sandbox.configure(request, deadline)
        return pb.ConfigureSandboxResponse()

    def rehearse(self, request: pb.RehearseRequest, deadline: float) -> pb.RehearseResponse:
        """Do what the first pod would be the first to do, in a VM that has none yet."""
        if self.sandbox.asked_for:
            raise status.AgentError(
                status.FAILED_PRECONDITION, f"this VM is sandbox {self.sandbox.asked_for}'s already"
            )
        from vmrt.agent import rehearsal

        self.sandbox.prepare()
        rehearsal.rehearse(self._reaper, self.containers.crun)
        return pb.RehearseResponse()

    def create_container(self, request: pb.CreateContainerRequest, deadline: float) -> pb.CreateContainerResponse:
        """Make a container."""
        self.sandbox.require()
        container = self.containers.create(request, deadline)
        identity = container.identity
        return pb.CreateContainerResponse(
            pid=container.pid, uid=identity.uid, gid=identity.gid, supplemental_groups=identity.groups
        )

    def start_container(self, request: pb.StartContainerRequest, deadline: float) -> pb.StartContainerResponse:
        """Run a container's command."""
        self.containers.start(request.container_id, deadline)
        return pb.StartContainerResponse()

    def signal_container(self, request: pb.SignalContainerRequest, deadline: float) -> pb.SignalContainerResponse:
        """Signal a container."""
        self.containers.signal(request.container_id, request.signal, everyone=request.all)
        return pb.SignalContainerResponse()

    def remove_container(self, request: pb.RemoveContainerRequest, deadline: float) -> pb.RemoveContainerResponse:
        """Remove a container."""
        self.containers.remove(request.container_id)
        return pb.RemoveContainerResponse()

    def list_containers(self, request: pb.ListContainersRequest, deadline: float) -> pb.ListContainersResponse:
        """List the containers. `last_event` is read first: what happens meanwhile shows here or comes as an event."""
        last_event = self.events.last
        infos = [self.containers.info(container) for container in self.containers.all()]
        return pb.ListContainersResponse(containers=infos, last_event=last_event)

    def container_stats(self, request: pb.ContainerStatsRequest, deadline: float) -> pb.ContainerStatsResponse:
        """Tell what containers use; those that do not exist (any more) are left out."""
        wanted = set(request.container_ids)
        from vmrt.agent import stats

        everyone = self.containers.all()
        return pb.ContainerStatsResponse(
            stats=[stats.container_stat(c) for c in everyone if not wanted or c.id in wanted],
            sandbox=stats.sandbox_stat(everyone),
        )

    def update_container(self, request: pb.UpdateContainerRequest, deadline: float) -> pb.UpdateContainerResponse:
        """Change a container's limits."""
        self.containers.update(request.container_id, request.oci_resources)
        return pb.UpdateContainerResponse()

    def make_volume(self, request: pb.MakeVolumeRequest, deadline: float) -> pb.MakeVolumeResponse:
        """Make a volume in the guest."""
        self.sandbox.require()
        self.containers.volumes.make(request, deadline)
        return pb.MakeVolumeResponse()

    def release_volume(self, request: pb.ReleaseVolumeRequest, deadline: float) -> pb.ReleaseVolumeResponse:
        """Unmount a volume on a disk."""
        self.containers.volumes.unmake(request.name)
        return pb.ReleaseVolumeResponse()

    def publish_files(self, request: pb.PublishFilesRequest, deadline: float) -> pb.PublishFilesResponse:
        """Change the files of a volume in the guest's memory."""
        self.containers.volumes.publish(request)
        return pb.PublishFilesResponse()

    def release_disk(self, request: pb.ReleaseDiskRequest, deadline: float) -> pb.ReleaseDiskResponse:
        """Give up a layer disk."""
        try:
            self.layers.drop(request.serial)
        except OSError as e:
            raise status.from_os_error(e, f"release disk {request.serial}") from e
        return pb.ReleaseDiskResponse()

    def set_cpus(self, request: pb.SetCpusRequest, deadline: float) -> pb.SetCpusResponse:
        """Bring CPUs online or offline."""
        from vmrt.agent import cpus

        return pb.SetCpusResponse(online=cpus.set_online(request.online, deadline))

    def shutdown(self, request: pb.ShutdownRequest, deadline: float) -> pb.ShutdownResponse:
        """Kill everything and unmount the volumes, so that all of what was written to them is with the host.

        A block device is flushed when its last user closes it. The scratch disk ends with this VM.
        """
        self.containers.kill_all((request.timeout_ms or 10_000) / 1000)
        rootfs.unmount_tree(layout.SHARE)
        self.containers.volumes.unmake_all()
        return pb.ShutdownResponse()


def guest_version() -> str:
    """Return the guest image's version, written when the image was built; "" when there is none."""
    try:
        with open(RELEASE_FILE, encoding="utf-8") as file:  # noqa: PTH123
            return file.readline().strip()
    except OSError:
        return ""


def power_off() -> None:
    """Sync and power off."""
    os.sync()
    kernel.power_off()
