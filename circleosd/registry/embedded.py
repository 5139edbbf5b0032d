"""The registry's service manager in the embedded mode: the supervisor, asked over its socket."""

from __future__ import annotations

from collections.abc import Sequence

from circleosd import upstream
from circleosd.registry.units import UnitState, Verb


class SupervisedUnits:
    """A `UnitManager` that asks the supervisor listening at `path`; a job may take `timeout` seconds."""

    def __init__(self, path: str, *, timeout: float) -> None:
        self._path = path
        self._timeout = timeout

    async def states(self, units: Sequence[str]) -> list[UnitState]:
        """See `UnitManager`."""
        found = await upstream.ask(self._path, {"action": "states", "units": [*units]}, timeout=self._timeout)
        return [UnitState(**{**state, "triggered_by": tuple(state["triggered_by"])}) for state in found]

    async def matching(self, pattern: str) -> list[str]:
        """See `UnitManager`."""
        found: list[str] = await upstream.ask(
            self._path, {"action": "matching", "pattern": pattern}, timeout=self._timeout
        )
        return found

    async def job(self, verb: Verb, unit: str) -> str:
        """See `UnitManager`."""
        request = {"action": "job", "verb": verb, "unit": unit}
        return str(await upstream.ask(self._path, request, timeout=self._timeout))

    async def log_tail(self, unit: str, lines: int) -> list[str]:
        """See `UnitManager`."""
        request = {"action": "log_tail", "unit": unit, "lines": lines}
        found: list[str] = await upstream.ask(self._path, request, timeout=self._timeout)
        return found
