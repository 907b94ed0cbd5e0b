"""vmrt: a Kubernetes container runtime that gives every pod its own lightweight virtual machine."""

__version__ = "0.1.0"
