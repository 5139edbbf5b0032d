"""What a transaction is to who does not wait for it any longer, and which files are no database of ours."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from circleosd.database import RESTORE, Database, Transaction
from circleosd.errors import Unavailable
from tests.waiting import SECONDS


class Slow:
    """Adds a number to a table, once it may."""

    def __init__(self) -> None:
        self.begun, self.may_end = threading.Event(), threading.Event()

    def __call__(self, tx: Transaction) -> str:
        self.begun.set()
        assert self.may_end.wait(SECONDS)
        tx.execute("INSERT INTO numbers VALUES (1)")
        return "added"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(tmp_path / "d.db", ("CREATE TABLE numbers (number INTEGER)",))
    yield opened
    opened.close()


async def count(database: Database) -> int:
    return await database.read(lambda db: int(db.execute("SELECT count(*) FROM numbers").fetchone()[0]))


def test_a_transaction_that_has_begun_is_waited_for_and_its_outcome_told(database: Database) -> None:
    async def scenario() -> None:
        slow = Slow()
        asking = asyncio.create_task(database.write(slow))
        await asyncio.to_thread(slow.begun.wait)
        for _ in range(2):  # for its time has run out, and then the service ends
            asking.cancel()
            await asyncio.sleep(0.05)  # in which it would end, were it not to wait
        assert not asking.done()
        slow.may_end.set()
        assert await asking == "added"
        assert await count(database) == 1

    asyncio.run(scenario())


def test_a_transaction_that_still_waits_for_its_turn_can_be_cancelled(database: Database) -> None:
    async def scenario() -> None:
        slow, other = Slow(), Slow()
        first = asyncio.create_task(database.write(slow))
        await asyncio.to_thread(slow.begun.wait)
        second = asyncio.create_task(database.write(other))
        await asyncio.sleep(0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        slow.may_end.set()
        await first
        assert (other.begun.is_set(), await count(database)) == (False, 1)

    asyncio.run(scenario())


def test_a_schema_that_is_no_text_any_more_is_said_to_be_damaged(tmp_path: Path) -> None:
    path, migrations = tmp_path / "d.db", ("CREATE TABLE numbers (number INTEGER)",)
    Database(path, migrations).close()
    opened = Database(path, migrations)
    path.write_bytes(path.read_bytes().replace(b"numbersnumbers\x02CREATE", b"\xaf" * 21))
    with pytest.raises(Unavailable, match=rf"^cannot use d\.db: the file is damaged; {RESTORE}$"):
        asyncio.run(opened.scan(lambda db: db.execute("SELECT * FROM numbers")))
    opened.close()
    with pytest.raises(Unavailable, match=rf"^cannot open .*/d\.db: the file is damaged; {RESTORE}$"):
        Database(path, migrations)


def test_a_damaged_page_is_a_reason_to_restore_a_backup(tmp_path: Path) -> None:
    path, migrations = tmp_path / "d.db", ("CREATE TABLE numbers (number INTEGER)",)
    Database(path, migrations).close()
    path.write_bytes(path.read_bytes()[:4096] + bytes(4096))  # its schema alone is left
    opened = Database(path, migrations)
    with pytest.raises(Unavailable, match=rf"^cannot use d\.db: database disk image is malformed; {RESTORE}$"):
        asyncio.run(opened.read(lambda db: db.execute("SELECT * FROM numbers").fetchall()))
    opened.close()


def test_a_commit_is_synced_in_a_way_in_which_no_reader_waits_for_it(database: Database) -> None:
    def told(tx: Transaction) -> list[object]:
        return [tx.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous", "foreign_keys")]

    assert asyncio.run(database.write(told)) == ["wal", 2, 1]  # 2: FULL, sqlite.org/pragma.html


def test_a_file_that_could_at_first_be_opened_for_reading_alone_is_written_to_when_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SQLite does it where open(2) fails for want of a descriptor."""
    path, migrations = tmp_path / "d.db", ("CREATE TABLE numbers (number INTEGER)",)
    Database(path, migrations).close()
    connect, modes = sqlite3.connect, ["ro"]

    def without_descriptors(path: str, **how: Any) -> sqlite3.Connection:
        opened: sqlite3.Connection = connect(f"file:{path}?mode={modes.pop() if modes else 'rw'}", uri=True, **how)
        return opened

    monkeypatch.setattr(sqlite3, "connect", without_descriptors)
    opened = Database(path, migrations)

    async def scenario() -> None:
        with pytest.raises(Unavailable, match="attempt to write a readonly database"):
            await opened.write(lambda tx: tx.execute("INSERT INTO numbers VALUES (1)"))
        await opened.write(lambda tx: tx.execute("INSERT INTO numbers VALUES (2)"))
        assert await count(opened) == 1

    asyncio.run(scenario())
    opened.close()


USERS = """
CREATE TABLE users (name TEXT PRIMARY KEY);
CREATE TABLE grants (user TEXT NOT NULL REFERENCES users (name) ON DELETE CASCADE);
INSERT INTO users VALUES ('alice');
INSERT INTO grants VALUES ('alice')
"""
# As sqlite.org/lang_altertable.html has it: ALTER TABLE cannot add such a column.
WITH_UID = """
CREATE TABLE new_users (name TEXT PRIMARY KEY, uid INTEGER UNIQUE);
INSERT INTO new_users (name) SELECT name FROM users;
DROP TABLE users;
ALTER TABLE new_users RENAME TO users
"""


def test_a_migration_that_replaces_a_table_keeps_what_refers_to_it(tmp_path: Path) -> None:
    Database(tmp_path / "m.db", (USERS,)).close()
    opened = Database(tmp_path / "m.db", (USERS, WITH_UID))

    async def scenario() -> None:
        assert await opened.read(lambda db: [*map(tuple, db.execute("SELECT * FROM users"))]) == [("alice", None)]
        await opened.write(lambda tx: tx.execute("INSERT INTO grants VALUES ('alice')"))
        with pytest.raises(sqlite3.IntegrityError):
            await opened.write(lambda tx: tx.execute("INSERT INTO grants VALUES ('bob')"))
        assert await opened.read(lambda db: len(db.execute("SELECT * FROM grants").fetchall())) == 2
        await opened.write(lambda tx: tx.execute("DELETE FROM users"))
        assert await opened.read(lambda db: db.execute("SELECT * FROM grants").fetchall()) == []

    asyncio.run(scenario())
    opened.close()


def test_a_migration_that_fails_changes_nothing_and_is_tried_again(tmp_path: Path) -> None:
    Database(tmp_path / "m.db", (USERS,)).close()
    with pytest.raises(Unavailable, match="no such table: missing"):
        Database(tmp_path / "m.db", (USERS, WITH_UID.replace("DROP TABLE users", "DROP TABLE missing")))
    opened = Database(tmp_path / "m.db", (USERS, WITH_UID))
    columns = asyncio.run(opened.read(lambda db: [row["name"] for row in db.execute("PRAGMA table_info(users)")]))
    assert columns == ["name", "uid"]
    opened.close()


def test_a_database_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    Database(tmp_path / "n.db", ("CREATE TABLE numbers (number INTEGER)",)).close()
    with pytest.raises(Unavailable, match="newer than this CircleOSD"):
        Database(tmp_path / "n.db", ())


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(Unavailable, match=f"not a database; {RESTORE}$"):
        Database(tmp_path / "x.db", ("CREATE TABLE numbers (number INTEGER)",))


def test_why_a_database_cannot_be_used_is_logged_but_not_as_often_as_it_is_asked(
    tmp_path: Path, database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def refused() -> None:
        with pytest.raises(Unavailable):
            await database.write(lambda tx: tx.execute("INSERT INTO numbers VALUES (1)"))

    (tmp_path / "d.db").unlink()
    for _ in range(3):
        asyncio.run(refused())
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert caplog.messages[0].startswith("cannot use d.db: it was removed or replaced")
    monkeypatch.setattr("circleosd.database.LOGGED_EVERY", 0.0)
    asyncio.run(refused())
    assert len(caplog.messages) == 2
