"""Deadlines for many tasks with a single timer: a task that ends in time costs no timer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Deadlines:
    """Cancels tasks that have not called `end` within `seconds` of their `begin`."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        # In the order of their deadlines, each with a function that says whether it is too late to cancel.
        self._running: dict[asyncio.Task[object], tuple[float, Callable[[], bool]]] = {}
        self._late: set[asyncio.Task[object]] = set()
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, task: asyncio.Task[object], done: Callable[[], bool] = lambda: False) -> None:
        """Start the task's time. Once `done` returns true, the task is not cancelled any more."""
        loop = task.get_loop()
        deadline = loop.time() + self._seconds
        self._running[task] = deadline, done
        if self._timer is None:
            self._timer = loop.call_at(deadline, self._look)

    def end(self, task: asyncio.Task[object]) -> bool:
        """End the task's time; return whether it had run out and the task was cancelled for that."""
        self._running.pop(task, None)
        if task not in self._late:
            return False
        self._late.discard(task)
        return task.uncancel() == 0  # otherwise somebody else cancelled it too

    def late(self, task: asyncio.Task[object]) -> bool:
        """Whether the task was cancelled because its time ran out."""
        return task in self._late

    def _look(self) -> None:
        """Cancel overdue tasks, and check again at the next deadline."""
        self._timer = None
        for task, (deadline, done) in [*self._running.items()]:
            loop = task.get_loop()
            if deadline > loop.time():
                self._timer = loop.call_at(deadline, self._look)
                return
            del self._running[task]
            if not done():
                self._late.add(task)
                task.cancel()
