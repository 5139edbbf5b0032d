"""Which refusals get a row of their own, so that whoever keeps trying cannot fill the disk. No I/O here.

The first refusal of a kind is written at once. Equal ones within the window after it are counted, and so is whatever
somebody, a uid or a plugin, tries beyond the own allowance; each count becomes one row when its window ends.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")

WINDOW = 10.0  # seconds in which equal refusals are one row and a count
MIXED_WINDOW = 60.0  # and those beyond the allowance
ALLOWANCE = 60.0  # rows at once for the refusals of one of these …
REFILL = 1 / 30  # … and so many more a second. With the counts each adds at most 7,200 rows, some 5 MB, a day
MEMORY = ALLOWANCE / REFILL  # seconds after which no row counts against the allowance any more


class Counted(Generic[T]):
    """Refusals that have no row yet: how many, the last of them, and whether they differ among each other."""

    def __init__(self, key: Hashable, last: T, *, ends: float, mixed: bool) -> None:
        self.key = key
        self.last = last
        self.count = 0
        self.ends = ends
        self.mixed = mixed


class Flood(Generic[T]):
    """Refusals by kind. Its memory is bounded by what is written: a kind is remembered for one window."""

    def __init__(self) -> None:
        self._windows: dict[Hashable, Counted[T]] = {}
        self._allowances: dict[Hashable, tuple[float, float]] = {}  # of somebody: how many were left, and when

    def knows(self, who: Hashable) -> bool:
        """Whether some of the allowance of somebody is used up, as far as is known here."""
        return who in self._allowances

    def recall(self, who: Hashable, written: Iterable[float]) -> None:
        """Rows of somebody that is not known yet, from before this was made: the moments, in order."""
        if not self.knows(who):
            for moment in written:
                self._take(who, moment)

    def admit(self, who: Hashable, kind: Hashable, refusal: T, now: float) -> bool:
        """Whether `refusal` is to be written now. If not it is counted. `now` in seconds, never going back."""
        if (known := self._windows.get((who, kind))) and (known.count or now < known.ends):
            known.last = refusal
            known.count += 1
            return False
        if self._take(who, now):
            self._windows[who, kind] = Counted((who, kind), refusal, ends=now + WINDOW, mixed=False)
            return True
        new = Counted((who, None), refusal, ends=now + MIXED_WINDOW, mixed=True)
        rest = self._windows.setdefault((who, None), new)
        rest.last = refusal
        rest.count += 1
        return False

    def not_written(self, who: Hashable, kind: Hashable) -> None:
        """What was admitted could not be written: the next of its kind is to be, unless one was counted already."""
        if (known := self._windows.get((who, kind))) and not known.count:
            del self._windows[who, kind]

    def put_back(self, counted: Iterable[Counted[T]], now: float) -> None:
        """Counts that `ended` returned could not be written: they are due again a window later."""
        for window in counted:
            known = self._windows.setdefault(window.key, window)
            if known is window:
                window.ends = now + WINDOW
            else:
                known.count += window.count

    def _take(self, who: Hashable, now: float) -> bool:
        left, since = self._allowances.get(who, (ALLOWANCE, now))
        left = min(ALLOWANCE, left + (now - since) * REFILL)
        if left < 1:
            self._allowances[who] = (left, now)
            return False
        self._allowances[who] = (left - 1, now)
        return True

    def ended(self, now: float) -> list[Counted[T]]:
        """Forget the windows that are over; return those that counted something."""
        over = [key for key, window in self._windows.items() if window.ends <= now]
        found = [self._windows.pop(key) for key in over]
        full = [who for who, (left, since) in self._allowances.items() if left + (now - since) * REFILL >= ALLOWANCE]
        for who in full:
            del self._allowances[who]
        return [window for window in found if window.count]

    def next_end(self) -> float | None:
        """When the next window ends; None when nothing is remembered."""
        return min((window.ends for window in self._windows.values()), default=None)
