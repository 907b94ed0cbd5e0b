"""apt's answers, and the cache of packages; apt and dpkg-deb are small stand-in programs on PATH here."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from vmrt.errors import ProcessError, VmrtError
from vmrt.guest_image import packages
from vmrt.guest_image.packages import Package, PackageCache

BODY = b"a package"
DIGEST = hashlib.sha256(BODY).hexdigest()
URIS = f"""\
'http://mirror.invalid/pool/b/busybox-static_1.35.0-4+deb12u1+b1_amd64.deb' busybox-static_1%3a1.35.0-4_amd64.deb 9 SHA256:{DIGEST}
'http://mirror.invalid/linux.deb' linux-image-6.1.0-56-cloud-amd64_6.1.192-2_amd64.deb 9 SHA256:{DIGEST}
"""  # noqa: E501


def silent(what: str, done: int, total: int) -> None:
    pass


def test_uris() -> None:
    parsed = packages.parse_uris("Reading package lists...\n\n" + URIS + "'x' y 3 MD5\n")
    assert parsed == [
        Package("busybox-static", "1:1.35.0-4", "busybox-static_1%3a1.35.0-4_amd64.deb", 9, f"SHA256:{DIGEST}"),
        Package(
            "linux-image-6.1.0-56-cloud-amd64",
            "6.1.192-2",
            "linux-image-6.1.0-56-cloud-amd64_6.1.192-2_amd64.deb",
            9,
            f"SHA256:{DIGEST}",
        ),
    ]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with an apt that knows URIS' packages and writes down how it was called."""
    directory = tmp_path / "bin"
    directory.mkdir()
    scripts = {
        "apt-cache": 'echo "meta"; echo "  Depends: linux-image-6.1.0-56-cloud-amd64"',
        "apt-get": f"""
echo "$@" >> {tmp_path}/calls
case "$*" in
*--print-uris*) cat {tmp_path}/uris ;;
*) printf 'a package' > busybox-static_1%3a1.35.0-4_amd64.deb
   printf 'a package' > linux-image-6.1.0-56-cloud-amd64_6.1.192-2_amd64.deb ;;
esac""",
        "dpkg-deb": 'mkdir "$3/usr"; echo from "$2" > "$3/usr/file"',
    }
    for name, script in scripts.items():
        (directory / name).write_text(f"#!/bin/sh\n{script}\n")
        (directory / name).chmod(0o755)
    (tmp_path / "uris").write_text(URIS)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return directory


def calls(tmp_path: Path) -> list[str]:
    path = tmp_path / "calls"
    return path.read_text().splitlines() if path.exists() else []


async def test_resolve_fetch_unpack_each_once(tmp_path: Path, programs: Path) -> None:
    cache = PackageCache(tmp_path / "cache")
    found = await cache.resolve("meta", ["busybox-static"], silent)
    assert [package.name for package in found] == ["busybox-static", "linux-image-6.1.0-56-cloud-amd64"]
    seen: list[tuple[str, int, int]] = []
    await cache.fetch(found, lambda *report: seen.append(report))
    assert all(what == "downloading packages" and done <= total == 18 for what, done, total in seen)
    asked = len(calls(tmp_path))
    assert "busybox-static=1:1.35.0-4" in calls(tmp_path)[-1]
    unpacked = await cache.unpack(found[0])
    assert (unpacked / "usr/file").read_text().startswith("from ")
    # All again, by another process: nothing is left to do.
    again = PackageCache(tmp_path / "cache")
    assert await again.resolve("meta", ["busybox-static"], silent) == found
    await again.fetch(found, silent)
    assert await again.unpack(found[0]) == unpacked
    assert len(calls(tmp_path)) == asked
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(("fetch-", "resolve-"))]


async def test_without_apts_lists_the_last_answer_serves(
    tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = PackageCache(tmp_path / "cache")
    found = await cache.resolve("meta", ["busybox-static"], silent)
    await cache.fetch(found, silent)
    monkeypatch.setattr(packages, "_apt_state", lambda: "other lists")
    (programs / "apt-get").write_text("#!/bin/sh\necho 'E: Unable to locate package busybox-static' >&2\nexit 100\n")
    said: list[str] = []
    assert await cache.resolve("meta", ["busybox-static"], lambda what, *_: said.append(what)) == found
    assert "apt cannot tell" in said[0]
    # Another question was never answered.
    with pytest.raises(VmrtError, match=r"E: Unable to locate package busybox-static \(run `apt-get update`"):
        await cache.resolve("meta", ["busybox-static", "crun"], silent)
    # Nor is an answer of use whose packages have gone.
    (tmp_path / "cache/debs" / found[0].file).unlink()
    with pytest.raises(VmrtError, match="apt-get update"):
        await cache.resolve("meta", ["busybox-static"], silent)


async def test_a_download_with_another_digest_does_not_get_in(tmp_path: Path, programs: Path) -> None:
    (tmp_path / "uris").write_text(URIS.replace(DIGEST, "0" * 64))
    cache = PackageCache(tmp_path / "cache")
    found = await cache.resolve("meta", ["busybox-static"], silent)
    with pytest.raises(VmrtError, match=f"SHA256 is {DIGEST}, the package list says 000"):
        await cache.fetch(found, silent)
    assert not list((tmp_path / "cache/debs").iterdir())


async def test_a_package_that_rotted_in_the_cache_is_removed(tmp_path: Path, programs: Path) -> None:
    cache = PackageCache(tmp_path / "cache")
    found = await cache.resolve("meta", ["busybox-static"], silent)
    await cache.fetch(found, silent)
    deb = tmp_path / "cache/debs" / found[0].file
    deb.write_bytes(b"rotten")
    with pytest.raises(VmrtError, match="build again"):
        await cache.unpack(found[0])
    assert not deb.exists()
    await cache.fetch(found, silent)
    await cache.unpack(found[0])


async def test_a_failed_download_says_what_to_do(tmp_path: Path, programs: Path) -> None:
    cache = PackageCache(tmp_path / "cache")
    found = await cache.resolve("meta", ["busybox-static"], silent)
    (programs / "apt-get").write_text("#!/bin/sh\necho 'E: Failed to fetch' >&2; exit 100\n")
    with pytest.raises(ProcessError, match=r"Failed to fetch.*is the network up"):
        await cache.fetch(found, silent)
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.name.startswith("fetch")] == []


def test_a_staged_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with pytest.raises(RuntimeError), packages.staged_directory(target, prefix="x-") as work:
        (work / "half").touch()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    for content in ("one", "two"):
        with packages.staged_directory(target, prefix="x-") as work:
            (work / "file").write_text(content)
        assert (target / "file").read_text() == content
    assert target.stat().st_mode & 0o777 == 0o755
