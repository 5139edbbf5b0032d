"""Turns on the event loop, by uid: requests on many connections of one uid do not make others wait for all of them."""

from __future__ import annotations

import asyncio
from collections import Counter, deque

from circleosd.handoff import Handoff

ROUND = 64 * 1024  # bytes of requests of one uid that may begin per iteration of the loop: some ms
LEAST = 1024  # minimum number of bytes that a request counts as, for the work besides reading it


class Turns:
    """If one uid needs more than `ROUND`, it waits for the next iteration of the loop, so that others get a turn."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._begun: Counter[int] = Counter()  # since the last iteration of the loop, or longer if nobody waited
        self._waiting: dict[int, deque[tuple[int, Handoff[None]]]] = {}

    def take(self, uid: int, size: int) -> Handoff[None] | None:
        """What a request of that size has to wait for; None if it may begin at once."""
        size = max(size, LEAST)
        if uid not in self._waiting and self._has_room(uid, size):
            self._begun[uid] += size
            return None
        if not self._waiting:
            self._loop.call_soon(self._next_round)
        turn = Handoff[None](self._loop)
        self._waiting.setdefault(uid, deque()).append((size, turn))
        return turn

    def _has_room(self, uid: int, size: int) -> bool:
        begun = self._begun[uid]
        return not begun or begun + size <= ROUND

    def _next_round(self) -> None:
        self._begun.clear()
        for uid, line in [*self._waiting.items()]:
            while line and self._has_room(uid, line[0][0]):
                size, turn = line.popleft()
                if not turn.done():  # otherwise nobody waits any more
                    self._begun[uid] += size
                    turn.set_result(None)
            if not line:
                del self._waiting[uid]
        if self._waiting:
            self._loop.call_soon(self._next_round)
