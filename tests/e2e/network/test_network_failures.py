"""Networks that fail, crash or vanish half-way: what is told, and that nothing stays. Real plugins, real kernel."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tests.e2e.network.house import (
    DEVICE_MAC,
    House,
    a_bridge,
    a_spec,
    calls,
    configure,
    output,
    plugin,
)
from vmrt import netns
from vmrt.errors import NetworkError
from vmrt.netbridge import NOT_READY, NetBridge

FAILURES = {
    "error object": ('print(\'{"code": 7, "msg": "no", "details": "not today"}\'); sys.exit(1)', "no; not today"),
    "words on stderr": ("sys.exit('fell over')", "fell over"),
    "no words at all": ("os.abort()", "status -6"),
    "not JSON": ("print('done!')", "no CNI result"),
    "no result": ('print(\'{"ips": [{"address": "nowhere"}]}\')', "malformed"),
}


# --- crash, reboot, changed configuration -----------------------------------------------------------------------------


async def test_restarted_daemon_tears_down_with_what_add_used(configured: House) -> None:
    configure(configured, a_bridge(configured), plugin(configured, "chained"))
    before = configured.network()
    await before.open()
    sandbox, _, _ = await configured.pod(before)
    (configured.config.cni_config_dir / "10-test.conflist").unlink()
    after = configured.network()
    await after.open()
    assert (await after.status())[:2] == (False, NOT_READY)
    assert after.list() == [sandbox]
    await after.teardown(sandbox)
    assert calls(configured) == ["ADD chained True", "DEL chained True"]
    assert configured.leftovers() == []


async def test_teardown_after_the_netns_is_gone(house: House, network: NetBridge) -> None:
    sandbox, _, _ = await house.pod(network)
    # What a reboot leaves: the file without its mount, and the record.
    path = house.root / "netns" / sandbox
    netns.remove(path)
    path.touch()
    assert network.list() == [sandbox]
    await house.network().teardown(sandbox)
    assert house.leftovers() == []


async def test_teardown_after_a_reboot(house: House, network: NetBridge) -> None:
    sandbox, pod, _ = await house.pod(network)
    record = house.root / "cni" / f"{sandbox}.json"
    lease = next(house.root.glob(f"cni/ipam/*/{pod.ips[0]}"))
    kept = {path: path.read_bytes() for path in (record, lease)}
    await network.teardown(sandbox)
    # On the disk everything is as before; the kernel knows nothing: no netns, no interface, no iptables rule.
    for path, content in kept.items():
        path.write_bytes(content)
    (house.root / "netns" / sandbox).touch()
    await house.network().teardown(sandbox)
    assert house.leftovers() == []


async def test_teardown_of_a_setup_that_was_killed(configured: House) -> None:
    # The second plugin kills the daemon's work by never coming back; the driver is dropped without any undo.
    configure(configured, a_bridge(configured), plugin(configured, "stuck", add="time.sleep(600)"))
    network = configured.network()
    await network.open()
    sandbox = configured.sandbox()
    task = asyncio.ensure_future(network.setup(sandbox, a_spec(), device_mac=DEVICE_MAC))
    while not (configured.root / "calls.log").exists():
        await asyncio.sleep(0.05)
    record = (configured.root / "cni" / f"{sandbox}.json").read_bytes()
    assert len(configured.leases()) == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    # Cancelling undoes everything ...
    assert calls(configured) == ["ADD stuck True", "DEL stuck True"]
    assert configured.leftovers() == []
    # ... and a record that a killed daemon would have left is enough as well.
    (configured.root / "cni" / f"{sandbox}.json").write_bytes(record)
    assert configured.network().list() == [sandbox]
    await configured.network().teardown(sandbox)
    assert configured.leftovers() == []


async def test_damaged_record_still_frees_the_address(house: House, network: NetBridge) -> None:
    sandbox, _, _ = await house.pod(network)
    (house.root / "cni" / f"{sandbox}.json").write_text('{"format": 1, "conta')
    await network.teardown(sandbox)
    assert house.leftovers() == []


# --- failing plugins --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 1, 2])
async def test_failing_plugin_leaves_nothing(configured: House, position: int) -> None:
    bad = plugin(configured, "bad", add=FAILURES["error object"][0])
    good = plugin(configured, "good")
    chain = [a_bridge(configured), good]
    chain.insert(position, bad)
    configure(configured, *chain)
    network = configured.network()
    await network.open()
    sandbox = configured.sandbox()
    with pytest.raises(NetworkError) as caught:
        await network.setup(sandbox, a_spec(), device_mac=DEVICE_MAC)
    for part in ("cni add", f"sandbox {sandbox}", "plugin bad", "no; not today", "10-test.conflist"):
        assert part in str(caught.value)
    # DEL ran for the whole chain, in reverse, also for plugins that had not been reached.
    mine = [call.split()[:2] for call in calls(configured) if call.startswith("DEL")]
    assert mine == ([["DEL", "good"], ["DEL", "bad"]] if position < 2 else [["DEL", "bad"], ["DEL", "good"]])
    assert configured.leftovers() == []
    assert network.list() == []


@pytest.mark.parametrize("how", list(FAILURES))
async def test_every_kind_of_failure_is_told(configured: House, how: str) -> None:
    code, words = FAILURES[how]
    configure(configured, a_bridge(configured), plugin(configured, "bad", add=code))
    network = configured.network()
    await network.open()
    with pytest.raises(NetworkError, match="plugin bad") as caught:
        await network.setup(configured.sandbox(), a_spec(), device_mac=DEVICE_MAC)
    assert words in str(caught.value)
    assert configured.leftovers() == []


async def test_plugin_that_hangs_is_killed(configured: House) -> None:
    configured.config = replace(configured.config, cni_timeout_s=2.0)
    configure(configured, a_bridge(configured), plugin(configured, "stuck", add="time.sleep(600)"))
    network = configured.network()
    await network.open()
    with pytest.raises(NetworkError, match=r"plugin stuck: .*did not finish within 2 s"):
        await network.setup(configured.sandbox(), a_spec(), device_mac=DEVICE_MAC)
    assert configured.leftovers() == []
    assert "bin/stuck" not in output("ps", "-eo", "args")


async def test_missing_plugin_is_refused_before_anything_is_made(configured: House) -> None:
    configure(configured, a_bridge(configured), {"type": "no-such-plugin"})
    network = configured.network()
    await network.open()
    ready, reason, message = await network.status()
    assert (ready, reason) == (False, NOT_READY)
    assert "no-such-plugin" in message
    with pytest.raises(NetworkError, match="no-such-plugin") as caught:
        await network.setup(configured.sandbox(), a_spec(), device_mac=DEVICE_MAC)
    assert str(configured.root / "bin") in str(caught.value)
    assert configured.leftovers() == []


async def test_delete_is_repeated_until_it_works(configured: House) -> None:
    flag = configured.root / "broken"
    delete = f"pathlib.Path({str(flag)!r}).exists() and sys.exit('not now')"
    configure(configured, a_bridge(configured), plugin(configured, "moody", delete=delete))
    network = configured.network()
    await network.open()
    sandbox, _, _ = await configured.pod(network)
    flag.touch()
    with pytest.raises(NetworkError, match=r"cni del, sandbox .*plugin moody: not now"):
        await network.teardown(sandbox)
    assert calls(configured).count("DEL moody True") == 3
    assert configured.leases() == [], "a plugin that fails must not keep the others from cleaning up"
    assert network.list() == [sandbox]
    flag.unlink()
    await network.teardown(sandbox)
    assert configured.leftovers() == []
