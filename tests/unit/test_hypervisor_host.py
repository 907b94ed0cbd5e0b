"""Records, access, emulator, KVM probe, OOM evidence and helpers' command lines: what decides without a VM."""

import asyncio
import dataclasses
import json
import os
import signal
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmrt import spawn
from vmrt.errors import ConfigError, IllegalTransitionError, InvalidArgumentError, VmError
from vmrt.hypervisor import accel, access, emulator, oom, record, vhost_vsock, virtiofsd
from vmrt.hypervisor.accel import Accelerator, KvmProbe, Verdict, probe_rom
from vmrt.hypervisor.access import ROOT_USER, QemuUser, permits, require_readable
from vmrt.hypervisor.console import Console, ConsoleRing
from vmrt.hypervisor.libvirt_host import qemu_conf, shortened
from vmrt.hypervisor.record import Helper, VmRecord
from vmrt.hypervisor.vm import ProcessWatch, Vm, VmState, wait_gone
from vmrt.hypervisor.vsock import HybridVsock
from vmrt.model import VmEventKind
from vmrt.spawn import ProcessId

NOBODY = QemuUser(65534, 65534, frozenset((65534, 108)))
PROCESSES = st.builds(ProcessId, st.integers(1, 2**22), st.integers(0, 2**40))


# --- records ----------------------------------------------------------------------------------------------------------


@given(
    st.builds(
        VmRecord,
        vm_id=st.text(),
        vsock=st.sampled_from(["kernel", "vhost-user"]),
        ready=st.booleans(),
        qemu=st.none() | PROCESSES,
        helpers=st.dictionaries(st.sampled_from(Helper), PROCESSES),
    )
)
def test_record_round_trip(one: VmRecord) -> None:
    assert VmRecord.from_json(one.to_json()) == one


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"vm_id": "a"}', "null", '{"vm_id": 1, "helpers": []}'])
def test_a_broken_record_is_none(tmp_path: Path, text: str) -> None:
    paths = record.paths_of(tmp_path, "a")
    paths.directory.mkdir()
    assert record.read(paths) is None
    paths.record.write_text(text)
    assert record.read(paths) is None


@pytest.mark.parametrize("vm_id", ["", "..", "A", "a/b", "-a", "a" * 65, "a\n"])
def test_an_id_that_is_no_name(tmp_path: Path, vm_id: str) -> None:
    with pytest.raises(InvalidArgumentError):
        record.paths_of(tmp_path, vm_id)


def test_socket_paths_are_checked_before_anything_is_made() -> None:
    with pytest.raises(VmError, match="at most 107"):
        record.paths_of(Path("/" + "r" * 90), "abc")
    longest = record.paths_of(Path("/var/lib/vmrt/vms"), "f" * 64)
    assert len(str(longest.ready)) <= record.SOCKET_PATH_LIMIT


# --- access -----------------------------------------------------------------------------------------------------------


def status(mode: int, uid: int = 0, gid: int = 0) -> os.stat_result:
    return os.stat_result((mode, 1, 1, 1, uid, gid, 0, 0, 0, 0))


@pytest.mark.parametrize(
    ("mode", "uid", "gid", "granted"),
    [
        (0o604, 0, 0, True),
        (0o640, 0, 0, False),
        (0o640, 0, 108, True),
        (0o604, 0, 108, False),  # the group's bits count, not the others'
        (0o044, 65534, 0, False),
        (0o400, 65534, 0, True),
    ],
)
def test_permits(mode: int, uid: int, gid: int, granted: bool) -> None:
    assert permits(status(mode, uid, gid), NOBODY, os.R_OK) is granted
    assert permits(status(mode, uid, gid), ROOT_USER, os.R_OK)


def test_what_is_in_the_way_is_named(tmp_path: Path) -> None:
    directory = tmp_path / "closed"
    directory.mkdir(mode=0o700)
    file = directory / "disk"
    file.touch(mode=0o600)
    nobody = QemuUser(os.getuid() + 1, os.getgid() + 1, frozenset())
    with pytest.raises(VmError, match="may not pass through"):
        require_readable(file, nobody, resource="vm a")
    with pytest.raises(VmError, match="does not exist"):
        require_readable(tmp_path / "absent", ROOT_USER, resource="vm a")
    require_readable(file, ROOT_USER, resource="vm a")


def test_an_unknown_user_comes_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match="useradd"):
        QemuUser.lookup("no-such-user-here", "root")


# --- the emulator and KVM ---------------------------------------------------------------------------------------------


def test_wrapper_only_where_kvm_is_there_for_others() -> None:
    device = stat.S_IFCHR
    assert not emulator.needs_wrapper(None, NOBODY)
    assert emulator.needs_wrapper(status(device | 0o600), NOBODY)
    assert not emulator.needs_wrapper(status(device | 0o660, gid=108), NOBODY)
    assert not emulator.needs_wrapper(status(device | 0o666), NOBODY)


def test_wrapper_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kvm = tmp_path / "kvm"
    monkeypatch.setattr(emulator, "KVM_DEVICE", kvm)
    program = Path("/usr/bin/qemu a")
    assert emulator.for_libvirt(program, tmp_path, NOBODY) == program
    kvm.touch(mode=0o600)
    kvm.chmod(0o600)
    nobody = QemuUser(os.getuid() + 1, os.getgid() + 1, frozenset())
    wrapper = emulator.for_libvirt(program, tmp_path, nobody)
    assert wrapper.read_text().endswith("-- '/usr/bin/qemu a' \"$@\"\n")
    before = wrapper.stat()
    assert emulator.for_libvirt(program, tmp_path, nobody) == wrapper
    assert wrapper.stat().st_ctime_ns == before.st_ctime_ns


def test_probe_rom_starts_at_the_reset_vector() -> None:
    rom = probe_rom()
    assert len(rom) == 65536
    assert rom[0xFFF0:0xFFF4] == bytes((0xB0, 0x42, 0xE6, 0xF4))
    assert rom[:0xFFF0] == bytes(0xFFF0)


class ScriptedProbe(KvmProbe):
    def __init__(self, directory: Path, runs: list[tuple[int | None, bytes]]) -> None:
        super().__init__(Path("/bin/true"), "u", "g", directory / "kvm.json")
        self.runs = runs

    async def _qemu(self, arguments: tuple[str, ...], deadline_s: float) -> tuple[int | None, bytes]:
        return self.runs.pop(0)


@pytest.fixture
def kvm_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    device = tmp_path / "kvm"
    device.touch()
    monkeypatch.setattr(accel, "KVM_DEVICE", device)
    return device


async def test_verdicts_are_kept_until_the_ground_changes(tmp_path: Path, kvm_device: Path) -> None:
    good, bad = (0x85, b""), (1, b"qemu: no\n")
    assert await ScriptedProbe(tmp_path, [bad]).firmware() == Verdict(False, "qemu: no")
    assert await ScriptedProbe(tmp_path, []).firmware() == Verdict(False, "qemu: no")
    kvm_device.chmod(0o666)
    assert await ScriptedProbe(tmp_path, [good]).firmware() == Verdict(True)
    assert await ScriptedProbe(tmp_path, []).firmware() == Verdict(True)
    (tmp_path / "kvm.json").write_text("rubbish")
    assert await ScriptedProbe(tmp_path, [(None, b"")]).firmware() == Verdict(
        False, "a guest of four instructions did not end within 5 s"
    )


async def test_a_kernel_proves_itself_by_its_panic(tmp_path: Path, kvm_device: Path) -> None:
    kernel = tmp_path / "vmlinux"
    kernel.write_bytes(b"one")
    panic = (0, b"[ 0.5] Kernel panic - not syncing: VFS: Unable to mount root fs\n")
    assert (await ScriptedProbe(tmp_path, [panic]).kernel(kernel)).usable
    kernel.write_bytes(b"another")
    assert not (await ScriptedProbe(tmp_path, [(None, b"")]).kernel(kernel)).usable


async def test_absent_kvm_needs_no_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accel, "KVM_DEVICE", tmp_path / "absent")
    assert not (await ScriptedProbe(tmp_path, []).firmware()).usable


async def test_accelerator_falls_back_with_one_warning(
    tmp_path: Path, kvm_device: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kernel = tmp_path / "vmlinux"
    kernel.touch()
    accelerator = Accelerator("auto", ScriptedProbe(tmp_path, [(0x85, b""), (None, b"")]))
    await accelerator.choose()
    assert accelerator.name == "kvm"
    await accelerator.prove(kernel)
    await accelerator.prove(kernel)
    assert accelerator.name == "tcg"
    assert len([entry for entry in caplog.records if "no usable KVM" in entry.message]) == 1


async def test_kvm_by_order_fails_where_it_does_not_work(tmp_path: Path, kvm_device: Path) -> None:
    with pytest.raises(VmError, match="KVM does not work: boom"):
        await Accelerator("kvm", ScriptedProbe(tmp_path, [(1, b"boom")])).choose()
    tcg = Accelerator("tcg", ScriptedProbe(tmp_path, []))
    await tcg.choose()
    assert tcg.name == "tcg"


# --- libvirt's configuration and helpers ------------------------------------------------------------------------------


def test_qemu_conf() -> None:
    lines = qemu_conf("vmrt-qemu", "kvm").splitlines()
    assert 'user = "vmrt-qemu"' in lines
    assert 'group = "kvm"' in lines
    assert "dynamic_ownership = 0" in lines
    assert "seccomp_sandbox = 1" in lines
    assert 'namespaces = ["mount"]' in lines
    # Else libvirt makes directories in every hugetlbfs of the host, pods' emptyDirs among them.
    assert "hugetlbfs_mount = []" in lines


def test_a_long_message_keeps_its_cause() -> None:
    assert shortened("short") == "short"
    text = shortened("Child process (" + "x" * 5000 + ") unexpected fatal signal 6")
    assert text.startswith("Child process (") and text.endswith("signal 6")
    assert len(text) < 1010


def test_virtiofsd_dialects(tmp_path: Path) -> None:
    rust = virtiofsd.command(Path("/v"), Path("/share"), 7, rust=True)
    c = virtiofsd.command(Path("/v"), Path("/share"), 7, rust=False)
    assert "--shared-dir=/share" in rust and "--fd=7" in rust
    assert c[:3] == ("/v", "-f", "--fd=7")
    assert "source=/share" in c[-1] and "sandbox=namespace" in c[-1]
    assert virtiofsd.is_rust("  --shared-dir <SHARED_DIR>")
    assert not virtiofsd.is_rust("-o source=PATH")
    with pytest.raises(VmError, match="no virtiofsd"):
        virtiofsd.find(str(tmp_path / "absent"))


async def test_a_share_with_a_comma_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VmError, match="comma"):
        await virtiofsd.start(Path("/bin/true"), Path("/a,b"), tmp_path / "fs", (0, 0))


async def test_a_vsock_device_that_ends_at_once(tmp_path: Path) -> None:
    paths = record.paths_of(tmp_path, "a")
    process = spawn.detached(["sleep", "600"])
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(VmError, match="ended at once"):
        await vhost_vsock.wait_listening(process, Path("/bin/true"), paths)


# --- ends -------------------------------------------------------------------------------------------------------------

PROCESS = ProcessId(4242, 100 * oom._TICKS_PER_S)
AFTER_US = 150 * 1_000_000


@pytest.mark.parametrize(
    ("entry", "killed"),
    [
        (f"3,1,{AFTER_US},-;Out of memory: Killed process 4242 (qemu) total-vm:1kB", True),
        (f"3,1,{AFTER_US},-;Memory cgroup out of memory: Killed process 4242 (qemu) total-vm:1kB", True),
        (f"3,1,{AFTER_US},-;Out of memory: Killed process 42 (qemu)", False),
        ("3,1,99000000,-;Out of memory: Killed process 4242 (qemu)", False),  # an earlier process with this pid
        (f"3,1,{AFTER_US},-;qemu: something of 4242", False),
        ("rubbish", False),
    ],
)
def test_kernel_log_says_who_was_killed_for_memory(entry: str, killed: bool) -> None:
    assert oom.killed_in(["6,0,0,-;Linux version", entry], PROCESS) is killed


async def test_watch_tells_of_a_childs_end_and_of_one_that_is_gone() -> None:
    child = spawn.detached(["sleep", "600"])
    assert not await wait_gone(child, 0.01)
    spawn.terminate(child)
    assert await wait_gone(child, 5)
    assert await wait_gone(child, 5)
    assert await wait_gone(dataclasses.replace(child, pid=os.getpid()), 5), "another process with this pid"


async def test_a_closed_watch_says_nothing() -> None:
    told = asyncio.Event()
    child = spawn.detached(["sleep", "600"])
    watch = ProcessWatch(child, told.set)
    watch.close()
    spawn.terminate(child)
    assert await wait_gone(child, 5)
    assert not told.is_set()


def vm(directory: Path, **fields: object) -> Vm:
    paths = record.paths_of(directory, "a")
    paths.directory.mkdir()
    console = Console(paths.console_socket, ConsoleRing(paths.directory / "console", 10))
    vsock = HybridVsock(paths.vsock, paths.ready, paths.vhost_vsock, (0, 0))
    kept = VmRecord("a", "vhost-user", **fields)  # type: ignore[arg-type]
    return Vm(kept, paths, console, vsock, "vmrt-i-a", access.ROOT_USER)


async def test_states_and_ends(tmp_path: Path) -> None:
    one = vm(tmp_path)
    with pytest.raises(IllegalTransitionError, match="from booting to ended"):
        one.move(VmState.ENDED)
    one.move(VmState.RUNNING)
    assert one.set_end(VmEventKind.CRASHED, "first")
    assert not one.set_end(VmEventKind.STOPPED, "second")
    assert one.end is not None and one.end.detail == "first"


async def test_helpers_are_on_disk_before_anything_follows(tmp_path: Path) -> None:
    one = vm(tmp_path)
    one.note_helper(Helper.VIRTIOFSD, ProcessId(1, 2))
    assert json.loads(one.paths.record.read_text())["helpers"] == {"virtiofsd": [1, 2]}


async def test_a_helper_waits_for_word_of_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When QEMU powers off its helpers go too, in any order: the VM has stopped, not crashed."""
    qemu, helper = spawn.detached(["sleep", "600"]), spawn.detached(["sleep", "600"])
    one = vm(tmp_path, qemu=qemu, helpers={Helper.VHOST_VSOCK: helper})
    heard: list[VmEventKind] = []
    told = asyncio.Event()

    def on_end(_vm: Vm, kind: VmEventKind, _detail: str) -> None:
        heard.append(kind)
        told.set()

    one.watch(on_end)
    one.shutting_down = True
    spawn.terminate(helper)
    spawn.terminate(qemu)
    async with asyncio.timeout(5):
        await told.wait()
    assert heard == [VmEventKind.STOPPED]
    one.unwatch()
    assert not one.processes_alive()
    await asyncio.gather(wait_gone(qemu, 5), wait_gone(helper, 5))
