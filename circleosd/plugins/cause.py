"""What something that a plugin does follows from."""

from __future__ import annotations

from typing import NamedTuple


class Cause(NamedTuple):
    """The call or event in which a plugin does something: `depth` counts the events that it follows from.

    `caller` is whose call began it all, in words; None where nobody called, as while a plugin is loaded, or it may have
    been one of several.
    """

    depth: int = 0
    caller: str | None = None

    def recorded(self) -> dict[str, str]:
        """What a row of the ledger has of it among its parameters."""
        return {"called_by": self.caller} if self.caller else {}


NOBODY = Cause()
