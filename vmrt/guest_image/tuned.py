"""The tuned kernel: Debian's kernel source compiled with firmware/kernel.config and nothing else switched on.

Everything is built in, so its image has no initramfs: the kernel mounts the root disk itself. It is compiled once for
its inputs (the source package, the configuration, the compiler, the recipe below) and kept in the cache by their
digest.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vmrt import spawn
from vmrt.errors import NotFoundError, ProcessError, VmrtError
from vmrt.guest_image import kernel
from vmrt.guest_image.packages import Package, PackageCache, Progress, staged_directory

PHASE = "guest image kernel"
FRAGMENT = Path(__file__).parents[2] / "firmware" / "kernel.config"
SOURCE_PACKAGE = "linux-source"
LOCAL_VERSION = "-vmrt"
KERNEL, CONFIG = "vmlinux", "config"
WORK_PREFIX = "compile-"

# What the kernel would otherwise write into itself (Documentation/kbuild/reproducible-builds.rst).
_ENVIRONMENT = {
    "KBUILD_BUILD_TIMESTAMP": "1970-01-01",
    "KBUILD_BUILD_USER": "vmrt",
    "KBUILD_BUILD_HOST": "vmrt",
    "KBUILD_BUILD_VERSION": "1",
    "LC_ALL": "C",
    "TZ": "UTC",
}
_TARGET = "vmlinux"  # no bzImage: QEMU starts the ELF file through its PVH entry
# Program or header -> the Debian package that brings it. libelf: objtool, which the mitigations need.
_PROGRAMS = {
    **dict.fromkeys(("ld", "strip"), "binutils"),
    **{name: name for name in ("bc", "bison", "flex", "gcc", "make")},
    "xz": "xz-utils",
}
_HEADERS = {"gelf.h": "libelf-dev"}
_INCLUDE = Path("/usr/include")
_NICENESS = "10"
_COMPILE_S = 2 * 3600


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that the kernel is made of."""

    source: Package
    fragment: str
    compiler: str

    def inputs(self) -> dict[str, object]:
        """Return what the result depends on, for the cache and for the manifest."""
        return {
            "source": asdict(self.source),
            "config": hashlib.sha256(self.fragment.encode()).hexdigest(),
            "compiler": self.compiler,
            "recipe": [_TARGET, LOCAL_VERSION, _ENVIRONMENT],
        }

    @property
    def key(self) -> str:
        """Return the name of the result in the cache."""
        return hashlib.sha256(json.dumps(self.inputs(), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Built:
    """A compiled kernel: a directory of the cache with the stripped ELF file and the complete configuration."""

    directory: Path

    @property
    def elf(self) -> Path:
        """Return the kernel."""
        return self.directory / KERNEL

    @property
    def config(self) -> Path:
        """Return its configuration."""
        return self.directory / CONFIG

    @property
    def release(self) -> str:
        """Return what uname(2) says in the guest."""
        return (self.directory / "release").read_text().strip()


def parse_fragment(text: str) -> dict[str, str]:
    """Parse a configuration fragment into option -> value, "n" for `# CONFIG_X is not set`.

    Raises `VmrtError` with the line's number for a line that is neither, and for an option that is there twice.
    """
    options: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if match := re.fullmatch(r"(CONFIG_\w+)=(\S.*)", line):
            option, value = match.groups()
        elif match := re.fullmatch(r"# (CONFIG_\w+) is not set", line):
            option, value = match[1], "n"
        elif not line.strip() or (line.startswith("#") and not line.startswith("# CONFIG_")):
            continue
        else:
            raise VmrtError(f"line {number} is no option: {line}", phase=PHASE, resource=FRAGMENT.name)
        if option in options:
            raise VmrtError(f"line {number} says {option} a second time", phase=PHASE, resource=FRAGMENT.name)
        options[option] = value
    return options


def unmet(fragment: Mapping[str, str], config: Mapping[str, str]) -> list[str]:
    """Return what did not end up in the configuration as the fragment says: "CONFIG_X=y, got n".

    Kconfig drops, without a word, an option whose dependencies are not met.
    """
    return [
        f"{option}={value}, got {config.get(option, 'n')}"
        for option, value in fragment.items()
        if config.get(option, "n") != value
    ]


async def recipe(store: PackageCache, progress: Progress) -> Recipe:
    """Learn what the kernel would be made of now. Raises `VmrtError` where apt or the compiler is missing."""
    sources = await store.resolve(SOURCE_PACKAGE, (), progress, record="resolved-source.json")
    if len(sources) != 1:
        raise VmrtError(f"expected one kernel source, got {[s.name for s in sources]}", phase=PHASE)
    text = await asyncio.to_thread(FRAGMENT.read_text)
    parse_fragment(text)
    versions = [(await spawn.run([name, "--version"], phase=PHASE)).text().splitlines()[0] for name in ("gcc", "ld")]
    return Recipe(sources[0], text, "; ".join(versions))


def any_built(cache: Path) -> bool:
    """Return whether some tuned kernel is in the cache, of whatever inputs."""
    return any((cache / "tuned").glob(f"*/{KERNEL}"))


def find(cache: Path, wanted: Recipe) -> Built | None:
    """Return the kernel that was made of just these inputs, if it is in the cache."""
    built = Built(cache / "tuned" / wanted.key)
    return built if built.elf.is_file() else None


async def compile_kernel(store: PackageCache, wanted: Recipe, progress: Progress) -> Built:
    """Return the kernel, compiled unless the cache has it.

    Raises `NotFoundError` naming the Debian packages that are missing on this host, `ProcessError` with the compiler's
    words, `VmrtError` when the configuration does not come out as written.
    """
    if built := find(store.directory, wanted):
        return built
    check_tools()
    await store.fetch([wanted.source], progress)
    package = await store.unpack(wanted.source)
    target = Built(store.directory / "tuned" / wanted.key)
    target.directory.parent.mkdir(exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=store.directory, prefix=WORK_PREFIX))
    try:
        with staged_directory(target.directory, prefix=".new-") as result:
            await _compile(wanted, package, work, Built(result), progress)
    finally:
        await asyncio.to_thread(shutil.rmtree, work, ignore_errors=True)
    for other in target.directory.parent.iterdir():  # of earlier inputs; images have copies of their own
        if other != target.directory:
            await asyncio.to_thread(shutil.rmtree, other)
    return target


async def _compile(wanted: Recipe, package: Path, work: Path, result: Built, progress: Progress) -> None:
    progress("unpacking the kernel source", 0, 0)
    (archive,) = (package / "usr/src").glob("linux-source-*.tar.xz")
    source, output = work / "source", work / "output"
    for directory in (source, output):
        directory.mkdir()
    await _run(["tar", "-C", source, "-xf", archive, "--strip-components=1"], work)
    fragment = work / "fragment"
    fragment.write_text(wanted.fragment)
    make: list[str | Path] = ["make", "-C", source, f"O={output}", f"LOCALVERSION={LOCAL_VERSION}"]
    await _run([*make, f"KCONFIG_ALLCONFIG={fragment}", "allnoconfig"], work)
    check_config(parse_fragment(wanted.fragment), output / ".config")
    progress("compiling the tuned kernel: 5 to 20 minutes, once", 0, 0)
    await _run([*make, f"-j{os.cpu_count() or 1}", _TARGET], work)
    await _run(["strip", "--strip-all", "-o", result.elf, output / _TARGET], work)
    shutil.copyfile(output / ".config", result.config)
    shutil.copyfile(output / "include/config/kernel.release", result.directory / "release")


def check_config(fragment: Mapping[str, str], config_file: Path) -> None:
    """Raise `VmrtError` naming what Kconfig dropped or changed."""
    if wrong := unmet(fragment, kernel.parse_config(config_file.read_text())):
        raise VmrtError(
            f"Kconfig did not take {'; '.join(wrong)}",
            phase=PHASE,
            resource=FRAGMENT.name,
            hint="the option was renamed, or another one that it depends on is missing",
        )


def check_tools() -> None:
    """Raise `NotFoundError` naming the Debian packages that the compilation needs and this host lacks."""
    lacking = {package for program, package in _PROGRAMS.items() if shutil.which(program) is None}
    lacking |= {package for header, package in _HEADERS.items() if not (_INCLUDE / header).is_file()}
    if lacking:
        names = " ".join(sorted(lacking))
        raise NotFoundError(
            f"compiling a kernel needs Debian's {names}",
            phase=PHASE,
            hint=f"apt-get install {names}, or `make guest-tuned`, which does that; or take --kernel distribution",
        )


async def _run(argv: Sequence[str | Path], work: Path) -> None:
    # make's own variables (MAKEFLAGS of `make guest-tuned`) and compiler flags are not this build's business.
    environment = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    try:
        await spawn.run(
            ["nice", "-n", _NICENESS, *argv],
            cwd=work,
            env={**environment, **_ENVIRONMENT},
            timeout_s=_COMPILE_S,
            phase=PHASE,
            resource=FRAGMENT.name,
        )
    except ProcessError as e:
        e.hint = "is the disk full (2 GB are needed in the cache), or is a header missing?"
        raise


__all__ = [
    "FRAGMENT",
    "Built",
    "Recipe",
    "any_built",
    "check_config",
    "check_tools",
    "compile_kernel",
    "find",
    "parse_fragment",
    "recipe",
    "unmet",
]
