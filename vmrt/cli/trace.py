"""`vmrt trace`: where a pod's start went, printed and drawn; phases that ran side by side are shown side by side.

The order is RunPodSandbox's own (docs/performance.md): a turn among those who boot; disk and tap, then boot, beside the
network; then the join beside the guest's configuration. A pod from the warm pool has no turn, disk and boot of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from xml.sax.saxutils import escape

import click

from vmrt.cli.app import Options
from vmrt.cli.command import Command
from vmrt.cli.complete import targets
from vmrt.cli.output import emit_json
from vmrt.errors import VmrtError

_BAR = 40
_WIDTH, _LEFT, _ROW, _GAP = 900, 190, 22, 8
_COLOURS = {
    "turn": "#ffd92f",
    "disk and tap": "#8da0cb",
    "boot": "#fc8d62",
    "network": "#66c2a5",
    "join": "#a6d854",
    "configure": "#e78ac3",
    "total": "#cccccc",
}


def spans(phases: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """Return (phase, start, end) in milliseconds from the phases' durations."""
    turn, disk, boot, network = (phases.get(name, 0.0) for name in ("turn", "disk and tap", "boot", "network"))
    met = turn + max(disk + boot, network)
    starts = {
        "turn": 0.0,
        "disk and tap": turn,
        "boot": turn + disk,
        "network": turn,
        "join": met,
        "configure": met,
        "total": 0.0,
    }
    return [(name, starts[name], starts[name] + phases[name]) for name in starts if name in phases]


def phases_svg(pods: Mapping[str, Mapping[str, float]]) -> str:
    """Draw the phases of each kind of pod, each kind on a scale of its own; durations in milliseconds."""
    parts: list[str] = []
    y = 10
    for title, phases in pods.items():
        rows = spans(phases)
        longest = max((end for _, _, end in rows), default=1.0) or 1.0
        parts.append(f'<text x="10" y="{y + 16}" font-weight="bold">{escape(title)}</text>')
        y += _ROW + _GAP
        for name, start, end in rows:
            scale = (_WIDTH - _LEFT - 100) / longest
            x, width = _LEFT + start * scale, max(1.0, (end - start) * scale)
            parts.append(f'<text x="{_LEFT - 8}" y="{y + 15}" text-anchor="end">{escape(name)}</text>')
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_ROW - 4}"'
                f' fill="{_COLOURS.get(name, "#999999")}"/>'
            )
            parts.append(f'<text x="{x + width + 5:.1f}" y="{y + 15}">{end - start:.1f} ms</text>')
            y += _ROW
        y += 2 * _GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y}" font-family="sans-serif"'
        f' font-size="13"><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )


def phases_text(phases: Mapping[str, float]) -> str:
    """Return one line for each phase: its name, a bar at its place in time, its milliseconds."""
    rows = spans(phases)
    longest = max((end for _, _, end in rows), default=1.0) or 1.0
    lines = []
    for name, start, end in rows:
        before = round(start / longest * _BAR)
        bar = "#" * max(1, round(end / longest * _BAR) - before)
        lines.append(f"{name:<14}{' ' * before}{bar:<{_BAR - before + 1}}{end - start:9.1f} ms")
    return "\n".join(lines)


@click.command(
    cls=Command,
    examples="""
    vmrt trace web
    vmrt trace web --svg start.svg
    vmrt trace web --json
    """,
)
@click.option("--svg", "svg_path", type=click.Path(path_type=Path, dir_okay=False), help="Draw it into this file.")
@click.option("--json", "as_json", is_flag=True, help="Print the phases in milliseconds as JSON.")
@click.argument("pod", shell_complete=targets)
@click.pass_obj
def trace(options: Options, svg_path: Path | None, as_json: bool, pod: str) -> None:
    """Show where the start of a pod went, phase by phase, by the daemon's clock."""
    from vmrt.cli.client import Daemon, pods_of
    from vmrt.cli.lookup import find_pod
    from vmrt.proto.runtime.v1 import api_pb2

    with Daemon(options) as daemon:
        found = find_pod(pods_of(daemon), pod)
        request = api_pb2.PodSandboxStatusRequest(pod_sandbox_id=found.id, verbose=True)
        info = daemon.call(daemon.runtime.PodSandboxStatus, request).info
    try:
        phases = {str(name): float(ms) for name, ms in json.loads(info["phasesMs"]).items()}
    except (KeyError, ValueError, AttributeError, TypeError) as e:
        raise VmrtError(
            f"the daemon told no phases of this pod: {e!r}",
            resource=f"sandbox {found.id}",
            hint="pods that a delegate runs have none",
        ) from e
    if svg_path is not None:
        try:
            svg_path.write_text(phases_svg({found.metadata.name: phases}))
        except OSError as e:
            raise VmrtError(f"cannot write the picture: {e.strerror}", resource=str(svg_path)) from e
    if as_json:
        emit_json(phases)
    else:
        click.echo(phases_text(phases))
