"""Limited places, of which each uid may take only a part, so that others get some too. No I/O here."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator

from circleosd.errors import Limit


class Places:
    """At most `total` of `what` at once, and `each` per uid; for None, only the total applies.

    `setting` is the name of the setting for the total, which does not apply to the uids in `ahead`: others together
    must not keep these out.
    """

    def __init__(
        self, what: str, total: int, each: int, setting: str | None = None, ahead: Collection[int] = ()
    ) -> None:
        self._what = what
        self._total = total
        self._each = each
        self._setting = f" ({setting})" if setting else ""
        self._ahead = ahead
        self._taken: Counter[int | None] = Counter()

    @property
    def taken(self) -> int:
        """How many places are taken in total."""
        return self._taken.total()

    def take(self, uid: int | None) -> None:
        """Take a place until `leave`. Raises `Limit` if there is none."""
        if self.taken >= self._total and uid not in self._ahead:
            raise Limit(f"at most {self._total} {self._what} at once{self._setting}; try again later")
        if uid is not None and self._taken[uid] >= self._each:
            raise Limit(f"at most {self._each} {self._what} at once for uid {uid}; try again later")
        self._taken[uid] += 1

    def leave(self, uid: int | None) -> None:
        """Leave a place that was taken."""
        self._taken[uid] -= 1
        if not self._taken[uid]:
            del self._taken[uid]

    @contextlib.contextmanager
    def held(self, uid: int | None) -> Iterator[None]:
        """Hold a place meanwhile. Raises `Limit`."""
        self.take(uid)
        try:
            yield
        finally:
            self.leave(uid)
