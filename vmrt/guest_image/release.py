"""What differs between the Debian releases that a guest image can be made of: Python's version, and packages' names.

The release is that of the building machine, since apt there answers with its packages.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import PurePosixPath


@dataclass(frozen=True, slots=True)
class Release:
    """One release; `python` is "MAJOR.MINOR" of its interpreter, `packages` go by other names elsewhere."""

    codename: str
    python: str
    packages: tuple[str, ...]

    @property
    def library(self) -> PurePosixPath:
        """Return where its standard library lies, relative to the root."""
        return PurePosixPath(f"usr/lib/python{self.python}")

    @property
    def program(self) -> str:
        """Return its interpreter, relative to the root."""
        return f"usr/bin/python{self.python}"

    @property
    def python_packages(self) -> tuple[str, ...]:
        """Return the packages that the interpreter and its library are in."""
        name = f"python{self.python}"
        return (f"lib{name}-minimal", f"lib{name}-stdlib", f"{name}-minimal")


# The newest last. 64-bit time changed the names of libraries (t64), those without an interface that has it too.
RELEASES = (
    Release("bookworm", "3.11", ("libssl3",)),
    Release("trixie", "3.13", ("libssl3t64",)),
)


def choose(codename: str) -> Release:
    """Return the release of that name; an unknown one is taken to be like the newest that is known."""
    return next((release for release in RELEASES if release.codename == codename), RELEASES[-1])


def here() -> Release:
    """Return this machine's release."""
    try:
        return choose(platform.freedesktop_os_release().get("VERSION_CODENAME", ""))
    except OSError:
        return RELEASES[-1]
