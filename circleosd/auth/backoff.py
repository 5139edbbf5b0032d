"""How long failed logins make the next one wait. A pure function of values."""

from __future__ import annotations

from typing import NamedTuple


class Failures(NamedTuple):
    """Failed logins in a row and when the last was, seconds since the epoch."""

    number: int = 0
    last: float = 0.0


def in_force(failures: Failures, now: float, lockout: float) -> int:
    """How many of the failures still count: none after twice the longest wait without one."""
    return 0 if abs(now - failures.last) > 2 * lockout else failures.number


def wait(failures: Failures, now: float, *, tries: int, lockout: float) -> float:
    """Seconds until another login is looked at: none for the first `tries` failures, then 1, 2, 4, … `lockout`.

    It always ends, also under attack: an attempt during the wait is refused unseen and does not count. A clock that was
    set back does not lengthen it.
    """
    count = in_force(failures, now, lockout)
    if count < tries:
        return 0.0
    delay = min(lockout, 2.0 ** min(count - tries, 30))
    return min(delay, max(0.0, failures.last + delay - now))
