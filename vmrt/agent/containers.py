"""The containers of this guest: their states, their way through crun, and what is left to undo.

::

    (absent) --create--> CREATED --start--> RUNNING --main process ends--> EXITED --remove--> (absent)
                            +---- main process killed before start ----------^

A container's lock serialises create, start and remove; exits arrive from the reaper's thread at any time. Create is
all or nothing: every step registers its undo on the container's `ExitStack`, which remove runs too.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time

from vmrt.agent import agent_pb2 as pb
from vmrt.agent import cgroups, console, crun, enter, kernel, layout, output, rootfs, spec, status, users, volumes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from vmrt.agent.disks import Layers
    from vmrt.agent.events import Events
    from vmrt.agent.process import Child, Exit, Reaper

CREATED = pb.ContainerInfo.CREATED
RUNNING = pb.ContainerInfo.RUNNING
EXITED = pb.ContainerInfo.EXITED
MAX_CONTAINERS = 512
_STATE_NAMES: dict[int, str] = {CREATED: "created", RUNNING: "running", EXITED: "exited"}
_ID_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")


def check_id(container_id: str) -> None:
    """Raise `AgentError` (INVALID_ARGUMENT) for what cannot be a container's id: it becomes a directory's name."""
    if not 0 < len(container_id) <= 128 or not set(container_id) <= _ID_CHARACTERS or container_id[0] in ".-":
        raise status.AgentError(status.INVALID_ARGUMENT, f"{container_id[:200]!r} is no container id")


class Container:
    """One container; made by `Containers.create`."""

    def __init__(self, container_id: str, output_: output.Output) -> None:
        self.id = container_id
        self.lock = threading.RLock()
        self.state: pb.ContainerInfo.State.ValueType = CREATED
        self.ready = False  # create has finished
        self.child: Child | None = None
        self.exit: Exit | None = None
        self.spec: dict[str, Any] = {}
        self._exec_template = b""
        self._execs = 0
        self.undo = contextlib.ExitStack()
        self.output = output_
        self.pump: output.Pump | None = None
        self.stdin_fd = -1
        self.tty = False
        self.stdin_once = False
        self.cgroup = cgroups.Cgroup(container_id)
        self.oom_kills = 0
        self.writable = ""
        self.measured: tuple[float, int, int] = (-1e9, 0, 0)
        self.identity = users.Identity(0, 0, (), "")
        self._small_lock = threading.Lock()

    @property
    def directory(self) -> str:
        """Return the directory of its files."""
        return f"{layout.CONTAINERS}/{self.id}"

    @property
    def pid(self) -> int:
        """Return its main process, 0 when there is none."""
        return self.child.pid if self.child is not None else 0

    def exec_template(self) -> bytes:
        """Return what the plans of all its execs share. Raises `AgentError`."""
        if not self._exec_template:
            self._exec_template = enter.template(self.spec, crun.filter_path(self.id))
        return self._exec_template

    def next_exec(self) -> int:
        """Return a number that no exec in this container has had."""
        with self._small_lock:
            self._execs += 1
            return self._execs

    def require(self, *states: int) -> None:
        """Raise `AgentError` (FAILED_PRECONDITION) unless it is in one of these states."""
        if self.state not in states:
            wanted = " or ".join(_STATE_NAMES[state] for state in states)
            raise status.AgentError(
                status.FAILED_PRECONDITION, f"container {self.id} is {_STATE_NAMES[self.state]}, not {wanted}"
            )

    def write_stdin(self, pieces: Sequence[memoryview]) -> int:
        """Write to its stdin without waiting; return how many octets went. Raises `OSError` (EPIPE when closed)."""
        with self._small_lock:
            if self.stdin_fd < 0:
                raise BrokenPipeError
            return os.writev(self.stdin_fd, pieces)

    def close_stdin(self) -> None:
        """Close its stdin; a terminal stays, and so does a pipe that is closed already."""
        with self._small_lock:
            if self.stdin_fd >= 0 and not self.tty:
                os.close(self.stdin_fd)
                self.stdin_fd = -1

    def forget_stdin(self) -> None:
        """Close our end of its stdin or terminal for good."""
        with self._small_lock:
            if self.stdin_fd >= 0:
                os.close(self.stdin_fd)
                self.stdin_fd = -1


class Containers:
    """All containers of this guest."""

    def __init__(self, reaper: Reaper, layers: Layers, events: Events, crun_: crun.Crun | None = None) -> None:
        self._reaper = reaper
        self._layers = layers
        self._events = events
        self.volumes = volumes.Volumes()
        self.crun = crun_ or crun.Crun(reaper)
        self._lock = threading.Lock()
        self._table: dict[str, Container] = {}

    def get(self, container_id: str) -> Container:
        """Return a container that has been created. Raises `AgentError` (NOT_FOUND)."""
        with self._lock:
            container = self._table.get(container_id)
        if container is None or not container.ready:
            raise status.AgentError(status.NOT_FOUND, f"container {container_id[:200]} does not exist in this VM")
        return container

    def all(self) -> list[Container]:
        """Return every container that has been created."""
        with self._lock:
            return [container for container in self._table.values() if container.ready]

    def own(self, container: Container, *descriptors: int) -> None:
        """Give pipes to a container's user where its ids are mapped: from inside, nobody could (`/dev/stdout`)."""
        uid, gid = self._layers.owner
        if (uid, gid) != (0, 0):
            for fd in descriptors:
                os.fchown(fd, uid + container.identity.uid, gid + container.identity.gid)

    # --- create -------------------------------------------------------------------------------------------------------

    def create(self, request: pb.CreateContainerRequest, deadline: float) -> Container:
        """Make a container up to `crun create`. Raises `AgentError`, everything undone."""
        check_id(request.container_id)
        buffers = output.Output(request.output_buffer_bytes, discard=request.discard_output)
        container = Container(request.container_id, buffers)
        with container.lock:
            with self._lock:
                if container.id in self._table:
                    raise status.AgentError(status.ALREADY_EXISTS, f"container {container.id} exists in this VM")
                if len(self._table) >= MAX_CONTAINERS:
                    raise status.AgentError(status.RESOURCE_EXHAUSTED, f"this VM has {MAX_CONTAINERS} containers")
                self._table[container.id] = container
            try:
                self._build(container, request, deadline)
            except BaseException as e:
                self._undo(container)
                if isinstance(e, OSError):
                    raise status.from_os_error(e, f"create container {container.id}") from e
                raise
            container.ready = True
        return container

    def _build(self, container: Container, request: pb.CreateContainerRequest, deadline: float) -> None:
        wanted = spec.parse(request.oci_spec)
        target_pid = 0
        if request.join_pid_namespace_of:
            target = self.get(request.join_pid_namespace_of)
            target.require(RUNNING, CREATED)
            target_pid = target.pid
        undo = container.undo
        undo.callback(rootfs.remove_tree, container.directory)
        rootfs.make_directory(container.directory)
        root = f"{container.directory}/rootfs"
        # Short, because every octet counts in overlayfs' options; unique, because ids are.
        container.writable = f"{layout.SCRATCH}/{container.id}"
        serials = list(request.layer_serials)
        rootfs.mount_overlay(self._layers, serials, root, undo, deadline, container.writable)
        for storage in request.storages:
            rootfs.mount_storage(storage, f"{container.directory}/storage", self._layers, undo, deadline)
        undo.callback(self.volumes.release, self.volumes.hold(wanted))
        self._look_into(container, request, wanted, root)
        container.spec = spec.complete(
            wanted,
            root_path=root,
            identity=container.identity,
            cgroups_path=cgroups.path_of(container.id),
            target_pid=target_pid,
        )
        self._add_devices(container.spec, request, deadline)
        self.crun.know_filter(container.spec)
        if "hugepageLimits" in container.spec["linux"].get("resources", {}):
            from vmrt.agent import hugepages

            hugepages.reserve(container.spec, undo)
        if request.HasField("apparmor"):
            from vmrt.agent import apparmor

            apparmor.load(request.apparmor.profile, request.apparmor.policy)
        _write_json(f"{container.directory}/config.json", container.spec)
        container.tty = bool(container.spec["process"].get("terminal"))
        container.stdin_once = request.stdin_once
        undo.callback(container.output.close)
        undo.callback(container.forget_stdin)
        # crun keeps a cgroup and a state directory from the moment it starts.
        undo.callback(self._delete, container)
        self._crun_create(container, stdin=request.stdin, timeout_s=max(1.0, deadline - time.monotonic()))
        self.crun.keep_filter(container.id, container.spec)

    def _add_devices(self, wanted: dict[str, Any], request: pb.CreateContainerRequest, deadline: float) -> None:
        if request.devices or request.all_devices:
            from vmrt.agent import devices

            nodes = devices.resolve(request.devices, self._reaper, deadline)
            named = {node.path for node in nodes}
            if request.all_devices:
                nodes += [node for node in devices.everything() if node.path not in named]
            devices.add(wanted, nodes, bind=self._layers.userns_fd >= 0)

    def _look_into(
        self, container: Container, request: pb.CreateContainerRequest, wanted: dict[str, Any], root: str
    ) -> None:
        root_fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            passwd, group = (users.read_text(root_fd, path) for path in ("etc/passwd", "etc/group"))
            container.identity = users.resolve(request.user, passwd, group)
            _check_working_dir(root_fd, wanted, self._layers.owner, create=request.create_working_dir)
        finally:
            os.close(root_fd)

    def _crun_create(self, container: Container, *, stdin: bool, timeout_s: float) -> None:
        args = ["create", f"--bundle={container.directory}"]
        what = f"create container {container.id}"
        command = str((container.spec["process"].get("args") or [""])[0])

        def on_exit(exit_: Exit) -> None:
            self._exited(container, exit_)

        with contextlib.ExitStack() as ours:
            if container.tty:
                terminal = self.crun.console()
                ours.callback(terminal.close)
                child = self.crun.start_process(
                    what, args, container.id, stdin=-1, stdout=-1, stderr=-1,
                    console=terminal, command=command, on_exit=on_exit, timeout_s=timeout_s,
                )  # fmt: skip
                container.child = child
                master = terminal.receive()
                os.set_blocking(master, False)
                container.stdin_fd = os.dup(master)
                sources = {master: output.STDOUT}
            else:
                stdin_fd = -1
                if stdin:
                    stdin_fd, container.stdin_fd = os.pipe()
                    ours.callback(os.close, stdin_fd)
                    os.set_blocking(container.stdin_fd, False)
                sources, theirs = {}, []
                for which in (output.STDOUT, output.STDERR):
                    reader, writer = os.pipe()
                    ours.callback(os.close, writer)
                    os.set_blocking(reader, False)
                    sources[reader] = which
                    theirs.append(writer)
                self.own(container, *theirs, *([stdin_fd] if stdin else []))
                try:
                    container.child = self.crun.start_process(
                        what, args, container.id, stdin=stdin_fd, stdout=theirs[0], stderr=theirs[1],
                        console=None, command=command, on_exit=on_exit, timeout_s=timeout_s,
                    )  # fmt: skip
                except BaseException:
                    for reader in sources:
                        os.close(reader)
                    raise
        self._start_pump(container, sources)

    def _start_pump(self, container: Container, sources: dict[int, int]) -> None:
        try:
            events_fd = os.open(f"{container.cgroup.path}/memory.events", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            events_fd = -1  # no memory controller: OOM kills show at exit only, by the signal
        pump = output.Pump(container.output, sources, events_fd, lambda: self._count_oom_kills(container))
        container.pump = pump
        pump.start()
        if container.exit is not None:
            pump.finish()

    # --- what happens to it -------------------------------------------------------------------------------------------

    def _count_oom_kills(self, container: Container) -> None:
        kills = container.cgroup.oom_kills()
        if kills > container.oom_kills:
            container.oom_kills = kills
            self._events.out_of_memory(container.id)

    def _exited(self, container: Container, exit_: Exit) -> None:
        """Record the end of the main process; runs in the reaper's thread (or in create's, for one that died early)."""
        self._count_oom_kills(container)
        container.exit = exit_
        container.state = EXITED
        self._events.exited(container.id, exit_, oom_killed=container.oom_kills > 0)
        # Without a PID namespace of its own the container's other processes would live on.
        container.cgroup.kill()
        if container.pump is not None:
            container.pump.finish()

    def start(self, container_id: str, deadline: float) -> None:
        """Run the container's command."""
        container = self.get(container_id)
        with container.lock:
            container.require(CREATED)
            # Before: a short command has ended when the call returns.
            container.state = RUNNING
            what = f"start container {container.id}"
            try:
                if container.spec.get("hooks"):
                    timeout_s = max(1.0, deadline - time.monotonic())
                    self.crun.run(what, ["start", container.id], timeout_s=timeout_s)
                else:
                    self.crun.start(what, container.id)
            except status.AgentError:
                if container.exit is None:
                    container.state = CREATED
                raise

    def signal(self, container_id: str, number: int, *, everyone: bool) -> None:
        """Signal the main process, or every process of the container. One that has exited is no error."""
        container = self.get(container_id)
        if not 0 < number <= 64:
            raise status.AgentError(status.INVALID_ARGUMENT, f"{number} is no signal")
        if everyone:
            if number == 9:
                container.cgroup.kill()
            else:
                container.cgroup.signal(number)
        elif container.child is not None:
            try:
                self._reaper.signal(container.child, number)
            except PermissionError as e:
                # The container's AppArmor profile lets no signal in; the cgroup's kill asks no profile.
                if number != 9:
                    raise status.from_os_error(e, f"signal container {container.id}") from e
                container.cgroup.kill()

    def update(self, container_id: str, resources: bytes) -> None:
        """Change the container's cgroup limits."""
        import json

        container = self.get(container_id)
        try:
            limits = json.loads(resources)
        except ValueError as e:
            raise status.AgentError(status.INVALID_ARGUMENT, f"oci_resources is no JSON: {e}") from e
        with container.lock:
            container.require(CREATED, RUNNING)
            path = f"{container.directory}/resources.json"
            _write_json(path, limits)
            self.crun.run(f"update container {container.id}", ["update", f"--resources={path}", container.id])

    # --- remove -------------------------------------------------------------------------------------------------------

    def remove(self, container_id: str) -> None:
        """Kill what is left, delete the container and all that was made for it; absent is no error."""
        check_id(container_id)
        with self._lock:
            container = self._table.get(container_id)
        if container is None:
            return
        with container.lock:
            container.ready = False
            self._undo(container)

    def _undo(self, container: Container) -> None:
        with container.lock:
            try:
                container.undo.close()
            except OSError as e:
                console.log(f"container {container.id}: left behind: {e}")
            if container.pump is None:
                container.output.pump_ended()
            with self._lock:
                if self._table.get(container.id) is container:
                    del self._table[container.id]

    def _delete(self, container: Container) -> None:
        container.cgroup.kill()
        if container.child is not None and container.child.wait(10.0) is None:
            console.log(f"container {container.id}: pid {container.pid} does not die")
        if os.path.isdir(f"{crun.STATE}/{container.id}"):  # noqa: PTH112
            with contextlib.suppress(status.AgentError):
                self.crun.run(f"delete container {container.id}", ["delete", "--force", container.id])
        if not container.cgroup.remove():
            console.log(f"container {container.id}: its cgroup is still populated")

    def kill_all(self, timeout_s: float) -> None:
        """Kill every container and wait for the exits, for the machine's end. Output that nobody has taken stays."""
        deadline = time.monotonic() + timeout_s
        everyone = self.all()
        for container in everyone:
            container.cgroup.kill()
        for container in everyone:
            if container.child is not None:
                container.child.wait(max(0.0, deadline - time.monotonic()))

    # --- figures ------------------------------------------------------------------------------------------------------

    def info(self, container: Container) -> pb.ContainerInfo:
        """Return the container as ListContainers tells it."""
        info = pb.ContainerInfo(container_id=container.id, state=container.state, pid=container.pid)
        if container.exit is not None:
            info.exit.CopyFrom(container.exit.frame())
        return info


def _check_working_dir(root_fd: int, wanted: dict[str, Any], owner: tuple[int, int], *, create: bool) -> None:
    """Make the working directory or refuse one that is absent: crun would make it without a word.

    One that lies on a mount of the container is not looked for: it is there only once crun has mounted.
    """
    cwd = wanted["process"]["cwd"]
    targets = [str(mount.get("destination", "")).rstrip("/") for mount in wanted.get("mounts", [])]
    if any(cwd == target or cwd.startswith(f"{target}/") for target in targets):
        return
    try:
        if create:
            users.make_directory(root_fd, cwd, owner)
        else:
            os.close(kernel.open_in_root(root_fd, cwd, os.O_PATH | os.O_DIRECTORY))
    except OSError as e:
        raise status.AgentError(status.INVALID_ARGUMENT, f"working directory {cwd}: {e.strerror}") from e


def _write_json(path: str, value: object) -> None:
    import json

    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as file:
        file.write(json.dumps(value))  # json.dump is not the one in C
