"""The guest image: the kernel, initramfs and read-only root that VMs boot.

`build` makes it from the distribution's packages, `load` checks one before a daemon boots from it. The agent
(vmrt/agent) is treated as files. See docs/guest-image.md.
"""

from vmrt.guest_image.builder import build, default_cache
from vmrt.guest_image.manifest import hold, load, prune

__all__ = ["build", "default_cache", "hold", "load", "prune"]
