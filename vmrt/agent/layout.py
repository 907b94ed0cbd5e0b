"""Paths, ports and bounds that the host and the guest agree on. Pure constants: the one module of the agent that the
host's rooms may import too."""

PROTOCOL_VERSION = 1

CALL_PORT = 1024
STREAM_PORT = 1025
READY_PORT = 1026  # on the host

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
MAX_FRAME_BYTES = 65536

# In the guest.
RUN = "/run/vmrt"
SANDBOX = "/run/vmrt/sandbox"  # resolv.conf, hosts, hostname, shm/ for the containers' mounts
SHARE = "/run/vmrt/share"  # the virtiofs share of the pod's volumes
CONTAINERS = "/run/vmrt/containers"  # <id>/rootfs, <id>/config.json, <id>/storage/<name>
SCRATCH = "/run/vmrt/scratch"  # the pod's scratch disk
