"""Where loaded plugins are kept: artifacts by their digest in a directory, everything else in SQLite.

An artifact is whole on disk before the row that names it is committed, and is removed only after no row names it
any more: at
every moment the rows describe plugins that can run.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import tempfile
from dataclasses import dataclass
from pathlib import Path

from circleosd import ledger
from circleosd.database import Transaction
from circleosd.errors import BadRequest, Limit
from circleosd.plugins import manifest as manifests
from circleosd.plugins.manifest import Manifest

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
    + ledger.SCHEMA,
)
CHUNK = 1024 * 1024


@dataclass(frozen=True)
class Loaded:
    """A plugin as the database keeps it. `loaded` in seconds since the epoch."""

    manifest: Manifest
    digest: str
    abi: str
    functions: tuple[str, ...]
    description: str
    loaded: float


@dataclass(frozen=True)
class Staged:
    """An artifact copied into the store's directory, not yet under its final name."""

    path: Path
    digest: str
    size: int
    head: bytes


class Artifacts:
    """A directory of files named by their sha256."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def stage(self, source: int, most: int) -> Staged:
        """Copy what the descriptor `source` holds. Raises `Limit` for more than `most` bytes, `BadRequest` for no
        file.
        """
        fd, name = tempfile.mkstemp(prefix=".staged-", dir=self._directory)
        digest, size, head = hashlib.sha256(), 0, b""
        try:
            with os.fdopen(fd, "wb") as out:
                while chunk := os.read(source, CHUNK):
                    head = head or chunk[:16]
                    size += len(chunk)
                    if size > most:
                        raise Limit(f"the artifact is larger than {most} bytes (plugins.max_artifact)")
                    digest.update(chunk)
                    out.write(chunk)
                out.flush()
                os.fsync(out.fileno())
        except BaseException as exc:
            os.unlink(name)
            if isinstance(exc, OSError):
                raise BadRequest(f"cannot read the artifact: {exc.strerror or exc}") from exc
            raise
        return Staged(Path(name), digest.hexdigest(), size, head)

    def keep(self, staged: Staged) -> None:
        """Give a staged artifact its final name, durably."""
        os.replace(staged.path, self._directory / staged.digest)
        directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def open(self, digest: str) -> int:
        """A descriptor of the artifact, to read."""
        return os.open(self._directory / digest, os.O_RDONLY | os.O_CLOEXEC)

    def sweep(self, used: set[str]) -> None:
        """Remove what no row names, and what was staged when a manager died."""
        for path in self._directory.iterdir():
            if path.name not in used:
                path.unlink()


def plugins(connection: sqlite3.Connection) -> list[Loaded]:
    """All plugins by name."""
    return [_of_row(row) for row in connection.execute("SELECT * FROM plugins ORDER BY name")]


def put(tx: Transaction, plugin: Loaded) -> None:
    """Insert or replace a plugin."""
    tx.execute(
        "INSERT OR REPLACE INTO plugins (name, manifest, digest, abi, functions, description, loaded)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            plugin.manifest.name,
            plugin.manifest.model_dump_json(),
            plugin.digest,
            plugin.abi,
            json.dumps(plugin.functions),
            plugin.description,
            plugin.loaded,
        ),
    )


def delete(tx: Transaction, name: str) -> None:
    """Forget a plugin."""
    tx.execute("DELETE FROM plugins WHERE name = ?", (name,))


def _of_row(row: sqlite3.Row) -> Loaded:
    return Loaded(
        manifest=manifests.parse(row["manifest"].encode()),
        digest=row["digest"],
        abi=row["abi"],
        functions=tuple(json.loads(row["functions"])),
        description=row["description"],
        loaded=row["loaded"],
    )
