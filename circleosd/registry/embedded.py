"""The registry's service manager in the embedded mode: sends requests to the supervisor's socket."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from circleosd import upstream
from circleosd.errors import Conflict
from circleosd.registry.units import LogLine, Switch, UnitManager, UnitState, Verb


class SupervisedUnits(UnitManager):
    """A `UnitManager` that asks the supervisor listening at `path`; a job may take `timeout` seconds."""

    systemctl = "systemctl"  # it has none of these, and there is nothing to do for them

    def __init__(self, path: str, *, timeout: float) -> None:
        self._path = path
        self._timeout = timeout
        self._begun: dict[str, float] = {}  # when each unit got its last job

    async def _ask(self, action: str, **parameters: object) -> Any:
        return await upstream.ask(self._path, {"action": action, **parameters}, timeout=self._timeout)

    async def states(self, units: Sequence[str]) -> list[UnitState]:
        return [_state(item) for item in await self._ask("states", units=[*units], follow=False)]

    async def detail(self, unit: str) -> UnitState:
        (state,) = await self.states([unit])
        return state

    async def listening(self, unit: str) -> list[str]:
        state = await self.detail(unit)
        return [*state.triggered_by] if state.listening else []

    async def stale(self, unit: str) -> bool:
        """The supervisor reads a unit's files at each start of the unit."""
        return False

    async def matching(self, pattern: str) -> list[str]:
        return [str(unit) for unit in await self._ask("matching", pattern=pattern)]

    async def job(self, verb: Verb, unit: str) -> str:
        self._begun[unit] = time.time()
        return str(await self._ask("job", verb=verb, unit=unit))

    async def switch(self, verb: Switch, unit: str) -> str:
        raise Conflict(f"cannot {verb} {unit}: the embedded mode starts nothing at boot")

    async def enabled(self, unit: str) -> str:
        raise Conflict(f"cannot tell whether {unit} is enabled: the embedded mode starts nothing at boot")

    async def watch(self, units: Sequence[str], pattern: str = "") -> AsyncGenerator[UnitState, None]:
        request = {"action": "states", "units": [*units], "pattern": pattern, "follow": True}
        async with aclosing(upstream.follow(self._path, request)) as replies:
            async for states in replies:
                for item in states:
                    yield _state(item)

    async def log_tail(self, unit: str, lines: int) -> list[str]:
        return [line.text for line in await self.logs(unit, lines, self._begun.get(unit))]

    async def logs(self, unit: str, lines: int, since: float | None = None) -> list[LogLine]:
        return _last(await self._ask("logs", units=[unit], follow=False), lines, since)

    async def follow(self, unit: str, lines: int, since: float | None = None) -> AsyncGenerator[LogLine, None]:
        request = {"action": "logs", "units": [unit], "follow": True}
        async with aclosing(upstream.follow(self._path, request)) as replies:
            for line in _last(await anext(replies), lines, since):
                yield line
            async for (item,) in replies:
                yield LogLine(**item)


def _last(items: list[dict[str, Any]], lines: int, since: float | None) -> list[LogLine]:
    found = [LogLine(**item) for item in items if since is None or item["time"] >= since]
    return found[max(0, len(found) - lines) :]


def _state(item: dict[str, Any]) -> UnitState:
    return UnitState(**{**item, "triggered_by": tuple(item["triggered_by"]), "requires": tuple(item["requires"])})
