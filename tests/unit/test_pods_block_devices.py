"""Block devices through a container's life: plugged once for a pod, unplugged with the last user, whatever fails."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pods_world import CONTAINER, SANDBOX, Fault, World, faults
from test_pods_service import run, spoiled

from vmrt.errors import VmrtError
from vmrt.model import Device
from vmrt.pods import block_devices, recovery
from vmrt.pods.block_device import BlockDevice

SPEC = replace(CONTAINER, devices=(Device("/dev/data", "/dev/fake", "rw"), Device("/dev/null", "/dev/null", "rw")))


@pytest.fixture(autouse=True)
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that passes for a block device of the host: it grows with the file."""
    path = tmp_path / "device"
    path.write_bytes(b"x" * 512)

    def found(host_path: str, field: str, *, readonly: bool) -> BlockDevice:
        assert host_path == "/dev/fake"
        return BlockDevice(field, str(path), (7, 0), readonly)

    monkeypatch.setattr(block_devices, "block_device", found)
    monkeypatch.setattr(block_devices, "size_bytes", lambda number: path.stat().st_size)
    yield path


def plugged(world: World, sandbox: str) -> list[str]:
    """The host's block devices that the VM has."""
    vm = world.vm_host.vms[world.table.sandboxes[sandbox].record.vm_id]
    return [serial for serial in vm.disks if serial.startswith("b-")]


def test_containers_share_a_disk_until_the_last_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        sandbox = await world.service.run_sandbox(SANDBOX)
        first = await world.service.create_container(sandbox, SPEC)
        (serial,) = plugged(world, sandbox)
        asked = world.created[-1].devices
        assert [(node.path, node.disk_serial, node.guest_path) for node in asked] == [
            ("/dev/data", serial, ""),
            ("/dev/null", "", "/dev/null"),
        ]
        second = await world.service.create_container(sandbox, replace(SPEC, name="second"))
        assert plugged(world, sandbox) == [serial]
        await world.service.remove_container(first)
        assert plugged(world, sandbox) == [serial]
        await world.service.remove_container(second)
        assert plugged(world, sandbox) == []
        third = await world.service.create_container(sandbox, replace(SPEC, name="third"))
        assert plugged(world, sandbox) == [serial]
        await world.restart()
        await world.service.remove_container(third)
        assert plugged(world, sandbox) == []

    run(tmp_path, monkeypatch, test)


@pytest.mark.parametrize("fault", faults(["attach", "agent create"]), ids=str)
def test_a_spoiled_creation_leaves_no_disk(fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        sandbox = await world.service.run_sandbox(SANDBOX)
        await world.service.create_container(sandbox, replace(CONTAINER, name="before"))  # the layers are plugged in
        await spoiled(world, fault, world.service.create_container(sandbox, SPEC))
        assert plugged(world, sandbox) == []
        await world.service.create_container(sandbox, SPEC)
        assert len(plugged(world, sandbox)) == 1

    run(tmp_path, monkeypatch, test)


@pytest.mark.parametrize("step", ["release volume", "release disk", "detach"])
@pytest.mark.parametrize("before", [True, False])
def test_an_unplug_that_fails_is_tried_again(
    step: str, before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(world: World) -> None:
        sandbox = await world.service.run_sandbox(SANDBOX)
        container = await world.service.create_container(sandbox, SPEC)
        await spoiled(world, Fault(step, before, VmrtError("busy")), world.service.remove_container(container))
        await recovery.sweep(world.table)
        assert plugged(world, sandbox) == []
        assert world.service.containers() == []

    run(tmp_path, monkeypatch, test)


def test_a_device_that_grows_is_told_to_the_guest_once(
    device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(world: World) -> None:
        told: list[tuple[str, int]] = []

        async def resize(vm_id: str, serial: str) -> int:
            told.append((serial, device.stat().st_size))
            return device.stat().st_size

        monkeypatch.setattr(world.hypervisor, "resize_disk", resize)
        sandbox = await world.service.run_sandbox(SANDBOX)
        await world.service.create_container(sandbox, SPEC)
        (serial,) = plugged(world, sandbox)
        await block_devices.tell_sizes(world.table)
        assert told == []
        device.write_bytes(b"x" * 1024)
        for _ in range(2):
            await block_devices.tell_sizes(world.table)
        assert told == [(serial, 1024)]

    run(tmp_path, monkeypatch, test)
