"""Who may do what, as a function of values."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import get_args

import pytest

from circleosd import policy
from circleosd.api.auth import RoleName
from circleosd.auth import rules
from circleosd.auth.store import Account
from circleosd.errors import Denied
from circleosd.policy import Access, Caller, Grant, Peer, Role, authorize, decide, higher, role_of_uid, sees
from tests.measuring import lines_run

PEER = Peer(uid=1000, gid=1000, pid=1)


def test_every_role_can_be_given_and_required() -> None:
    assert ["none", *Role] == [*get_args(RoleName)]
    assert ["anyone", *Role] == [*Access]


@pytest.mark.parametrize("access", Access)
@pytest.mark.parametrize("role", [None, *Role])
def test_a_role_includes_the_ones_before_it(role: Role | None, access: Access) -> None:
    order = [None, "viewer", "operator", "admin"]
    needed = {"anyone": 0, "viewer": 1, "operator": 2, "admin": 3}[access]
    caller = Caller(PEER, role)
    if order.index(role) >= needed:
        authorize(caller, access, "service:stop", "nginx")
    else:
        with pytest.raises(Denied, match=f"needs the role {access}"):
            authorize(caller, access, "service:stop", "nginx")


def test_a_grant_allows_its_verb_on_its_objects_and_nothing_else() -> None:
    caller = Caller(PEER, grants=(Grant("service:restart", "web-*"),))
    authorize(caller, Access.OPERATOR, "service:restart", "web-1")
    for verb, name in [("service:stop", "web-1"), ("service:restart", "db"), ("service:restart", "xweb-1")]:
        with pytest.raises(Denied):
            authorize(caller, Access.OPERATOR, verb, name)


def test_a_rule_takes_as_long_among_many_as_among_few() -> None:
    def lines(rules: int) -> float:
        grants = tuple(Grant("service:restart", f"web-{number}-*") for number in range(rules))
        caller = Caller(PEER, grants=grants)

        def look() -> None:
            for number in range(20):
                sees(caller, Access.OPERATOR, "service:list", f"db-{number}", among=["service:restart"])

        look()
        return lines_run(look) / rules

    assert lines(400) < 2 * lines(40)


def test_rules_are_held_against_verbs_once_for_all_rows_of_a_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    read, globs = policy._matches, list[str]()

    def noted(glob: str) -> Callable[[str], re.Match[str] | None]:
        globs.append(glob)
        return read(glob)

    monkeypatch.setattr(policy, "_matches", noted)
    caller = Caller(PEER, grants=(Grant("service:restart", "web-*"), Grant("service:*", "web-0", deny=True)))
    among = frozenset({"service:start", "service:restart"})
    seen = [sees(caller, Access.VIEWER, "service:list", f"web-{number}", among=among) for number in range(100)]
    assert seen == [False] + [True] * 99
    assert len(globs) < 10


def test_a_grant_on_every_object_is_no_right_to_an_action_without_one() -> None:
    with pytest.raises(Denied):
        authorize(Caller(PEER, grants=(Grant("*", "*"),)), Access.ADMIN, "user:list", None)


def test_no_rule_keeps_a_user_from_what_a_stranger_may_do() -> None:
    caller = Caller(PEER, Role.VIEWER, user="vera", grants=(Grant("*", "*", deny=True),))
    authorize(caller, Access.ANYONE, "user:logout", None)
    with pytest.raises(Denied):
        authorize(caller, Access.VIEWER, "user:list", None)


def test_only_root_and_the_own_uid_are_admin_by_uid() -> None:
    assert role_of_uid(0, 500) is Role.ADMIN
    assert role_of_uid(500, 500) is Role.ADMIN
    assert role_of_uid(501, 500) is None


def test_the_higher_role_counts() -> None:
    assert higher(None, Role.VIEWER) is Role.VIEWER
    assert higher(Role.ADMIN, Role.VIEWER) is Role.ADMIN
    assert higher(None, None) is None


OPERATOR_BUT_NGINX = Caller(PEER, Role.OPERATOR, "olga", grants=(Grant("service:stop", "nginx", deny=True),))


def test_a_rule_that_denies_wins_over_the_role_and_over_rules_that_allow() -> None:
    caller = OPERATOR_BUT_NGINX._replace(grants=(Grant("service:*", "*"), *OPERATOR_BUT_NGINX.grants))
    for each in (OPERATOR_BUT_NGINX, caller):
        decision = decide(each, Access.OPERATOR, "service:stop", "nginx")
        assert not decision.allowed
        assert decision.rule == Grant("service:stop", "nginx", deny=True)
        assert "deny service:stop nginx" in decision.why
        assert decide(each, Access.OPERATOR, "service:stop", "apache").allowed


def test_no_rule_binds_who_is_admin_by_the_uid() -> None:
    root = OPERATOR_BUT_NGINX._replace(peer=Peer(0, 0, 1), role=Role.ADMIN, privileged=True)
    assert decide(root, Access.OPERATOR, "service:stop", "nginx").allowed


def test_only_a_denial_of_every_object_is_about_an_action_without_one() -> None:
    for glob, denied in [("nginx", False), ("n*", False), ("*", True)]:
        caller = Caller(PEER, Role.ADMIN, "ada", grants=(Grant("user:*", glob, deny=True),))
        assert decide(caller, Access.VIEWER, "user:whoami", None).allowed is not denied


def test_ones_own_is_allowed_only_where_the_action_says_so_and_no_rule_denies() -> None:
    vera = Caller(PEER, Role.VIEWER, "vera")
    assert decide(vera, Access.ADMIN, "user:passwd", "vera", own=True).allowed
    assert not decide(vera, Access.ADMIN, "user:passwd", "otto", own=True).allowed
    assert not decide(vera, Access.ADMIN, "user:role", "vera").allowed
    denied = vera._replace(grants=(Grant("user:passwd", "vera", deny=True),))
    assert not decide(denied, Access.ADMIN, "user:passwd", "vera", own=True).allowed
    assert not decide(Caller(PEER), Access.ADMIN, "user:passwd", None, own=True).allowed


def test_a_listing_shows_what_a_rule_allows_something_on() -> None:
    among = {"service:list", "service:restart", "service:stop"}
    alice = Caller(PEER, user="alice", grants=(Grant("service:restart", "web-*"), Grant("*", "web-9", deny=True)))

    def seen(caller: Caller) -> list[str]:
        names = ("web-1", "web-9", "db")
        return [name for name in names if sees(caller, Access.VIEWER, "service:list", name, among=among)]

    assert decide(alice, Access.VIEWER, "service:list", None, among=among).allowed
    assert not decide(alice, Access.VIEWER, "service:list", None).allowed
    assert seen(alice) == ["web-1"]
    assert seen(alice._replace(role=Role.VIEWER)) == ["web-1", "db"]
    assert seen(Caller(PEER, grants=(Grant("plugin:invoke", "*"),))) == []
    assert not decide(Caller(PEER, grants=(Grant("plugin:*", "*"),)), Access.VIEWER, "service:list", None, among=among)[
        0
    ]


def test_a_rule_shows_by_allowing_and_hides_by_denying_the_listing_itself() -> None:
    among = {"service:list", "service:status", "service:restart"}
    denied = Caller(PEER, user="dora", grants=(Grant("service:restart", "*", deny=True),))
    for name in (None, "db"):
        assert not decide(denied, Access.VIEWER, "service:status", name, among=among).allowed
    assert not sees(denied, Access.VIEWER, "service:list", "db", among=among)
    assert sees(denied._replace(role=Role.VIEWER), Access.VIEWER, "service:list", "db", among=among)
    allowed = denied._replace(grants=(Grant("service:list", "db"),))
    assert sees(allowed, Access.VIEWER, "service:list", "db", among=among)
    restarts = denied._replace(grants=(Grant("service:restart", "db"),))
    assert decide(restarts, Access.VIEWER, "service:list", "db", among=among).allowed


def test_no_rule_hides_anything_from_who_is_admin_by_the_uid() -> None:
    root = Caller(Peer(0, 0, 1), Role.ADMIN, "olga", grants=(Grant("*", "*", deny=True),), privileged=True)
    assert sees(root, Access.VIEWER, "service:list", "db", among=["service:list"])


def test_only_who_is_admin_by_the_uid_has_no_bounds() -> None:
    admin = Caller(PEER, Role.ADMIN, "ada")
    assert admin.bounded == PEER.uid
    assert admin._replace(privileged=True).bounded is None


@pytest.mark.parametrize(
    ("caller", "why"),
    [
        (Caller(PEER), "user:list needs the role admin, but uid 1000 has no role here"),
        (Caller(PEER, Role.VIEWER), "user:list needs the role admin, but uid 1000 has the role viewer"),
        (Caller(PEER, user="vera"), "user:list needs the role admin, but vera (uid 1000) has no role here"),
        (Caller(Peer(0, 0, 1), user="vera"), "user:list needs the role admin, but vera (uid 0) has no role here"),
        (Caller(Peer(-1, -1, 0), user="vera"), "user:list needs the role admin, but vera has no role here"),
        (Caller(PEER, plugin="echo"), "user:list needs the role admin, but the plugin echo has no role here"),
        (
            Caller(PEER, user="vera", grants=(Grant("user:*", "*", deny=True),)),
            "user:list is denied to vera (uid 1000) by the rule: deny user:* *",
        ),
    ],
)
def test_a_denial_says_to_whom_and_what_is_lacking(caller: Caller, why: str) -> None:
    assert decide(caller, Access.ADMIN, "user:list", None).why == why


@pytest.mark.parametrize("name", ["db is allowed to vera;", ""])
def test_no_name_in_a_denial_passes_for_its_words(name: str) -> None:
    why = f"service:stop '{name}' needs the role operator, but uid 1000 has no role here"
    assert decide(Caller(PEER), Access.OPERATOR, "service:stop", name).why == why


def test_an_answer_names_the_rule_that_allows() -> None:
    decision = decide(Caller(PEER, grants=(Grant("service:*", "db"),)), Access.OPERATOR, "service:stop", "db")
    assert decision.why == "service:stop db is allowed to uid 1000 by the rule: allow service:* db"
    assert decide(Caller(PEER), Access.ANYONE, "user:whoami", None).why == "anyone may do user:whoami"


@pytest.mark.parametrize(
    ("role", "verb", "name", "allowed", "why"),
    [
        (
            None,
            "service:restart",
            "db",
            True,
            "service:restart db is allowed to olga by the rule: allow service:restart db",
        ),
        (None, "service:stop", "db", False, "service:stop db needs the role operator, but olga has no role here"),
        (None, "service:status", "db", False, "service:status db needs the role viewer, but olga has no role here"),
        (
            None,
            "service:list",
            None,
            True,
            "service:list is allowed to olga by the rule: allow service:restart db"
            "; lists only objects on which rules allow something",
        ),
        (Role.VIEWER, "service:list", None, True, "service:list needs the role viewer, and olga has the role viewer"),
        (None, "plugin:list", None, False, "plugin:list needs the role viewer, but olga has no role here"),
        (None, "user:passwd", None, True, "olga may do user:passwd for their own user"),
        (None, "service:health", "db", False, "service:health needs the role viewer, but olga has no role here"),
    ],
)
def test_a_question_about_a_user_is_answered_as_the_service_decides(
    role: Role | None, verb: str, name: str | None, allowed: bool, why: str
) -> None:
    olga = Account("olga", None, role, None, False, 0.0, None, None)
    answer = rules.answer(olga, (Grant("service:restart", "db"),), rules.action(verb), verb, name)
    assert (answer["allowed"], answer["why"]) == (allowed, why)


@pytest.mark.parametrize("verb", ["plugin:events", "plugin:verify", "plugin:health", "plugin:load"])
def test_no_rule_about_an_object_answers_for_an_action_that_has_none(verb: str) -> None:
    for role, deny in ((None, False), (Role.ADMIN, True)):
        olga = Account("olga", None, role, None, False, 0.0, None, None)
        answer = rules.answer(olga, (Grant("plugin:*", "json", deny),), rules.action(verb), verb, "json")
        assert (answer["allowed"], answer["rule"]) == (role is not None, None)
