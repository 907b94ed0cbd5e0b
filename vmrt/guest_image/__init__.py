"""Builds and reads the kernel and root image that VMs boot."""
