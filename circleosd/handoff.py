"""A future for the hot path: the waiting task continues at once, not in the next iteration of the event loop.

asyncio wakes a task through a callback that runs after polling all sockets again. If a protocol's callback receives the
awaited data, that poll costs as much as the work itself. A `Handoff` follows asyncio's protocol of future-like objects
(asyncio.isfuture()), so that any task can await it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from contextvars import Context
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Handoff(Generic[T]):
    """One value or error, from a callback of the event loop to one waiting task.

    If set outside of any task, `set_…` runs the waiting task until it waits again, and then returns.
    """

    __slots__ = ("_asyncio_future_blocking", "_callback", "_context", "_done", "_error", "_loop", "_value")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._asyncio_future_blocking = False
        self._loop = loop
        self._done = False
        self._value: T | None = None
        self._error: BaseException | None = None
        self._callback: Callable[[Any], object] | None = None
        self._context: Context | None = None

    def done(self) -> bool:
        """Whether there is a value or an error, or nobody is waiting any more."""
        return self._done

    def set_result(self, value: T) -> None:
        """Hand the value over."""
        self._value = value
        self._wake()

    def set_exception(self, error: BaseException) -> None:
        """Make the waiting task fail with `error`."""
        self._error = error
        self._wake()

    def _wake(self) -> None:
        assert not self._done
        self._done = True
        callback, self._callback = self._callback, None
        if callback is None:
            return
        assert self._context is not None
        if asyncio.current_task(self._loop) is None:
            self._context.run(callback, self)
        else:  # a task cannot run within another
            self._loop.call_soon(callback, self, context=self._context)

    def __await__(self) -> Generator[Any, None, T]:
        if not self._done:
            self._asyncio_future_blocking = True
            yield self
        return self.result()

    # called by asyncio's tasks

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def add_done_callback(self, callback: Callable[[Any], object], *, context: Context) -> None:
        assert self._callback is None, "only one task may wait"
        self._callback, self._context = callback, context

    def cancel(self, msg: object = None) -> bool:
        if self._done:
            return False
        self._done = True
        self._error = asyncio.CancelledError()
        if self._callback is not None:
            self._loop.call_soon(self._callback, self, context=self._context)
        return True

    def result(self) -> T:
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]  # set before it is done
