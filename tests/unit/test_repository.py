"""What holds for the repository as a whole: one version, pinned dependencies, and nothing of one machine in it."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import vmrt
from vmrt.config import HypervisorConfig

ROOT = Path(__file__).parents[2]

# Hosts from which packages come: the machine's own configuration names them. Written in pieces, or this file would be
# the one that breaks the rule.
REGISTRIES = (
    *("pypi" + ".org", "python" + "hosted.org", "crates" + ".io", "registry." + "npmjs", "rubygems" + ".org"),
    *("proxy." + "golang", "sum." + "golang", "deb." + "debian", "security." + "debian", "snapshot." + "debian"),
)
# Where checkouts and scratch files lie on the machines of those who write this.
MACHINE_PATHS = re.compile(
    "/work" + r"/(main|shared|\.)|/tm" + r"p/(briefs|v/venv|house|cri|cli|guest|hyper|images|net)\b"
)
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "misc", "common", "manager", "stuff"}


@functools.cache
def committed() -> dict[str, bytes]:
    """Every file that git knows and that is there, by its path in the repository."""
    try:
        listed = subprocess.run(
            ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no git checkout")
    paths = [path for path in listed.stdout.decode().split("\0") if path]
    return {path: (ROOT / path).read_bytes() for path in paths if (ROOT / path).is_file()}


@functools.cache
def project() -> dict[str, dict[str, object]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins() -> list[str]:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*table["dependencies"], *table["optional-dependencies"]["dev"]]


def constraints() -> dict[str, str]:
    lines = (ROOT / "setup" / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {normalised(name): version for name, version in pairs}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_there_is_something_to_look_at() -> None:
    assert {"pyproject.toml", "vmrt/errors.py", "setup/setup.sh"} <= committed().keys()


@pytest.mark.parametrize("host", REGISTRIES)
def test_no_package_registry_is_named(host: str) -> None:
    assert [path for path, text in committed().items() if host.encode() in text] == []


def test_no_path_of_one_machine_is_named() -> None:
    found = {path: MACHINE_PATHS.search(text.decode(errors="replace")) for path, text in committed().items()}
    assert {path: match.group() for path, match in found.items() if match} == {}


def test_names_say_what_is_inside() -> None:
    modules = [path for path in committed() if path.endswith(".py")]
    assert [path for path in modules if VAGUE_NAMES & set(Path(path).with_suffix("").parts)] == []


def test_nothing_large_or_generated_is_committed() -> None:
    assert {path: len(text) for path, text in committed().items() if len(text) > 512 * 1024} == {}
    assert [path for path in committed() if re.search(r"_pb2(_grpc)?\.pyi?$|\.pyc$|^\.venv|^\.cache/", path)] == []


def test_text_files_end_with_one_newline() -> None:
    odd = [
        path
        for path, text in committed().items()
        if text and b"\0" not in text and Path(path).suffix in {".py", ".md", ".toml", ".sh", ".proto", ".txt", ".yaml"}
        if not text.endswith(b"\n") or text.endswith(b"\n\n")
    ]
    assert odd == []


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        path
        for path, text in committed().items()
        if path.startswith("vmrt/") and path.endswith(".py") and not text.startswith((b'"""', b'r"""'))
    ]
    assert silent == []


def test_the_version_is_stated_once_and_released_in_the_changelog() -> None:
    assert project()["project"]["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", vmrt.__version__)
    assert f"\n## [{vmrt.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_dependencies_are_pinned() -> None:
    assert [pin for pin in pins() if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", pin)] == []


def test_the_constraints_agree_with_the_pins() -> None:
    asked = {normalised(name): version for name, version in (pin.split("==") for pin in pins())}
    assert {name: constraints().get(name) for name in asked} == asked


def test_the_licence_is_apache_2() -> None:
    assert project()["project"]["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_architecture_names_every_room_and_directory() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    named = set(re.findall(r"[a-z_]+", text))
    rooms = {Path(path).parts[1].removesuffix(".py") for path in committed() if path.startswith("vmrt/")} - {"__init__"}
    directories = {Path(path).parts[0] for path in committed() if len(Path(path).parts) > 1} - {".ci"}
    assert sorted((rooms | directories) - named) == []


def test_set_up_installs_what_the_configuration_expects() -> None:
    script = (ROOT / "setup" / "setup.sh").read_text()
    values = dict(re.findall(r"^readonly ([A-Z_]+)=(\S+)", script, re.MULTILINE))
    defaults = HypervisorConfig()
    assert values["QEMU_USER"] == defaults.qemu_user == defaults.qemu_group
    assert values["VHOST_DEVICE_VSOCK"] == str(defaults.vhost_device_vsock)


def test_links_between_documents_lead_somewhere() -> None:
    dead = [
        f"{path}: {target}"
        for path, text in committed().items()
        if path.endswith(".md")
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text.decode())
        if not (ROOT / path).parent.joinpath(target).exists()
    ]
    assert dead == []


def test_the_cni_example_is_json() -> None:
    assert json.loads((ROOT / "deploy" / "10-vmrt.conflist").read_text())["plugins"]


@pytest.mark.parametrize("path", [".ci/run", "setup/setup.sh"])
def test_scripts_are_executable(path: str) -> None:
    assert (ROOT / path).stat().st_mode & 0o111 == 0o111


def test_ci_runs_make_test_and_nothing_cleverer() -> None:
    lines = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if not line.startswith("#")]
    assert lines == ["set -eu", 'cd "$(dirname "$0")/.."', "exec make test"]
