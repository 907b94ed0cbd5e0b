"""The initramfs archive, its plan, and the modules in it."""

from __future__ import annotations

import asyncio
import lzma
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmrt.errors import VmrtError
from vmrt.guest_image import cpio, elf, initramfs, modules

FIELDS = (
    *("ino", "mode", "uid", "gid", "nlink", "mtime", "filesize", "devmajor", "devminor", "rdevmajor", "rdevminor"),
    *("namesize", "check"),
)


def members(archive: bytes) -> list[tuple[str, dict[str, int], bytes]]:
    """An independent reader of newc: name, fields, data; the trailer must end it."""
    found: list[tuple[str, dict[str, int], bytes]] = []
    position = 0
    while True:
        assert position % 4 == 0
        assert archive[position : position + 6] == b"070701"
        header = archive[position + 6 : position + 6 + 8 * len(FIELDS)]
        fields = {name: int(header[8 * i : 8 * i + 8], 16) for i, name in enumerate(FIELDS)}
        start = position + 6 + 8 * len(FIELDS)
        name = archive[start : start + fields["namesize"]]
        assert name.endswith(b"\0")
        data_at = start + fields["namesize"] + -(start + fields["namesize"]) % 4
        data = archive[data_at : data_at + fields["filesize"]]
        position = data_at + fields["filesize"] + -(data_at + fields["filesize"]) % 4
        if name == b"TRAILER!!!\0":
            assert position == len(archive)
            return found
        found.append((name[:-1].decode(), fields, data))


@given(st.lists(st.tuples(st.from_regex(r"[a-z]{1,20}", fullmatch=True), st.binary(max_size=70)), max_size=8))
def test_every_file_comes_back(files: list[tuple[str, bytes]]) -> None:
    back = members(cpio.archive(cpio.file(name, data) for name, data in files))
    assert [(name, data) for name, _, data in back] == files
    assert [fields["ino"] for _, fields, _ in back] == list(range(1, len(files) + 1))


def test_types_owners_and_times() -> None:
    entries = [cpio.directory("d"), cpio.file("d/x", b"#!", 0o755), cpio.character_device("c", 5, 1)]
    back = {name: fields for name, fields, _ in members(cpio.archive(entries))}
    assert back["d"]["mode"] == stat.S_IFDIR | 0o755
    assert back["d/x"]["mode"] == stat.S_IFREG | 0o755
    assert back["c"]["mode"] == stat.S_IFCHR | 0o600
    assert (back["c"]["rdevmajor"], back["c"]["rdevminor"]) == (5, 1)
    assert all(fields["uid"] == fields["gid"] == fields["mtime"] == 0 for fields in back.values())


@pytest.mark.skipif(shutil.which("cpio") is None, reason="cpio is not installed")
def test_cpio_itself_lists_it() -> None:
    archive = cpio.archive([cpio.directory("dev"), cpio.file("dev/a", b"abc")])
    listed = subprocess.run(["cpio", "-t", "--quiet"], input=archive, capture_output=True, check=True)
    assert listed.stdout.split() == [b"dev", b"dev/a"]


def test_the_initramfs_loads_in_the_order_given(tmp_path: Path) -> None:
    files = [tmp_path / "z.ko", tmp_path / "a.ko.xz"]
    files[0].write_bytes(b"z.ko")
    files[1].write_bytes(lzma.compress(b"a.ko"))
    back = {name: data for name, _, data in members(initramfs.build(b"INIT", files, "erofs", ("/bin/x", "-y")))}
    assert back["plan"] == b"load /modules/z.ko\nload /modules/a.ko\nroot vmrt-root erofs\nexec /bin/x -y\n"
    assert back["modules/a.ko"] == b"a.ko"
    assert back["init"] == b"INIT"
    assert {"dev", "dev/console", "root", "sys", "modules"} < back.keys()


def signed(module: bytes, signature: bytes) -> bytes:
    return module + signature + bytes(8) + len(signature).to_bytes(4, "big") + b"~Module signature appended~\n"


@given(st.binary(min_size=1, max_size=200), st.binary(max_size=600))
def test_signatures_come_off(module: bytes, signature: bytes) -> None:
    assert modules.without_signature(signed(module, signature)) == module


def test_an_unsigned_module_is_left_alone() -> None:
    assert modules.without_signature(b"\x7fELF...") == b"\x7fELF..."


def test_a_damaged_signature_is_refused() -> None:
    damaged = b"short" + bytes(8) + (9999).to_bytes(4, "big") + b"~Module signature appended~\n"
    with pytest.raises(VmrtError, match="damaged module signature of 9999"):
        modules.without_signature(damaged)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
def test_init_is_static_the_same_every_time_and_names_what_it_misses(tmp_path: Path) -> None:
    first, second = (asyncio.run(initramfs.compile_program(initramfs.INIT_SOURCE)) for _ in range(2))
    assert first == second
    program = tmp_path / "init"
    program.write_bytes(first)
    program.chmod(0o755)
    # This machine has no /plan: /init must say so and fail, never hang.
    assert not Path("/plan").exists()
    ended = subprocess.run([program], capture_output=True, timeout=10)
    assert ended.returncode == 1
    assert ended.stderr == b"vmrt-init: cannot read /plan: errno 2\n"


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
def test_the_zygote_replaces_one_name_of_the_c_library_and_needs_none(tmp_path: Path) -> None:
    first, second = (asyncio.run(initramfs.compile_program(initramfs.ZYGOTE_SOURCE)) for _ in range(2))
    assert first == second
    assert elf.needs(first) == elf.Needs((), "")
    library = tmp_path / "zygote.so"
    library.write_bytes(first)
    listed = subprocess.run(["nm", "-D", library], check=True, capture_output=True, text=True, timeout=60).stdout
    # A memcpy of ours would else be crun's.
    assert [line.split()[-2:] for line in listed.splitlines()] == [["T", "__libc_start_main"], ["U", "dlsym"]]
