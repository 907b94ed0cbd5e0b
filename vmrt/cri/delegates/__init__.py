"""Delegates: other CRI runtimes for the pods that a VM cannot be, shown to kubelet as one with ours (docs/delegate.md).

`endpoint` is one of them, seen through its socket; `directory` knows whose a sandbox or container is; `routing` and
`merging` decide, without I/O; `runtime`, `images`, `events` and `control` wrap our own services. A daemon without
delegates has none of this in its way: `vmrt.cri.server` registers our services as they are.
"""
