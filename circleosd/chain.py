"""The chain formed by a ledger's rows: the hash of a row is sha256(hash of the previous row + body). No I/O here."""

from __future__ import annotations

from collections.abc import Iterable
from sqlite3 import Row
from typing import NamedTuple

PROBLEMS_SHOWN = 20


class Followed(NamedTuple):
    """The problems found in a piece of the chain, and the hash and number of its last row."""

    problems: list[str]
    hash: bytes
    last: int


def linked(previous: bytes, body: str) -> bytes:
    """The hash of a row that follows one with the hash `previous`."""
    import hashlib  # imports OpenSSL, which a start of the service need not wait for

    return hashlib.sha256(previous + body.encode()).digest()


def follow(rows: Iterable[Row], first: int, previous: bytes, first_left: int | None) -> Followed:
    """Verify rows (`seq`, `body`, `hash`) that should start with number `first`, after a row with the hash `previous`.

    `first_left` is the first remaining row according to the newest row about pruning; 1 if there is none. Stops
    collecting problems once there are as many as are shown.
    """
    problems = [f"no row records the removal of those before row {first}"] if first_left != first else []
    expected = first
    for row in rows:
        if len(problems) < PROBLEMS_SHOWN and (problem := _problem(row, expected, previous)):
            problems.append(problem)
        previous, expected = row["hash"] if isinstance(row["hash"], bytes) else b"", row["seq"] + 1
    return Followed(problems, previous, expected - 1)


def audit(rows: Iterable[Row], ends: Row, first_left: int | None) -> list[str]:
    """The problems of the whole chain: its rows, and its ends according to the row of `ledger_ends`."""
    problems, digest, seen = follow(rows, ends["pruned_seq"] + 1, ends["pruned_hash"], first_left)
    last = ends["last_seq"]
    if seen < last:
        problems.append(f"{_rows(seen + 1, last)} missing at the end")
    elif seen > last:
        problems.append(f"{_rows(last + 1, seen)} not written by CircleOSD")
    elif digest != ends["last_hash"] and not problems:
        problems.append(f"the hash of row {last}, the last, has been altered")
    return problems


def _problem(row: Row, expected: int, previous: bytes) -> str | None:
    """What is wrong with a row that should have the number `expected` and follow one with the hash `previous`."""
    if row["seq"] > expected:
        return f"{_rows(expected, row['seq'] - 1)} missing"
    if row["seq"] < expected:
        return f"row {row['seq']} is in the place of row {expected}"
    if not isinstance(row["body"], str) or linked(previous, row["body"]) != row["hash"]:
        return f"row {row['seq']} has been altered, or the one before it replaced"
    return None


def _rows(first: int, last: int) -> str:
    return f"row {first} is" if first == last else f"rows {first} to {last} are"
