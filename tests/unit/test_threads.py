"""Threads that cannot always be started."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from typing import NoReturn

import pytest

from circleosd.threads import Threads, runner
from tests.waiting import SECONDS


def fail(thread: threading.Thread) -> NoReturn:
    raise RuntimeError("can't start new thread")


def test_what_was_refused_for_want_of_a_thread_is_not_done_later(monkeypatch: pytest.MonkeyPatch) -> None:
    done = list[str]()
    with Threads(1) as threads:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", fail)
            for _ in range(3):
                with pytest.raises(RuntimeError, match="can't start new thread"):
                    threads.submit(done.append, "refused")
        assert threads.submit(int, "7", base=8).result(SECONDS) == 7
        threads.submit(done.append, "taken").result(SECONDS)
    assert done == ["taken"]


def test_what_has_used_threads_ends_without_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> int:
        done = await asyncio.to_thread(int, "7")
        monkeypatch.setattr(threading.Thread, "start", fail)
        return done

    with runner() as one:
        assert one.run(main()) == 7


def test_a_signal_that_arrives_while_the_loop_is_closed_is_no_error() -> None:
    code = """
import asyncio, os, signal
from circleosd import threads

class Interrupted(threads._Loop):
    def _close_self_pipe(self):
        super()._close_self_pipe()
        os.kill(os.getpid(), signal.SIGTERM)

async def main():
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: None)

threads._Loop = Interrupted
with threads.runner() as runner:
    runner.run(main())
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
