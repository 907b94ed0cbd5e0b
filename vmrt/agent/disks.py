"""Block devices found by serial, and the image layers that are mounted from them.

A hot-plugged virtio-scsi LUN shows its serial as SCSI VPD page 0x80 (SPC-5), a virtio-blk disk as `serial` in sysfs
(cut to 20 octets by the device, virtio 1.2 section 5.2.6). A disk that is not there yet is waited for with the
kernel's uevents. A layer is mounted once, whatever the number of containers that use it, under a short path: overlayfs
takes all its lower directories in one option string of one page.
"""

from __future__ import annotations

import _socket
import contextlib
import os
import select
import threading
import time

from vmrt.agent import kernel, layout, status

_NETLINK_KOBJECT_UEVENT = 15
_UEVENT_GROUP = 1
_BLK_SERIAL_OCTETS = 20
# A uevent may be lost when its buffer is full: the scan is repeated at least this often.
_RESCAN_S = 0.2
_POOLED_LAYERS = "/run/vmrt/l"


def _bytes_of(path: str, limit: int = 4096) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(fd, limit)
    except OSError:
        return b""
    finally:
        os.close(fd)


def parse_vpd_serial(page: bytes) -> str:
    """Return the serial in SCSI VPD page 0x80 (4 octets of header, the length in the last two); "" for none."""
    if len(page) < 4 or page[1] != 0x80:
        return ""
    return page[4 : 4 + int.from_bytes(page[2:4], "big")].decode("ascii", "replace").strip(" \0")


def find(serial: str, sys_block: str = "/sys/block") -> str:
    """Return the kernel's name of the disk with this serial ("sda"), "" when there is none now."""
    for name in sorted(os.listdir(sys_block)):  # noqa: PTH208
        if name.startswith("sd"):
            if parse_vpd_serial(_bytes_of(f"{sys_block}/{name}/device/vpd_pg80")) == serial:
                return name
        elif name.startswith("vd"):
            have = _bytes_of(f"{sys_block}/{name}/serial").decode("ascii", "replace").strip(" \0\n")
            if have and have == serial[:_BLK_SERIAL_OCTETS]:
                return name
    return ""


def _device(serial: str) -> str:
    """Return the path of a disk that can be opened; "" until then.

    The kernel (6.1, device_add_disk) shows a disk in sysfs and devtmpfs before it can be opened: ENXIO till then.
    """
    name = find(serial)
    if not name:
        return ""
    try:
        os.close(os.open(f"/dev/{name}", os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        return ""
    return f"/dev/{name}"


def wait_for(serial: str, deadline: float) -> str:
    """Return the device path ("/dev/sda") of the disk with this serial, waiting until `deadline` (monotonic seconds).

    Raises `AgentError` (NOT_FOUND) when it does not appear.
    """
    if device := _device(serial):
        return device
    events = _socket.socket(_socket.AF_NETLINK, _socket.SOCK_DGRAM | _socket.SOCK_NONBLOCK, _NETLINK_KOBJECT_UEVENT)
    try:
        events.bind((0, _UEVENT_GROUP))
        poll = select.poll()
        poll.register(events.fileno(), select.POLLIN)
        while True:
            # Scanned after the socket is bound: a disk that came in between is not missed.
            if device := _device(serial):
                return device
            left = deadline - time.monotonic()
            if left <= 0:
                raise status.AgentError(
                    status.NOT_FOUND, f"disk {serial}: the VM has no disk with this serial; was it attached?"
                )
            poll.poll(min(left, _RESCAN_S) * 1000)
            with contextlib.suppress(BlockingIOError, OSError):
                while events.recv(8192):
                    pass
    finally:
        events.close()


def image_type(device: str) -> str:
    """Return the file system of an image layer by its magic number. Raises `AgentError` for an unknown one."""
    head = _bytes_of(device)
    if head[1024:1028] == b"\xe2\xe1\xf5\xe0":
        return "erofs"
    if head[:4] == b"hsqs":
        return "squashfs"
    raise status.AgentError(status.INVALID_ARGUMENT, f"{device} holds neither an EROFS nor a squashfs image")


class _Layer:
    def __init__(self, path: str, device: str) -> None:
        self.path = path
        self.device = device
        self.users = 0


class Layers:
    """The mounted image layers, counted by user."""

    def __init__(self) -> None:
        self.userns_fd = -1  # the pod's user namespace: layers are mounted id-mapped for it
        self.owner = (0, 0)  # uid and gid of its root, for what is made in the containers' file systems
        self._lock = threading.Lock()
        self._layers: dict[str, _Layer] = {}
        self._numbers = 0

    def acquire(self, serial: str, deadline: float) -> str:
        """Mount the layer unless it is mounted, count a user, return its path. Undo with `release`."""
        check_serial(serial)
        with self._lock:
            layer = self._layers.get(serial)
            if layer is None:
                layer = self._layers[serial] = self._mount(serial, deadline)
            layer.users += 1
            return layer.path

    def release(self, serial: str) -> None:
        """Count a user less. The layer stays mounted for the next container until `drop`."""
        with self._lock:
            layer = self._layers.get(serial)
            if layer is not None and layer.users > 0:
                layer.users -= 1

    def drop(self, serial: str) -> None:
        """Unmount a layer without users and take its disk from the kernel; an unknown one is no error.

        Raises `AgentError` (FAILED_PRECONDITION) while containers use it.
        """
        check_serial(serial)
        with self._lock:
            layer = self._layers.get(serial)
            if layer is not None:
                if layer.users:
                    raise status.AgentError(
                        status.FAILED_PRECONDITION, f"disk {serial}: {layer.users} mounts of containers use this layer"
                    )
                # Not lazily: the device must be idle when this returns.
                kernel.umount(layer.path, 0)
                del self._layers[serial]
                os.rmdir(layer.path)  # noqa: PTH106
            name = find(serial)
            if name.startswith("sd"):
                with open(f"/sys/block/{name}/device/delete", "w") as file:  # noqa: PTH123
                    file.write("1")

    def _mount(self, serial: str, deadline: float) -> _Layer:
        device = wait_for(serial, deadline)
        self._numbers += 1
        path = f"{_POOLED_LAYERS}/{self._numbers}"
        os.makedirs(path, exist_ok=True)  # noqa: PTH103
        try:
            kernel.mount(device, path, image_type(device), kernel.MS_RDONLY | kernel.MS_NODEV)
            if self.userns_fd >= 0:
                kernel.idmap(path, self.userns_fd)
        except OSError as e:
            os.rmdir(path)  # noqa: PTH106
            raise status.from_os_error(e, f"mount layer {serial} from {device}") from e
        return _Layer(path, device)


def check_serial(serial: str) -> None:
    """Raise `AgentError` (INVALID_ARGUMENT) for what cannot be a disk's serial."""
    if not serial or len(serial) > 36 or not serial.replace("-", "a").isalnum() or not serial.isascii():
        raise status.AgentError(status.INVALID_ARGUMENT, f"{serial[:64]!r} is no disk serial")


def mount_scratch(serial: str, deadline: float) -> None:
    """Mount the pod's scratch disk (ext4, made on the host) at `layout.SCRATCH`."""
    check_serial(serial)
    device = wait_for(serial, deadline)
    os.makedirs(layout.SCRATCH, exist_ok=True)  # noqa: PTH103
    try:
        # Nothing on it outlives the VM: no barriers are needed against a power cut. What is deleted gives its blocks
        # back to the host.
        kernel.mount(device, layout.SCRATCH, "ext4", 0, "nobarrier,noinit_itable,discard")
    except OSError as e:
        raise status.from_os_error(e, f"mount scratch disk {serial} from {device}") from e
