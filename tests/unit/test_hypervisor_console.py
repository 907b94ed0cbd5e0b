import asyncio
import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from vmrt.hypervisor.console import Console, ConsoleRing, printable

LIMIT = 64


def test_control_codes_and_broken_text_are_shown_as_such() -> None:
    assert printable(b"a\tb\r\nc") == "a\tb\nc"
    assert printable(b"\x1b[31mred\x00\xff\xc2\x9b") == "\ufffd[31mred\ufffd\ufffd\ufffd"


@given(st.binary(max_size=300))
def test_printable_takes_anything(octets: bytes) -> None:
    assert all(
        character in "\t\n" or character.isprintable() or ord(character) >= 0xA0 for character in printable(octets)
    )


@given(st.lists(st.binary(max_size=3 * LIMIT), max_size=12))
def test_ring_keeps_the_end_and_the_files_stay_bounded(chunks: list[bytes]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "console"
        ring = ConsoleRing(path, LIMIT)
        for chunk in chunks:
            ring.append(chunk)
        whole = b"".join(chunks)
        assert ring.tail(LIMIT) == printable(whole[-LIMIT:])
        assert all(file.stat().st_size <= LIMIT for file in Path(directory).iterdir())
        assert len(list(Path(directory).iterdir())) <= 2
        again = ConsoleRing(path, LIMIT)
        again.load()
        assert again.tail(LIMIT) == ring.tail(LIMIT)


def test_tail_is_bounded_by_the_asker(tmp_path: Path) -> None:
    ring = ConsoleRing(tmp_path / "console", LIMIT)
    ring.append(b"0123456789")
    assert (ring.tail(3), ring.tail(0), ring.tail(-1)) == ("789", "", "")


def test_a_full_disk_costs_only_the_files(tmp_path: Path) -> None:
    ring = ConsoleRing(tmp_path / "absent" / "console", LIMIT)
    ring.append(b"kept")
    assert ring.tail(LIMIT) == "kept"


async def test_qemu_connects_again_and_the_newest_connection_wins(tmp_path: Path) -> None:
    path = tmp_path / "console.sock"
    console = Console(path, ConsoleRing(tmp_path / "console", LIMIT))
    await console.listen((os.getuid(), os.getgid()))
    writers = []
    for text in (b"one ", b"two"):
        _, writer = await asyncio.open_unix_connection(path)
        writer.write(text)
        await writer.drain()
        writers.append(writer)
        async with asyncio.timeout(5):
            while not console.tail(LIMIT).endswith(text.decode()):
                await asyncio.sleep(0.001)
    for writer in writers:
        writer.close()
    await console.drain(1)
    await console.close()
    assert console.tail(LIMIT) == "one two"
    assert not path.exists()
