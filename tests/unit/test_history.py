"""The rows of all services in one order."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, cast

import pytest

from circlectl import system
from circlectl.asking import Asking
from circleosd.errors import Denied
from circleosd.paths import SERVICES
from circleosd.plugins.host import PRIVILEGED


class Services:
    """What stands in for services: each wrote a row every ten seconds, by a clock that was `off` at some of them.

    The rows after the first `known` are only in the stream, which ends.
    """

    def __init__(self, off: dict[str, list[float]], known: int | None = None) -> None:
        self._known = known
        self.followed: list[dict[str, Any]] = []
        began = time.time() - 1000
        self._rows = {
            service: [
                {"service": service, "seq": seq, "time": began + 10 * seq + number + by, "intent": None}
                for seq, by in enumerate(wrong, 1)
            ]
            for number, (service, wrong) in enumerate(off.items())
        }

    def once(self, service: str, request: dict[str, Any]) -> list[dict[str, Any]]:
        return self._rows.get(service, [])[: self._known]

    def stream(self, service: str, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        self.followed.append(request)
        yield from self._rows[service][request["after"] :]
        raise Denied("revoked")


@pytest.mark.parametrize("by", [-5e8, 5e8])
def test_rows_of_a_clock_that_was_wrong_stay_in_their_services_order(by: float) -> None:
    ask = cast(Asking, Services({"auth-service": [0, 0, by, by, 0], "service-registry": [0, 0, 0, 0, 0]}))
    rows = [(row["service"], row["seq"]) for row in system.history(ask, {})[0]]
    assert [seq for service, seq in rows if service == "auth-service"] == [1, 2, 3, 4, 5]
    assert rows[:2] == [("auth-service", 1), ("service-registry", 1)]
    assert rows[-2:] == [("auth-service", 5), ("service-registry", 5)], "and the newest of all services are the last"
    newest = system.history(ask, {"lines": 2})[0]
    assert [(row["service"], row["seq"]) for row in newest] == rows[-2:]


def test_a_clock_that_is_behind_mixes_up_no_rows() -> None:
    ask = cast(Asking, Services({"auth-service": [5e8] * 5, "service-registry": [5e8] * 5, "plugin-manager": [0]}))
    rows = [(row["service"], row["seq"]) for row in system.history(ask, {})[0]]
    together = [(service, seq) for seq in range(1, 6) for service in ("auth-service", "service-registry")]
    assert rows == [("plugin-manager", 1), *together]


@pytest.mark.parametrize("known", [0, 1])
def test_rows_that_follow_are_shown_in_order_although_the_clock_is_set_back(known: int) -> None:
    services = Services({"auth-service": [0, 0, -7200, -7200, 0]}, known)
    request = {"follow": True, "action_name": "user:create", "since": 0.0}
    rows = system.history(cast(Asking, services), request)[0]
    assert [next(rows)["seq"] for _ in range(5)] == [1, 2, 3, 4, 5]
    with pytest.raises(Denied, match="revoked"):
        next(rows)
    (asked,) = services.followed
    assert ("since" in asked) == (known == 0)


def test_an_action_as_rules_name_it_is_looked_for_where_it_is_carried_out() -> None:
    assert system._action("service:enable") == (["service-registry"], "enable")
    assert system._action("enable") == ([*SERVICES], "enable")


def test_each_call_of_a_plugin_that_has_rows_can_be_searched_for() -> None:
    assert {*system.OF_NO_REQUEST} >= PRIVILEGED
