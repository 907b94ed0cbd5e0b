"""The tuned kernel's configuration fragment, the name of its result in the cache, and what the host lacks for it."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmrt.errors import NotFoundError, VmrtError
from vmrt.guest_image import builder, initramfs, kernel, tuned
from vmrt.guest_image.packages import Package, PackageCache

SOURCE = Package("linux-source-6.1", "6.1.192-2", "linux-source-6.1_6.1.192-2_all.deb", 9, "SHA256:00")
RECIPE = tuned.Recipe(SOURCE, "CONFIG_A=y\n", "gcc 12.2.0; ld 2.40")


def silent(what: str, done: int, total: int) -> None:
    pass


def make_built(cache: Path, recipe: tuned.Recipe) -> tuned.Built:
    built = tuned.Built(cache / "tuned" / recipe.key)
    built.directory.mkdir(parents=True)
    built.elf.write_bytes(b"\x7fELF")
    return built


def test_a_fragment() -> None:
    text = '# Machine\n\nCONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=64\nCONFIG_D="a b"\n'
    assert tuned.parse_fragment(text) == {"CONFIG_A": "y", "CONFIG_B": "n", "CONFIG_C": "64", "CONFIG_D": '"a b"'}


@pytest.mark.parametrize(
    "line", ["CONFIG_A", "CONFIG_A=", "A=y", " CONFIG_A=y", "# CONFIG_A is unset", "# CONFIG_A=y", "CONFIG_A = y"]
)
def test_a_line_that_is_no_option_is_named(line: str) -> None:
    with pytest.raises(VmrtError, match="line 2 is no option"):
        tuned.parse_fragment(f"CONFIG_Z=y\n{line}\n")


@pytest.mark.parametrize("again", ["CONFIG_A=y", "CONFIG_A=m", "# CONFIG_A is not set"])
def test_an_option_that_is_there_twice(again: str) -> None:
    with pytest.raises(VmrtError, match="line 3 says CONFIG_A a second time"):
        tuned.parse_fragment(f"CONFIG_A=y\nCONFIG_B=y\n{again}\n")


options = st.dictionaries(st.from_regex(r"CONFIG_[A-Z0-9_]{1,9}", fullmatch=True), st.sampled_from(("y", "n", "7")))


@given(options)
def test_every_fragment_comes_back(fragment: dict[str, str]) -> None:
    text = "".join(f"# {key} is not set\n" if v == "n" else f"{key}={v}\n" for key, v in fragment.items())
    assert tuned.parse_fragment(text) == fragment
    assert tuned.unmet(fragment, kernel.parse_config(text)) == []


def test_what_kconfig_dropped_is_named(tmp_path: Path) -> None:
    config = tmp_path / ".config"
    config.write_text("CONFIG_A=y\nCONFIG_B=m\nCONFIG_D=y\n# CONFIG_C is not set\n")
    fragment = {"CONFIG_A": "y", "CONFIG_B": "y", "CONFIG_C": "y", "CONFIG_D": "n", "CONFIG_E": "n"}
    with pytest.raises(VmrtError, match="CONFIG_B=y, got m; CONFIG_C=y, got n; CONFIG_D=n, got y"):
        tuned.check_config(fragment, config)


def test_the_projects_own_fragment_asks_for_what_a_guest_kernel_must_have() -> None:
    fragment = tuned.parse_fragment(tuned.FRAGMENT.read_text())
    assert "m" not in fragment.values(), "nothing could load a module"
    # What other options select is not repeated in the fragment; nothing required may be switched off in it.
    required = {r.option for r in kernel.parse_required(builder.REQUIRED.read_text())}
    assert not {option for option in required if fragment.get(option) == "n"}
    devices = {"CONFIG_PVH", "CONFIG_VIRTIO_BLK", "CONFIG_EROFS_FS", "CONFIG_DEVTMPFS_MOUNT", "CONFIG_VIRTIO_VSOCKETS"}
    assert {fragment.get(option) for option in devices} == {"y"}, "without an initramfs these must be built in"


@pytest.mark.parametrize(
    "changed",
    [
        dataclasses.replace(RECIPE, source=dataclasses.replace(SOURCE, version="6.1.193-1")),
        dataclasses.replace(RECIPE, source=dataclasses.replace(SOURCE, digest="SHA256:01")),
        dataclasses.replace(RECIPE, fragment="CONFIG_A=y\nCONFIG_B=y\n"),
        dataclasses.replace(RECIPE, compiler="gcc 12.3.0; ld 2.40"),
    ],
)
def test_every_input_is_in_the_key(changed: tuned.Recipe, tmp_path: Path) -> None:
    assert changed.key != RECIPE.key
    assert RECIPE.key == dataclasses.replace(RECIPE).key
    made = make_built(tmp_path, RECIPE)
    assert tuned.find(tmp_path, RECIPE) == made
    assert tuned.find(tmp_path, changed) is None


def test_a_directory_without_a_kernel_is_none(tmp_path: Path) -> None:
    assert not tuned.any_built(tmp_path)
    (tmp_path / "tuned" / RECIPE.key).mkdir(parents=True)
    assert not tuned.any_built(tmp_path)
    assert tuned.find(tmp_path, RECIPE) is None


async def test_what_is_in_the_cache_is_not_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    made = make_built(tmp_path, RECIPE)
    assert await tuned.compile_kernel(PackageCache(tmp_path), RECIPE, silent) == made


async def test_missing_tools_are_named_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("gcc", "ld", "strip", "make", "xz"):
        (programs / name).write_text("#!/bin/sh\nexit 1\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setattr(tuned, "_INCLUDE", tmp_path)
    with pytest.raises(NotFoundError, match="needs Debian's bc bison flex libelf-dev"):
        await tuned.compile_kernel(PackageCache(tmp_path / "cache"), RECIPE, silent)
    assert list((tmp_path / "cache/debs").iterdir()) == []


async def test_which_kernel_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def recipe(store: PackageCache, progress: object) -> tuned.Recipe:
        return RECIPE

    monkeypatch.setattr(tuned, "recipe", recipe)
    said: list[str] = []

    async def choose(choice: str) -> tuned.Recipe | None:
        return await builder._recipe(PackageCache(tmp_path), lambda what, *_: said.append(what), choice)

    assert await choose("auto") is None
    assert await choose("tuned") == RECIPE
    assert said == []
    made = make_built(tmp_path, dataclasses.replace(RECIPE, compiler="gcc 11"))
    assert await choose("auto") is None
    assert "outdated" in said.pop()
    shutil.move(made.directory, made.directory.with_name(RECIPE.key))
    assert await choose("auto") == RECIPE
    assert await choose("distribution") is None
    assert said == []
    with pytest.raises(VmrtError, match="newest is none of auto, tuned, distribution"):
        await choose("newest")


def test_the_root_of_a_tuned_kernel_starts_the_agent_itself(tmp_path: Path) -> None:
    for directory in ("usr/sbin", "usr/lib"):
        (tmp_path / directory).mkdir(parents=True)
    initramfs.add_to_root(tmp_path, b"\x7fELF", ("/bin/agent", "-x"))
    assert (tmp_path / initramfs.ROOT_INIT).stat().st_mode & 0o777 == 0o755
    assert (tmp_path / initramfs.ROOT_PLAN).read_text() == "exec /bin/agent -x\n"
    assert f"/{initramfs.ROOT_PLAN}" in Path(initramfs.__file__).with_name("init.c").read_text()
    line = builder.cmdline("squashfs", is_tuned=True).split()
    assert {"root=/dev/vda", "rootfstype=squashfs", "ro", f"init=/{initramfs.ROOT_INIT}"} <= set(line)
    assert builder.cmdline("erofs", is_tuned=False).split() == [*builder.CMDLINE.split(), "swiotlb=noforce"]
