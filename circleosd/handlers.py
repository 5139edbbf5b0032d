"""What a service's actions are written against: the handlers of its contracts, and the act that each one performs."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, Protocol

from circleosd.actor import actor
from circleosd.api.common import Event
from circleosd.api.contract import Request
from circleosd.database import Transaction
from circleosd.errors import CircleError, Internal
from circleosd.ledger import Entry, Ledger, Phase
from circleosd.policy import Caller, Peer

Identify = Callable[[Peer, str | None], Awaitable[Caller]]


class Files(Protocol):
    """The descriptors that came with a request; whoever takes one must close it."""

    def take(self) -> int: ...


class Handlers:
    """The actions of one service: a method for each contract, named after the action."""

    def check(self, request: Any, act: Act) -> None:
        """Raises any known obstacle to an act outside the database, without trying the act."""

    async def look(self, request: Any, act: Act) -> None:
        """Determine the state before an act outside the database, while its intent is being recorded."""

    async def resolve(self, intent: Event) -> Resolution:
        """The outcome of an act whose service ended after recording only its intent."""
        return Resolution(after=None, error=Internal.code, found="its outcome is unknown")

    def busy(self) -> bool:
        """Whether there is work in progress that no connection waits for."""
        return False

    async def close(self) -> None:
        """The service ends: write data that is only in memory."""


class Resolution(NamedTuple):
    """How an interrupted act ended: the state now, an error code unless that is as intended, and what was found."""

    after: Any
    error: str | None
    found: str


class Act:
    """One request being carried out: the caller, the object, and its rows in the ledger.

    Handlers set `object`, `before` and `after` if they know better than the contract, and `message` for a note to the
    caller about a success. `found` passes data from their `check` and `look` to the handler.
    """

    # For most acts these keep their defaults.
    before: Any = None
    after: Any = None
    message: str | None = None
    found: Any = None
    intent: int | None = None  # its row's number
    begun = False  # the handler runs, or has run
    done = False  # only the reply is left, which must not time out
    _actor: dict[str, Any] | None = None

    def __init__(
        self,
        ledger: Ledger,
        caller: Caller,
        token: str | None,
        contract: type[Request],
        object: str | None,
        files: Files,
        identify: Identify,
        authorize: Callable[[Caller, str | None], None],
    ) -> None:
        self.caller = caller
        self.token = token
        self.contract = contract
        self.object = object
        self.files = files
        self.params: dict[str, Any] = {}
        self._ledger = ledger
        self._identify = identify
        self._authorize = authorize
        self._started = time.monotonic()

    async def renew(self) -> None:
        """Look the caller up again after waiting long. Raises as for a new request."""
        self.go_on_as(await self._identify(self.caller.peer, self.token))

    def go_on_as(self, caller: Caller) -> None:
        """Update the caller. Raises `Denied` if the caller may no longer do this."""
        self._authorize(caller, self.object)
        self.caller = caller._replace(plugin=self.caller.plugin)

    def commit(self, tx: Transaction, *, before: Any = None, after: Any = None) -> None:
        """Record in `tx` the change that it makes. Every handler of an `Effect.STATE` action calls this."""
        tx.after_commit(self._committed)  # not before: if it cannot be written to disk, the act has failed
        self._ledger.append(tx, self._entry("done")._replace(before=before, after=after))

    def _committed(self) -> None:
        self.done = True

    async def intend(self) -> None:
        """Record that an act outside the database is about to begin."""
        self._actor = actor(self.caller)  # as found now, also in the second row
        self.intent = await self._ledger.record(self._entry("intent"))

    async def conclude(self, error: CircleError | None) -> None:
        """Record how that ended."""
        await self._ledger.record(self._entry("outcome", error)._replace(intent=self.intent))

    async def refuse(self, phase: Phase, error: CircleError) -> None:
        """Record that the act was not carried out."""
        await self._ledger.refuse(self._entry(phase, error))

    def _entry(self, phase: Phase, error: CircleError | None = None) -> Entry:
        return Entry(
            phase=phase,
            caller=self.caller,
            action=self.contract.action,
            object=self.object,
            params=self.params,
            before=self.before,
            after=self.after,
            error=error.code if error else None,
            message=str(error) if error else None,
            duration=None if phase == "intent" else round(time.monotonic() - self._started, 6),
            actor=self._actor,
        )
