"""Threads that are started on demand, and do not run work later that was refused because no thread could be started."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Threads(ThreadPoolExecutor):
    """Unlike its base class, it does not keep refused work for later: nobody waits for it, and there may be much."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """See `concurrent.futures.Executor`. Raises RuntimeError if a thread would have to be started and cannot be."""
        work: list[Callable[[], T]] = [partial(fn, *args, **kwargs)]
        try:
            return super().submit(_do, work)
        except RuntimeError:
            work.clear()
            raise


def _do(work: list[Callable[[], T]]) -> T:
    return work.pop()()


def runner() -> asyncio.Runner:
    """Runs coroutines one after the other in one event loop, with `Threads` as its default executor."""
    return asyncio.Runner(loop_factory=_Loop)


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        super().__init__()
        self._threads = Threads(thread_name_prefix="asyncio")
        self.set_default_executor(self._threads)

    def close(self) -> None:
        """Close the loop; a signal that arrives meanwhile has no effect.

        The base class closes the socket that handlers write to before it removes them.
        """
        with contextlib.suppress(ValueError):  # only the main thread handles signals
            signal.set_wakeup_fd(-1)
        super().close()

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """Wait for the threads. The base class uses another thread for that, which may be one too many."""
        self._threads.shutdown()
