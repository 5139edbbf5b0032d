"""SQLite behind one thread: transactions that are on disk before anybody hears of them."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from circleosd.errors import Unavailable

T = TypeVar("T")


class Transaction:
    """An open write transaction, as `Database.write` hands it to its work."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._after: list[Callable[[], None]] = []

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> sqlite3.Cursor:
        """Run one statement; rows answer by column name."""
        return self._connection.execute(sql, parameters)

    def after_commit(self, call: Callable[[], None]) -> None:
        """Have `call` run once the transaction is on disk, and never if it is rolled back."""
        self._after.append(call)

    def committed(self) -> None:
        """Run what `after_commit` collected."""
        for call in self._after:
            call()


class Database:
    """One SQLite file. All work runs in one thread of its own, so the event loop never waits for the disk.

    `migrations[i]` is a script that brings the schema from version i to i + 1 (PRAGMA user_version). A commit is
    synced to disk before `write` returns (WAL with synchronous=FULL, sqlite.org/pragma.html).
    """

    def __init__(self, path: Path, migrations: Sequence[str]) -> None:
        """Open or create the file. Raises `Unavailable` if that cannot be done."""
        self.path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="database")
        try:
            self._connection = self._thread.submit(self._open, migrations).result()
        except sqlite3.Error as exc:
            raise Unavailable(f"cannot open {path}: {exc}") from exc

    def _open(self, migrations: Sequence[str]) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, isolation_level=None, timeout=10)
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute("PRAGMA cache_size=-2048")  # KiB; the services promise a small memory
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > len(migrations):
            raise sqlite3.DatabaseError(f"its schema version {version} is newer than this CircleOSD")
        for number, script in enumerate(migrations[version:], version + 1):
            connection.executescript(f"BEGIN IMMEDIATE; {script}; PRAGMA user_version={number}; COMMIT")
        return connection

    async def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work` in the database's thread. Raises `Unavailable` when SQLite fails."""
        return await self._run(lambda: work(self._connection))

    async def write(self, work: Callable[[Transaction], T]) -> T:
        """Run `work` in one transaction and return its result once that is on disk.

        Whatever `work` raises rolls back and is passed on, sqlite3.IntegrityError too. Raises `Unavailable` when
        SQLite fails (a full disk, say).
        """
        return await self._run(lambda: self._write(work))

    def _write(self, work: Callable[[Transaction], T]) -> T:
        transaction = Transaction(self._connection)
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            result = work(transaction)
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise
        transaction.committed()
        return result

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except sqlite3.IntegrityError:  # the work broke a rule of its own tables, which is for it to explain
            raise
        except sqlite3.Error as exc:
            raise Unavailable(f"cannot use {self.path.name}: {exc}") from exc

    def close(self) -> None:
        """Finish what is queued and close the file."""
        self._thread.submit(self._connection.close).result()
        self._thread.shutdown()
