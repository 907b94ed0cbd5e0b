"""What a daemon could leave behind on a host, before and after: the proof that clean-up is complete.

Used by the demonstration and by every end-to-end test. Looks at the kernel itself, not at what vmrt believes.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from vmrt.pods.table import instance_tag


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The host's state in the terms that matter here; each a set of lines for people."""

    processes: frozenset[str]
    links: frozenset[str]
    mounts: frozenset[str]
    firewall: frozenset[str]
    loops: frozenset[str]
    files: frozenset[str]

    def added_since(self, before: Snapshot) -> dict[str, list[str]]:
        """Return what is here now and was not in `before`, by kind; empty when nothing was left."""
        found = {}
        for field in fields(self):
            extra = sorted(getattr(self, field.name) - getattr(before, field.name))
            if extra:
                found[field.name] = extra
        return found


def snapshot(root: Path, networks: Sequence[str] = ()) -> Snapshot:
    """Look at the host for what belongs to the daemon of `root`; other daemons may come and go meanwhile.

    Processes, mounts and files are those that name `root`; links and firewall rules those that carry the daemon's
    instance tag, or name one of `networks` (CNI networks that the test configured), and veths that belong to no bridge.
    """
    tag = instance_tag(root)
    return Snapshot(
        processes=frozenset(_processes(str(root))),
        links=frozenset(_links(tag)),
        mounts=frozenset(_mounts(str(root))),
        firewall=frozenset(_firewall((tag, *networks))),
        loops=frozenset(_loops(str(root))),
        files=frozenset(_files(root)),
    )


def _processes(root: str) -> Iterator[str]:
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        helper = any(name in command for name in ("qemu-system", "vhost-device-vsock", "virtiofsd"))
        if helper and root in command:
            yield f"pid {directory.name}: {command[:120]}"


def _links(tag: str) -> Iterator[str]:
    """Taps and bridges named after the instance, and veths that stay without a bridge (a new one gets its own soon)."""
    named = {link.name for link in _net() if tag in link.name or link.name.startswith(f"vt{tag[:4]}")}
    loose = _loose_veths()
    if loose:
        time.sleep(0.3)
    yield from named | (loose & _loose_veths())


def _net() -> list[Path]:
    return list(Path("/sys/class/net").iterdir())


def _loose_veths() -> set[str]:
    return {link.name for link in _net() if link.name.startswith("veth") and not (link / "master").exists()}


def _mounts(root: str) -> Iterator[str]:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        place = line.split()[4]
        if place.startswith(root):
            yield place


def _firewall(names: Sequence[str]) -> Iterator[str]:
    for program in ("iptables-save", "ip6tables-save"):
        try:
            output = subprocess.run([program], capture_output=True, text=True, check=False).stdout
        except FileNotFoundError:
            continue
        for line in output.splitlines():
            # Rules, not the chains and counters that plugins keep for all pods.
            if line.startswith("-A") and any(name in line for name in names):
                yield f"{program}: {line}"


def _loops(root: str) -> Iterator[str]:
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            name = backing.read_text().strip()
        except OSError:
            continue
        if name.startswith(root):
            yield f"{backing.parent.parent.name}: {name}"


def _files(root: Path) -> Iterator[str]:
    """Network namespaces, address leases, CNI results, scratch disks and VM directories below the root."""
    for pattern in ("netns/*", "cni/**/*", "scratch/*.img", "vms/*", "pods/*", "share/*"):
        for path in root.glob(pattern):
            # host-local keeps its lock and the last address it gave; leases are files named after addresses.
            if (path.is_file() and path.name in ("lock",)) or path.name.startswith("last_reserved_ip"):
                continue
            if path.is_dir() and pattern == "cni/**/*":
                continue
            yield str(path.relative_to(root))
