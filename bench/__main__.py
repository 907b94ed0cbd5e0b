"""`make bench`: what a pod costs, beside containerd with runc and the bare VM it stands on, interleaved in one run.

Absolute times shift from machine to machine and from minute to minute: quote the ratios. Written as a table, as JSON
with `--json FILE`, and as a picture of where a pod's start goes with `--svg FILE`. The whole takes a quarter of an hour
on two cores without KVM; `--only STAGE` and `--skip STAGE` choose.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from bench import peer
from bench.samples import Samples
from bench.stages import STAGES
from bench.stand import Bench
from vmrt.cli.trace import phases_svg


def machine(bench: Bench) -> dict[str, object]:
    """Return what the figures hold for."""
    qemu = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True).stdout
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processors": os.cpu_count(),
        "host kernel": platform.release(),
        "python": platform.python_version(),
        "qemu": qemu.splitlines()[0],
        "accelerator": bench.accelerator,
        "guest kernel": bench.guest.kernel_release,
        "peer": peer.version(),
        "load before": round(os.getloadavg()[0], 2),
    }


def report(samples: Samples, facts: dict[str, object]) -> dict[str, object]:
    """Print the tables and return what goes into the JSON."""
    print(f"\n{samples.table()}\n")
    for ratio, value in samples.measured_ratios():
        limit_text = "" if ratio.limit is None else f"  (at most {ratio.limit:g})"
        print(f"{ratio.name}: {value:.2f}{limit_text}")
    return {
        "machine": facts,
        "values": {f"{whose}: {what}": values for (whose, what), values in samples.values.items()},
        "medians": {f"{whose}: {what}": samples.median((whose, what)) for whose, what in samples.values},
        "p99": {f"{whose}: {what}": samples.p99((whose, what)) for whose, what in samples.values},
        "ratios": {ratio.name: value for ratio, value in samples.measured_ratios()},
        "limits": {ratio.name: ratio.limit for ratio, _ in samples.measured_ratios() if ratio.limit is not None},
    }


@click.command(epilog="Stages: " + "; ".join(f"{stage.name}: {stage.summary}" for stage in STAGES) + ".")
@click.option("--only", multiple=True, type=click.Choice([s.name for s in STAGES]), help="Run this stage (repeatable).")
@click.option("--skip", multiple=True, type=click.Choice([s.name for s in STAGES]), help="Leave this stage out.")
@click.option("--rounds", default=5, show_default=True, help="How often the sides take turns.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all values here.")
@click.option("--svg", "svg_path", type=click.Path(path_type=Path), help="Draw where a pod's start goes here.")
def main(
    only: tuple[str, ...], skip: tuple[str, ...], rounds: int, json_path: Path | None, svg_path: Path | None
) -> None:
    """Measure vmrt against containerd and bare QEMU on this machine. Times in milliseconds, sizes in MB."""
    chosen = [stage for stage in STAGES if stage.name not in skip and (not only or stage.name in only)]
    with contextlib.ExitStack() as stack:
        scratch = tempfile.TemporaryDirectory(prefix="vmrt-bench-", dir="/var/tmp", ignore_cleanup_errors=True)
        bench = Bench(Path(stack.enter_context(scratch)), rounds, stack)
        facts = machine(bench)
        print("\n".join(f"{name}: {value}" for name, value in facts.items()), flush=True)
        for stage in chosen:
            began = time.monotonic()
            print(f"{stage.name} ", end="", flush=True)
            stage.measure(bench)
            print(f" {time.monotonic() - began:.0f} s", flush=True)
        facts["load after"] = round(os.getloadavg()[0], 2)
    result = report(bench.samples, facts)
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1) + "\n")
    if svg_path is not None:
        svg_path.write_text(phases_svg(bench.samples.phases()))


if __name__ == "__main__":
    sys.exit(main())
