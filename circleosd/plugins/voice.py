"""What a plugin says in the manager's log: its own messages, and what comes of its events."""

from __future__ import annotations

import logging
from typing import Final

from circleosd.worker.frames import MAX_LOG

log = logging.getLogger(__name__)

# What a plugin may log per interval, whatever its calls may: the limit of journald for a service (journald.conf(5)),
# which is turned off for plugin-manager; otherwise rows of the ledger would be dropped with the plugins' messages.
MOST_SAID: Final = 10_000
SAID_WITHIN: Final = 30.0

_LEVELS = (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR)
WARNING: Final = 2


class Voice:
    """The log of one plugin; messages beyond `MOST_SAID` are dropped, and long ones are cut."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._since = -SAID_WITHIN
        self._said = 0

    def say(self, level: int, text: str, now: float) -> None:
        """Log a message with a level of LOG frames; `now` in seconds, never going back."""
        if now - self._since >= SAID_WITHIN:
            self._since, self._said = now, 0
        self._said += 1
        if self._said <= MOST_SAID:
            cut = text if len(text) <= MAX_LOG else text[:MAX_LOG] + "…"
            log.log(_LEVELS[level], "plugin %s: %s", self._name, cut)
        elif self._said == MOST_SAID + 1:
            why = "plugin %s: logged more than %d messages within %g s; the rest is dropped"
            log.warning(why, self._name, MOST_SAID, SAID_WITHIN)
