"""What a service's actions are written against: the handlers of its contracts, and the act that each carries out."""

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
    """The descriptors that came with a request; whoever takes one closes it."""

    def take(self) -> int: ...


class Handlers:
    """What carries out the actions of one service: a method for each contract, named like the action."""

    def check(self, request: Any, act: Act) -> None:
        """Raises what stands against an act outside the database, as far as that is known without trying."""

    async def look(self, request: Any, act: Act) -> None:
        """Find out what an act outside the database begins with, while its intent is being recorded."""

    async def resolve(self, intent: Event) -> Resolution:
        """How an act ended of which only the intent is on record, because the service did."""
        return Resolution(after=None, error=Internal.code, found="its outcome is unknown")

    def busy(self) -> bool:
        """Whether something is under way that no connection waits for."""
        return False

    async def close(self) -> None:
        """The service ends: write what is only in memory."""


class Resolution(NamedTuple):
    """How an interrupted act ended: the state now, the code if it is not the one that was wanted, what was found."""

    after: Any
    error: str | None
    found: str


class Act:
    """One request being carried out: who asks, about what, and its rows in the ledger.

    Handlers set `object`, `before` and `after` where they know better than the contract, and `message` where a success
    needs a word to the caller. `found` is what their `check` and `look` leave to what carries it out.
    """

    # Of most acts these stay as they are.
    before: Any = None
    after: Any = None
    message: str | None = None
    found: Any = None
    done = False  # what is left is to tell of it, and is not given up for its time
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
        """Look at the caller again, after what has taken long. Raises as for a request that has just come."""
        self.go_on_as(await self._identify(self.caller.peer, self.token))

    def go_on_as(self, caller: Caller) -> None:
        """Take over what is known of the caller now. Raises `Denied` if who it is by now may not do this any more."""
        self._authorize(caller, self.object)
        self.caller = caller._replace(plugin=self.caller.plugin)

    def commit(self, tx: Transaction, *, before: Any = None, after: Any = None) -> None:
        """Record the change that `tx` makes, in `tx`. Every handler of an `Effect.STATE` action calls this."""
        tx.after_commit(self._committed)  # not before: what cannot be written to disk has failed
        self._ledger.append(tx, self._entry("done")._replace(before=before, after=after))

    def _committed(self) -> None:
        self.done = True

    async def record(self, phase: Phase, error: CircleError | None = None, intent: int | None = None) -> int:
        """Add a row of its own; return its number. Both rows of an act name the actor that its first one found."""
        if phase == "intent":
            self._actor = actor(self.caller)
        return await self._ledger.record(self._entry(phase, error, intent))

    async def refuse(self, phase: Phase, error: CircleError) -> None:
        """Record that the act was not carried out."""
        await self._ledger.refuse(self._entry(phase, error))

    def _entry(self, phase: Phase, error: CircleError | None = None, intent: int | None = None) -> Entry:
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
            intent=intent,
            actor=self._actor,
        )
