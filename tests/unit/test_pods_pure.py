"""Records, sizing, resolv.conf, signals, the store."""

from dataclasses import replace
from pathlib import Path

import pytest

from vmrt.config import HandlerConfig, HypervisorConfig
from vmrt.errors import FailedPreconditionError, IllegalTransitionError
from vmrt.model import (
    ContainerSpec,
    DnsConfig,
    HugepageLimit,
    LinuxResources,
    Mount,
    PortMapping,
    Protocol,
    SandboxSpec,
)
from vmrt.pods import resolv, sizing
from vmrt.pods.container_stop import signal_number
from vmrt.pods.records import (
    CONTAINER_MOVES,
    SANDBOX_MOVES,
    ContainerRecord,
    ContainerState,
    SandboxRecord,
    SandboxState,
)
from vmrt.store import RootLock, Store

SPEC = SandboxSpec(
    name="n",
    uid="u",
    namespace="ns",
    labels={"a": "b"},
    annotations={"k": "v\n\u00e9"},
    port_mappings=(PortMapping(Protocol.SCTP, 1, 2, "::1"),),
    dns=DnsConfig(("10.0.0.1",)),
    resources=LinuxResources(unified={"memory.high": "1"}),
)
SANDBOX = SandboxRecord("s" * 64, SPEC, SandboxState.CREATING, 5, "vm", "tap", phases_ms={"boot": 1.5})
CONTAINER = ContainerRecord(
    id="c" * 64,
    sandbox_id=SANDBOX.id,
    spec=ContainerSpec(name="c", image="i", mounts=(Mount("/a", "/b"),), envs=(("A", "1"),)),
    state=ContainerState.CREATING,
    created_ns=6,
    image_id="sha256:0",
    image_ref="sha256:0",
)


def test_records_come_back_from_disk_as_they_were(tmp_path: Path) -> None:
    store = Store(tmp_path / "state.db")
    store.put("sandbox", SANDBOX.id, SANDBOX)
    store.put("container", CONTAINER.id, CONTAINER)
    store.put("container", CONTAINER.id, CONTAINER.moved(ContainerState.CREATED))
    store.close()
    again = Store(tmp_path / "state.db")
    assert again.load("sandbox", SandboxRecord) == [SANDBOX]
    assert again.load("container", ContainerRecord) == [CONTAINER.moved(ContainerState.CREATED)]
    again.delete("sandbox", SANDBOX.id)
    again.delete("sandbox", SANDBOX.id)
    assert again.load("sandbox", SandboxRecord) == []
    again.close()


def test_a_store_of_a_newer_schema_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "state.db")
    store._db.execute("PRAGMA user_version=99")
    store.close()
    with pytest.raises(FailedPreconditionError, match="schema 99"):
        Store(tmp_path / "state.db")


def test_one_daemon_a_root(tmp_path: Path) -> None:
    lock = RootLock(tmp_path)
    with pytest.raises(FailedPreconditionError, match="another vmrt daemon"):
        RootLock(tmp_path)
    lock.release()
    RootLock(tmp_path).release()


@pytest.mark.parametrize("old", list(SandboxState))
@pytest.mark.parametrize("new", list(SandboxState))
def test_sandbox_moves(old: SandboxState, new: SandboxState) -> None:
    record = SandboxRecord("s", SPEC, old, 0, "vm", "tap")
    if new in SANDBOX_MOVES[old]:
        assert record.moved(new).state is new
    else:
        with pytest.raises(IllegalTransitionError, match=f"{old.value} cannot become {new.value}"):
            record.moved(new)


def test_every_container_state_but_the_last_can_end() -> None:
    for state in ContainerState:
        if state not in (ContainerState.CREATING, ContainerState.REMOVING):
            assert ContainerState.REMOVING in CONTAINER_MOVES[state]
    assert not CONTAINER_MOVES[ContainerState.REMOVING]


MIB = 1024**2


@pytest.mark.parametrize(
    ("limits", "handler", "expected"),
    [
        (None, HandlerConfig(), (1, 512 * MIB)),
        (LinuxResources(), HandlerConfig(), (1, 512 * MIB)),
        (LinuxResources(memory_limit_bytes=960 * MIB), HandlerConfig(), (1, (960 + 20 + 128) * MIB)),
        (LinuxResources(memory_limit_bytes=1), HandlerConfig(), (1, 160 * MIB)),
        (LinuxResources(memory_limit_bytes=960 * MIB + 1), HandlerConfig(), (1, (960 + 20 + 128 + 2) * MIB)),
        (LinuxResources(cpu_quota_us=150_000, cpu_period_us=100_000), HandlerConfig(), (2, 512 * MIB)),
        (LinuxResources(cpu_quota_us=-1, cpu_period_us=100_000), HandlerConfig(vcpus=2), (2, 512 * MIB)),
        (LinuxResources(cpu_quota_us=10**9, cpu_period_us=1000), HandlerConfig(), (4, 512 * MIB)),
    ],
)
def test_sizing(
    limits: LinuxResources | None,
    handler: HandlerConfig,
    expected: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    spec = SandboxSpec(name="n", uid="u", namespace="ns", resources=limits)
    assert sizing.size(spec, HypervisorConfig(), handler) == expected


def test_the_runtime_class_overhead_counts() -> None:
    config = HypervisorConfig()
    limits = LinuxResources(memory_limit_bytes=100 * MIB, cpu_quota_us=90_000, cpu_period_us=100_000)
    spec = SandboxSpec(name="n", uid="u", namespace="ns", resources=limits)
    assert sizing.asked(spec, config, HandlerConfig()) == (1, 232 * MIB)
    # The guest gets what QEMU itself does not take; the CPUs are one sum.
    overhead = LinuxResources(memory_limit_bytes=200 * MIB, cpu_quota_us=25_000, cpu_period_us=50_000)
    assert sizing.asked(replace(spec, overhead=overhead), config, HandlerConfig()) == (2, 236 * MIB)
    # A small one does not take away what the guest needs.
    overhead = LinuxResources(memory_limit_bytes=100 * MIB)
    assert sizing.asked(replace(spec, overhead=overhead), config, HandlerConfig()) == (1, 232 * MIB)


def test_the_most_a_vm_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else 2**28)
    assert sizing.most(HypervisorConfig()) == (64, 2**40)
    # What may never be used is kept within reason; what is asked for is given.
    assert sizing.reach(1, 512 * MIB, HypervisorConfig()) == (32, 32 * 2**30)
    assert sizing.reach(48, 2**37, HypervisorConfig()) == (48, 2**37)
    config = HypervisorConfig(max_vcpus=2, max_memory_bytes=2**30)
    assert sizing.reach(1, 512 * MIB, config) == (2, 2**30)
    huge = LinuxResources(memory_limit_bytes=2**35, cpu_quota_us=10**6, cpu_period_us=100_000)
    spec = SandboxSpec(name="n", uid="u", namespace="ns", resources=huge)
    assert sizing.size(spec, config, HandlerConfig()) == (2, 2**30)


def test_resolv_conf() -> None:
    dns = DnsConfig(("10.10.10.10", "::1"), ("google.com",), ("ndots:8",))
    assert resolv.resolv_conf(dns) == b"search google.com\nnameserver 10.10.10.10\nnameserver ::1\noptions ndots:8\n"
    assert b"10.0.0.5\tweb\n" in resolv.hosts("web", ["10.0.0.5"])


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("SIGTERM", 15),
        ("KILL", 9),
        ("3", 3),
        ("sigusr1", 10),
        ("SIGRTMIN+3", 37),
        ("SIGRTMAX-1", 63),
        ("SIGRTMAX+9", 64),
        ("SIGNONSENSE", 15),
        ("0", 15),
        ("99999", 15),
    ],
)
def test_signal_numbers(name: str, number: int) -> None:
    assert signal_number(name) == number


def limits(memory: int = 0, cpus: float = 0) -> LinuxResources:
    return LinuxResources(memory_limit_bytes=memory * MIB, cpu_quota_us=int(cpus * 100_000), cpu_period_us=100_000)


def huge(**sizes: int) -> LinuxResources:
    return LinuxResources(hugepage_limits=tuple(HugepageLimit(name, octets) for name, octets in sizes.items()))


def test_huge_pages_are_whole_ones() -> None:
    assert sizing.hugepage_bytes(huge()) == 0
    assert sizing.hugepage_bytes(huge(**{"2MB": 3 * MIB, "64KB": 1, "1GB": 0})) == 4 * MIB + 64 * 1024
    assert sizing.hugepage_bytes(huge(**{"0MB": 5})) == 0


@pytest.mark.parametrize(
    ("pod", "containers", "expected"),
    [
        (None, [], (1, 512)),
        # The sum of what living containers are limited to stands in for the pod's.
        (None, [limits(memory=600), limits(memory=300, cpus=1.5), limits(cpus=1)], (3, 1048)),
        (None, [limits(memory=100)], (1, 512)),
        # kubelet's sum of the memory is 0 while any container is unlimited.
        (limits(cpus=1), [limits(memory=600, cpus=9)], (1, 742)),
        (limits(memory=200, cpus=2), [limits(memory=600, cpus=9)], (2, 334)),
        # Huge pages are on top of either, with what the kernel keeps about them.
        (limits(memory=200), [huge(**{"2MB": 96 * MIB})], (1, 432)),
        (None, [huge(**{"2MB": 48 * MIB}), huge(**{"2MB": 48 * MIB})], (1, 610)),
    ],
)
def test_what_a_pod_needs_with_its_containers(
    pod: LinuxResources | None, containers: list[LinuxResources], expected: tuple[int, int]
) -> None:
    spec = SandboxSpec("p", "u", "n", resources=pod)
    vcpus, memory = sizing.needed(spec, HypervisorConfig(), HandlerConfig(), containers, containers)
    assert (vcpus, memory // MIB) == expected
