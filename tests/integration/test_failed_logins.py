"""Failed logins over real sockets: whom they keep waiting."""

from __future__ import annotations

import contextlib
import json
import math
import time
from typing import Any

import pytest

from tests.door import acting_as
from tests.integration.conftest import NewHost
from tests.integration.embedded_host import EmbeddedHost, read_reply
from tests.integration.people import (
    ALICE,
    AUTH,
    BOB,
    PASSWORD,
    STRANGER,
    ask,
    create,
    let_pass,
    login,
    ok,
)


def wrong(host: EmbeddedHost, uid: int, name: str) -> dict[str, Any]:
    return ask(host, uid, AUTH, "login", name=name, password="certainly wrong")


@pytest.mark.usefixtures("other_users")
def test_failed_logins_make_a_peer_wait_and_the_wait_ends(new_host: NewHost) -> None:
    host = new_host({"CIRCLEOSD_AUTH_LOGIN_TRIES": "3"})
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
    host = new_host({"CIRCLEOSD_AUTH_LOGIN_TRIES": "3"})
    host.open_to_everybody()
    create(host, "target")
    for _ in range(3):
        errors = [wrong(host, STRANGER, "target")["error"] for _ in range(2)]
        assert errors == ["denied", "denied"]
        login(host, "target", STRANGER)


@pytest.mark.usefixtures("other_users")
@pytest.mark.parametrize("success", ["login", "passwd"])
def test_a_success_of_ones_own_forgives_no_guess_at_others(new_host: NewHost, success: str) -> None:
    host = new_host({"CIRCLEOSD_AUTH_LOGIN_TRIES": "3"})
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
    host = new_host({"CIRCLEOSD_AUTH_LOGIN_TRIES": "5"})
    host.open_to_everybody()
    create(host, "guessed")
    with contextlib.ExitStack() as stack:
        with acting_as(STRANGER):
            socks = [stack.enter_context(host.connect(AUTH)) for _ in range(40)]
        begun = time.monotonic()
        for number, sock in enumerate(socks):
            password = PASSWORD if number == 30 else f"certainly wrong {number}"
            request = {"action": "login", "name": "guessed", "password": password}
            sock.sendall(json.dumps(request).encode() + b"\n")
        errors = [read_reply(sock).get("error") for sock in socks]
    # Another one after a second, after two more, after four more …
    waits = int(math.log2(1 + time.monotonic() - begun))
    assert 5 <= errors.count("denied") <= 5 + waits
    assert errors.count("limit") >= 35 - waits


@pytest.mark.usefixtures("other_users")
def test_a_stranger_locks_a_user_out_only_where_the_user_has_not_been(new_host: NewHost) -> None:
    host = new_host({"CIRCLEOSD_AUTH_LOGIN_TRIES": "2", "CIRCLEOSD_AUTH_LOGIN_LOCKOUT": "600"})
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
    host = new_host({"CIRCLEOSD_AUTH_LOGIN_TRIES": "2"})
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
