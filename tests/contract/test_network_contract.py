"""What every `vmrt.pods.drivers.Network` does, held against the real driver (root, CNI plugins) and its one fake."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from ipaddress import ip_address, ip_interface
from pathlib import Path

import pytest

from tests.contract.fake_network import FakeHost, FakeNetwork
from vmrt.config import NetworkConfig
from vmrt.errors import NetworkError
from vmrt.model import SandboxSpec
from vmrt.netbridge import NetBridge
from vmrt.pods.drivers import Network

SPEC = SandboxSpec("web-0", "uid", "default")
MAC = "02:00:00:00:00:01"


@dataclass
class Subject:
    """A driver's maker (each call is a restarted daemon), and its variants whose setup fails or never ends."""

    make: Callable[[], Network]
    failing: Callable[[], Network]
    stuck: Callable[[], Network]


def fake() -> Subject:
    host = FakeHost()

    def failing() -> FakeNetwork:
        network = FakeNetwork(host)
        network.failures["setup"] = [NetworkError("plugin bad: no", phase="cni add")]
        return network

    def stuck() -> FakeNetwork:
        network = FakeNetwork(host)
        network.gate.clear()
        return network

    return Subject(lambda: FakeNetwork(host), failing, stuck)


def real(root: Path) -> Subject:
    instance = secrets.token_hex(4)

    def make(config: NetworkConfig) -> NetBridge:
        return NetBridge(config, root, instance)

    def scripted(name: str, code: str) -> NetBridge:
        directory = root / name
        directory.mkdir(exist_ok=True)
        script = directory / name
        script.write_text(
            f"#!{sys.executable} -IS\nimport os, sys, time\nos.environ['CNI_COMMAND'] == 'ADD' and {code}\n"
        )
        script.chmod(0o755)
        conflist = f'{{"cniVersion": "1.0.0", "name": "{name}", "plugins": [{{"type": "{name}"}}]}}'
        (directory / "10.conflist").write_text(conflist)
        return make(NetworkConfig(cni_config_dir=directory, cni_bin_dirs=(directory,)))

    return Subject(
        lambda: make(NetworkConfig(cni_config_dir=root / "none")),
        lambda: scripted("bad", "sys.exit('no')"),
        lambda: scripted("stuck", "time.sleep(600)"),
    )


@pytest.fixture(params=["fake", "real"])
async def subject(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Subject]:
    if request.param == "fake":
        yield fake()
        return
    if os.geteuid() != 0 or not shutil.which("bridge", path="/opt/cni/bin:/usr/lib/cni"):
        reason = "the real network driver needs root and CNI's plugins (make setup)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    subject = real(tmp_path)
    yield subject
    network = subject.make()
    for sandbox in network.list():
        await network.teardown(sandbox)
    await network.close()


@pytest.fixture
async def network(subject: Subject) -> Network:
    network = subject.make()
    await network.open()
    return network


@pytest.fixture
async def tap(network: Network) -> AsyncIterator[str]:
    name = f"vc{secrets.token_hex(4)}"
    yield name
    await network.delete_taps([name])


async def test_setup_gives_each_pod_its_own_address(network: Network) -> None:
    assert (await network.status())[0]
    pods = [await network.setup(name, SPEC, device_mac=MAC) for name in ("one", "two")]
    assert len({pod.ips[0] for pod in pods}) == 2
    assert network.list() == ["one", "two"]
    for pod in pods:
        (interface,) = pod.interfaces
        assert (interface.name, interface.device_mac) == ("eth0", MAC)
        assert interface.mac != MAC and interface.mtu >= 1280
        assert [str(ip_interface(cidr).ip) for cidr in interface.addresses] == list(pod.ips)
        (default,) = [route for route in pod.routes if route.destination == "0.0.0.0/0"]
        assert ip_address(default.gateway) in ip_interface(interface.addresses[0]).network


async def test_second_setup_is_refused_and_harms_nothing(network: Network) -> None:
    await network.setup("one", SPEC, device_mac=MAC)
    with pytest.raises(NetworkError, match="one"):
        await network.setup("one", SPEC, device_mac=MAC)
    assert network.list() == ["one"]


async def test_teardown_is_idempotent_and_needs_no_setup(network: Network) -> None:
    await network.teardown("never-set-up")
    first = await network.setup("one", SPEC, device_mac=MAC)
    await network.teardown("one")
    await network.teardown("one")
    assert network.list() == []
    assert (await network.setup("one", SPEC, device_mac=MAC)).interfaces[0].name == first.interfaces[0].name


async def test_pods_outlive_the_driver(subject: Subject, network: Network) -> None:
    await network.setup("one", SPEC, device_mac=MAC)
    await network.close()
    again = subject.make()
    await again.open()
    assert again.list() == ["one"]
    await again.teardown("one")
    assert again.list() == network.list() == []


async def test_taps_are_made_and_deleted_repeatedly(network: Network, tap: str) -> None:
    for _ in range(2):
        await network.create_tap(tap)
    for _ in range(2):
        await network.delete_taps([tap])


async def test_join_wants_both_ends_and_may_be_repeated(network: Network, tap: str) -> None:
    with pytest.raises(NetworkError):
        await network.join("one", tap)
    await network.setup("one", SPEC, device_mac=MAC)
    with pytest.raises(NetworkError, match="one"):
        await network.join("one", tap)
    await network.create_tap(tap)
    for _ in range(2):
        await network.join("one", tap)
    # It is the pod's now.
    await network.delete_taps([tap])
    await network.join("one", tap)
    await network.teardown("one")
    await network.create_tap(tap)


async def test_failed_setup_leaves_nothing(subject: Subject) -> None:
    network = subject.failing()
    await network.open()
    with pytest.raises(NetworkError, match=r"plugin bad: no") as caught:
        await network.setup("one", SPEC, device_mac=MAC)
    assert caught.value.phase == "cni add"
    assert network.list() == []


async def test_cancelled_setup_leaves_nothing(subject: Subject) -> None:
    network = subject.stuck()
    await network.open()
    task = asyncio.create_task(network.setup("one", SPEC, device_mac=MAC))
    while not network.list():
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert network.list() == []


@pytest.mark.parametrize("name", ["", "a/b", "..", "-x", "x" * 200, "a b"])
async def test_names_that_could_escape_are_refused(network: Network, name: str) -> None:
    with pytest.raises(NetworkError):
        await network.setup(name, SPEC, device_mac=MAC)
    with pytest.raises(NetworkError):
        await network.teardown(name)
    with contextlib.suppress(NetworkError):
        await network.delete_taps([name])
    assert network.list() == []
