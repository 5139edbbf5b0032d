"""Events on their way to plugins, each of which gets them in order.

Delivery is at most once: events still waiting when the manager ends are lost.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import NamedTuple
from weakref import WeakSet

from circleosd.errors import CircleError, NotFound
from circleosd.plugins.cause import Cause
from circleosd.plugins.plugin import Plugin
from circleosd.plugins.voice import WARNING

WAITING = 64  # events that may wait for one plugin

Deliver = Callable[[Plugin, str, str, Cause], Awaitable[None]]


class _Waiting(NamedTuple):
    topic: str
    payload: str
    cause: Cause


class Delivery:
    """Events to be delivered. `plugins` returns the loaded ones, `deliver` passes an event to one."""

    def __init__(self, plugins: Callable[[], Iterable[Plugin]], deliver: Deliver) -> None:
        self._plugins = plugins
        self._deliver = deliver
        self._deaf: WeakSet[Plugin] = WeakSet()  # plugins that only emit have an events capability too
        self._waiting: dict[Plugin, deque[_Waiting]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def offer(self, plugin: Plugin, topic: str, payload: str, cause: Cause) -> None:
        """Deliver an event of `plugin` that `cause` led to, to every other plugin that may receive it."""
        if self._closed:
            return
        event = _Waiting(topic, payload, cause._replace(depth=cause.depth + 1))
        for other in self._plugins():
            if other.name != plugin.name and other not in self._deaf and other.holds(f"events:{topic}"):
                self._queue(other, event)

    @property
    def busy(self) -> bool:
        """Whether an event is being delivered to a plugin, or waiting."""
        return bool(self._waiting)

    def close(self) -> None:
        """Stop delivering, also what is emitted from now on."""
        self._closed = True
        for task in self._tasks:
            task.cancel()

    def _queue(self, plugin: Plugin, event: _Waiting) -> None:
        waiting = self._waiting.get(plugin)
        if waiting is not None and len(waiting) >= WAITING:
            _warn(plugin, f"an event of {event.topic} is lost: {WAITING} are already waiting")
            return
        if waiting is not None:
            waiting.append(event)
            return
        self._waiting[plugin] = deque([event])
        task = asyncio.create_task(self._drain(plugin))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _drain(self, plugin: Plugin) -> None:
        """Deliver the waiting events of one plugin, in order."""
        waiting = self._waiting[plugin]
        try:
            while waiting:
                event = waiting.popleft()
                try:
                    await self._deliver(plugin, event.topic, event.payload, event.cause)
                except NotFound:
                    self._deaf.add(plugin)
                    return
                except CircleError as error:
                    _warn(plugin, f"cannot take an event of {event.topic}: {error}")
        finally:
            del self._waiting[plugin]


def _warn(plugin: Plugin, text: str) -> None:
    plugin.voice.say(WARNING, text, time.monotonic())
