"""The ledger: every mutation and every denied attempt, in the service's own database, chained by hash.

A row's `body` is one JSON object (the fields of `api.common.Event`, without the service); its hash is
sha256(hash of the row before + body), so that an altered, inserted or deleted row shows. Phases: `done` (state
changed in
the same transaction), `intent` and then `outcome` (an act outside the database), `failed`, `denied`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from circleosd.api.common import Event, History
from circleosd.database import Database, Transaction
from circleosd.policy import Caller

Phase = Literal["done", "intent", "outcome", "failed", "denied"]

SCHEMA = """
CREATE TABLE ledger (
    seq INTEGER PRIMARY KEY,
    body TEXT NOT NULL,
    hash BLOB NOT NULL,
    time REAL GENERATED ALWAYS AS (json_extract(body, '$.time')) VIRTUAL,
    user TEXT GENERATED ALWAYS AS (json_extract(body, '$.actor.user')) VIRTUAL,
    object TEXT GENERATED ALWAYS AS (json_extract(body, '$.object')) VIRTUAL,
    action TEXT GENERATED ALWAYS AS (json_extract(body, '$.action')) VIRTUAL,
    error TEXT GENERATED ALWAYS AS (json_extract(body, '$.error')) VIRTUAL
);
CREATE INDEX ledger_time ON ledger (time)
"""
GENESIS = bytes(32)  # what stands for the hash before the first row


@dataclass(frozen=True)
class Entry:
    """What a row says, besides its number and time. `duration` is in seconds, `intent` the row this one completes."""

    phase: Phase
    caller: Caller
    action: str
    object: str | None
    params: dict[str, Any] = field(default_factory=dict)
    before: Any = None
    after: Any = None
    error: str | None = None
    message: str | None = None
    duration: float | None = None
    intent: int | None = None


def _link(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:  # the process is gone, or not ours to look at
        return None


def _unit(pid: int) -> str | None:
    """The systemd unit that a process belongs to, from its control group (cgroups(7))."""
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8") as lines:
            paths = [line.rstrip("\n").split(":", 2)[2] for line in lines]
    except OSError:
        return None
    names = [part for path in paths for part in path.split("/") if part.endswith((".service", ".scope"))]
    return names[-1] if names else None


def actor(caller: Caller) -> dict[str, Any]:
    """Who acted, as a row keeps it. What /proc says of a process that has already ended is None."""
    peer = caller.peer
    return {
        "uid": peer.uid,
        "gid": peer.gid,
        "pid": peer.pid,
        "exe": _link(f"/proc/{peer.pid}/exe"),
        "unit": _unit(peer.pid),
        "user": caller.user,
        "session": caller.session,
    }


def chain(previous: bytes, body: str) -> bytes:
    """The hash of a row."""
    return hashlib.sha256(previous + body.encode()).digest()


class Ledger:
    """Writes and reads one service's rows. `mirror` gets each row once it is on disk."""

    def __init__(self, database: Database, service: str, mirror: Callable[[Event], None]) -> None:
        self._database = database
        self._service = service
        self._mirror = mirror

    def append(self, tx: Transaction, entry: Entry) -> int:
        """Add a row within a transaction; return its number."""
        last = tx.execute("SELECT seq, hash FROM ledger ORDER BY seq DESC LIMIT 1").fetchone()
        seq = last["seq"] + 1 if last else 1
        row = {
            "seq": seq,
            "time": time.time(),
            "phase": entry.phase,
            "actor": actor(entry.caller),
            "action": entry.action,
            "object": entry.object,
            "params": entry.params,
            "before": entry.before,
            "after": entry.after,
            "error": entry.error,
            "message": entry.message,
            "duration": entry.duration,
            "intent": entry.intent,
        }
        body = json.dumps(row, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
        tx.execute(
            "INSERT INTO ledger (seq, body, hash) VALUES (?, ?, ?)",
            (seq, body, chain(last["hash"] if last else GENESIS, body)),
        )
        event = self._event(body)
        tx.after_commit(lambda: self._mirror(event))
        return seq

    async def record(self, entry: Entry) -> int:
        """Add a row in a transaction of its own; return its number once it is on disk."""
        return await self._database.write(lambda tx: self.append(tx, entry))

    async def history(self, query: History) -> list[Event]:
        """The newest rows that match, oldest first."""
        return await self._database.read(lambda connection: self._select(connection, query))

    def _select(self, connection: sqlite3.Connection, query: History) -> list[Event]:
        where, values = ["1"], list[Any]()
        for column, value in (("user", query.user), ("object", query.object), ("action", query.action_name)):
            if value is not None:
                where.append(f"{column} = ?")
                values.append(value)
        if query.since is not None:
            where.append("time >= ?")
            values.append(query.since)
        if query.failed:
            where.append("error IS NOT NULL")
        rows = connection.execute(
            f"SELECT body FROM ledger WHERE {' AND '.join(where)} ORDER BY seq DESC LIMIT ?", (*values, query.lines)
        ).fetchall()
        return [self._event(row["body"]) for row in reversed(rows)]

    def _event(self, body: str) -> Event:
        return cast(Event, {"service": self._service, **json.loads(body)})
