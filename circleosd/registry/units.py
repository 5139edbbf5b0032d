"""What the registry needs of a service manager, and no more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Verb = Literal["start", "stop", "restart"]


@dataclass(frozen=True)
class UnitState:
    """A unit's state in systemd's words (org.freedesktop.systemd1(5)).

    `load`: loaded, not-found, masked, …; `active`: active, inactive, failed, activating, deactivating. `since`: when it
    entered that state, seconds since the epoch. `memory` in bytes. `result`: success, exit-code, signal, timeout, ….
    `triggered_by`: the sockets, timers and paths that start it; `listening`: whether one of them is active.
    """

    unit: str
    description: str
    load: str
    active: str
    sub: str
    since: float | None = None
    pid: int | None = None
    memory: int | None = None
    restarts: int | None = None
    result: str | None = None
    exit_status: int | None = None
    triggered_by: tuple[str, ...] = ()
    listening: bool = False


class UnitManager(Protocol):
    """A service manager: systemd over D-Bus, or the supervisor of the embedded mode."""

    async def states(self, units: Sequence[str]) -> list[UnitState]:
        """The states of `units` in their order; a unit that does not exist has `load` not-found."""
        ...

    async def matching(self, pattern: str) -> list[str]:
        """The names of the units in memory that match a glob."""
        ...

    async def job(self, verb: Verb, unit: str) -> str:
        """Do `verb` to `unit`, wait until the job is finished and return its result: `done`, or why not.

        Results are those of systemd's JobRemoved: canceled, timeout, failed, dependency, skipped, … Raises `NotFound`
        for a unit that does not exist, `Denied` when the service manager refuses, `Unavailable`.
        """
        ...

    async def log_tail(self, unit: str, lines: int) -> list[str]:
        """The last lines that the unit's processes logged since it was last started; empty when unknown."""
        ...
