"""The daemons whose networks are tested."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.e2e.network.house import (
    FALLBACK,
    House,
    housed,
)
from vmrt.config import NetworkConfig
from vmrt.netbridge import NetBridge


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    """A daemon with the built-in network."""
    if os.geteuid() != 0:
        pytest.fail("network tests need root")
    instance = secrets.token_hex(4)
    with housed(House(tmp_path, instance, FALLBACK, f"vmrt-{instance}")) as house:
        yield house
        # A test that failed half-way must not leave its rules on the machine.
        driver = house.network()
        for sandbox in driver.list():
            await driver.teardown(sandbox)


@pytest.fixture
def configured(tmp_path: Path, house: House) -> House:
    """A daemon whose operator has a configuration directory (empty so far) and plugins of their own."""
    for name in ("net.d", "bin"):
        (tmp_path / name).mkdir()
    house.config = NetworkConfig(
        cni_config_dir=tmp_path / "net.d",
        cni_bin_dirs=(tmp_path / "bin", *NetworkConfig().cni_bin_dirs),
        fallback_subnet="",
        cni_timeout_s=20.0,
    )
    return house


@pytest.fixture
async def network(house: House) -> AsyncIterator[NetBridge]:
    network = house.network()
    await network.open()
    yield network
    if not network.list():
        await network.close()
