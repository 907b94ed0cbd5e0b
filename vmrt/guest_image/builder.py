"""Build a guest image: resolve, fetch, assemble, write, and point `current` at the result.

Three levels are kept, so that each change costs what it must: fetched and unpacked packages (by digest), the base tree
with the precompiled standard library (by the packages and this room's sources), and the image (by everything). What an
image's version is made of is in `inputs`; nothing else (time, user, path, umask) may reach the files.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vmrt.agent import layout
from vmrt.errors import NotFoundError, UnsupportedError, VmrtError
from vmrt.guest_image import bindings, initramfs, kernel, manifest, modules, rootfs, tuned
from vmrt.guest_image.packages import Package, PackageCache, Progress, staged_directory
from vmrt.guest_image.release import Release, here
from vmrt.model import GuestImage

PHASE = "guest image"
KERNEL_PACKAGE = "linux-image-cloud-amd64"
KERNEL_FILE = "vmlinux"
INITRAMFS_FILE = "initramfs.cpio"
_BUILD_PREFIX = ".build-"
REQUIRED = Path(__file__).parents[2] / "firmware" / "kernel.required"
_AGENT = Path(__file__).parents[1] / "agent"
_ROOM = Path(__file__).parent

# Which kernel to take: "auto" is the tuned one where the cache has it, else the distribution's.
KERNELS = ("auto", "tuned", "distribution")

# What the image needs of its kernel command line (kernel, Documentation/admin-guide/kernel-parameters.txt).
CMDLINE = " ".join(
    (
        "console=ttyS0",  # built in and there from the first message on; hvc0 would need virtio_console first
        "quiet",  # every character of the console is an exit from the guest; warnings and panics are still shown
        "panic=-1",  # a panic ends the VM at once: with -no-reboot QEMU exits, and the daemon shows the console's tail
        "reboot=t",  # by triple fault, without trying the keyboard controller and ACPI first
        "random.trust_cpu=on",  # RDRAND seeds the guest's RNG at boot; the agent adds the host's entropy
        "cryptomgr.notests",  # the kernel's self-tests of its ciphers took 0.16 s of an emulated boot
        "noreplace-smp",  # keep lock prefixes on one CPU: patching them out and back costs more than they do
        # Whether the timer's interrupt arrives is counted over a few ms: a vCPU that the host held back meanwhile takes
        # it for broken, tries other wirings, and may hang. Under KVM the kernel leaves the check out by itself.
        "no_timer_check",
        "rcupdate.rcu_expedited=1",  # grace periods wait for no timer tick: module loading, mounts and netns need many
    )
)


def cmdline(filesystem: str, *, is_tuned: bool) -> str:
    """Return the kernel command line of an image; the tuned kernel mounts the root and starts init itself."""
    if not is_tuned:
        # 64 MiB of bounce buffers, which the kernel sets aside as memory might be plugged above 4 GiB: no device of
        # the machine needs one (virtio without VIRTIO_F_ACCESS_PLATFORM), and the pod is to have what it was promised.
        return f"{CMDLINE} swiotlb=noforce"
    # The machine has one virtio-blk disk; layers and scratch disk are SCSI (vmrt/hypervisor/domain.py). The dummy
    # driver is built in and would make an interface in the pod; pods still make their own.
    return f"{CMDLINE} dummy.numdummies=0 root=/dev/vda rootfstype={filesystem} ro init=/{initramfs.ROOT_INIT}"


@dataclass(frozen=True, slots=True)
class _Inputs:
    packages: tuple[Package, ...]
    kernel_package: Package
    recipe: tuned.Recipe | None
    release: Release
    filesystem: str
    tool: str
    init: bytes
    programs: Mapping[str, bytes]
    agent: Mapping[str, bytes]
    protobuf: Path

    def needed(self) -> tuple[Package, ...]:
        """Return the packages that the image is made of: a tuned kernel has no need of the distribution's."""
        return tuple(p for p in self.packages if self.recipe is None or p != self.kernel_package)

    def base(self) -> dict[str, object]:
        """Return what the base tree is made of."""
        site = self.protobuf / "google"
        return {
            "packages": [asdict(package) for package in self.needed()],
            "kernel": "distribution" if self.recipe is None else "tuned",
            "release": self.release.codename,
            "builder": _digest_files(_ROOM, sorted(_ROOM.glob("*.py"))),
            "protobuf": _digest_files(site, sorted(p for p in site.rglob("*") if p.suffix in (".py", ".so"))),
        }

    def all(self) -> dict[str, object]:
        """Return what the image is made of."""
        return {
            **self.base(),
            "agent": _digest(self.agent),
            "init": hashlib.sha256(self.init).hexdigest(),
            "programs": _digest(self.programs),
            "required": hashlib.sha256(REQUIRED.read_bytes()).hexdigest(),
            "filesystem": self.filesystem,
            "mkfs": self.tool,
            **({} if self.recipe is None else {"tuned": self.recipe.inputs()}),
        }


@dataclass(frozen=True, slots=True)
class _Kernel:
    """A kernel package's files or a tuned kernel, its release, and its modules' dependencies (none: no modules)."""

    source: Path | tuned.Built
    release: str
    dep: Mapping[str, tuple[str, ...]]


def default_cache() -> Path:
    """Return where packages are kept: /var/cache for root, else the user's cache directory."""
    if os.geteuid() == 0:
        return Path("/var/cache/vmrt/guest")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vmrt" / "guest"


async def build(
    output: Path,
    *,
    progress: Progress | None = None,
    cache: Path | None = None,
    agent: Mapping[str, bytes] | None = None,
    kernel_choice: str = "auto",
) -> GuestImage:
    """Bring the image in `output` up to date and return it; at once where nothing has changed.

    `progress` is told each step. `agent` replaces the agent's files (path below site -> content), for tests of the boot
    alone. `kernel_choice` is one of KERNELS; "tuned" compiles the kernel where the cache lacks it. Raises `VmrtError`;
    a failed or cancelled build leaves `current` as it was.
    """
    if platform.machine() != "x86_64":
        raise UnsupportedError(f"guest images are built on x86_64 only, this is {platform.machine()}", phase=PHASE)
    cache = cache or default_cache()
    try:
        with _locked(cache, progress or _silent), _locked(output, progress or _silent):
            await asyncio.to_thread(_sweep, cache, output)
            job = await _Job.prepare(output, cache, progress or _silent, agent, kernel_choice)
            return await job.run()
    except OSError as e:
        raise VmrtError(
            f"{e.strerror or e}: {e.filename}" if e.filename else str(e),
            phase=PHASE,
            resource=str(output),
            hint=f"an image needs 400 MB in {cache} and 150 MB in {output}, both writable",
        ) from e


@dataclass(frozen=True, slots=True)
class _Job:
    """One build, from its inputs on."""

    output: Path
    cache: Path
    store: PackageCache
    inputs: _Inputs
    progress: Progress

    @classmethod
    async def prepare(
        cls, output: Path, cache: Path, progress: Progress, agent: Mapping[str, bytes] | None, kernel_choice: str
    ) -> _Job:
        """Learn what the image has to be made of."""
        store = PackageCache(cache)
        return cls(output, cache, store, await _inputs(store, progress, agent, kernel_choice), progress)

    def say(self, what: str) -> None:
        self.progress(what, 0, 0)

    async def run(self) -> GuestImage:
        """Make the image unless it is there, and point `current` at it."""
        version = _version(self.inputs.all())
        image = await asyncio.to_thread(self._existing, version)
        if image is None:
            self.say(f"building guest image {version}")
            with staged_directory(self.output / version, prefix=_BUILD_PREFIX) as work:
                await self._make(work, version)
            image = manifest.load(self.output / version, verify=False)
            size = image.rootfs.stat().st_size / 1e6
            self.say(f"guest image {version}: kernel {image.kernel_release}, root {size:.1f} MB")
        manifest.point_current(self.output, version)
        return image

    def _existing(self, version: str) -> GuestImage | None:
        try:
            image = manifest.load(self.output / version)
        except NotFoundError:
            return None
        except VmrtError as e:
            self.say(f"{e.message}; building it again")
            return None
        self.say(f"guest image {version} is up to date")
        return image

    async def _make(self, work: Path, version: str) -> None:
        """Fill `work` with the image's files and the manifest."""
        await self.store.fetch(self.inputs.needed(), self.progress)
        chosen = await self._kernel()
        base = await self._base_tree(chosen)
        root = work / f"root.{self.inputs.filesystem}"
        archive = None
        if isinstance(chosen.source, Path):
            archive = work / INITRAMFS_FILE
            await asyncio.to_thread(self._extract_kernel, chosen.source, chosen, work / KERNEL_FILE, archive)
        else:
            await asyncio.to_thread(shutil.copyfile, chosen.source.elf, work / KERNEL_FILE)
        await self._write_root(base, version, root)
        await asyncio.to_thread(self._write_manifest, work, version, chosen.release, archive, root)

    async def _kernel(self) -> _Kernel:
        if self.inputs.recipe is not None:
            built = await tuned.compile_kernel(self.store, self.inputs.recipe, self.progress)
            kernel.check_config(built.config, REQUIRED)
            return _Kernel(built, built.release, {})
        package = await self.store.unpack(self.inputs.kernel_package)
        release = _kernel_release(package)
        kernel.check_config(package / "boot" / f"config-{release}", REQUIRED)
        return _Kernel(package, release, await modules.depmod_dry(package, release))

    async def _base_tree(self, chosen: _Kernel) -> Path:
        """Return the tree without the agent, made unless the cache has it."""
        target = self.cache / "base" / _version(self.inputs.base())
        if target.is_dir():
            return target
        self.say("assembling the root tree")
        others = [package for package in self.inputs.packages if package != self.inputs.kernel_package]
        parts = [await self.store.unpack(package) for package in others]
        await asyncio.to_thread(_fresh_directory, target.parent)  # trees of earlier inputs; we hold the cache's lock
        with staged_directory(target, prefix="assemble-") as work:
            await asyncio.to_thread(
                rootfs.assemble_base,
                work,
                parts,
                self.inputs.protobuf,
                self.inputs.release,
            )
            if isinstance(chosen.source, Path):
                await asyncio.to_thread(rootfs.add_modules, work, chosen.source, chosen.release, chosen.dep)
                await modules.depmod(work, chosen.release)
            self.say("compiling the standard library")
            await rootfs.compile_bytecode(work, self.inputs.release.library)
        return target

    def _extract_kernel(self, package: Path, chosen: _Kernel, elf: Path, archive: Path) -> None:
        bzimage = package / "boot" / f"vmlinuz-{chosen.release}"
        elf.write_bytes(kernel.vmlinux(bzimage.read_bytes(), name=bzimage.name))
        filesystem = self.inputs.filesystem
        early = modules.EARLY if filesystem == "erofs" else (filesystem, *modules.EARLY)
        directory = modules.directory(package) / chosen.release
        built_in = modules.built_in(package, chosen.release)
        files = [directory / path for path in modules.in_load_order(early, chosen.dep, built_in)]
        archive.write_bytes(initramfs.build(self.inputs.init, files, filesystem))

    async def _write_root(self, base: Path, version: str, image: Path) -> None:
        self.say(f"writing the root image ({self.inputs.filesystem})")
        tree, library = image.with_name("tree"), self.inputs.release.library
        try:
            await asyncio.to_thread(shutil.copytree, base, tree, symlinks=True)
            await asyncio.to_thread(rootfs.add_agent, tree, library, self.inputs.agent, self.inputs.programs, version)
            if self.inputs.recipe is not None:
                await asyncio.to_thread(initramfs.add_to_root, tree, self.inputs.init)
            await rootfs.compile_bytecode(tree, library / "vmrt")
            await rootfs.check_imports(tree, [name for path in self.inputs.agent if (name := _importable(path))])
            await rootfs.make_image(tree, image, self.inputs.filesystem)
        finally:
            await asyncio.to_thread(shutil.rmtree, tree, ignore_errors=True)

    def _write_manifest(self, work: Path, version: str, release: str, archive: Path | None, root: Path) -> None:
        document = manifest.Manifest(
            version=version,
            protocol=layout.PROTOCOL_VERSION,
            kernel_release=release,
            cmdline=cmdline(self.inputs.filesystem, is_tuned=self.inputs.recipe is not None),
            filesystem=self.inputs.filesystem,
            kernel=manifest.describe(work / KERNEL_FILE),
            initramfs=None if archive is None else manifest.describe(archive),
            rootfs=manifest.describe(root),
            inputs=self.inputs.all(),
        )
        (work / manifest.FILE).write_text(manifest.dumps(document))
        for path in work.iterdir():
            path.chmod(0o644)  # whatever the umask: QEMU's user reads them


async def _inputs(
    store: PackageCache, progress: Progress, agent: Mapping[str, bytes] | None, kernel_choice: str
) -> _Inputs:
    filesystem, release = rootfs.choose_filesystem(), here()
    packages, init, exec_, pause, zygote = await asyncio.gather(
        store.resolve(KERNEL_PACKAGE, rootfs.package_names(release), progress),
        initramfs.compile_program(initramfs.INIT_SOURCE),
        initramfs.compile_program(initramfs.EXEC_SOURCE),
        initramfs.compile_program(initramfs.PAUSE_SOURCE),
        initramfs.compile_program(initramfs.ZYGOTE_SOURCE),
    )
    kernels = [package for package in packages if package.name.startswith("linux-image-")]
    if len(kernels) != 1:
        names = ", ".join(package.name for package in kernels)
        raise VmrtError(f"expected one kernel package, got: {names or 'none'}", phase=PHASE, resource=KERNEL_PACKAGE)
    return _Inputs(
        packages,
        kernels[0],
        await _recipe(store, progress, kernel_choice),
        release,
        filesystem,
        _tool_version(filesystem),
        init,
        {layout.EXEC_PROGRAM: exec_, layout.PAUSE_PROGRAM: pause, layout.ZYGOTE_LIBRARY: zygote},
        agent or agent_files(_AGENT),
        _protobuf_site(),
    )


async def _recipe(store: PackageCache, progress: Progress, kernel_choice: str) -> tuned.Recipe | None:
    """Return what the tuned kernel is made of, None for the distribution's."""
    if kernel_choice not in KERNELS:
        raise VmrtError(f"{kernel_choice} is none of {', '.join(KERNELS)}", phase=PHASE)
    if kernel_choice == "distribution" or (kernel_choice == "auto" and not tuned.any_built(store.directory)):
        return None
    recipe = await tuned.recipe(store, progress)
    if kernel_choice == "auto" and tuned.find(store.directory, recipe) is None:
        progress("the tuned kernel in the cache is outdated (`make guest-tuned`); taking the distribution's", 0, 0)
        return None
    return recipe


def agent_files(agent: Path) -> dict[str, bytes]:
    """Return the agent's Python files, by their path below a directory on sys.path."""
    if not (agent / "agent_pb2.py").is_file():
        raise VmrtError(
            "agent_pb2.py has not been generated", phase=PHASE, resource=str(agent), hint="run `make stubs`"
        )
    files = {f"vmrt/agent/{path.relative_to(agent)}": path.read_bytes() for path in sorted(agent.rglob("*.py"))}
    files["vmrt/agent/agent_pb2.py"] = bindings.slim(files["vmrt/agent/agent_pb2.py"])
    return {"vmrt/__init__.py": b"", **files}


def _importable(path: str) -> str:
    """Return the module name of a file below site, "" for a program (__main__), which importing would start."""
    module = path.removesuffix(".py").removesuffix("/__init__")
    return "" if module.endswith("/__main__") else module.replace("/", ".")


def _protobuf_site() -> Path:
    spec = importlib.util.find_spec("google.protobuf")
    if spec is None or spec.origin is None:
        raise VmrtError("the protobuf package is not installed", phase=PHASE, hint="run `make setup`")
    return Path(spec.origin).parents[2]


def _tool_version(filesystem: str) -> str:
    # mkfs.erofs 1.5 knows no --version; the program's own digest is the surest name for what it does.
    name = rootfs.TOOLS[filesystem]
    path = shutil.which(name)
    if path is None:
        raise VmrtError(f"{name} has vanished", phase=PHASE)
    return f"{name} {hashlib.sha256(Path(path).read_bytes()).hexdigest()}"


def _kernel_release(unpacked: Path) -> str:
    releases = [path.name for path in modules.directory(unpacked).iterdir()]
    if len(releases) != 1:
        raise VmrtError(f"expected one kernel release, got {releases}", phase=PHASE, resource=str(unpacked))
    return releases[0]


def _version(inputs: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def _digest(files: Mapping[str, bytes]) -> str:
    total = hashlib.sha256()
    for name in sorted(files):
        total.update(f"{name}\0{len(files[name])}\0".encode())
        total.update(files[name])
    return total.hexdigest()


def _digest_files(base: Path, paths: Sequence[Path]) -> str:
    return _digest({str(path.relative_to(base)): path.read_bytes() for path in paths})


def _fresh_directory(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def _sweep(cache: Path, output: Path) -> None:
    """Remove what killed builds have left; we hold both directories' locks."""
    for directory, pattern in (
        (output, f"{_BUILD_PREFIX}*"),
        (cache, "fetch-*"),
        (cache, "resolve-*"),
        (cache, f"{tuned.WORK_PREFIX}*"),
    ):
        for path in directory.glob(pattern):
            shutil.rmtree(path)
    for path in (*(cache / "unpacked").glob("unpack-*"), *(cache / "tuned").glob(".new-*")):
        shutil.rmtree(path)


@contextlib.contextmanager
def _locked(directory: Path, progress: Progress) -> Iterator[None]:
    """Keep other builds out of a directory, which is made if need be."""
    if not directory.is_dir():
        directory.mkdir(parents=True)
        directory.chmod(0o755)  # whatever the umask: QEMU's user reads images
    with (directory / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another build to finish", 0, 0)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _silent(what: str, done: int, total: int) -> None:
    """Take progress reports that nobody wants."""


__all__ = ["CMDLINE", "KERNELS", "KERNEL_PACKAGE", "agent_files", "build", "default_cache"]
