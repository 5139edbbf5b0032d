"""One deadline for each of many tasks, with one timer for all of them: a task that ends in time costs none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Deadlines:
    """Cancels tasks that have not called `end` within `seconds` of their `begin`."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        # In the order of their deadlines, and with what tells whether it is too late to cancel.
        self._running: dict[asyncio.Task[object], tuple[float, Callable[[], bool]]] = {}
        self._late: set[asyncio.Task[object]] = set()
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, task: asyncio.Task[object], done: Callable[[], bool] = lambda: False) -> None:
        """The task's time begins. Once `done` says so it is not cancelled any more."""
        loop = task.get_loop()
        deadline = loop.time() + self._seconds
        self._running[task] = deadline, done
        if self._timer is None:
            self._timer = loop.call_at(deadline, self._look)

    def end(self, task: asyncio.Task[object]) -> bool:
        """The task's time ends; whether it had run out and the task was cancelled for it."""
        self._running.pop(task, None)
        if task not in self._late:
            return False
        self._late.discard(task)
        return task.uncancel() == 0  # else somebody else cancelled it too

    def late(self, task: asyncio.Task[object]) -> bool:
        """Whether the task's time has run out, and it was cancelled for that."""
        return task in self._late

    def _look(self) -> None:
        """Cancel what is late, and look again at the next deadline."""
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
