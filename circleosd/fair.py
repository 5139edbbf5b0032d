"""A few places, for which many wait: the uids take turns, however many requests of one are waiting."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator


class Fair:
    """A limited number of places. Uids take turns, and those of one uid are served in order; None counts as a uid."""

    def __init__(self, free: int) -> None:
        self._free = free
        self._waiting: dict[int | None, deque[asyncio.Future[None]]] = {}  # in the order of their next turns

    async def begin(self, uid: int | None) -> bool:
        """Wait for a place, which is occupied until `end`; return whether none was free."""
        if self._free:
            self._free -= 1
            return False
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(uid, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.end()  # the place was assigned, but nobody takes it
            raise
        return True

    def end(self) -> None:
        """Leave a place to the next in line."""
        while self._waiting:
            uid = next(iter(self._waiting))
            line = self._waiting.pop(uid)
            while line and (turn := line.popleft()).done():
                pass  # it was abandoned, which does not count as a turn of its uid
            if line:
                self._waiting[uid] = line
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1

    @contextlib.asynccontextmanager
    async def turn(self, uid: int | None) -> AsyncIterator[None]:
        """Hold a place meanwhile."""
        await self.begin(uid)
        try:
            yield
        finally:
            self.end()
