"""The one door to subprocesses, tried with real ones."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from vmrt import spawn
from vmrt.errors import DeadlineError, ProcessError
from vmrt.spawn import ProcessId


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait for what another process does; the deadline only keeps a failing test from hanging."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


def runs(pid: int) -> bool:
    return spawn.identify(pid) is not None


def children() -> list[str]:
    """The children of this process that are there, zombies too."""
    while True:
        # A thread that ends meanwhile hands its children to another one: look again.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            threads = list(Path("/proc/self/task").iterdir())
            return [pid for thread in threads for pid in (thread / "children").read_text().split()]


async def pid_in(path: Path) -> int:
    await eventually(lambda: path.exists() and path.read_text().endswith("\n"))
    return int(path.read_text())


@contextlib.asynccontextmanager
async def detached(*argv: str, **options: int) -> AsyncIterator[ProcessId]:
    process = spawn.detached(argv, **options)  # type: ignore[arg-type]
    try:
        yield process
    finally:
        spawn.terminate(process)
        await eventually(lambda: not spawn.alive(process))


async def test_run_returns_output_and_status() -> None:
    done = await spawn.run(["sh", "-c", "echo out; echo err >&2; exit 3"], check=False)
    assert (done.status, done.stdout, done.stderr) == (3, b"out\n", b"err\n")


async def test_text_replaces_what_is_no_utf8() -> None:
    assert (await spawn.run(["printf", r"a\377b"])).text() == "a\N{REPLACEMENT CHARACTER}b"


async def test_run_feeds_more_than_a_pipe_holds() -> None:
    payload = bytes(range(256)) * 4096
    assert (await spawn.run(["cat"], input_bytes=payload)).stdout == payload


async def test_a_child_may_leave_its_input_unread() -> None:
    assert (await spawn.run(["true"], input_bytes=b"x" * 1024 * 1024)).status == 0


async def test_stdin_is_empty_unless_given() -> None:
    assert (await spawn.run(["cat"])).stdout == b""


async def test_no_shell_touches_the_arguments() -> None:
    assert (await spawn.run(["printf", "%s", "$HOME; `id` *"])).stdout == b"$HOME; `id` *"


async def test_environment_and_directory(tmp_path: Path) -> None:
    done = await spawn.run(["/bin/sh", "-c", 'echo "$ONLY$HOME"; pwd'], env={"ONLY": "this"}, cwd=tmp_path)
    assert done.text() == f"this\n{tmp_path}\n"


async def test_failure_carries_argv_status_and_stderr() -> None:
    with pytest.raises(ProcessError) as failed:
        await spawn.run(["sh", "-c", "echo went wrong >&2; exit 7"], phase="cni add", resource="sandbox s1")
    error = failed.value
    assert (error.status, error.stderr, error.argv[0]) == (7, "went wrong", "sh")
    assert str(error) == "cni add, sandbox s1: sh failed with status 7: went wrong"


async def test_failure_keeps_only_the_end_of_a_long_stderr() -> None:
    with pytest.raises(ProcessError) as failed:
        await spawn.run(["sh", "-c", "head -c 100000 /dev/zero | tr '\\0' x >&2; echo the end >&2; exit 1"])
    assert len(failed.value.stderr) <= spawn.STDERR_TAIL_BYTES
    assert failed.value.stderr.endswith("the end")


async def test_output_is_bounded_and_the_child_still_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spawn, "OUTPUT_LIMIT_BYTES", 1000)
    done = await spawn.run(["head", "-c", "1000000", "/dev/zero"])
    assert done.stdout == bytes(1000)


async def test_a_missing_program_is_an_error_with_a_hint() -> None:
    with pytest.raises(ProcessError, match=r"cannot start /no/such/program: No such file.*vmrt doctor"):
        await spawn.run(["/no/such/program"])


async def test_a_time_out_kills_the_whole_group(tmp_path: Path) -> None:
    script = f"sleep 1000 & echo $! > {tmp_path}/pid; wait"
    with pytest.raises(DeadlineError, match=r"boot: sh did not finish within 0\.5 s"):
        await spawn.run(["sh", "-c", script], timeout_s=0.5, phase="boot")
    grandchild = await pid_in(tmp_path / "pid")
    await eventually(lambda: not runs(grandchild))


async def test_cancelling_run_kills_the_whole_group(tmp_path: Path) -> None:
    task = asyncio.create_task(spawn.run(["sh", "-c", f"sleep 1000 & echo $! > {tmp_path}/pid; wait"]))
    grandchild = await pid_in(tmp_path / "pid")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually(lambda: not runs(grandchild))


async def test_cancelling_run_while_it_starts_kills_the_whole_group_too(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    task = asyncio.create_task(spawn.run(["sh", "-c", f"sleep 1000 & echo $! > {file}; wait"]))
    # Forked, but asyncio has not seen the start through: the loop stands still until the grandchild is there.
    for _ in range(2):
        await asyncio.sleep(0)
    while not (file.exists() and file.read_text().endswith("\n")):
        time.sleep(0.01)  # noqa: ASYNC251
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    grandchild = await pid_in(file)
    await eventually(lambda: not runs(grandchild))


async def test_a_cancellation_at_any_moment_leaves_no_child_and_no_zombie(tmp_path: Path) -> None:
    before = children()
    for steps in range(30):
        task = asyncio.create_task(spawn.run(["sleep", "1000"], input_bytes=b"x" * 100_000))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # What nobody holds any more must not complain: an unreaped child, an open pipe.
        gc.collect()
        assert children() == before


async def test_a_cancellation_does_not_wait_for_who_else_holds_the_pipes(tmp_path: Path) -> None:
    # In a session of its own it is not killed with the group.
    script = f"setsid sh -c 'echo $$ > {tmp_path}/pid; exec sleep 1000' & wait"
    task = asyncio.create_task(spawn.run(["sh", "-c", script]))
    holder = await pid_in(tmp_path / "pid")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert runs(holder)
    os.kill(holder, signal.SIGKILL)


async def test_a_time_out_kills_what_a_finished_child_left_holding_its_pipes(tmp_path: Path) -> None:
    with pytest.raises(DeadlineError):
        await spawn.run(["sh", "-c", f"sleep 1000 & echo $! > {tmp_path}/pid"], timeout_s=0.5)
    left = await pid_in(tmp_path / "pid")
    await eventually(lambda: not runs(left))


async def test_a_clean_end_leaves_what_the_child_left(tmp_path: Path) -> None:
    await spawn.run(["sh", "-c", f"sleep 1000 >/dev/null 2>&1 & echo $! > {tmp_path}/pid"])
    left = await pid_in(tmp_path / "pid")
    assert runs(left)
    os.kill(left, signal.SIGKILL)


async def test_a_second_cancellation_does_not_cut_the_reaping_short() -> None:
    before = children()
    task = asyncio.create_task(spawn.run(["sleep", "1000"]))
    await eventually(lambda: children() != before)
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert children() == before


async def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    async def use() -> None:
        await spawn.run(["cat"], input_bytes=b"x")
        with pytest.raises(ProcessError):
            await spawn.run(["/no/such/program"])
        with pytest.raises(DeadlineError):
            await spawn.run(["sleep", "1000"], timeout_s=0.01)
        async with spawn.piped(["cat"]):
            pass
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    await use()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        await use()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


async def test_piped_gives_pipes_and_kills_on_exit() -> None:
    async with spawn.piped(["cat"]) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"hello\n")
        assert await process.stdout.readline() == b"hello\n"
    assert process.returncode == -signal.SIGKILL


async def test_piped_can_write_to_a_descriptor(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out:
        async with spawn.piped(["echo", "to the file"], stdout_fd=out.fileno()) as process:
            assert await process.wait() == 0
    assert (tmp_path / "out").read_text() == "to the file\n"


async def test_piped_names_a_missing_program() -> None:
    with pytest.raises(ProcessError, match="cannot start /no/such/program"):
        async with spawn.piped(["/no/such/program"]):
            pytest.fail("it cannot have started")


async def test_a_detached_child_leads_its_own_session_with_its_own_stdio() -> None:
    async with detached("sleep", "1000") as process:
        assert spawn.alive(process)
        assert os.getsid(process.pid) == process.pid
        proc = Path(f"/proc/{process.pid}")
        await eventually(lambda: (proc / "exe").readlink().name == "sleep")

        def descriptors() -> dict[str, str]:
            try:
                return {fd.name: str(fd.readlink()) for fd in (proc / "fd").iterdir()}
            except FileNotFoundError:
                return {}  # one was closed meanwhile: the program's loader opens libraries

        await eventually(lambda: descriptors() == {"0": "/dev/null", "1": "/dev/null", "2": "/dev/null"})


async def test_a_detached_child_logs_to_the_descriptor_given(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        async with detached("sh", "-c", "echo out; echo err >&2; sleep 1000", log_fd=log.fileno()):
            await eventually(lambda: (tmp_path / "log").read_text() == "out\nerr\n")


async def test_terminate_ends_it_and_repeating_is_no_error() -> None:
    process = spawn.detached(["sleep", "1000"])
    spawn.terminate(process)
    await eventually(lambda: not spawn.alive(process))
    spawn.terminate(process)


async def test_a_child_that_exited_is_reaped_and_not_alive() -> None:
    process = spawn.detached(["sleep", "1000"])
    os.kill(process.pid, signal.SIGKILL)
    await eventually(lambda: not spawn.alive(process))
    assert not Path(f"/proc/{process.pid}").exists(), "it was left a zombie"


async def test_a_reused_pid_is_another_process() -> None:
    async with detached("sleep", "1000") as process:
        imposter = ProcessId(process.pid, process.start_ticks + 1)
        assert not spawn.alive(imposter)
        spawn.terminate(imposter)
        assert spawn.alive(process)


async def test_identify_copes_with_any_command_name(tmp_path: Path) -> None:
    odd = tmp_path / "a) Z 1 (b"
    odd.symlink_to("/bin/sleep")
    async with detached(str(odd), "1000") as process:
        await eventually(lambda: Path(f"/proc/{process.pid}/comm").read_text().startswith("a)"))
        assert spawn.identify(process.pid) == process


def test_detached_names_a_missing_program() -> None:
    with pytest.raises(ProcessError, match="cannot start /no/such/program"):
        spawn.detached(["/no/such/program"])


def test_pasteable_quotes_for_a_shell() -> None:
    assert spawn.pasteable(["a b", Path("/c"), "$d"]) == "'a b' /c '$d'"
