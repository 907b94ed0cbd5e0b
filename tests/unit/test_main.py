"""The end of the daemon's process."""

from __future__ import annotations

import sys

from vmrt import spawn

# A thread of the loop's executor that never returns, as one that libvirt does not let go.
STUCK = """
import asyncio, threading
import vmrt.__main__ as main
from vmrt.config import Config

async def serve(config):
    asyncio.get_running_loop().run_in_executor(None, threading.Event().wait)
    print("closed")

main.serve = serve
asyncio.run(main.serve_and_exit(Config()))
"""


async def test_a_thread_that_never_returns_does_not_keep_the_daemon() -> None:
    done = await spawn.run([sys.executable, "-c", STUCK], timeout_s=100)
    assert done.stdout == b"closed\n"
