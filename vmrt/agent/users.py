"""Which uid, gid and groups a container's process gets, from the image's /etc/passwd and /etc/group.

Precedence as in CRI and the OCI image specification (config.md, User): a uid or user name asked for by the pod, else
the image's USER string; a group asked for overrides the user's primary group; memberships in the image's group file
are added unless the pod wants only its own (`strict_groups`). All parsing is pure; files are read through the root
file system's descriptor and never through a symbolic link that leads out of it.
"""

from __future__ import annotations

import os

from vmrt.agent import agent_pb2 as pb
from vmrt.agent import kernel, status

MAX_FILE_BYTES = 1024 * 1024
MAX_ID = 2**32 - 2


class Identity:
    """What a process runs as; `home` is "" when the image's passwd file does not know the uid."""

    __slots__ = ("gid", "groups", "home", "uid")

    def __init__(self, uid: int, gid: int, groups: tuple[int, ...], home: str) -> None:
        self.uid = uid
        self.gid = gid
        self.groups = groups
        self.home = home


class _Account:
    def __init__(self, name: str, uid: int, gid: int, home: str) -> None:
        self.name = name
        self.uid = uid
        self.gid = gid
        self.home = home


def _number(text: str) -> int | None:
    # Not int(): that would take "+1", "1_0" and digits of other scripts.
    if not (text.isascii() and text.isdigit()) or len(text) > 10:
        return None
    value = int(text)
    return value if value <= MAX_ID else None


def _accounts(passwd: str) -> list[_Account]:
    accounts = []
    for line in passwd.splitlines():
        fields = line.split(":")
        if len(fields) < 7:
            continue
        uid, gid = _number(fields[2]), _number(fields[3])
        if uid is not None and gid is not None:
            accounts.append(_Account(fields[0], uid, gid, fields[5]))
    return accounts


def _groups(group: str) -> list[tuple[str, int, list[str]]]:
    groups = []
    for line in group.splitlines():
        fields = line.split(":")
        gid = _number(fields[2]) if len(fields) >= 4 else None
        if gid is not None:
            groups.append((fields[0], gid, [name for name in fields[3].split(",") if name]))
    return groups


def resolve(user: pb.User, passwd: str, group: str) -> Identity:
    """Resolve a user. Raises `AgentError` (INVALID_ARGUMENT) naming what the image does not have."""
    accounts, groups = _accounts(passwd), _groups(group)
    image_user, _, image_group = user.image_user.partition(":")
    asked = user.HasField("uid") or bool(user.username)
    wanted = str(user.uid) if user.HasField("uid") else user.username or image_user or "0"
    account = _find_account(accounts, wanted, by_name=not user.HasField("uid"))
    uid = account.uid if account else _number(wanted)
    if uid is None:
        raise status.AgentError(status.INVALID_ARGUMENT, f"user {wanted!r} is not in the image's /etc/passwd")
    if user.HasField("gid"):
        gid = user.gid
    elif image_group and not asked:
        gid = _find_group(groups, image_group)
    else:
        gid = account.gid if account else 0
    members = [gid]
    # As with runc: an explicit group in the image's USER replaces the user's memberships.
    if account and not user.strict_groups and (asked or not image_group):
        members += [found for _, found, names in groups if account.name in names]
    members += user.supplemental_groups
    return Identity(uid, gid, tuple(dict.fromkeys(members)), account.home if account else "")


def _find_account(accounts: list[_Account], wanted: str, *, by_name: bool) -> _Account | None:
    if by_name:
        for account in accounts:
            if account.name == wanted:
                return account
    uid = _number(wanted)
    return next((account for account in accounts if account.uid == uid), None)


def _find_group(groups: list[tuple[str, int, list[str]]], wanted: str) -> int:
    for name, gid, _ in groups:
        if name == wanted:
            return gid
    number = _number(wanted)
    if number is None:
        raise status.AgentError(status.INVALID_ARGUMENT, f"group {wanted!r} is not in the image's /etc/group")
    return number


def read_text(root_fd: int, path: str) -> str:
    """Read a file of the root file system; "" when it is absent, no regular file or larger than 1 MiB."""
    try:
        # O_NONBLOCK: an image may put a FIFO there.
        fd = kernel.open_in_root(root_fd, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return ""
    try:
        import stat

        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_size > MAX_FILE_BYTES:
            return ""
        return os.read(fd, MAX_FILE_BYTES).decode(errors="replace")
    finally:
        os.close(fd)


def make_directory(root_fd: int, path: str, owner: tuple[int, int] = (0, 0)) -> None:
    """Make a directory and its parents inside the root file system, as mkdir -p run chrooted there would.

    What is made belongs to `owner`, a uid and a gid of the guest.
    """
    parts = [part for part in path.split("/") if part and part != "."]
    for depth in range(1, len(parts) + 1):
        here = "/".join(parts[:depth])
        try:
            os.close(kernel.open_in_root(root_fd, here, os.O_PATH | os.O_DIRECTORY))
        except FileNotFoundError:
            parent = kernel.open_in_root(root_fd, "/".join(parts[: depth - 1]), os.O_PATH | os.O_DIRECTORY)
            try:
                os.mkdir(parts[depth - 1], 0o755, dir_fd=parent)
                if owner != (0, 0):
                    os.chown(parts[depth - 1], *owner, dir_fd=parent, follow_symlinks=False)
            finally:
                os.close(parent)
