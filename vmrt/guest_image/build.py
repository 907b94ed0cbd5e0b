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
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vmrt import spawn
from vmrt.agent import layout
from vmrt.errors import UnsupportedError, VmrtError
from vmrt.guest_image import initramfs, kernel, manifest, modules, rootfs
from vmrt.guest_image.packages import Package, PackageCache, Say
from vmrt.model import GuestImage

PHASE = "guest image"
KERNEL_PACKAGE = "linux-image-cloud-amd64"
REQUIRED = Path(__file__).parents[2] / "firmware" / "kernel.required"
_AGENT = Path(__file__).parents[1] / "agent"
_ROOM = Path(__file__).parent

# What the image needs of its kernel command line (kernel, Documentation/admin-guide/kernel-parameters.txt).
CMDLINE = " ".join(
    (
        "console=ttyS0",  # built in and there from the first message on; hvc0 would need virtio_console first
        "quiet",  # every character of the console is an exit from the guest; warnings and panics are still shown
        "panic=-1",  # a panic ends the VM at once: with -no-reboot QEMU exits, and the daemon shows the console's tail
        "reboot=t",  # by triple fault, without trying the keyboard controller and ACPI first
        "random.trust_cpu=on",  # RDRAND seeds the guest's RNG at boot; the agent adds the host's entropy
        "cryptomgr.notests",  # the kernel's self-tests of its ciphers took 0.16 s of an emulated boot
        "rcupdate.rcu_expedited=1",  # grace periods wait for no timer tick: module loading, mounts and netns need many
    )
)


@dataclass(frozen=True, slots=True)
class _Inputs:
    packages: tuple[Package, ...]
    kernel_package: Package
    filesystem: str
    tool: str
    init: bytes
    agent: Mapping[str, bytes]
    protobuf: Path

    def base(self) -> dict[str, object]:
        """Return what the base tree is made of."""
        site = self.protobuf / "google"
        return {
            "packages": [asdict(package) for package in self.packages],
            "builder": _digest_files(_ROOM, sorted(_ROOM.glob("*.py"))),
            "protobuf": _digest_files(site, sorted(p for p in site.rglob("*") if p.suffix in (".py", ".so"))),
        }

    def all(self) -> dict[str, object]:
        """Return what the image is made of."""
        return {
            **self.base(),
            "agent": _digest(self.agent),
            "init": hashlib.sha256(self.init).hexdigest(),
            "required": hashlib.sha256(REQUIRED.read_bytes()).hexdigest(),
            "filesystem": self.filesystem,
            "mkfs": self.tool,
        }


def default_cache() -> Path:
    """Return where packages are kept: /var/cache for root, else the user's cache directory."""
    if os.geteuid() == 0:
        return Path("/var/cache/vmrt/guest")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vmrt" / "guest"


async def build(
    output: Path, *, progress: Say | None = None, cache: Path | None = None, agent: Mapping[str, bytes] | None = None
) -> GuestImage:
    """Bring the image in `output` up to date and return it; at once where nothing has changed.

    `progress` is told each step in a few words. `agent` replaces the agent's files (path below site -> content), for
    tests of the boot alone. Raises `VmrtError`; a failed or cancelled build leaves `current` as it was.
    """
    say: Say = progress or (lambda _: None)
    if platform.machine() != "x86_64":
        raise UnsupportedError(f"guest images are built on x86_64 only, this is {platform.machine()}", phase=PHASE)
    cache = cache or default_cache()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        output.mkdir(parents=True, exist_ok=True)
        with _locked(cache / "lock", say):
            return await _build(output.resolve(), say, cache, agent)
    except OSError as e:
        raise VmrtError(
            f"{e.strerror or e}: {e.filename or ''}".rstrip(": "),
            phase=PHASE,
            resource=str(output),
            hint=f"an image needs 1 GB in {cache} and 150 MB in {output}, both writable",
        ) from e


async def _build(output: Path, say: Say, cache: Path, agent: Mapping[str, bytes] | None) -> GuestImage:
    store = PackageCache(cache)
    inputs = await _inputs(store, say, agent)
    version = _version(inputs.all())
    if (output / version / manifest.FILE).is_file():
        with contextlib.suppress(VmrtError):
            image = manifest.load(output / version)
            manifest.point_current(output, version)
            say(f"guest image {version} is up to date")
            return image
    say(f"building guest image {version}")
    await store.fetch(inputs.packages, say)
    unpacked_kernel = await store.unpack(inputs.kernel_package)
    release = _kernel_release(unpacked_kernel)
    kernel.check_config(unpacked_kernel / "boot" / f"config-{release}", REQUIRED)
    dep = await modules.depmod_dry(unpacked_kernel, release)
    base = await _base_tree(cache, store, inputs, unpacked_kernel, release, dep, say)

    work = Path(tempfile.mkdtemp(dir=output, prefix=".build-"))
    try:
        names = await _write_files(work, base, unpacked_kernel, release, dep, inputs, version, say)
        files = [await asyncio.to_thread(manifest.describe, work / name) for name in names]
        document = manifest.Manifest(
            version=version,
            protocol=layout.PROTOCOL_VERSION,
            kernel_release=release,
            cmdline=CMDLINE,
            filesystem=inputs.filesystem,
            kernel=files[0],
            initramfs=files[1],
            rootfs=files[2],
            inputs=inputs.all(),
        )
        (work / manifest.FILE).write_text(manifest.dumps(document))
        for path in work.iterdir():
            path.chmod(0o644)
        work.chmod(0o755)  # QEMU's user reads the files
        # A directory of this version that did not pass `load` above is damaged: it makes way.
        if (output / version).exists():
            shutil.rmtree(output / version)
        work.rename(output / version)
    finally:
        await asyncio.to_thread(shutil.rmtree, work, ignore_errors=True)
    manifest.point_current(output, version)
    say(f"guest image {version}: kernel {release}, root {files[2].size_bytes / 1e6:.1f} MB {inputs.filesystem}")
    return manifest.load(output / version, verify=False)


async def _inputs(store: PackageCache, say: Say, agent: Mapping[str, bytes] | None) -> _Inputs:
    filesystem = rootfs.choose_filesystem()
    packages, init, tool = await asyncio.gather(
        store.resolve(KERNEL_PACKAGE, rootfs.PACKAGES, say), initramfs.compile_init(), _tool_version(filesystem)
    )
    kernels = [package for package in packages if package.name.startswith("linux-image-")]
    if len(kernels) != 1:
        names = ", ".join(package.name for package in kernels)
        raise VmrtError(f"expected one kernel package, got: {names or 'none'}", phase=PHASE, resource=KERNEL_PACKAGE)
    return _Inputs(packages, kernels[0], filesystem, tool, init, agent or agent_files(_AGENT), _protobuf_site())


def agent_files(agent: Path) -> dict[str, bytes]:
    """Return the agent's Python files, by their path below a directory on sys.path."""
    if not (agent / "agent_pb2.py").is_file():
        raise VmrtError(
            "agent_pb2.py has not been generated", phase=PHASE, resource=str(agent), hint="run `make stubs`"
        )
    files = {f"vmrt/agent/{path.relative_to(agent)}": path.read_bytes() for path in sorted(agent.rglob("*.py"))}
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


async def _tool_version(filesystem: str) -> str:
    argv = ["mkfs.erofs", "--help"] if filesystem == "erofs" else ["mksquashfs", "-version"]
    done = await spawn.run(argv, check=False, phase=PHASE)
    text = done.stdout + b"\n" + done.stderr
    path = shutil.which(argv[0])
    # mkfs.erofs 1.5 knows no --version; the program's own digest is the surest name for what it does.
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else hashlib.sha256(text).hexdigest()
    return f"{argv[0]} {digest}"


def _kernel_release(unpacked: Path) -> str:
    releases = [path.name for path in (unpacked / "lib/modules").iterdir()]
    if len(releases) != 1:
        raise VmrtError(f"expected one kernel release, got {releases}", phase=PHASE, resource=str(unpacked))
    return releases[0]


async def _base_tree(
    cache: Path,
    store: PackageCache,
    inputs: _Inputs,
    unpacked_kernel: Path,
    release: str,
    dep: Mapping[str, tuple[str, ...]],
    say: Say,
) -> Path:
    """Return the tree without the agent, made unless the cache has it."""
    target = cache / "base" / _version(inputs.base())
    if target.is_dir():
        return target
    say("assembling the root tree")
    target.parent.mkdir(exist_ok=True)
    parts = [await store.unpack(package) for package in inputs.packages if package != inputs.kernel_package]
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix="assemble-"))
    try:
        await asyncio.to_thread(rootfs.assemble_base, work, parts, unpacked_kernel, release, dep, inputs.protobuf)
        await modules.depmod(work, release)
        say("compiling the standard library")
        await rootfs.compile_bytecode(work, rootfs.PYTHON)
        for old in target.parent.iterdir():
            if old != work:
                shutil.rmtree(old)  # trees of earlier inputs; we hold the cache's lock
        work.rename(target)
    finally:
        await asyncio.to_thread(shutil.rmtree, work, ignore_errors=True)
    return target


async def _write_files(
    work: Path,
    base: Path,
    unpacked_kernel: Path,
    release: str,
    dep: Mapping[str, tuple[str, ...]],
    inputs: _Inputs,
    version: str,
    say: Say,
) -> Sequence[str]:
    """Write kernel, initramfs and root image into `work`; return their names in this order."""
    names = ("vmlinux", "initramfs.cpio", f"root.{inputs.filesystem}")
    bzimage = unpacked_kernel / "boot" / f"vmlinuz-{release}"
    elf = await asyncio.to_thread(lambda: kernel.vmlinux(bzimage.read_bytes(), name=bzimage.name))
    (work / names[0]).write_bytes(elf)

    early = modules.EARLY if inputs.filesystem == "erofs" else ("squashfs", *modules.EARLY)
    order = [unpacked_kernel / "lib/modules" / release / path for path in modules.in_load_order(early, dep)]
    (work / names[1]).write_bytes(initramfs.build(inputs.init, order, inputs.filesystem))

    say(f"writing the root image ({inputs.filesystem})")
    tree = work / "tree"
    try:
        await asyncio.to_thread(shutil.copytree, base, tree, symlinks=True)
        rootfs.add_agent(tree, inputs.agent, version)
        await rootfs.compile_bytecode(tree, rootfs.PYTHON / "vmrt")
        await rootfs.check_imports(tree, [module for path in inputs.agent if (module := _importable(path))])
        await rootfs.make_image(tree, work / names[2], inputs.filesystem)
    finally:
        await asyncio.to_thread(shutil.rmtree, tree, ignore_errors=True)
    return names


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


@contextlib.contextmanager
def _locked(path: Path, say: Say) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another build to finish")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


__all__ = ["CMDLINE", "KERNEL_PACKAGE", "agent_files", "build", "default_cache"]
