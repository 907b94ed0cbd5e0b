"""What `vmrt doctor` makes of what it found: pure functions from `Facts` to findings.

A finding is `fail` when pods cannot run because of it, `warn` when they run with less (speed, volumes, isolation), and
says in either case what that costs and how to mend it.
"""

from __future__ import annotations

import enum
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vmrt import __version__
from vmrt.cli.facts import CAP_NET_ADMIN, CAP_SYS_ADMIN, CAP_SYS_RESOURCE, DelegateFact, Facts
from vmrt.cli.output import size
from vmrt.config import longest_root_octets

# As published these die of clients that hang up early; set-up builds the last one mended, and marks that ("+vmrt.1").
VSOCK_BROKEN = ("0.1.0", "0.2.0", "0.3.0")
# What has been tried; older ones may do.
QEMU_TRIED, LIBVIRT_TRIED, SKOPEO_TRIED = (7, 2), (9, 0), (1, 9)
FALLBACK_PLUGINS = ("bridge", "host-local", "portmap")
GIB = 1024**3


class Status(enum.Enum):
    """How bad a finding is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One check's outcome. `costs` and `mend` are empty for OK."""

    name: str
    status: Status
    detail: str
    costs: str = ""
    mend: str = ""


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def privileges(facts: Facts) -> Finding:
    """Check for root, and the capabilities that some containers and sandboxes take from it."""
    if facts.uid != 0:
        return Finding(
            "privileges",
            Status.FAIL,
            f"running as uid {facts.uid}",
            "the daemon needs root; these checks see less without it",
            "run it with sudo",
        )
    for bit, name in ((CAP_SYS_ADMIN, "CAP_SYS_ADMIN"), (CAP_NET_ADMIN, "CAP_NET_ADMIN")):
        if not facts.capabilities >> bit & 1:
            return Finding(
                "privileges",
                Status.FAIL,
                f"root without {name}",
                "neither mounts nor network namespaces can be made",
                f"run the daemon outside this container or sandbox, or give it {name}",
            )
    if not facts.capabilities >> CAP_SYS_RESOURCE & 1:
        return Finding(
            "privileges",
            Status.WARN,
            "root without CAP_SYS_RESOURCE",
            "pods cannot be protected from the OOM killer (negative oom_score_adj), limits cannot be raised",
            "give the daemon CAP_SYS_RESOURCE",
        )
    return Finding("privileges", Status.OK, "root with the capabilities that are needed")


def kvm(facts: Facts) -> Finding:
    """Check hardware virtualisation, from the device node to a guest that really ran."""
    h = facts.config.hypervisor
    if h.accelerator == "tcg":
        return Finding("kvm", Status.OK, 'not wanted: hypervisor.accelerator is "tcg"')
    bad = Status.FAIL if h.accelerator == "kvm" else Status.WARN
    costs = (
        'no pod can start, because hypervisor.accelerator is "kvm"'
        if h.accelerator == "kvm"
        else "VMs run in software emulation: everything inside pods is many times slower"
    )
    if not facts.kvm.present:
        return Finding(
            "kvm",
            bad,
            "/dev/kvm does not exist",
            costs,
            "turn virtualisation on in the firmware and `modprobe kvm_intel` or `kvm_amd`; "
            "in a VM, ask its host for nested virtualisation",
        )
    if facts.kvm.error:
        return Finding("kvm", bad, f"/dev/kvm cannot be opened: {facts.kvm.error}", costs, "run as root")
    if facts.qemu_user and not facts.kvm.for_qemu_user:
        return Finding(
            "kvm",
            bad,
            f"/dev/kvm may not be opened by QEMU's user {facts.qemu_user}",
            f"{costs}; libvirt may probe QEMU again and again (up to 90 s for a pod)",
            f"chgrp kvm /dev/kvm; chmod 660 /dev/kvm; usermod -aG kvm {facts.qemu_user}",
        )
    if facts.kvm_failure:
        return Finding(
            "kvm",
            bad,
            f"a guest does not run under KVM: {facts.kvm_failure}",
            costs,
            'this host\'s KVM is partial (often nested); set hypervisor.accelerator = "tcg" to spare the attempt',
        )
    tried = "a guest ran under it" if facts.kvm_failure is not None else "can be opened"
    return Finding("kvm", Status.OK, f"/dev/kvm {tried}")


def qemu(facts: Facts) -> Finding:
    """Check the VMM's binary."""
    tool = facts.qemu
    if not tool.version:
        return Finding("qemu", Status.FAIL, tool.error, "no pod can start", "apt-get install qemu-system-x86")
    return _at_least("qemu", tool.path, tool.version, QEMU_TRIED)


def _at_least(name: str, path: str, version: str, tried: tuple[int, ...]) -> Finding:
    if _version(version) < tried:
        least = ".".join(str(part) for part in tried)
        return Finding(
            name,
            Status.WARN,
            f"{path} {version} is older than {least}",
            "vmrt has not been tried with it",
            f"install {name} {least} or newer",
        )
    return Finding(name, Status.OK, f"{path} {version}")


def qboot(facts: Facts) -> Finding:
    """Check the firmware that starts an uncompressed kernel at once."""
    if not facts.qboot:
        return Finding(
            "qboot", Status.FAIL, "qboot.rom is missing", "VMs do not boot", "apt-get install qemu-system-data"
        )
    return Finding("qboot", Status.OK, "qboot.rom is there")


def qemu_user(facts: Facts) -> Finding:
    """Check the unprivileged user as whom QEMU runs."""
    user = facts.config.hypervisor.qemu_user
    if not facts.qemu_user:
        return Finding(
            "qemu user",
            Status.FAIL,
            f"there is no user {user}",
            "QEMU has nobody to run as",
            f"useradd --system --user-group --no-create-home --shell /usr/sbin/nologin {user}; usermod -aG kvm {user}",
        )
    return Finding("qemu user", Status.OK, user)


def libvirt(facts: Facts) -> Finding:
    """Check that libvirt's QEMU driver opens."""
    tool = facts.libvirt
    if tool.version:
        return _at_least("libvirt", "QEMU driver opens,", tool.version, LIBVIRT_TRIED)
    mend = "apt-get install libvirt-daemon-driver-qemu libvirt-daemon"
    if "parse user" in tool.error or "parse group" in tool.error:
        # libvirt resolves the user it was compiled with before it reads the one it is configured with.
        mend = (
            "libvirt wants the user it was built for as well: useradd --system --user-group --no-create-home "
            "--shell /usr/sbin/nologin libvirt-qemu"
        )
    elif "No module named" in tool.error:
        mend = "install libvirt-python into vmrt's environment (make setup does)"
    elif facts.uid != 0:
        mend = "run it as root"
    return Finding("libvirt", Status.FAIL, f"QEMU driver does not open: {tool.error}", "no pod can start", mend)


def vsock(facts: Facts) -> Finding:
    """Check the way to the guest agent."""
    choice, device, tool = facts.config.hypervisor.vsock, facts.kernel_vsock, facts.vhost_device_vsock
    if choice != "vhost-user" and device.present:
        if device.error:
            detail = f"/dev/vhost-vsock cannot be opened: {device.error}"
            return Finding("vsock", Status.FAIL, detail, "guests cannot be reached", "run as root")
        return Finding("vsock", Status.OK, "the kernel's vhost_vsock")
    if choice == "kernel":
        return Finding(
            "vsock",
            Status.FAIL,
            'hypervisor.vsock is "kernel" and /dev/vhost-vsock does not exist',
            "guests cannot be reached, no pod can start",
            'modprobe vhost_vsock, or set hypervisor.vsock = "auto"',
        )
    if not tool.version:
        return Finding(
            "vsock",
            Status.FAIL,
            f"no /dev/vhost-vsock, and {tool.error}",
            "guests cannot be reached, no pod can start",
            "modprobe vhost_vsock, or build vhost-device-vsock: setup/setup.sh vsock",
        )
    if tool.version in VSOCK_BROKEN:
        return Finding(
            "vsock",
            Status.WARN,
            f"{tool.path} {tool.version} is as published",
            "a connection that is closed early, as by a daemon that is killed, can end the VM",
            "build it with that mended: setup/setup.sh vsock",
        )
    return Finding("vsock", Status.OK, f"{tool.path} {tool.version}")


def virtiofsd(facts: Facts) -> Finding:
    """Check the file share for volumes."""
    tool = facts.virtiofsd
    if not tool.path:
        return Finding(
            "virtiofsd",
            Status.WARN,
            "virtiofsd is not installed",
            "pods cannot have volumes from the host",
            "apt-get install qemu-system-common (Debian 12) or virtiofsd",
        )
    return Finding("virtiofsd", Status.OK, f"{tool.path} {tool.version}".strip())


def tun(facts: Facts) -> Finding:
    """Check tap devices."""
    if not facts.tun.present or facts.tun.error:
        why = f"cannot be opened: {facts.tun.error}" if facts.tun.present else "does not exist"
        return Finding("tap", Status.FAIL, f"/dev/net/tun {why}", "pods have no network", "modprobe tun; run as root")
    return Finding("tap", Status.OK, "/dev/net/tun can be opened")


def redirect(facts: Facts) -> Finding:
    """Check traffic control between the tap and the CNI interface."""
    if facts.redirect_failure is None:
        return Finding("tc", Status.WARN, "not tried", "unknown", "run vmrt doctor as root")
    if facts.redirect_failure:
        return Finding(
            "tc",
            Status.WARN,
            f"traffic control cannot redirect: {facts.redirect_failure}",
            "pods are joined to their network by a bridge, which is slower",
            "apt-get install iproute2; the kernel needs act_mirred and cls_matchall or cls_u32",
        )
    return Finding("tc", Status.OK, "redirects with mirred")


def nat(facts: Facts) -> Finding:
    """Check what CNI's masquerading and published ports rest on."""
    if facts.nat_failure is None:
        return Finding("iptables", Status.WARN, "not tried", "unknown", "run vmrt doctor as root")
    if facts.nat_failure:
        return Finding(
            "iptables",
            Status.WARN,
            f"cannot masquerade: {facts.nat_failure}",
            "pods reach nothing beyond this host, and published ports (portmap) fail",
            "apt-get install iptables; the kernel needs nf_tables and NAT",
        )
    return Finding("iptables", Status.OK, "masquerades")


def cni(facts: Facts) -> Finding:
    """Check the network configuration and the plugins it names."""
    n, found = facts.config.network, facts.cni_network
    mend = "apt-get install containernetworking-plugins, or set network.cni_bin_dirs"
    if found.error:
        return Finding(
            "cni", Status.FAIL, f"{found.file}: {found.error}", "no pod can start", "correct or remove the file"
        )
    if not found.file and not n.fallback_subnet:
        return Finding(
            "cni",
            Status.FAIL,
            f"no configuration in {n.cni_config_dir}, and network.fallback_subnet is empty",
            "no pod can start",
            "install a CNI configuration, or set network.fallback_subnet",
        )
    wanted = found.plugins if found.file else FALLBACK_PLUGINS
    missing = [plugin for plugin in wanted if plugin not in facts.cni_plugins]
    source = found.file or f"built-in network {n.fallback_subnet}"
    if missing:
        places = ", ".join(str(path) for path in n.cni_bin_dirs)
        return Finding(
            "cni", Status.FAIL, f"{source}: no {', '.join(missing)} in {places}", "pods get no network", mend
        )
    return Finding("cni", Status.OK, f"{source} ({', '.join(wanted)})")


def skopeo(facts: Facts) -> Finding:
    """Check what fetches images."""
    tool = facts.skopeo
    if not tool.version:
        return Finding("skopeo", Status.FAIL, tool.error, "images cannot be pulled", "apt-get install skopeo")
    return _at_least("skopeo", tool.path, tool.version, SKOPEO_TRIED)


def image_policy(facts: Facts) -> Finding:
    """Check the two files that skopeo needs."""
    mend = "apt-get install golang-github-containers-common, or set images.policy_json and images.registries_conf"
    if not facts.policy_json:
        return Finding("policy.json", Status.FAIL, "there is none", "skopeo refuses every image", mend)
    if not facts.registries_conf:
        return Finding(
            "policy.json", Status.WARN, f"{facts.policy_json}, but no registries.conf", "no mirrors, no aliases", mend
        )
    return Finding("policy.json", Status.OK, f"{facts.policy_json}, {facts.registries_conf}")


def seccomp(facts: Facts) -> Finding:
    """Check the profile RuntimeDefault, which kubelet asks for with every pod."""
    if not facts.seccomp_json:
        return Finding(
            "seccomp",
            Status.FAIL,
            "there is no default profile",
            "containers with the seccomp profile RuntimeDefault are refused",
            "apt-get install golang-github-containers-common",
        )
    return Finding("seccomp", Status.OK, facts.seccomp_json)


def apparmor(facts: Facts) -> Finding:
    """Check what compiles AppArmor profiles for the guest; the host's own kernel need not have AppArmor."""
    tool = facts.apparmor_parser
    if not tool.version:
        return Finding(
            "apparmor",
            Status.WARN,
            tool.error,
            "containers with an AppArmor profile are refused",
            "apt-get install apparmor",
        )
    return Finding("apparmor", Status.OK, f"{tool.path} {tool.version}")


def guest(facts: Facts) -> Finding:
    """Check the image that VMs boot."""
    if facts.guest.error:
        return Finding(
            "guest image",
            Status.FAIL,
            f"{facts.guest.directory}: {facts.guest.error}",
            "no pod can start",
            f"vmrt guest build (into {facts.guest.directory}), or set guest_dir",
        )
    return Finding("guest image", Status.OK, f"{facts.guest.version}, kernel {facts.guest.kernel_release}")


def disk(facts: Facts) -> Finding:
    """Check the room for images and writable layers."""
    free = facts.disk_free_bytes
    detail = f"{size(free)} free below {facts.config.root}"
    if free < 5 * GIB:
        return Finding(
            "disk",
            Status.FAIL if free < GIB else Status.WARN,
            detail,
            "images and the containers' writable layers soon find no room",
            "make room, or set root to a larger file system",
        )
    return Finding("disk", Status.OK, detail)


def memory(facts: Facts) -> Finding:
    """Check the room for VMs."""
    h = facts.config.hypervisor
    pod = h.default_memory_bytes + h.overhead_memory_bytes
    available = facts.memory_available_bytes
    detail = f"{size(available)} available, {size(pod)} for a pod of the default size"
    if available < 2 * pod:
        return Finding(
            "memory",
            Status.FAIL if available < pod else Status.WARN,
            detail,
            "the host kills pods for memory",
            "add memory, or lower hypervisor.default_memory_bytes",
        )
    return Finding("memory", Status.OK, detail)


def cgroups(facts: Facts) -> Finding:
    """Check what limits QEMU and its helpers on the host."""
    missing = [name for name in ("cpu", "cpuset", "memory", "pids") if name not in facts.cgroup_controllers]
    if not facts.cgroup_version or missing:
        return Finding(
            "cgroups",
            Status.WARN,
            f"no {', '.join(missing)} controller" if facts.cgroup_version else "none mounted",
            "of these limits those of containers hold in the guest, those of pods bound no QEMU on the host",
            "boot with systemd.unified_cgroup_hierarchy=1, or mount cgroup2 with all controllers",
        )
    driver = facts.config.hypervisor.cgroup_driver
    if (driver == "systemd" or (driver == "auto" and facts.systemd)) and not facts.busctl:
        return Finding(
            "cgroups",
            Status.WARN,
            "systemd makes them, and busctl is not installed",
            "pods' limits bound no QEMU on the host",
            'apt-get install systemd, or set hypervisor.cgroup_driver = "cgroupfs" here and in kubelet',
        )
    return Finding("cgroups", Status.OK, f"version {facts.cgroup_version} with {', '.join(facts.cgroup_controllers)}")


def paths(facts: Facts) -> Finding:
    """Check whether the sockets below root fit into sun_path."""
    root, most = facts.config.root, longest_root_octets(facts.config.hypervisor)
    length = len(os.fsencode(root))
    if length > most:
        return Finding(
            "socket paths",
            Status.FAIL,
            f"{root} is {length} octets long, the sockets below it leave {most} to a root",
            "the daemon does not start",
            f"choose a root of at most {most} octets",
        )
    return Finding("socket paths", Status.OK, f"{length} of {most} octets that a root may have")


def daemon(facts: Facts) -> Finding:
    """Check whether the daemon answers, and is of our release."""
    found = facts.daemon
    if found.error:
        return Finding(
            "daemon", Status.WARN, found.error, "kubelet, crictl and vmrt's commands reach nobody", "vmrt serve"
        )
    if found.version != __version__:
        return Finding(
            "daemon",
            Status.WARN,
            f"version {found.version} answers on {found.socket}, this is {__version__}",
            "commands and daemon may misunderstand each other",
            "restart the daemon; running pods are adopted",
        )
    return Finding("daemon", Status.OK, f"version {found.version}, pid {found.pid}, on {found.socket}")


def delegate(found: DelegateFact, *, systemd: bool) -> Finding:
    """Check one delegate: whether it answers, is ready, and takes cgroup_parent as kubelet will write it."""
    name = f"delegate {', '.join(found.handlers)}"
    costs = "pods of these handlers cannot be run; others can"
    if found.error:
        return Finding(
            name,
            Status.WARN,
            f"{found.endpoint}: {found.error}",
            costs,
            "start that runtime, or correct the handler's endpoint",
        )
    detail = f"{found.version} on {found.endpoint}"
    if found.not_ready:
        return Finding(name, Status.WARN, f"{detail} is not ready: {found.not_ready}", costs, "see that runtime's log")
    ours = "systemd" if systemd else "cgroupfs"
    if found.cgroup_driver and found.cgroup_driver != ours:
        return Finding(
            name,
            Status.WARN,
            f"{detail} has the cgroup driver {found.cgroup_driver}, kubelet is told {ours}",
            costs,
            f"configure the cgroup driver {ours} there (containerd: SystemdCgroup)",
        )
    return Finding(name, Status.OK, detail)


CHECKS: tuple[Callable[[Facts], Finding], ...] = (
    *(privileges, kvm, qemu, qboot, qemu_user, libvirt, vsock, virtiofsd),
    *(tun, redirect, nat, cni, skopeo, image_policy, seccomp, apparmor, guest),
    *(disk, memory, cgroups, paths, daemon),
)


def findings(facts: Facts) -> Iterator[Finding]:
    """Yield every check's outcome, in an order that reads from the machine up."""
    for check in CHECKS:
        yield check(facts)
    for found in facts.delegates:
        yield delegate(found, systemd=facts.systemd)
