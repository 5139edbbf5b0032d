"""What auth-service does and refuses, bytes in, bytes out; over its socket see tests/integration/test_accounts.py."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from circleosd.api.auth import User
from circleosd.auth import store
from circleosd.database import Database
from circleosd.policy import Peer
from tests.unit.dispatching import Accounts, reply_to
from tests.unit.fakes import ROOT, STRANGER

OLD, NEW = "a long enough one", "quite another one"


def told(accounts: Accounts, peer: Peer, action: str, **parameters: object) -> str:
    """`ok`, or the code and the message."""
    reply = accounts.ask({"action": action, **parameters}, peer)
    return "ok" if reply["ok"] else f"{reply['error']}: {reply['message']}"


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE users SET disabled = 1",
        "UPDATE users SET password = 'another'",
        "DELETE FROM users",
    ],
)
def test_a_login_is_not_done_for_a_user_who_was_changed_while_the_password_was_looked_at(
    accounts: Accounts, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    right = accounts.users._passwords.verify

    async def verify(*about: Any) -> bool:
        found = await right(*about)
        await accounts.database.write(lambda tx: tx.execute(change))
        return found

    alice = {"name": "alice", "password": OLD}
    assert told(accounts, ROOT, "create", **alice) == told(accounts, ROOT, "login", **alice) == "ok"
    monkeypatch.setattr(accounts.users._passwords, "verify", verify)
    refused = "conflict: the user alice was changed in the meantime; log in again"
    assert told(accounts, ROOT, "login", **alice) == refused


def test_a_denial_tells_what_was_asked_for_without_secrets_and_what_is_no_parameter(accounts: Accounts) -> None:
    told(accounts, STRANGER, "role", name="alice", role="admin", nonsense="x" * 1000)
    told(accounts, STRANGER, "grant", name="alice", verb="*", object="x" * 1000, deny=False, on_behalf="plugin")
    told(accounts, STRANGER, "create", name="eve", password=OLD, role=["admin"], uid=61500)
    told(accounts, STRANGER, "uid", name="eve", uid=10**4000)
    rows = accounts.ask({"action": "history"}, ROOT)["data"]
    assert [row["params"] for row in rows] == [
        {"name": "alice", "role": "admin"},
        {"name": "alice", "verb": "*", "object": "x" * 256 + "…", "deny": False},
        {"name": "eve", "uid": 61500},
        {"name": "eve"},
    ]


def test_of_two_logouts_at_once_one_ends_the_session_and_the_other_finds_none(accounts: Accounts) -> None:
    alice = {"name": "alice", "password": OLD}
    assert told(accounts, ROOT, "create", **alice) == "ok"
    token = accounts.ask({"action": "login", **alice})["data"]["token"]
    line = json.dumps({"action": "logout", "token": token}).encode()

    async def both() -> list[bytes]:
        return await asyncio.gather(*(reply_to(accounts.service, line, ROOT) for _ in range(2)))

    assert {json.loads(reply).get("error") for reply in asyncio.run(both())} == {None, "denied"}
    assert [phase for phase, action, _ in accounts.history() if action == "logout"] == ["done", "denied"]


@pytest.mark.parametrize("more", [{"token": "of-no-session"}, {"on_behalf": "plugin"}])
def test_a_login_that_is_refused_before_its_name_is_looked_up_is_recorded_without_the_name(
    accounts: Accounts, more: dict[str, str]
) -> None:
    assert told(accounts, STRANGER, "login", name="hunter2hunter2", password=OLD, **more).startswith("denied")
    assert accounts.history() == [("denied", "login", None)]


def test_no_user_has_a_uid_of_the_services(tmp_path: Path) -> None:
    database = Database(tmp_path / "a.db", store.MIGRATIONS)
    accounts = Accounts(database, services=frozenset({STRANGER.uid}))
    refused = f"bad-request: uid {STRANGER.uid} belongs to CircleOSD itself; it needs no user"
    assert told(accounts, ROOT, "create", name="alice", uid=STRANGER.uid) == refused
    database.close()


def test_the_own_password_is_changed_with_the_present_one_and_guesses_at_it_count(tmp_path: Path) -> None:
    database = Database(tmp_path / "a.db", store.MIGRATIONS)
    accounts = Accounts(database, login_tries=2)
    assert told(accounts, ROOT, "create", name="alice", password=OLD, uid=STRANGER.uid) == "ok"
    without = told(accounts, STRANGER, "passwd", password=NEW)
    assert "denied: changing your own password takes the current one" in without
    for _ in range(2):
        refused = told(accounts, STRANGER, "passwd", old=NEW, password=NEW)
        assert refused.startswith("denied: wrong user name or password")
    asyncio.run(
        database.write(lambda tx: tx.execute("UPDATE failures SET last = last + 600"))
    )  # or the wait may be over
    assert told(accounts, STRANGER, "passwd", old=OLD, password=NEW).startswith("limit: too many failed logins")
    assert told(accounts, ROOT, "enable", name="alice") == "ok"
    assert told(accounts, STRANGER, "passwd", old=OLD, password=NEW) == "ok"
    assert told(accounts, STRANGER, "login", name="alice", password=NEW) == "ok"
    database.close()


def test_a_uid_has_the_role_of_its_user_without_a_login(accounts: Accounts) -> None:
    assert told(accounts, STRANGER, "list").startswith("denied")
    assert told(accounts, ROOT, "create", name="ada", uid=STRANGER.uid, role="admin") == "ok"
    assert told(accounts, STRANGER, "list") == "ok"


def test_nobody_may_have_a_session_but_somebody_who_is_named_must_exist(accounts: Accounts) -> None:
    assert accounts.ask({"action": "sessions"}, ROOT)["data"] == []
    assert told(accounts, ROOT, "sessions", name="alice").startswith("not-found: no user alice")


def test_who_somebody_is_can_be_told_while_all_users_are_listed_over_and_over(
    accounts: Accounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[int] = []

    def counted(connection: sqlite3.Connection) -> list[User]:
        listed.append(1)
        return []

    async def asked() -> int:
        owner = Peer(os.getuid(), 0, 0)
        listings = [asyncio.create_task(reply_to(accounts.service, b'{"action":"list"}', owner)) for _ in range(20)]
        await asyncio.sleep(0)  # they have begun
        reply = json.loads(await reply_to(accounts.service, b'{"action":"whoami"}', STRANGER))
        assert reply["data"]["uid"] == STRANGER.uid
        before = len(listed)
        assert all(json.loads(listing)["ok"] for listing in await asyncio.gather(*listings))
        return before

    monkeypatch.setattr(store, "users", counted)
    assert asyncio.run(asked()) < 5
    assert len(listed) == 20
