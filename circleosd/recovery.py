"""Acts that the end of a service's last process interrupted: their record is completed when the service starts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from circleosd.api.common import Event
from circleosd.errors import CircleError
from circleosd.handlers import Handlers, Resolution
from circleosd.ledger import Entry, Ledger
from circleosd.policy import Caller, Peer

log = logging.getLogger(__name__)

PATIENCE = 10.0  # seconds that a start waits for all outcomes


async def complete(service: str, intents: Sequence[Event], handlers: Handlers, ledger: Ledger) -> None:
    """Record how each of these acts ended. What cannot be found out now is left to the next start."""
    resolutions = await asyncio.gather(*(_resolution(intent, handlers) for intent in intents))
    for intent, found in zip(intents, resolutions, strict=True):
        if found is None:
            continue
        outcome = Entry(
            phase="outcome",
            caller=Caller(Peer(intent["actor"]["uid"], intent["actor"]["gid"], intent["actor"]["pid"])),
            actor=intent["actor"],
            action=intent["action"],
            object=intent["object"],
            params=intent["params"],
            before=intent["before"],
            after=found.after,
            error=found.error,
            message=f"{service} ended before the outcome was known; at its next start {found.found}",
            intent=intent["seq"],
        )
        try:
            await ledger.record(outcome)
        except CircleError as error:  # only a running service can report what is wrong with its record
            log.error("row %d has no outcome yet: %s", intent["seq"], error)


async def _resolution(intent: Event, handlers: Handlers) -> Resolution | None:
    """How an act ended; None if that cannot be determined now."""
    try:
        async with asyncio.timeout(PATIENCE):
            return await handlers.resolve(intent)
    except (CircleError, TimeoutError) as error:
        log.warning("row %d has no outcome yet: cannot find out: %s", intent["seq"], str(error) or "no answer")
    except Exception:  # which must not end every start
        log.exception("row %d has no outcome yet: cannot find out", intent["seq"])
    return None
