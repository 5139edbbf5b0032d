"""What the database keeps of users, sessions and failed logins, and what it forgets."""

from __future__ import annotations

import asyncio
import sqlite3
from base64 import urlsafe_b64decode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from circleosd.auth import store
from circleosd.auth.backoff import Failures
from circleosd.auth.sessions import Sessions
from circleosd.config import AuthSettings
from circleosd.database import Database, Transaction
from circleosd.errors import Unavailable
from circleosd.policy import Grant
from tests.waiting import SECONDS, until

T = TypeVar("T")

NOW = 1_000_000.0
RULE = Grant("service:restart", "nginx")


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    """A database with the user alice."""
    database = Database(tmp_path / "auth.db", store.MIGRATIONS)
    changed(database, alice)
    yield database
    database.close()


def changed(database: Database, work: Callable[[Transaction], T]) -> T:
    return asyncio.run(database.write(work))


def alice(tx: Transaction) -> None:
    store.insert_user(tx, "alice", None, "viewer", 1005, NOW)


def opened(tx: Transaction, now: float = NOW) -> str:
    """The token of a session that alice begins, for an hour."""
    account = store.account(tx, "alice")
    assert account
    return store.open_session(tx, account, 1005, now, now + 3600)[0]


def login(tx: Transaction, now: float = NOW) -> bytes:
    """The hash of the token of such a session."""
    return store.token_hash(opened(tx, now))


def test_who_gets_the_name_of_a_deleted_user_has_none_of_the_sessions_and_rules(database: Database) -> None:
    hashed = changed(database, login)
    changed(database, lambda tx: store.add_grant(tx, "alice", RULE))
    assert changed(database, lambda tx: store.session(tx, hashed))
    assert changed(database, lambda tx: store.grants(tx, "alice")) == (RULE,)
    changed(database, lambda tx: store.delete_user(tx, "alice"))
    changed(database, alice)
    assert changed(database, lambda tx: store.session(tx, hashed)) is None
    assert changed(database, lambda tx: store.sessions(tx, None, -1)) == []
    assert changed(database, lambda tx: store.grants(tx, "alice")) == ()


def test_a_token_is_too_long_to_be_guessed_and_each_is_another(database: Database) -> None:
    tokens = {changed(database, opened) for _ in range(3)}
    assert {len(urlsafe_b64decode(token + "=")) for token in tokens} == {32}
    assert len(tokens) == 3


def test_nobody_has_a_session_of_a_disabled_user(database: Database) -> None:
    hashed = changed(database, login)
    changed(database, lambda tx: store.set_disabled(tx, "alice", disabled=True))
    assert changed(database, lambda tx: store.session(tx, hashed)) is None


def test_a_login_removes_expired_sessions(database: Database) -> None:
    changed(database, login)
    later = changed(database, lambda tx: login(tx, NOW + 3600))
    assert [session.hash for session in changed(database, lambda tx: store.sessions(tx, "alice", -1))] == [later]


def test_of_a_users_sessions_one_ends_or_all_but_one(database: Database) -> None:
    def ids(tx: Transaction) -> list[str]:
        return [session.id for session in store.sessions(tx, "alice", -1)]

    def end(tx: Transaction) -> None:
        for second in range(4):
            login(tx, NOW + second)
        newest, *older, oldest = ids(tx)
        assert [session.id for session in store.close_sessions(tx, "alice", only=newest)] == [newest]
        assert ids(tx) == [*older, oldest]
        assert [session.id for session in store.close_sessions(tx, "alice", but=oldest)] == older
        assert ids(tx) == [oldest]

    changed(database, end)


def test_the_newest_sessions_are_shown_first(database: Database) -> None:
    hashes = changed(database, lambda tx: [login(tx, NOW + second) for second in range(3)])
    shown = changed(database, lambda tx: store.sessions(tx, "alice", 2))
    assert [session.hash for session in shown] == [hashes[2], hashes[1]]


def test_a_use_that_is_noted_late_takes_no_later_one_back(database: Database) -> None:
    def use(tx: Transaction) -> store.Session | None:
        hashed = login(tx)
        for used in (NOW + 9, NOW + 5):
            store.note_uses(tx, {hashed: used})
        return store.session(tx, hashed)

    found = changed(database, use)
    assert found
    assert found.used == NOW + 9


def test_sessions_of_a_clock_that_was_ahead_are_the_first_to_make_room(database: Database) -> None:
    sessions = Sessions(database, AuthSettings(max_sessions=3))

    def begin(tx: Transaction) -> list[bytes]:
        for ahead in (1e8, 1e8 + 1, 1e8 + 2):
            login(tx, NOW + ahead)
        hashes = []
        for second in range(4):
            sessions.make_room(tx, "alice", NOW + second)
            hashes.append(login(tx, NOW + second))
        return hashes

    hashes = changed(database, begin)
    left = [session.hash for session in changed(database, lambda tx: store.sessions(tx, "alice", -1))]
    assert left == hashes[:0:-1]


def used(database: Database, token: str) -> float:
    found = changed(database, lambda tx: store.session(tx, store.token_hash(token)))
    assert found
    return found.used


@pytest.mark.parametrize(("seconds", "number"), [(0.0, 1000), (60.0, 2)])
def test_uses_of_sessions_are_written_in_time_and_before_they_are_many(
    database: Database, monkeypatch: pytest.MonkeyPatch, seconds: float, number: int
) -> None:
    monkeypatch.setattr("circleosd.auth.sessions.FLUSH", seconds)
    monkeypatch.setattr("circleosd.auth.sessions.MOST", number)
    tokens = [changed(database, opened) for _ in range(2)]

    async def use() -> None:
        sessions = Sessions(database, AuthSettings())
        for token in tokens:
            sessions.note(token)
        async with asyncio.timeout(SECONDS):
            await until(lambda: not sessions._task)

    asyncio.run(use())
    assert all(used(database, token) > NOW for token in tokens)


def test_uses_of_sessions_that_cannot_be_written_now_are_known_and_written_later(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = changed(database, opened)
    session = changed(database, lambda tx: store.session(tx, store.token_hash(token)))
    assert session
    sessions = Sessions(database, AuthSettings())

    async def use() -> None:
        async def write(work: object) -> None:
            assert sessions.used(session) > NOW, "also while it is being written"
            raise Unavailable("the disk is full")

        sessions.note(token)
        with monkeypatch.context() as patch:
            patch.setattr(database, "write", write)
            with pytest.raises(Unavailable):
                await sessions.flush()
        await sessions.flush()

    asyncio.run(use())
    assert used(database, token) > NOW


def test_uses_of_sessions_that_cannot_be_written_do_not_fill_the_log(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full() -> None:
        raise sqlite3.OperationalError("database or disk is full")

    async def use() -> None:
        sessions = Sessions(database, AuthSettings())
        for _ in range(3):
            sessions.note("token")
            await until(lambda: not sessions._task)

    monkeypatch.setattr("circleosd.auth.sessions.MOST", 1)
    monkeypatch.setattr(database, "_commit", full)
    asyncio.run(use())
    (message,) = caplog.messages
    assert "database or disk is full" in message


def test_of_too_many_failed_logins_those_longest_ago_are_forgotten(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "MAX_FAILURES", 20)

    def fail(tx: Transaction) -> None:
        for second in range(21):
            store.set_failures(tx, "user", f"u{second}", Failures(1, NOW + second))

    changed(database, fail)
    kept = changed(
        database, lambda tx: [second for second in range(21) if store.failures(tx, "user", f"u{second}").number]
    )
    assert kept == list(range(3, 21))
