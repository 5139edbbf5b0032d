"""The supervisor's own socket, on which the registry sends requests and receives replies (wire.py)."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Callable
from fnmatch import fnmatchcase
from typing import Any

from circleosd import wire
from circleosd.embedded.supervisor import Supervisor
from circleosd.embedded.units import LOG_LINES
from circleosd.errors import BadRequest, CircleError, Denied, Internal
from circleosd.policy import Peer, role_of_uid
from circleosd.registry.units import LogLine, UnitState

log = logging.getLogger(__name__)


class Control:
    """The actions `job`, `matching`, `states` and `logs`.

    With `follow`, the last two keep sending replies, each a list, also for units that match `pattern`.
    """

    name = "supervisor"
    requests = 0

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self.connections: Callable[[], int] = lambda: 0

    async def dispatch(self, line: bytes, peer: Peer, files: object) -> bytes | AsyncGenerator[bytes, None]:
        """Answer one request. Never raises."""
        try:
            if role_of_uid(peer.uid, os.getuid()) is None:
                raise Denied("the supervisor answers only to its own uid")
            match wire.decode_object(line):
                case {"action": "job", "verb": verb, "unit": name}:
                    return wire.success(await self._supervisor.job(verb, name))
                case {"action": "matching", "pattern": pattern}:
                    return wire.success(self._supervisor.matching(pattern))
                case {"action": "states" | "logs" as action, "units": names, "follow": follow, **more}:
                    kind = UnitState if action == "states" else LogLine
                    if follow:
                        return self._follow(kind, names, more.get("pattern", ""))
                    return wire.success(self._now(kind, names))
            raise BadRequest("the supervisor has no such action")
        except CircleError as error:
            return wire.failure(error)
        except Exception:
            log.exception("a request failed")
            return wire.failure(Internal("an internal error; the supervisor's log has the details"))

    def _now(self, kind: type, names: list[str]) -> list[dict[str, Any]]:
        if kind is UnitState:
            return [self._supervisor.state(name)._asdict() for name in names]
        return [line._asdict() for name in names for line in self._supervisor.lines(name)]

    async def _follow(self, kind: type, names: list[str], pattern: str) -> AsyncGenerator[bytes, None]:
        """The current items of `kind`, then new ones until the connection ends. A slow reader misses the oldest."""
        queue = asyncio.Queue[UnitState | LogLine](LOG_LINES)

        def hear(name: str, event: UnitState | LogLine) -> None:
            if isinstance(event, kind) and (name in names or fnmatchcase(name, pattern)):
                if queue.full():
                    queue.get_nowait()
                queue.put_nowait(event)

        self._supervisor.listeners.append(hear)
        try:
            there = [*names, *(name for name in self._supervisor.matching(pattern) if name not in names)]
            yield wire.success(self._now(kind, there), more=True)
            while True:
                yield wire.success([(await queue.get())._asdict()], more=True)
        finally:
            self._supervisor.listeners.remove(hear)
