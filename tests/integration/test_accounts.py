"""Users, logins, sessions and rules over real sockets, as the people of a machine use them."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import socket
import sqlite3
import termios
import time
from pathlib import Path
from typing import Any

import pytest

from circleosd.auth.passwords import Passwords
from circleosd.config import AuthSettings
from tests.door import acting_as
from tests.integration.conftest import NewHost
from tests.integration.embedded_host import CHEAP, EmbeddedHost, read_reply
from tests.integration.people import ALICE, AUTH, BOB, PASSWORD, PLUGINS, REGISTRY, STRANGER, ask, create, login, ok


@pytest.fixture
def host(cheap_host: EmbeddedHost) -> EmbeddedHost:
    return cheap_host


# users


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
        "circlectl: the user ursula is disabled; an admin ends that: circlectl user enable ursula [denied]\n"
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
        ("taken", 6, "there already is the user taken"),
        ("Taken", 6, "there already is the user taken, and names that differ only in case are one"),
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
    with contextlib.closing(sqlite3.connect(host.directory / "state/circleosd/auth/auth.db")) as connection, connection:
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
    assert (taken["error"], taken["message"]) == ("exists", "there already is a user with the uid 61100")
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
def test_whose_user_is_disabled_is_told_so_without_a_login(host: EmbeddedHost) -> None:
    create(host, "uma", uid=61020, role="operator")
    host.ok("user", "disable", "uma")
    reply = ask(host, 61020, AUTH, "whoami")
    assert reply["message"] == "the user uma, of uid 61020, is disabled; an admin ends that: circlectl user enable uma"
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
    host = new_host({})  # with hashes that take their time
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


@pytest.mark.usefixtures("other_users")
@pytest.mark.parametrize("taken", ["delete", "disable", "role", "revoke"])
def test_what_waits_for_a_hash_is_not_done_for_who_lost_the_right_meanwhile(new_host: NewHost, taken: str) -> None:
    host = new_host({})  # with hashes that take their time
    host.open_to_everybody()
    create(host, "adam", role="admin")
    token = login(host, "adam", ALICE)
    with contextlib.ExitStack() as stack:
        ahead = [stack.enter_context(host.connect(AUTH)) for _ in range(20)]
        with acting_as(ALICE):
            sock = stack.enter_context(host.connect(AUTH))
        for number, other in enumerate(ahead):
            request = {"action": "create", "name": f"other{number}", "password": PASSWORD}
            other.sendall(json.dumps(request).encode() + b"\n")
        request = {"action": "create", "name": "evil", "password": PASSWORD, "role": "admin", "token": token}
        sock.sendall(json.dumps(request).encode() + b"\n")
        host.wait_for(lambda: host.data(AUTH, "health")["connections"] > 20 and _is_read(sock))
        assert ok(host, ALICE, AUTH, "whoami", token=token)["user"] == "adam"  # who sent the first is known then
        host.data(AUTH, taken, name="adam", **({"role": "operator"} if taken == "role" else {}))
        reply = read_reply(sock)
        assert all(read_reply(other)["ok"] for other in ahead)
    assert reply["error"] == "denied", reply
    assert "evil" not in [user["name"] for user in host.data(AUTH, "list")]
    row = host.data(AUTH, "history", object="evil")[-1]
    assert (row["action"], row["phase"], row["actor"]["user"]) == ("create", "denied", "adam")


def _is_read(sock: socket.socket) -> bool:
    """Whether the peer has read all that was sent (SIOCOUTQ, unix(7))."""
    return fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)) == bytes(4)


def test_what_was_begun_in_time_is_told_as_it_ends(new_host: NewHost) -> None:
    host = new_host({**CHEAP, "CIRCLEOSD_SERVER_REQUEST_TIMEOUT": "1"})
    create(host, "early")
    with contextlib.closing(sqlite3.connect(host.directory / "state/circleosd/auth/auth.db")) as slow:
        slow.execute("BEGIN IMMEDIATE")  # as a disk that takes its time
        with host.connect(AUTH) as sock:
            sock.sendall(b'{"action":"create","name":"late","uid":61400}\n')
            time.sleep(2.0)  # longer than the request may take
            slow.execute("ROLLBACK")
            assert read_reply(sock)["ok"]
    assert [row["phase"] for row in host.data(AUTH, "history", object="late")] == ["done"]


def test_new_parameters_are_applied_at_the_next_login(new_host: NewHost) -> None:
    host = new_host(CHEAP)
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


def database(host: EmbeddedHost, sql: str) -> list[Any]:
    connection = sqlite3.connect(f"file:{host.directory}/state/circleosd/auth/auth.db?mode=ro", uri=True)
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


def let_pass(host: EmbeddedHost, seconds: float) -> None:
    """Start the host anew, and have what the past made of sessions and failed logins be so much older."""
    host.stop()
    connection = sqlite3.connect(host.directory / "state/circleosd/auth/auth.db")
    with connection:
        for column in ("created", "used", "expires"):
            connection.execute(f"UPDATE sessions SET {column} = {column} - ?", (seconds,))
        connection.execute("UPDATE failures SET last = last - ?", (seconds,))
    connection.close()
    host.start()
    host.open_to_everybody()


def stored(host: EmbeddedHost, name: str) -> str:
    return str(database(host, f"SELECT password FROM users WHERE name = '{name}'")[0][0])


# sessions


def test_only_hashes_of_tokens_are_stored(host: EmbeddedHost) -> None:
    create(host, "hashed")
    token = login(host, "hashed", os.getuid())
    for path in (host.directory / "state").rglob("*"):
        assert not path.is_file() or token.encode() not in path.read_bytes(), path


@pytest.mark.usefixtures("other_users")
def test_a_session_is_the_uids_that_opened_it_at_every_service(host: EmbeddedHost) -> None:
    create(host, "bound", role="admin")
    token = login(host, "bound", ALICE)
    for service, action in [(AUTH, "list"), (REGISTRY, "list"), (PLUGINS, "list")]:
        ok(host, ALICE, service, action, token=token)
        for uid in (BOB, 0):
            stolen = ask(host, uid, service, action, token=token)
            assert stolen["error"] == "denied"
            assert "opened by another uid" in stolen["message"]


def test_the_sessions_of_a_user_who_was_disabled_do_not_come_back(host: EmbeddedHost) -> None:
    create(host, "paused")
    token = login(host, "paused", os.getuid())
    host.data(AUTH, "disable", name="paused")
    host.data(AUTH, "enable", name="paused")
    assert ask(host, os.getuid(), AUTH, "whoami", token=token)["error"] == "denied"


def test_a_revocation_ends_one_session_or_all_and_says_where_there_is_none(host: EmbeddedHost) -> None:
    create(host, "revoked")
    tokens = [login(host, "revoked", os.getuid()) for _ in range(3)]
    one = ok(host, os.getuid(), AUTH, "whoami", token=tokens[1])["session"]
    assert [item["id"] for item in host.data(AUTH, "revoke", name="revoked", session=one)] == [one]
    assert [ask(host, os.getuid(), AUTH, "whoami", token=token)["ok"] for token in tokens] == [True, False, True]
    assert len(host.data(AUTH, "revoke", name="revoked")) == 2
    for more, which in (({}, ""), ({"session": one}, f" {one}")):
        reply = host.call(AUTH, {"action": "revoke", "name": "revoked", **more})
        says = f"revoked has no session{which}; see: circlectl user sessions revoked"
        assert (reply["error"], reply["message"]) == ("not-found", says)


def test_a_logout_ends_the_own_session_and_a_new_password_all_others(host: EmbeddedHost) -> None:
    create(host, "threefold")
    first, second, third = (login(host, "threefold", os.getuid()) for _ in range(3))

    def in_force() -> list[str]:
        return [token for token in (first, second, third) if ask(host, os.getuid(), AUTH, "whoami", token=token)["ok"]]

    ok(host, os.getuid(), AUTH, "logout", token=first)
    assert in_force() == [second, third]
    ok(host, os.getuid(), AUTH, "passwd", token=second, name="threefold", password=f"{PASSWORD} more")
    assert in_force() == [second]


@pytest.mark.usefixtures("other_users")
def test_an_identity_costs_a_service_one_question_a_second(host: EmbeddedHost) -> None:
    create(host, "frequent", role="viewer")
    token = login(host, "frequent", ALICE)
    before, begun = host.data(AUTH, "health")["requests"], time.monotonic()
    for _ in range(100):
        ok(host, ALICE, REGISTRY, "list", token=token)
    questions = host.data(AUTH, "health")["requests"] - before - 1
    assert 1 <= questions <= 1 + (time.monotonic() - begun)


def test_a_session_ends_when_it_is_not_used(new_host: NewHost) -> None:
    host = new_host({**CHEAP, "CIRCLEOSD_AUTH_SESSION_IDLE": "600"})
    create(host, "idle")
    uid = os.getuid()
    used, unused = login(host, "idle", uid), login(host, "idle", uid)
    for _ in range(2):
        let_pass(host, 400)
        ok(host, uid, AUTH, "whoami", token=used)
    assert ask(host, uid, AUTH, "whoami", token=unused)["error"] == "denied"
    assert [item["user"] for item in host.data(AUTH, "sessions")] == ["idle"]
    assert host.data(AUTH, "show", name="idle")["sessions"] == 1
    let_pass(host, 601)
    assert ask(host, uid, AUTH, "whoami", token=used)["error"] == "denied"


def test_a_session_ends_however_much_it_is_used(new_host: NewHost) -> None:
    host = new_host({**CHEAP, "CIRCLEOSD_AUTH_SESSION_LIFETIME": "1.5"})
    create(host, "busy")
    begun = time.monotonic()
    token = login(host, "busy", os.getuid())
    while ask(host, os.getuid(), AUTH, "whoami", token=token)["ok"]:
        assert time.monotonic() - begun < 3
        time.sleep(0.05)  # between looks
    assert time.monotonic() - begun >= 1.5


def test_a_login_may_ask_for_a_shorter_session_and_for_no_longer_one(host: EmbeddedHost) -> None:
    create(host, "brief")
    for asked, given in ((600, 600), (1e9, 43200)):
        begun = time.time()
        opened = ok(host, os.getuid(), AUTH, "login", name="brief", password=PASSWORD, lifetime=asked)
        assert begun + given <= opened["expires"] <= time.time() + given
        told = ok(host, os.getuid(), AUTH, "whoami", token=opened["token"])
        assert told["expires"] == pytest.approx(min(opened["expires"], time.time() + 7200), abs=60)
        assert told["session"] in [item["id"] for item in host.data(AUTH, "sessions", name="brief")]


def test_who_is_no_user_has_to_say_whose_sessions_are_to_end(host: EmbeddedHost) -> None:
    reply = host.call(AUTH, {"action": "revoke"})
    says = "revoke needs the parameter name: you are no CircleOSD user yourself"
    assert (reply["error"], reply["message"]) == ("bad-request", says)


def test_a_session_of_a_clock_that_was_far_ahead_has_ended_when_that_is_set_back(new_host: NewHost) -> None:
    host = new_host({**CHEAP, "CIRCLEOSD_AUTH_SESSION_IDLE": "600"})
    create(host, "early")
    uid = os.getuid()
    token = login(host, "early", uid)
    let_pass(host, -500)
    ok(host, uid, AUTH, "whoami", token=token)
    let_pass(host, -500)
    assert ask(host, uid, AUTH, "whoami", token=token)["error"] == "denied"
    assert host.data(AUTH, "sessions") == []


def test_who_is_admin_and_no_user_is_shown_the_sessions_of_all_and_the_help_says_so(host: EmbeddedHost) -> None:
    for name in ("ulla", "umut"):
        create(host, name)
        login(host, name, os.getuid())
    assert {"ulla", "umut"} <= {item["user"] for item in host.data(AUTH, "sessions")}
    assert "default: yourself, or all where you are no user\n" in host.ok("user", "sessions", "--help")


def test_verifying_does_not_write_to_the_disk(new_host: NewHost) -> None:
    host = new_host(CHEAP)  # where nothing that others did is written later
    create(host, "verified")
    token = login(host, "verified", os.getuid())
    ok(host, os.getuid(), AUTH, "verify", token=token)
    files = [path for path in (host.directory / "state/circleosd/auth").iterdir() if not path.name.endswith("-shm")]
    before = [(path.stat().st_mtime_ns, path.stat().st_size) for path in files]
    for _ in range(200):
        ok(host, os.getuid(), AUTH, "verify", token=token)
    assert [(path.stat().st_mtime_ns, path.stat().st_size) for path in files] == before
    (session,) = host.data(AUTH, "sessions", name="verified")
    assert session["last_used"] > session["created"], "but it is known when it was used"


def test_when_a_session_was_used_outlives_the_service(new_host: NewHost) -> None:
    host = new_host(CHEAP)
    create(host, "lasting")
    token = login(host, "lasting", os.getuid())
    ok(host, os.getuid(), AUTH, "whoami", token=token)
    (before,) = host.data(AUTH, "sessions")
    assert before["last_used"] > before["created"]
    host.stop()
    host.start()
    assert host.data(AUTH, "sessions") == [before]


def test_a_user_has_a_bounded_number_of_sessions(new_host: NewHost) -> None:
    host = new_host({**CHEAP, "CIRCLEOSD_AUTH_MAX_SESSIONS": "3"})
    create(host, "many")
    tokens = [login(host, "many", os.getuid()) for _ in range(5)]
    assert len(host.data(AUTH, "sessions", name="many")) == 3
    replies = [ask(host, os.getuid(), AUTH, "whoami", token=token)["ok"] for token in tokens]
    assert replies == [False, False, True, True, True]
    for token in tokens[2:4]:  # which stays in memory for now
        ok(host, os.getuid(), AUTH, "whoami", token=token)
    login(host, "many", os.getuid())
    assert not ask(host, os.getuid(), AUTH, "whoami", token=tokens[4])["ok"], "the least recently used"


@pytest.mark.usefixtures("other_users")
def test_a_user_bound_to_a_uid_needs_no_login_at_any_service(host: EmbeddedHost) -> None:
    create(host, "una", uid=61200, role="viewer", password=None)
    for service in (AUTH, REGISTRY, PLUGINS):
        ok(host, 61200, service, "list")
    assert ok(host, 61200, AUTH, "whoami")["user"] == "una"
    assert ask(host, 61200, REGISTRY, "stop", name="x")["error"] == "denied"
    row = host.data(REGISTRY, "history", user="una")[-1]
    assert (row["action"], row["error"], row["actor"]["uid"]) == ("stop", "denied", 61200)
    host.data(AUTH, "disable", name="una")
    assert ask(host, 61200, AUTH, "list")["error"] == "denied"
    time.sleep(1.0)  # for so long the other services may believe what they know
    for service in (REGISTRY, PLUGINS):
        assert ask(host, 61200, service, "list")["error"] == "denied"


@pytest.mark.usefixtures("other_users")
def test_who_is_known_by_the_uid_is_not_denied_because_auth_service_cannot_start(new_host: NewHost) -> None:
    host = new_host(CHEAP)
    host.open_to_everybody()
    create(host, "una", uid=61200, role="operator", password=None)
    host.data(REGISTRY, "stop", name="auth-service")
    store = host.directory / "state/circleosd/auth/auth.db"
    store.unlink()
    store.write_text("this is no database")
    reply = ask(host, 61200, REGISTRY, "stop", name="plugin-manager")
    assert (reply["error"], "cannot tell who uid 61200 is: " in reply["message"]) == ("unavailable", True), reply
    assert "denied" not in [row["phase"] for row in host.data(REGISTRY, "history")]
    path = host.runtime / "auth-service.sock"
    path.unlink()
    reply = ask(host, 61200, REGISTRY, "stop", name="plugin-manager")
    says = f"cannot tell who uid 61200 is: auth-service is not listening at {path}; see: circlectl system status"
    assert (reply["error"], reply["message"]) == ("unavailable", says)
    assert ask(host, 0, REGISTRY, "stop", name="plugin-manager")["ok"]


@pytest.mark.usefixtures("other_users")
def test_nobody_asks_about_anothers_token_or_uid(host: EmbeddedHost) -> None:
    create(host, "asked", uid=61201, role="admin")
    token = login(host, "asked", ALICE)
    assert ask(host, STRANGER, AUTH, "verify", uid=61201)["error"] == "denied"
    assert ask(host, STRANGER, AUTH, "verify", presented=token)["error"] == "denied"
    assert ask(host, STRANGER, AUTH, "verify", presented=token, uid=ALICE)["error"] == "denied"
    assert ok(host, 0, AUTH, "verify", presented=token, uid=ALICE)["user"] == "asked"


# failed logins


def wrong(host: EmbeddedHost, uid: int, name: str) -> dict[str, Any]:
    return ask(host, uid, AUTH, "login", name=name, password="certainly wrong")


@pytest.mark.usefixtures("other_users")
def test_failed_logins_make_a_peer_wait_and_the_wait_ends(new_host: NewHost) -> None:
    host = new_host({**CHEAP, "CIRCLEOSD_AUTH_LOGIN_TRIES": "3"})
    host.open_to_everybody()
    create(host, "target")
    create(host, "other")
    errors = [wrong(host, STRANGER, name)["error"] for name in ("target", "nobody1", "nobody2")]
    assert errors == ["denied", "denied", "denied"]
    let_pass(host, -30)  # or the wait may be over before it is looked at
    errors = [wrong(host, STRANGER, name)["error"] for name in ("target", "other")]
    assert errors == ["limit", "limit"], "a restart is no way around it"
    reply = ask(host, STRANGER, AUTH, "login", name="target", password=PASSWORD)
    assert reply["error"] == "limit", "the right password does not end the wait"
    assert "try again in 1 s" in reply["message"]
    login(host, "target", BOB)
    let_pass(host, 31)
    login(host, "target", STRANGER)


@pytest.mark.usefixtures("other_users")
def test_a_success_begins_anew(new_host: NewHost) -> None:
    host = new_host({**CHEAP, "CIRCLEOSD_AUTH_LOGIN_TRIES": "3"})
    host.open_to_everybody()
    create(host, "target")
    for _ in range(3):
        errors = [wrong(host, STRANGER, "target")["error"] for _ in range(2)]
        assert errors == ["denied", "denied"]
        login(host, "target", STRANGER)


@pytest.mark.usefixtures("other_users")
@pytest.mark.parametrize("success", ["login", "passwd"])
def test_a_success_of_ones_own_forgives_no_guess_at_others(new_host: NewHost, success: str) -> None:
    host = new_host({**CHEAP, "CIRCLEOSD_AUTH_LOGIN_TRIES": "3"})
    host.open_to_everybody()
    create(host, "guesser", uid=STRANGER)
    create(host, "guessed")
    login(host, "guessed", STRANGER)  # at home there too, where the uid alone has to wait
    assert [wrong(host, STRANGER, "guessed")["error"] for _ in range(2)] == ["denied", "denied"]
    if success == "login":
        login(host, "guesser", STRANGER)
    else:
        ok(host, STRANGER, AUTH, "passwd", old=PASSWORD, password=f"{PASSWORD} more")
    assert wrong(host, STRANGER, "guessed")["error"] == "denied"
    let_pass(host, -30)  # or the wait may be over before it is looked at
    assert wrong(host, STRANGER, "guessed")["error"] == "limit"


@pytest.mark.usefixtures("other_users")
def test_guesses_at_once_are_not_more_than_one_after_another(new_host: NewHost) -> None:
    host = new_host({**CHEAP, "CIRCLEOSD_AUTH_LOGIN_TRIES": "5"})
    host.open_to_everybody()
    create(host, "guessed")
    with contextlib.ExitStack() as stack:
        with acting_as(STRANGER):
            socks = [stack.enter_context(host.connect(AUTH)) for _ in range(40)]
        for number, sock in enumerate(socks):
            password = PASSWORD if number == 30 else f"certainly wrong {number}"
            request = {"action": "login", "name": "guessed", "password": password}
            sock.sendall(json.dumps(request).encode() + b"\n")
        errors = [read_reply(sock).get("error") for sock in socks]
    assert errors.count("denied") == 5
    assert errors.count("limit") == 35


@pytest.mark.usefixtures("other_users")
def test_a_stranger_locks_a_user_out_only_where_the_user_has_not_been(new_host: NewHost) -> None:
    host = new_host({**CHEAP, "CIRCLEOSD_AUTH_LOGIN_TRIES": "2", "CIRCLEOSD_AUTH_LOGIN_LOCKOUT": "600"})
    host.open_to_everybody()
    create(host, "Ada", role="admin")
    login(host, "Ada", ALICE)
    for uid in range(62000, 62016):  # many strangers, so that none waits for itself
        wrong(host, uid, "ADA" if uid % 2 else "ada")
    assert host.data(AUTH, "show", name="Ada")["locked_until"] > time.time()
    assert ask(host, BOB, AUTH, "login", name="Ada", password=PASSWORD)["error"] == "limit"
    login(host, "Ada", ALICE)
    login(host, "Ada", 0)
    for _ in range(10):
        assert wrong(host, 0, "Ada")["error"] == "denied", "root neither waits nor counts"
    host.data(AUTH, "enable", name="Ada")
    assert host.data(AUTH, "show", name="Ada")["locked_until"] is None


@pytest.mark.usefixtures("other_users")
def test_an_administrator_ends_the_wait_of_who_failed_at_home(new_host: NewHost) -> None:
    host = new_host({**CHEAP, "CIRCLEOSD_AUTH_LOGIN_TRIES": "2"})
    host.open_to_everybody()
    create(host, "ada")
    login(host, "ada", ALICE)
    for way in ({"action": "enable"}, {"action": "passwd", "password": PASSWORD}):
        for _ in range(2):
            assert wrong(host, ALICE, "ada")["error"] == "denied"
        let_pass(host, -30)  # or the wait may be over before it is looked at
        assert wrong(host, ALICE, "ada")["error"] == "limit"
        assert host.data(AUTH, "show", name="ada")["locked_until"] > time.time()
        host.data(AUTH, name="ada", **way)
        assert host.data(AUTH, "show", name="ada")["locked_until"] is None
        login(host, "ada", ALICE)


@pytest.mark.usefixtures("other_users")
def test_a_name_that_is_no_users_is_not_kept_for_it_may_be_a_password(host: EmbeddedHost) -> None:
    wrong(host, STRANGER, "Tr0ub4dor-and-3")
    row = host.data(AUTH, "history", user=str(STRANGER))[-1]
    assert (row["action"], row["object"], row["params"]) == ("login", None, {})
    for path in (host.directory / "state").rglob("*"):
        assert not path.is_file() or b"Tr0ub4dor-and-3" not in path.read_bytes(), path


# rules


@pytest.mark.usefixtures("other_users")
def test_alice_may_restart_only_nginx(host: EmbeddedHost) -> None:
    for name in ("nginx", "apache"):
        host.add_service(name, "[Service]\nType=exec\nExecStart=/bin/sleep 600\n")
    host.ok("user", "create", "alice", "--role", "none", "--password-stdin", stdin=f"{PASSWORD}\n")
    assert host.ok("user", "grant", "alice", "service:restart", "nginx") == "allow service:restart nginx\n"
    token = login(host, "alice", ALICE)
    assert ok(host, ALICE, REGISTRY, "restart", name="nginx", token=token)["state"] == "active"
    for action, name in [
        ("restart", "apache"),
        ("stop", "nginx"),
        ("status", "nginx"),
        ("restart", "service-registry"),
    ]:
        assert ask(host, ALICE, REGISTRY, action, name=name, token=token)["error"] == "denied"
    assert [row["name"] for row in ok(host, ALICE, REGISTRY, "list", token=token)] == ["nginx"]
    rows = host.data(REGISTRY, "history", user="alice")
    assert [(row["phase"], row["action"], row["object"]) for row in rows][:2] == [
        ("intent", "restart", "nginx"),
        ("outcome", "restart", "nginx"),
    ]
    assert {row["error"] for row in rows[2:]} == {"denied"}
    host.ok("service", "stop", "nginx")


def test_can_explains_which_rule_decides(host: EmbeddedHost) -> None:
    create(host, "carl", role="operator")
    host.ok("user", "grant", "carl", "plugin:unload", "json-*")
    host.ok("user", "grant", "carl", "service:*", "db-?", "--deny")

    def can(*about: str) -> dict[str, Any]:
        answered: dict[str, Any] = json.loads(host.ok("user", "can", "carl", *about, "--json"))
        return answered

    assert can("service:stop", "web")["why"] == "service:stop needs the role operator, and carl has the role operator"
    denied = can("service:stop", "db-1")
    assert (denied["allowed"], denied["rule"]) == (False, {"verb": "service:*", "object": "db-?", "deny": True})
    assert can("plugin:unload", "json-x")["rule"] == {"verb": "plugin:unload", "object": "json-*", "deny": False}
    assert not can("plugin:unload", "xml")["allowed"]
    assert can("user:passwd", "carl")["why"] == "carl may user:passwd for oneself"
    assert host.ok("user", "can", "carl", "service:stop", "db-1").startswith("no: service:stop db-1 is denied to carl")
    unknown = host.ctl("user", "can", "carl", "service:stopp", "x")
    assert unknown.returncode == 2
    assert "there is no action service:stopp" in unknown.stderr
    assert host.ok("user", "ungrant", "carl", "service:*", "db-?", "--deny") == "allow plugin:unload json-*\n"
    assert can("service:stop", "db-1")["allowed"]
    assert host.ctl("user", "ungrant", "carl", "service:*", "db-?", "--deny").returncode == 5
    assert host.ctl("user", "grant", "carl", "plugin:unload", "json-*").returncode == 6
    host.ok("user", "disable", "carl")
    assert can("service:stop", "web") == {"allowed": False, "why": "the user carl is disabled", "rule": None}


@pytest.mark.parametrize(
    ("verb", "object_", "says"),
    [
        ("service:restrat", "nginx", "there is no action service:restrat"),
        ("restart", "nginx", "is not an action such as service:restart"),
        ("service:restart", "a b", "is not the name of a service"),
        ("service:restart", "[ab]", "is not the name of a service"),
        ("user:whoami", "x", "no rule about an object can allow user:whoami: anyone may do it"),
        ("plugin:load", "x", "no rule about an object can allow plugin:load: it needs the role admin"),
        ("system:history", "x", "there is no action"),
    ],
)
def test_a_rule_that_could_never_apply_is_refused(host: EmbeddedHost, verb: str, object_: str, says: str) -> None:
    reply = host.call(AUTH, {"action": "grant", "name": "taken", "verb": verb, "object": object_})
    assert reply["error"] == "bad-request"
    assert says in reply["message"]


def test_a_denial_that_could_never_apply_is_refused(host: EmbeddedHost) -> None:
    create(host, "unruly", role="admin")
    for verb in ("plugin:load", "user:logout"):
        reply = host.call(AUTH, {"action": "grant", "name": "unruly", "verb": verb, "object": "x", "deny": True})
        assert reply["error"] == "bad-request"
        assert f"no rule about an object can deny {verb}" in reply["message"]
    host.ok("user", "grant", "unruly", "plugin:*load", "x", "--deny")  # which is plugin:unload, too
    assert host.ok("user", "can", "unruly", "plugin:load", "x").startswith("yes")
    host.ok("user", "grant", "unruly", "plugin:load", "**", "--deny")
    assert host.ok("user", "can", "unruly", "plugin:load", "x").startswith("no")


def test_rules_have_a_bound(host: EmbeddedHost) -> None:
    create(host, "ruled")
    for number in range(200):
        host.data(AUTH, "grant", name="ruled", verb="service:stop", object=f"unit{number}")
    assert host.call(AUTH, {"action": "grant", "name": "ruled", "verb": "*", "object": "*"})["error"] == "limit"


@pytest.mark.usefixtures("other_users")
def test_nobody_hands_on_more_than_ones_own_rights(host: EmbeddedHost) -> None:
    create(host, "lead", role="operator")
    create(host, "boss", role="admin")
    create(host, "mate", role="none")
    host.data(AUTH, "grant", name="lead", verb="user:*", object="*")
    host.data(AUTH, "grant", name="lead", verb="service:*", object="db", deny=True)
    token = login(host, "lead", BOB)

    def code(action: str, **parameters: Any) -> str:
        reply = ask(host, BOB, AUTH, action, token=token, **parameters)
        return "ok" if reply["ok"] else f"{reply['error']}: {reply['message']}"

    assert code("grant", name="mate", verb="service:stop", object="web") == "ok"
    attempts: list[tuple[str, dict[str, Any]]] = [
        ("grant", {"name": "mate", "verb": "service:stop", "object": "db"}),
        ("grant", {"name": "mate", "verb": "service:stop", "object": "*"}),
        ("grant", {"name": "mate", "verb": "plugin:unload", "object": "x"}),
        ("grant", {"name": "lead", "verb": "plugin:unload", "object": "x"}),
        ("ungrant", {"name": "lead", "verb": "service:*", "object": "db", "deny": True}),
        ("create", {"name": "puppet", "password": PASSWORD, "role": "admin"}),
        ("create", {"name": "puppet", "password": PASSWORD, "role": "operator"}),  # it could stop db, lead cannot
        ("role", {"name": "mate", "role": "admin"}),
        ("role", {"name": "lead", "role": "admin"}),
        ("passwd", {"name": "boss", "password": PASSWORD}),
        ("disable", {"name": "boss"}),
        ("delete", {"name": "boss"}),
        ("revoke", {"name": "boss"}),
        ("role", {"name": "boss", "role": "none"}),
    ]
    for action, parameters in attempts:
        said = code(action, **parameters)
        assert said.startswith("denied: this needs a right that you do not have yourself"), (action, parameters, said)
    assert code("create", name="puppet", password=PASSWORD, role="none") == "ok"
    assert code("delete", name="puppet") == "ok"


def test_a_session_is_kept_in_a_file_of_its_owner_below_the_state_directory(host: EmbeddedHost, tmp_path: Path) -> None:
    create(host, "filed")
    state = tmp_path / "state"
    done = host.ctl(
        "user", "login", "filed", "--password-stdin", stdin=f"{PASSWORD}\n", env={"XDG_STATE_HOME": str(state)}
    )
    assert done.returncode == 0, done.stderr
    (path,) = (state / "circleosd/sessions").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o077 == 0
