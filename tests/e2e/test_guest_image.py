"""The guest image for real: built from Debian's packages, the same every time, and booted by bare QEMU.

In place of the agent these VMs run a probe as PID 1, which tries what the issue asks of the kernel and the root image
and writes what it saw to the console.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vmrt import guest_image
from vmrt.errors import VmrtError
from vmrt.guest_image import manifest, rootfs, tuned
from vmrt.guest_image.builder import agent_files, default_cache
from vmrt.guest_image.initramfs import AGENT_ARGV
from vmrt.model import GuestImage

AGENT = Path(rootfs.__file__).parents[1] / "agent"
BOOT_TIMEOUT_S = 90

PROBE = rb"""
import ctypes, json, os, platform, socket, struct, subprocess, sys

libc = ctypes.CDLL(None, use_errno=True)
seen = {}


def check(name, work):
    try:
        seen[name] = work() or "ok"
    except BaseException as e:
        seen[name] = repr(e)


def mount(kind, target, data="", source=None):
    os.makedirs(target, exist_ok=True)
    if libc.mount((source or kind).encode(), target.encode(), kind.encode(), 0, data.encode()):
        raise OSError(ctypes.get_errno(), kind)


def read(path):
    with open(path) as file:
        return file.read().strip()


def namespaces():
    pid = os.fork()
    if pid == 0:
        # NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET, NEWTIME (sched.h)
        failed = libc.unshare(0x20000 | 0x2000000 | 0x4000000 | 0x8000000 | 0x10000000 | 0x20000000 | 0x40000000 | 0x80)
        os._exit(1 if failed else 0)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise OSError("unshare")


def seccomp():
    pid = os.fork()
    if pid == 0:
        # BPF_RET | BPF_K, SECCOMP_RET_ALLOW; PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP with SECCOMP_MODE_FILTER
        code = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0x7FFF0000), 8)
        program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", 1, ctypes.addressof(code)), 16)
        libc.prctl(38, 1, 0, 0, 0)
        os._exit(1 if libc.prctl(22, 2, program) else 0)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise OSError("seccomp")


def queue():
    # O_CREAT | O_RDWR, then shmget(IPC_PRIVATE)
    if libc.mq_open(b"/probe", 0o102, 0o600, None) < 0:
        raise OSError(ctypes.get_errno(), "mq_open")
    if libc.shmget(0, 4096, 0o1600) < 0:
        raise OSError(ctypes.get_errno(), "shmget")


def overlay():
    for name in ("low", "up", "work"):
        os.makedirs("/run/" + name)
    open("/run/low/file", "w").close()
    mount("overlay", "/run/merged", "lowerdir=/run/low,upperdir=/run/up,workdir=/run/work")
    os.unlink("/run/merged/file")
    if not os.path.exists("/run/low/file") or os.path.exists("/run/merged/file"):
        raise OSError("overlay does not overlay")


def link(kind):
    # RTM_NEWLINK for a device of this kind: the kernel has to load its module by modprobe.
    def attribute(number, data):
        return struct.pack("HH", 4 + len(data), number) + data + bytes(-len(data) % 4)
    body = struct.pack("BxHiII", 0, 0, 0, 0, 0) + attribute(3, b"my-" + kind.encode() + b"\0")
    body += attribute(18, attribute(1, kind.encode()))
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as netlink:
        netlink.send(struct.pack("IHHII", 16 + len(body), 16, 0x605, 1, 0) + body)
        error = struct.unpack_from("i", netlink.recv(4096), 16)[0]
    if error:
        raise OSError(-error, kind)
    os.stat("/sys/class/net/my-" + kind)


def nftables():
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as netlink:
        # NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETGEN, acknowledged: the subsystem is there or is loaded now.
        netlink.send(struct.pack("IHHIIBBH", 20, 10 << 8 | 16, 5, 1, 0, 0, 0, 0))
        kind, = struct.unpack_from("H", netlink.recv(4096), 4)
    if kind == 2:
        raise OSError("nftables does not answer")


def scratch():
    mount("ext4", "/run/scratch", source="/dev/sda")
    with open("/run/scratch/file", "w") as file:
        file.write("x")


check("proc", lambda: mount("proc", "/proc"))
check("sys", lambda: mount("sysfs", "/sys"))
check("run", lambda: mount("tmpfs", "/run"))
check("mqueue", lambda: mount("mqueue", "/run/mqueue"))
check("cgroups", lambda: (mount("cgroup2", "/sys/fs/cgroup"), read("/sys/fs/cgroup/cgroup.controllers"))[1])
check("namespaces", namespaces)
check("seccomp", seccomp)
check("ipc", queue)
check("overlay", overlay)
check("bridge", lambda: link("bridge"))
check("veth", lambda: link("veth"))
check("dummy", lambda: link("dummy"))
check("nftables", nftables)
check("scratch", scratch)
check("vsock", lambda: socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close())
check("crun", lambda: subprocess.check_output(["/usr/bin/crun", "--version"], text=True).split()[2])
check("modprobe", lambda: subprocess.check_output(["/sbin/modprobe", "--version"], text=True).split()[2])
check("shell", lambda: subprocess.check_output(["sh", "-c", "echo a shell"], text=True).strip())
check("root", lambda: [line.split()[2] for line in read("/proc/mounts").splitlines() if line.split()[1] == "/"][-1])
check("readonly", lambda: os.statvfs("/").f_flag & os.ST_RDONLY or "writable")
check("release", lambda: os.uname().release)
check("version", lambda: read("/etc/vmrt-guest-version"))
check("pid", os.getpid)
check("argv", lambda: sys.orig_argv)
check("cached", lambda: all(
    getattr(module, "__cached__", None) is None or os.path.exists(module.__cached__)
    for module in list(sys.modules.values())
))
check("nics", lambda: sorted(os.listdir("/sys/class/net")))
print("\nPROBE" + json.dumps(seen) + "END", flush=True)
libc.reboot(0x4321FEDC)
"""


@contextmanager
def qemu(image: GuestImage, directory: Path, *, serial: str = "vmrt-root") -> Iterator[str]:
    """Run the image in a bare VM until it ends; yield its console."""
    scratch = directory / "scratch"
    with scratch.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["/sbin/mkfs.ext4", "-q", scratch], check=True)
    initramfs: list[str | Path] = [] if image.initramfs is None else ["-initrd", image.initramfs]
    argv: list[str | Path] = [
        "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-machine", "q35,accel=tcg", "-cpu", "max", "-smp", "1", "-m", "256M",
        "-bios", "/usr/share/qemu/qboot.rom",
        "-kernel", image.kernel, *initramfs, "-append", image.cmdline,
        "-serial", "stdio",
        "-drive", f"id=root,if=none,format=raw,readonly=on,file={image.rootfs}",
        "-device", f"virtio-blk-pci,drive=root,serial={serial}",
        "-device", "virtio-scsi-pci",
        "-drive", f"id=scratch,if=none,format=raw,file={scratch}",
        "-device", "scsi-hd,drive=scratch,serial=scratch",
        "-netdev", "user,id=net,restrict=on", "-device", "virtio-net-pci,netdev=net,romfile=",
        "-device", "virtio-rng-pci",
    ]  # fmt: skip
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=BOOT_TIMEOUT_S
    )
    yield done.stdout.decode(errors="replace")


def digests(image: GuestImage) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in image.kernel.parent.iterdir()}


async def warm_cache(directory: Path) -> Path:
    """A cache with the default one's packages and nothing made from them."""
    await guest_image.build(directory / "warm-up")
    shutil.rmtree(directory / "warm-up")
    cache = directory / "cache"
    shutil.copytree(default_cache() / "debs", cache / "debs")
    shutil.copy(default_cache() / "resolved.json", cache)
    return cache


def with_probe() -> dict[str, bytes]:
    return {**agent_files(AGENT), "vmrt/agent/__main__.py": PROBE}


async def test_the_same_input_gives_the_same_octets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything made twice, from the packages on; the second time under another umask, time zone and locale."""
    first = await guest_image.build(tmp_path / "one", cache=await warm_cache(tmp_path))
    shutil.rmtree(tmp_path / "cache/unpacked")
    shutil.rmtree(tmp_path / "cache/base")
    for key, value in {"TZ": "Asia/Kathmandu", "LANG": "tr_TR.UTF-8", "SOURCE_DATE_EPOCH": "1", "HOME": "/"}.items():
        monkeypatch.setenv(key, value)
    before = os.umask(0o077)
    try:
        second = await guest_image.build(tmp_path / "elsewhere" / "two", cache=tmp_path / "cache")
    finally:
        os.umask(before)
    assert digests(first) == digests(second)
    assert set(digests(first)) == {"manifest.json", "vmlinux", "initramfs.cpio", "root.erofs"}
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in second.kernel.parent.iterdir())


async def test_what_changed_is_built_and_what_runs_is_kept(tmp_path: Path) -> None:
    output = tmp_path / "image"
    # The distribution's has an initramfs, which is looked at, too.
    build = functools.partial(guest_image.build, kernel_choice="distribution")
    said: list[str] = []
    first = await build(output, agent=with_probe())
    stamp = first.rootfs.stat().st_mtime_ns
    assert (await build(output, agent=with_probe(), progress=lambda what, *_: said.append(what))) == first
    assert said == [f"guest image {first.version} is up to date"]
    assert first.rootfs.stat().st_mtime_ns == stamp

    changed = {**with_probe(), "vmrt/agent/new.py": b"x = 1\n"}
    second = await build(output, agent=changed)
    assert second.version != first.version
    assert guest_image.load(output) == second
    assert guest_image.load(first.kernel.parent) == first, "VMs of the old version still need its files"
    assert first.rootfs.read_bytes() != second.rootfs.read_bytes()
    assert first.initramfs is not None
    assert second.initramfs is not None
    assert first.initramfs.read_bytes() == second.initramfs.read_bytes()

    # A version that rotted is made again.
    second.rootfs.write_bytes(b"rotten")
    assert await build(output, agent=changed) == second
    guest_image.load(output)

    # A failing build changes nothing and leaves nothing: the agent must not import what the image lacks.
    before = sorted(path.name for path in output.iterdir())
    with pytest.raises(VmrtError, match="No module named 'sqlite3'"):
        await build(output, agent={**changed, "vmrt/agent/new.py": b"import sqlite3\n"})
    with pytest.raises(VmrtError, match=r"new\.py"):
        await build(output, agent={**changed, "vmrt/agent/new.py": b"def\n"})
    assert sorted(path.name for path in output.iterdir()) == before
    assert guest_image.load(output) == second
    assert guest_image.prune(output) == [first.version]


@pytest.mark.parametrize("kernel", ["distribution", "tuned"])
@pytest.mark.parametrize("filesystem", ["erofs", "squashfs"])
async def test_the_kernel_and_the_root_have_what_containers_need(
    tmp_path: Path, filesystem: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel == "tuned" and not tuned.any_built(default_cache()):
        pytest.skip("the tuned kernel was not compiled here: `make guest-tuned`")
    monkeypatch.setattr(rootfs, "choose_filesystem", lambda: filesystem)
    image = await guest_image.build(tmp_path / "image", agent=with_probe(), kernel_choice=kernel)
    assert image.kernel_release.endswith(tuned.LOCAL_VERSION) is (image.initramfs is None) is (kernel == "tuned")
    with qemu(image, tmp_path) as console:
        assert "PROBE" in console, console[-3000:]
    seen = json.loads(console.partition("PROBE")[2].partition("END")[0])
    controllers = set(seen.pop("cgroups").split())
    assert {"cpu", "cpuset", "io", "memory", "pids", "hugetlb"} <= controllers
    assert seen.pop("crun").startswith("1.")
    assert seen.pop("modprobe").replace(".", "").isdigit()
    # The probe has made three; eth0 is the VM's own.
    assert {"eth0", "lo", "my-bridge", "my-dummy", "my-veth"} <= set(seen.pop("nics"))
    assert seen == {
        **dict.fromkeys(("proc", "sys", "run", "mqueue", "namespaces", "seccomp", "ipc", "overlay"), "ok"),
        **dict.fromkeys(("bridge", "veth", "dummy", "nftables", "scratch", "vsock"), "ok"),
        "shell": "a shell",
        "root": filesystem,
        "readonly": 1,
        "release": image.kernel_release,
        "version": image.version,
        "pid": 1,
        "argv": list(AGENT_ARGV),
        "cached": True,
    }


async def test_a_boot_without_its_root_disk_says_so_and_ends(tmp_path: Path) -> None:
    image = await guest_image.build(tmp_path / "image", agent=with_probe(), kernel_choice="distribution")
    with qemu(image, tmp_path, serial="another") as console:
        assert "vmrt-init: no virtio-blk disk has the serial vmrt-root: errno 2" in console, console[-3000:]
        assert "Kernel panic" in console


async def test_a_kernel_that_lacks_something_fails_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    required = tmp_path / "kernel.required"
    required.write_text("CONFIG_NAMESPACES y containers\nCONFIG_TEAPOT y tea\n")
    monkeypatch.setattr("vmrt.guest_image.builder.REQUIRED", required)
    with pytest.raises(VmrtError, match=r"the kernel lacks CONFIG_TEAPOT \(tea\)"):
        await guest_image.build(tmp_path / "image")
    assert not (tmp_path / "image" / manifest.CURRENT).exists()
