"""The services are killed at every commit in turn: what was acknowledged is on record, what is on record was done."""

from __future__ import annotations

import itertools
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from circleosd.paths import SERVICES
from tests import PROJECT
from tests.integration.conftest import NewHost
from tests.integration.embedded_host import EmbeddedHost
from tests.integration.people import PASSWORD

OTHER = "another long one"

Step = tuple[str, dict[str, Any]]  # an action's name and its parameters


class Crashing:
    """A host one of whose services can be made to crash."""

    def __init__(self, new_host: NewHost, service: str) -> None:
        self.service = service
        self.host: EmbeddedHost = new_host({})
        self.plan = self.host.directory / "plan"
        name = f"circleosd-{SERVICES[service]}.service"
        unit = (PROJECT / "units" / name).read_text(encoding="utf-8")
        command = f"ExecStart={sys.executable} -m tests.crashing {service}\n"
        command += f"Environment=CRASH_PLAN={self.plan} PYTHONPATH={PROJECT}\n"
        assert f"ExecStart=circleosd {service}\n" in unit
        unit = unit.replace(f"ExecStart=circleosd {service}\n", command)
        assert "RestartSec=100ms\n" in unit
        unit = unit.replace("RestartSec=100ms\n", "RestartSec=10ms\n")
        (self.host.units / name).write_text(unit, encoding="utf-8")
        self.crashed = False
        self._waiting = itertools.count()

    def crash_at(self, number: int, when: str) -> None:
        """Plan a crash at the commit of that number from now on."""
        new = self.host.directory / f"plan{next(self._waiting)}"
        new.write_text(f"{number} {when}", encoding="ascii")
        new.rename(self.plan)

    def try_steps(self, steps: list[Step]) -> list[Step]:
        """Ask for each step once; return those that were acknowledged. The plan, if it was not met, is over then."""
        done = []
        for action, parameters in steps:
            try:
                reply = self.host.call(self.service, {"action": action, **parameters})
            except (AssertionError, ConnectionError):  # it died before it could answer
                assert not self.plan.exists(), "the connection broke without a crash"
                continue
            if reply["ok"]:
                done.append((action, parameters))
            else:  # what was to be there was lost in the crash, or is there although nobody heard of it
                assert reply["error"] in ("not-found", "exists", "conflict", "denied", "plugin-failed"), reply
        self.crashed = not self.plan.exists()
        self.plan.unlink(missing_ok=True)
        return done

    def rows(self, **query: Any) -> list[dict[str, Any]]:
        """The rows of the service's ledger, whose chain must be whole."""
        assert self.host.data(self.service, "audit")["problems"] == []
        rows: list[dict[str, Any]] = self.host.data(self.service, "history", lines=10_000, **query)
        return rows

    def rounds(self, play: Callable[[int], None]) -> Iterator[str]:
        """Play a round for each commit point, before and after it, until a round has no such commit any more."""
        for turn in itertools.count():
            number, when = turn // 2 + 1, ("before", "after")[turn % 2]
            self.crash_at(number, when)
            play(turn)
            if not self.crashed:
                return
            yield f"{when} commit {number}"


def test_accounts_and_their_record_are_one_at_every_commit(new_host: NewHost) -> None:
    crashing = Crashing(new_host, "auth-service")

    def play(turn: int) -> None:
        name = f"user{turn}"
        rule = {"name": name, "verb": "service:stop", "object": "web"}
        steps: list[Step] = [
            ("create", {"name": name, "password": PASSWORD, "role": "viewer"}),
            ("login", {"name": name, "password": PASSWORD}),
            ("grant", rule),
            ("grant", {**rule, "deny": True}),
            ("role", {"name": name, "role": "operator"}),
            ("passwd", {"name": name, "password": OTHER}),
            ("login", {"name": name, "password": OTHER}),
            ("ungrant", rule),
            ("revoke", {"name": name}),
            ("login", {"name": name, "password": "wrong password"}),
            ("login", {"name": name, "password": OTHER}),
            ("disable", {"name": name}),
            ("enable", {"name": name}),
            ("create", {"name": f"{name}b", "password": PASSWORD}),
            ("delete", {"name": f"{name}b"}),
        ]
        done = crashing.try_steps(steps)
        for each in (name, f"{name}b"):
            rows = [row for row in crashing.rows(object=each) if row["phase"] == "done"]
            acknowledged = [action for action, parameters in done if parameters["name"] == each]
            _assert_in_order(acknowledged, [row["action"] for row in rows])
            assert _state(crashing.host, each) == _replayed(rows), f"round {turn}, {each}"
            state = _state(crashing.host, each)
            if state and not state["disabled"]:
                password = OTHER if any(row["action"] == "passwd" for row in rows) else PASSWORD
                crashing.host.data("auth-service", "login", name=each, password=password)

    points = list(crashing.rounds(play))
    assert len(points) >= 2 * 14, f"every step commits, but only {points} were met"


def _assert_in_order(acknowledged: list[str], recorded: list[str]) -> None:
    """Every acknowledged act is on record, in order; one more may be that nobody was told of."""
    remaining = iter(recorded)
    assert all(action in remaining for action in acknowledged), (acknowledged, recorded)
    assert len(recorded) - len(acknowledged) <= 1, (acknowledged, recorded)


def _state(host: EmbeddedHost, name: str) -> dict[str, Any] | None:
    """What is so: a user's role, rules and sessions; None without the user."""
    reply = host.call("auth-service", {"action": "show", "name": name})
    if not reply["ok"]:
        return None
    shown = reply["data"]
    return {
        "role": shown["role"],
        "disabled": shown["disabled"],
        "rules": {f"{'deny' if rule['deny'] else 'allow'} {rule['verb']} {rule['object']}" for rule in shown["rules"]},
        "sessions": {item["id"] for item in host.data("auth-service", "sessions", name=name)},
    }


def _replayed(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What must be so if exactly the recorded acts were carried out."""
    state: dict[str, Any] | None = None
    for row in rows:
        before, after = row["before"] or {}, row["after"] or {}
        if row["action"] == "create":
            state = {"role": after["role"], "disabled": False, "rules": set(), "sessions": set()}
            continue
        assert state is not None
        match row["action"]:
            case "login":
                state["sessions"].add(after["session"])
            case "role":
                state["role"] = after["role"]
            case "disable" | "enable":
                state["disabled"] = after["disabled"]
            case "grant":
                state["rules"].add(after["rule"])
            case "ungrant":
                state["rules"].remove(before["rule"])
            case "revoke":
                assert state["sessions"] == set(before["sessions"])
            case "delete":
                state = None
        if state and row["action"] in ("passwd", "disable", "revoke"):
            state["sessions"] = set()
    return state


def test_units_and_their_record_agree_at_every_commit(new_host: NewHost) -> None:
    crashing = Crashing(new_host, "service-registry")
    host = crashing.host
    started = host.directory / "started"
    command = f"/bin/sh -c 'echo >>{started}; exec sleep 600'"
    host.add_service("web", f"[Service]\nType=exec\nExecStart={command}\n")

    def play(turn: int) -> None:
        known = crashing.rows()[-1:]
        last = known[0]["seq"] if known else 0
        begun = _lines(started)
        done = crashing.try_steps([(action, {"name": "web"}) for action in ("start", "restart", "stop")])
        state = host.data("service-registry", "status", name="web")["state"]
        rows = [row for row in crashing.rows(object="web") if row["seq"] > last]
        outcomes = {row["intent"]: row for row in rows if row["phase"] == "outcome"}
        intents = [row for row in rows if row["phase"] == "intent"]
        assert {row["seq"] for row in intents} == set(outcomes), f"round {turn}: every intent has its outcome"
        for intent, outcome in outcomes.items():
            wanted = "inactive" if outcome["action"] == "stop" else "active"
            assert (outcome["error"] is None) == (outcome["after"] == wanted), outcome
            assert intent < outcome["seq"]
        assert outcomes[max(outcomes)]["after"] == state, "the last word is what is so"
        _assert_in_order([action for action, _ in done], [row["action"] for row in intents])
        starts = [row for row in intents if row["action"] in ("start", "restart")]
        assert _lines(started) - begun <= len(starts), f"round {turn}: it was started behind the record's back"
        resolved = [row for row in outcomes.values() if "ended before the outcome was known" in (row["message"] or "")]
        assert len(resolved) <= 1

    points = list(crashing.rounds(play))
    assert len(points) >= 2 * 6, points


def test_an_interrupted_act_is_resolved_also_when_that_is_interrupted(new_host: NewHost) -> None:
    crashing = Crashing(new_host, "service-registry")
    crashing.host.add_service("web")
    crashing.crash_at(1, "after")
    assert crashing.try_steps([("start", {"name": "web"})]) == []
    crashing.crash_at(1, "before")  # the commit of the resolution
    assert crashing.try_steps([("status", {"name": "web"})]) in ([], [("status", {"name": "web"})])
    intent, outcome = crashing.rows(object="web")
    assert (intent["phase"], outcome["phase"], outcome["intent"]) == ("intent", "outcome", intent["seq"])
    assert outcome["error"] == "unit-failed"
    assert "at its next start the unit web.service is inactive" in outcome["message"]


def _lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def test_plugins_and_their_record_are_one_at_every_commit(new_host: NewHost) -> None:
    crashing = Crashing(new_host, "plugin-manager")
    load: Step = ("load", {"path": str(PROJECT / "plugins/example.wasm")})

    def play(turn: int) -> None:
        known = crashing.rows()[-1:]
        last = known[0]["seq"] if known else 0
        before = {item["id"] for item in crashing.host.data("plugin-manager", "list")}
        # The first load is over what the round before has loaded.
        done = crashing.try_steps([load, ("unload", {"id": "example"}), load])
        rows = [row for row in crashing.rows() if row["seq"] > last and row["phase"] == "done"]
        _assert_in_order([action for action, _ in done], [row["action"] for row in rows])
        for row in rows:
            (before.add if row["action"] == "load" else before.discard)(row["object"])
        loaded = {item["id"] for item in crashing.host.data("plugin-manager", "list")}
        assert loaded == before, f"round {turn}"
        for name in loaded:
            reply = crashing.host.invoke(name, "handle", "hello")["data"]
            assert "hello" in reply

    points = list(crashing.rounds(play))
    assert len(points) >= 2 * 3, points


@pytest.mark.parametrize("phase", ["before", "after"])
def test_a_crash_really_is_one(new_host: NewHost, phase: str) -> None:
    crashing = Crashing(new_host, "auth-service")
    pid = crashing.host.pid("auth-service")
    crashing.crash_at(1, phase)
    assert crashing.try_steps([("create", {"name": "alice", "password": PASSWORD})]) == []
    crashing.host.wait_for(lambda: pid not in crashing.host.processes())
    connection = sqlite3.connect(crashing.host.database("auth"))
    (users,), (rows,) = (connection.execute(f"SELECT count(*) FROM {name}").fetchone() for name in ("users", "ledger"))
    connection.close()
    assert (users, rows) == ((0, 0) if phase == "before" else (1, 1))
