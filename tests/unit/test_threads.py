"""Threads that cannot always be started."""

from __future__ import annotations

import asyncio
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
