"""The rows of a ledger in SQLite: their tables, and functions of a connection or transaction that read them.

A row's `body` is one JSON object (the fields of `api.common.Event`, without the service). `ledger_ends` has one row:
the hash of the last pruned row, where the chain starts, and that of the last row, where it ends. So altered, inserted
and deleted rows are detected, including the oldest and the newest.
"""

from __future__ import annotations

import re
import sqlite3
from typing import Any, cast

from circleosd import wire
from circleosd.api.common import Event, Follow, History
from circleosd.database import Transaction
from circleosd.errors import BadRequest, CircleError, Conflict

# A body may be damaged. Queries would fail on invalid JSON; and removing a row, and with it every change, would fail if
# an index entry did not match the body. So these columns have no index.
_OF_BODY = "GENERATED ALWAYS AS (CASE WHEN json_valid(body) THEN json_extract(body, '$.{}') END) VIRTUAL"

LEDGER_SCHEMA = f"""
CREATE TABLE ledger (
    seq INTEGER PRIMARY KEY,
    body TEXT NOT NULL,
    hash BLOB NOT NULL,
    time REAL {_OF_BODY.format("time")},
    user TEXT {_OF_BODY.format("actor.user")},
    uid INTEGER {_OF_BODY.format("actor.uid")},
    object TEXT {_OF_BODY.format("object")},
    action TEXT {_OF_BODY.format("action")},
    error TEXT {_OF_BODY.format("error")}
);
CREATE TABLE ledger_ends (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    pruned_seq INTEGER NOT NULL,
    pruned_hash BLOB NOT NULL,
    last_seq INTEGER NOT NULL,
    last_hash BLOB NOT NULL
);
INSERT INTO ledger_ends VALUES (1, 0, zeroblob(32), 0, zeroblob(32));
CREATE TABLE ledger_open (seq INTEGER PRIMARY KEY)
"""

END_OF_TIME = 253402300800.0  # the year 10000; much later times cannot be shown
_NONE = type(None)
SHAPE: dict[str, tuple[type, ...]] = {  # of a row's body
    "seq": (int,), "time": (int, float), "phase": (str,), "actor": (dict,), "action": (str,), "object": (str, _NONE),
    "params": (dict,), "before": (object,), "after": (object,), "error": (str, _NONE), "message": (str, _NONE),
    "duration": (int, float, _NONE), "intent": (int, _NONE), "count": (int,),
}  # fmt: skip
ACTOR = ("uid", "gid", "pid", "exe", "unit", "login", "user", "session", "plugin")
_PRUNED = '"action":"prune"'  # in the body of a row about pruning; within a text, the quotes would be escaped
LAST = 2**62  # larger than any row's number; an integer of SQLite may be twice as large


def chain_ends(connection: sqlite3.Connection | Transaction) -> sqlite3.Row | None:
    """The row of `ledger_ends`; None if it is missing or invalid."""
    row: sqlite3.Row | None = connection.execute("SELECT * FROM ledger_ends").fetchone()
    written = row and [type(value) for value in row] == [int, int, bytes, int, bytes] and row["last_seq"] < LAST
    return row if written else None


def first_left(connection: sqlite3.Connection | Transaction) -> int | None:
    """The first remaining row according to the newest row about pruning; 1 if there is none, None if it names none."""
    newest = f"SELECT body FROM ledger WHERE instr(body, '{_PRUNED}') ORDER BY seq DESC LIMIT 1"
    if (row := connection.execute(newest).fetchone()) is None:
        return 1
    try:
        first = wire.decode_object(row["body"].encode())["after"]["first"]
    except (BadRequest, AttributeError, TypeError, LookupError):
        return None
    return first if isinstance(first, int) else None


def matching(
    connection: sqlite3.Connection, wanted: History | Follow, since: float | None, after: int, order: str, lines: int
) -> list[sqlite3.Row]:
    """The first `lines` rows that match, in that order (ASC or DESC), of those after the row `after`."""
    where, values = ["seq > ?"], list[Any]([after])
    if wanted.user is not None:
        number = re.fullmatch(r"[0-9]{1,10}", wanted.user)
        where.append("uid = ?" if number else "user = ?")
        values.append(int(wanted.user) if number else wanted.user)
    if wanted.object is not None:
        glob = re.search(r"[*?]", wanted.object)
        where.append("object GLOB ?" if glob else "object = ?")
        values.append(wanted.object.replace("[", "[[]") if glob else wanted.object)  # as in rules, without brackets
    if wanted.action_name is not None:
        where.append("action = ?")
        values.append(wanted.action_name)
    if since is not None:
        where.append("time >= ?")
        values.append(since)
    if wanted.failed:
        where.append("error IS NOT NULL")
    sql = f"SELECT seq, body FROM ledger WHERE {' AND '.join(where)} ORDER BY seq {order} LIMIT ?"
    return connection.execute(sql, (*values, lines)).fetchall()


def as_event(service: str, seq: int, body: str) -> Event:
    """A row for display. One that CircleOSD cannot have written is marked, so that the others can be read."""
    try:
        row = wire.decode_shallow(body.encode())  # a row that could be read but not shown is also invalid
    except (CircleError, AttributeError):
        row = {}
    if _well_formed(row, seq):
        return cast(Event, {"service": service, **row})
    return Event(
        service=service,
        seq=seq,
        time=0.0,
        phase="failed",
        actor=dict.fromkeys(ACTOR),
        action="?",
        object=None,
        params={},
        before=None,
        after=None,
        error=Conflict.code,
        message=f"row {seq} is not what CircleOSD wrote; see: circlectl system history --verify",
        duration=None,
        intent=None,
        count=1,
    )


def _well_formed(row: dict[str, Any], seq: int) -> bool:
    return (
        row.keys() == SHAPE.keys()
        and all(isinstance(row[key], types) for key, types in SHAPE.items())
        and row["seq"] == seq
        and 0 <= row["time"] < END_OF_TIME
        and row["actor"].keys() == set(ACTOR)
    )
