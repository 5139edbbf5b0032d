"""From a line to its reply: the gate, validation, the ledger. Bytes in, bytes out, over the registry's contracts."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from circleosd.api import actions
from circleosd.api.common import Event, History
from circleosd.api.contract import Between, completed
from circleosd.auth import store
from circleosd.auth.service import AuthService
from circleosd.database import Database
from circleosd.deadlines import Deadlines
from circleosd.handlers import Resolution
from circleosd.ledger import TEXT_SHOWN
from circleosd.ledger import Entry as Row
from circleosd.policy import Caller, Peer, Role
from circleosd.registry.units import UnitState, Verb
from circleosd.validation import ValidationError, validator
from tests.unit.dispatching import Accounts, Registry, reply_to
from tests.unit.fakes import ROOT, STRANGER, USERS, Ending, NoFiles
from tests.waiting import SECONDS, until


def test_a_start_is_intended_carried_out_and_recorded(registry: Registry) -> None:
    reply = registry.ask({"action": "start", "name": "nginx", "tag": [1]})
    assert reply["ok"]
    assert reply["tag"] == [1]
    assert reply["data"]["state"] == "active"
    assert registry.units.jobs == [("start", "nginx.service")]
    assert registry.history() == [("intent", "start", "nginx"), ("outcome", "start", "nginx")]
    assert [event["seq"] for event in registry.mirrored] == [1, 2]


def test_who_loses_a_right_while_waiting_is_denied_on_record_as_at_once(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    callers = iter([USERS["operator"], Caller(STRANGER)])

    async def identify(peer: Peer, token: str | None) -> Caller:
        return next(callers)

    with monkeypatch.context() as auth:
        auth.setattr(registry.service, "_identify", identify)
        assert registry.ask({"action": "logs", "name": "nginx"}, STRANGER)["error"] == "denied"
    assert registry.history() == [("denied", "logs", "nginx")]


def test_no_time_runs_out_while_what_was_done_or_refused_is_recorded(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, commit = Deadlines.begin, registry.database._commit
    given: list[Callable[[], bool]] = []
    too_late: list[bool] = []

    def take(deadlines: Deadlines, task: asyncio.Task[object], done: Callable[[], bool]) -> None:
        given.append(done)
        begin(deadlines, task, done)

    def ask() -> None:
        too_late.append(given[-1]())
        commit()

    monkeypatch.setattr(Deadlines, "begin", take)
    monkeypatch.setattr(registry.database, "_commit", ask)
    assert registry.ask({"action": "start", "name": "nginx"})["ok"]
    registry.units.result = "failed"
    assert registry.ask({"action": "start", "name": "nginx"})["error"] == "unit-failed"
    assert registry.ask({"action": "stop", "name": "readonly"})["error"] == "denied"
    assert too_late == [False, True, False, True, True]  # false while an intent is recorded


def test_who_waited_in_vain_is_told_which_setting_bounds_a_request(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadlines = Ending()

    async def job(verb: str, unit: str) -> str:
        deadlines.pass_now()
        await asyncio.sleep(60)
        return "done"

    monkeypatch.setattr(registry.units, "job", job)
    monkeypatch.setattr(registry.service, "_timeout", 0.1)
    monkeypatch.setattr(registry.service, "_deadlines", deadlines)
    reply = registry.ask({"action": "start", "name": "nginx"})
    _, outcome = registry.ask({"action": "history"})["data"]
    for told in (reply, outcome):
        assert told["error"] == "timeout"
        assert told["message"] == "not done within 0.1 s (server.request_timeout); what was started may continue"


def test_no_act_begins_that_took_all_its_time_to_be_recorded(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadlines, writing, passed = Ending(), threading.Event(), threading.Event()
    commit = registry.database._commit

    def slowly() -> None:
        writing.set()
        assert passed.wait(SECONDS)
        commit()

    async def scenario() -> bytes:
        asking = asyncio.create_task(reply_to(registry.service, b'{"action":"start","name":"nginx"}', ROOT))
        await until(writing.is_set)
        deadlines.pass_now()
        await asyncio.sleep(0)
        passed.set()
        return await asking

    monkeypatch.setattr(registry.database, "_commit", slowly)
    monkeypatch.setattr(registry.service, "_deadlines", deadlines)
    assert json.loads(asyncio.run(scenario()))["error"] == "timeout"
    assert registry.units.jobs == []
    rows = registry.ask({"action": "history"})["data"]
    assert [(row["phase"], row["error"]) for row in rows] == [("intent", None), ("outcome", "timeout")]


def test_an_act_that_cannot_even_be_intended_in_its_time_has_failed_on_record(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadlines, writer, free = Ending(), registry.database._writer, threading.Event()

    async def scenario() -> dict[str, Any]:
        busy = writer.submit(free.wait)
        asking = asyncio.create_task(reply_to(registry.service, b'{"action":"start","name":"nginx"}', ROOT))
        await until(lambda: busy.running() and writer._work_queue.qsize())
        deadlines.pass_now()
        await asyncio.sleep(0)
        free.set()
        told: dict[str, Any] = json.loads(await asking)
        return told

    monkeypatch.setattr(registry.service, "_deadlines", deadlines)
    reply = asyncio.run(scenario())
    (row,) = registry.ask({"action": "history"})["data"]
    assert registry.units.jobs == []
    assert (row["phase"], row["action"], row["object"]) == ("failed", "start", "nginx")
    for told in (reply, row):
        assert (told["error"], told["message"]) == ("timeout", "not begun within 60 s (server.request_timeout)")


async def no_answer(units: Sequence[str]) -> list[UnitState]:
    """The states of units, which never come."""
    return await asyncio.Future()


def test_an_act_that_cannot_be_intended_does_not_wait_for_the_state_before_it(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise sqlite3.OperationalError("database or disk is full")

    async def scenario() -> dict[str, Any]:
        told: dict[str, Any] = json.loads(await reply_to(registry.service, b'{"action":"start","name":"nginx"}', ROOT))
        await until(lambda: len(asyncio.all_tasks()) == 1)
        return told

    monkeypatch.setattr(registry.units, "states", no_answer)
    monkeypatch.setattr(registry.database, "_commit", full)
    assert asyncio.run(scenario())["error"] == "unavailable"
    assert registry.units.jobs == []


def test_both_rows_of_an_act_tell_the_same_of_an_actor_who_ended_meanwhile(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = registry.units.job

    async def job_after_the_end(verb: Verb, unit: str) -> str:
        actor.kill()
        actor.wait()
        return await job(verb, unit)

    monkeypatch.setattr(registry.units, "job", job_after_the_end)
    request = {"action": "start", "name": "nginx", "token": "operator"}
    with subprocess.Popen(["sleep", str(SECONDS)]) as actor:
        assert registry.ask(request, Peer(os.geteuid(), os.getegid(), actor.pid))["ok"]
    intent, outcome = registry.ask({"action": "history"})["data"]
    assert intent["actor"]["exe"].endswith("/sleep")
    assert outcome["actor"] == intent["actor"]


def test_a_stranger_is_denied_before_parameters_are_looked_at_and_that_is_recorded(registry: Registry) -> None:
    reply = registry.ask({"action": "stop", "name": "nginx", "nonsense": 1}, STRANGER)
    assert reply["error"] == "denied"
    assert registry.units.jobs == []
    assert registry.history() == [("denied", "stop", "nginx")]
    row = registry.ask({"action": "history"})["data"][0]
    assert row["actor"]["uid"] == STRANGER.uid
    assert row["error"] == "denied"


def test_a_refused_token_is_recorded_as_a_denial_of_a_mutation(registry: Registry) -> None:
    assert registry.ask({"action": "stop", "name": "nginx", "token": "forged"})["error"] == "denied"
    assert registry.history() == [("denied", "stop", "nginx")]


@pytest.mark.parametrize(("number", "parts"), [(0, 0), (1, 0), (200, 0), (201, 2), (1000, 5)])
def test_others_get_their_turn_while_a_long_reply_is_encoded(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, number: int, parts: int
) -> None:
    rows = [{"seq": seq, "message": "é" * 100} for seq in range(number)]
    turns, tasks = 0, []

    async def history(wanted: History) -> list[dict[str, Any]]:
        tasks.append(asyncio.create_task(count()))
        return rows

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    monkeypatch.setattr(registry.ledger, "history", history)
    reply = registry.ask({"action": "history", "tag": "t"})
    assert reply == {"ok": True, "message": None, "data": rows, "tag": "t"}
    assert turns == parts + 1, "once more as the loop ends"


def test_a_denied_look_is_not_recorded(registry: Registry) -> None:
    assert registry.ask({"action": "list"}, STRANGER)["error"] == "denied"
    assert registry.history() == []


def test_a_token_gives_its_users_rights_and_name(registry: Registry) -> None:
    assert registry.ask({"action": "stop", "name": "nginx", "token": "operator"}, STRANGER)["ok"]
    assert registry.ask({"action": "history"})["data"][0]["actor"]["user"] == "olga"
    assert registry.ask({"action": "history", "token": "operator"}, STRANGER)["error"] == "denied"


@pytest.mark.parametrize(
    ("request_", "code", "says"),
    [
        ({"action": "fly"}, "unknown-action", "no action 'fly'"),
        ({"action": "start"}, "bad-request", "needs the parameter name"),
        ({"action": "start", "name": 5}, "bad-request", "name: should be a valid string"),
        ({"action": "start", "name": "a b"}, "bad-request", "'a b' is not a service name"),
        ({"action": "start", "name": "nginx", "force": True}, "bad-request", "no parameter 'force'; it has: name"),
        ({"action": "start", "name": "../etc"}, "bad-request", "not a service name"),
        ({"action": "start", "name": "x" * 129}, "bad-request", "not a service name"),
        ({"action": "start", "name": "nginx\n"}, "bad-request", "not a service name"),
        ({"action": "start", "name": "unheard"}, "not-found", "no service unheard in the catalog"),
        ({"action": "start", "name": "ghost"}, "not-found", "the unit ghost.service of the service ghost"),
        ({"action": "stop", "name": "readonly"}, "denied", "does not allow stop for readonly"),
        ({"action": "history", "lines": -1}, "bad-request", "not between 0 and 10000"),
        ({"action": "history", "lines": "5"}, "bad-request", "should be a valid integer"),
    ],
)
def test_wrong_requests_get_a_code_and_a_reason(
    registry: Registry, request_: dict[str, Any], code: str, says: str
) -> None:
    reply = registry.ask(request_)
    assert (reply["ok"], reply["data"], reply["error"]) == (False, None, code)
    assert says in reply["message"]
    assert registry.units.jobs == []


@pytest.mark.parametrize(
    ("lacking", "said"),
    [
        (MemoryError(), "no memory is left"),
        (RuntimeError("can't start new thread"), "no more threads can be started"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "Cannot allocate memory"),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
        (OSError(errno.ENFILE, "Too many open files in system"), "Too many open files in system"),
        (
            ImportError("x.so: failed to map segment from shared object"),
            "x.so: failed to map segment from shared object",
        ),
        (
            ImportError("x.so: cannot open shared object file: Too many open files"),
            "x.so: cannot open shared object file: Too many open files",
        ),
    ],
)
def test_what_the_machine_has_no_more_of_is_no_defect(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, lacking: Exception, said: str
) -> None:
    async def without(units: object) -> list[object]:
        raise lacking

    monkeypatch.setattr(registry.units, "states", without)
    reply = registry.ask({"action": "list"})
    assert (reply["error"], reply["message"]) == ("limit", f"{said} in this service; try again later")


class Panic(BaseException):
    """As pydantic-core's Rust code raises, if it panics."""


@pytest.mark.parametrize("defect", [RuntimeError, Panic])
def test_a_defect_is_an_opaque_reply_and_the_service_goes_on(
    registry: Registry,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    defect: type[BaseException],
) -> None:
    async def broken(units: object) -> list[object]:
        raise defect("secret detail")

    monkeypatch.setattr(registry.units, "states", broken)
    reply = registry.ask({"action": "list"})
    assert reply["error"] == "internal"
    assert "secret" not in reply["message"]
    assert "secret detail" in caplog.text
    monkeypatch.undo()
    assert registry.ask({"action": "list"})["ok"]


def test_a_rule_gives_one_verb_on_one_service_and_the_sight_of_it(registry: Registry) -> None:
    def ask(action: str, **parameters: object) -> dict[str, Any]:
        return registry.ask({"action": action, "token": "nginx only", **parameters}, STRANGER)

    assert ask("restart", name="nginx")["ok"]
    for action, name in [("stop", "nginx"), ("restart", "ghost"), ("restart", "nginx2"), ("status", "nginx")]:
        assert ask(action, name=name)["error"] == "denied"
    assert [row["name"] for row in ask("list")["data"]] == ["nginx"]
    assert ask("history")["error"] == "denied"


def test_a_rule_that_denies_takes_one_service_away_and_out_of_sight(registry: Registry) -> None:
    def ask(action: str, **parameters: object) -> dict[str, Any]:
        return registry.ask({"action": action, "token": "all but nginx", **parameters}, STRANGER)

    assert "by the rule: deny service:* nginx" in ask("stop", name="nginx")["message"]
    assert ask("stop", name="readonly")["error"] == "denied", "by the catalog"
    assert ask("start", name="ghost")["error"] == "not-found", "past the gate"
    assert "nginx" not in {row["name"] for row in ask("list")["data"]}
    assert registry.units.jobs == []


@pytest.mark.parametrize("name", ["nginx" + "x" * 300, ["nginx"], {"nginx": 1}, None, 5, "nginx\n", "nginx\0"])
def test_a_rule_is_about_the_whole_name_that_is_acted_on(registry: Registry, name: object) -> None:
    reply = registry.ask({"action": "restart", "name": name, "token": "nginx only"}, STRANGER)
    assert reply["error"] == "denied"


def test_a_flood_of_denials_is_one_row_and_a_count(registry: Registry) -> None:
    async def scenario() -> None:
        for _ in range(100):
            await reply_to(registry.service, b'{"action":"stop","name":"nginx"}', STRANGER)
        await registry.service.close()

    asyncio.run(scenario())
    rows = registry.ask({"action": "history"})["data"]
    assert [(row["phase"], row["count"]) for row in rows] == [("denied", 1), ("denied", 99)]


def test_a_change_that_the_disk_did_not_take_has_failed_on_record(
    accounts: Accounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = accounts.database._commit

    def fail_once() -> None:
        monkeypatch.setattr(accounts.database, "_commit", commit)
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(accounts.database, "_commit", fail_once)
    assert "disk I/O error" in accounts.ask({"action": "create", "name": "alice", "uid": 1005})["message"]
    (row,) = accounts.ask({"action": "history"})["data"]
    assert (row["phase"], row["action"], row["object"]) == ("failed", "create", "alice")
    assert (row["error"], row["after"]) == ("unavailable", None)


@pytest.mark.parametrize(
    ("result", "says"),
    [("done", "it was carried out, "), ("failed", "it failed: cannot start nginx (nginx.service): ")],
)
@pytest.mark.parametrize("then", ["another act", "the end"])
def test_an_outcome_that_the_disk_did_not_take_is_told_and_written_later(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, result: str, says: str, then: str
) -> None:
    commit, commits = registry.database._commit, iter(range(9))

    def fail_once() -> None:
        if next(commits) == 1:
            raise sqlite3.OperationalError("disk I/O error")
        commit()

    monkeypatch.setattr(registry.database, "_commit", fail_once)
    registry.units.result = result
    reply = registry.ask({"action": "start", "name": "nginx"})
    assert reply["error"] == "unavailable"
    assert reply["message"].startswith(says)
    assert reply["message"].endswith(", but that is not on record yet: cannot use r.db: disk I/O error")
    assert registry.history() == [("intent", "start", "nginx")]
    if then == "the end":
        asyncio.run(registry.service.close())
    else:
        registry.ask({"action": "stop", "name": "readonly"})
    _, outcome, *later = registry.ask({"action": "history"})["data"]
    assert (outcome["phase"], outcome["intent"], outcome["error"] is None) == ("outcome", 1, result == "done")
    assert [row["phase"] for row in later] == (["denied"] if then == "another act" else [])
    assert asyncio.run(registry.ledger.unfinished()) == []


@pytest.mark.parametrize(("result", "error"), [("done", None), ("failed", "unit-failed")])
def test_the_outcome_of_an_act_that_the_end_of_the_service_cuts_off_is_written_if_it_is_known(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, result: str, error: str | None
) -> None:
    job, writer, free = registry.units.job, registry.database._writer, threading.Event()
    busy: list[Future[bool]] = []

    async def job_and_busy_disk(verb: Verb, unit: str) -> str:
        busy.append(writer.submit(free.wait))
        return await job(verb, unit)

    async def scenario() -> None:
        acting = asyncio.create_task(reply_to(registry.service, b'{"action":"start","name":"nginx"}', ROOT))
        await until(lambda: busy and busy[0].running() and writer._work_queue.qsize())
        acting.cancel()
        await asyncio.wait([acting])
        closing = asyncio.create_task(registry.service.close())
        ended, _ = await asyncio.wait([closing], timeout=0.1)
        free.set()
        await closing
        assert not ended, "it did not wait for the disk"

    monkeypatch.setattr(registry.units, "job", job_and_busy_disk)
    registry.units.result = result
    asyncio.run(scenario())
    _, outcome = registry.ask({"action": "history"})["data"]
    assert (outcome["phase"], outcome["error"]) == ("outcome", error)
    assert asyncio.run(registry.ledger.unfinished()) == []


@pytest.mark.parametrize(
    ("action", "name", "callers", "thread"),
    [
        ("stop", "nginx", [Caller(STRANGER)], "_writer"),
        ("stop", "nginx", [Caller(STRANGER)], "_reader"),  # it looks for earlier rows that count against the allowance
        ("stop", "readonly", [USERS["operator"]], "_writer"),
        ("logs", "nginx", [USERS["operator"], Caller(STRANGER)], "_writer"),
    ],
    ids=["by the gate", "by the gate at first", "by the catalog", "after waiting"],
)
def test_a_denial_that_the_end_of_the_service_cuts_off_is_recorded(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, action: str, name: str, callers: list[Caller], thread: str
) -> None:
    database, known, free = getattr(registry.database, thread), iter(callers), threading.Event()

    async def identify(peer: Peer, token: str | None) -> Caller:
        return next(known)

    async def scenario() -> None:
        busy = database.submit(free.wait)
        line = json.dumps({"action": action, "name": name}).encode()
        asking = asyncio.create_task(reply_to(registry.service, line, STRANGER))
        await until(lambda: busy.running() and database._work_queue.qsize())
        asking.cancel()
        await asyncio.wait([asking])
        free.set()
        await registry.service.close()

    with monkeypatch.context() as auth:
        auth.setattr(registry.service, "_identify", identify)
        asyncio.run(scenario())
    assert registry.history() == [("denied", action, name)]


def test_an_act_that_did_not_begin_in_its_time_is_told_as_that_also_on_record(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry.units, "states", no_answer)
    monkeypatch.setattr(registry.service, "_deadlines", Deadlines(0.1))
    reply = registry.ask({"action": "restart", "name": "nginx"})
    monkeypatch.setattr(registry.service, "_deadlines", Deadlines(60))
    _, outcome = registry.ask({"action": "history"})["data"]
    for told in (reply, outcome):
        assert (told["error"], told["message"]) == ("timeout", "not begun within 60 s (server.request_timeout)")


def test_an_act_that_the_end_of_the_service_kept_from_beginning_is_not_guessed_to_be_done(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_answer(units: Sequence[str]) -> list[UnitState]:
        asked.set()
        return await asyncio.Future()

    async def scenario() -> None:
        acting = asyncio.create_task(reply_to(registry.service, b'{"action":"restart","name":"nginx"}', ROOT))
        await asked.wait()
        await until(registry.mirrored.__len__)
        acting.cancel()
        await asyncio.wait([acting])

    asked = asyncio.Event()
    with monkeypatch.context() as systemd:
        systemd.setattr(registry.units, "states", no_answer)
        asyncio.run(scenario())
    asyncio.run(registry.service.start())
    _, outcome = registry.ask({"action": "history"})["data"]
    assert (registry.units.jobs, outcome["phase"], outcome["error"]) == ([], "outcome", "unavailable")
    assert outcome["message"] == "service-registry ended before this began"


def test_a_change_of_which_no_row_was_written_is_not_told_as_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def forgetful(users: AuthService, request: object, act: object) -> None: ...

    database = Database(tmp_path / "a.db", store.MIGRATIONS)
    monkeypatch.setattr(AuthService, "create", forgetful)
    reply = Accounts(database).ask({"action": "create", "name": "alice", "uid": 1005})
    assert (reply["ok"], reply["error"]) == (False, "internal")
    assert "user:create changed state without a row in the ledger" in caplog.text
    database.close()


def test_a_record_that_cannot_be_continued_keeps_no_service_from_telling_so(registry: Registry) -> None:
    async def interrupted() -> None:
        await registry.ledger.record(Row("intent", Caller(ROOT), "stop", "nginx"))
        await registry.database.write(lambda tx: tx.execute("UPDATE ledger_ends SET last_seq = 0"))
        await registry.service.start()

    asyncio.run(interrupted())
    assert registry.ask({"action": "audit"})["data"]["problems"]
    assert registry.ask({"action": "status", "name": "nginx"})["ok"]


def test_a_bug_in_finding_out_how_an_act_ended_ends_no_start(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(intent: Event) -> Resolution:
        raise KeyError("secret detail")

    async def interrupted() -> None:
        await registry.ledger.record(Row("intent", Caller(ROOT), "stop", "nginx"))
        with monkeypatch.context() as patched:
            patched.setattr(registry.service._handlers, "resolve", broken)
            await registry.service.start()
        assert len(await registry.ledger.unfinished()) == 1, "the next start tries again"
        await registry.service.start()

    asyncio.run(interrupted())
    assert "secret detail" in caplog.text
    assert registry.history() == [("intent", "stop", "nginx"), ("outcome", "stop", "nginx")]


def test_interrupted_acts_are_looked_at_side_by_side(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    states, looking = registry.units.states, asyncio.Barrier(3)

    async def all_together(units: Sequence[str]) -> list[UnitState]:
        await looking.wait()
        return await states(units)

    async def interrupted() -> None:
        for _ in range(3):
            await registry.ledger.record(Row("intent", Caller(ROOT), "start", "nginx"))
        monkeypatch.setattr(registry.units, "states", all_together)
        async with asyncio.timeout(SECONDS):
            await registry.service.start()

    asyncio.run(interrupted())
    assert [(row[0], row[2]) for row in registry.history()] == [("intent", "nginx")] * 3 + [("outcome", "nginx")] * 3


def test_a_stream_ends_as_soon_as_its_callers_rights_do(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(USERS, "admin", Caller(STRANGER, Role.ADMIN, "ada", "s4"))

    async def scenario() -> None:
        await registry.ledger.record(Row("done", Caller(ROOT), "start", "nginx"))
        stream = await registry.service.dispatch(b'{"action":"follow","token":"admin","tag":7}', STRANGER, NoFiles())
        assert not isinstance(stream, bytes)
        first = json.loads(await anext(stream))
        assert (first["data"]["action"], first["more"], first["tag"]) == ("start", True, 7)
        monkeypatch.delitem(USERS, "admin")
        await registry.ledger.record(Row("done", Caller(ROOT), "stop", "nginx"))
        last = json.loads(await anext(stream))
        assert (last["error"], last["tag"]) == ("denied", 7)
        assert [line async for line in stream] == []

    asyncio.run(scenario())


def test_the_records_verification_is_for_admins(registry: Registry) -> None:
    registry.ask({"action": "start", "name": "nginx"})
    assert registry.ask({"action": "audit"})["data"]["problems"] == []
    assert registry.ask({"action": "audit", "token": "operator"}, STRANGER)["error"] == "denied"


def test_only_circleosd_itself_acts_on_behalf_of_a_plugin(registry: Registry) -> None:
    request = {"action": "restart", "name": "nginx", "on_behalf": "healer"}
    reply = registry.ask({**request, "token": "operator"})
    assert reply["error"] == "denied"
    assert "on behalf of a plugin" in reply["message"]
    assert registry.units.jobs == []
    assert registry.ask(request)["ok"]
    rows = registry.ask({"action": "history", "object": "nginx"})["data"]
    assert [row["actor"].get("plugin") for row in rows] == [None, "healer", "healer"]
    assert rows[0]["actor"]["user"] == USERS["operator"].user
    assert registry.ask({"action": "status", "name": "nginx", "on_behalf": None})["ok"]
    named = {"action": "restart", "name": "nginx", "called_by": "bob (uid 1001)", "token": "operator"}
    assert "on behalf of a plugin" in registry.ask(named)["message"], "nor says whose call of a plugin that is"


def test_of_a_name_that_nothing_can_have_a_denial_and_its_row_hold_no_more_than_the_beginning(
    registry: Registry,
) -> None:
    reply = registry.ask({"action": "stop", "name": "n" * 60_000}, STRANGER)
    assert reply["error"] == "denied"
    assert len(reply["message"]) < 500
    (row,) = registry.mirrored
    assert row["object"] == "n" * TEXT_SHOWN + "…"
    assert len(json.dumps(row)) < 2000


@pytest.mark.parametrize("verb", actions.BY_VERB)
def test_no_object_can_have_a_name_of_which_a_part_is_cut(verb: str) -> None:
    contract = actions.BY_VERB[verb]
    if contract.object_field is None or contract.claimed_object:
        return
    with pytest.raises(ValidationError) as raised:
        validator(completed(contract)).validate_python({contract.object_field: "a" * TEXT_SHOWN + "…"})
    assert contract.object_field in [error["loc"][0] for error in raised.value.errors()]


@pytest.mark.parametrize("verb", actions.BY_VERB)
def test_every_whole_number_has_bounds_that_sqlite_can_hold(verb: str) -> None:
    hints = get_type_hints(actions.BY_VERB[verb], include_extras=True)
    for name, hint in hints.items():
        parts = [hint, *get_args(hint), *(leaf for part in get_args(hint) for leaf in get_args(part))]
        if int in parts:
            bounds = [part for part in parts if isinstance(part, Between)]
            assert bounds, f"{verb} {name} takes any number"
            assert -(2**63) <= bounds[0].least <= bounds[0].most < 2**63


def test_a_refused_number_is_quoted_in_short(registry: Registry) -> None:
    reply = registry.ask({"action": "history", "lines": 10**4000})
    assert reply["error"] == "bad-request"
    assert reply["message"].endswith("… is not between 0 and 10000")
    assert len(reply["message"]) < 120
