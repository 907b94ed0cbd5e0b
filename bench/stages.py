"""All stages, in the order in which they run. A new one is a module with a `STAGE` and a line here."""

from __future__ import annotations

from bench import boot, density, exec, lifecycle, lists, network, portforward, pull, volumes
from bench.stand import Stage

STAGES: tuple[Stage, ...] = (
    lifecycle.STAGE,
    boot.STAGE,
    lists.LISTS,
    lists.RECORDED,
    density.STAGE,
    pull.STAGE,
    exec.STAGE,
    portforward.STAGE,
    network.STAGE,
    volumes.STAGE,
)
