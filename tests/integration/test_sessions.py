"""Sessions over real sockets: whose they are, and when they end."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from circleosd import wire
from tests.core_text import core
from tests.integration.conftest import NewHost
from tests.integration.embedded_host import EmbeddedHost, read_reply
from tests.integration.made import write
from tests.integration.people import (
    ALICE,
    AUTH,
    BOB,
    PASSWORD,
    PLUGINS,
    REGISTRY,
    STRANGER,
    ask,
    create,
    let_pass,
    login,
    ok,
)


def test_only_hashes_of_tokens_are_stored(host: EmbeddedHost) -> None:
    create(host, "hashed")
    token = login(host, "hashed", os.getuid())
    stored = b"".join(path.read_bytes() for path in (host.directory / "state").rglob("*") if path.is_file())
    assert b"hashed" in stored  # the user, and with that the login
    assert token.encode() not in stored


@pytest.mark.usefixtures("other_users")
def test_a_session_is_the_uids_that_opened_it_at_every_service(host: EmbeddedHost) -> None:
    create(host, "bound", role="admin")
    token = login(host, "bound", ALICE)
    for service, action in [(AUTH, "list"), (REGISTRY, "list"), (PLUGINS, "list")]:
        ok(host, ALICE, service, action, token=token)
        for uid in (BOB, 0):
            stolen = ask(host, uid, service, action, token=token)
            assert stolen["error"] == "denied"
            assert "was not opened by uid" in stolen["message"]


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


@pytest.mark.parametrize("replaced", [False, True])
def test_a_call_that_waits_is_not_made_once_its_session_was_revoked(
    host: EmbeddedHost, tmp_path: Path, replaced: bool
) -> None:
    endless = write(
        tmp_path, "endless", core('(func (export "f") (param i32) (result i64) (loop (br 0)) (unreachable))')
    )
    asked = [{"name": "clock", "reason": "none"}]
    host.load(
        endless, manifest={"name": "endless", "plugin_type": "wasm", "limits": {"time": 4}, "capabilities": asked}
    )
    create(host, "caller", role="operator")
    call = {"action": "invoke", "id": "endless", "func": "f"}
    with host.connect(PLUGINS) as first, host.connect(PLUGINS) as second:
        first.sendall(wire.encode(call))
        second.sendall(wire.encode({**call, "token": login(host, "caller", os.getuid())}))
        host.wait_for(lambda: host.data(PLUGINS, "show", id="endless")["waiting"] == 2)
        host.data(AUTH, "revoke", name="caller")
        if replaced:  # the call then goes to a new worker
            host.data(PLUGINS, "grant", id="endless", capability="clock")
        assert read_reply(first)["error"] == "timeout"
        assert read_reply(second)["error"] == "denied"
    assert host.data(PLUGINS, "show", id="endless")["calls"] == 1
    host.unload("endless")
    host.data(AUTH, "delete", name="caller")


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
    host = new_host({"CIRCLEOSD_AUTH_SESSION_IDLE": "600"})
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
    host = new_host({"CIRCLEOSD_AUTH_SESSION_LIFETIME": "1.5"})
    create(host, "busy")
    begun = time.monotonic()
    token = login(host, "busy", os.getuid())
    opened = asked = time.monotonic()
    while ask(host, os.getuid(), AUTH, "whoami", token=token)["ok"]:
        assert asked - opened < 2
        time.sleep(0.05)  # between looks
        asked = time.monotonic()
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
    says = "revoke needs the parameter name: you are not a CircleOSD user"
    assert (reply["error"], reply["message"]) == ("bad-request", says)


def test_a_session_of_a_clock_that_was_far_ahead_has_ended_when_that_is_set_back(new_host: NewHost) -> None:
    host = new_host({"CIRCLEOSD_AUTH_SESSION_IDLE": "600"})
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
    assert "default: yourself, or all if you are not a user\n" in host.ok("user", "sessions", "--help")


def test_verifying_does_not_write_to_the_disk(new_host: NewHost) -> None:
    host = new_host({})  # where nothing that others did is written later
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
    host = new_host({})
    create(host, "lasting")
    token = login(host, "lasting", os.getuid())
    ok(host, os.getuid(), AUTH, "whoami", token=token)
    (before,) = host.data(AUTH, "sessions")
    assert before["last_used"] > before["created"]
    host.stop()
    host.start()
    assert host.data(AUTH, "sessions") == [before]


def test_a_user_has_a_bounded_number_of_sessions(new_host: NewHost) -> None:
    host = new_host({"CIRCLEOSD_AUTH_MAX_SESSIONS": "3"})
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
    host = new_host({})
    host.open_to_everybody()
    create(host, "una", uid=61200, role="operator", password=None)
    host.data(REGISTRY, "stop", name="auth-service")
    store = host.database("auth")
    store.unlink()
    store.write_text("this is no database")
    reply = ask(host, 61200, REGISTRY, "stop", name="plugin-manager")
    assert (reply["error"], "cannot find out who uid 61200 is: " in reply["message"]) == ("unavailable", True), reply
    assert "denied" not in [row["phase"] for row in host.data(REGISTRY, "history")]
    path = host.runtime / "auth-service.sock"
    path.unlink()
    reply = ask(host, 61200, REGISTRY, "stop", name="plugin-manager")
    says = f"cannot find out who uid 61200 is: auth-service is not listening at {path}; see: circlectl system status"
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
