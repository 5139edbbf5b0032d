"""Users and passwords over real sockets, as the people of a machine use them."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import json
import os
import socket
import sqlite3
import termios
import time
from collections.abc import Iterator
from typing import Any

import pytest

from circleosd.auth.passwords import Passwords
from circleosd.config import AuthSettings
from tests.door import acting_as
from tests.integration.conftest import NewHost, running
from tests.integration.embedded_host import COSTLY, EmbeddedHost, read_reply
from tests.integration.people import ALICE, AUTH, PASSWORD, ask, create, login, ok
from tests.measuring import once_it_holds


def stored(host: EmbeddedHost, name: str) -> str:
    """The hash that is kept of a user's password."""
    with contextlib.closing(sqlite3.connect(host.database("auth"))) as connection:
        return str(connection.execute("SELECT password FROM users WHERE name = ?", (name,)).fetchone()[0])


def test_a_users_life_through_circlectl(host: EmbeddedHost) -> None:
    host.ok("user", "create", "ursula", "--role", "operator", "--password-stdin", stdin=f"{PASSWORD}\n")
    shown = json.loads(host.ok("user", "show", "ursula", "--json"))
    assert shown == {
        "name": "ursula", "role": "operator", "uid": None, "disabled": False, "created": shown["created"],
        "last_login": None, "password": True, "sessions": 0, "locked_until": None, "rules": [],
    }  # fmt: skip
    assert "viewer" in host.ok("user", "role", "ursula", "viewer")
    assert "ursula" in host.ok("user", "list")
    host.ok("user", "passwd", "ursula", "--password-stdin", stdin="quite another one\n")
    assert host.ctl("user", "login", "ursula", "--password-stdin", stdin=f"{PASSWORD}\n").returncode == 4
    host.ok("user", "login", "ursula", "--password-stdin", stdin="quite another one\n")
    (session,) = json.loads(host.ok("user", "sessions", "--json"))
    assert session["user"] == "ursula"
    host.ok("user", "revoke", "ursula", session["id"])
    assert "revoked" in host.ctl("service", "list").stderr
    host.ctl("user", "logout")
    assert "yes" in host.ok("user", "disable", "ursula")
    disabled = host.ctl("user", "login", "ursula", "--password-stdin", stdin="quite another one\n")
    assert disabled.stderr == (
        "circlectl: the user ursula is disabled; an admin can enable the user: circlectl user enable ursula [denied]\n"
    )
    host.ok("user", "enable", "ursula")
    host.ok("user", "login", "ursula", "--password-stdin", stdin="quite another one\n")
    # One's own password is changed with the present one.
    one = host.ctl("user", "passwd", "--password-stdin", stdin=f"{PASSWORD}\n")
    assert one.stderr.startswith("circlectl: no new password on standard input [bad-request]")
    host.ok("user", "passwd", "--password-stdin", stdin=f"quite another one\n{PASSWORD}\n")
    host.ok("user", "logout")
    assert host.ok("user", "delete", "ursula") == "deleted ursula\n"
    assert host.ctl("user", "show", "ursula").returncode == 5


@pytest.mark.parametrize(
    ("name", "status", "says"),
    [
        ("root", 2, "the name root is reserved"),
        ("ROOT", 2, "the name ROOT is reserved"),
        ("nobody", 2, "reserved"),
        ("circleosd-auth", 2, "reserved"),
        ("1alice", 2, "not a user name"),
        ("-alice", 2, ""),
        ("al ice", 2, "not a user name"),
        ("älice", 2, "not a user name"),
        ("a" * 32, 2, "not a user name"),
        ("", 2, "not a user name"),
        ("taken", 6, "the user taken already exists"),
        ("Taken", 6, "the user taken already exists; names that differ only in case count as one"),
    ],
)
def test_illegal_reserved_and_taken_names_are_refused(host: EmbeddedHost, name: str, status: int, says: str) -> None:
    if "taken" not in {user["name"] for user in host.data(AUTH, "list")}:
        create(host, "taken")
    done = host.ctl("user", "create", "--password-stdin", "--", name, stdin=f"{PASSWORD}\n")
    assert done.returncode == status, done.stderr
    assert says in done.stderr


def test_a_role_that_only_a_later_version_has_gives_nothing_and_can_be_changed(host: EmbeddedHost) -> None:
    host.data("auth-service", "create", name="later", uid=4711, role="admin")
    with contextlib.closing(sqlite3.connect(host.database("auth"))) as connection, connection:
        connection.execute("UPDATE users SET role = 'auditor' WHERE name = 'later'")
    (row,) = [row for row in host.data("auth-service", "list") if row["name"] == "later"]
    assert row["role"] == "none"
    assert not host.data("auth-service", "can", name="later", verb="user:list")["allowed"]
    assert host.data("auth-service", "role", name="later", role="viewer")["role"] == "viewer"
    host.data("auth-service", "delete", name="later")


def test_a_name_keeps_its_case_and_is_found_by_it_alone(host: EmbeddedHost) -> None:
    create(host, "McAdam")
    assert host.data(AUTH, "show", name="McAdam")["name"] == "McAdam"
    assert host.call(AUTH, {"action": "show", "name": "mcadam"})["error"] == "not-found"


def test_a_uid_is_one_user_and_needs_a_name_or_a_password(host: EmbeddedHost) -> None:
    create(host, "first", uid=61100, password=None)
    taken = host.call(AUTH, {"action": "create", "name": "second", "uid": 61100})
    assert (taken["error"], taken["message"]) == ("exists", "a user with the uid 61100 already exists")
    for arguments, typed, says in [
        ([], "", "a user needs a password or a uid"),
        (["--password-stdin"], "\n", "a user needs a password or a uid"),
        (["--password-stdin"], "", "no password on standard input"),
    ]:
        neither = host.ctl("user", "create", "second", *arguments, stdin=typed)
        assert neither.returncode == 2
        assert says in neither.stderr
    for uid in (0, -1, 4294967295, os.getuid() or 0):
        assert host.call(AUTH, {"action": "create", "name": "third", "uid": uid})["error"] == "bad-request"


@pytest.mark.usefixtures("other_users")
def test_a_user_who_is_bound_to_another_uid_keeps_all_else(host: EmbeddedHost) -> None:
    create(host, "moved", uid=61021, role="operator")
    create(host, "other", uid=61022)
    host.data(AUTH, "grant", name="moved", verb="service:stop", object="web", deny=True)
    before = host.data(AUTH, "show", name="moved")
    token = login(host, "moved", ALICE)
    assert "61023" in host.ok("user", "uid", "moved", "61023")
    assert host.data(AUTH, "show", name="moved") | {"sessions": 0, "last_login": None} == before | {"uid": 61023}
    users = [ask(host, uid, AUTH, "whoami")["data"]["user"] for uid in (61021, 61023)]
    assert (users, ask(host, ALICE, AUTH, "whoami", token=token)["data"]["user"]) == ([None, "moved"], "moved")
    row = host.data(AUTH, "history", object="moved")[-1]
    assert (row["action"], row["before"], row["after"]) == ("uid", {"uid": 61021}, {"uid": 61023})
    taken = host.call(AUTH, {"action": "uid", "name": "moved", "uid": 61022})
    assert (taken["error"], taken["message"]) == ("exists", "a user with the uid 61022 already exists")
    assert host.call(AUTH, {"action": "uid", "name": "nobody-there", "uid": 61024})["error"] == "not-found"
    for uid in (0, None, 4294967295, os.getuid() or 0):
        assert host.call(AUTH, {"action": "uid", "name": "moved", "uid": uid})["error"] == "bad-request"


@pytest.mark.usefixtures("other_users")
def test_whose_user_is_disabled_is_told_so_without_a_login(host: EmbeddedHost) -> None:
    create(host, "uma", uid=61020, role="operator")
    host.ok("user", "disable", "uma")
    reply = ask(host, 61020, AUTH, "whoami")
    assert (
        reply["message"]
        == "the user uma (uid 61020) is disabled; an admin can enable the user: circlectl user enable uma"
    )
    assert (reply["data"]["user"], reply["data"]["role"]) == (None, None)
    host.ok("user", "enable", "uma")
    reply = ask(host, 61020, AUTH, "whoami")
    assert (reply["message"], reply["data"]["user"]) == (None, "uma")


@pytest.mark.parametrize("password", ["few7Ltr", "password", "Ursula123", "one more " * 114, "12345678"])
def test_bad_passwords_are_refused_and_quoted_nowhere(host: EmbeddedHost, password: str) -> None:
    create(host, "Ursula")
    for action, name in (("create", "ursula"), ("passwd", "Ursula")):
        reply = host.call(AUTH, {"action": action, "name": name, "password": password})
        assert reply["error"] == "bad-request"
        assert password not in reply["message"].replace("the password", "").removeprefix("password: ")
    host.data(AUTH, "delete", name="Ursula")


def test_a_password_has_8_to_1024_characters(host: EmbeddedHost) -> None:
    for name, password in (("briefly", "few8Ltrs"), ("at_length", "one more" * 128)):
        create(host, name, password=password)
        ok(host, os.getuid(), AUTH, "login", name=name, password=password)


@pytest.mark.usefixtures("other_users")
def test_a_present_password_counts_once_however_many_changes_it_confirms(new_host: NewHost) -> None:
    host = new_host(COSTLY)
    host.open_to_everybody()
    create(host, "twice", uid=ALICE)
    with contextlib.ExitStack() as stack:
        with acting_as(ALICE):
            socks = [stack.enter_context(host.connect(AUTH)) for _ in range(2)]
        for number, sock in enumerate(socks):
            request = {"action": "passwd", "old": PASSWORD, "password": f"{PASSWORD} {number}"}
            sock.sendall(json.dumps(request).encode() + b"\n")
        replies = [read_reply(sock) for sock in socks]
    assert sorted(str(reply.get("error")) for reply in replies) == ["None", "conflict"]
    new = next(number for number, reply in enumerate(replies) if reply["ok"])
    ok(host, ALICE, AUTH, "login", name="twice", password=f"{PASSWORD} {new}")


@pytest.fixture(scope="module")
def busy_host() -> Iterator[EmbeddedHost]:
    """A host that hashes one password at a time, which takes its time."""
    for host in running({**COSTLY, "CIRCLEOSD_AUTH_HASHING": "1"}):
        host.open_to_everybody()
        yield host


@pytest.mark.usefixtures("other_users")
@pytest.mark.parametrize("taken", ["delete", "disable", "role", "revoke"])
def test_what_waits_for_a_hash_is_not_done_for_who_lost_the_right_meanwhile(
    busy_host: EmbeddedHost, taken: str
) -> None:
    host, turns = busy_host, itertools.count()

    def rows() -> list[dict[str, Any]]:
        """What is recorded of the loss and of what was asked before it."""
        turn = next(turns)
        admin, evil = f"admin_{taken}{turn}", f"evil_{taken}{turn}"
        create(host, admin, role="admin")
        token = login(host, admin, ALICE)
        with contextlib.ExitStack() as stack:
            ahead = [stack.enter_context(host.connect(AUTH)) for _ in range(10)]
            with acting_as(ALICE):
                sock = stack.enter_context(host.connect(AUTH))
            for number, other in enumerate(ahead):
                request = {"action": "create", "name": f"other_{taken}{turn}_{number}", "password": PASSWORD}
                other.sendall(json.dumps(request).encode() + b"\n")
            request = {"action": "create", "name": evil, "password": PASSWORD, "role": "admin", "token": token}
            sock.sendall(json.dumps(request).encode() + b"\n")
            host.wait_for(lambda: host.data(AUTH, "health")["connections"] > 10 and _is_read(sock))
            assert ok(host, ALICE, AUTH, "whoami", token=token)["user"] == admin  # who sent the first is known then
            host.data(AUTH, taken, name=admin, **({"role": "operator"} if taken == "role" else {}))
            read_reply(sock)
            assert all(read_reply(other)["ok"] for other in ahead)
        return [host.data(AUTH, "history", object=name)[-1] for name in (admin, evil)]

    lost, asked = once_it_holds(rows, lambda rows: rows[0]["seq"] < rows[1]["seq"])
    assert (lost["action"], asked["action"], asked["phase"]) == (taken, "create", "denied")
    assert asked["actor"]["user"] == lost["object"]
    assert asked["object"] not in [user["name"] for user in host.data(AUTH, "list")]


def _is_read(sock: socket.socket) -> bool:
    """Whether the peer has read all that was sent (SIOCOUTQ, unix(7))."""
    return fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)) == bytes(4)


def test_what_was_begun_in_time_is_told_as_it_ends(new_host: NewHost) -> None:
    host = new_host({"CIRCLEOSD_SERVER_REQUEST_TIMEOUT": "4"})
    create(host, "early")
    with contextlib.closing(sqlite3.connect(host.database("auth"))) as slow:
        slow.execute("BEGIN IMMEDIATE")  # as a disk that takes its time
        with host.connect(AUTH) as sock:
            sock.sendall(b'{"action":"create","name":"late","uid":61400}\n')
            time.sleep(5.0)  # longer than the request may take
            slow.execute("ROLLBACK")
            assert read_reply(sock)["ok"]
    assert [row["phase"] for row in host.data(AUTH, "history", object="late")] == ["done"]


def test_new_parameters_are_applied_at_the_next_login(new_host: NewHost) -> None:
    host = new_host({})
    create(host, "alice")
    assert stored(host, "alice").startswith("$argon2id$v=19$m=64,t=1,p=1$")
    host.stop()
    host.environment |= {"CIRCLEOSD_AUTH_HASH_MEMORY": "128", "CIRCLEOSD_AUTH_HASH_PASSES": "2"}
    host.start()
    login(host, "alice", os.getuid())
    after = stored(host, "alice")
    assert after.startswith("$argon2id$v=19$m=128,t=2,p=1$")
    login(host, "alice", os.getuid())
    assert stored(host, "alice") == after, "it is not hashed again without need"
    assert asyncio.run(Passwords(AuthSettings()).verify(after, PASSWORD, None))
