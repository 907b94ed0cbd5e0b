"""The pod's /etc/resolv.conf and /etc/hosts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vmrt.model import DnsConfig

_HOST_FILES = (Path("/run/systemd/resolve/resolv.conf"), Path("/etc/resolv.conf"))
_LIMIT_BYTES = 64 * 1024


def resolv_conf(dns: DnsConfig | None) -> bytes:
    """Return resolv.conf(5): the given configuration, else a copy of the host's.

    systemd-resolved's stub address (127.0.0.53) is of no use in another network stack, so its real file comes first.
    """
    if dns is None or not (dns.servers or dns.searches or dns.options):
        for path in _HOST_FILES:
            try:
                with path.open("rb") as file:
                    return file.read(_LIMIT_BYTES)
            except OSError:
                continue
        return b""
    lines = []
    if dns.searches:
        lines.append("search " + " ".join(dns.searches))
    lines += [f"nameserver {server}" for server in dns.servers]
    if dns.options:
        lines.append("options " + " ".join(dns.options))
    return ("\n".join(lines) + "\n").encode()


def hosts(hostname: str, ips: Sequence[str]) -> bytes:
    """Make a hosts file for a pod; kubelet usually mounts its own over it."""
    lines = [
        "127.0.0.1\tlocalhost",
        "::1\tlocalhost ip6-localhost ip6-loopback",
        "fe00::\tip6-localnet",
        "ff02::1\tip6-allnodes",
        "ff02::2\tip6-allrouters",
        *(f"{ip}\t{hostname}" for ip in ips),
    ]
    return ("\n".join(lines) + "\n").encode()
