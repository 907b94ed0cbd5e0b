"""Writes a volume as kubelet's atomic writer does, step by step."""

from __future__ import annotations

from pathlib import Path


def write(root: Path, version: str, files: dict[str, bytes]) -> None:
    """Make `version` the current one, leaving the visible links as they are."""
    for path, data in files.items():
        (root / version / path).parent.mkdir(parents=True, exist_ok=True)
        (root / version / path).write_bytes(data)
    (root / "..data_tmp").symlink_to(version)
    (root / "..data_tmp").rename(root / "..data")
