"""SQLite in separate threads: a transaction is on disk before anybody learns of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from circleosd.errors import Unavailable
from circleosd.threads import Threads

T = TypeVar("T")

log = logging.getLogger(__name__)

# KiB of page cache for each connection; the services promise a small memory, and the kernel caches the file too.
WRITE_CACHE = 2048
READ_CACHE = 2048
SCAN_CACHE = 512
LEAST_SPACE = 64 * 1024  # bytes that SQLite may need to open a file: its index of the WAL has 32 KiB
LEAST_INODES = 2  # for the WAL and its index
LOGGED_EVERY = 60.0  # seconds: others decide how often a database that cannot be used is asked
RESTORE = "restore a backup, see: man circleosd"
# SQLite quotes data of a damaged file that it cannot read; if that is not text, Python's sqlite3 fails on the message.
_FAILURES = (sqlite3.Error, UnicodeDecodeError)


class Transaction:
    """An open write transaction, passed to the function given to `Database.write`."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._after: list[Callable[[], None]] = []

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> sqlite3.Cursor:
        """Run one statement; the columns of rows are accessible by name."""
        return self._connection.execute(sql, parameters)

    def after_commit(self, call: Callable[[], None]) -> None:
        """Call `call` once the transaction is on disk; never if it is rolled back."""
        self._after.append(call)

    def committed(self) -> None:
        """Run the functions collected by `after_commit`. Errors are logged: the transaction is already on disk."""
        for call in self._after:
            try:
                call()
            except Exception:
                log.exception("after a commit")


class Database:
    """One SQLite file. The event loop never waits for the disk: there is a thread each for writes, reads and scans.

    `migrations[i]` is a script that upgrades the schema from version i to i + 1 (PRAGMA user_version). A commit is
    synced to disk before `write` returns (WAL with synchronous=FULL, sqlite.org/pragma.html). A read sees all earlier
    commits and waits for none (sqlite.org/wal.html). Once the file has been removed or replaced, nothing is written any
    more: it would be lost when the process ends.
    """

    def __init__(self, path: str | os.PathLike[str], migrations: Sequence[str]) -> None:
        """Open or create the file. Raises `Unavailable` if that is impossible."""
        self.path = os.fspath(path)
        self._migrations = migrations
        self._logged = -LOGGED_EVERY
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="database")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="database-read")
        self._scanner = Threads(1, thread_name_prefix="database-scan")
        try:
            self._connection = self._writer.submit(self._connect, self._for_writing).result()
            self._reading = self._reader.submit(self._connect, partial(_for_reading, cache=READ_CACHE)).result()
            self._file = self._at_path()
        except _FAILURES as exc:
            raise Unavailable(f"cannot open {path}: {self._why_not(exc)}") from exc

    def _for_writing(self, connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute(f"PRAGMA cache_size=-{WRITE_CACHE}")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > len(self._migrations):
            raise sqlite3.DatabaseError(f"its schema version {version} is newer than this CircleOSD")
        for number, script in enumerate(self._migrations[version:], version + 1):
            connection.executescript(f"BEGIN IMMEDIATE; {script}; PRAGMA user_version={number}; COMMIT")
        # Not earlier, or a migration that replaces a table empties those that refer to it (sqlite.org/lang_altertable).
        connection.execute("PRAGMA foreign_keys=ON")

    def _why_not(self, failure: Exception) -> str:
        """Why the file could not be opened; SQLite only says that it could not."""
        if missing := self._missing_on_disk():
            return f"no {missing} left on its disk"
        if getattr(failure, "sqlite_errorcode", None) == sqlite3.SQLITE_CANTOPEN:
            try:
                os.close(os.open(self.path, os.O_RDWR))
            except OSError as exc:
                return exc.strerror or str(exc)
        return _told(failure)

    def _missing_on_disk(self) -> str | None:
        found = os.statvfs(os.path.dirname(self.path) or ".")
        if found.f_bavail * found.f_frsize < LEAST_SPACE:
            return "space is"
        if found.f_files and found.f_favail < LEAST_INODES:  # without f_files, the file system makes inodes as needed
            return "inodes are"
        return None

    def _at_path(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def _require_file(self) -> None:
        """Raises `Unavailable` unless the path still leads to the open file."""
        if self._at_path() != self._file:
            name = os.path.basename(self.path)
            raise Unavailable(f"cannot use {name}: it was removed or replaced; the service has to be restarted")

    def _connect(self, set_up: Callable[[sqlite3.Connection], None]) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, isolation_level=None, timeout=10)
        try:
            connection.row_factory = sqlite3.Row
            # Text that a failing disk made invalid UTF-8 must not hide other rows; a ledger's hashes reveal it.
            connection.text_factory = lambda data: data.decode("utf-8", "replace")
            set_up(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    async def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work`, which must be short, in one snapshot. Raises `Unavailable` if SQLite fails."""
        return await self._run(self._reader, lambda: _snapshot(self._reading, work))

    async def scan(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work`, which may read very many rows, in one snapshot, without delaying `read`."""

        def scanning() -> T:
            self._require_file()
            with contextlib.closing(self._connect(partial(_for_reading, cache=SCAN_CACHE))) as connection:
                return _snapshot(connection, work)

        return await self._run(self._scanner, scanning)

    async def write(self, work: Callable[[Transaction], T]) -> T:
        """Run `work` in one transaction and return its result once that is on disk.

        Any exception of `work` rolls back and is passed on, including sqlite3.IntegrityError. Raises `Unavailable` if
        SQLite fails (for example because the disk is full).

        Cancelling has an effect only before `work` has started. After that, the cancellation is ignored: the
        transaction happens, and the caller gets its result.
        """
        begun = self._writer.submit(lambda: self._write(work))
        outcome = asyncio.wrap_future(begun)
        with self._explained():
            while True:
                try:
                    await asyncio.wait([outcome])
                    return outcome.result()
                except asyncio.CancelledError:
                    if begun.cancel():
                        raise

    def _write(self, work: Callable[[Transaction], T]) -> T:
        self._require_file()
        transaction = Transaction(self._connection)
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            result = work(transaction)
            self._commit()
        except BaseException as exc:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            if getattr(exc, "sqlite_errorcode", None) == sqlite3.SQLITE_READONLY:
                # SQLite opens a file read-only if it cannot open it for writing, even if only descriptors were missing.
                opened, self._connection = self._connection, self._connect(self._for_writing)
                opened.close()
            raise
        transaction.committed()
        return result

    def _commit(self) -> None:
        self._connection.execute("COMMIT")

    async def _run(self, thread: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        with self._explained():
            return await asyncio.get_running_loop().run_in_executor(thread, work)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.IntegrityError:  # the work broke a rule of its own tables, which is for it to explain
            raise
        except _FAILURES as exc:
            failure = Unavailable(f"cannot use {os.path.basename(self.path)}: {_told(exc)}")
            self._log(failure)
            raise failure from exc
        except Unavailable as failure:
            self._log(failure)
            raise

    def _log(self, failure: Unavailable) -> None:
        """Log why the database cannot be used: its own rows may be what cannot be written."""
        if time.monotonic() >= self._logged + LOGGED_EVERY:
            self._logged = time.monotonic()
            log.error("%s", failure)

    def close(self) -> None:
        """Finish what is queued and close the file."""
        self._scanner.shutdown()
        self._reader.submit(self._reading.close).result()
        self._reader.shutdown()
        self._writer.submit(self._connection.close).result()
        self._writer.shutdown()


def _for_reading(connection: sqlite3.Connection, cache: int) -> None:
    connection.execute("PRAGMA query_only=ON")
    connection.execute(f"PRAGMA cache_size=-{cache}")


def _snapshot(connection: sqlite3.Connection, work: Callable[[sqlite3.Connection], T]) -> T:
    """Run `work` in a read transaction."""
    connection.execute("BEGIN")
    try:
        return work(connection)
    finally:
        connection.execute("ROLLBACK")


def _told(failure: Exception) -> str:
    """What went wrong, and what to do if SQLite's words do not suggest it."""
    if not isinstance(failure, sqlite3.Error):
        return f"the file is damaged; {RESTORE}"
    match getattr(failure, "sqlite_errorcode", 0) & 0xFF:  # without the extension of the code
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
            return f"{failure}; {RESTORE}"
        case sqlite3.SQLITE_IOERR:  # also for EDQUOT
            return f"{failure}; perhaps a quota is used up, or the disk is failing"
        case _:
            return str(failure)
