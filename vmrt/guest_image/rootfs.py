"""The root file system: a tree made of packages' files, the agent laid over it, and the read-only image of both.

The tree is usr-merged (/bin, /sbin, /lib, /lib64 are links). No maintainer script runs and nothing is installed: what
is named below is copied, then the closure over the ELF files' DT_NEEDED brings the libraries. Owners, times and modes
are normalised, so the same input gives the same image.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from vmrt import spawn
from vmrt.errors import ProcessError, VmrtError
from vmrt.guest_image import elf, modules
from vmrt.guest_image.release import Release

PHASE = "guest image root"

# File system -> the tool that writes it, the preferred one first.
TOOLS = {"erofs": "mkfs.erofs", "squashfs": "mksquashfs"}

# What apt is asked for, with what the release names in its own way (release.py); the kernel comes by its metapackage
# (builder.KERNEL_PACKAGE).
PACKAGES: tuple[str, ...] = (
    "busybox-static",
    "crun",
    "kmod",
    "libc-bin",
    "libc6",
    "libcap2",
    "libexpat1",
    "libffi8",
    "libgcc-s1",
    "libgcrypt20",
    "libgpg-error0",
    "libkmod2",
    "liblz4-1",
    "liblzma5",
    "libseccomp2",
    "libstdc++6",
    "libsystemd0",
    "libuuid1",
    "libyajl2",
    "libzstd1",
    "zlib1g",
)

_LIBRARIES = "usr/lib/x86_64-linux-gnu"
_PROGRAMS = ("usr/bin/busybox", "usr/bin/crun", "usr/bin/kmod")
# glibc itself opens libgcc_s when a thread is cancelled; nothing names it in DT_NEEDED.
_OPENED_LIBRARIES = ("libgcc_s.so.1",)
_DIRECTORIES = ("dev", "etc", "mnt", "proc", "root", "run", "sys", "tmp", "usr/sbin", "var/lib", "var/log", "var/tmp")
PYTHON_PROGRAM = "usr/bin/python3"  # a link to the release's
_LINKS = {
    "bin": "usr/bin",
    "sbin": "usr/sbin",
    "lib": "usr/lib",
    "lib64": "usr/lib64",
    "usr/lib64/ld-linux-x86-64.so.2": "../lib/x86_64-linux-gnu/ld-linux-x86-64.so.2",
    "usr/bin/sh": "busybox",
    **{f"usr/sbin/{name}": "../bin/kmod" for name in ("depmod", "insmod", "lsmod", "modinfo", "modprobe", "rmmod")},
    "var/run": "/run",
    "etc/mtab": "/proc/self/mounts",
    "etc/resolv.conf": "/run/vmrt/sandbox/resolv.conf",
}
_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/sbin/nologin\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\n",
    "etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    # kmod's own aliases; ipv6 and the like are built into the kernel.
    "etc/modprobe.d/README": "Options for modules that the kernel loads by itself.\n",
}

# Of the standard library: what cannot work without files that the image lacks, and what no daemon imports.
_STDLIB_DROPPED = frozenset(
    (
        *("_pyrepl", "curses", "dbm", "distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "sqlite3", "test"),
        *("tkinter", "turtle.py", "turtledemo", "venv", "wsgiref", "xmlrpc", "__pycache__", "EXTERNALLY-MANAGED"),
        *("antigravity.py", "this.py", "LICENSE.txt", "sitecustomize.py"),
    )
)
# Extension modules: the codecs of East Asia, what tests the interpreter, and what needs libraries not worth their size.
# Without _hashlib, hashlib takes the interpreter's own digests and no process loads libcrypto's 4.7 MB.
_EXTENSIONS_DROPPED = (
    *("_codecs_", "_multibytecodec", "_bz2", "_crypt", "_ctypes_test", "_curses", "_dbm", "_hashlib", "_sqlite3"),
    *("_ssl", "_test", "_xx", "audioop", "nis", "ossaudiodev", "readline", "xxlimited"),
)
_PROTOBUF_DROPPED = frozenset(("compiler", "testdata", "util", "__pycache__"))

# A constant: it names no file system, it only has to be the same every time.
_UUID = "6a4d0d6c-7c1e-4d7b-9f0e-766d72740001"


def package_names(release: Release) -> tuple[str, ...]:
    """Return the packages that a root of that release is made of."""
    return tuple(sorted((*PACKAGES, *release.python_packages, *release.packages)))


def assemble_base(tree: Path, packages: Sequence[Path], protobuf: Path, release: Release) -> None:
    """Fill the empty directory `tree` with everything but the agent, kernel modules and bytecode.

    `packages` are unpacked packages, `protobuf` the directory that holds `google/protobuf`. Raises `VmrtError` naming a
    program or library that is nowhere.
    """
    found = _index(packages)
    for name in _DIRECTORIES:
        (tree / name).mkdir(parents=True, exist_ok=True)
    for path in (*_PROGRAMS, release.program):
        _copy(_lookup(found, path), tree / path)
    for path, source in sorted(found.items()):
        if _wanted_python(path, release):
            _copy(source, tree / path)
    _copy_protobuf(protobuf, tree / release.library)
    _add_libraries(tree, found)
    for path, target in (*_LINKS.items(), (PYTHON_PROGRAM, PurePosixPath(release.program).name)):
        link = tree / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)
    for path, text in _FILES.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(text)


def add_agent(
    tree: Path, library: PurePosixPath, agent: Mapping[str, bytes], programs: Mapping[str, bytes], version: str
) -> None:
    """Lay the agent's files (path below `library` -> content), programs (by path) and the version over the tree."""
    for path, data in agent.items():
        target = tree / library / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    for path, data in programs.items():
        program = tree / path.lstrip("/")
        program.write_bytes(data)
        program.chmod(0o755)
    release = {"ID": "vmrt-guest", "NAME": "vmrt guest", "PRETTY_NAME": "vmrt guest", "IMAGE_VERSION": version}
    (tree / "usr/lib/os-release").write_text("".join(f"{key}={json.dumps(text)}\n" for key, text in release.items()))
    _link(tree / "etc/os-release", "../usr/lib/os-release")
    # What the agent reports as its version (ReadyNotice, CheckResponse).
    _link(tree / "etc/vmrt-guest-version", "../usr/lib/vmrt-guest-version")
    (tree / "usr/lib/vmrt-guest-version").write_text(version + "\n")


async def compile_bytecode(tree: Path, directory: PurePosixPath) -> None:
    """Compile what lies below `directory` of the tree with the tree's own interpreter, whatever the host's is.

    The files are never checked against their sources (PEP 552, unchecked hash): the root is read-only. The hash seed
    does not reach the result: marshal writes sets sorted since Python 3.11.
    """
    options = ("-q", "--invalidation-mode", "unchecked-hash", "-s", tree, "-p", "/", tree / directory)
    argv = [*_python(tree), "-m", "compileall", *options]
    done = await spawn.run(argv, timeout_s=600, check=False, phase=PHASE, resource="bytecode")
    if done.status:
        # compileall tells on stdout which source files do not compile.
        text = f"{done.text()}\n{done.stderr.decode(errors='replace')}".replace(str(tree), "").strip()
        raise VmrtError(
            f"compileall failed with status {done.status}: {text[-2000:]}", phase=PHASE, resource="bytecode"
        )


async def check_imports(tree: Path, names: Sequence[str]) -> None:
    """Import the modules with the tree's own interpreter and libraries.

    Raises `ProcessError` when the agent needs what the image lacks, or protobuf would fall back to its slow Python
    implementation: better now than as a panic in every VM.
    """
    script = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "from google.protobuf.internal import api_implementation as api\n"
        "api.Type() == 'upb' or sys.exit('protobuf is ' + api.Type() + ', not upb')\n"
    )
    try:
        await spawn.run([*_python(tree), "-c", script, *names], phase=PHASE, resource="imports of the agent")
    except ProcessError as e:
        e.hint = "see what vmrt/guest_image/rootfs.py drops from the image"
        raise


def _python(tree: Path) -> list[str | Path]:
    """Return the start of a command that runs the tree's Python on the host, with the tree's libraries only."""
    loader = tree / _LIBRARIES / "ld-linux-x86-64.so.2"
    return [loader, "--library-path", tree / _LIBRARIES, tree / PYTHON_PROGRAM, "-I", "-S", "-B", "-X", "utf8"]


async def make_image(tree: Path, target: Path, filesystem: str) -> None:
    """Write the tree as a read-only "erofs" or "squashfs" image. The modes in `tree` are changed."""
    normalise(tree)
    argv: list[str | Path]
    if filesystem == "erofs":
        # Not compressed: the host's page cache is shared by all VMs, and reading must cost an emulated CPU little.
        argv = ["mkfs.erofs", "--quiet", "-x-1", "-T0", f"-U{_UUID}", "--all-root", target, tree]
    else:
        times = ("-mkfs-time", "0", "-all-time", "0")
        plain = ("-noI", "-noD", "-noF", "-noX", "-no-xattrs", "-all-root", "-noappend", "-no-progress")
        argv = ["mksquashfs", tree, target, *times, *plain]
    # mkfs.erofs takes this variable for the times whatever its options say; mksquashfs refuses both together.
    environment = {name: value for name, value in os.environ.items() if name != "SOURCE_DATE_EPOCH"}
    await spawn.run(argv, timeout_s=600, env=environment, phase=PHASE, resource=filesystem)


def choose_filesystem() -> str:
    """Return "erofs" where mkfs.erofs is installed, else "squashfs". Raises `VmrtError` where neither tool is."""
    for filesystem, tool in TOOLS.items():
        if shutil.which(tool):
            return filesystem
    raise VmrtError("neither mkfs.erofs nor mksquashfs is installed", phase=PHASE, hint="install Debian's erofs-utils")


def normalise(tree: Path) -> None:
    """Give every directory 0755 and every file 0644, or 0755 where its owner may execute it."""
    for path in (tree, *tree.rglob("*")):
        if path.is_symlink():
            continue
        path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
    # What tmpfs mounts hide at run time; right even where none is mounted.
    (tree / "tmp").chmod(0o1777)
    (tree / "var/tmp").chmod(0o1777)
    (tree / "root").chmod(0o700)


def merged(path: PurePosixPath) -> str:
    """Return where a package's file lies in a usr-merged tree: lib/x is usr/lib/x."""
    if path.parts[0] in ("bin", "sbin", "lib", "lib64"):
        return str("usr" / path)
    return str(path)


def _index(packages: Iterable[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for package in packages:
        for path in package.rglob("*"):
            if path.is_symlink() or path.is_file():
                found[merged(PurePosixPath(path.relative_to(package)))] = path
    return found


def _lookup(found: Mapping[str, Path], path: str) -> Path:
    if path not in found:
        raise VmrtError(f"no package holds {path}", phase=PHASE, hint="see PACKAGES in vmrt/guest_image/rootfs.py")
    return found[path]


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target, follow_symlinks=False)


def _link(path: Path, target: str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def _wanted_python(path: str, release: Release) -> bool:
    if not path.startswith(f"{release.library}/"):
        return False
    parts = PurePosixPath(path).relative_to(release.library).parts
    if _STDLIB_DROPPED & set(parts):
        return False
    if parts[0] == "lib-dynload":
        return not parts[1].startswith(_EXTENSIONS_DROPPED)
    return path.endswith(".py")


def _copy_protobuf(site: Path, target: Path) -> None:
    for path in sorted((site / "google").rglob("*")):
        relative = path.relative_to(site)
        if _PROTOBUF_DROPPED & set(relative.parts) or path.suffix not in (".py", ".so"):
            continue
        if relative.parts[1] in ("protobuf", "_upb"):
            _copy(path, target / relative)


def _add_libraries(tree: Path, found: Mapping[str, Path]) -> None:
    """Copy the closure of what the tree's ELF files need, under the names that the dynamic loader asks for."""
    wanted: dict[str, str] = dict.fromkeys(_OPENED_LIBRARIES, "glibc")
    for path in sorted(tree.rglob("*")):
        if path.is_file() and not path.is_symlink():
            wanted.update(_needed(path, str(path.relative_to(tree))))
    while wanted:
        name, by = wanted.popitem()
        target = tree / _LIBRARIES / name
        if target.exists():
            continue
        source = found.get(f"{_LIBRARIES}/{name}")
        if source is None:
            raise VmrtError(
                f"{by} needs {name}, which no package holds",
                phase=PHASE,
                hint="add its package to PACKAGES in vmrt/guest_image/rootfs.py",
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)  # follows the link from the soname to the versioned file
        wanted.update(_needed(target, name))


def _needed(path: Path, name: str) -> dict[str, str]:
    with path.open("rb") as file:
        head = file.read(64)
        if not elf.is_elf(head):
            return {}
        try:
            return dict.fromkeys(elf.needs(head + file.read()).libraries, name)
        except ValueError as e:
            raise VmrtError(str(e), phase=PHASE, resource=name) from e


def add_modules(tree: Path, package: Path, release: str, dep: Mapping[str, tuple[str, ...]]) -> None:
    """Copy the modules that a guest may want from an unpacked kernel package; `dep` are their dependencies.

    They lie there uncompressed, as everything in the image: what loads one in the guest has less to do.
    """
    source, target = modules.directory(package) / release, tree / "usr/lib/modules" / release
    for path in modules.selected(modules.OPTIONAL, dep, modules.built_in(package, release)):
        plain = target / modules.uncompressed_name(path)
        plain.parent.mkdir(parents=True, exist_ok=True)
        plain.write_bytes(modules.read(source / path))
    for name in ("modules.builtin", "modules.builtin.modinfo", "modules.order"):
        _copy(source / name, target / name)
