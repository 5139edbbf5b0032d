"""What few can do at once, for which many wait: one of each uid in turn, however many of somebody's wait."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator


class Fair:
    """So many at once. The uids take turns, those of one come as they came; None is one of them."""

    def __init__(self, free: int) -> None:
        self._free = free
        self._waiting: dict[int | None, deque[asyncio.Future[None]]] = {}  # in the order of their next turns

    async def begin(self, uid: int | None) -> None:
        """Wait for a place, which is taken until `end`."""
        if self._free:
            self._free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(uid, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.end()  # the place came and nobody takes it
            raise

    def end(self) -> None:
        """Leave a place, for the next who waits."""
        while self._waiting:
            uid = next(iter(self._waiting))
            line = self._waiting.pop(uid)
            while line and (turn := line.popleft()).done():
                pass  # it was given up, which is no turn of its uid
            if line:
                self._waiting[uid] = line
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1

    @contextlib.asynccontextmanager
    async def turn(self, uid: int | None) -> AsyncIterator[None]:
        """Have a place meanwhile."""
        await self.begin(uid)
        try:
            yield
        finally:
            self.end()
