"""What the registry needs of a service manager, and no more."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from signal import Signals
from typing import Literal, NamedTuple, Protocol

Verb = Literal["start", "stop", "restart", "reload"]
Switch = Literal["enable", "disable"]
Scope = Literal["system", "user"]  # whose service manager


class UnitState(NamedTuple):
    """A unit's state in systemd's words (org.freedesktop.systemd1(5)).

    `load`: loaded, not-found, masked, …; `active`: active, inactive, failed, activating, deactivating. `since`: when it
    entered that state, seconds since the epoch. `memory` in bytes. `result`: success, exit-code, signal, timeout, ….
    `exit_status`: of the main process, if it exited; `signal`: the name of the signal that ended it. `triggered_by`:
    the sockets, timers and paths that start it; `listening`: whether one of them is active. `requires`: the units that
    must be active to start it (Requires=, Requisite=, BindsTo=). `enabled`: the state of its unit file.
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
    signal: str | None = None
    triggered_by: tuple[str, ...] = ()
    listening: bool = False
    requires: tuple[str, ...] = ()
    enabled: str | None = None

    @property
    def waits(self) -> bool:
        """Whether the unit has ended and will be restarted after a while (Restart=, systemd.service(5))."""
        return self.sub.startswith("auto-restart")


def signal_name(number: int) -> str:
    """The name of a signal, such as SIGSEGV; the number of a real-time signal."""
    try:
        return Signals(number).name
    except ValueError:
        return f"signal {number}"


class LogLine(NamedTuple):
    """A line that a unit logged, without control characters, and its time in seconds since the epoch."""

    time: float
    text: str


class UnitManager(Protocol):
    """A service manager: systemd over D-Bus, or the supervisor of the embedded mode.

    `systemctl` is the systemctl(1) command for its units.
    """

    systemctl: str

    async def states(self, units: Sequence[str]) -> list[UnitState]:
        """The states of `units` in their order; for a unit that does not exist, `load` is not-found.

        For lists: `since` and the fields after it may be unset.
        """

    async def detail(self, unit: str) -> UnitState:
        """The state of one unit with all its fields; `load` is not-found for a unit that does not exist."""

    async def listening(self, unit: str) -> list[str]:
        """The sockets, timers and paths that start `unit` and are active."""

    async def stale(self, unit: str) -> bool:
        """Whether a file of `unit` has changed on disk since the service manager read it."""

    async def matching(self, pattern: str) -> list[str]:
        """The names of the units in memory that match a glob."""

    async def job(self, verb: Verb, unit: str) -> str:
        """Do `verb` to `unit`, wait until the job is finished and return its result: `done`, or why not.

        Results are those of systemd's JobRemoved: canceled, timeout, failed, dependency, skipped, … Raises `NotFound`
        for a unit that does not exist, `Denied` if the service manager refuses, `Conflict` if the unit's state does not
        allow it (masked, cannot reload), `Timeout` if the job takes too long, `Unavailable`.
        """

    async def switch(self, verb: Switch, unit: str) -> str:
        """Enable or disable `unit`; return the state of its unit file: enabled, disabled, static, ….

        Raises like `job`, and `Conflict` for a unit that cannot be enabled.
        """

    async def enabled(self, unit: str) -> str:
        """The state of a unit file: enabled, disabled, static, … Raises `NotFound` if there is none, and like `job`."""

    def watch(self, units: Sequence[str], pattern: str = "") -> AsyncGenerator[UnitState, None]:
        """The state of each of `units`, then its new state at every change, until the iterator is closed.

        Also of each unit that matches the glob `pattern`, as in `matching`: current and future ones. As in `states`,
        not all fields are set; `since` of the first state may be the time of the query. Raises `Unavailable` when the
        service manager is permanently gone.
        """

    async def log_tail(self, unit: str, lines: int) -> list[str]:
        """The last lines that the unit's processes have logged since its last start; empty if unknown."""

    async def logs(self, unit: str, lines: int, since: float | None = None) -> list[LogLine]:
        """The last `lines` lines about `unit`, oldest first, none older than `since` (seconds since the epoch).

        Raises `Unavailable` when this process may not read the log, `Limit` when they would be too far back.
        """

    def follow(self, unit: str, lines: int, since: float | None = None) -> AsyncGenerator[LogLine, None]:
        """What `logs` gives, then every new line, until the iterator is closed. Raises `Unavailable`, `Limit`."""
