"""A pod's share, without mounting anything: refusals, and that clean-up never reaches a volume's content."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vmrt.errors import FailedPreconditionError, InvalidArgumentError, UnsupportedError, VmGoneError, VmrtError
from vmrt.model import IdMapping, Mount, Propagation
from vmrt.pods import host_paths, idmap, mount_tree, oci, share_namespace, volumes
from vmrt.spawn import ProcessId

SANDBOX, CONTAINER = "5" * 64, "c" * 64


VIRTIOFSD = ProcessId(1, 1)


class Namespace:
    """A virtiofsd's mount namespace as far as `volumes` can see: what is mounted is noted, not done."""

    def __init__(self) -> None:
        self.mounts: Counter[str] = Counter()
        self.gone = False

    def attach(self, tree_fd: int, name: str) -> None:
        self.mounts[name] += 1

    def detach(self, name: str) -> None:
        del self.mounts[name]

    def mounts_at(self, name: str) -> int:
        return self.mounts[name]

    @contextmanager
    def of(self, process: ProcessId) -> Iterator[Namespace]:
        assert process == VIRTIOFSD
        if self.gone:
            raise VmGoneError("virtiofsd has ended")
        yield self


@pytest.fixture
def namespace(monkeypatch: pytest.MonkeyPatch) -> Namespace:
    made = Namespace()
    monkeypatch.setattr(share_namespace, "of", made.of)
    monkeypatch.setattr(mount_tree, "clone", os.dup)
    monkeypatch.setattr(mount_tree, "change", lambda fd, **wanted: None)
    return made


@pytest.fixture
def share(tmp_path: Path, namespace: Namespace) -> Path:
    """A share that containers' volumes can be bound into."""
    volumes.make(tmp_path, SANDBOX)
    return tmp_path


def points(root: Path) -> list[Path]:
    """The mount points that the share has."""
    return sorted((volumes.directory(root, SANDBOX) / "files").iterdir())


def refused(root: Path, mount: Mount) -> VmrtError:
    with pytest.raises(VmrtError) as caught:
        volumes.bind(root, SANDBOX, CONTAINER, (mount,), VIRTIOFSD)
    assert "config.mounts[0]" in str(caught.value)
    return caught.value


def test_directories_and_files_get_mount_points_of_their_kind(share: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    mounts = (Mount("/a", str(tmp_path)), Mount("/b", str(tmp_path / "link"), readonly=True))
    bound = volumes.bind(share, SANDBOX, CONTAINER, mounts, VIRTIOFSD)
    assert [b.mount for b in bound] == list(mounts)
    made = [volumes.directory(share, SANDBOX) / "files" / Path(b.guest_source).name for b in bound]
    assert [b.guest_source for b in bound] == [f"/run/vmrt/share/{point.name}" for point in made]
    assert made[0].is_dir()
    assert made[1].is_file()


def test_containers_that_want_the_same_of_a_path_share_one_bind(share: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    one = Mount("/a", str(tmp_path))
    same = (Mount("/b", str(tmp_path / "link")), Mount("/c", f"/proc/self/fd/{os.open(tmp_path, os.O_PATH)}"))
    others = (
        Mount("/d", str(tmp_path), readonly=True),
        Mount("/e", str(tmp_path), propagation=Propagation.HOST_TO_CONTAINER),
        Mount("/f", str(tmp_path), readonly=True, recursive_read_only=True),
    )
    first = volumes.bind(share, SANDBOX, CONTAINER, (one,), VIRTIOFSD)
    second = volumes.bind(share, SANDBOX, "d" * 64, same, VIRTIOFSD)
    assert {b.guest_source for b in first} == {b.guest_source for b in second}
    assert len(points(share)) == 1
    third = volumes.bind(share, SANDBOX, "e" * 64, others, VIRTIOFSD)
    assert len({b.guest_source for b in (*first, *third)}) == 4
    volumes.unbind(share, SANDBOX, CONTAINER, VIRTIOFSD)
    volumes.unbind(share, SANDBOX, "e" * 64, VIRTIOFSD)
    assert [p.name for p in points(share)] == [Path(first[0].guest_source).name]
    volumes.unbind(share, SANDBOX, "d" * 64, VIRTIOFSD)
    assert points(share) == []
    volumes.unbind(share, SANDBOX, "d" * 64, VIRTIOFSD)


def test_an_empty_dir_is_one_volume_for_readers_and_writers(share: Path, tmp_path: Path) -> None:
    path = tmp_path / "kubelet/pods/uid/volumes/kubernetes.io~empty-dir/run"
    path.mkdir(parents=True)
    mounts = (Mount("/w", str(path)), Mount("/r", str(path), readonly=True))
    bound = volumes.bind(share, SANDBOX, CONTAINER, mounts, VIRTIOFSD)
    assert len({b.guest_source for b in bound}) == 1
    assert oci._volume_mount(bound[1])["options"] == ["rbind", "rprivate", "ro"]
    assert oci._volume_mount(bound[0])["options"] == ["rbind", "rprivate", "rw"]


def test_a_new_mount_below_a_path_is_a_new_volume(share: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = volumes.bind(share, SANDBOX, CONTAINER, (Mount("/a", str(tmp_path)),), VIRTIOFSD)
    monkeypatch.setattr(mount_tree, "entries", lambda path: [mount_tree.Entry(7, "0:9", "/", f"{path}/new", "tmpfs")])
    second = volumes.bind(share, SANDBOX, "d" * 64, (Mount("/a", str(tmp_path)),), VIRTIOFSD)
    assert first[0].guest_source != second[0].guest_source


def test_a_path_in_a_volume_never_leads_out_of_it(tmp_path: Path) -> None:
    """A container owns what is in its volume and swaps a directory for a link while the path is being opened."""
    volume, secret = tmp_path / "pods/u/volumes/kubernetes.io~csi/v", tmp_path / "secret"
    (volume / "sub").mkdir(parents=True)
    secret.mkdir()
    (volume / "link").symlink_to(secret)
    (volume / "good").symlink_to("sub")
    inside = (volume / "sub").stat().st_ino
    for path in ("link", "../../../../../secret", "sub/../../v/sub", "link/.."):
        with pytest.raises(OSError, match="cross-device"):
            host_paths.open_path(f"{volume}/{path}")
    fd = host_paths.open_path(f"{volume}/good")
    assert os.fstat(fd).st_ino == inside
    os.close(fd)
    stop, seen = threading.Event(), {"inside": 0, "refused": 0}

    def swap() -> None:
        while not stop.is_set():
            (volume / "sub").rename(volume / "aside")
            (volume / "sub").symlink_to(secret)
            (volume / "sub").unlink()
            (volume / "aside").rename(volume / "sub")

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        while min(seen.values()) < 200:
            try:
                fd = host_paths.open_path(f"{volume}/sub")
            except OSError:
                seen["refused"] += 1
                continue
            assert os.fstat(fd).st_ino == inside
            os.close(fd)
            seen["inside"] += 1
    finally:
        stop.set()
        swapper.join()


def test_what_kubelet_s_paths_say() -> None:
    at = "/var/lib/kubelet/pods/1-2/volumes/kubernetes.io~empty-dir/cache"
    assert host_paths.pod_volume(at) == host_paths.PodVolume(at, "kubernetes.io~empty-dir", "")
    assert host_paths.pod_volume(f"{at}/a/b/") == host_paths.PodVolume(at, "kubernetes.io~empty-dir", "a/b")
    for path in ("/etc/hosts", "/pods/u/volumes/x", "/pods/u/volumes/../x", "/pods/u/volumes/x/..", "/proc/1/fd/3"):
        assert host_paths.pod_volume(path) is None, path
    assert host_paths.is_empty_dir(at)
    assert not host_paths.is_empty_dir(at.replace("empty-dir", "csi"))


def test_a_file_system_that_takes_no_mapping_of_ids(
    share: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(tree: int, userns_fd: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument", "mount_setattr")

    monkeypatch.setattr(idmap.UserNamespaces, "get", lambda self, uids, gids: 0)
    monkeypatch.setattr(mount_tree, "idmap", refuse)
    mapping = (IdMapping(100000, 0, 65536),)
    error = refused(share, Mount("/x", str(tmp_path), uids=mapping, gids=mapping))
    assert isinstance(error, UnsupportedError)
    assert "cannot be mounted with uidMappings" in str(error)


def test_what_is_neither_file_nor_directory_is_refused(share: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        cases = (("fifo", UnsupportedError, "FIFO"), ("s", UnsupportedError, "socket"))
        for index, (name, kind, words) in enumerate(cases):
            with pytest.raises(kind, match=words):
                volumes.bind(share, SANDBOX, f"{index}" * 64, (Mount("/x", str(tmp_path / name)),), VIRTIOFSD)
    assert isinstance(refused(share, Mount("/x", "/dev/null")), UnsupportedError)


def test_a_missing_path_is_an_error_and_is_not_created(share: Path, tmp_path: Path) -> None:
    assert isinstance(refused(share, Mount("/x", str(tmp_path / "none"))), InvalidArgumentError)
    assert not (tmp_path / "none").exists()


def test_bidirectional_propagation_is_refused(share: Path, tmp_path: Path) -> None:
    assert isinstance(
        refused(share, Mount("/x", str(tmp_path), propagation=Propagation.BIDIRECTIONAL)), UnsupportedError
    )


def test_the_number_of_mounts_is_bounded(share: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="257 entries"):
        volumes.bind(share, SANDBOX, CONTAINER, [Mount(f"/{n}", str(tmp_path)) for n in range(257)], VIRTIOFSD)


def test_submounts_are_bounded_and_decide_who_holds_read_only(
    share: Path, namespace: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Mount("/x", str(tmp_path), readonly=True)
    deep = Mount("/y", str(tmp_path), readonly=True, recursive_read_only=True)
    monkeypatch.setattr(namespace, "mounts_at", lambda name: 2)
    bound = volumes.bind(share, SANDBOX, CONTAINER, (plain, deep), VIRTIOFSD)
    assert [b.guest_readonly for b in bound] == [False, True]
    monkeypatch.setattr(namespace, "mounts_at", lambda name: volumes.MAX_SUBMOUNTS + 2)
    with pytest.raises(InvalidArgumentError, match="4097 mounts below it"):
        volumes.bind(share, SANDBOX, "d" * 64, (plain,), VIRTIOFSD)


@pytest.mark.parametrize("step", ["clone", "change", "attach"])
def test_a_mount_that_fails_is_told_by_field_and_undone(
    share: Path, namespace: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: object, **__: object) -> int:
        raise OSError(12, "Cannot allocate memory", step)

    open_before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    monkeypatch.setattr(namespace if step == "attach" else mount_tree, step, fail)
    error = refused(share, Mount("/x", str(tmp_path)))
    assert f"{step}: Cannot allocate memory" in str(error)
    volumes.unbind(share, SANDBOX, CONTAINER, VIRTIOFSD)
    assert points(share) == []
    assert len(os.listdir("/proc/self/fd")) == open_before  # noqa: PTH208


def test_a_sandbox_without_a_share_takes_no_mounts(tmp_path: Path) -> None:
    assert volumes.bind(tmp_path, SANDBOX, CONTAINER, (), None) == ()
    with pytest.raises(FailedPreconditionError, match="no file share"):
        volumes.bind(tmp_path, SANDBOX, CONTAINER, (Mount("/x", "/"),), None)


@pytest.mark.parametrize("known", [True, False])
def test_volumes_of_a_virtiofsd_that_ended(share: Path, namespace: Namespace, tmp_path: Path, known: bool) -> None:
    """Its mounts went with it: what is left on disk is removed, whether or not its end is known already."""
    mounts = (Mount("/a", str(tmp_path)),)
    volumes.bind(share, SANDBOX, CONTAINER, mounts, VIRTIOFSD)
    namespace.gone = True
    with pytest.raises(VmGoneError):
        volumes.bind(share, SANDBOX, "d" * 64, mounts, VIRTIOFSD)
    for container in (CONTAINER, "d" * 64):
        volumes.unbind(share, SANDBOX, container, None if known else VIRTIOFSD)
    assert points(share) == []
    volumes.remove(share, SANDBOX)
    assert volumes.vm_ids(share) == []


def test_a_volume_that_cannot_be_unmounted_stays_known(
    share: Path, namespace: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volumes.bind(share, SANDBOX, CONTAINER, (Mount("/a", str(tmp_path)),), VIRTIOFSD)

    def fail(name: str) -> None:
        raise OSError(errno.EPERM, "Operation not permitted", name)

    with monkeypatch.context() as patch:
        patch.setattr(namespace, "detach", fail)
        with pytest.raises(VmrtError, match="could not be unmounted: Operation not permitted"):
            volumes.unbind(share, SANDBOX, CONTAINER, VIRTIOFSD)
    assert len(points(share)) == 1
    volumes.unbind(share, SANDBOX, CONTAINER, VIRTIOFSD)
    assert points(share) == []
    assert not +namespace.mounts


def test_removal_deletes_mount_points_and_never_what_is_in_them(tmp_path: Path) -> None:
    files = volumes.directory(tmp_path, SANDBOX) / "files"
    (files / "0").mkdir(parents=True)
    (files / "1").touch()
    (volumes.directory(tmp_path, SANDBOX) / "users" / CONTAINER).mkdir(parents=True)
    kept = files / "0" / "somebody's data"
    kept.touch()
    assert volumes.vm_ids(tmp_path) == [SANDBOX]
    with pytest.raises(VmrtError, match="not empty"):
        volumes.remove(tmp_path, SANDBOX)
    assert kept.exists()
    kept.unlink()
    for _ in range(2):
        volumes.remove(tmp_path, SANDBOX)
    assert volumes.vm_ids(tmp_path) == []
    volumes.unbind(tmp_path, SANDBOX, CONTAINER, VIRTIOFSD)


def test_mount_points_are_found_whatever_their_names() -> None:
    assert "/proc" in [entry.place for entry in mount_tree.entries(Path("/proc"))]
    assert mount_tree._unescape("/a\\040b\\011\\012c\\134d") == "/a b\t\nc\\d"


def test_guest_options_follow_who_holds_read_only() -> None:
    def options(**fields: object) -> list[str]:
        readonly = bool(fields.pop("guest_readonly", True))
        mount = Mount("/x", "/y", **fields)  # type: ignore[arg-type]
        done: list[str] = oci._volume_mount(oci.BoundMount(mount, "/z", readonly))["options"]
        return done

    assert options() == ["rbind", "rprivate", "rw"]
    assert options(readonly=True) == ["rbind", "rprivate", "ro"]
    assert options(readonly=True, guest_readonly=False) == ["rbind", "rprivate", "rw"]
    assert options(propagation=Propagation.HOST_TO_CONTAINER) == ["rbind", "rslave", "rw"]
