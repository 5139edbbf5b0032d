"""Users and sessions in SQLite. Functions of a connection or a transaction; nothing here waits or decides."""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
from dataclasses import dataclass

from circleosd import ledger
from circleosd.api.auth import User
from circleosd.database import Transaction

MIGRATIONS = (
    """
CREATE TABLE users (
    name TEXT PRIMARY KEY,
    password TEXT NOT NULL,
    role TEXT NOT NULL,
    uid INTEGER UNIQUE,
    created REAL NOT NULL,
    last_login REAL
) WITHOUT ROWID;
CREATE TABLE sessions (
    hash BLOB PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    user TEXT NOT NULL REFERENCES users (name) ON DELETE CASCADE,
    uid INTEGER NOT NULL,
    created REAL NOT NULL,
    expires REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX sessions_expires ON sessions (expires);
CREATE INDEX sessions_user ON sessions (user);
"""
    + ledger.SCHEMA,
)

TOKEN_BYTES = 32  # 256 bits; a hash without salt is enough for what cannot be guessed


@dataclass(frozen=True)
class Session:
    """A session in force, and the user it names."""

    id: str
    user: str
    role: str
    uid: int
    expires: float


def token_hash(token: str) -> bytes:
    """What is stored of a token."""
    return hashlib.sha256(token.encode()).digest()


def user_of_row(row: sqlite3.Row) -> User:
    """What others may see of a user."""
    return User(
        name=row["name"], role=row["role"], uid=row["uid"], created=row["created"], last_login=row["last_login"]
    )


def users(connection: sqlite3.Connection) -> list[User]:
    """All users by name."""
    return [user_of_row(row) for row in connection.execute("SELECT * FROM users ORDER BY name")]


def user_by_uid(connection: sqlite3.Connection, uid: int) -> User | None:
    """The user that a Unix uid is without a login."""
    row = connection.execute("SELECT * FROM users WHERE uid = ?", (uid,)).fetchone()
    return user_of_row(row) if row else None


def password_hash(connection: sqlite3.Connection, name: str) -> str | None:
    """The stored hash of a user's password."""
    row = connection.execute("SELECT password FROM users WHERE name = ?", (name,)).fetchone()
    return str(row["password"]) if row else None


def insert_user(tx: Transaction, name: str, password: str, role: str, uid: int | None, now: float) -> User:
    """Add a user. Raises sqlite3.IntegrityError when the name or uid is taken."""
    tx.execute(
        "INSERT INTO users (name, password, role, uid, created) VALUES (?, ?, ?, ?, ?)",
        (name, password, role, uid, now),
    )
    return user_of_row(tx.execute("SELECT * FROM users WHERE name = ?", (name,)).fetchone())


def open_session(tx: Transaction, user: str, uid: int, now: float, lifetime: float) -> tuple[str, Session] | None:
    """Begin a session of `user` for the process owner `uid`; return its token too. None if the user is gone."""
    tx.execute("DELETE FROM sessions WHERE expires <= ?", (now,))
    row = tx.execute("UPDATE users SET last_login = ? WHERE name = ? RETURNING role", (now, user)).fetchone()
    if row is None:
        return None
    token = secrets.token_urlsafe(TOKEN_BYTES)
    session = Session(secrets.token_hex(6), user, row["role"], uid, now + lifetime)
    tx.execute(
        "INSERT INTO sessions (hash, id, user, uid, created, expires) VALUES (?, ?, ?, ?, ?, ?)",
        (token_hash(token), session.id, user, uid, now, session.expires),
    )
    return token, session


def set_password(tx: Transaction, name: str, password: str) -> None:
    """Replace a stored hash."""
    tx.execute("UPDATE users SET password = ? WHERE name = ?", (password, name))


def session_of(connection: sqlite3.Connection, token: str, now: float) -> Session | None:
    """The session that a token names, if it is in force."""
    row = connection.execute(
        "SELECT s.id, s.user, u.role, s.uid, s.expires FROM sessions s JOIN users u ON u.name = s.user"
        " WHERE s.hash = ? AND s.expires > ?",
        (token_hash(token), now),
    ).fetchone()
    return Session(**row) if row else None


def close_session(tx: Transaction, session: str) -> bool:
    """End a session by its id; whether there was one."""
    return tx.execute("DELETE FROM sessions WHERE id = ?", (session,)).rowcount > 0
