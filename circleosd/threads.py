"""Threads that are started when there is work, and do none that was refused because one could not be started."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Threads(ThreadPoolExecutor):
    """As its base class, which would do later what it could not take: nobody waits for that, and there may be much."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """See `concurrent.futures.Executor`. Raises RuntimeError when a thread would have to be started and cannot."""
        work: list[Callable[[], T]] = [partial(fn, *args, **kwargs)]
        try:
            return super().submit(_do, work)
        except RuntimeError:
            work.clear()
            raise


def _do(work: list[Callable[[], T]]) -> T:
    return work.pop()()


def run(main: Coroutine[Any, Any, T]) -> T:
    """As `asyncio.run`, with `Threads` for what is to be done in a thread."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(main)


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        super().__init__()
        self._threads = Threads(thread_name_prefix="asyncio")
        self.set_default_executor(self._threads)

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """Wait for the threads. The base class has one more do that, which may be one too many."""
        self._threads.shutdown()
