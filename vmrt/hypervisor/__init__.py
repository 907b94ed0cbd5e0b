"""One VM: libvirt domain, vsock, console, disks; KVM or software emulation."""
