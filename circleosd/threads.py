"""Threads that are started when there is work, and do none that was refused because one could not be started."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

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
