"""The stores of plugins: texts by key, separate for each plugin, each with a quota."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection

from circleosd.database import Database, Transaction
from circleosd.errors import BadRequest, Limit

SCHEMA = """
CREATE TABLE kv (
    plugin TEXT NOT NULL,
    key TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (plugin, key)
) WITHOUT ROWID;
CREATE TABLE kv_used (
    plugin TEXT PRIMARY KEY,
    bytes INTEGER NOT NULL
) WITHOUT ROWID
"""
MAX_KEY = 512  # bytes
MAX_KEYS = 1 << 20  # bytes of the keys in one answer


class KeyValue:
    """The texts of all plugins, in a database. A plugin's quota counts the bytes of its keys and values in UTF-8."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, plugin: str, key: str) -> str | None:
        """The value, or None."""
        return await self._database.read(lambda connection: _value(connection, plugin, key))

    async def set(self, plugin: str, key: str, value: str, quota: int) -> None:
        """Store a value; it is on disk when this returns. Raises `Limit` if the plugin would exceed its quota."""
        size = _size(key)
        if not 0 < size <= MAX_KEY:
            raise BadRequest(f"a key must have 1 to {MAX_KEY} bytes, not {size}")

        def work(tx: Transaction) -> None:
            old = tx.execute("SELECT value FROM kv WHERE plugin = ? AND key = ?", (plugin, key)).fetchone()
            change = _size(value) - _size(old["value"]) if old else size + _size(value)
            used = tx.execute("SELECT bytes FROM kv_used WHERE plugin = ?", (plugin,)).fetchone()
            total = (used["bytes"] if used else 0) + change
            if total > quota and change > 0:
                raise Limit(f"its keys and values would take {total} bytes: its limit for storage is {quota} bytes")
            tx.execute("INSERT OR REPLACE INTO kv (plugin, key, value) VALUES (?, ?, ?)", (plugin, key, value))
            tx.execute("INSERT OR REPLACE INTO kv_used (plugin, bytes) VALUES (?, ?)", (plugin, total))

        await self._database.write(work)

    async def delete(self, plugin: str, key: str) -> bool:
        """Delete a key; return whether it existed."""

        def work(tx: Transaction) -> bool:
            old = tx.execute("DELETE FROM kv WHERE plugin = ? AND key = ? RETURNING value", (plugin, key)).fetchone()
            if old is None:
                return False
            tx.execute(
                "UPDATE kv_used SET bytes = bytes - ? WHERE plugin = ?", (_size(key) + _size(old["value"]), plugin)
            )
            return True

        return await self._database.write(work)

    async def keys(self, plugin: str, prefix: str) -> list[str]:
        """The keys that start with `prefix`, in byte order. Raises `Limit` if they are too many for one answer."""
        return await self._database.read(lambda connection: _keys(connection, plugin, prefix))

    async def used(self, plugin: str) -> int:
        """Bytes that the plugin stores."""
        return await self._database.read(lambda connection: _used(connection, plugin))

    async def forget(self, *, but: Collection[str]) -> None:
        """Remove the data of all plugins that are not named."""

        def work(tx: Transaction) -> None:
            known = {row["plugin"] for row in tx.execute("SELECT plugin FROM kv_used")}
            for plugin in known - set(but):
                tx.execute("DELETE FROM kv WHERE plugin = ?", (plugin,))
                tx.execute("DELETE FROM kv_used WHERE plugin = ?", (plugin,))

        await self._database.write(work)


def _size(text: str) -> int:
    return len(text.encode())


def _value(connection: sqlite3.Connection, plugin: str, key: str) -> str | None:
    row = connection.execute("SELECT value FROM kv WHERE plugin = ? AND key = ?", (plugin, key)).fetchone()
    return row["value"] if row else None


def _used(connection: sqlite3.Connection, plugin: str) -> int:
    row = connection.execute("SELECT bytes FROM kv_used WHERE plugin = ?", (plugin,)).fetchone()
    return row["bytes"] if row else 0


def _keys(connection: sqlite3.Connection, plugin: str, prefix: str) -> list[str]:
    found, size = [], 0
    for row in connection.execute("SELECT key FROM kv WHERE plugin = ? AND key >= ? ORDER BY key", (plugin, prefix)):
        if not row["key"].startswith(prefix):
            break
        size += _size(row["key"])
        if size > MAX_KEYS:
            raise Limit(f"the keys with this prefix take more than {MAX_KEYS} bytes; use a longer prefix")
        found.append(row["key"])
    return found
