"""The registry: what it does to units, and what it tells of them. Bytes in, bytes out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest

from circleosd import recovery
from circleosd.errors import Limit, NotFound
from circleosd.ledger import Entry as Row
from circleosd.policy import Caller, Peer, Role
from circleosd.registry.catalog import Catalog, Entry
from circleosd.registry.service import RegistryService
from circleosd.registry.units import LogLine, UnitState
from circleosd.systemd.units import SystemdUnits
from tests.unit.dispatching import Registry, reply_to
from tests.unit.fakes import ROOT, STRANGER, NoFiles
from tests.waiting import SECONDS


def test_the_state_before_a_job_is_asked_for_while_its_intent_is_written(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, states, asked = registry.ledger.record, registry.units.states, asyncio.Event()

    async def noted(units: Sequence[str]) -> list[UnitState]:
        asked.set()
        return await states(units)

    async def waiting(row: Row) -> int:
        async with asyncio.timeout(SECONDS):
            await asked.wait()
        assert registry.units.jobs == ([("start", "nginx.service")] if row.intent else [])
        return await record(row)

    monkeypatch.setattr(registry.units, "states", noted)
    monkeypatch.setattr(registry.ledger, "record", waiting)
    assert registry.ask({"action": "start", "name": "nginx"})["ok"]
    assert registry.history() == [("intent", "start", "nginx"), ("outcome", "start", "nginx")]


def test_a_job_is_done_to_the_unit_that_was_checked_also_if_the_catalog_changes_meanwhile(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogs = [Catalog({"web": Entry("web", unit)}, ()) for unit in ("nginx.service", "other.service")]
    handlers = RegistryService(lambda: catalogs.pop(0), registry.units)
    monkeypatch.setattr(registry.service, "_handlers", handlers)
    monkeypatch.setattr(registry.service._endpoints["start"], "handler", handlers.start)
    assert registry.ask({"action": "start", "name": "web"})["ok"]
    assert registry.units.jobs == [("start", "nginx.service")]


def test_a_failed_unit_is_an_error_with_its_result_and_what_it_said(registry: Registry) -> None:
    registry.units.result = "failed"
    reply = registry.ask({"action": "start", "name": "nginx"})
    assert reply["error"] == "unit-failed"
    for part in ("exit status 3", "exit-code", "cannot bind port 80"):
        assert part in reply["message"]
    row = registry.ask({"action": "history", "failed": True})["data"][-1]
    assert (row["phase"], row["error"], row["intent"]) == ("outcome", "unit-failed", 1)


@pytest.mark.parametrize(("result", "error"), [("exit-code", "unit-failed"), ("success", None)])
def test_a_unit_that_ended_badly_at_once_has_failed_also_where_systemd_will_restart_it(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, result: str, error: str | None
) -> None:
    async def states(units: Sequence[str]) -> list[UnitState]:
        return [UnitState(unit, "", "loaded", "activating", "auto-restart", result=result) for unit in units]

    monkeypatch.setattr(registry.units, "states", states)
    reply = registry.ask({"action": "start", "name": "nginx"})
    assert reply.get("error") == error
    if error:
        assert "cannot start nginx (nginx.service), which systemd will try again: " in reply["message"]
        assert "exit-code; it said: cannot bind port 80" in reply["message"]


def test_stopping_a_service_whose_socket_listens_says_so(registry: Registry) -> None:
    registry.units.awaited = True
    assert "nginx.socket is still listening" in registry.ask({"action": "stop", "name": "nginx"})["message"]


@pytest.mark.parametrize(("verb", "name", "error"), [("stop", "readonly", "denied"), ("restart", "nope", "not-found")])
def test_what_the_catalog_refuses_was_never_intended_and_a_flood_of_it_is_counted(
    registry: Registry, verb: str, name: str, error: str
) -> None:
    async def flood() -> None:
        for _ in range(50):
            line = json.dumps({"action": verb, "name": name, "token": "operator"}).encode()
            assert json.loads(await reply_to(registry.service, line, STRANGER))["error"] == error
        await registry.service.close()

    asyncio.run(flood())
    rows = registry.ask({"action": "history"})["data"]
    assert [(row["phase"] in ("denied", "failed"), row["error"], row["count"]) for row in rows] == [
        (True, error, 1),
        (True, error, 49),
    ]


@pytest.mark.parametrize("action", ["stop", "restart"])
def test_the_registry_does_not_end_itself_while_it_answers(registry: Registry, action: str) -> None:
    reply = registry.ask({"action": action, "name": "service-registry"})
    assert reply["error"] == "conflict"
    assert registry.units.jobs == []


@pytest.mark.parametrize("follow", [False, True])
def test_a_log_of_nothing_is_not_found_unless_there_was_a_unit_that_logged(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, follow: bool
) -> None:
    async def nothing(unit: str, lines: int, since: float | None = None) -> list[LogLine]:
        return []

    async def problem(name: str) -> str | None:
        line = json.dumps({"action": "logs", "name": name, "follow": follow}).encode()
        reply = await registry.service.dispatch(line, ROOT, NoFiles())
        found: dict[str, Any] = json.loads(reply if isinstance(reply, bytes) else await anext(reply))
        return None if found["ok"] else found["message"]

    assert asyncio.run(problem("ghost")) is None
    monkeypatch.setattr(registry.units, "logs", nothing)
    assert asyncio.run(problem("nginx")) is None
    assert asyncio.run(problem("ghost")) == "the unit ghost.service of the service ghost does not exist"
    registry.units.active["circleosd-plugin@any.service"] = "inactive"
    assert "no worker of the plugin any" in (asyncio.run(problem("plugin@any")) or "")


def test_a_log_whose_last_lines_are_too_far_back_can_be_followed(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def endless(unit: str, lines: int, since: float | None = None) -> list[LogLine]:
        raise Limit("they are too far back")

    async def followed(unit: str, lines: int, since: float | None = None) -> AsyncGenerator[LogLine, None]:
        yield LogLine(1.0, "a new line")

    async def follow() -> bytes:
        reply = await registry.service.dispatch(b'{"action":"logs","name":"nginx","follow":true}', ROOT, NoFiles())
        return reply if isinstance(reply, bytes) else await anext(reply)

    monkeypatch.setattr(registry.units, "logs", endless)
    monkeypatch.setattr(registry.units, "follow", followed)
    assert json.loads(asyncio.run(follow()))["data"]["text"] == "a new line"
    assert registry.ask({"action": "logs", "name": "nginx"})["error"] == "limit"


def test_a_next_step_is_said_for_the_manager_that_has_the_unit(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stale(unit: str) -> bool:
        return True

    monkeypatch.setattr(registry.units, "systemctl", SystemdUnits("user", timeout=1).systemctl)
    monkeypatch.setattr(registry.units, "stale", stale)
    registry.units.boot["nginx.service"] = "masked"
    steps = [
        ({"action": "status", "name": "nginx"}, "systemctl --user daemon-reload"),
        ({"action": "enable", "name": "nginx"}, "systemctl --user unmask nginx.service"),
    ]
    for request, step in steps:
        assert registry.ask(request)["message"].endswith(f"; see: {step}")


def test_a_worker_of_no_loaded_plugin_is_not_found(registry: Registry) -> None:
    assert registry.ask({"action": "stop", "name": "plugin@nothing"})["error"] == "not-found"


def test_a_worker_is_started_where_its_socket_is(registry: Registry) -> None:
    registry.units.active["circleosd-plugin@echo.service"] = "inactive"  # as systemd has it of every name
    for action in ("start", "restart", "status", "watch"):
        reply = registry.ask({"action": action, "name": "plugin@echo"})
        assert reply["error"] == "not-found"
        assert "not loaded" in reply["message"]
    assert registry.units.jobs == []
    registry.units.active["circleosd-plugin@echo.socket"] = "inactive"
    for action in ("status", "watch"):
        assert registry.ask({"action": action, "name": "plugin@echo.socket"})["error"] == "not-found"
    assert registry.ask({"action": "start", "name": "plugin@echo.socket"})["ok"]  # as the plugin manager does
    assert registry.ask({"action": "status", "name": "plugin@echo.socket"})["data"]["state"] == "active"
    assert registry.ask({"action": "status", "name": "plugin@echo"})["data"]["state"] == "inactive"
    assert registry.ask({"action": "start", "name": "plugin@echo"})["ok"]


@pytest.mark.parametrize("name", ["plugin@echo", "plugin@echo.staged", "plugin@echo.socket"])
@pytest.mark.parametrize("verb", ["reload", "enable", "disable"])
def test_a_worker_is_only_started_and_stopped_which_is_all_that_polkit_allows(
    registry: Registry, verb: str, name: str
) -> None:
    for kind in ("service", "socket"):
        registry.units.active[f"circleosd-{name.removesuffix('.socket')}.{kind}"] = "active"
    reply = registry.ask({"action": verb, "name": name})
    told = f"the catalog does not allow {verb} for {name}; it allows: start, stop, restart"
    assert (reply["error"], reply["message"]) == ("denied", told)
    assert (registry.units.jobs, registry.units.boot) == ([], {})


def test_a_workers_socket_is_for_the_plugin_manager_and_root(registry: Registry) -> None:
    for unit in ("circleosd-plugin@echo.service", "circleosd-plugin@echo.socket"):
        registry.units.active[unit] = "active"
    operator = {"token": "operator"}
    for action in ("start", "stop", "restart", "status", "watch", "logs"):  # a rule may deny these on the worker
        refused = registry.ask({"action": action, "name": "plugin@echo.socket", **operator}, STRANGER)
        assert refused["error"] == "not-found"
    assert registry.units.jobs == []
    assert registry.ask({"action": "stop", "name": "plugin@echo", **operator}, STRANGER)["ok"]
    assert registry.ask({"action": "stop", "name": "plugin@echo.socket"})["ok"]
    assert registry.ask({"action": "stop", "name": "plugin@echo.socket", "token": "root"})["ok"]


def test_workers_are_no_services_to_plugins(registry: Registry) -> None:
    for unit in ("circleosd-plugin@echo.service", "circleosd-plugin@echo.socket"):
        registry.units.active[unit] = "active"
    healer = {"on_behalf": "healer"}
    for name in ("plugin@echo", "plugin@echo.socket", "plugin@echo.staged", "plugin@nothing"):
        for action in ("restart", "status"):
            assert registry.ask({"action": action, "name": name, **healer})["error"] == "not-found"
    assert registry.units.jobs == []
    assert "plugin@echo" not in [row["name"] for row in registry.ask({"action": "list", **healer})["data"]]
    assert "plugin@echo" in [row["name"] for row in registry.ask({"action": "list"})["data"]]
    assert registry.ask({"action": "restart", "name": "plugin@echo"})["ok"]


def interrupted(registry: Registry, action: str, name: str = "nginx") -> dict[str, Any]:
    """The newest row after a start that follows an act of which only the intent was recorded."""

    async def started() -> None:
        await registry.ledger.record(Row("intent", Caller(ROOT), action, name))
        await registry.service.start()

    asyncio.run(started())
    row: dict[str, Any] = registry.ask({"action": "history"})["data"][-1]
    return row


@pytest.mark.parametrize(
    ("action", "state", "error", "says"),
    [
        ("start", "active", None, "the unit nginx.service is active"),
        ("start", "activating", None, "the unit nginx.service is activating"),
        ("start", "failed", "unit-failed", "the unit nginx.service is failed"),
        ("start", "deactivating", "unit-failed", "the unit nginx.service is deactivating"),
        ("restart", "inactive", "unit-failed", "the unit nginx.service is inactive"),
        ("restart", "deactivating", None, "the unit nginx.service is deactivating"),
        ("reload", "reloading", None, "the unit nginx.service is reloading"),
        ("stop", "deactivating", None, "the unit nginx.service is deactivating"),
        ("stop", "inactive", None, "the unit nginx.service is inactive"),
        ("stop", "failed", None, "the unit nginx.service is failed"),
        ("stop", "active", "unit-failed", "the unit nginx.service is active"),
    ],
)
def test_an_intent_without_outcome_is_resolved_at_the_next_start_by_looking_at_the_unit(
    registry: Registry, action: str, state: str, error: str | None, says: str
) -> None:
    async def started_twice() -> None:
        intent = Row("intent", Caller(Peer(1000, 1000, 77), user="alice"), action, "nginx", before="inactive")
        await registry.ledger.record(intent)
        await registry.service.start()
        await registry.service.start()

    registry.units.active["nginx.service"] = state
    asyncio.run(started_twice())
    intent, outcome = registry.ask({"action": "history"})["data"]
    assert (outcome["phase"], outcome["intent"], outcome["error"]) == ("outcome", intent["seq"], error)
    assert outcome["actor"] == intent["actor"]
    assert (outcome["before"], outcome["after"]) == ("inactive", state)
    assert outcome["message"].startswith("service-registry ended before the outcome was known; at its next start")
    assert says in outcome["message"]


def test_an_interrupted_act_of_another_version_has_an_unknown_outcome(registry: Registry) -> None:
    outcome = interrupted(registry, "freeze")
    assert (outcome["phase"], outcome["error"]) == ("outcome", "internal")
    assert outcome["message"].endswith("at its next start its outcome is unknown")


@pytest.mark.parametrize(("action", "error"), [("enable", "unit-failed"), ("disable", None)])
def test_an_interrupted_switch_is_resolved_by_looking_at_the_unit_file(
    registry: Registry, action: str, error: str | None
) -> None:
    outcome = interrupted(registry, action)
    assert (outcome["error"], outcome["after"]) == (error, "disabled")
    assert "the unit file nginx.service is disabled" in outcome["message"]


def test_an_interrupted_switch_of_a_unit_that_is_gone_is_resolved_too(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def gone(unit: str) -> str:
        raise NotFound(f"no unit file {unit}")

    monkeypatch.setattr(registry.units, "enabled", gone)
    outcome = interrupted(registry, "enable")
    assert (outcome["phase"], outcome["error"]) == ("outcome", "not-found")
    assert "the unit file nginx.service cannot be inspected: no unit file nginx.service" in outcome["message"]


def test_enabling_tells_what_was_before(registry: Registry) -> None:
    assert registry.ask({"action": "enable", "name": "nginx"})["data"]["enabled"] == "enabled"
    outcome = registry.ask({"action": "history"})["data"][-1]
    assert (outcome["before"], outcome["after"]) == ("disabled", "enabled")


def test_an_act_on_what_is_no_longer_cataloged_is_resolved_too(registry: Registry) -> None:
    assert "the catalog has no service forgotten" in interrupted(registry, "stop", "forgotten")["message"]


def test_a_start_that_gets_no_answer_about_an_act_says_so(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def silent(units: Sequence[str]) -> list[UnitState]:
        await asyncio.Event().wait()
        return []

    monkeypatch.setattr(recovery, "PATIENCE", 0.01)
    monkeypatch.setattr(registry.units, "states", silent)
    interrupted(registry, "stop")
    assert caplog.messages == ["row 1 has no outcome yet: cannot find out: no answer"]


def test_who_follows_many_logs_leaves_places_for_others(registry: Registry) -> None:
    logs = json.dumps({"action": "logs", "name": "nginx", "follow": True, "token": "operator"}).encode()

    async def scenario() -> list[str]:
        streams = []
        for uid in [4242] * 17 + [4243]:
            stream = await registry.service.dispatch(logs, Peer(uid, uid, 1), NoFiles())
            assert not isinstance(stream, bytes)
            streams.append(stream)
        found = [json.loads(await anext(stream)) for stream in streams]
        await streams[0].aclose()
        again = await registry.service.dispatch(logs, STRANGER, NoFiles())
        assert not isinstance(again, bytes)
        found.append(json.loads(await anext(again)))
        for stream in [*streams, again]:
            await stream.aclose()
        return [reply["message"] or "" for reply in found]

    refused = "at most 16 followed logs at once for uid 4242; try again later"
    assert asyncio.run(scenario()) == [""] * 16 + [refused] + [""] * 2


def test_who_reads_many_logs_at_once_leaves_places_for_others(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = b'{"action":"logs","name":"nginx","token":"operator"}'

    async def scenario() -> list[str]:
        told = asyncio.Event()

        async def slow(unit: str, lines: int, since: float | None = None) -> list[LogLine]:
            await told.wait()
            return []

        monkeypatch.setattr(registry.units, "logs", slow)
        peers = [Peer(uid, uid, 1) for uid in [4242] * 17 + [4243]]
        asked = [asyncio.create_task(reply_to(registry.service, request, peer)) for peer in peers]
        refused = json.loads(await asked[16])
        told.set()
        return [refused["message"], *(json.loads(reply)["message"] or "" for reply in await asyncio.gather(*asked))]

    refused = "at most 16 logs to be read at once for uid 4242; try again later"
    assert asyncio.run(scenario()) == [refused, *[""] * 16, refused, ""]


def test_few_logs_are_read_at_once_and_the_uids_take_turns(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, at_once, reading = list[str](), list[int](), set[object]()

    async def slow(unit: str, lines: int, since: float | None = None) -> list[LogLine]:
        begun.append(unit)
        reading.add(asyncio.current_task())
        at_once.append(len(reading))
        await asyncio.sleep(0)
        reading.discard(asyncio.current_task())
        return [LogLine(1.0, "one")]

    async def scenario() -> None:
        asked = [
            reply_to(registry.service, request.replace(b"NAME", name), Peer(uid, uid, 1))
            for name, uid in [(b"nginx", 4242)] * 6 + [(b"ghost", 4243)]
        ]
        await asyncio.gather(*asked)

    monkeypatch.setattr(registry.units, "logs", slow)
    request = b'{"action":"logs","name":"NAME","token":"operator"}'
    asyncio.run(scenario())
    assert begun == ["nginx.service"] * 3 + ["ghost.service"] + ["nginx.service"] * 3
    assert max(at_once) == 2


def test_who_may_no_longer_read_a_log_when_it_is_their_turn_does_not(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    identities = [Caller(STRANGER, Role.OPERATOR), Caller(STRANGER)]

    async def identify(peer: Peer, token: str | None) -> Caller:
        return identities.pop(0)

    monkeypatch.setattr(registry.service, "_identify", identify)
    assert registry.ask({"action": "logs", "name": "nginx"}, STRANGER)["error"] == "denied"
