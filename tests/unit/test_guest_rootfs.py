"""The root tree: what goes in, where it lies, and the agent's bindings."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest

import vmrt.agent
from vmrt.agent import layout
from vmrt.errors import VmrtError
from vmrt.guest_image import bindings, rootfs
from vmrt.guest_image.builder import agent_files
from vmrt.guest_image.release import choose

AGENT = Path(vmrt.agent.__file__).parent
BOOKWORM, TRIXIE = choose("bookworm"), choose("trixie")


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("lib/x86_64-linux-gnu/libc.so.6", "usr/lib/x86_64-linux-gnu/libc.so.6"),
        ("lib64/ld-linux-x86-64.so.2", "usr/lib64/ld-linux-x86-64.so.2"),
        ("bin/kmod", "usr/bin/kmod"),
        ("usr/bin/crun", "usr/bin/crun"),
        ("etc/lib/x", "etc/lib/x"),
    ],
)
def test_merged_usr(path: str, wanted: str) -> None:
    assert rootfs.merged(PurePosixPath(path)) == wanted


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("usr/lib/python3.11/threading.py", True),
        ("usr/lib/python3.11/json/decoder.py", True),
        ("usr/lib/python3.11/lib-dynload/_ctypes.cpython-311-x86_64-linux-gnu.so", True),
        ("usr/lib/python3.11/lib-dynload/_ctypes_test.cpython-311-x86_64-linux-gnu.so", False),
        ("usr/lib/python3.11/lib-dynload/_hashlib.cpython-311-x86_64-linux-gnu.so", False),
        ("usr/lib/python3.11/test/support/__init__.py", False),
        ("usr/lib/python3.11/json/__pycache__/decoder.cpython-311.pyc", False),
        ("usr/lib/python3/dist-packages/x.py", False),
        ("usr/share/doc/python3.11/copyright", False),
    ],
)
def test_what_of_the_standard_library_goes_in(path: str, wanted: bool) -> None:
    assert rootfs._wanted_python(path, BOOKWORM) is wanted
    later = path.replace("3.11", "3.13").replace("311", "313")
    assert rootfs._wanted_python(later, TRIXIE) is wanted
    assert not rootfs._wanted_python(path, TRIXIE)


def package(directory: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    return directory


def test_a_missing_program_is_named(tmp_path: Path) -> None:
    parts = [package(tmp_path / "p", {"bin/busybox": b"#!", "usr/bin/crun": b"#!"})]
    (tmp_path / "tree").mkdir()
    with pytest.raises(VmrtError, match="no package holds usr/bin/kmod"):
        rootfs.assemble_base(tmp_path / "tree", parts, tmp_path, BOOKWORM)


def test_a_missing_library_is_named_with_who_needs_it(tmp_path: Path) -> None:
    program = Path(sys.executable).resolve().read_bytes()
    names = ("usr/bin/busybox", "usr/bin/crun", "usr/bin/kmod", "usr/bin/python3.13")
    parts = [package(tmp_path / "p", dict.fromkeys(names, program))]
    (tmp_path / "site/google/protobuf").mkdir(parents=True)
    (tmp_path / "tree").mkdir()
    with pytest.raises(VmrtError, match=r"needs lib\w+\.so\.\d+, which no package holds"):
        rootfs.assemble_base(tmp_path / "tree", parts, tmp_path / "site", TRIXIE)


def test_modes_do_not_depend_on_the_umask(tmp_path: Path) -> None:
    package(tmp_path, {"tmp/x": b"", "var/tmp/x": b"", "root/x": b"", "usr/bin/x": b""})
    (tmp_path / "usr/bin/x").chmod(0o700)
    (tmp_path / "tmp/x").chmod(0o600)
    (tmp_path / "usr").chmod(0o700)
    (tmp_path / "link").symlink_to("/nowhere")
    rootfs.normalise(tmp_path)
    modes = {name: (tmp_path / name).stat().st_mode & 0o7777 for name in ("usr", "usr/bin/x", "tmp/x", "tmp", "root")}
    assert modes == {"usr": 0o755, "usr/bin/x": 0o755, "tmp/x": 0o644, "tmp": 0o1777, "root": 0o700}


def test_the_agent_is_laid_over_and_the_version_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "usr/lib").mkdir(parents=True)
    for version in ("old", "abc123"):
        rootfs.add_agent(
            tmp_path,
            TRIXIE.library,
            {"vmrt/agent/__init__.py": version.encode()},
            {layout.EXEC_PROGRAM: version.encode()},
            version,
        )
    assert (tmp_path / "usr/lib/python3.13/vmrt/agent/__init__.py").read_text() == "abc123"
    assert (tmp_path / "etc/vmrt-guest-version").read_text() == "abc123\n"
    program = tmp_path / "usr/lib/vmrt-exec"
    assert (program.read_bytes(), program.stat().st_mode & 0o777) == (b"abc123", 0o755)
    assert 'IMAGE_VERSION="abc123"\n' in (tmp_path / "etc/os-release").read_text()


def test_which_tool_writes_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"mkfs.erofs", "mksquashfs"}
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if name in installed else None)
    assert rootfs.choose_filesystem() == "erofs"
    installed.remove("mkfs.erofs")
    assert rootfs.choose_filesystem() == "squashfs"
    installed.clear()
    with pytest.raises(VmrtError, match="install Debian's erofs-utils"):
        rootfs.choose_filesystem()


def test_the_agents_files(tmp_path: Path) -> None:
    files = agent_files(AGENT)
    assert {"vmrt/__init__.py", "vmrt/agent/__main__.py", "vmrt/agent/agent_pb2.py"} < files.keys()
    assert files["vmrt/agent/layout.py"] == (AGENT / "layout.py").read_bytes()
    assert all(name.endswith(".py") for name in files)
    (tmp_path / "__init__.py").touch()
    with pytest.raises(VmrtError, match="make stubs"):
        agent_files(tmp_path)


_COMPARE = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("slim", sys.argv[1])
slim = importlib.util.module_from_spec(spec)
spec.loader.exec_module(slim)
heavy = {"google.protobuf.descriptor_pool", "google.protobuf.text_format", "calendar"} & sys.modules.keys()
assert not heavy, f"the bindings import {heavy}"
# Every message, with every kind of field it has, there and back.
names = [name for name in slim.DESCRIPTOR.message_types_by_name]
request = slim.ConfigureSandboxRequest(sandbox_id="a", sysctls={"k": "v"}, shm_bytes=2**40, entropy=b"\\xff")
request.interfaces.add(name="eth0", addresses=["10.0.0.2/24", "fd00::2/64"])
assert slim.ConfigureSandboxRequest.FromString(request.SerializeToString()) == request
user = slim.User(uid=0)
assert user.HasField("uid") and not user.HasField("gid")
hello = slim.StreamHello(exec=slim.ExecStream(args=["x"]))
assert hello.WhichOneof("kind") == "exec"
assert slim.ContainerInfo(state=slim.ContainerInfo.RUNNING).state == slim.ContainerInfo.State.Value("RUNNING")
assert slim.FrameType.Name(slim.EXIT) == "EXIT"
from google.protobuf.message import DecodeError, Message
assert isinstance(user, Message)
try:
    slim.User.FromString(b"\\xff\\xff")
except DecodeError:
    pass
else:
    raise AssertionError("damaged octets were taken")
own = {"EnumTypeWrapper", "Message", "ModuleType"}
print(*sorted(name for name in vars(slim) if name[0].isupper() and name not in own))
"""


def test_the_guests_bindings_are_the_generated_ones_without_their_weight(tmp_path: Path) -> None:
    """In an interpreter of its own: two pools of one process must not know each other."""
    module = tmp_path / "slim.py"
    module.write_bytes(bindings.slim((AGENT / "agent_pb2.py").read_bytes()))
    slim = subprocess.run([sys.executable, "-S", "-c", _COMPARE, module], env=_path(), capture_output=True, text=True)
    assert slim.returncode == 0, slim.stderr
    generated = "import vmrt.agent.agent_pb2 as pb\nprint(*sorted(name for name in vars(pb) if name[0].isupper()))\n"
    full = subprocess.run([sys.executable, "-c", generated], capture_output=True, text=True, cwd=AGENT.parents[1])
    assert slim.stdout == full.stdout


def _path() -> dict[str, str]:
    return {"PYTHONPATH": ":".join(path for path in sys.path if path)}


@pytest.mark.parametrize("source", [b"", b"x = 1", b"p.AddSerializedFile(b'a'); p.AddSerializedFile(b'b')"])
def test_other_generated_code_is_refused(source: bytes) -> None:
    with pytest.raises(VmrtError, match="instead of one"):
        bindings.slim(source)
