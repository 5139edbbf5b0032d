"""Why a job failed, in a sentence: from the states of the unit before and after, and what was logged."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Any

import pytest

from circleosd.errors import Unavailable
from circleosd.registry.explaining import explain, skipped
from circleosd.registry.units import LogLine, UnitState, Verb
from tests.unit.fakes import Units

UNIT = "web.service"
SAID = "; it said: cannot bind port 80"
LOGGED = "; the log says: one | two"
TOO_OFTEN = (
    "it was started too often in a short time, and systemd did not start it again (start-limit-hit); "
    "try again later, or have an administrator run: systemctl reset-failed web.service"
)


def unit(active: str = "failed", since: float = 2.0, result: str | None = "exit-code", **more: Any) -> UnitState:
    return UnitState(UNIT, "", "loaded", active, "dead", since=since, result=result, **more)


class Silent(Units):
    """Nothing was logged."""

    async def logs(self, unit: str, lines: int, since: float | None = None) -> list[LogLine]:
        return []

    async def log_tail(self, unit: str, lines: int) -> list[str]:
        return []


class Unreadable(Units):
    """The journal cannot be read."""

    async def logs(self, unit: str, lines: int, since: float | None = None) -> list[LogLine]:
        raise Unavailable("cannot read the journal")


class Late(Units):
    """What was logged is in the journal some time later."""

    looks = 0

    async def logs(self, unit: str, lines: int, since: float | None = None) -> list[LogLine]:
        self.looks += 1
        return [LogLine(2.0, "late words")] if (self.looks, unit, since) == (4, UNIT, 1.5) else []


class Requiring(Units):
    """Of three units one is active, one failed and one is not there."""

    async def states(self, units: Sequence[str]) -> list[UnitState]:
        known = {"up.service": ("loaded", "active"), "down.service": ("loaded", "failed")}
        return [UnitState(name, "", *known.get(name, ("not-found", "inactive")), "dead") for name in units]


def told(verb: Verb, result: str, state: UnitState, before: UnitState | None = None, units: Units | None = None) -> str:
    before = before or unit("inactive", 1.0, "success")
    return asyncio.run(explain(units or Units(), verb, result, before, state, 1.5))


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (unit(exit_status=3), "the job's result is failed, the unit's result is exit-code, exit status 3"),
        (unit(exit_status=0), "the job's result is failed, the unit's result is exit-code"),
        (unit(result="signal", signal="SIGSEGV"), "the job's result is failed, the unit's result is signal, SIGSEGV"),
        (unit("inactive", result="success"), "the job's result is failed"),
        (unit(result=None), "the job's result is failed"),
    ],
)
def test_a_run_that_failed_is_told_with_its_end_and_its_last_words(state: UnitState, says: str) -> None:
    assert told("start", "failed", state) == says + SAID
    assert told("restart", "failed", state, units=Silent()) == says


def test_a_unit_that_was_not_even_tried_is_held_back_and_its_last_run_told_as_that() -> None:
    failed = unit(exit_status=3)
    last = "; as for its last run, the unit's result is exit-code, exit status 3"
    assert told("start", "failed", failed, failed) == TOO_OFTEN + last + SAID
    assert told("start", "failed", unit(result="start-limit-hit"), units=Silent()) == TOO_OFTEN
    assert told("start", "failed", unit(result="start-limit-hit")) == TOO_OFTEN


@pytest.mark.parametrize(
    "before",
    [unit(since=1.0), unit("active"), unit(result="signal"), unit("inactive", 2.0, "exit-code")],
)
def test_a_unit_that_was_otherwise_before_did_run(before: UnitState) -> None:
    assert told("start", "failed", unit(), before).startswith(
        "the job's result is failed, the unit's result is exit-code"
    )


def test_a_unit_that_lacked_resources_was_tried() -> None:
    failed = unit(result="resources")
    assert (
        told("start", "failed", failed, failed) == "the job's result is failed, the unit's result is resources" + SAID
    )


@pytest.mark.parametrize(("verb", "result"), [("reload", "failed"), ("start", "canceled"), ("start", "dependency")])
def test_of_a_job_that_did_not_run_the_unit_only_what_was_logged_since_is_told(verb: Verb, result: str) -> None:
    assert told(verb, result, unit(exit_status=3)) == f"the job's result is {result}{LOGGED}"
    assert told(verb, result, unit(), units=Silent()) == f"the job's result is {result}"
    assert told(verb, result, unit(), units=Unreadable()) == f"the job's result is {result}"


def test_of_a_run_that_said_nothing_it_is_told_what_was_logged_of_it() -> None:
    class Speechless(Units):
        async def log_tail(self, unit: str, lines: int) -> list[str]:
            return []

    says = "the unit's result is exit-code"
    assert told("start", "failed", unit(), units=Speechless()) == f"the job's result is failed, {says}{LOGGED}"
    assert told("start", "failed", unit(), unit(), Speechless()).endswith(f"; as for its last run, {says}")


@pytest.mark.parametrize("result", ["done", "failed", "timeout"])
def test_a_job_that_may_have_run_the_unit_is_told_by_that_run(result: str) -> None:
    assert told("start", result, unit(exit_status=3)).endswith("the unit's result is exit-code, exit status 3" + SAID)


def test_what_is_in_the_journal_only_later_is_waited_for() -> None:
    assert told("reload", "failed", unit(), units=Late()) == "the job's result is failed; the log says: late words"


def test_of_a_reload_that_a_unit_did_not_outlive_its_state_is_told() -> None:
    ended = unit("inactive", result="success")
    assert told("reload", "done", ended) == f"the job's result is done, and the unit is inactive{LOGGED}"


def test_the_units_that_are_missing_are_named() -> None:
    state = unit(requires=("up.service", "down.service", "gone.service"))
    named = "; it requires down.service, which is failed and gone.service, which is not-found"
    assert told("start", "dependency", state, units=Requiring()) == f"the job's result is dependency{named}{LOGGED}"
    assert told("start", "canceled", state, units=Requiring()) == f"the job's result is canceled{LOGGED}"
    assert told("start", "dependency", unit(), units=Requiring()) == f"the job's result is dependency{LOGGED}"


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["web.service was skipped because of an unmet condition check (ConditionPathExists=/x)."], r"=/x\)"),
        (["web.service - Web was skipped because no trigger condition checks were met."], "were met"),
        (["web.service skipped, unmet condition check ConditionPathExists=/x"], "=/x"),
        (["web.service skipped, no trigger condition checks were met."], "were met"),
        (["Starting web.service...", "Condition check resulted in web.service being skipped."], "being skipped"),
        (["Starting web.service...", "3 files were skipped", "Finished web.service."], None),
        ([], None),
    ],
)
def test_a_start_that_a_condition_kept_systemd_from_is_told_from_one_that_is_over(
    lines: list[str], says: str | None
) -> None:
    class Logged(Silent):
        async def logs(self, unit: str, lines_: int, since: float | None = None) -> list[LogLine]:
            return [LogLine(2.0, line) for line in lines]

    found = asyncio.run(skipped(Logged(), UNIT, 1.5))
    assert re.search(f"{says}$", found) if found and says else found == says
