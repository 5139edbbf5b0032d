"""Nobody hands on more than one's own rights."""

from __future__ import annotations

import itertools
from fnmatch import fnmatchcase

import pytest

from circleosd.api import actions
from circleosd.delegation import excess, includes, overlaps
from circleosd.policy import Caller, Grant, Peer, Role
from tests.measuring import lines_run

NEEDS = {verb: contract.access for verb, contract in actions.BY_VERB.items()}
PEER = Peer(uid=1000, gid=1000, pid=1)
ADMIN = Caller(PEER, Role.ADMIN, "ada")
OPERATOR = Caller(PEER, Role.OPERATOR, "otto")
LEADER = Caller(PEER, Role.VIEWER, "lena", grants=(Grant("service:restart", "web-*"), Grant("plugin:*", "j?")))


def test_globs_are_compared_as_the_sets_of_what_they_match() -> None:
    texts = ["".join(text) for size in range(4) for text in itertools.product("ab", repeat=size)]
    globs = ["".join(glob) for size in range(4) for glob in itertools.product("ab*?", repeat=size)]
    matched = {glob: {text for text in texts if fnmatchcase(text, glob)} for glob in globs}
    for one, other in itertools.product(globs, repeat=2):
        if includes(one, other):
            assert matched[other] <= matched[one], (one, other)
        if len(one) + len(other) <= 3:  # then a text that both match, if there is one, is among `texts`
            assert overlaps(one, other) == bool(matched[one] & matched[other]), (one, other)
        elif matched[one] & matched[other]:
            assert overlaps(one, other), (one, other)
    assert includes("web-*", "web-?*")
    assert not includes("web-*", "w*")
    assert includes("*", "*")


def test_the_time_to_compare_globs_grows_with_their_length_and_not_with_its_square() -> None:
    def lines(length: int) -> int:
        globs = ["?" + "a" * (length - 2) + "?", "*" + "a?" * (length // 2 - 1) + "b", "a*" * (length // 2 - 1) + "bc"]

        def compare() -> None:
            for one, other in itertools.product(globs, repeat=2):
                includes(one, other)
                overlaps(one, other)

        return lines_run(compare)

    assert lines(256) < 12 * lines(32)  # eight times as long; the square of that would be 64


@pytest.mark.parametrize(
    ("caller", "role", "rules", "lacks"),
    [
        (ADMIN, Role.ADMIN, (Grant("*", "*"),), None),
        (OPERATOR, Role.OPERATOR, (Grant("service:stop", "*"), Grant("user:list", "x")), None),
        (OPERATOR, Role.ADMIN, (), "the role admin"),
        (OPERATOR, None, (Grant("plugin:unload", "x"),), "plugin:unload on x"),
        (OPERATOR, None, (Grant("service:*", "x"),), "service:* on x"),
        (LEADER, None, (Grant("service:restart", "web-1"), Grant("service:restart", "web-*")), None),
        (LEADER, None, (Grant("plugin:invoke", "j1"), Grant("plugin:*", "j?")), None),
        (LEADER, None, (Grant("service:restart", "w*"),), "service:restart on w*"),
        (LEADER, None, (Grant("service:stop", "web-1"),), "service:stop on web-1"),
        (LEADER, None, (Grant("*", "web-1"),), "* on web-1"),
        (LEADER, Role.VIEWER, (), None),
        (LEADER, Role.OPERATOR, (), "the role operator"),
        (LEADER, None, (Grant("service:stop", "db", deny=True),), None),
        (Caller(PEER), Role.VIEWER, (), "the role viewer"),
    ],
)
def test_what_a_caller_may_hand_on(
    caller: Caller, role: Role | None, rules: tuple[Grant, ...], lacks: str | None
) -> None:
    assert excess(caller, role, rules, NEEDS) == lacks


def test_who_is_bound_by_a_denial_cannot_hand_on_what_it_is_about() -> None:
    bound = ADMIN._replace(grants=(Grant("service:stop", "db*", deny=True),))
    for rule in (Grant("service:stop", "*"), Grant("*", "db1"), Grant("service:*", "d?")):
        assert "because this rule binds you: deny service:stop db*" in str(excess(bound, None, (rule,), NEEDS))
    assert excess(bound, None, (Grant("service:stop", "web"), Grant("service:start", "*")), NEEDS) is None
    assert "because this rule binds you" in str(excess(bound, Role.OPERATOR, (), NEEDS))
    assert excess(bound, Role.VIEWER, (), NEEDS) is None


def test_who_is_admin_by_the_uid_hands_on_anything() -> None:
    root = Caller(PEER, Role.ADMIN, grants=(Grant("*", "*", deny=True),), privileged=True)
    assert excess(root, Role.ADMIN, (Grant("*", "*"),), NEEDS) is None
