"""Debian packages as the raw material: resolved by apt, fetched once, unpacked once.

apt decides which version is current and checks signatures and digests; nothing here installs anything, so no root is
needed. What apt answered is kept beside the packages: where apt has no lists (or no network is there) a build goes on
with the versions of the last resolution, and says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vmrt import spawn
from vmrt.errors import ProcessError, VmrtError

PHASE = "guest image packages"
_RESOLVED = "resolved.json"

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total) as work goes on; octets, total 0 where there is nothing to count."""


@dataclass(frozen=True, slots=True)
class Package:
    """One package at one version; `digest` is "algorithm:hex" of the .deb, as the signed package list has it."""

    name: str
    version: str
    file: str
    size_bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class _Resolution:
    """What apt answered: to which question, and in which state it was."""

    asked: list[str]
    apt_state: str
    packages: tuple[Package, ...]


class PackageCache:
    """A directory with `debs/` (fetched packages) and `unpacked/` (their contents, by digest)."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._debs = directory / "debs"
        self._unpacked = directory / "unpacked"
        for path in (self._debs, self._unpacked):
            path.mkdir(parents=True, exist_ok=True)

    async def resolve(
        self, metapackage: str, names: Sequence[str], progress: Progress, *, record: str = _RESOLVED
    ) -> tuple[Package, ...]:
        """Return the current versions of `names` and of what `metapackage` depends on, sorted by name.

        `record` is the file of the cache that keeps the answer: each question has its own.

        Raises `VmrtError` when apt cannot tell and no earlier resolution of the same names is complete in the cache.
        """
        asked, state = [metapackage, *sorted(names)], await asyncio.to_thread(_apt_state)
        if (last := self._last(asked, record)) is not None and last.apt_state == state:
            return last.packages
        try:
            depended = await self._dependencies(metapackage)
            packages = await self._candidates([*names, *depended])
        except ProcessError as e:
            if last is None:
                raise VmrtError(
                    f"apt does not know the packages: {e.stderr.splitlines()[0] if e.stderr else e.message}",
                    phase=PHASE,
                    hint="run `apt-get update`, and see that apt's sources are those of Debian 12 or 13",
                ) from e
            progress("apt cannot tell the current versions; using those of the last build", 0, 0)
            return last.packages
        resolution = _Resolution(asked, state, tuple(sorted(packages, key=lambda package: package.name)))
        _write(self.directory / record, json.dumps(asdict(resolution), indent=1))
        return resolution.packages

    async def fetch(self, packages: Sequence[Package], progress: Progress) -> None:
        """Download those that are not in the cache; each is checked against its digest before it gets its name."""
        missing = [package for package in packages if not (self._debs / package.file).is_file()]
        if not missing:
            return
        total = sum(package.size_bytes for package in missing)
        with tempfile.TemporaryDirectory(dir=self.directory, prefix="fetch-") as work:
            argv = [*_APT_GET, "download", *(f"{package.name}={package.version}" for package in missing)]
            watch = asyncio.create_task(_watch(Path(work), total, progress))
            try:
                await spawn.run(argv, cwd=Path(work), timeout_s=1800, env=_environment(), phase=PHASE)
            except ProcessError as e:
                e.hint = "is the network up? a version that has left the mirror needs `apt-get update`"
                raise
            finally:
                watch.cancel()
            for package in missing:
                await asyncio.to_thread(self._take, Path(work) / package.file, package)

    async def unpack(self, package: Package) -> Path:
        """Return a directory with the package's files. It is shared: read it, never write into it."""
        target = self._unpacked / f"{package.name}-{package.digest.partition(':')[2][:16]}"
        if target.is_dir():
            return target
        deb = self._debs / package.file
        # The cache may have been there for months, on any disk: what goes into every VM is checked where it is used.
        await asyncio.to_thread(_check_digest, deb, package.digest)
        with staged_directory(target, prefix="unpack-") as work:
            await spawn.run(["dpkg-deb", "-x", deb, work], timeout_s=600, phase=PHASE, resource=package.name)
        return target

    def _take(self, fetched: Path, package: Package) -> None:
        if not fetched.is_file():
            raise VmrtError("apt-get downloaded another file", phase=PHASE, resource=package.file)
        _check_digest(fetched, package.digest)
        fetched.replace(self._debs / package.file)

    async def _dependencies(self, metapackage: str) -> list[str]:
        argv = ["apt-cache", "depends", "--no-recommends", "--no-suggests", metapackage]
        output = await spawn.run(argv, env=_environment(), phase=PHASE, resource=metapackage)
        return re.findall(r"^ +Depends: ([a-z0-9][a-z0-9+.-]+)$", output.text(), re.MULTILINE)

    async def _candidates(self, names: Sequence[str]) -> list[Package]:
        # apt-get prints no line for a file that is in the working directory already: ask from an empty one.
        with tempfile.TemporaryDirectory(dir=self.directory, prefix="resolve-") as work:
            argv = [*_APT_GET, "download", "--print-uris", *names]
            output = await spawn.run(argv, cwd=Path(work), env=_environment(), phase=PHASE)
        return parse_uris(output.text())

    def _last(self, asked: list[str], name: str) -> _Resolution | None:
        """Return the last answer to the same question, if everything it names is in the cache."""
        try:
            record = json.loads((self.directory / name).read_text())
            packages = tuple(Package(**entry) for entry in record["packages"])
            resolution = _Resolution(record["asked"], record["apt_state"], packages)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        complete = all((self._debs / package.file).is_file() for package in packages)
        return resolution if complete and resolution.asked == asked else None


def _apt_state() -> str:
    """Return a name for apt's lists and configuration: while they are as they were, so is apt's answer.

    Asking apt takes a second, and a build that has nothing to do should not.
    """
    total = hashlib.sha256()
    for directory in (Path("/var/lib/apt/lists"), Path("/etc/apt")):
        for path in sorted(directory.rglob("*")):
            with contextlib.suppress(OSError):
                status = path.stat()
                total.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return total.hexdigest()


@contextlib.contextmanager
def staged_directory(target: Path, *, prefix: str) -> Iterator[Path]:
    """Give a fresh directory beside `target` that becomes `target` when the block succeeds and vanishes otherwise.

    A `target` that exists is replaced: the caller has found it wanting.
    """
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=prefix))
    try:
        yield work
        work.chmod(0o755)  # mkdtemp's 0700 would keep other users (QEMU's, for one) out
        if target.exists():
            shutil.rmtree(target)
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


async def _watch(directory: Path, total: int, progress: Progress) -> None:
    """Report how much lies in a directory that apt downloads into, until cancelled."""
    while True:
        done = await asyncio.to_thread(_size_below, directory)
        progress("downloading packages", min(done, total), total)
        await asyncio.sleep(0.2)


def _size_below(directory: Path) -> int:
    count = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # apt renames what it has finished
            count += path.lstat().st_size
    return count


# Without the option, apt drops to the user _apt and warns where that user cannot write to the directory.
_APT_GET = ("apt-get", "-o", "APT::Sandbox::User=root")


def parse_uris(text: str) -> list[Package]:
    """Parse `apt-get download --print-uris`: a line is 'URI' FILE SIZE ALGORITHM:HEX.

    The file is NAME_VERSION_ARCHITECTURE.deb with the colon of an epoch written %3a.
    """
    packages = []
    for line in text.splitlines():
        words = shlex.split(line)
        if len(words) != 4 or not words[1].endswith(".deb") or ":" not in words[3]:
            continue
        parts = words[1].removesuffix(".deb").split("_")
        if len(parts) != 3 or not words[2].isdigit():
            continue
        version = parts[1].replace("%3a", ":")
        packages.append(Package(parts[0], version, words[1], int(words[2]), words[3]))
    return packages


def _environment() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C.UTF-8"}


def _check_digest(path: Path, digest: str) -> None:
    algorithm, _, expected = digest.partition(":")
    try:
        with path.open("rb") as file:
            actual = hashlib.file_digest(file, algorithm.lower()).hexdigest()
    except (OSError, ValueError) as e:
        raise VmrtError(f"cannot check its digest: {e}", phase=PHASE, resource=path.name) from e
    if actual != expected:
        path.unlink()
        raise VmrtError(
            f"its {algorithm} is {actual}, the package list says {expected}",
            phase=PHASE,
            resource=path.name,
            hint="it has been removed from the cache; build again",
        )


def _write(path: Path, text: str) -> None:
    staged = path.with_name(path.name + ".new")
    staged.write_text(text + "\n")
    staged.replace(path)
