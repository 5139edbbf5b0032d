"""How long failed logins make the next one wait. A pure function of values."""

from __future__ import annotations

from typing import NamedTuple


class Failures(NamedTuple):
    """The number of failed logins in a row, and the time of the last one in seconds since the epoch."""

    number: int = 0
    last: float = 0.0


def in_force(failures: Failures, now: float, lockout: float) -> int:
    """How many of the failures still count: none after twice the longest wait without another failure."""
    return 0 if abs(now - failures.last) > 2 * lockout else failures.number


def wait(failures: Failures, now: float, *, tries: int, lockout: float) -> float:
    """Seconds until another login is checked: none for the first `tries` failures, then 1, 2, 4, … `lockout`.

    The wait always ends, even under attack: an attempt during the wait is refused unchecked and does not count. Setting
    the clock back does not make the wait longer.
    """
    count = in_force(failures, now, lockout)
    if count < tries:
        return 0.0
    delay = min(lockout, 2.0 ** min(count - tries, 30))
    return min(delay, max(0.0, failures.last + delay - now))
