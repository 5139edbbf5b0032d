"""The ledger on a real SQLite file."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from circlectl import commands, views
from circleosd import chain, ledger, wire
from circleosd.api.common import Event, Follow, History
from circleosd.config import LedgerSettings
from circleosd.database import Database, Transaction
from circleosd.errors import Conflict, Unavailable
from circleosd.ledger import Entry, Ledger
from circleosd.policy import Caller, Peer, Role
from circleosd.rows import LEDGER_SCHEMA, as_event
from tests.unit.fakes import ROOT, STRANGER
from tests.waiting import SECONDS, until

ROOT_CALLER = Caller(ROOT, Role.ADMIN, "root")


class Open:
    """A database with a ledger, and what was mirrored."""

    def __init__(self, path: Path, settings: LedgerSettings | None = None) -> None:
        self.database = Database(path, (LEDGER_SCHEMA,))
        self.mirrored: list[Event] = []
        self.ledger = Ledger(self.database, "a-service", self.mirrored.append, settings)

    def record(self, action: str, **fields: object) -> int:
        entry = Entry("done", ROOT_CALLER, action, **fields)  # type: ignore[arg-type]  # any of Entry's
        return asyncio.run(self.ledger.record(entry))

    def history(self, **wanted: Any) -> list[Event]:
        return asyncio.run(self.ledger.history(History(**wanted)))


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    book = Open(tmp_path / "l.db")
    yield book
    book.database.close()


def test_rows_are_numbered_and_each_hash_covers_the_row_and_the_one_before(opened: Open, tmp_path: Path) -> None:
    assert [opened.record(f"act{number}", object="x") for number in range(3)] == [1, 2, 3]
    with sqlite3.connect(tmp_path / "l.db") as raw:
        rows = raw.execute("SELECT body, hash FROM ledger ORDER BY seq").fetchall()
    raw.close()
    previous = bytes(32)
    for body, digest in rows:
        assert digest == chain.linked(previous, body)
        previous = digest


def test_what_is_rolled_back_leaves_no_row_and_is_not_mirrored(opened: Open) -> None:
    def work(tx: Transaction) -> None:
        opened.ledger.append(tx, Entry("done", ROOT_CALLER, "create", "x"))
        raise KeyError("stop")

    with pytest.raises(KeyError):
        asyncio.run(opened.database.write(work))
    assert opened.history() == []
    assert opened.mirrored == []


def test_history_filters_and_returns_the_newest_in_order(opened: Open) -> None:
    for number in range(5):
        opened.record(
            "start" if number % 2 else "stop", object=f"unit{number}", error="denied" if number == 3 else None
        )
    assert [row["object"] for row in opened.history(lines=2)] == ["unit3", "unit4"]
    assert [row["object"] for row in opened.history(action_name="start")] == ["unit1", "unit3"]
    assert [row["object"] for row in opened.history(failed=True)] == ["unit3"]
    assert [row["object"] for row in opened.history(object="unit2")] == ["unit2"]
    assert opened.history(user="nobody") == []
    assert len(opened.history(user="root", since=0.0)) == 5


def test_rows_are_read_beside_the_event_loop(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    opened.record("start", object="x")
    threads = []

    def noted(service: str, seq: int, body: str) -> Event:
        threads.append(threading.current_thread())
        return as_event(service, seq, body)

    monkeypatch.setattr(ledger, "as_event", noted)
    assert [row["object"] for row in opened.history()] == ["x"]
    assert threads
    assert threading.main_thread() not in threads


def test_the_actor_is_who_the_kernel_says(opened: Open) -> None:
    opened.record("start", object=None)
    actor = opened.history()[0]["actor"]
    assert (actor["uid"], actor["pid"], actor["user"]) == (0, 1, "root")


def raw(path: Path, *statements: str) -> None:
    """What somebody does to the file behind CircleOSD's back."""
    connection = sqlite3.connect(path / "l.db")
    with connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()


def test_an_untouched_chain_verifies(opened: Open) -> None:
    assert asyncio.run(opened.ledger.audit())["problems"] == []
    for number in range(5):
        opened.record(f"act{number}", object="x")
    audited = asyncio.run(opened.ledger.audit())
    assert (audited["rows"], audited["first"], audited["last"], audited["problems"]) == (5, 1, 5, [])


ALTER = "UPDATE ledger SET body = json_set(body, '$.actor.uid', 7) WHERE seq = {}"


ROTTEN = "UPDATE ledger SET body = CAST(replace(body, '\"x\"', x'22ff22') AS TEXT) WHERE seq = {}"  # no UTF-8
BLOB = "UPDATE ledger SET body = CAST(body AS BLOB) WHERE seq = {}"
PRUNE = 'UPDATE ledger SET body = \'{{"action":"prune"{}}}\' WHERE seq = 3'


@pytest.mark.parametrize(
    ("statements", "problem"),
    [
        ([ALTER.format(1)], "row 1 has been altered"),
        ([ALTER.format(3)], "row 3 has been altered"),
        ([ALTER.format(5)], "row 5 has been altered"),
        (["UPDATE ledger SET hash = zeroblob(32) WHERE seq = 3"], "row 3 has been altered"),
        (["UPDATE ledger SET hash = zeroblob(32) WHERE seq = 5"], "row 5 has been altered"),
        (["DELETE FROM ledger WHERE seq = 1"], "row 1 is missing"),
        (["DELETE FROM ledger WHERE seq IN (2, 3)"], "rows 2 to 3 are missing"),
        (["DELETE FROM ledger WHERE seq = 5"], "row 5 is missing at the end"),
        (["DELETE FROM ledger"], "rows 1 to 5 are missing at the end"),
        (
            ["DELETE FROM ledger WHERE seq = 3", "UPDATE ledger SET seq = seq - 1 WHERE seq > 3"],
            "row 3 has been altered, or the one before it replaced",
        ),
        (["INSERT INTO ledger (seq, body, hash) SELECT 6, body, hash FROM ledger WHERE seq = 5"], "row 6"),
        (
            ["INSERT INTO ledger (seq, body, hash) SELECT 0, body, hash FROM ledger WHERE seq = 1"],
            "row 0 is in the place of",
        ),
        (["UPDATE ledger_ends SET last_seq = 4"], "row 5 is not written by CircleOSD"),
        (["UPDATE ledger_ends SET last_hash = zeroblob(32)"], "the hash of row 5, the last, has been altered"),
        (["UPDATE ledger_ends SET pruned_seq = 2", "DELETE FROM ledger WHERE seq < 3"], "row 3 has been altered"),
        (["UPDATE ledger SET hash = 'x' WHERE seq = 3"], "row 3 has been altered"),
        ([ROTTEN.format(3)], "row 3 has been altered"),
        ([BLOB.format(3)], "row 3 has been altered"),
        ([PRUNE.format("")], "row 3 has been altered"),
        ([PRUNE.format(',"after":null')], "row 3 has been altered"),
        ([PRUNE.format(',"after":{"first":"x"}')], "row 3 has been altered"),
        ([PRUNE.format(',"after":{"first":1e999}')], "row 3 has been altered"),
        ([PRUNE.format(f',"after":{"[" * 100_000}')], "row 3 has been altered"),
        (["DELETE FROM ledger_ends"], "the ends of its chain"),
        (["UPDATE ledger_ends SET last_hash = 'x'"], "the ends of its chain"),
        (["UPDATE ledger_ends SET last_seq = 'x'"], "the ends of its chain"),
        ([f"UPDATE ledger_ends SET last_seq = {2**63 - 1}"], "the ends of its chain"),
    ],
)
def test_an_altered_deleted_or_inserted_row_is_found(
    opened: Open, tmp_path: Path, statements: list[str], problem: str
) -> None:
    for number in range(5):
        opened.record(f"act{number}", object="x")
    raw(tmp_path, *statements)
    problems = asyncio.run(opened.ledger.audit())["problems"]
    assert any(problem in found for found in problems), problems


def test_of_many_altered_rows_no_more_are_named_than_can_be_shown(opened: Open, tmp_path: Path) -> None:
    for number in range(30):
        opened.record(f"act{number}", object="x")
    raw(tmp_path, "UPDATE ledger SET hash = zeroblob(32)")
    assert len(asyncio.run(opened.ledger.audit())["problems"]) == 20


CUT = (
    "UPDATE ledger_ends SET pruned_seq = {0}, pruned_hash = (SELECT hash FROM ledger WHERE seq = {0})",
    "DELETE FROM ledger WHERE seq <= {0}",
)


@pytest.mark.parametrize(("pruned", "cut"), [(False, 2), (True, 4), (True, 5)])
def test_the_oldest_rows_removed_without_a_row_that_says_so_are_missed(tmp_path: Path, pruned: bool, cut: int) -> None:
    """Also where rows were removed before, and with the row that said so."""
    book = Open(tmp_path / "l.db", LedgerSettings(keep_rows=4 if pruned else 100))
    for number in range(5):
        book.record(f"act{number}", object='"action":"prune"')
    audited = asyncio.run(book.ledger.audit())
    assert (audited["first"] > 1, audited["last"], audited["problems"]) == (pruned, 6 if pruned else 5, [])
    raw(tmp_path, *(statement.format(cut) for statement in CUT))
    assert asyncio.run(book.ledger.audit())["problems"] == [f"no row records the removal of those before row {cut + 1}"]
    book.database.close()


def test_a_row_has_the_fields_that_callers_are_promised_also_if_an_earlier_version_wrote_it(opened: Open) -> None:
    # As version 0.1.0 writes it: without what later versions add to a row.
    body = (
        '{"action":"stop","actor":{"exe":"/usr/bin/python3.11","gid":1000,"login":1000,"pid":4711,"plugin":null,'
        '"session":null,"uid":1000,"unit":"session-1.scope","user":"alice"},"after":"inactive","before":"active",'
        '"count":1,"duration":0.5,"error":null,"intent":1,"message":null,"object":"nginx","params":{},"phase":"outcome",'
        '"seq":2,"time":1795852455.5}'
    )
    opened.record("act", object="x")
    asyncio.run(opened.database.write(lambda tx: tx.execute("INSERT INTO ledger VALUES (2, ?, zeroblob(32))", (body,))))
    new, old = opened.history()
    assert (old["action"], old["after"]) == ("stop", "inactive")
    assert new.keys() == old.keys() == Event.__annotations__.keys()


@pytest.mark.parametrize("body", ["{}", "[]", "{", '{"time":"never"}', '{"seq":3}', b"{}"])
def test_a_row_that_nobody_can_read_hides_no_other_and_ends_no_start(opened: Open, body: str | bytes) -> None:
    for number in range(3):
        opened.record(f"act{number}", object="x")
    asyncio.run(opened.database.write(lambda tx: tx.execute("UPDATE ledger SET body = ? WHERE seq = 2", (body,))))
    asyncio.run(opened.database.write(lambda tx: tx.execute("INSERT INTO ledger_open VALUES (2)")))
    assert [row["action"] for row in opened.history()] == ["act0", "?", "act2"]
    assert [row["action"] for row in opened.history(object="x", since=1.0)] == ["act0", "act2"]
    assert str(opened.history()[1]["message"]).startswith("row 2 is not what CircleOSD wrote")
    assert asyncio.run(opened.ledger.unfinished()) == []


@pytest.mark.parametrize(
    "moment", ["NaN", "Infinity", "1e999", "1e300", "-1", "1" + "0" * 5000, "[" * 100_000], ids=lambda text: text[:8]
)
def test_a_row_of_no_time_that_could_be_told_hides_no_other(opened: Open, moment: str) -> None:
    for number in range(3):
        opened.record(f"act{number}", object="x")
    altered = f"UPDATE ledger SET body = '{{\"time\":{moment},' || substr(json_remove(body, '$.time'), 2) WHERE seq = 2"
    asyncio.run(opened.database.write(lambda tx: tx.execute(altered)))
    rows = wire.decode_reply(wire.success(opened.history()), "s")["data"]
    assert [row["action"] for row in rows] == ["act0", "?", "act2"]
    assert "?" in str(views.of(commands.of_group("system")["history"], rows))


def test_a_row_of_very_many_values_is_shown_as_it_was_written(opened: Open) -> None:
    ended = [f"{number:012x}" for number in range(wire.MAX_VALUES + 1)]
    opened.record("revoke", object="robot", before={"sessions": ended})
    (row,) = opened.history()
    assert (row["action"], row["before"]) == ("revoke", {"sessions": ended})


@pytest.mark.parametrize("below", range(0, 100, 10))
def test_a_row_nested_so_deeply_that_it_could_only_be_read_hides_no_other(opened: Open, below: int) -> None:
    for number in range(3):
        opened.record(f"act{number}", object="x")
    depth = sys.getrecursionlimit() - below
    after = f'"after":{"[" * depth}{"]" * depth}'
    altered = f"UPDATE ledger SET body = replace(body, '\"after\":null', '{after}') WHERE seq = 2"
    asyncio.run(opened.database.write(lambda tx: tx.execute(altered)))
    rows = wire.decode_reply(wire.success(opened.history()), "s")["data"]
    assert [row["action"] for row in rows] == ["act0", "?", "act2"]


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE ledger_ends SET last_seq = 1",
        f"UPDATE ledger_ends SET last_seq = {2**63 - 1}",
        "UPDATE ledger_ends SET last_hash = 'x'",
        "DELETE FROM ledger_ends",
        "UPDATE ledger SET seq = 4 WHERE seq = 3",
    ],
)
def test_a_ledger_that_cannot_be_continued_says_so(opened: Open, sql: str) -> None:
    for number in range(3):
        opened.record(f"act{number}", object="x")
    asyncio.run(opened.database.write(lambda tx: tx.execute(sql)))
    with pytest.raises(Unavailable, match="cannot continue the ledger of a-service"):
        opened.record("act", object="x")


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE ledger SET hash = 'x' WHERE seq = 3",
        "UPDATE ledger SET body = json_set(body, '$.time', 'never') WHERE seq = 1",
        "UPDATE ledger SET body = json_set(body, '$.time', 'never') WHERE seq = 1052",  # by which ages are told
        "UPDATE ledger SET body = substr(body, 2) WHERE seq = 1052",
        "DELETE FROM ledger WHERE seq = 1052",
        "UPDATE ledger SET body = substr(body, 2) WHERE seq = 3",
        ROTTEN.format(3),
        BLOB.format(3),
    ],
)
def test_no_row_keeps_others_from_being_shown_and_the_ledger_from_going_on(tmp_path: Path, sql: str) -> None:
    book = Open(tmp_path / "l.db", LedgerSettings(keep_rows=1200))

    def fill(tx: Transaction) -> None:
        for _ in range(1150):  # more than age alone leaves
            book.ledger.append(tx, Entry("done", ROOT_CALLER, "act", "x"))

    asyncio.run(book.database.write(fill))
    raw(tmp_path, sql)
    assert len(book.history(lines=2000)) == 1150 - sql.startswith("DELETE")
    asyncio.run(book.database.write(fill))
    (told,) = [row["message"] for row in book.history(lines=3000, failed=True)]
    assert re.search("has been altered|is missing", str(told))
    assert asyncio.run(book.ledger.audit())["problems"] == []
    book.database.close()


def test_the_ledger_goes_on_over_a_row_whose_bytes_on_the_disk_are_damaged(tmp_path: Path) -> None:
    path, settings = tmp_path / "l.db", LedgerSettings(keep_rows=100)
    book = Open(path, settings)
    for number in range(105):
        book.record("act", object=f"number {number}")
    book.database.close()
    path.write_bytes(path.read_bytes().replace(b'"number 3"', b'"number 3\n'))
    book = Open(path, settings)
    book.record("act", object="x")
    assert "row 4 has been altered" in str(book.history(failed=True)[0]["message"])
    book.database.close()


def test_pruning_by_number_keeps_the_chain_verifiable_and_says_so(tmp_path: Path) -> None:
    book = Open(tmp_path / "l.db", LedgerSettings(keep_rows=100))
    for number in range(250):
        book.record("act", object=str(number))
        audited = asyncio.run(book.ledger.audit())
        assert audited["problems"] == []
        assert audited["rows"] <= 106
    rows = book.history(lines=1000)
    assert rows[-1]["object"] == "249"
    assert {row["action"] for row in rows} == {"act", "prune"}
    pruned = [row for row in rows if row["action"] == "prune"][-1]
    assert pruned["actor"]["pid"] == os.getpid()
    assert pruned["after"] == {"first": audited["first"]}
    assert rows[0]["seq"] == audited["first"]
    raw(tmp_path, f"DELETE FROM ledger WHERE seq = {audited['first']}")
    assert asyncio.run(book.ledger.audit())["problems"] == [f"row {audited['first']} is missing"]
    book.database.close()


class Aged(Open):
    """A ledger that keeps ten days, with rows of any age, each on an object that is called after its days."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(path, LedgerSettings(keep_days=10))
        self._monkeypatch = monkeypatch
        self._now = time.time()

    def fill(self, age: float, number: int) -> None:
        def work(tx: Transaction) -> None:
            with self._monkeypatch.context() as patch:
                patch.setattr("circleosd.ledger.time", SimpleNamespace(time=lambda: self._now - age * 86400))
                for _ in range(number):
                    self.ledger.append(tx, Entry("done", ROOT_CALLER, "act", f"{age}"))

        asyncio.run(self.database.write(work))

    def ages(self) -> list[tuple[str, int]]:
        """The rows but those about pruning: how many of which age follow one another."""
        objects = [str(row["object"]) for row in self.history(lines=5000) if row["action"] == "act"]
        return [(age, len([*rows])) for age, rows in groupby(objects)]


@pytest.fixture
def aged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Aged]:
    book = Aged(tmp_path / "l.db", monkeypatch)
    yield book
    assert asyncio.run(book.ledger.audit())["problems"] == []
    book.database.close()


def test_pruning_by_age_keeps_what_is_young_and_the_newest_thousand(
    aged: Aged, monkeypatch: pytest.MonkeyPatch
) -> None:
    aged.fill(30, 1000)
    assert aged.ages() == [("30", 1000)], "the newest thousand are kept whatever their age"
    aged.fill(10.5, 99)
    aged.fill(1, 1)
    assert aged.ages() == [("30", 900), ("10.5", 99), ("1", 1)]
    assert aged.history()[-1]["action"] == "prune"
    aged.fill(1, 1400)
    assert aged.ages() == [("10.5", 99), ("1", 1401)], "what is a day beyond its time goes, what is not stays"
    aged.fill(-1.5, 99)
    monkeypatch.setattr("circleosd.pruning.PRUNED_AT_ONCE", 40)
    for number, left in enumerate((59, 19), 100):  # of the 99, which are beyond it now
        aged.fill(-1.5, 1)
        assert aged.ages() == [("10.5", left), ("1", 1401), ("-1.5", number)]
    aged.fill(-1.5, 1)
    assert aged.ages() == [("1", 1401), ("-1.5", 102)]


def test_a_clock_that_is_wrong_for_some_rows_prunes_none(aged: Aged) -> None:
    aged.fill(1, 1500)
    for wrong in (-5000, 20000):
        aged.fill(wrong, 99)
        aged.fill(1, 100)
    aged.fill(20000, 200)
    assert aged.ages() == [("1", 1500), ("-5000", 99), ("1", 100), ("20000", 99), ("1", 100), ("20000", 200)]


@pytest.mark.parametrize("later", [[("1", 1000), ("16", 99)], [("1", 950), ("16", 50), ("1", 99)]], ids=["is", "was"])
def test_a_clock_that_is_or_was_behind_for_some_rows_prunes_only_what_is_old_by_it(
    aged: Aged, later: list[tuple[str, int]]
) -> None:
    for age, number in [("30", 50), *later]:
        aged.fill(int(age), number)
    assert aged.ages() == later


def test_a_deleted_row_is_not_forgotten_by_pruning(tmp_path: Path) -> None:
    book = Open(tmp_path / "l.db", LedgerSettings(keep_rows=100))
    for _ in range(105):
        book.record("act", object="x")
    raw(tmp_path, "DELETE FROM ledger WHERE seq = 6")
    for _ in range(10):
        book.record("act", object="x")
    (pruned,) = [row for row in book.history() if row["action"] == "prune" and row["error"]]
    assert "row 6 is missing" in str(pruned["message"])
    assert asyncio.run(book.ledger.audit())["problems"] == []
    book.database.close()


@pytest.mark.parametrize("already", [50, 150])
def test_the_oldest_rows_removed_without_a_row_that_says_so_are_not_forgotten_by_pruning(
    tmp_path: Path, already: int
) -> None:
    book = Open(tmp_path / "l.db", LedgerSettings(keep_rows=100))
    for _ in range(already):
        book.record("act", object="x")
    cut = asyncio.run(book.ledger.audit())["first"] + 9
    raw(tmp_path, *(statement.format(cut) for statement in CUT))
    for _ in range(70):
        book.record("act", object="x")
    told = [str(row["message"]) for row in book.history(lines=1000) if row["action"] == "prune" and row["error"]]
    assert told == [f"not what CircleOSD wrote: no row records the removal of those before row {cut + 1}"]
    assert asyncio.run(book.ledger.audit())["problems"] == []
    book.database.close()


def test_history_takes_a_uid_for_a_user_and_a_glob_for_an_object(opened: Open) -> None:
    for name in ("web-1", "web-2", "db"):
        opened.record("start", object=name)
    assert [row["object"] for row in opened.history(object="web-*")] == ["web-1", "web-2"]
    assert len(opened.history(user="0")) == 3
    assert opened.history(user="1") == []
    for nobody in ("9" * 64, "٣", "²", "-1"):
        assert opened.history(user=nobody) == []


@pytest.mark.parametrize("glob", ["/srv/[1]/*", "*/[1]/?.wasm", "*[*", "*]*"])
def test_brackets_in_a_glob_for_an_object_stand_for_themselves(opened: Open, glob: str) -> None:
    for name in ("/srv/[1]/a.wasm", "/srv/1/a.wasm"):
        opened.record("load", object=name)
    assert [row["object"] for row in opened.history(object=glob)] == ["/srv/[1]/a.wasm"]


def test_a_repeated_refusal_is_one_row_and_a_count(opened: Open) -> None:
    async def scenario() -> None:
        refusal = Entry("denied", Caller(STRANGER), "stop", "nginx", error="denied", message="no")
        for _ in range(50):
            await opened.ledger.refuse(refusal)
        await opened.ledger.refuse(refusal._replace(object="apache"))
        await opened.ledger.close()

    asyncio.run(scenario())
    assert [(row["object"], row["count"]) for row in opened.history()] == [("nginx", 1), ("apache", 1), ("nginx", 49)]


def test_refusals_of_other_requests_or_for_other_reasons_have_their_own_rows(opened: Open) -> None:
    plain = Entry("denied", Caller(ROOT), "load", "counter", {"path": "/a.wasm"}, error="denied", message="not signed")

    async def scenario() -> None:
        for path, reason in (("/a.wasm", "not signed"), ("/a.wasm", "revoked"), ("/b.wasm", "not signed")):
            await opened.ledger.refuse(plain._replace(params={"path": path}, message=reason))
        for seconds in (3, 2, 1):
            await opened.ledger.refuse(plain._replace(error="limit", message=f"try again in {seconds} s"))
        await opened.ledger.close()

    asyncio.run(scenario())
    told = [(row["params"]["path"], row["message"], row["count"]) for row in opened.history()]
    assert told[:3] == [("/a.wasm", "not signed", 1), ("/a.wasm", "revoked", 1), ("/b.wasm", "not signed", 1)]
    assert told[3:] == [("/a.wasm", "try again in 3 s", 1), ("/a.wasm", "try again in 1 s", 2)]


def test_what_a_plugin_is_refused_in_calls_of_several_is_told_of_each(opened: Open) -> None:
    async def scenario() -> None:
        for name in ("alice", "bob", "alice"):
            caller, params = Caller(ROOT, plugin="healer"), {"called_by": name}
            await opened.ledger.refuse(Entry("denied", caller, "services.restart", "db", params, error="denied"))
        await opened.ledger.close()

    asyncio.run(scenario())
    told = [(row["params"]["called_by"], row["count"]) for row in opened.history()]
    assert told == [("alice", 1), ("bob", 1), ("alice", 1)]


def test_refusals_of_many_kinds_are_bounded_and_none_is_lost(opened: Open) -> None:
    async def scenario() -> None:
        for number in range(200):
            await opened.ledger.refuse(Entry("denied", Caller(STRANGER), "stop", f"unit{number}", error="denied"))
        await opened.ledger.close()

    asyncio.run(scenario())
    rows = opened.history(lines=1000)
    assert sum(row["count"] for row in rows) == 200
    assert len(rows) == 61
    assert rows[-1]["object"] is None
    assert "140 more refused attempts by this uid, of different kinds" in str(rows[-1]["message"])


def test_the_refusals_of_one_plugin_keep_no_other_from_a_row(opened: Open) -> None:
    busy, other = (Caller(ROOT, plugin=name) for name in ("busy", "other"))

    async def scenario() -> None:
        for number in range(62):
            await opened.ledger.refuse(Entry("denied", busy, "stop", f"unit{number}", error="denied"))
        await opened.ledger.refuse(Entry("denied", other, "stop", "nginx", error="denied"))
        await opened.ledger.refuse(Entry("denied", Caller(ROOT), "stop", "nginx", error="denied"))
        await opened.ledger.close()

    asyncio.run(scenario())
    rows = opened.history(lines=1000)[60:]
    assert [(row["actor"]["plugin"], row["count"]) for row in rows] == [("other", 1), (None, 1), ("busy", 2)]
    assert "2 more refused attempts by this plugin, of different kinds" in str(rows[-1]["message"])


def test_who_waits_until_the_service_has_exited_gets_no_more_rows_for_that(opened: Open) -> None:
    async def process(number: int) -> None:
        book = Ledger(opened.database, "a-service", opened.mirrored.append)
        for attempt in range(70):
            refusal = Entry("denied", Caller(STRANGER), "stop", f"unit{number}-{attempt}", error="denied")
            await book.refuse(refusal)
        await book.close()

    for number in range(3):
        asyncio.run(process(number))
    rows = opened.history(lines=1000)
    assert sum(row["count"] for row in rows) == 210
    assert len(rows) == 60 + 3
    opened.record("start", object="nginx", error="unit-failed", intent=1)  # an act is no refusal
    asyncio.run(Ledger(opened.database, "a-service", print).refuse(Entry("denied", ROOT_CALLER, "stop", "x")))
    assert opened.history()[-1]["actor"]["uid"] == 0, "another uid has its own allowance"


def test_a_person_with_thousands_of_uids_fills_no_more_rows_than_ten(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("circleosd.flood.ALLOWANCE", 6.0)
    monkeypatch.setattr(os, "getuid", lambda: 500)

    async def process() -> None:
        book = Ledger(opened.database, "a-service", opened.mirrored.append)
        for number in range(80):
            caller = Caller(Peer(100_000 + number, 100_000, 1))
            await book.refuse(Entry("denied", caller, "stop", "nginx", error="denied"))
        for caller in (Caller(STRANGER, Role.VIEWER, "vera"), Caller(Peer(500, 500, 1)), Caller(ROOT)):
            await book.refuse(Entry("denied", caller, "stop", "nginx", error="denied"))
        await book.close()

    asyncio.run(process())
    rows = opened.history(lines=1000)
    assert len(rows) == 60 + 3 + 1
    assert "20 more refused attempts by uids without a user, of different kinds" in str(rows[-1]["message"])
    asyncio.run(process())
    assert [row["count"] for row in opened.history(lines=1000)[64:]] == [1, 1, 1, 80], "an idle exit renews nothing"


def test_counted_refusals_are_written_when_their_time_has_come(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("circleosd.flood.WINDOW", 0.5)
    refusal = Entry("denied", Caller(STRANGER), "stop", "nginx", error="denied")

    async def scenario() -> None:
        # At once: to write the first may take longer than its window.
        await asyncio.gather(*(opened.ledger.refuse(refusal) for _ in range(3)))
        async with asyncio.timeout(SECONDS):
            async for row in opened.ledger.follow(Follow()):
                if row["count"] == 2:
                    break

    asyncio.run(scenario())


def test_refusals_that_found_the_disk_full_are_not_lost(opened: Open) -> None:
    refusal = Entry("denied", Caller(STRANGER), "stop", "x" * 100_000, error="denied")

    async def pages(number: int) -> None:
        await opened.database.write(lambda tx: tx.execute(f"PRAGMA max_page_count={number}"))

    async def attempts() -> None:
        await pages(1)  # as many as there are
        for _ in range(2):
            with pytest.raises(Unavailable, match="full"):
                await opened.ledger.refuse(refusal)
        await pages(10_000)
        for _ in range(3):
            await opened.ledger.refuse(refusal)
        await pages(1)
        with pytest.raises(Unavailable, match="full"):
            await opened.ledger.close()
        await pages(10_000)
        await opened.ledger.close()

    asyncio.run(attempts())
    assert [row["count"] for row in opened.history()] == [1, 2]


@pytest.mark.parametrize("begun", [False, True])
def test_counts_that_are_being_written_at_the_end_are_not_lost(
    opened: Open, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    monkeypatch.setattr("circleosd.flood.WINDOW", 0.5)
    refusal = Entry("denied", Caller(STRANGER), "stop", "nginx", error="denied")
    commit, may_end = opened.database._commit, threading.Event()

    def slow_commit() -> None:
        may_end.wait(SECONDS)
        commit()

    async def scenario() -> None:
        await asyncio.gather(*(opened.ledger.refuse(refusal) for _ in range(3)))
        monkeypatch.setattr(opened.database, "_commit", slow_commit)
        if not begun:  # another's write is in hand
            other = asyncio.create_task(opened.database.write(lambda tx: None))
        await until(lambda: not opened.ledger._flood.next_end())
        closing = asyncio.create_task(opened.ledger.close())
        await asyncio.sleep(0.05)
        may_end.set()
        async with asyncio.timeout(SECONDS):
            await closing
        if not begun:
            await other

    asyncio.run(scenario())
    assert [row["count"] for row in opened.history()] == [1, 2]


@pytest.mark.parametrize("written", [0, 2])
def test_who_follows_is_told_that_the_record_is_another_one(opened: Open, written: int) -> None:
    for number in range(written):
        opened.record("act", object=str(number))
    with pytest.raises(Conflict, match=f"was replaced: it ends with row {written}, but row 3"):
        asyncio.run(anext(opened.ledger.follow(Follow(after=3))))


def test_a_follower_gets_what_is_there_and_what_comes_in_order(opened: Open) -> None:
    async def scenario() -> list[int]:
        seen: list[int] = []
        async with (
            asyncio.timeout(SECONDS),
            contextlib.aclosing(opened.ledger.follow(Follow(action_name="act"))) as rows,
        ):
            async for row in rows:
                seen.append(row["seq"])
                if row["seq"] == 3:  # while somebody waits, and from another task
                    task = asyncio.create_task(fill(500))
                if row["seq"] == 1003:
                    break
        await task
        assert not opened.ledger._followers, "who has gone is forgotten"
        return seen

    async def fill(number: int) -> None:
        def work(tx: Transaction) -> None:
            for _ in range(number):
                opened.ledger.append(tx, Entry("done", ROOT_CALLER, "other", "x"))
                opened.ledger.append(tx, Entry("done", ROOT_CALLER, "act", "x"))

        await opened.database.write(work)

    for _ in range(3):
        opened.record("act", object="x")
    assert asyncio.run(scenario()) == [1, 2, 3, *range(5, 1004, 2)]


def test_a_follower_gets_what_comes_after_the_clock_was_set_back(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.time()

    async def scenario() -> list[str | None]:
        seen = []
        async with (
            asyncio.timeout(SECONDS),
            contextlib.aclosing(opened.ledger.follow(Follow(since=began))) as rows,
        ):
            async for row in rows:
                seen.append(row["object"])
                if row["object"] == "later":
                    return seen
                writing = asyncio.create_task(set_back())
        await writing
        return seen

    async def set_back() -> None:
        clock = SimpleNamespace(time=lambda: began - 7200, monotonic=time.monotonic)
        monkeypatch.setattr("circleosd.ledger.time", clock)
        await opened.ledger.record(Entry("done", ROOT_CALLER, "act", "later"))

    with monkeypatch.context() as patch:
        patch.setattr("circleosd.ledger.time", SimpleNamespace(time=lambda: began - 60, monotonic=time.monotonic))
        opened.record("act", object="earlier")
    opened.record("act", object="now")
    assert asyncio.run(scenario()) == ["now", "later"]


def test_an_intent_is_unfinished_until_its_outcome(opened: Open) -> None:
    async def scenario() -> list[list[int]]:
        found = []
        intent = Entry("intent", ROOT_CALLER, "start", "nginx")
        first, second = await opened.ledger.record(intent), await opened.ledger.record(intent)
        found.append([row["seq"] for row in await opened.ledger.unfinished()])
        await opened.ledger.record(Entry("outcome", ROOT_CALLER, "start", "nginx", intent=first))
        found.append([row["seq"] for row in await opened.ledger.unfinished()])
        await opened.ledger.record(Entry("outcome", ROOT_CALLER, "start", "nginx", intent=second))
        found.append([row["seq"] for row in await opened.ledger.unfinished()])
        return found

    assert asyncio.run(scenario()) == [[1, 2], [2], []]


def test_long_parameters_are_cut_and_documents_only_measured() -> None:
    assert ledger.shown("x" * 300) == "x" * 256 + "…"
    assert ledger.shown({"password": "secret"}) == "(22 bytes of JSON)"
    plain: list[object] = [None, True, 5, "text", []]
    assert [ledger.shown(value) for value in plain] == plain


def test_an_actor_whose_program_has_no_utf8_name_is_told_and_recorded(opened: Open, tmp_path: Path) -> None:
    program = os.fsdecode(os.fsencode(tmp_path) + b"/pro\xffgram")
    # Not a program of coreutils, which may be all of them in one, told apart by their names.
    shutil.copy(str(shutil.which("bash")), program)
    with subprocess.Popen([program, "-c", "read"], stdin=subprocess.PIPE) as running:
        refusal = Entry("denied", Caller(Peer(os.getuid(), os.getgid(), running.pid)), "stop", "nginx", error="denied")
        asyncio.run(opened.ledger.refuse(refusal))
        running.kill()
    assert opened.history()[0]["actor"]["exe"] == f"{tmp_path}/pro\\xffgram"


def test_a_refusal_that_cannot_be_recorded_takes_no_other_with_it(
    opened: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("circleosd.flood.WINDOW", 0.05)
    refusal = Entry("denied", Caller(STRANGER), "stop", "nginx", error="denied")
    odd = refusal._replace(object="odd", before=object())  # no JSON

    async def scenario() -> None:
        await opened.ledger.refuse(refusal)
        await opened.ledger.refuse(refusal)
        for _ in range(2):
            with pytest.raises(TypeError):
                await opened.ledger.refuse(odd)
        async with asyncio.timeout(SECONDS):
            async for row in opened.ledger.follow(Follow(after=1)):
                assert (row["object"], row["count"]) == ("nginx", 1)
                return

    asyncio.run(scenario())


def test_a_journal_that_fails_does_not_undo_what_is_on_disk(opened: Open, caplog: pytest.LogCaptureFixture) -> None:
    def broken(event: Event) -> None:
        raise OSError("no journal")

    opened.ledger._mirror = broken
    assert opened.record("act", object="x") == 1
    assert len(opened.history()) == 1
    assert "no journal" in caplog.text
