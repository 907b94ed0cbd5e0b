import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmrt.agent import agent_pb2 as pb
from vmrt.agent import status, users

PASSWD = "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001:App:/home/app:/bin/sh\n1234:x:55:56::/odd:/bin/sh\nbroken:x\n"
GROUP = "root:x:0:\nstaff:x:50:app,root\nextra:x:2000:app\nbad:x:y:\n"


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        (pb.User(), (0, 0, (0, 50), "/root")),
        (pb.User(image_user="app"), (1000, 1001, (1001, 50, 2000), "/home/app")),
        (pb.User(image_user="1000"), (1000, 1001, (1001, 50, 2000), "/home/app")),
        (pb.User(image_user="app:extra"), (1000, 2000, (2000,), "/home/app")),
        (pb.User(image_user="4000:4001"), (4000, 4001, (4001,), "")),
        (pb.User(image_user="4000"), (4000, 0, (0,), "")),
        (pb.User(image_user="1234"), (55, 56, (56,), "/odd")),  # a name of digits wins over the number
        (pb.User(uid=1234), (1234, 0, (0,), "")),  # but a uid is a number
        (pb.User(uid=1000), (1000, 1001, (1001, 50, 2000), "/home/app")),
        (pb.User(uid=1000, gid=7), (1000, 7, (7, 50, 2000), "/home/app")),
        (pb.User(uid=0, image_user="app:extra"), (0, 0, (0, 50), "/root")),
        (pb.User(username="app", supplemental_groups=[9, 50]), (1000, 1001, (1001, 50, 2000, 9), "/home/app")),
        (pb.User(username="app", supplemental_groups=[9], strict_groups=True), (1000, 1001, (1001, 9), "/home/app")),
    ],
)
def test_resolution(user: pb.User, expected: tuple[int, int, tuple[int, ...], str]) -> None:
    found = users.resolve(user, PASSWD, GROUP)
    assert (found.uid, found.gid, found.groups, found.home) == expected


@pytest.mark.parametrize("user", [pb.User(username="nobody"), pb.User(image_user="app:none"), pb.User(username="-1")])
def test_what_the_image_lacks_is_named(user: pb.User) -> None:
    with pytest.raises(status.AgentError, match="not in the image") as caught:
        users.resolve(user, PASSWD, GROUP)
    assert caught.value.code == status.INVALID_ARGUMENT


@given(st.text(), st.text(), st.text())
def test_any_files_resolve_or_are_refused(name: str, passwd: str, group: str) -> None:
    try:
        found = users.resolve(pb.User(image_user=name), passwd, group)
    except status.AgentError:
        return
    assert 0 <= found.uid <= users.MAX_ID
    assert all(0 <= gid <= users.MAX_ID for gid in found.groups)


def test_links_in_the_image_do_not_lead_out(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("host")
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc/passwd").symlink_to(tmp_path / "secret")
    (root / "etc/up").symlink_to("../../secret")
    (root / "etc/good").symlink_to("/etc/real")
    (root / "etc/real").write_text("image")
    os.mkfifo(root / "etc/fifo")
    fd = os.open(root, os.O_PATH | os.O_DIRECTORY)
    try:
        assert users.read_text(fd, "etc/passwd") == ""
        assert users.read_text(fd, "etc/up") == ""
        assert users.read_text(fd, "etc/good") == "image"
        assert users.read_text(fd, "etc/fifo") == ""
        assert users.read_text(fd, "etc/absent") == ""
        (root / "out").symlink_to(tmp_path)
        users.make_directory(fd, "/made/../made/a/./b")
        with pytest.raises(OSError):
            users.make_directory(fd, "/etc/real/x")
        assert (root / "made/a/b").is_dir()
    finally:
        os.close(fd)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["root", "secret"]


def test_a_huge_passwd_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "passwd").write_bytes(b"x" * (users.MAX_FILE_BYTES + 1))
    fd = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    try:
        assert users.read_text(fd, "passwd") == ""
    finally:
        os.close(fd)
