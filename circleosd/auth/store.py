"""Users, sessions, rules and failed logins in SQLite: functions of a connection or transaction, without policy."""

from __future__ import annotations

import os
import sqlite3
from typing import NamedTuple

from circleosd.api.auth import Rule, User
from circleosd.auth.backoff import Failures
from circleosd.database import Transaction
from circleosd.policy import Grant, Role
from circleosd.rows import LEDGER_SCHEMA

MIGRATIONS = (
    """
CREATE TABLE users (
    name TEXT PRIMARY KEY,
    -- names that differ only in case are one name
    folded TEXT UNIQUE GENERATED ALWAYS AS (lower(name)) STORED,
    password TEXT,
    role TEXT NOT NULL,
    uid INTEGER UNIQUE,
    disabled INTEGER NOT NULL DEFAULT 0,
    created REAL NOT NULL,
    last_login REAL,
    last_uid INTEGER
) WITHOUT ROWID;
CREATE TABLE sessions (
    hash BLOB PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    user TEXT NOT NULL REFERENCES users (name) ON DELETE CASCADE,
    uid INTEGER NOT NULL,
    created REAL NOT NULL,
    used REAL NOT NULL,
    expires REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX sessions_expires ON sessions (expires);
CREATE INDEX sessions_user ON sessions (user);
CREATE TABLE grants (
    user TEXT NOT NULL REFERENCES users (name) ON DELETE CASCADE,
    verb TEXT NOT NULL,
    object TEXT NOT NULL,
    deny INTEGER NOT NULL,
    PRIMARY KEY (user, verb, object, deny)
) WITHOUT ROWID;
CREATE TABLE failures (
    -- of logins as a user ('user', its name in lower case, known or not), by a uid ('peer', its number) and by a uid as
    -- a user ('part', both)
    kind TEXT NOT NULL,
    key TEXT NOT NULL,
    number INTEGER NOT NULL,
    last REAL NOT NULL,
    PRIMARY KEY (kind, key)
) WITHOUT ROWID;
CREATE INDEX failures_last ON failures (last);
"""
    + LEDGER_SCHEMA,
)

TOKEN_BYTES = 32  # 256 bits; a hash without salt is enough for what cannot be guessed
SWEPT_AT_ONCE = 1000  # expired sessions that one login removes
MAX_FAILURES = 10_000  # how many names and uids with failed logins are remembered


class Account(NamedTuple):
    """A user as stored, in the columns of `users`. `last_uid` is the uid of the last login as this user."""

    name: str
    password: str | None
    role: Role | None
    uid: int | None
    disabled: bool
    created: float
    last_login: float | None
    last_uid: int | None


class Session(NamedTuple):
    """A session as stored, and its user. `used` may lag behind; see auth/sessions.py."""

    hash: bytes
    id: str
    user: str
    role: Role | None
    uid: int
    created: float
    used: float
    expires: float


def role_text(role: Role | None) -> str:
    """How a role is stored and shown."""
    return role.value if role else "none"


def role_of(text: str) -> Role | None:
    """The role of that name; None if only a later version has it."""
    return Role(text) if text in list(Role) else None


def token_hash(token: str) -> bytes:
    """The form in which a token is stored."""
    import hashlib  # see chain.linked

    return hashlib.sha256(token.encode()).digest()


# users


def shown(account: Account) -> User:
    """The part of a user that others may see."""
    return User(
        name=account.name,
        role=role_text(account.role),
        uid=account.uid,
        disabled=account.disabled,
        created=account.created,
        last_login=account.last_login,
    )


_USERS = f"SELECT {', '.join(Account._fields)} FROM users"


def _account(row: sqlite3.Row) -> Account:
    name, password, role, uid, disabled, *rest = row
    return Account(name, password, role_of(role), uid, bool(disabled), *rest)


def users(connection: sqlite3.Connection) -> list[User]:
    """All users by name."""
    return [shown(_account(row)) for row in connection.execute(f"{_USERS} ORDER BY name")]


def account(connection: sqlite3.Connection | Transaction, name: str) -> Account | None:
    """The user of that name."""
    row = connection.execute(f"{_USERS} WHERE name = ?", (name,)).fetchone()
    return _account(row) if row else None


def account_of_uid(connection: sqlite3.Connection | Transaction, uid: int) -> Account | None:
    """The user that is bound to a Unix uid."""
    row = connection.execute(f"{_USERS} WHERE uid = ? AND NOT disabled", (uid,)).fetchone()
    return _account(row) if row else None


def disabled_of_uid(connection: sqlite3.Connection, uid: int) -> str | None:
    """The name of the disabled user that is bound to a Unix uid."""
    row = connection.execute("SELECT name FROM users WHERE uid = ? AND disabled", (uid,)).fetchone()
    return str(row["name"]) if row else None


def name_like(connection: sqlite3.Connection, name: str) -> str | None:
    """The name of a user that is the same as `name` except perhaps for case."""
    row = connection.execute("SELECT name FROM users WHERE folded = lower(?)", (name,)).fetchone()
    return str(row["name"]) if row else None


def insert_user(tx: Transaction, name: str, password: str | None, role: str, uid: int | None, now: float) -> None:
    """Add a user. Raises sqlite3.IntegrityError when the name or uid is taken."""
    tx.execute(
        "INSERT INTO users (name, password, role, uid, created) VALUES (?, ?, ?, ?, ?)",
        (name, password, role, uid, now),
    )


def set_password(tx: Transaction, name: str, password: str) -> None:
    """Replace a stored hash."""
    tx.execute("UPDATE users SET password = ? WHERE name = ?", (password, name))


def set_role(tx: Transaction, name: str, role: str) -> None:
    """Change a user's role."""
    tx.execute("UPDATE users SET role = ? WHERE name = ?", (role, name))


def set_uid(tx: Transaction, name: str, uid: int) -> None:
    """Bind a user to a uid. Raises sqlite3.IntegrityError when it is taken."""
    tx.execute("UPDATE users SET uid = ? WHERE name = ?", (uid, name))


def set_disabled(tx: Transaction, name: str, disabled: bool) -> None:
    """Disable or enable a user."""
    tx.execute("UPDATE users SET disabled = ? WHERE name = ?", (disabled, name))


def delete_user(tx: Transaction, name: str) -> None:
    """Delete a user with sessions and rules."""
    tx.execute("DELETE FROM users WHERE name = ?", (name,))


# rules


def grants(connection: sqlite3.Connection | Transaction, user: str) -> tuple[Grant, ...]:
    """The rules of a user, in the order in which they are shown."""
    rows = connection.execute("SELECT verb, object, deny FROM grants WHERE user = ?", (user,))
    return tuple(Grant(row["verb"], row["object"], bool(row["deny"])) for row in rows)


def rules(given: tuple[Grant, ...]) -> list[Rule]:
    """Rules in the form of a reply."""
    return [Rule(verb=grant.verb, object=grant.object, deny=grant.deny) for grant in given]


def add_grant(tx: Transaction, user: str, grant: Grant) -> None:
    """Give a user a rule. Raises sqlite3.IntegrityError when the user has it."""
    tx.execute("INSERT INTO grants (user, verb, object, deny) VALUES (?, ?, ?, ?)", (user, *grant))


def remove_grant(tx: Transaction, user: str, grant: Grant) -> bool:
    """Remove a rule of a user; return whether it existed."""
    sql = "DELETE FROM grants WHERE user = ? AND verb = ? AND object = ? AND deny = ?"
    return tx.execute(sql, (user, *grant)).rowcount > 0


# sessions

_SESSIONS = (
    "SELECT s.hash, s.id, s.user, u.role, s.uid, s.created, s.used, s.expires"
    " FROM sessions s JOIN users u ON u.name = s.user WHERE "
)


def _session(row: sqlite3.Row) -> Session:
    hashed, number, user, role, *rest = row
    return Session(hashed, number, user, role_of(role), *rest)


def open_session(tx: Transaction, user: Account, uid: int, now: float, expires: float) -> tuple[str, str]:
    """Begin a session of `user` for the process owner `uid`; return its token and its id."""
    from base64 import urlsafe_b64encode  # most starts of the service only have to verify a session

    tx.execute(
        "DELETE FROM sessions WHERE hash IN (SELECT hash FROM sessions WHERE expires <= ? LIMIT ?)",
        (now, SWEPT_AT_ONCE),
    )
    tx.execute("UPDATE users SET last_login = ?, last_uid = ? WHERE name = ?", (now, uid, user.name))
    token = urlsafe_b64encode(os.urandom(TOKEN_BYTES)).rstrip(b"=").decode()
    number = os.urandom(6).hex()
    tx.execute(
        "INSERT INTO sessions (hash, id, user, uid, created, used, expires) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (token_hash(token), number, user.name, uid, now, now, expires),
    )
    return token, number


def session(connection: sqlite3.Connection | Transaction, hashed: bytes) -> Session | None:
    """The session with that token hash, if its user is enabled."""
    row = connection.execute(f"{_SESSIONS} s.hash = ? AND NOT u.disabled", (hashed,)).fetchone()
    return _session(row) if row else None


def sessions(connection: sqlite3.Connection | Transaction, user: str | None, most: int) -> list[Session]:
    """The newest sessions of a user, or of all, in force or not."""
    where, values = ("s.user = ?", (user, most)) if user is not None else ("1", (most,))
    rows = connection.execute(f"{_SESSIONS} {where} ORDER BY s.created DESC LIMIT ?", values)
    return [_session(row) for row in rows]


def close_sessions(tx: Transaction, user: str, *, only: str | None = None, but: str | None = None) -> list[Session]:
    """End sessions of a user: all, `only` one, or all `but` one; return the ended ones."""
    ended = [item for item in sessions(tx, user, -1) if item.id != but and (only is None or item.id == only)]
    for item in ended:
        close_session(tx, item)
    return ended


def close_session(tx: Transaction, ended: Session) -> None:
    """End a session."""
    tx.execute("DELETE FROM sessions WHERE hash = ?", (ended.hash,))


def note_uses(tx: Transaction, uses: dict[bytes, float]) -> None:
    """Store when sessions were last used."""
    for hashed, used in uses.items():
        tx.execute("UPDATE sessions SET used = max(used, ?) WHERE hash = ?", (used, hashed))


# failed logins


def failures(connection: sqlite3.Connection | Transaction, kind: str, key: str) -> Failures:
    """The failed logins of that user or peer."""
    row = connection.execute("SELECT number, last FROM failures WHERE kind = ? AND key = ?", (kind, key)).fetchone()
    return Failures(row["number"], row["last"]) if row else Failures()


def set_failures(tx: Transaction, kind: str, key: str, value: Failures) -> None:
    """Store failed logins; if there are too many, forget the oldest."""
    tx.execute("INSERT OR REPLACE INTO failures (kind, key, number, last) VALUES (?, ?, ?, ?)", (kind, key, *value))
    number = tx.execute("SELECT count(*) FROM failures").fetchone()[0]
    if number > MAX_FAILURES:
        tx.execute(
            "DELETE FROM failures WHERE (kind, key) IN (SELECT kind, key FROM failures ORDER BY last LIMIT ?)",
            (number - MAX_FAILURES + MAX_FAILURES // 10,),
        )


def forget_failures(tx: Transaction, kind: str, key: str) -> None:
    """Forget the failed logins of that user or peer."""
    tx.execute("DELETE FROM failures WHERE kind = ? AND key = ?", (kind, key))
