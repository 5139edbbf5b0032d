"""Which refusals get their own row, so that repeated attempts cannot fill the disk. No I/O here.

The first refusal of a kind is written at once. Identical ones within the following window are counted, and so are all
attempts of a uid or plugin beyond its allowance; each count becomes one row when its window ends. Strangers, that is
uids without a user, also share an allowance, because one person may have thousands of uids (subuid(5)).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")

WINDOW = 10.0  # seconds in which identical refusals become one row with a count
MIXED_WINDOW = 60.0  # and those beyond the allowance
ALLOWANCE = 60.0  # rows in a burst for the refusals of one uid or plugin …
REFILL = 1 / 30  # … and rows per second after that. With the counts, each adds at most 7,200 rows, some 5 MB, a day
TOGETHER = 10  # times as much for all strangers together
MEMORY = ALLOWANCE / REFILL  # seconds after which a row does not count against the allowance any more


class Who(NamedTuple):
    """A uid or the name of a plugin; `stranger` is a uid without a user."""

    id: int | str
    stranger: bool = False


STRANGERS = Who("strangers", stranger=True)  # all of them together


class Counted(Generic[T]):
    """Refusals that have no row yet: how many, the last one, whose, and whether they differ."""

    def __init__(self, key: tuple[Who, Hashable], last: T, *, ends: float, mixed: bool) -> None:
        self.key = key
        self.last = last
        self.count = 0
        self.ends = ends
        self.mixed = mixed


class Flood(Generic[T]):
    """Refusals by kind. Memory is limited by the rows that are written: a kind is remembered for one window."""

    def __init__(self) -> None:
        self._windows: dict[tuple[Who, Hashable], Counted[T]] = {}
        self._allowances: dict[Who, tuple[float, float]] = {}  # how much was left, and when

    def recall(self, written: Iterable[tuple[Who, float]]) -> None:
        """Take rows into account that an earlier process wrote: whose, and their times, in order."""
        for who, moment in written:
            self._take(who, moment)

    def admit(self, who: Who, kind: Hashable, refusal: T, now: float) -> bool:
        """Whether `refusal` is to be written now; otherwise it is counted. `now` in seconds, never going back."""
        if (known := self._windows.get((who, kind))) and (known.count or now < known.ends):
            known.last = refusal
            known.count += 1
            return False
        spent = next((share for share in _shares(who) if self._left(share, now) < 1), None)
        if spent is None:
            self._take(who, now)
            self._windows[who, kind] = Counted((who, kind), refusal, ends=now + WINDOW, mixed=False)
            return True
        new = Counted((spent, None), refusal, ends=now + MIXED_WINDOW, mixed=True)
        rest = self._windows.setdefault((spent, None), new)
        rest.last = refusal
        rest.count += 1
        return False

    def not_written(self, who: Who, kind: Hashable) -> None:
        """An admitted refusal could not be written: write the next one of its kind, unless one was already counted."""
        if (known := self._windows.get((who, kind))) and not known.count:
            del self._windows[who, kind]

    def put_back(self, counted: Iterable[Counted[T]], now: float) -> None:
        """Counts returned by `ended` could not be written: they are due again one window later."""
        for window in counted:
            known = self._windows.setdefault(window.key, window)
            if known is window:
                window.ends = now + WINDOW
            else:
                known.count += window.count

    def _take(self, who: Who, now: float) -> None:
        for share in _shares(who):
            self._allowances[share] = (max(0.0, self._left(share, now) - 1), now)

    def _left(self, share: Who, now: float) -> float:
        times = TOGETHER if share == STRANGERS else 1
        left, since = self._allowances.get(share, (ALLOWANCE * times, now))
        return min(ALLOWANCE * times, left + (now - since) * REFILL * times)

    def ended(self, now: float) -> list[Counted[T]]:
        """Forget the windows that are over; return those with a count."""
        over = [key for key, window in self._windows.items() if window.ends <= now]
        found = [self._windows.pop(key) for key in over]
        for who in [who for who, (_, since) in self._allowances.items() if now - since >= MEMORY]:
            del self._allowances[who]
        return [window for window in found if window.count]

    def next_end(self) -> float | None:
        """When the next window ends; None if nothing is remembered."""
        return min((window.ends for window in self._windows.values()), default=None)


def _shares(who: Who) -> tuple[Who, ...]:
    return (who, STRANGERS) if who.stranger else (who,)
