"""The ledger on a real SQLite file."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from circleosd import ledger
from circleosd.api.common import Event, History
from circleosd.database import Database, Transaction
from circleosd.errors import Unavailable
from circleosd.ledger import Entry, Ledger
from circleosd.policy import Caller, Role
from tests.unit.fakes import ROOT

ROOT_CALLER = Caller(ROOT, Role.ADMIN, "root")


class Open:
    """A database with a ledger, and what was mirrored."""

    def __init__(self, path: Path) -> None:
        self.database = Database(path, (ledger.SCHEMA,))
        self.mirrored: list[Event] = []
        self.ledger = Ledger(self.database, "a-service", self.mirrored.append)

    def record(self, action: str, **fields: object) -> int:
        entry = Entry("done", ROOT_CALLER, action, **fields)  # type: ignore[arg-type]  # any of Entry's
        return asyncio.run(self.ledger.record(entry))

    def history(self, **query: object) -> list[Event]:
        return asyncio.run(self.ledger.history(History(**query)))  # type: ignore[arg-type]  # any of History's


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    book = Open(tmp_path / "l.db")
    yield book
    book.database.close()


def test_rows_are_numbered_and_each_hash_covers_the_row_and_the_one_before(opened: Open, tmp_path: Path) -> None:
    assert [opened.record(f"act{number}", object="x") for number in range(3)] == [1, 2, 3]
    with sqlite3.connect(tmp_path / "l.db") as raw:
        rows = raw.execute("SELECT body, hash FROM ledger ORDER BY seq").fetchall()
    raw.close()
    previous = ledger.GENESIS
    for body, digest in rows:
        assert digest == ledger.chain(previous, body)
        previous = digest


def test_what_is_rolled_back_leaves_no_row_and_is_not_mirrored(opened: Open) -> None:
    def work(tx: Transaction) -> None:
        opened.ledger.append(tx, Entry("done", ROOT_CALLER, "create", "x"))
        raise KeyError("stop")

    with pytest.raises(KeyError):
        asyncio.run(opened.database.write(work))
    assert opened.history() == []
    assert opened.mirrored == []


def test_history_filters_and_returns_the_newest_in_order(opened: Open) -> None:
    for number in range(5):
        opened.record(
            "start" if number % 2 else "stop", object=f"unit{number}", error="denied" if number == 3 else None
        )
    assert [row["object"] for row in opened.history(lines=2)] == ["unit3", "unit4"]
    assert [row["object"] for row in opened.history(action_name="start")] == ["unit1", "unit3"]
    assert [row["object"] for row in opened.history(failed=True)] == ["unit3"]
    assert [row["object"] for row in opened.history(object="unit2")] == ["unit2"]
    assert opened.history(user="nobody") == []
    assert len(opened.history(user="root", since=0.0)) == 5


def test_the_actor_is_who_the_kernel_says(opened: Open) -> None:
    opened.record("start", object=None)
    actor = opened.history()[0]["actor"]
    assert (actor["uid"], actor["pid"], actor["user"]) == (0, 1, "root")


def test_a_database_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    Database(tmp_path / "n.db", (ledger.SCHEMA,)).close()
    with pytest.raises(Unavailable, match="newer than this CircleOSD"):
        Database(tmp_path / "n.db", ())


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(Unavailable, match="not a database"):
        Database(tmp_path / "x.db", (ledger.SCHEMA,))
