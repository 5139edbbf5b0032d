"""The cause of an act of a plugin."""

from __future__ import annotations

from typing import NamedTuple


class Cause(NamedTuple):
    """The call or event during which a plugin acts. `depth` is the number of events that led to it.

    `caller` describes who made the first call; None if nobody did, as while a plugin is loaded, or if it may have been
    one of several callers.
    """

    depth: int = 0
    caller: str | None = None

    def recorded(self) -> dict[str, str]:
        """The parameters to record in a row of the ledger."""
        return {"called_by": self.caller} if self.caller else {}


NOBODY = Cause()
