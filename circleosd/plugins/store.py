"""Loaded plugins in SQLite, with grants and records: functions of a connection or transaction.

An artifact (artifacts.py) is complete on disk before the row that names it is committed, and is removed only after no
row names it any more: at every moment, the rows describe plugins that can run.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from circleosd.database import Transaction
from circleosd.errors import BadRequest
from circleosd.plugins import manifest as manifests
from circleosd.plugins.manifest import Manifest
from circleosd.rows import LEDGER_SCHEMA

log = logging.getLogger(__name__)

MIGRATIONS = (
    """
CREATE TABLE plugins (
    name TEXT PRIMARY KEY,
    manifest TEXT NOT NULL,
    digest TEXT NOT NULL,
    abi TEXT NOT NULL,
    functions TEXT NOT NULL,
    description TEXT NOT NULL,
    loaded REAL NOT NULL
) WITHOUT ROWID;
"""
    + LEDGER_SCHEMA,
    """
ALTER TABLE plugins ADD COLUMN imports TEXT NOT NULL DEFAULT '[]';
ALTER TABLE plugins ADD COLUMN signer TEXT;
ALTER TABLE plugins ADD COLUMN key TEXT;
CREATE TABLE grants (
    plugin TEXT NOT NULL REFERENCES plugins (name) ON DELETE CASCADE DEFERRABLE INITIALLY DEFERRED,
    capability TEXT NOT NULL,
    granted INTEGER NOT NULL,
    PRIMARY KEY (plugin, capability)
) WITHOUT ROWID;
CREATE TABLE records (
    plugin TEXT PRIMARY KEY REFERENCES plugins (name) ON DELETE CASCADE DEFERRABLE INITIALLY DEFERRED,
    calls INTEGER NOT NULL,
    failures INTEGER NOT NULL,
    last_error TEXT,
    last_failed REAL,
    aside TEXT,
    reason TEXT,
    since REAL
) WITHOUT ROWID
""",
    "ALTER TABLE records ADD COLUMN in_a_row INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE plugins ADD COLUMN manifest_digest TEXT",
)


@dataclass(frozen=True)
class Loaded:
    """A plugin as stored, in the columns of `plugins` besides its name. `loaded` in seconds since the epoch.

    `signer` is the principal in trusted-signers for `key`, the fingerprint of the key that signed it; None without a
    trusted signer. `manifest_digest` is that of the manifest's file, or of the stored manifest if there is no file.
    """

    manifest: Manifest
    digest: str
    abi: str
    functions: tuple[str, ...]
    imports: tuple[str, ...]
    description: str
    loaded: float
    signer: str | None = None
    key: str | None = None
    manifest_digest: str | None = None


Aside = Literal["quarantined", "disabled"] | None


@dataclass
class Record:
    """The record of a plugin, in the columns of `records` besides its name. Times in seconds since the epoch.

    `in_a_row` is how many of its last calls failed. `aside` says why it is not called at present: `quarantined`,
    `disabled` or None; `reason` and `since` give the details.
    """

    calls: int = 0
    failures: int = 0
    last_error: str | None = None
    last_failed: float | None = None
    aside: Aside = None
    reason: str | None = None
    since: float | None = None
    in_a_row: int = 0


def plugins(connection: sqlite3.Connection) -> list[Loaded]:
    """All plugins by name; one that this version cannot read is skipped and logged."""
    found = []
    for row in connection.execute("SELECT * FROM plugins ORDER BY name"):
        try:
            found.append(_readable(row))
        except BadRequest as exc:
            log.error("cannot use the plugin %s; load it again or unload it: %s", row["name"], exc)
    return found


def unreadable(connection: sqlite3.Connection, name: str) -> Loaded | None:
    """A plugin that `plugins` skips, as far as it can be read; None if there is none with that name."""
    row = connection.execute("SELECT * FROM plugins WHERE name = ?", (name,)).fetchone()
    if row is None:
        return None
    manifest = Manifest(name, version="unknown", plugin_type="native" if row["abi"] == "native" else "wasm")
    return _of_row(row, manifest, (), ())


def digests(connection: sqlite3.Connection) -> dict[str, str]:
    """The digests of all artifacts named in rows, by plugin."""
    return {row["name"]: row["digest"] for row in connection.execute("SELECT name, digest FROM plugins")}


def put(tx: Transaction, plugin: Loaded) -> None:
    """Insert or replace a plugin; grants and records under its name are kept."""
    row = {
        **vars(plugin),
        "name": plugin.manifest.name,
        "manifest": manifests.dump(plugin.manifest),
        "functions": json.dumps(plugin.functions),
        "imports": json.dumps(plugin.imports),
    }
    changes = ", ".join(f"{column} = excluded.{column}" for column in row)
    tx.execute(
        f"INSERT INTO plugins ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})"
        f" ON CONFLICT (name) DO UPDATE SET {changes}",
        [*row.values()],
    )


def delete(tx: Transaction, name: str) -> None:
    """Delete a plugin with its grants and record."""
    tx.execute("DELETE FROM plugins WHERE name = ?", (name,))


def grants(connection: sqlite3.Connection) -> dict[str, dict[str, bool]]:
    """What was granted (True) or revoked (False), by plugin and capability."""
    found: dict[str, dict[str, bool]] = {}
    for row in connection.execute("SELECT plugin, capability, granted FROM grants"):
        found.setdefault(row["plugin"], {})[row["capability"]] = bool(row["granted"])
    return found


def put_grants(tx: Transaction, name: str, decided: Mapping[str, bool]) -> None:
    """Replace the grants and revocations of a plugin."""
    tx.execute("DELETE FROM grants WHERE plugin = ?", (name,))
    for capability, granted in decided.items():
        tx.execute("INSERT INTO grants (plugin, capability, granted) VALUES (?, ?, ?)", (name, capability, granted))


def records(connection: sqlite3.Connection) -> dict[str, Record]:
    """The records of the plugins, by name."""
    found = {}
    for row in connection.execute("SELECT * FROM records"):
        values = dict(row)
        name = values.pop("plugin")
        found[name] = Record(**values)
    return found


def put_record(tx: Transaction, name: str, record: Record) -> None:
    """Store a plugin's record; nothing is stored for one that is not loaded."""
    row = {"plugin": name, **vars(record)}
    tx.execute(
        f"INSERT OR REPLACE INTO records ({', '.join(row)}) SELECT {', '.join('?' * len(row))}"
        " WHERE EXISTS (SELECT 1 FROM plugins WHERE name = ?)",
        (*row.values(), name),
    )


def _readable(row: sqlite3.Row) -> Loaded:
    """Raises `BadRequest` for a row that cannot be read."""
    try:
        functions, imports = (tuple(json.loads(row[key])) for key in ("functions", "imports"))
    except (ValueError, TypeError) as exc:
        raise BadRequest(f"its stored data cannot be read: {exc}") from exc
    return _of_row(row, manifests.restore(row["manifest"]), functions, imports)


def _of_row(row: sqlite3.Row, manifest: Manifest, functions: tuple[str, ...], imports: tuple[str, ...]) -> Loaded:
    columns = {**dict(row), "manifest": manifest, "functions": functions, "imports": imports}
    del columns["name"]
    return Loaded(**columns)
