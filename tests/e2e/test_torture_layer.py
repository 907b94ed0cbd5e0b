"""A layer with everything a tar can hold, seen from inside a container: what goes in comes out."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator

import pytest

from demo import busybox_image
from demo.daemon import Daemon
from tests.e2e.conftest import Pod
from vmrt.proto.runtime.v1 import api_pb2 as cri

IMAGE = "docker.io/library/vmrt-torture:latest"
MTIME = 1_234_567_890
LONG = "n" * 255


def entry(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields: object) -> None:
    info = tarfile.TarInfo(name)
    info.mtime, info.mode, info.size = MTIME, 0o644, len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data) if info.isreg() else None)


def archive(*entries: tuple[str, bytes, dict[str, object]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data, fields in entries:
            entry(tar, name, data, **fields)
    return out.getvalue()


LOWER = archive(
    ("t", b"", {"type": tarfile.DIRTYPE, "mode": 0o751, "uid": 7, "gid": 8}),
    ("t/removed", b"x", {}),
    ("t/replaced", b"old", {}),
    ("t/opaque", b"", {"type": tarfile.DIRTYPE, "mode": 0o755}),
    ("t/opaque/hidden", b"x", {}),
    ("t/gone", b"", {"type": tarfile.DIRTYPE, "mode": 0o755}),
    ("t/gone/deep", b"x", {}),
)
UPPER = archive(
    ("t/.wh.removed", b"", {}),
    ("t/.wh.gone", b"", {}),
    ("t/replaced", b"new", {"uid": 70000, "gid": 70001, "mode": 0o640}),
    ("t/opaque", b"", {"type": tarfile.DIRTYPE, "mode": 0o755}),
    ("t/opaque/.wh..wh..opq", b"", {}),
    ("t/opaque/shown", b"x", {}),
    ("t/setuid", b"x", {"mode": 0o4755}),
    ("t/setgid", b"x", {"mode": 0o2755}),
    ("t/sticky", b"", {"type": tarfile.DIRTYPE, "mode": 0o1777}),
    ("t/first", b"linked", {}),
    ("t/second", b"", {"type": tarfile.LNKTYPE, "linkname": "t/first"}),
    ("t/symlink", b"", {"type": tarfile.SYMTYPE, "linkname": "../etc/passwd"}),
    ("t/null", b"", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3, "mode": 0o666}),
    ("t/disk", b"", {"type": tarfile.BLKTYPE, "devmajor": 259, "devminor": 70000, "mode": 0o600}),
    ("t/fifo", b"", {"type": tarfile.FIFOTYPE}),
    ("t/empty", b"", {}),
    ("t/block", b"b" * 4096, {}),
    ("t/odd", bytes(range(256)) * 4097, {}),
    (f"t/{LONG}", b"long", {}),
    ("t/\u00e9 space", b"x", {}),
    ("t/capable", b"x", {"pax_headers": {"SCHILY.xattr.user.note": "kept"}}),
    *((f"t/many/{n:04}", b"%d" % n, {}) for n in range(600)),
)


@pytest.fixture(scope="module")
def torture(daemon: Daemon, pod: Pod, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A container that sleeps over the torture image."""
    layout = tmp_path_factory.mktemp("torture") / "layout"
    layers = [busybox_image.layer(busybox_image.busybox()), LOWER, UPPER]
    busybox_image.write_layout(layout, IMAGE, layers, {})
    daemon.load(layout)
    container = pod.run("sleep", "1000", image=IMAGE)
    yield container
    pod.remove(container)
    daemon.images.RemoveImage(cri.RemoveImageRequest(image=cri.ImageSpec(image=IMAGE)))


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("stat -c '%a %u %g %Y' t", f"751 7 8 {MTIME}"),
        ("ls t/removed t/gone 2>/dev/null; echo none", "none"),
        ("cat t/replaced; stat -c ' %a %u %g' t/replaced", "new 640 70000 70001"),
        ("ls t/opaque", "shown"),
        ("stat -c %a t/setuid t/setgid t/sticky", "4755\n2755\n1777"),
        ("stat -c %h t/first t/second; cat t/second; [ t/first -ef t/second ] && echo same", "2\n2\nlinkedsame"),
        ("readlink t/symlink; grep -c root: t/symlink", "../etc/passwd\n1"),
        ("stat -c '%F %t %T %a' t/null", "character special file 1 3 666"),
        ("stat -c '%F %t %T' t/disk", "block special file 103 11170"),
        ("stat -c %F t/fifo", "fifo"),
        ("stat -c '%s %Y' t/empty t/block t/odd", f"0 {MTIME}\n4096 {MTIME}\n{256 * 4097} {MTIME}"),
        (f"cat t/{LONG}; ls t | grep -c space", "long1"),
        ("ls t/many | wc -l; cat t/many/0000 t/many/0599", "600\n0599"),
    ],
)
def test_seen_from_inside(pod: Pod, torture: str, script: str, expected: str) -> None:
    done = pod.execute(torture, "sh", "-c", script)
    assert (done.stdout.decode().strip(), done.stderr) == (expected, b"")


def test_content_is_whole(pod: Pod, torture: str) -> None:
    import hashlib

    sums = pod.execute(torture, "sha256sum", "t/odd", "t/block").stdout.decode().split()
    assert sums[0::2] == [hashlib.sha256(d).hexdigest() for d in (bytes(range(256)) * 4097, b"b" * 4096)]


def test_the_writable_layer_is_the_containers_own(pod: Pod, torture: str) -> None:
    assert pod.execute(torture, "sh", "-c", "echo mine > t/replaced; rm t/first; mkdir t/gone").exit_code == 0
    other = pod.output("sh", "-c", "cat t/replaced t/first; ls t/gone 2>/dev/null || true", image=IMAGE, name="other")
    assert other == "newlinked"


def test_a_file_with_attributes_can_be_copied_up(pod: Pod, torture: str) -> None:
    # busybox has no getfattr. An overlay copy-up reads them from the layer and fails where it cannot.
    done = pod.execute(torture, "sh", "-c", "chmod 600 t/capable && stat -c %a t/capable")
    assert done.stdout == b"600\n"
