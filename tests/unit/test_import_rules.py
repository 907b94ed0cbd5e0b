"""Who may import whom: ARCHITECTURE.md's rules, held by walking the package's syntax trees.

Imports inside functions and under TYPE_CHECKING count like any other: a rule that only holds at run time would let a
room know what it must not know.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "vmrt"
LINE_LIMIT = 500

LEAVES = frozenset(
    {
        *("vmrt.errors", "vmrt.model", "vmrt.config", "vmrt.spawn", "vmrt.number_list", "vmrt.libc"),
        *("vmrt.realtime", "vmrt.schedstat"),
        *("vmrt.agent.layout", "vmrt.agent.agent_pb2"),
    }
)


@dataclass(frozen=True)
class Rule:
    """What one room may import: `inside` names modules of vmrt (a package's name covers what is in it), `outside`
    the packages from PyPI. A room may always import itself and the standard library."""

    inside: frozenset[str] = frozenset()
    outside: frozenset[str] = frozenset()


def rule(*inside: str, leaves: bool = False, outside: tuple[str, ...] = ()) -> Rule:
    return Rule(frozenset(inside) | (LEAVES if leaves else frozenset()), frozenset(outside))


# A room is a module or a package directly below vmrt. The first four and the agent know nobody; drivers know leaves;
# pods sees drivers through the Protocols of its own vmrt.pods.drivers; __main__ alone names the concrete ones.
RULES = {
    "vmrt": rule(),
    "vmrt.errors": rule(),
    "vmrt.model": rule("vmrt.errors"),
    "vmrt.config": rule("vmrt.errors", "vmrt.model", outside=("msgspec",)),
    "vmrt.number_list": rule(),
    "vmrt.libc": rule(),
    "vmrt.realtime": rule(),
    "vmrt.schedstat": rule(),
    "vmrt.spawn": rule("vmrt.errors", "vmrt.realtime"),
    "vmrt.store": rule("vmrt.errors", "vmrt.model", outside=("msgspec",)),
    "vmrt.loop_monitor": rule("vmrt.schedstat"),
    "vmrt.agent": rule(outside=("google.protobuf",)),
    "vmrt.agent_client": rule(
        # The wire formats, shared by both ends.
        *("vmrt.agent.frames", "vmrt.agent.status", "vmrt.agent.ttrpc"),
        leaves=True,
        outside=("google.protobuf",),
    ),
    "vmrt.hypervisor": rule("vmrt.agent.frames", leaves=True, outside=("libvirt", "libvirt_qemu")),
    "vmrt.images": rule(leaves=True, outside=("msgspec",)),
    "vmrt.cni": rule(leaves=True),
    "vmrt.cni_args": rule(leaves=True),
    "vmrt.conntrack": rule(leaves=True, outside=("pyroute2",)),
    "vmrt.interfaces": rule(),
    "vmrt.netns": rule("vmrt.interfaces", leaves=True, outside=("pyroute2",)),
    "vmrt.fallback_network": rule("vmrt.cni", "vmrt.netns", leaves=True),
    "vmrt.netbridge": rule(
        *("vmrt.cni", "vmrt.cni_args", "vmrt.conntrack", "vmrt.netns", "vmrt.fallback_network", "vmrt.interfaces"),
        leaves=True,
        outside=("pyroute2",),
    ),
    "vmrt.streaming": rule(leaves=True, outside=("h11", "wsproto")),
    "vmrt.guest_image": rule(leaves=True),
    "vmrt.pods": rule("vmrt.store", "vmrt.agent_client", leaves=True, outside=("msgspec", "google.protobuf")),
    "vmrt.cri": rule(
        *("vmrt", "vmrt.pods", "vmrt.images", "vmrt.streaming", "vmrt.proto"),
        leaves=True,
        outside=("grpc", "google.protobuf"),
    ),
    "vmrt.cli": rule(
        *("vmrt", "vmrt.guest_image", "vmrt.proto", "vmrt.streaming", "vmrt.images.tar"),
        leaves=True,
        outside=("click", "rich", "grpc", "google.protobuf", "h11", "wsproto"),
    ),
}
COMPOSITION_ROOT = "vmrt.__main__"
GENERATED = ("vmrt.proto",)

# Ways to a child process, wherever they are spelled.
CHILD_MODULES = frozenset({"subprocess", "multiprocessing", "concurrent.futures.process"})
CHILD_CALLS = frozenset(
    {
        *("os.system", "os.popen", "os.fork", "os.forkpty", "pty.fork", "pty.spawn"),
        *("asyncio.create_subprocess_exec", "asyncio.create_subprocess_shell"),
    }
)
CHILD_PREFIXES = ("os.exec", "os.spawn", "os.posix_spawn")
MAY_HAVE_CHILDREN = ("vmrt.spawn", "vmrt.agent")


def module_name(path: Path) -> str:
    parts = ("vmrt", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def covers(package: str, module: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def room_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def modules() -> dict[str, Path]:
    found = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
    return {
        name: path
        for name, path in found.items()
        if not any(covers(generated, name) for generated in GENERATED) and not name.endswith("_pb2")
    }


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Every module that `tree` imports; `from x import y` gives both x and x.y, for y may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = module.split(".")
                here = here[: len(here) - node.level + is_package]
                base = ".".join([*here, *([base] if base else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def offences(source: str, module: str, is_package: bool = False) -> list[str]:
    """What `source`, as the text of `module`, does against the rules."""
    tree = ast.parse(source)
    wanted = set(imports(tree, module, is_package))
    inside = {name for name in wanted if covers("vmrt", name) and not is_attribute(name)}
    outside = {name for name in wanted if not covers("vmrt", name)}
    found = []
    if module != COMPOSITION_ROOT:
        room = room_of(module)
        if room not in RULES:
            return [f"{module}: the room {room} has no rule: give it one here and in ARCHITECTURE.md"]
        found += [
            f"{module} imports {name}"
            for name in sorted(inside)
            if not covers(room, name) and not permitted(name, RULES[room].inside) and not is_path_to(name, inside)
        ]
        found += [
            f"{module} imports {name}"
            for name in sorted(outside)
            if name.partition(".")[0] not in sys.stdlib_module_names
            and not any(covers(package, name) or covers(name, package) for package in RULES[room].outside)
        ]
    if not any(covers(room, module) for room in MAY_HAVE_CHILDREN):
        found += [f"{module} starts processes: {name}" for name in sorted(child_doors(tree, outside))]
    return found


def is_attribute(name: str) -> bool:
    """`from vmrt.errors import VmrtError` names vmrt.errors.VmrtError too, which is no module."""
    return not is_module(name) and is_module(name.rpartition(".")[0])


def is_path_to(name: str, imported: set[str]) -> bool:
    """`from vmrt.agent import layout` names vmrt.agent too, and that only to reach vmrt.agent.layout."""
    return any(other != name and covers(name, other) for other in imported)


def permitted(name: str, allowed: frozenset[str]) -> bool:
    return any(name == one or (one != "vmrt" and covers(one, name)) for one in allowed)


def is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir() or covers("vmrt.proto", name)


def child_doors(tree: ast.AST, outside: set[str]) -> set[str]:
    """Subprocess modules imported and process-starting functions named."""
    named = {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    calls = {name for name in named | outside if name in CHILD_CALLS or name.startswith(CHILD_PREFIXES)}
    return calls | {name for name in outside if name in CHILD_MODULES}


@pytest.mark.parametrize("module", sorted(modules()))
def test_module_keeps_the_rules(module: str) -> None:
    path = modules()[module]
    assert offences(path.read_text(), module, path.name == "__init__.py") == []


@pytest.mark.parametrize("module", sorted(modules()))
def test_file_is_short_enough_to_read(module: str) -> None:
    lines = len(modules()[module].read_text().splitlines())
    assert lines <= LINE_LIMIT, f"{module} has {lines} lines: it is asking to be two"


def test_there_is_a_package_to_walk() -> None:
    assert {"vmrt.errors", "vmrt.agent.layout", "vmrt.pods.drivers"} <= modules().keys()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("vmrt.errors", "import msgspec"),
        ("vmrt.model", "from vmrt.config import Config"),
        ("vmrt.spawn", "from vmrt import config"),
        ("vmrt.hypervisor.domain", "from vmrt.pods.drivers import Hypervisor"),
        ("vmrt.hypervisor.domain", "from ..pods import drivers"),
        ("vmrt.images.store", "def f():\n    import vmrt.hypervisor"),
        ("vmrt.netbridge", "from vmrt import store"),
        ("vmrt.streaming.http", "from vmrt.cri import service"),
        ("vmrt.streaming.http", "import grpc"),
        ("vmrt.pods.sandboxes", "import libvirt"),
        ("vmrt.pods.sandboxes", "from vmrt.hypervisor import driver"),
        ("vmrt.pods.sandboxes", "from vmrt.proto.runtime.v1 import api_pb2"),
        ("vmrt.cri.service", "from vmrt.hypervisor import driver"),
        ("vmrt.cli.app", "from vmrt.cri import service"),
        ("vmrt.cli.app", "from vmrt.__main__ import main"),
        ("vmrt.agent.main", "from vmrt.errors import VmrtError"),
        ("vmrt.agent.main", "from .. import model"),
        ("vmrt.agent.main", "import grpc"),
        ("vmrt.guest_image.build", "from vmrt.agent import main"),
        ("vmrt.novelty", "import os"),
        ("vmrt.images.skopeo", "import subprocess"),
        ("vmrt.images.skopeo", "from os import posix_spawn"),
        ("vmrt.images.skopeo", "import os\nos.execvp('skopeo', [])"),
        ("vmrt.images.skopeo", "import asyncio\nstart = asyncio.create_subprocess_exec"),
        ("vmrt.__main__", "import os\nos.system('true')"),
    ],
)
def test_a_breach_is_seen(module: str, source: str) -> None:
    assert offences(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("vmrt.model", "from vmrt.errors import VmrtError"),
        ("vmrt.images.store", "from vmrt import spawn\nfrom vmrt.images.layers import x\nfrom . import y"),
        ("vmrt.hypervisor.domain", "from vmrt.agent import layout\nfrom vmrt.agent.agent_pb2 import Ready"),
        ("vmrt.pods.sandboxes", "from vmrt.pods.drivers import Hypervisor"),
        ("vmrt.agent.main", "from google.protobuf import message\nimport subprocess"),
        ("vmrt.cri.service", "from vmrt import __version__\nimport grpc.aio"),
        ("vmrt.__main__", "from vmrt.hypervisor import driver\nfrom vmrt.cri import service"),
    ],
)
def test_what_is_allowed_passes(module: str, source: str) -> None:
    assert offences(source, module) == []
