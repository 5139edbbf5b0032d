"""Which capabilities there are and who has them."""

from __future__ import annotations

import pytest

from circleosd.errors import BadRequest
from circleosd.plugins import capabilities
from circleosd.policy import Grant


@pytest.mark.parametrize("name", ["kv", "config", "log", "services:read", "services:restart:nginx",
                                  "services:restart:*", "services:restart:getty@tty1", "events:deploy",
                                  "events:*"])  # fmt: skip
def test_a_capability_of_this_host_is_known(name: str) -> None:
    capabilities.check(name)


@pytest.mark.parametrize("name", ["", "kv:x", "net", "services", "services:", "services:stop:nginx", "KV"])
def test_an_unknown_capability_is_refused_with_the_ones_there_are(name: str) -> None:
    with pytest.raises(BadRequest, match="services:restart:NAME"):
        capabilities.check(name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("services:restart:", r"after services:restart: comes \*, or the name of a service"),
        ("services:restart:a b", "the name of a service"),
        ("events:", r"after events: comes \*, or a topic: at most 128 ASCII letters"),
        ("events:a:b", "digits, _ . @ or -, "),
        ("events:.a", "beginning with a letter or digit"),
    ],
)
def test_a_capability_with_a_name_that_cannot_be_is_refused_with_what_can(name: str, reason: str) -> None:
    with pytest.raises(BadRequest, match=reason):
        capabilities.check(name)


def test_a_star_covers_every_name_of_its_kind_and_no_other_kind() -> None:
    assert capabilities.holds(["services:restart:*"], "services:restart:nginx")
    assert capabilities.holds(["services:restart:*"], "services:restart:web@one:two")
    assert not capabilities.holds(["services:restart:a:*"], "services:restart:a:b")
    assert not capabilities.holds(["services:restart:*"], "services:read")
    assert not capabilities.holds(["events:*"], "services:restart:nginx")
    assert not capabilities.holds(["services:restart:nginx"], "services:restart:*")
    assert not capabilities.holds(["kv"], "config")


def test_who_grants_what_plugins_do_to_services_needs_the_right_to_it_on_what_is_named() -> None:
    held = ["services:read", "services:restart:db", "services:restart:*", "kv", "clock", "config", "events:*", "log"]
    assert capabilities.rights(held) == (
        Grant("service:list", "*"),
        Grant("service:status", "*"),
        Grant("service:restart", "db"),
        Grant("service:restart", "*"),
    )


def test_of_each_capability_it_is_known_which_names_it_takes_and_which_rights_to_grant_it() -> None:
    assert capabilities._RIGHTS.keys() == {*capabilities.KINDS}
    assert capabilities._NAMED.keys() == {kind for kind in capabilities.KINDS if kind.endswith(":")}


@pytest.mark.parametrize("topic", ["*", "", "a:b", "a b", "x" * 129, "deploy\n"])
def test_what_is_no_topic_is_refused(topic: str) -> None:
    capabilities.check_topic("deploy.web-1@eu")
    with pytest.raises(BadRequest, match="is not a topic"):
        capabilities.check_topic(topic)


def test_only_what_is_asked_for_is_granted() -> None:
    assert capabilities.effective(["kv"], {"clock": True, "kv": True}, ["config"]) == ("kv",)
    assert capabilities.effective(["kv", "clock"], {}, ["clock"]) == ("clock",)


def test_a_decision_comes_before_the_configuration() -> None:
    assert capabilities.effective(["kv"], {"kv": False}, ["kv"]) == ()
    assert capabilities.effective(["events:a", "events:b"], {"events:a": False}, ["events:*"]) == ("events:b",)


def test_of_every_name_a_single_one_can_be_granted() -> None:
    assert capabilities.effective(["services:restart:*"], {"services:restart:nginx": True}, []) == (
        "services:restart:nginx",
    )
    assert capabilities.effective(["services:restart:*"], {"services:restart:a:b": True}, []) == (
        "services:restart:a:b",
    )
    assert capabilities.effective(["events:*"], {}, ["events:deploy"]) == ("events:deploy",)


def test_an_upgrade_that_asks_for_less_keeps_what_was_decided_of_more() -> None:
    for yes in (True, False):
        decided = {"events:*": yes, "services:restart:*": not yes, "kv": yes}
        narrower = {"events:a": yes, "events:b": yes, "kv": yes}
        inherited = capabilities.inherited(("events:a", "kv", "events:b"), decided)
        assert inherited == narrower | {name: False for name, given in decided.items() if not given}
    decided = {"events:a": True, "events:*": False, "events:b": True}
    inherited = capabilities.inherited(("events:a", "events:c"), decided)
    assert inherited == {"events:a": True, "events:c": False, "events:*": False}
    assert capabilities.inherited(("events:*",), decided) == decided
    assert capabilities.inherited(("kv",), decided) == {"events:*": False}


@pytest.mark.parametrize(("revoked", "asked"), [("events:a", "events:a"), ("events:*", "events:a"), ("kv", "kv")])
def test_what_was_revoked_does_not_come_back_by_way_of_a_version_that_does_not_ask_for_it(
    revoked: str, asked: str
) -> None:
    between = capabilities.inherited(("clock",), {revoked: False})
    decided = capabilities.inherited((asked,), between)
    assert capabilities.effective((asked,), decided, (revoked, "clock")) == ()


def test_an_upgrade_that_asks_for_every_name_does_not_bring_back_a_revoked_one() -> None:
    decided = capabilities.inherited(("events:*", "kv"), {"events:a": False, "events:b": True})
    assert decided == {"events:*": False, "events:a": False, "events:b": True}
    assert capabilities.effective(("events:*", "kv"), decided, ("events:*", "kv")) == ("kv", "events:b")
    decided = {"events:a": False, "events:*": True}  # in that order
    assert capabilities.inherited(("events:*",), decided) == decided


def test_a_list_of_capabilities_is_split_and_checked() -> None:
    assert capabilities.split("kv, clock,kv") == ("kv", "clock")
    assert capabilities.split("all") == ("all",)
    assert capabilities.split(", kv,,") == ("kv",)
    assert capabilities.split("") == ()
    with pytest.raises(BadRequest):
        capabilities.split("kv,nonsense")
