"""Turns on the event loop, by uid: whoever has many connections keeps nobody else waiting for all of them."""

from __future__ import annotations

import asyncio
from collections import Counter, deque

from circleosd.handoff import Handoff

ROUND = 64 * 1024  # bytes of requests that may begin for one uid while the loop looks at its sockets once: some ms
LEAST = 1024  # bytes that a shorter request counts as, for what it takes besides being read


class Turns:
    """What of one uid is more than `ROUND` waits until the loop has turned, and so others have come in."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._begun: Counter[int] = Counter()  # since the loop turned last, or longer ago where nobody waited
        self._waiting: dict[int, deque[tuple[int, Handoff[None]]]] = {}

    def take(self, uid: int, size: int) -> Handoff[None] | None:
        """What a request of so many bytes has to wait for; None if it may begin at once."""
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
                if not turn.done():  # else nobody waits any more
                    self._begun[uid] += size
                    turn.set_result(None)
            if not line:
                del self._waiting[uid]
        if self._waiting:
            self._loop.call_soon(self._next_round)
