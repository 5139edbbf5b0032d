"""Rules over real sockets: what they allow, and who may hand it on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.integration.embedded_host import EmbeddedHost
from tests.integration.people import ALICE, AUTH, BOB, PASSWORD, REGISTRY, ask, create, login, ok


@pytest.mark.usefixtures("other_users")
def test_alice_may_restart_only_nginx(host: EmbeddedHost) -> None:
    for name in ("nginx", "apache"):
        host.add_service(name)
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
    assert can("user:passwd", "carl")["why"] == "carl may do user:passwd for their own user"
    assert host.ok("user", "can", "carl", "service:stop", "db-1").startswith("no: service:stop db-1 is denied to carl")
    unknown = host.ctl("user", "can", "carl", "service:stopp", "x")
    assert unknown.returncode == 2
    assert "no action service:stopp" in unknown.stderr
    assert host.ok("user", "ungrant", "carl", "service:*", "db-?", "--deny") == "allow plugin:unload json-*\n"
    assert can("service:stop", "db-1")["allowed"]
    assert host.ctl("user", "ungrant", "carl", "service:*", "db-?", "--deny").returncode == 5
    assert host.ctl("user", "grant", "carl", "plugin:unload", "json-*").returncode == 6
    host.ok("user", "disable", "carl")
    assert can("service:stop", "web") == {"allowed": False, "why": "the user carl is disabled", "rule": None}


@pytest.mark.parametrize(
    ("verb", "object_", "says"),
    [
        ("service:restrat", "nginx", "no action service:restrat; available: service:list, "),
        ("plugin:exec*", "x", "no action plugin:exec*; available: plugin:load, "),
        ("restart", "nginx", "is not an action such as service:restart"),
        ("service:restart", "a b", "is not the name of a service"),
        ("service:restart", "[ab]", "is not the name of a service"),
        ("user:whoami", "x", "a rule about an object cannot allow user:whoami: anyone may do it"),
        ("plugin:load", "x", "a rule about an object cannot allow plugin:load: it needs the role admin"),
        ("system:history", "x", "no action system:history; available: user:create, "),
    ],
)
def test_a_rule_that_could_never_apply_is_refused(host: EmbeddedHost, verb: str, object_: str, says: str) -> None:
    reply = host.call(AUTH, {"action": "grant", "name": "taken", "verb": verb, "object": object_})
    assert reply["error"] == "bad-request"
    assert says in reply["message"]


def test_a_denial_that_could_never_apply_is_refused(host: EmbeddedHost) -> None:
    create(host, "unruly", role="admin")
    for verb, object_, says in (
        ("plugin:load", "x", "plugin:load can be denied only for all objects"),
        ("user:logout", "*", "no rule can deny user:logout: anyone may do it"),
        ("user:login", "unruly", "no rule can deny user:login: anyone may do it"),
    ):
        reply = host.call(AUTH, {"action": "grant", "name": "unruly", "verb": verb, "object": object_, "deny": True})
        assert (reply["error"], reply["message"].startswith(says)) == ("bad-request", True)
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
        ("uid", {"name": "boss", "uid": BOB}),
    ]
    for action, parameters in attempts:
        said = code(action, **parameters)
        assert said.startswith("denied: this needs a right that you do not have yourself"), (action, parameters, said)
    assert code("create", name="puppet", password=PASSWORD, role="none") == "ok"
    assert code("delete", name="puppet") == "ok"
