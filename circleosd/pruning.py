"""Removing the oldest rows of a ledger, according to the settings."""

from __future__ import annotations

from typing import NamedTuple

from circleosd import chain
from circleosd.config import LedgerSettings
from circleosd.database import Transaction
from circleosd.rows import first_left

PRUNED_AT_ONCE = 5000  # rows that one append removes at most, so that no caller waits long for it
SLACK = 0.05  # of keep_rows: how much the ledger grows before it is pruned again, which also writes a row
ALWAYS_KEPT = 1000  # rows that are not removed for their age alone: a wrong clock must not empty the ledger …
AT_LEAST_PRUNED = 100  # … and fewer rows are not worth a row about their removal
DAY = 86400.0


class Pruned(NamedTuple):
    """The numbers of the first and the last removed row, and in words what was wrong with the removed ones."""

    first: int
    last: int
    problems: list[str]


def prune(tx: Transaction, settings: LedgerSettings, now: float) -> Pruned | None:
    """Remove the oldest rows beyond the limits, if there are enough of them. `now` in seconds since the epoch.

    Verifies them before, and makes the chain start with the rest.
    """
    ends = tx.execute("SELECT pruned_seq, pruned_hash, last_seq FROM ledger_ends").fetchone()
    first, last = ends["pruned_seq"] + 1, ends["last_seq"]
    beyond = max(_too_many(first, last, settings.keep_rows), _too_old(tx, first, last, settings.keep_days, now))
    up_to = min(beyond, first - 1 + PRUNED_AT_ONCE)
    if up_to < first:
        return None
    # The chain continues from the last removed row, so this must be an existing row.
    there = tx.execute("SELECT min(seq) AS seq FROM ledger WHERE seq >= ?", (up_to,)).fetchone()
    up_to = int(there["seq"])  # at least the row that was just written
    rows = tx.execute("SELECT seq, body, hash FROM ledger WHERE seq <= ? ORDER BY seq", (up_to,))
    left = first_left(tx) if first > 1 else 1  # the first time, it would look at every row
    problems, digest, _ = chain.follow(rows, first, ends["pruned_hash"], left)
    tx.execute("DELETE FROM ledger WHERE seq <= ?", (up_to,))
    tx.execute("UPDATE ledger_ends SET pruned_seq = ?, pruned_hash = ?", (up_to, digest))
    return Pruned(first, up_to, problems)


def _too_many(first: int, last: int, keep: int) -> int:
    """The last row to prune because of the number of rows; below `first` if there are not too many."""
    return last - keep if last - first + 1 > keep * (1 + SLACK) else 0


def _too_old(tx: Transaction, first: int, last: int, days: float, now: float) -> int:
    """The last row to prune because of its age. Checked only when the oldest row is a day over the limit.

    The clock may be ahead: it counts only once AT_LEAST_PRUNED rows were written by it.
    """
    if last - first + 1 < ALWAYS_KEPT + AT_LEAST_PRUNED:
        return 0
    recent = "SELECT min(time, ?) AS now FROM ledger WHERE seq = ?"
    known = tx.execute(recent, (now, last - AT_LEAST_PRUNED + 1)).fetchone()
    if known is None or known["now"] is None:  # removed or altered
        return 0
    limit = known["now"] - days * DAY
    if not tx.execute("SELECT 1 FROM ledger WHERE seq = ? AND time < ?", (first, limit - DAY)).fetchone():
        return 0
    kept = tx.execute(
        "SELECT min(seq) AS seq FROM ledger WHERE seq BETWEEN ? AND ? AND time >= ?",
        (first, first + PRUNED_AT_ONCE, limit),
    ).fetchone()
    young = kept["seq"] if kept["seq"] is not None else first + PRUNED_AT_ONCE
    return min(int(young) - 1, last - ALWAYS_KEPT)
