"""The ledger: every change and every denied attempt, in the service's own database, chained by hash (chain.py).

Phases: `done` (state changed in the same transaction), `intent` and then `outcome` (an act outside the database),
`failed`, `denied`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sqlite3
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from circleosd import chain
from circleosd.actor import actor
from circleosd.api.common import Audited, Event, Follow, History
from circleosd.config import LedgerSettings
from circleosd.database import Database, Transaction
from circleosd.errors import Conflict, Limit, Unavailable
from circleosd.flood import MEMORY, STRANGERS, Counted, Flood, Who
from circleosd.policy import Caller, Peer, role_of_uid
from circleosd.rows import as_event, chain_ends, first_left, matching

if TYPE_CHECKING:
    from circleosd.pruning import Pruned

log = logging.getLogger(__name__)

Phase = Literal["done", "intent", "outcome", "failed", "denied"]

TEXT_SHOWN = 256  # characters of a text parameter that are stored
FOLLOWED_AT_ONCE = 200  # rows that a follower holds in memory
RECALLED = 2000  # newest rows that are searched for those that count against allowances (flood.py)


class Entry(NamedTuple):
    """The contents of a row, except its number and time.

    `duration` is in seconds, `intent` the row that this one completes. `attempts` is how many attempts the row stands
    for. `actor` replaces what /proc says about the caller.
    """

    phase: Phase
    caller: Caller
    action: str
    object: str | None
    params: Mapping[str, Any] = MappingProxyType({})
    before: Any = None
    after: Any = None
    error: str | None = None
    message: str | None = None
    duration: float | None = None
    intent: int | None = None
    attempts: int = 1
    actor: dict[str, Any] | None = None


def shown(value: Any) -> Any:
    """A parameter's value as stored in a row: long texts are cut, and lists and objects replaced by their size."""
    if isinstance(value, str):
        return value if len(value) <= TEXT_SHOWN else value[:TEXT_SHOWN] + "…"
    if isinstance(value, (dict, list)):
        return f"({len(json.dumps(value))} bytes of JSON)" if value else value
    return value


class Ledger:
    """Writes and reads one service's rows. `mirror` is called with each row once it is on disk."""

    def __init__(
        self, database: Database, service: str, mirror: Callable[[Event], None], settings: LedgerSettings | None = None
    ) -> None:
        self._database = database
        self._service = service
        self._mirror = mirror
        self._settings = settings or LedgerSettings()
        self._flood: Flood[Entry] = Flood()
        self._late: list[Entry] = []  # outcomes and refusals that could not be written
        self._timer: asyncio.Task[None] | None = None
        self._opened = time.monotonic()
        self._recalled = False
        self._followers: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()

    # writing

    def append(self, tx: Transaction, entry: Entry) -> int:
        """Add a row within a transaction; return its number."""
        from circleosd.pruning import prune  # a start of the service need not wait for it

        seq = self._insert(tx, entry)
        if pruned := prune(tx, self._settings, time.time()):
            self._insert(tx, _about(pruned))
        return seq

    def _insert(self, tx: Transaction, entry: Entry) -> int:
        ends = chain_ends(tx)
        if ends is None or tx.execute("SELECT 1 FROM ledger WHERE seq = ?", (ends["last_seq"] + 1,)).fetchone():
            raise Unavailable(f"cannot continue the ledger of {self._service}: it was altered")
        seq = int(ends["last_seq"]) + 1
        row = {
            "seq": seq,
            "time": time.time(),
            "phase": entry.phase,
            "actor": entry.actor or actor(entry.caller),
            "action": entry.action,
            "object": entry.object,
            "params": {**entry.params},
            "before": entry.before,
            "after": entry.after,
            "error": entry.error,
            "message": entry.message,
            "duration": entry.duration,
            "intent": entry.intent,
            "count": entry.attempts,
        }
        body = json.dumps(row, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
        digest = chain.linked(ends["last_hash"], body)
        tx.execute("INSERT INTO ledger (seq, body, hash) VALUES (?, ?, ?)", (seq, body, digest))
        tx.execute("UPDATE ledger_ends SET last_seq = ?, last_hash = ?", (seq, digest))
        if entry.phase == "intent":
            tx.execute("INSERT INTO ledger_open (seq) VALUES (?)", (seq,))
        elif entry.intent is not None:
            tx.execute("DELETE FROM ledger_open WHERE seq = ?", (entry.intent,))
        event = as_event(self._service, seq, body)
        tx.after_commit(lambda: self._mirror(event))
        tx.after_commit(self._wake)
        return seq

    async def record(self, entry: Entry) -> int:
        """Add a row in its own transaction; return its number once it is on disk.

        An outcome that cannot be written now is written with a later row: the next start could only guess it.
        """
        return (await self._write([entry]))[0]

    async def _write(self, entries: Sequence[Entry]) -> list[int]:
        """Add rows, and those that could not be written before; return the numbers of the former."""
        late, self._late = self._late, []
        try:
            seqs = await self._database.write(lambda tx: [self.append(tx, entry) for entry in (*late, *entries)])
        except BaseException as exc:
            if isinstance(exc, (Unavailable, asyncio.CancelledError)):  # cancelled as the service ends: `close` follows
                late += [entry for entry in entries if entry.intent is not None]
            self._late = [*late, *self._late]
            raise
        return seqs[len(late) :]

    async def refuse(self, entry: Entry) -> None:
        """Record a refused attempt: in a row that is on disk on return, or, for repeated ones, soon in a count."""
        caller = entry.caller
        who = _whose(caller.peer.uid, caller.user, caller.plugin)
        asked = json.dumps(dict(entry.params), sort_keys=True)
        answered = None if entry.error == Limit.code else entry.message  # a limit may tell how long to wait
        kind = (caller.user, entry.action, entry.object, entry.phase, entry.error, asked, answered)
        try:
            if not self._recalled and time.monotonic() < self._opened + MEMORY:
                await self._recall()
            if self._flood.admit(who, kind, entry, time.monotonic()):
                await self.record(entry)
        except asyncio.CancelledError:  # as the service ends: `close` follows
            self._late.append(entry)
            raise
        except Exception:
            self._flood.not_written(who, kind)
            raise
        finally:
            if self._timer is None:
                self._timer = asyncio.create_task(self._count_refusals())

    async def _recall(self) -> None:
        """Count the rows that the previous process wrote: an idle exit must not renew the allowances."""

        def select(connection: sqlite3.Connection) -> list[tuple[Who, float]]:
            newest = "seq > (SELECT max(seq) FROM ledger) - ? AND time BETWEEN ? AND ? AND error IS NOT NULL"
            sql, now = f"SELECT seq, body FROM ledger WHERE {newest} ORDER BY time", time.time()
            found = (as_event(self._service, *row) for row in connection.execute(sql, (RECALLED, now - MEMORY, now)))
            return [(who, row["time"] - now) for row in found if (who := _refused(row))]

        ages = await self._database.read(select)
        if not self._recalled:  # by another refusal meanwhile
            self._recalled, now = True, time.monotonic()
            self._flood.recall((who, now + age) for who, age in ages)

    async def _count_refusals(self) -> None:
        """Write counts when their windows end, until none are left."""
        try:
            while self._timer and (end := self._flood.next_end()) is not None:
                await asyncio.sleep(max(0.0, end - time.monotonic()))
                try:
                    with contextlib.suppress(Unavailable):  # logged by the database; they are written later
                        await self._write_counts(time.monotonic())
                except Exception:
                    log.exception("cannot record refused attempts")
        finally:
            self._timer = None

    async def _write_counts(self, now: float) -> None:
        counted = self._flood.ended(now)
        entries = [_summary(window) for window in counted]
        if entries or self._late:
            try:
                await self._write(entries)
            except BaseException:
                self._flood.put_back(counted, time.monotonic())
                raise

    async def close(self) -> None:
        """Write what could not be written before, and the remaining counts."""
        timer, self._timer = self._timer, None
        if timer:
            timer.cancel()
            await asyncio.wait([timer])  # it may hold unwritten counts
        await self._write_counts(float("inf"))

    # reading

    async def history(self, wanted: History) -> list[Event]:
        """The newest matching rows, oldest first."""

        def select(connection: sqlite3.Connection) -> list[Event]:  # decoding 10,000 rows takes about a second
            rows = matching(connection, wanted, wanted.since, 0, "DESC", wanted.lines)
            return [as_event(self._service, *row) for row in reversed(rows)]

        return await self._database.scan(select)

    async def follow(self, wanted: Follow) -> AsyncGenerator[Event, None]:
        """The matching rows after `wanted.after`: existing ones, then new ones as they are written.

        Raises `Conflict` if that row does not exist any more: the first rows of a new record would be skipped.
        """
        loop, woken = asyncio.get_running_loop(), asyncio.Event()
        after, since = wanted.after, wanted.since
        self._followers.add((loop, woken))
        try:
            while True:
                woken.clear()

                def select(
                    connection: sqlite3.Connection, after: int = after, since: float | None = since
                ) -> tuple[list[sqlite3.Row], int]:
                    ends = chain_ends(connection)
                    last = ends["last_seq"] if ends else after
                    return matching(connection, wanted, since, after, "ASC", FOLLOWED_AT_ONCE), last

                rows, last = await self._database.scan(select)
                if last < after:
                    why = f"it ends with row {last}, but row {after} was already shown"
                    raise Conflict(f"the record of {self._service} was replaced: {why}; follow it again")
                for row in rows:
                    yield as_event(self._service, *row)
                if len(rows) < FOLLOWED_AT_ONCE:
                    after, since = last, None  # what is written from now on is new, even if the clock is set back
                    await woken.wait()
                else:
                    after = rows[-1]["seq"]
        finally:
            self._followers.discard((loop, woken))

    def _wake(self) -> None:
        for loop, woken in tuple(self._followers):
            loop.call_soon_threadsafe(woken.set)

    async def unfinished(self) -> list[Event]:
        """The intents without an outcome: at a service's start, acts that the end of its last process interrupted."""

        def select(connection: sqlite3.Connection) -> list[sqlite3.Row]:
            sql = "SELECT seq, body FROM ledger JOIN ledger_open USING (seq) ORDER BY seq"
            return connection.execute(sql).fetchall()

        found = [as_event(self._service, *row) for row in await self._database.read(select)]
        return [event for event in found if event["phase"] == "intent"]

    async def audit(self) -> Audited:
        """Verify the chain from its first row to its last."""
        return await self._database.scan(self._audit)

    def _audit(self, connection: sqlite3.Connection) -> Audited:
        count = connection.execute("SELECT count(*) FROM ledger").fetchone()[0]
        if (ends := chain_ends(connection)) is None:
            problems = ["the table with the ends of its chain has been removed or altered"]
            return Audited(service=self._service, rows=count, first=0, last=0, hash="", problems=problems)
        rows = connection.execute("SELECT seq, body, hash FROM ledger ORDER BY seq")
        return Audited(
            service=self._service,
            rows=count,
            first=ends["pruned_seq"] + 1,
            last=ends["last_seq"],
            hash=ends["last_hash"].hex(),
            problems=chain.audit(rows, ends, first_left(connection)),
        )


def _about(pruned: Pruned) -> Entry:
    """The row for removed rows: a failure if these had been tampered with."""
    problems = pruned.problems
    return Entry(
        phase="failed" if problems else "done",
        caller=Caller(Peer(os.getuid(), os.getgid(), os.getpid())),
        action="prune",
        object=None,
        before={"first": pruned.first},
        after={"first": pruned.last + 1},
        error=Conflict.code if problems else None,
        message=f"not what CircleOSD wrote: {'; '.join(problems)}" if problems else None,
    )


def _refused(row: Event) -> Who | None:
    """Whose allowance a row with an error counts against; None if it is about an act."""
    actor = row["actor"]
    if row["intent"] is not None:
        return None
    return _whose(actor["uid"], actor["user"], actor["plugin"])


def _whose(uid: int, user: str | None, plugin: str | None) -> Who:
    """Whose allowance counts. Root and the service's own uid are no strangers, even if a token of theirs is refused."""
    return Who(plugin or uid, not (plugin or user or role_of_uid(uid, os.getuid())))


def _summary(window: Counted[Entry]) -> Entry:
    """The row for counted refusals."""
    if not window.mixed:
        return window.last._replace(attempts=window.count)
    by = "this plugin" if window.last.caller.plugin else "this uid"
    if window.key[0] == STRANGERS:
        by = "uids without a user"
    message = f"{window.count} more refused attempts by {by}, of different kinds; the last: {window.last.message}"
    return window.last._replace(attempts=window.count, object=None, params={}, message=message)
