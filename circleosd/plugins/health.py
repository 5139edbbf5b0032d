"""The health of a plugin, and whether it may be called: back-off after failures in a row, then quarantine. No I/O.

A failure is something that the plugin did to its worker or its limits: a trap, a timeout, an exceeded limit, the end of
the process. An error that the plugin reports is an answer, not a failure.
"""

from __future__ import annotations

import math

from circleosd.config import PluginSettings
from circleosd.errors import Conflict, PluginFailed
from circleosd.plugins.store import Record

FIRST_DELAY = 0.5  # seconds; doubled with each further failure in a row
LONGEST_DELAY = 30.0
SHOWN = 2000  # characters that are kept of an error


class Health:
    """One plugin's record and its failures in a row. Times are in seconds; `now` may be any monotonic clock."""

    def __init__(self, name: str, record: Record, settings: PluginSettings) -> None:
        self.name = name
        self.record = record
        self.changed = False  # since it was last saved
        self._held_until = 0.0
        self._back_off_after = settings.back_off_after
        self._quarantine_after = settings.quarantine_after

    def admit(self, now: float) -> None:
        """Return if it may be called. Raises `Conflict` for a plugin set aside, `PluginFailed` during a back-off."""
        record = self.record
        if record.aside is not None:
            raise Conflict(
                f"{self.name} is {record.aside}: {record.reason}; enable it with: circlectl plugin enable {self.name}"
            )
        if held := self.held_for(now):
            raise PluginFailed(
                f"{self.name} failed {record.in_a_row} times in a row and is held back for "
                f"{math.ceil(held * 10) / 10:.1f} s; the last failure: {record.last_error}"
            )

    def held_for(self, now: float) -> float:
        """Seconds until the back-off ends; 0.0 when there is none."""
        return max(0.0, self._held_until - now)

    def succeeded(self) -> None:
        """A call ended with an answer: reset the failures in a row."""
        self.record.calls += 1
        self.changed = True
        self.reset()

    @property
    def quarantine_due(self) -> bool:
        """Whether the plugin is due for quarantine because of its failures in a row, and not yet set aside."""
        return self.record.in_a_row >= self._quarantine_after and self.record.aside is None

    def failed(self, message: str, now: float, wall: float) -> None:
        """A call failed; `wall` is the time to show. A plugin that is due for quarantine is also held back."""
        record = self.record
        record.calls += 1
        record.failures += 1
        record.last_error = message if len(message) <= SHOWN else message[:SHOWN] + "…"
        record.last_failed = wall
        self.changed = True
        record.in_a_row += 1
        doublings = record.in_a_row - min(self._back_off_after, self._quarantine_after)
        if doublings >= 0:
            self._held_until = now + min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** min(doublings, 16))

    def reset(self) -> None:
        """No more failures in a row, and no back-off: a call succeeded, or the plugin was enabled."""
        self.record.in_a_row = 0
        self._held_until = 0.0
