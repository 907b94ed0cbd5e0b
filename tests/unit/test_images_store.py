"""The store without a registry: loading archives, names, what is kept for whom, and what a crash may leave."""

import asyncio
import contextlib
import gzip
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import threading
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from test_erofs_reader import Reader
from test_images_layer import Member, tar_of

from vmrt.config import ImageConfig
from vmrt.errors import ConfigError, ImageError, InvalidArgumentError, NotFoundError, UnavailableError
from vmrt.images.manifest import host_architecture
from vmrt.images.store import ImageStore
from vmrt.model import Image

A, B, C = (tar_of(Member(name, name.encode())) for name in "abc")


def sha(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def config_of(layers: Sequence[bytes], **config: object) -> bytes:
    return json.dumps(
        {
            "os": "linux",
            "architecture": host_architecture(),
            "config": config,
            "rootfs": {"type": "layers", "diff_ids": [sha(data) for data in layers]},
        }
    ).encode()


def write_layout(path: Path, images: Sequence[tuple[str, Sequence[bytes]]], compress: bool = True) -> Path:
    """Write an OCI layout of (name, layers) images."""
    blobs = path / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def blob(data: bytes) -> dict[str, object]:
        (blobs / sha(data)[7:]).write_bytes(data)
        return {"digest": sha(data), "size": len(data)}

    manifests = []
    for name, layers in images:
        stored = [gzip.compress(data, mtime=0) if compress else data for data in layers]
        document = {"schemaVersion": 2, "config": blob(config_of(layers)), "layers": [blob(data) for data in stored]}
        manifests.append({**blob(json.dumps(document).encode())})
        if name:
            manifests[-1]["annotations"] = {"org.opencontainers.image.ref.name": name}
    (path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": manifests}))
    (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return path


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.write_bytes(tar_of(*(Member(name, data) for name, data in members.items())))
    return path


@contextlib.asynccontextmanager
async def opened(root: Path) -> AsyncIterator[ImageStore]:
    store = ImageStore(root / "images", ImageConfig())
    await store.open()
    try:
        yield store
    finally:
        await store.close()


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[ImageStore]:
    async with opened(tmp_path) as store:
        store.collect()
        yield store


def left(root: Path) -> tuple[int, list[Path]]:
    """Return how many layers there are and what is in staging when its threads have deleted what they are to."""
    for _ in range(500):
        if not any((root / "images/staging").glob("gone-*")):
            break
        time.sleep(0.01)
    return len(list((root / "images/layers").iterdir())), list((root / "images/staging").iterdir())


async def load_one(store: ImageStore, path: Path, tag: str = "") -> Image:
    (image,) = await store.load(path, tag=tag)
    return image


async def test_an_oci_layout(tmp_path: Path, store: ImageStore) -> None:
    image = await load_one(store, write_layout(tmp_path / "l", [("app:1", [A, B])]))
    assert image.id == sha(config_of([A, B]))
    assert image.repo_tags == ("docker.io/library/app:1",)
    assert [layer.diff_id for layer in image.layers] == [sha(A), sha(B)]
    for layer, name in zip(image.layers, (b"a", b"b"), strict=True):
        assert Reader(layer.path.read_bytes()).nodes[b"/" + name].data == name
        assert layer.path.name == f"{layer.diff_id[7:]}.erofs"
        assert layer.path.stat().st_mode & 0o777 == 0o444
        assert layer.size_bytes == layer.path.stat().st_size
    assert left(tmp_path) == (2, [])
    directory, used, inodes = await store.usage()
    assert directory == tmp_path / "images"
    assert used >= sum(layer.size_bytes for layer in image.layers)
    assert inodes >= 5
    assert json.loads(store.configuration(image.id))["os"] == "linux"


@pytest.mark.parametrize("compression", ["plain", "gzip"])
async def test_an_oci_archive(tmp_path: Path, store: ImageStore, compression: str) -> None:
    layout = write_layout(tmp_path / "l", [("x.io/one:1", [A]), ("x.io/two:2", [A, B]), ("", [C])])
    with tarfile.open(tmp_path / "t", "w:gz" if compression == "gzip" else "w") as tar:
        tar.add(layout, ".")
    images = await store.load(tmp_path / "t")
    assert [image.repo_tags for image in images] == [("x.io/one:1",), ("x.io/two:2",), ()]
    assert left(tmp_path) == (3, [])


async def test_a_docker_archive(tmp_path: Path, store: ImageStore) -> None:
    config = config_of([A, A, B], Cmd=["sh"])
    entry = {
        "Config": f"{sha(config)[7:]}.json",
        "RepoTags": ["app:1", "x.io/app:2"],
        "Layers": ["1/l.tar", "2/l.tar", "b"],
    }
    archive = tmp_path / "docker.tar"
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in {
            "manifest.json": json.dumps([entry]).encode(),
            entry["Config"]: config,
            "1/l.tar": A,
            "b": B,
        }.items():
            info = tarfile.TarInfo(str(name))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("2/l.tar")  # how docker save wrote a layer that occurs twice
        link.type, link.linkname = tarfile.SYMTYPE, "../1/l.tar"
        tar.addfile(link)
    archive.write_bytes(out.getvalue())
    image = await load_one(store, archive)
    assert image.id == sha(config)
    assert image.repo_tags == ("docker.io/library/app:1", "x.io/app:2")
    assert image.config.cmd == ("sh",)
    # overlayfs takes no directory twice.
    assert [layer.diff_id for layer in image.layers] == [sha(A), sha(B)]


def zstd(data: bytes) -> bytes:
    return subprocess.run(["zstd", "-q", "-c"], input=data, capture_output=True, check=True).stdout


@pytest.mark.skipif(shutil.which("zstd") is None, reason="needs zstd")
async def test_a_zstd_layer(tmp_path: Path, store: ImageStore) -> None:
    config = config_of([A])
    members = {"c.json": config, "l": zstd(A), "manifest.json": b'[{"Config": "c.json", "Layers": ["l"]}]'}
    image = await load_one(store, write_tar(tmp_path / "t", members))
    assert Reader(image.layers[0].path.read_bytes()).nodes[b"/a"].data == b"a"
    await store.remove(image.id)
    broken = {**members, "l": zstd(A * 50)[:-10]}
    with pytest.raises(ImageError, match="broken zstd data"):
        await store.load(write_tar(tmp_path / "broken", broken))
    assert left(tmp_path) == (0, [])


async def test_names_and_ways_to_ask(tmp_path: Path, store: ImageStore) -> None:
    one = await load_one(store, write_layout(tmp_path / "1", [("", [A])]), tag="app")
    two = await load_one(store, write_layout(tmp_path / "2", [("x.io/app:2", [A, B])]))
    for text in (one.id, one.id[7:], one.id[:20], one.id[7:19], "app", "app:latest", "docker.io/library/app"):
        assert store.get(text) == one, text
        assert store.list(text) == [one]
    for text in ("other", "x.io/app", f"x.io/app@{one.id}", "0" * 64, "sha256:" + "0" * 64):
        assert store.get(text) is None, text
        assert store.list(text) == []
    with pytest.raises(InvalidArgumentError):
        store.get("Not A Reference")
    assert store.list() == sorted([one, two], key=lambda image: image.id)
    # The tag moves; an image that nobody can name is gone, with the layers only it had.
    moved = await load_one(store, write_layout(tmp_path / "3", [("", [C])]), tag="x.io/app:2")
    assert store.get("x.io/app:2") == moved
    assert store.get(two.id) is None
    assert left(tmp_path) == (2, [])


async def test_remove_takes_all_names(tmp_path: Path, store: ImageStore) -> None:
    await store.load(write_layout(tmp_path / "1", [("app:1", [A]), ("x.io/app:2", [A])]))
    (image,) = store.list()
    assert image.repo_tags == ("docker.io/library/app:1", "x.io/app:2")
    await asyncio.gather(*(store.remove("x.io/app:2") for _ in range(5)))
    assert store.list() == []
    assert store.get("app:1") is None
    assert left(tmp_path)[0] == 0
    await store.remove("0" * 64)


async def test_layers_in_use_outlive_their_image(tmp_path: Path, store: ImageStore) -> None:
    image = await load_one(store, write_layout(tmp_path / "1", [("app:1", [A])]))
    store.retain(image.id, "container")
    store.retain(image.id, "container")
    store.retain(image.id, "other")
    await store.remove(image.id)
    assert store.get(image.id) is None
    store.retain(image.id, "third")
    assert image.layers[0].path.exists()
    for user in ("other", "container", "nobody"):
        store.release(user)
        assert image.layers[0].path.exists()
    store.release("third")
    assert not image.layers[0].path.exists()
    with pytest.raises(NotFoundError):
        store.retain(image.id, "container")


async def test_a_restart_keeps_images_and_waits_for_those_who_retain(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        store.collect()
        kept = await load_one(store, write_layout(tmp_path / "1", [("app:1", [A])]))
        used = await load_one(store, write_layout(tmp_path / "2", [("app:2", [B])]))
        gone = await load_one(store, write_layout(tmp_path / "3", [("app:3", [C])]))
        for image in (used, gone):
            store.retain(image.id, "container")
            await store.remove(image.id)
    # What a killed daemon may have left.
    (tmp_path / "images/staging/work").mkdir()
    (tmp_path / "images/staging/work/auth.json").write_text("secret")
    (tmp_path / "images/staging/gone-1").touch()
    orphan = tmp_path / "images/layers" / f"{'0' * 64}.erofs"
    orphan.touch()
    async with opened(tmp_path) as store:
        assert store.list() == [kept]
        assert left(tmp_path) == (4, [])
        store.retain(used.id, "container")
        store.collect()
        assert used.layers[0].path.exists()
        assert not gone.layers[0].path.exists()
        assert not orphan.exists()
        again = await load_one(store, write_layout(tmp_path / "again", [("app:2", [B])]))
        assert again.layers == used.layers


async def test_an_image_whose_layer_is_missing_is_dropped(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        (one, two) = await store.load(write_layout(tmp_path / "1", [("app:1", [A]), ("app:2", [A, B])]))
    two.layers[1].path.unlink()
    async with opened(tmp_path) as store:
        assert store.list() == [one]
        store.retain(two.id, "container")
        store.collect()
        assert await load_one(store, write_layout(tmp_path / "2", [("app:2", [A, B])])) == two
        assert two.layers[1].path.exists()


async def test_a_layer_with_an_opaque_root_hides_those_below(tmp_path: Path, store: ImageStore) -> None:
    opaque = tar_of(Member(".wh..wh..opq"), Member("new", b"new"))
    image = await load_one(store, write_layout(tmp_path / "1", [("app:1", [A, opaque, B])]))
    assert [layer.diff_id for layer in image.layers] == [sha(opaque), sha(B)]


def damage_layer(layout: Path) -> None:
    (blob,) = (p for p in (layout / "blobs/sha256").iterdir() if p.read_bytes()[:2] == b"\x1f\x8b")
    # The same content with another time in gzip's header.
    data = blob.read_bytes()
    blob.write_bytes(data[:4] + b"\1" + data[5:])


def damage_config(layout: Path) -> None:
    (blob,) = (p for p in (layout / "blobs/sha256").iterdir() if b"diff_ids" in p.read_bytes())
    blob.write_bytes(blob.read_bytes() + b" ")


def link_blob(layout: Path) -> None:
    (blob,) = (p for p in (layout / "blobs/sha256").iterdir() if p.read_bytes()[:2] == b"\x1f\x8b")
    blob.rename(layout / "elsewhere")
    blob.symlink_to(layout / "elsewhere")


def link_blobs(layout: Path) -> None:
    (layout / "blobs").rename(layout / "elsewhere")
    (layout / "blobs").symlink_to("elsewhere")


def lose_layer(layout: Path) -> None:
    (blob,) = (p for p in (layout / "blobs/sha256").iterdir() if p.read_bytes()[:2] == b"\x1f\x8b")
    blob.unlink()


def lose_index(layout: Path) -> None:
    (layout / "index.json").unlink()


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (damage_layer, "a layer has the digest"),
        (damage_config, "has the digest"),
        (link_blob, "is a symbolic link"),
        (link_blobs, "is a symbolic link"),
        (lose_layer, "is missing"),
        (lose_index, "neither an OCI image layout nor"),
    ],
)
async def test_damaged_layouts(tmp_path: Path, store: ImageStore, damage: object, text: str) -> None:
    layout = write_layout(tmp_path / "l", [("app:1", [A])])
    assert callable(damage)
    damage(layout)
    with pytest.raises(ImageError, match=text):
        await store.load(layout)
    assert store.list() == []
    assert left(tmp_path) == (0, [])


@pytest.mark.parametrize(
    ("layers", "config", "text"),
    [
        (["../../etc/passwd"], config_of([A]), "is not in the archive"),
        (["/etc/passwd"], config_of([A]), "is not in the archive"),
        (["l"], config_of([B]), "layer 1 has the diff ID"),
        (["l"], config_of([A, B]), "names 2 layers, the manifest 1"),
        (["l"], b"{}", "names no layers"),
    ],
)
async def test_damaged_docker_archives(
    tmp_path: Path, store: ImageStore, layers: list[str], config: bytes, text: str
) -> None:
    document = json.dumps([{"Config": "c.json", "Layers": layers}]).encode()
    archive = write_tar(tmp_path / "t", {"manifest.json": document, "c.json": config, "l": A})
    with pytest.raises(ImageError, match=text):
        await store.load(archive)
    assert store.list() == []
    assert left(tmp_path) == (0, [])


async def test_what_cannot_be_loaded(tmp_path: Path, store: ImageStore) -> None:
    with pytest.raises(NotFoundError, match="No such file"):
        await store.load(tmp_path / "absent")
    (tmp_path / "text").write_text("no archive" * 100)
    with pytest.raises(ImageError, match="not a tar archive"):
        await store.load(tmp_path / "text")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(A)[:-9])
    with pytest.raises(ImageError, match="cut short"):
        await store.load(tmp_path / "cut.gz")
    two = write_layout(tmp_path / "two", [("app:1", [A]), ("app:2", [B])])
    with pytest.raises(InvalidArgumentError, match="2 images"):
        await store.load(two, tag="app:3")
    assert left(tmp_path) == (0, [])


@pytest.mark.skipif(shutil.which("zstd") is None, reason="needs zstd")
async def test_a_bomb_is_stopped(tmp_path: Path, store: ImageStore) -> None:
    bomb = zstd(tar_of(Member("zeros", bytes(200 << 20))))
    members = {"c.json": config_of([A]), "l": bomb, "manifest.json": b'[{"Config": "c.json", "Layers": ["l"]}]'}
    with pytest.raises(ImageError, match="grows beyond"):
        await store.load(write_tar(tmp_path / "t", members))
    assert left(tmp_path) == (0, [])


async def test_a_refused_layer_leaves_no_thread(tmp_path: Path, store: ImageStore) -> None:
    refused = tar_of(Member("../x"), Member("large", bytes(20 << 20)))
    with pytest.raises(ImageError, match="in a path") as caught:
        await store.load(write_layout(tmp_path / "l", [("app:1", [refused])]))
    # The error still holds the frames that it came through.
    assert caught.value.__traceback__ is not None
    assert [thread for thread in threading.enumerate() if thread.name == "image-layer"] == []


async def test_a_cancelled_load_leaves_nothing(tmp_path: Path, store: ImageStore) -> None:
    big = tar_of(*(Member(f"f{n}", bytes(300_000)) for n in range(400)))
    layout = write_layout(tmp_path / "l", [("app:1", [A, big])], compress=False)
    begun = asyncio.Event()
    task = asyncio.create_task(store.load(layout, progress=lambda what, done, total: begun.set()))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert store.list() == []
    assert left(tmp_path) == (0, [])


async def test_a_closed_store_says_so(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        pass
    with pytest.raises(UnavailableError):
        await store.load(tmp_path)
    with pytest.raises(UnavailableError):
        await store.pull("x")
    store.release("container")


async def test_pinned_images_are_told_as_such_and_removed_when_asked(tmp_path: Path) -> None:
    layout = write_layout(tmp_path / "layout", [("docker.io/library/keep:1", [A]), ("docker.io/library/other:1", [B])])
    store = ImageStore(tmp_path / "images", ImageConfig(pinned=("keep:1", "absent")))
    await store.open()
    try:
        await store.load(layout)
        keep, other = store.get("keep:1"), store.get("other:1")
        assert keep is not None
        assert other is not None
        assert (keep.pinned, other.pinned) == (True, False)
        await store.remove("keep:1")
        assert store.get("keep:1") is None
    finally:
        await store.close()
    with pytest.raises(ConfigError, match=r"^images\.pinned: invalid image reference 'No'"):
        ImageStore(tmp_path / "images", ImageConfig(pinned=("No",)))
