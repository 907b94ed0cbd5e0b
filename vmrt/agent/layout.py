"""Paths, ports and bounds that the host and the guest agree on.

Pure constants: the one module of the agent that the host's rooms may import too.
"""

PROTOCOL_VERSION = 1

CALL_PORT = 1024
STREAM_PORT = 1025
READY_PORT = 1026  # on the host

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
MAX_FRAME_BYTES = 65536
# Octets of a stream's stdin that may be on their way (agent.proto, StreamHello.stdin_acks), and how many of them the
# agent acknowledges at once. Together with one piece of STDIN_PIECE they must fit: else an agent that has consumed all
# would wait for more, and the host for an acknowledgement. A window is below what the agent holds before it stops
# reading the connection.
STDIN_WINDOW = 256 * 1024
STDIN_ACK = 64 * 1024
STDIN_PIECE = 64 * 1024

# In the guest.
RUN = "/run/vmrt"
SANDBOX = "/run/vmrt/sandbox"  # resolv.conf, hosts, hostname, shm/ for the containers' mounts
SHARE = "/run/vmrt/share"  # the virtiofs share of the pod's volumes
VOLUMES = "/run/vmrt/volumes"  # the pod's volumes in the guest's memory, by name
CONTAINERS = "/run/vmrt/containers"  # <id>/rootfs, <id>/config.json, <id>/storage/<name>
SCRATCH = "/run/vmrt/scratch"  # the pod's scratch disk
SCRATCH_SERIAL = "scratch"  # the serial of that disk: one that is there is mounted before any request
EXEC_PROGRAM = "/usr/lib/vmrt-exec"  # starts the process of an exec (vmrt/guest_image/exec.c)
PAUSE_PROGRAM = "/usr/lib/vmrt-pause"  # PID 1 of the containers' PID namespace (vmrt/guest_image/pause.c)
ZYGOTE_LIBRARY = "/usr/lib/vmrt-zygote.so"  # keeps crun loaded (vmrt/guest_image/zygote.c)

REHEARSAL_ROOT = "/"  # what a container that is made for practice has as its root file system

# Namespace paths that the host writes into an OCI spec. The first is a bind mount the agent makes when the sandbox is
# configured with a shared PID namespace; the last is a name that the agent replaces by the target container's.
POD_PID_NAMESPACE = "/run/vmrt/sandbox/pidns"
# The next four are there when the sandbox is configured with a user namespace.
POD_USER_NAMESPACE = "/run/vmrt/sandbox/userns"
POD_NETWORK_NAMESPACE = "/run/vmrt/sandbox/netns"
POD_IPC_NAMESPACE = "/run/vmrt/sandbox/ipcns"
POD_UTS_NAMESPACE = "/run/vmrt/sandbox/utsns"
TARGET_PID_NAMESPACE = "/run/vmrt/target/pidns"
