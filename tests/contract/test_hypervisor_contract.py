"""What every `vmrt.pods.drivers.Hypervisor` does, held against the libvirt driver (real VMs) and its one fake."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import os
import secrets
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.contract import real_hypervisor as real
from tests.contract.fake_hypervisor import EXTRA_NICS, MUTE, PANIC, FakeHypervisor, FakeVmHost
from vmrt import netns, spawn
from vmrt.agent.layout import CALL_PORT
from vmrt.errors import AlreadyExistsError, ExhaustedError, VmError, VmGoneError
from vmrt.model import Confinement, Disk, GuestImage, VmEvent, VmEventKind, VmSize
from vmrt.pods.drivers import Hypervisor


@dataclass
class Subject:
    """A driver's maker (each call is a restarted daemon) and what tests need from the outside."""

    make: Callable[[], Hypervisor]
    impatient: Callable[[], Hypervisor]  # gives up long before a guest is ready
    guest: GuestImage
    disk: Callable[[str], Disk]
    kill: Callable[[Hypervisor, str], None]  # ends a VM behind the driver's back
    leftovers: Callable[[], list[str]]
    cpus: Callable[[Hypervisor, str], set[frozenset[int]]]  # what each thread of a VM may run on
    oom_scores: Callable[[Hypervisor, str], set[int]]  # oom_score_adj of each process of a VM


def fake(directory: Path) -> Subject:
    host = FakeVmHost()
    guest = GuestImage("1", 1, directory / "k", None, directory / "r", "quiet", "6.1")

    def disk(serial: str) -> Disk:
        path = directory / serial
        path.touch()
        return Disk(serial, path)

    def kill(hypervisor: Hypervisor, vm_id: str) -> None:
        assert isinstance(hypervisor, FakeHypervisor)
        hypervisor.end(vm_id)

    return Subject(
        lambda: FakeHypervisor(host),
        lambda: FakeHypervisor(host, boot_timeout_s=0.01),
        *(guest, disk, kill, lambda: list(host.vms)),
        lambda _, vm_id: {host.vms[vm_id].confinement.cpus or frozenset(os.sched_getaffinity(0))},
        lambda _, vm_id: {host.vms[vm_id].oom_score_adj},
    )


def libvirt() -> Subject:
    def kill(hypervisor: Hypervisor, vm_id: str) -> None:
        os.kill(hypervisor.processes(vm_id)[0].pid, signal.SIGKILL)

    return Subject(
        real.make,
        lambda: real.make(boot_timeout_s=1.5),
        real.real_guest(),
        real.small_disk,
        kill,
        real.leftovers,
        real.cpus_of,
        real.oom_scores_of,
    )


@pytest.fixture(params=["fake", "libvirt"])
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Subject:
    if request.param == "fake":
        return fake(tmp_path)
    real.need_real()
    return libvirt()


@pytest.fixture
async def hypervisor(subject: Subject) -> AsyncIterator[Hypervisor]:
    """An open driver; nothing may be left when its VMs are destroyed."""
    hypervisor = subject.make()
    await hypervisor.open()
    yield hypervisor
    for vm_id in ["one", "two"]:
        await hypervisor.destroy(vm_id)
    await hypervisor.close()
    assert subject.leftovers() == []


def mute(guest: GuestImage) -> GuestImage:
    """Return a guest that never answers: its kernel waits for a disk that never comes."""
    return dataclasses.replace(guest, cmdline=f"{guest.cmdline} {MUTE}")


async def next_event(hypervisor: Hypervisor) -> VmEvent:
    events = hypervisor.events()
    async with asyncio.timeout(30):
        return await anext(events)


async def no_event(hypervisor: Hypervisor) -> bool:
    try:
        async with asyncio.timeout(0.5):
            await anext(hypervisor.events())
    except TimeoutError:
        return True
    return False


async def reaches_agent(hypervisor: Hypervisor, vm_id: str) -> bool:
    _, writer = await hypervisor.dial(vm_id, CALL_PORT)
    writer.close()
    await writer.wait_closed()
    return True


async def test_life_of_a_vm(subject: Subject, hypervisor: Hypervisor) -> None:
    assert hypervisor.accelerator in ("kvm", "tcg")
    assert list(hypervisor.list()) == []
    await hypervisor.boot(real.spec("one", subject.guest))
    assert list(hypervisor.list()) == ["one"]
    assert hypervisor.processes("one")
    assert hypervisor.share_process("one") is None
    assert await reaches_agent(hypervisor, "one")
    with pytest.raises(VmError) as nobody:
        await hypervisor.dial("one", 7777)
    assert not isinstance(nobody.value, VmGoneError)
    with pytest.raises(AlreadyExistsError):
        await hypervisor.boot(real.spec("one", subject.guest))
    assert await reaches_agent(hypervisor, "one")

    first, second = subject.disk("layer-1"), subject.disk("layer-2")
    await asyncio.gather(*(hypervisor.attach_disk("one", disk) for disk in (first, second, first)))
    await hypervisor.attach_disk("one", second)
    await hypervisor.detach_disk("one", "layer-1")
    await hypervisor.detach_disk("one", "layer-1")
    await hypervisor.detach_disk("one", "never-attached")
    await hypervisor.attach_disk("one", first)
    with pytest.raises(VmError):
        await hypervisor.attach_disk("one", Disk("absent", Path("/nonexistent/disk")))

    with contextlib.ExitStack() as made:
        taps = [f"vx{secrets.token_hex(4)}" for _ in range(EXTRA_NICS + 1)]
        for tap in taps if os.geteuid() == 0 else ():
            await asyncio.to_thread(netns.create_tap, tap)
            made.callback(netns.inside, Path("/proc/self/ns/net"), functools.partial(netns.delete_link, tap))
        for number, tap in enumerate([*taps[:-1], taps[0]]):
            await hypervisor.attach_nic("one", tap, f"02:00:00:00:00:{number:02x}")
        with pytest.raises(ExhaustedError, match="no place for another"):
            await hypervisor.attach_nic("one", taps[-1], "02:00:00:00:00:ff")

    assert "vmrt-agent" in hypervisor.console_tail("one")
    assert hypervisor.console_tail("one", 0) == ""
    await asyncio.gather(hypervisor.destroy("one"), hypervisor.destroy("one"))
    await hypervisor.destroy("one")
    assert list(hypervisor.list()) == []
    assert await next_event(hypervisor) == VmEvent("one", VmEventKind.STOPPED, "destroyed")
    assert await no_event(hypervisor)


async def test_a_block_device_of_the_host(subject: Subject, hypervisor: Hypervisor) -> None:
    real.need_real()
    await hypervisor.boot(real.spec("one", subject.guest))
    with real.loop_device(2 * 1024**2) as (device, backing):
        before = device.stat()
        await hypervisor.attach_disk("one", Disk("volume", device, readonly=False))
        await hypervisor.attach_disk("one", Disk("volume", device, readonly=False))
        os.truncate(backing, 3 * 1024**2)
        await spawn.run(["losetup", "--set-capacity", device])
        assert await hypervisor.resize_disk("one", "volume") == 3 * 1024**2
        with pytest.raises(VmError):
            await hypervisor.resize_disk("one", "never-attached")
        await hypervisor.detach_disk("one", "volume")
        await hypervisor.attach_disk("one", Disk("volume", device))
        await hypervisor.detach_disk("one", "volume")
        after = device.stat()
        assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


async def test_a_vm_grows_and_gives_back(subject: Subject, hypervisor: Hypervisor) -> None:
    mib = 1024**2
    await hypervisor.boot(real.spec("one", subject.guest, max_vcpus=2, max_memory_bytes=1024 * mib))
    small = VmSize(1, 256 * mib, 2, 1024 * mib, 256 * mib)
    assert await hypervisor.size("one") == small
    for vcpus, memory_bytes in ((3, 256 * mib), (1, 1025 * mib)):
        with pytest.raises(ExhaustedError):
            await hypervisor.resize("one", vcpus, memory_bytes)
    assert await hypervisor.size("one") == small
    assert await hypervisor.resize("one", 2, 512 * mib) == dataclasses.replace(small, vcpus=2, memory_bytes=512 * mib)
    # The guest gives back as much as it can, in its own time; CPUs stay.
    await hypervisor.resize("one", 1, 200 * mib)
    async with asyncio.timeout(60):
        while (has := await hypervisor.size("one")).memory_bytes >= 512 * mib:
            await asyncio.sleep(0.1)
    assert has.memory_bytes >= 256 * mib
    assert has.vcpus == 2
    assert await hypervisor.resize("one", 2, 300 * mib) == dataclasses.replace(small, vcpus=2, memory_bytes=300 * mib)
    assert await reaches_agent(hypervisor, "one")


async def test_a_vm_is_kept_to_cpus(subject: Subject, hypervisor: Hypervisor) -> None:
    """Every thread of every process, one of a plugged CPU too, and again after a restart when it is asked for."""
    cpu = max(os.sched_getaffinity(0))
    await hypervisor.boot(real.spec("one", subject.guest, max_vcpus=3))
    before = subject.cpus(hypervisor, "one")
    with pytest.raises(VmError):
        await hypervisor.confine("one", Confinement(cpus=frozenset((8000,))))
    assert subject.cpus(hypervisor, "one") == before
    await hypervisor.confine("one", Confinement(cpus=frozenset((cpu,)), mems=frozenset((0,))))
    assert subject.cpus(hypervisor, "one") == {frozenset((cpu,))}
    await hypervisor.resize("one", 2, real.MEMORY_BYTES)
    assert subject.cpus(hypervisor, "one") == {frozenset((cpu,))}
    assert await reaches_agent(hypervisor, "one")
    await hypervisor.confine("one", Confinement())
    assert all(cpus >= frozenset.union(*before) for cpus in subject.cpus(hypervisor, "one"))
    with pytest.raises(VmGoneError):
        await hypervisor.confine("none", Confinement())
    # One boot for both: libvirt lets a process open it 20 times only.
    await weighed_for_the_oom_killer(subject, hypervisor)


async def weighed_for_the_oom_killer(subject: Subject, hypervisor: Hypervisor) -> None:
    """See that QEMU and its helpers have what was asked for; a real kill would take the machine's memory."""
    (ordinary,) = subject.oom_scores(hypervisor, "one")  # 0, unless this machine lets nobody have so little
    for value in (1000, ordinary):
        await hypervisor.weigh("one", value)
        assert subject.oom_scores(hypervisor, "one") == {value}
    with pytest.raises(VmGoneError):
        await hypervisor.weigh("none", 1)


async def test_a_vm_that_cannot_grow(subject: Subject, hypervisor: Hypervisor) -> None:
    await hypervisor.boot(real.spec("one", subject.guest))
    size = await hypervisor.size("one")
    assert size == VmSize(1, real.MEMORY_BYTES, 1, real.MEMORY_BYTES, real.MEMORY_BYTES)
    with pytest.raises(ExhaustedError):
        await hypervisor.resize("one", 2, real.MEMORY_BYTES)
    assert await hypervisor.resize("one", 1, real.MEMORY_BYTES) == size


async def test_an_id_can_be_used_again_at_once(subject: Subject, hypervisor: Hypervisor) -> None:
    for _ in range(2):
        await hypervisor.boot(real.spec("one", subject.guest))
        assert await reaches_agent(hypervisor, "one")
        await hypervisor.destroy("one")


async def test_unknown_vm(subject: Subject, hypervisor: Hypervisor) -> None:
    with pytest.raises(VmGoneError):
        await hypervisor.dial("none", CALL_PORT)
    with pytest.raises(VmGoneError):
        await hypervisor.attach_disk("none", subject.disk("layer-1"))
    with pytest.raises(VmGoneError):
        await hypervisor.detach_disk("none", "layer-1")
    with pytest.raises(VmGoneError):
        await hypervisor.resize("none", 1, real.MEMORY_BYTES)
    with pytest.raises(VmGoneError):
        await hypervisor.resize_disk("none", "layer-1")
    with pytest.raises(VmGoneError):
        hypervisor.console_tail("none")
    with pytest.raises(VmGoneError):
        hypervisor.processes("none")
    with pytest.raises(VmGoneError):
        hypervisor.share_process("none")
    with pytest.raises(VmGoneError):
        await hypervisor.attach_nic("none", "vt0", "02:00:00:00:00:01")
    await hypervisor.destroy("none")


async def test_vms_outlive_the_daemon(subject: Subject) -> None:
    first = subject.make()
    await first.open()
    await first.boot(real.spec("one", subject.guest, disks=(subject.disk("layer-1"),)))
    await first.attach_disk("one", subject.disk("layer-2"))
    processes = list(first.processes("one"))
    await first.close()

    second = subject.make()
    await second.open()
    assert list(second.list()) == ["one"]
    assert list(second.processes("one")) == processes
    assert await reaches_agent(second, "one")
    assert "vmrt-agent" in second.console_tail("one")
    await second.attach_disk("one", subject.disk("layer-2"))
    await second.detach_disk("one", "layer-1")
    await second.detach_disk("one", "layer-2")
    subject.kill(second, "one")
    assert (await next_event(second)).vm_id == "one"
    await second.destroy("one")
    await second.close()
    assert subject.leftovers() == []


async def test_a_killed_vm_is_told_once_and_fails_fast(subject: Subject, hypervisor: Hypervisor) -> None:
    await hypervisor.boot(real.spec("one", subject.guest))
    subject.kill(hypervisor, "one")
    event = await next_event(hypervisor)
    assert (event.vm_id, event.kind) == ("one", VmEventKind.CRASHED)
    assert list(hypervisor.list()) == []
    with pytest.raises(VmGoneError):
        await hypervisor.dial("one", CALL_PORT)
    with pytest.raises(VmGoneError):
        await hypervisor.attach_disk("one", subject.disk("layer-1"))
    assert "vmrt-agent" in hypervisor.console_tail("one")
    await hypervisor.destroy("one")
    with pytest.raises(VmGoneError):
        hypervisor.console_tail("one")
    assert await no_event(hypervisor)


async def test_a_guest_that_panics(subject: Subject, hypervisor: Hypervisor) -> None:
    guest = dataclasses.replace(subject.guest, cmdline=f"{subject.guest.cmdline} {PANIC}")
    with pytest.raises(VmError) as failure:
        await hypervisor.boot(real.spec("one", guest))
    assert failure.value.phase == "boot"
    assert "one" in failure.value.resource
    assert "Kernel panic" in failure.value.console
    assert "Kernel panic" in str(failure.value)
    assert list(hypervisor.list()) == []
    assert await no_event(hypervisor)


async def test_a_guest_that_never_answers(subject: Subject) -> None:
    hypervisor = subject.impatient()
    await hypervisor.open()
    with pytest.raises(VmError, match="did not report") as failure:
        await hypervisor.boot(real.spec("one", mute(subject.guest)))
    assert failure.value.phase == "boot"
    assert list(hypervisor.list()) == []
    assert await no_event(hypervisor)
    await hypervisor.close()
    assert subject.leftovers() == []


@pytest.mark.parametrize("after_s", [0, 0.15, 1.0])
async def test_a_cancelled_boot_leaves_nothing(subject: Subject, after_s: float) -> None:
    hypervisor = subject.make()
    await hypervisor.open()
    boot = asyncio.create_task(hypervisor.boot(real.spec("one", mute(subject.guest))))
    await asyncio.sleep(after_s)
    boot.cancel()
    with pytest.raises(asyncio.CancelledError):
        await boot
    assert list(hypervisor.list()) == []
    assert await no_event(hypervisor)
    await hypervisor.close()
    assert subject.leftovers() == []


async def test_a_vm_destroyed_while_it_boots(subject: Subject, hypervisor: Hypervisor) -> None:
    if isinstance(hypervisor, FakeHypervisor):
        pytest.skip("the fake boots at once")
    boot = asyncio.create_task(hypervisor.boot(real.spec("one", mute(subject.guest))))
    async with asyncio.timeout(60):
        while not real.runs("one"):
            await asyncio.sleep(0.1)
    await hypervisor.destroy("one")
    with pytest.raises(VmError):
        await boot
    assert list(hypervisor.list()) == []
