from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fake_runtime import running

import vmrt.cli
from vmrt.cli import checks, facts
from vmrt.cli.app import Options, cli
from vmrt.cli.checks import CHECKS, Status, findings
from vmrt.cli.facts import CniNetwork, DaemonFact, DelegateFact, Device, Facts, GuestFact, Tool, gather, may_open
from vmrt.config import Config, HandlerConfig, HypervisorConfig, NetworkConfig
from vmrt.errors import ConfigError

GOOD = Facts(
    kvm=Device(True, "", True),
    kvm_failure="",
    qemu=Tool("/usr/bin/qemu-system-x86_64", "7.2.22"),
    qboot=True,
    qemu_user="vmrt-qemu",
    libvirt=Tool("qemu:///embed", "9.0.0"),
    kernel_vsock=Device(True, "", True),
    virtiofsd=Tool("/usr/lib/qemu/virtiofsd", "7.2.22"),
    tun=Device(True),
    redirect_failure="",
    nat_failure="",
    cni_plugins=("bridge", "host-local", "portmap"),
    skopeo=Tool("/usr/bin/skopeo", "1.9.3"),
    policy_json="/etc/containers/policy.json",
    registries_conf="/etc/containers/registries.conf",
    apparmor_parser=Tool("/usr/sbin/apparmor_parser", "3.0.8"),
    seccomp_json="/usr/share/containers/seccomp.json",
    guest=GuestFact("/var/lib/vmrt/guest", "v1", "6.1.0"),
    disk_free_bytes=50 * 1024**3,
    memory_available_bytes=8 * 1024**3,
    cgroup_version=2,
    cgroup_controllers=("cpu", "cpuset", "io", "memory", "pids"),
    daemon=DaemonFact("/run/vmrt/vmrt.sock", "0.1.0", 7),
)
NO_KERNEL_VSOCK = {"kernel_vsock": Device(), "vhost_device_vsock": Tool(error="it is not installed")}


def config(**hypervisor: Any) -> Config:
    return Config(hypervisor=HypervisorConfig(**hypervisor))


def network(**fields: Any) -> Config:
    return Config(network=NetworkConfig(**fields))


def test_a_good_machine_has_nothing_to_mend() -> None:
    results = list(findings(GOOD))
    assert len(results) == len(CHECKS)
    assert [each for each in results if each.status is not Status.OK or each.costs or each.mend] == []
    assert len({each.name for each in results}) == len(CHECKS)


@pytest.mark.parametrize(
    ("change", "name", "status", "says"),
    [
        ({"uid": 1000}, "privileges", "fail", "sudo"),
        ({"capabilities": ((1 << 41) - 1) & ~(1 << 24)}, "privileges", "warn", "CAP_SYS_RESOURCE"),
        ({"capabilities": 1 << 24}, "privileges", "fail", "CAP_SYS_ADMIN"),
        ({"capabilities": 1 << 21}, "privileges", "fail", "CAP_NET_ADMIN"),
        ({"kvm": Device()}, "kvm", "warn", "modprobe kvm_intel"),
        ({"kvm": Device(True, "Permission denied")}, "kvm", "warn", "Permission denied"),
        ({"kvm": Device(True, "", False)}, "kvm", "warn", "usermod -aG kvm vmrt-qemu"),
        ({"kvm_failure": "no panic seen"}, "kvm", "warn", "no panic seen"),
        ({"kvm_failure": "no", "config": config(accelerator="kvm")}, "kvm", "fail", "no pod can start"),
        ({"kvm": Device(), "config": config(accelerator="kvm")}, "kvm", "fail", "no pod can start"),
        ({"kvm": Device(), "config": config(accelerator="tcg")}, "kvm", "ok", "not wanted"),
        ({"kvm_failure": None}, "kvm", "ok", "can be opened"),
        ({"qemu": Tool(error="qemu is not installed")}, "qemu", "fail", "apt-get install qemu-system-x86"),
        ({"qemu": Tool("/q", "6.2.0")}, "qemu", "warn", "older than 7.2"),
        ({"qemu": Tool("/q", "10.0.2")}, "qemu", "ok", "10.0.2"),
        ({"qboot": False}, "qboot", "fail", "qemu-system-data"),
        ({"qemu_user": ""}, "qemu user", "fail", "useradd"),
        ({"libvirt": Tool(error="Failed to parse user 'libvirt-qemu'")}, "libvirt", "fail", "useradd"),
        ({"libvirt": Tool(error="No module named 'libvirt'")}, "libvirt", "fail", "make setup"),
        ({"libvirt": Tool(error="cannot load driver")}, "libvirt", "fail", "libvirt-daemon-driver-qemu"),
        ({"libvirt": Tool("u", "8.10.0")}, "libvirt", "warn", "older than 9.0"),
        ({"kernel_vsock": Device(True, "Permission denied")}, "vsock", "fail", "Permission denied"),
        (NO_KERNEL_VSOCK, "vsock", "fail", "setup/setup.sh vsock"),
        ({"kernel_vsock": Device(), "config": config(vsock="kernel")}, "vsock", "fail", "modprobe vhost_vsock"),
        ({"kernel_vsock": Device(), "vhost_device_vsock": Tool("/v", "0.3.0")}, "vsock", "warn", "closed early"),
        (
            {"kernel_vsock": Device(), "vhost_device_vsock": Tool("/v", "0.3.0+vmrt.1")},
            "vsock",
            "ok",
            "/v 0.3.0+vmrt.1",
        ),
        ({"vhost_device_vsock": Tool("/v", "0.3.1"), "config": config(vsock="vhost-user")}, "vsock", "ok", "/v 0.3.1"),
        ({"config": config(vsock="vhost-user")}, "vsock", "fail", "setup/setup.sh vsock"),
        ({"virtiofsd": Tool(error="absent")}, "virtiofsd", "warn", "qemu-system-common"),
        ({"tun": Device()}, "tap", "fail", "modprobe tun"),
        ({"tun": Device(True, "Permission denied")}, "tap", "fail", "Permission denied"),
        ({"redirect_failure": "Unknown filter"}, "tc", "warn", "by a bridge"),
        ({"redirect_failure": None}, "tc", "warn", "as root"),
        ({"nat_failure": "no nat table"}, "iptables", "warn", "no nat table"),
        ({"nat_failure": None}, "iptables", "warn", "as root"),
        ({"cni_plugins": ("bridge",)}, "cni", "fail", "no host-local, portmap in /opt/cni/bin"),
        ({"cni_network": CniNetwork("/etc/cni/a.conflist", ("calico",))}, "cni", "fail", "no calico"),
        ({"cni_network": CniNetwork("/etc/cni/a.conflist", ("bridge",))}, "cni", "ok", "a.conflist (bridge)"),
        ({"cni_network": CniNetwork("/f", error="not JSON")}, "cni", "fail", "not JSON"),
        ({"config": network(fallback_subnet="")}, "cni", "fail", "fallback_subnet"),
        ({"skopeo": Tool(error="skopeo is not installed")}, "skopeo", "fail", "apt-get install skopeo"),
        ({"policy_json": ""}, "policy.json", "fail", "refuses every image"),
        ({"registries_conf": ""}, "policy.json", "warn", "no registries.conf"),
        ({"guest": GuestFact("/g", error="there is none")}, "guest image", "fail", "vmrt guest build"),
        ({"disk_free_bytes": 3 * 1024**3}, "disk", "warn", "3.22GB"),
        ({"disk_free_bytes": 1024**2}, "disk", "fail", "make room"),
        ({"memory_available_bytes": 1024**3}, "memory", "warn", "default_memory_bytes"),
        ({"memory_available_bytes": 1024**2}, "memory", "fail", "add memory"),
        ({"cgroup_version": 1}, "cgroups", "ok", "version 1"),
        ({"systemd": True}, "cgroups", "warn", "busctl"),
        ({"systemd": True, "busctl": "/usr/bin/busctl"}, "cgroups", "ok", "version 2"),
        ({"systemd": True, "config": config(cgroup_driver="cgroupfs")}, "cgroups", "ok", "version 2"),
        ({"config": config(cgroup_driver="systemd")}, "cgroups", "warn", "busctl"),
        ({"seccomp_json": ""}, "seccomp", "fail", "RuntimeDefault are refused"),
        ({"apparmor_parser": Tool(error="it is not installed")}, "apparmor", "warn", "apt-get install apparmor"),
        ({"cgroup_version": 0, "cgroup_controllers": ()}, "cgroups", "warn", "none mounted"),
        ({"cgroup_controllers": ("cpu", "pids")}, "cgroups", "warn", "no cpuset, memory controller"),
        ({"config": Config(root=Path("/" + "x" * 60))}, "socket paths", "fail", "at most"),
        ({"daemon": DaemonFact("/s", error="nobody listens")}, "daemon", "warn", "vmrt serve"),
        ({"daemon": DaemonFact("/s", "9.9.9", 7)}, "daemon", "warn", "9.9.9"),
    ],
)
def test_what_is_lacking_is_said_with_its_cost_and_its_mending(
    change: Mapping[str, Any], name: str, status: str, says: str
) -> None:
    results = {each.name: each for each in findings(replace(GOOD, **change))}
    found = results.pop(name)
    assert found.status.value == status
    assert says in f"{found.detail} {found.costs} {found.mend}"
    if found.status is not Status.OK:
        assert found.detail and found.costs and found.mend
    assert all(each.status is Status.OK for each in results.values()), "one lack is one finding"


def test_the_doctor_looks_where_the_daemon_does() -> None:
    from vmrt.pods import seccomp

    assert facts.SECCOMP_PROFILES == seccomp.DEFAULT_PROFILES


def test_the_bound_of_a_root() -> None:
    """Where the doctor says no the hypervisor does too, and where it says yes a VM's sockets fit."""
    from vmrt.config import longest_root_octets
    from vmrt.hypervisor.access import require_short
    from vmrt.hypervisor.record import paths_of

    for uri in ("", "qemu:///system"):
        hypervisor = HypervisorConfig(uri=uri)
        root = Path("/" + "r" * (longest_root_octets(hypervisor) - 1))
        paths_of(root / "vms", "0" * 12)
        require_short(root, hypervisor)
        assert checks.paths(replace(GOOD, config=Config(root=root, hypervisor=hypervisor))).status is Status.OK
        too_long = Path(f"{root}r")
        with pytest.raises(ConfigError, match=f"{len(str(too_long))} octets long"):
            require_short(too_long, hypervisor)
        assert checks.paths(replace(GOOD, config=Config(root=too_long, hypervisor=hypervisor))).status is Status.FAIL
    with pytest.raises(Exception, match="socket path"):
        paths_of(too_long / "vms", "0" * 12)


@pytest.mark.parametrize(
    ("mode", "user", "allowed"),
    [
        (0o600, (0, {0}), True),
        (0o600, (5, {5}), False),
        (0o660, (5, {5, 20}), True),
        (0o640, (5, {20}), False),
        (0o666, (5, {5}), True),
        (0o606, (5, {20}), False),  # the group's bits decide for its members
        (0o066, (10, {20}), False),  # and the owner's for the owner
    ],
)
def test_may_open(mode: int, user: tuple[int, set[int]], allowed: bool) -> None:
    assert may_open(mode, 10, 20, (user[0], frozenset(user[1]))) is allowed


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.conflist", {"plugins": [{"type": "x", "ipam": {"type": "y"}}, {"type": "z"}]}, ("x", "z", "y")),
        ("a.conf", {"type": "x"}, ("x",)),
        ("a.conflist", {"plugins": [{}]}, None),
        ("a.conflist", [1], None),
        ("a.txt", {}, ()),
    ],
)
def test_cni_configuration(tmp_path: Path, name: str, content: object, expected: tuple[str, ...] | None) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "z.conflist").unlink(missing_ok=True)
    found = facts._cni_network(tmp_path)
    if expected is None:
        assert found.error
    else:
        assert (found.plugins, found.error) == (expected, "")


def test_first_cni_configuration_by_name(tmp_path: Path) -> None:
    for name in ("20-b.conf", "10-a.conf"):
        (tmp_path / name).write_text(json.dumps({"type": name}))
    assert facts._cni_network(tmp_path).plugins == ("10-a.conf",)
    assert facts._cni_network(tmp_path / "absent") == CniNetwork()


async def test_gather_survives_a_machine_that_has_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No programs on PATH, no files: every fact carries its reason and nothing raises."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(facts, "SBIN", (str(tmp_path),))
    h = HypervisorConfig(
        qemu_user="nobody-of-that-name",
        qemu_binary=tmp_path / "qemu",
        vhost_device_vsock=tmp_path / "vsock",
        virtiofsd=str(tmp_path / "virtiofsd"),
    )
    n = NetworkConfig(cni_config_dir=tmp_path / "net.d", cni_bin_dirs=(tmp_path / "bin",))
    config = Config(root=tmp_path / "root", hypervisor=h, network=n)
    found = await gather(config, Options(socket=str(tmp_path / "v.sock")))
    assert found.qemu.error and found.vhost_device_vsock.error and found.virtiofsd.error and found.skopeo.error
    assert found.qemu_user == ""
    assert found.libvirt.error
    assert found.cni_plugins == () and found.cni_network == CniNetwork()
    assert found.guest.error
    assert "no such socket" in found.daemon.error
    assert found.disk_free_bytes > 0 and found.memory_available_bytes > 0
    if os.geteuid() == 0:
        assert found.nat_failure and found.redirect_failure
    failed = {each.name for each in findings(found) if each.status is Status.FAIL}
    assert {"qemu", "qemu user", "libvirt", "cni", "skopeo", "guest image"} <= failed


async def test_a_program_is_asked_for_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, text in (("good", "good version 1.22.333-rc1 (Debian)"), ("bad", "no number")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{text}'\n")
        (tmp_path / name).chmod(0o755)
    assert await facts._tool("good") == Tool(str(tmp_path / "good"), "1.22.333")
    assert "no number" in (await facts._tool("bad")).error


async def test_the_kvm_probe_is_the_composition_roots(monkeypatch: pytest.MonkeyPatch) -> None:
    async def probe(config: Config) -> str:
        return f"asked for {config.hypervisor.qemu_user}"

    monkeypatch.setattr(vmrt.cli, "kvm_failure", probe)
    assert await facts._kvm_failure(Config()) == "asked for vmrt-qemu"
    assert await facts._kvm_failure(config(accelerator="tcg")) is None
    monkeypatch.setattr(vmrt.cli, "kvm_failure", None)
    assert await facts._kvm_failure(Config()) is None


@pytest.mark.parametrize(("found", "status"), [(GOOD, 0), (replace(GOOD, qboot=False), 1)])
def test_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, found: Facts, status: int) -> None:
    async def given(config: Config, options: Options) -> Facts:
        return found

    monkeypatch.setattr(facts, "gather", given)
    (tmp_path / "c.toml").write_text("")
    args = ["doctor", "--config", str(tmp_path / "c.toml")]
    plain = CliRunner().invoke(cli, args)
    assert plain.exit_code == status
    assert ("mend: apt-get install qemu-system-data" in plain.stdout) == bool(status)
    assert ("pods can run here" in plain.stdout) == (not status)
    as_json = CliRunner().invoke(cli, [*args, "--json"])
    assert as_json.exit_code == status
    entries = json.loads(as_json.stdout)
    assert [entry["status"] for entry in entries if entry["name"] == "qboot"] == ["fail" if status else "ok"]
    assert all(set(entry) == {"name", "status", "detail", "costs", "mend"} for entry in entries)


def test_bad_configuration_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("rot = 1\n")
    result = CliRunner().invoke(cli, ["doctor", "--config", str(tmp_path / "c.toml")])
    assert result.exit_code == 1
    assert "did you mean root?" in result.stderr


async def test_delegates_are_asked(tmp_path: Path) -> None:
    async with running(tmp_path / "d.sock") as theirs:
        handler = HandlerConfig(endpoint=theirs.endpoint)
        absent = HandlerConfig(endpoint=f"unix://{tmp_path}/absent.sock")
        config = Config(handlers={"vm": HandlerConfig(), "a": handler, "b": handler, "c": absent})
        there, gone = await asyncio.to_thread(facts._delegates, config)
    assert (there.handlers, there.version, there.error) == (("a", "b"), "fake 1.0.0", "")
    assert there.cgroup_driver == "systemd"
    assert (gone.handlers, bool(gone.error)) == (("c",), True)


@pytest.mark.parametrize(
    ("found", "systemd", "words"),
    [
        (DelegateFact("unix:///d", ("runc",), "containerd 1", cgroup_driver="systemd"), True, ""),
        (DelegateFact("unix:///d", ("runc",), "containerd 1"), False, ""),
        (
            DelegateFact("unix:///d", ("runc",), "containerd 1", cgroup_driver="systemd"),
            False,
            "kubelet is told cgroupfs",
        ),
        (DelegateFact("unix:///d", ("runc",), "containerd 1", not_ready="CniBroken"), True, "is not ready: CniBroken"),
        (DelegateFact("unix:///d", ("runc",), error="no such file"), True, "unix:///d: no such file"),
    ],
)
def test_delegates_are_judged(found: DelegateFact, systemd: bool, words: str) -> None:
    finding = list(findings(replace(GOOD, delegates=(found,), systemd=systemd)))[-1]
    assert finding.name == "delegate runc"
    assert finding.status is (Status.WARN if words else Status.OK)
    assert words in finding.detail
