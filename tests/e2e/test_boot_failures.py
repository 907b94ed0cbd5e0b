"""Guests that do not come up: the error names the phase and carries the console's end, and nothing is left.

The broken guests are the real image with another kernel command line, another last step of its /init, or another file.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from demo.daemon import GUEST, Daemon
from tests.e2e.conftest import clean_daemon, sandbox_config
from tests.e2e.failures import Before, kill, refused, wait_for_qemu
from vmrt.guest_image import cpio, manifest
from vmrt.proto.runtime.v1 import api_pb2 as cri

CODE = grpc.StatusCode
BOOT_TIMEOUT_S = 20
CONSOLE = "--- end of the guest's console ---"
# Without a root a kernel panics, with an initramfs and without: of a word that comes twice the last counts.
NO_ROOT = "rdinit=/absent root=/dev/absent"
# What /init becomes in place of our agent. It cuts its words at blanks and knows no quotes; a kernel that starts init
# itself takes the same words from its command line, and knows double quotes only.
MUTE = "/usr/bin/python3 -c print('nobody\\x20home',flush=True);__import__('time').sleep(1000)"
# Our agent, but the call that configures it for its pod ends it, and with the first process the kernel.
FAITHLESS = (
    "/usr/bin/python3 -I -S -B -X utf8 -c "
    "s=__import__('vmrt.agent.service',fromlist=['Service']);"
    "s.Service.configure_sandbox=lambda*_:__import__('os')._exit(7);"
    "__import__('runpy').run_module('vmrt.agent',run_name='__main__')"
)


def broken_guest(target: Path, *, append: str = "", agent: str = "", kernel: bytes = b"") -> str:
    """Make a guest image whose manifest is true, so that nothing but the boot itself can find out; return its handler.

    `append` goes to the command line, `agent` is what /init executes, `kernel` the content of the kernel's file.
    """
    source = manifest.directory_of(GUEST)
    image = manifest.read(source)
    target.mkdir()
    for file in image.files:
        (target / file.name).symlink_to(source / file.name)

    def other(file: manifest.ImageFile | None, content: bytes) -> manifest.ImageFile:
        assert file is not None
        path = target / file.name
        path.unlink()
        path.write_bytes(content)
        return manifest.describe(path)

    image = dataclasses.replace(image, version=target.name, cmdline=f"{image.cmdline} {append}".rstrip())
    if agent and image.initramfs is None:
        # What stands behind "--" is init's; the words that the hypervisor would append must come before it.
        program, _, arguments = agent.partition(" ")
        words = f"{image.cmdline} console=ttyS0 panic=-1 init={program} -- {arguments}"
        image = dataclasses.replace(image, cmdline=words)
    elif agent:
        assert image.initramfs is not None
        archive = (source / image.initramfs.name).read_bytes()
        steps = re.search(rb"(?:load /modules/\S+\n)+root \S+ \S+\nexec ", archive)
        assert steps is not None
        # The kernel unpacks one archive after the other: a later /plan replaces the earlier one.
        plan = cpio.file("plan", steps.group() + agent.encode() + b"\n")
        image = dataclasses.replace(image, initramfs=other(image.initramfs, archive + cpio.archive([plan])))
    if kernel:
        image = dataclasses.replace(image, kernel=other(image.kernel, kernel))
        if image.initramfs is None:
            # QEMU looks more closely at a kernel that is to have one; without, it boots anything, and nothing comes.
            (target / "initramfs.cpio").write_bytes(cpio.archive([]))
            image = dataclasses.replace(image, initramfs=manifest.describe(target / "initramfs.cpio"))
    (target / manifest.FILE).write_text(manifest.dumps(image))
    return f'[handlers.{target.name}]\nguest = "{target}"\n'


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    """A daemon with a handler for each way to fail."""
    with clean_daemon("boot") as daemon:
        guests = daemon.root / "guests"
        guests.mkdir()
        handlers = [
            broken_guest(guests / "panics", append=NO_ROOT),
            broken_guest(guests / "mute", agent=MUTE),
            broken_guest(guests / "faithless", agent=FAITHLESS),
            broken_guest(guests / "no-kernel", kernel=b"no kernel at all\n" * 4096),
            broken_guest(guests / "damaged"),
            broken_guest(guests / "other-protocol"),
            f'[handlers.absent]\nguest = "{guests}/absent"\n',
        ]
        with (guests / "damaged" / manifest.FILE).open("r+") as file:
            text = file.read()
            file.seek(0)
            file.truncate()
            file.write(re.sub(r'"sha256": "[0-9a-f]{4}', '"sha256": "0000', text))
        other = guests / "other-protocol" / manifest.FILE
        other.write_text(other.read_text().replace('"protocol": 1', '"protocol": 9999'))
        configure(daemon, "[handlers.vm]\n", *handlers)
        daemon.start()
        yield daemon


@pytest.fixture
def impatient() -> Iterator[Daemon]:
    """A daemon that does not wait long, with handlers whose guests never answer."""
    with clean_daemon("late", f"[hypervisor]\nboot_timeout_s = {BOOT_TIMEOUT_S}\n") as daemon:
        guests = daemon.root / "guests"
        guests.mkdir()
        panics = broken_guest(guests / "panics-and-stays", append=f"{NO_ROOT} panic=0")
        configure(daemon, panics, broken_guest(guests / "mute", agent=MUTE))
        daemon.start()
        yield daemon


def configure(daemon: Daemon, *tables: str) -> None:
    """Add to the configuration of a daemon that does not run yet."""
    daemon.config.write_text(daemon.config.read_text() + "".join(tables))


def run(daemon: Daemon, handler: str, logs: Path) -> None:
    request = cri.RunPodSandboxRequest(config=sandbox_config(logs, handler), runtime_handler=handler)
    daemon.runtime.RunPodSandbox(request)


def test_a_guest_that_panics(daemon: Daemon, tmp_path: Path) -> None:
    with refused(daemon, CODE.UNKNOWN, "boot, vm ", "ended before its agent reported", CONSOLE) as refusal:
        run(daemon, "panics", tmp_path)
    assert "Kernel panic" in refusal.text.partition(CONSOLE)[2]


def test_a_guest_that_dies_when_it_is_configured(daemon: Daemon, tmp_path: Path) -> None:
    with refused(daemon, CODE.UNKNOWN, "configure, sandbox ", "did not take its configuration", CONSOLE) as refusal:
        run(daemon, "faithless", tmp_path)
    assert "Kernel panic" in refusal.text.partition(CONSOLE)[2]


def test_guests_that_never_answer(impatient: Daemon, tmp_path: Path) -> None:
    """One whose kernel stays in its panic, one that boots well and runs something else. Both at the same time."""
    before = Before(impatient)
    handlers = {"panics-and-stays": "Kernel panic", "mute": "nobody home"}
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(run, impatient, handler, tmp_path) for handler in handlers]
    for call, last_words in zip(calls, handlers.values(), strict=True):
        failure = call.exception()
        assert isinstance(failure, grpc.RpcError)
        assert failure.code() is CODE.UNKNOWN
        what, _, console = (failure.details() or "").partition(CONSOLE)
        assert what.startswith("boot, vm ")
        # A busy machine's part is told between the two.
        assert f"did not report within {BOOT_TIMEOUT_S} s" in what
        assert "(hypervisor.boot_timeout_s bounds it)" in what
        assert last_words in console
    assert before.left() == {}


def test_a_kernel_that_is_none(daemon: Daemon, tmp_path: Path) -> None:
    with refused(daemon, CODE.UNKNOWN, "boot, vm ", "kernel"):
        run(daemon, "no-kernel", tmp_path)


@pytest.mark.parametrize(
    ("handler", "code", "words"),
    [
        ("damaged", CODE.INTERNAL, "content is not what was built"),
        ("other-protocol", CODE.FAILED_PRECONDITION, "speaks protocol 9999"),
        ("absent", CODE.NOT_FOUND, "there is no guest image"),
    ],
)
def test_an_image_that_is_not_fit(
    daemon: Daemon, tmp_path: Path, handler: str, code: grpc.StatusCode, words: str
) -> None:
    with refused(daemon, code, "guest image", f"guests/{handler}", words, "vmrt guest build"):
        run(daemon, handler, tmp_path)


def test_qemu_is_killed_during_the_boot(daemon: Daemon, tmp_path: Path) -> None:
    with refused(daemon, CODE.UNKNOWN, "boot, vm ", "ended before its agent reported", "QEMU was killed"):
        config = sandbox_config(tmp_path)
        call = daemon.runtime.RunPodSandbox.future(cri.RunPodSandboxRequest(config=config, runtime_handler="mute"))
        qemu = wait_for_qemu(daemon)
        while not list(daemon.root.glob("vms/*/console")):
            assert not call.done()
            time.sleep(0.05)
        kill(qemu)
        call.result()


def test_a_client_that_gives_up(daemon: Daemon, tmp_path: Path) -> None:
    """At the first sight of QEMU, and with its own time limit: what was made is undone without anybody waiting."""
    # A guest that never answers: with another the client might be too late.
    request = cri.RunPodSandboxRequest(config=sandbox_config(tmp_path), runtime_handler="mute")
    before = Before(daemon)
    call = daemon.runtime.RunPodSandbox.future(request)
    wait_for_qemu(daemon)
    call.cancel()
    before.wait_restored()
    with pytest.raises(grpc.RpcError) as caught:
        # The name is free again.
        daemon.runtime.RunPodSandbox(request, timeout=1)
    assert caught.value.code() is CODE.DEADLINE_EXCEEDED
    before.wait_restored()
    assert not daemon.runtime.ListPodSandbox(cri.ListPodSandboxRequest()).items
