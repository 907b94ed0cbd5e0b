"""The guest's freestanding programs, and the initramfs: our /init, its plan, and the modules that the plan loads.

See init.c for the plan's language, exec.c for the program that starts an exec's process, pause.c for the one
that waits, zygote.c for what keeps crun loaded.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from vmrt import spawn
from vmrt.errors import ProcessError
from vmrt.guest_image import cpio, modules

PHASE = "guest image programs"
ROOT_SERIAL = "vmrt-root"
# Where the same program and its plan lie in the root image of a kernel that needs no initramfs (see init.c).
ROOT_INIT = "usr/sbin/vmrt-init"
ROOT_PLAN = "usr/lib/vmrt-plan"
# -I -S: no user site, no PYTHON* variables, no site.py, whose work the image does not need and every boot would pay.
# -B: the root is read-only. utf8: the guest has no locales.
# -c and not -m, whose machinery (runpy, importlib.util) costs more to import than what it finds. A plan's words hold no
# spaces, hence the expression instead of an import statement.
_START = '__import__("vmrt.agent.__main__").agent.__main__.main()'
AGENT_ARGV: tuple[str, ...] = ("/usr/bin/python3", "-I", "-S", "-B", "-X", "utf8", f"-c{_START}")

_ROOM = Path(__file__).parent
INIT_SOURCE = _ROOM / "init.c"
EXEC_SOURCE = _ROOM / "exec.c"
PAUSE_SOURCE = _ROOM / "pause.c"
ZYGOTE_SOURCE = _ROOM / "zygote.c"
_CFLAGS = (
    *("-Os", "-std=gnu11", "-nostdlib", "-ffreestanding", "-fno-stack-protector"),
    *("-fno-asynchronous-unwind-tables", "-Wall", "-Wextra", "-Werror", "-s"),
    *("-Wl,--build-id=none", "-Wl,-z,noexecstack", "-Wl,-z,noseparate-code"),
)
_PROGRAM = ("-static", "-fno-pic", "-no-pie")
_LIBRARY = ("-shared", "-fPIC", "-Wl,-z,relro,-z,now")


async def compile_program(source: Path) -> bytes:
    """Return what a source file of this room is compiled to: a static program, or a library to be preloaded."""
    kind = _LIBRARY if source == ZYGOTE_SOURCE else _PROGRAM
    with tempfile.TemporaryDirectory(prefix="vmrt-compile-") as work:
        program = Path(work) / source.stem
        try:
            await spawn.run(["gcc", *_CFLAGS, *kind, "-o", program, source], phase=PHASE, resource=source.name)
        except ProcessError as e:
            if e.status < 0:
                e.hint = "install Debian's gcc"
            raise
        return program.read_bytes()


def plan(module_files: Sequence[str], filesystem: str, argv: Sequence[str] = AGENT_ARGV) -> str:
    """Return the text of /plan."""
    steps = [*(f"load /modules/{name}" for name in module_files), f"root {ROOT_SERIAL} {filesystem}"]
    return "\n".join([*steps, " ".join(("exec", *argv)), ""])


def add_to_root(tree: Path, init: bytes, argv: Sequence[str] = AGENT_ARGV) -> None:
    """Put init and a plan that only starts the agent into the root tree."""
    (tree / ROOT_INIT).write_bytes(init)
    (tree / ROOT_INIT).chmod(0o755)
    (tree / ROOT_PLAN).write_text(" ".join(("exec", *argv)) + "\n")


def build(init: bytes, module_files: Sequence[Path], filesystem: str, argv: Sequence[str] = AGENT_ARGV) -> bytes:
    """Return the archive, uncompressed: it is small, and decompressing costs more than reading when emulated.

    `module_files` are given in the order in which they are to be loaded.
    """
    names = [modules.uncompressed_name(path.name) for path in module_files]
    return cpio.archive(
        [
            *(cpio.directory(name) for name in ("dev", "modules", "root", "sys")),
            cpio.character_device("dev/console", 5, 1),
            cpio.file("init", init, 0o755),
            cpio.file("plan", plan(names, filesystem, argv).encode()),
            *(
                cpio.file(f"modules/{name}", modules.without_signature(modules.read(path)))
                for name, path in zip(names, module_files, strict=True)
            ),
        ]
    )
