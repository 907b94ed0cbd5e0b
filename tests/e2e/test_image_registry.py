"""Pulls from a real registry (Debian's docker-registry on loopback) with the real skopeo, and a layer in the kernel."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from test_images_layer import TORTURE, Member, tar_of
from test_images_store import A, B, config_of, sha

from tests.e2e.docker_registry import INDEX, MANIFEST, PASSWORD, USER, Registry, gzipped
from vmrt import spawn
from vmrt.config import ImageConfig
from vmrt.errors import DeadlineError, ExhaustedError, ImageError, RegistryUnavailableError, SignatureError
from vmrt.images.manifest import host_architecture
from vmrt.images.store import ImageStore
from vmrt.model import RegistryAuth


async def command(*arguments: str | Path) -> None:
    await spawn.run(arguments)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    registry = Registry(tmp_path_factory.mktemp("registry"))
    yield registry
    registry.stop()


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    registry = Registry(tmp_path_factory.mktemp("private"), users=True)
    registry.push("app", "1", [A])
    registry.push("app", "large", [A, tar_of(Member("large", os.urandom(30 << 20)))])
    yield registry
    registry.stop()


def settings(tmp_path: Path, *registries: Registry, extra: str = "", **changes: object) -> ImageConfig:
    conf = tmp_path / "registries.conf"
    conf.write_text("".join(f'[[registry]]\nlocation = "{r.host}"\ninsecure = true\n' for r in registries) + extra)
    return ImageConfig(registries_conf=str(conf), **changes)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def opened(root: Path, config: ImageConfig) -> AsyncIterator[ImageStore]:
    store = ImageStore(root / "images", config)
    await store.open()
    store.collect()
    try:
        yield store
    finally:
        await store.close()
        assert list((root / "images/staging").iterdir()) == []


@pytest.fixture
async def store(tmp_path: Path, registry: Registry, private: Registry) -> AsyncIterator[ImageStore]:
    async with opened(tmp_path, settings(tmp_path, registry, private)) as store:
        yield store


def layers(root: Path) -> int:
    return len(list((root / "images/layers").iterdir()))


def skopeos() -> list[Path]:
    """Return the running skopeo processes that are this process's children."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            name, _, rest = (directory / "stat").read_text().partition(") ")
            if name.endswith("(skopeo") and rest.split()[1] == str(os.getpid()) and rest[0] != "Z":
                found.append(directory)
    return found


async def test_pull_by_tag_and_digest(registry: Registry, store: ImageStore) -> None:
    digest = registry.push("busy/box", "1.36", [A, B], Cmd=["sh"], User="1000:1000")
    image = await store.pull(f"{registry.host}/busy/box:1.36")
    assert image.id == sha(config_of([A, B], Cmd=["sh"], User="1000:1000"))
    assert image.repo_tags == (f"{registry.host}/busy/box:1.36",)
    assert image.repo_digests == (f"{registry.host}/busy/box@{digest}",)
    assert (image.config.cmd, image.config.user) == (("sh",), "1000:1000")
    assert [layer.diff_id for layer in image.layers] == [sha(A), sha(B)]
    for text in (image.id, *image.repo_tags, *image.repo_digests, f"{registry.host}/busy/box:no@{digest}"):
        assert store.get(text) == image
    await store.remove(image.id)
    image = await store.pull(f"{registry.host}/busy/box@{digest}")
    assert (image.repo_tags, image.repo_digests) == ((), (f"{registry.host}/busy/box@{digest}",))


async def test_layers_are_fetched_once(registry: Registry, store: ImageStore) -> None:
    base, own = tar_of(Member("base", b"base")), tar_of(Member("own", b"own"))
    blob = sha(gzipped(base))
    registry.push("reuse/one", "1", [base])
    registry.push("reuse/two", "1", [base, own])
    one = await store.pull(f"{registry.host}/reuse/one:1")
    assert registry.requests("GET", f"/blobs/{blob}") == 1
    two = await store.pull(f"{registry.host}/reuse/two:1")
    again = await store.pull(f"{registry.host}/reuse/one:1")
    assert registry.requests("GET", f"/blobs/{blob}") == 1
    assert again == one
    assert two.layers[0] == one.layers[0]
    assert registry.requests("GET", "/v2/reuse/one/manifests/1") == 2, "a pull always asks the registry"
    await store.remove(one.id)
    assert two.layers[0].path.exists()


async def test_a_tag_moves(tmp_path: Path, registry: Registry, store: ImageStore) -> None:
    name = f"{registry.host}/moving"
    first_digest = registry.push("moving", "1", [A])
    first = await store.pull(f"{name}:1")
    registry.push("moving", "1", [B])
    second = await store.pull(f"{name}:1")
    assert store.get(f"{name}:1") == second
    old = store.get(first.id)
    assert old is not None
    assert (old.repo_tags, old.repo_digests) == ((), (f"{name}@{first_digest}",))


async def test_an_index_gives_the_hosts_image(registry: Registry, store: ImageStore) -> None:
    own, other = registry.push("multi", "own", [A]), registry.push("multi", "other", [B])
    document = {
        "schemaVersion": 2,
        "mediaType": INDEX,
        "manifests": [
            {"mediaType": MANIFEST, "digest": digest, "size": size, "platform": {"os": "linux", "architecture": arch}}
            for digest, size, arch in (
                (other, _manifest_size(registry, other), "mips"),
                (own, _manifest_size(registry, own), host_architecture()),
            )
        ],
    }
    digest = registry.manifest("multi", "1", document, INDEX)
    image = await store.pull(f"{registry.host}/multi:1")
    assert image.layers[0].diff_id == sha(A)
    assert image.repo_digests == (f"{registry.host}/multi@{digest}",)


def _manifest_size(registry: Registry, digest: str) -> int:
    hexadecimal = digest.removeprefix("sha256:")
    path = registry.directory / "data/docker/registry/v2/blobs/sha256" / hexadecimal[:2] / hexadecimal / "data"
    return path.stat().st_size


async def test_a_mirror_keeps_the_name(tmp_path: Path, registry: Registry) -> None:
    registry.push("mirrored/pause", "3.9", [A])
    mirror = (
        '[[registry]]\nprefix = "registry.example"\nlocation = "registry.example"\n'
        f'[[registry.mirror]]\nlocation = "{registry.host}/mirrored"\ninsecure = true\n'
    )
    async with opened(tmp_path, settings(tmp_path, extra=mirror)) as store:
        image = await store.pull("registry.example/pause:3.9")
        assert image.repo_tags == ("registry.example/pause:3.9",)
        assert image.repo_digests[0].startswith("registry.example/pause@sha256:")


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rest", ["busy/box:absent", "absent:1", f"busy/box@sha256:{'0' * 64}"])
async def test_what_the_registry_does_not_have(registry: Registry, store: ImageStore, rest: str) -> None:
    with pytest.raises(ImageError, match="the registry has no such image") as caught:
        await store.pull(f"{registry.host}/{rest}")
    assert f"{registry.host}/{rest}" in str(caught.value)
    assert store.list() == []


async def test_registry_down(store: ImageStore) -> None:
    with pytest.raises(RegistryUnavailableError) as caught:
        await store.pull("127.0.0.1:1/x:1")
    assert str(caught.value).startswith("RegistryUnavailable: ")
    with pytest.raises(RegistryUnavailableError):
        await store.pull("no-such-registry.invalid/x:1")


RIGHT = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()


@pytest.mark.parametrize(
    ("auth", "works"),
    [
        (None, False),
        (RegistryAuth(username=USER, password="battery staple"), False),
        (RegistryAuth(username=USER, password=PASSWORD, server_address="other.example"), False),
        (RegistryAuth(username=USER, password=PASSWORD), True),
        (RegistryAuth(auth=RIGHT, server_address="http://{host}/v2/"), True),
    ],
)
async def test_credentials(private: Registry, store: ImageStore, auth: RegistryAuth | None, works: bool) -> None:
    if auth is not None and auth.server_address:
        auth = RegistryAuth(auth.username, auth.password, auth.auth, auth.server_address.format(host=private.host))
    if works:
        assert (await store.pull(f"{private.host}/app:1", auth)).layers[0].diff_id == sha(A)
        return
    with pytest.raises(ImageError, match="the registry denies access") as caught:
        await store.pull(f"{private.host}/app:1", auth)
    assert "battery staple" not in str(caught.value)
    assert store.list() == []


async def test_credentials_are_seen_nowhere(
    tmp_path: Path, private: Registry, store: ImageStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    seen: list[bytes] = []
    modes: list[int] = []

    def look(what: str, done: int, total: int) -> None:
        for process in skopeos():
            with contextlib.suppress(OSError):
                seen.append((process / "cmdline").read_bytes() + (process / "environ").read_bytes())
        for file in (tmp_path / "images/staging").rglob("auth.json"):
            modes.extend((file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777))

    await store.pull(f"{private.host}/app:large", RegistryAuth(username=USER, password=PASSWORD), progress=look)
    assert any(b"inspect" in text or b"copy" in text for text in seen), "skopeo was never caught running"
    assert set(modes) == {0o600, 0o700}
    for secret in (PASSWORD, RIGHT):
        assert not any(secret.encode() in text for text in seen)
        assert secret not in caplog.text
    assert list((tmp_path / "images/staging").iterdir()) == []


async def test_wrong_content_on_the_registry(tmp_path: Path, registry: Registry, store: ImageStore) -> None:
    data = tar_of(Member("tampered", os.urandom(1000)))
    registry.push("tampered", "1", [data])
    hexadecimal = sha(gzipped(data))[7:]
    blob = registry.directory / "data/docker/registry/v2/blobs/sha256" / hexadecimal[:2] / hexadecimal / "data"
    content = bytearray(blob.read_bytes())
    content[40] ^= 1
    blob.write_bytes(content)
    with pytest.raises(ImageError, match="does not have the digest"):
        await store.pull(f"{registry.host}/tampered:1")
    assert (store.list(), layers(tmp_path)) == ([], 0)


async def test_a_layer_that_is_not_what_the_configuration_says(
    tmp_path: Path, registry: Registry, store: ImageStore
) -> None:
    config = registry.blob("liar", config_of([B]))
    kind = "application/vnd.docker.container.image.v1+json"
    layer = {"mediaType": "application/vnd.docker.image.rootfs.diff.tar.gzip", **registry.blob("liar", gzipped(A))}
    document = {"schemaVersion": 2, "mediaType": MANIFEST, "config": {"mediaType": kind, **config}, "layers": [layer]}
    registry.manifest("liar", "1", document, MANIFEST)
    with pytest.raises(ImageError, match=f"layer 1 has the diff ID {sha(A)} instead of {sha(B)}"):
        await store.pull(f"{registry.host}/liar:1")
    assert (store.list(), layers(tmp_path)) == ([], 0)


async def test_the_policy_refuses(tmp_path: Path, registry: Registry) -> None:
    registry.push("busy/box", "policy", [A])
    policy = tmp_path / "policy.json"
    policy.write_text('{"default": [{"type": "reject"}]}')
    async with opened(tmp_path, settings(tmp_path, registry, policy_json=str(policy))) as store:
        with pytest.raises(SignatureError) as caught:
            await store.pull(f"{registry.host}/busy/box:policy")
        assert str(caught.value).startswith("SignatureValidationFailed: ")
    async with opened(tmp_path, settings(tmp_path, registry, policy_json="/absent")) as store:
        with pytest.raises(ImageError, match="configuration is wrong"):
            await store.pull(f"{registry.host}/busy/box:policy")


async def test_disk_full(tmp_path: Path, registry: Registry) -> None:
    registry.push("large", "compressible", [A, tar_of(Member("large", bytes(64 << 20)))])
    registry.push("large", "random", [A, tar_of(Member("large", os.urandom(16 << 20)))])
    root = tmp_path / "small"
    root.mkdir()
    await command("mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", root)
    try:
        async with opened(root, settings(tmp_path, registry)) as store:
            # One fails while it is converted, the other while it is fetched.
            for tag in ("compressible", "random"):
                with pytest.raises(ExhaustedError, match="no space left on device"):
                    await store.pull(f"{registry.host}/large:{tag}")
                assert (store.list(), layers(root)) == ([], 0)
    finally:
        await command("umount", root)


# --- several at once --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(registry: Registry) -> str:
    registry.push("several", "large", [tar_of(Member("x", os.urandom(40 << 20)))])
    return f"{registry.host}/several:large"


async def test_concurrent_pulls_are_one(registry: Registry, store: ImageStore, large: str) -> None:
    before = registry.requests("GET", "/several/manifests/large")
    images = await asyncio.gather(*(store.pull(large) for _ in range(5)))
    assert len({id(image) for image in images}) == 1
    assert registry.requests("GET", "/several/manifests/large") == before + 1


async def test_one_callers_cancellation_is_its_own(registry: Registry, store: ImageStore, large: str) -> None:
    moving = asyncio.Event()
    tasks = [asyncio.create_task(store.pull(large, progress=lambda *_: moving.set())) for _ in range(2)]
    await moving.wait()
    tasks[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[0]
    image = await tasks[1]
    assert store.get(large) == image


@pytest.mark.parametrize("stage", ["download", "convert"])
async def test_cancelling_all_leaves_nothing(tmp_path: Path, store: ImageStore, large: str, stage: str) -> None:
    moving = asyncio.Event()

    def look(what: str, done: int, total: int) -> None:
        if what == stage and (stage == "download" or done):
            moving.set()

    tasks = [asyncio.create_task(store.pull(large, progress=look)) for _ in range(2)]
    await moving.wait()
    for task in tasks:
        task.cancel()
    assert all(isinstance(e, asyncio.CancelledError) for e in await asyncio.gather(*tasks, return_exceptions=True))
    assert skopeos() == []
    assert (store.list(), layers(tmp_path)) == ([], 0)
    assert list((tmp_path / "images/staging").iterdir()) == []
    assert (await store.pull(large)).repo_tags == (large,)


async def test_closing_ends_pulls(tmp_path: Path, registry: Registry, large: str) -> None:
    async with opened(tmp_path, settings(tmp_path, registry)) as store:
        moving = asyncio.Event()
        task = asyncio.create_task(store.pull(large, progress=lambda *_: moving.set()))
        await moving.wait()
        await store.close()
        with pytest.raises(Exception, match="closing"):
            await task
    assert skopeos() == []


async def test_a_pull_has_its_time(tmp_path: Path, registry: Registry, large: str) -> None:
    async with opened(tmp_path, settings(tmp_path, registry, pull_timeout_s=0.01)) as store:
        with pytest.raises(DeadlineError, match=r"0\.01 s"):
            await store.pull(large)
    assert skopeos() == []


# --- the kernel -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif("erofs" not in Path("/proc/filesystems").read_text(), reason="this kernel has no EROFS")
async def test_the_kernel_mounts_the_torture_layer(tmp_path: Path, registry: Registry, store: ImageStore) -> None:
    """GNU tar unpacks the same archive as root; every attribute of both trees has to agree."""
    archive = tar_of(*TORTURE)
    registry.push("torture", "1", [archive])
    image = await store.pull(f"{registry.host}/torture:1")
    unpacked, mounted = tmp_path / "unpacked", tmp_path / "mounted"
    unpacked.mkdir()
    mounted.mkdir()
    (tmp_path / "t.tar").write_bytes(archive)
    options = ("--numeric-owner", "-p", "--xattrs", "--xattrs-include=*")
    await command("tar", "-xf", tmp_path / "t.tar", *options, "-C", unpacked)
    await command("mount", "-t", "erofs", "-o", "ro,loop", image.layers[0].path, mounted)
    try:
        _compare(unpacked, mounted)
    finally:
        await command("umount", mounted)


def _compare(unpacked: Path, mounted: Path) -> None:
    checked = 0
    for left in unpacked.rglob("*"):
        right = mounted / left.relative_to(unpacked)
        if ".wh." in str(left.relative_to(unpacked)):
            continue
        a, b = left.lstat(), right.lstat()
        what = str(left)
        assert (a.st_mode, a.st_uid, a.st_gid, a.st_rdev) == (b.st_mode, b.st_uid, b.st_gid, b.st_rdev), what
        named = {m.name.rstrip("/") for m in TORTURE}
        if str(left.relative_to(unpacked)) in named:
            assert abs(a.st_mtime_ns - b.st_mtime_ns) <= 1000, what
        if left.is_symlink():
            assert left.readlink() == right.readlink()
        elif left.is_file():
            assert (a.st_size, a.st_nlink) == (b.st_size, b.st_nlink), what
            assert left.read_bytes() == right.read_bytes(), what
        for name in os.listxattr(left, follow_symlinks=False):
            assert os.getxattr(left, name, follow_symlinks=False) == os.getxattr(right, name, follow_symlinks=False)
        checked += 1
    assert checked >= len(TORTURE) - 6
    for whiteout in ("gone/file", "top"):
        status = (mounted / whiteout).lstat()
        assert (status.st_mode, status.st_rdev) == (0o020000, 0)
    assert os.getxattr(mounted / "opaque", "trusted.overlay.opaque") == b"y"


@pytest.mark.skipif("erofs" not in Path("/proc/filesystems").read_text(), reason="this kernel has no EROFS")
async def test_overlayfs_takes_the_layers(tmp_path: Path, registry: Registry, store: ImageStore) -> None:
    lower = tar_of(
        *(Member(f"{d}/{f}", b"lower") for d in ("plain", "opaque", "gone", "again") for f in ("one", "two"))
    )
    upper = tar_of(
        Member("plain/.wh.one"),
        Member("opaque/.wh..wh..opq"),
        Member("opaque/new", b"upper"),
        Member(".wh.gone"),
        Member(".wh.again"),
        Member("again/new", b"upper"),
    )
    registry.push("overlay", "1", [lower, upper])
    image = await store.pull(f"{registry.host}/overlay:1")
    mounts: list[Path] = []

    async def mount(*arguments: str | Path) -> None:
        await command("mount", *arguments)
        mounts.append(Path(arguments[-1]))

    try:
        for number, layer in enumerate(image.layers):
            (tmp_path / str(number)).mkdir()
            await mount("-t", "erofs", "-o", "ro,loop", layer.path, tmp_path / str(number))
        (tmp_path / "merged").mkdir()
        await mount("-t", "overlay", "-o", f"lowerdir={tmp_path}/1:{tmp_path}/0", "overlay", tmp_path / "merged")
        found = sorted(str(p.relative_to(tmp_path / "merged")) for p in (tmp_path / "merged").rglob("*") if p.is_file())
        assert found == ["again/new", "opaque/new", "plain/two"]
    finally:
        for mounted in reversed(mounts):
            await command("umount", mounted)
