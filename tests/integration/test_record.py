"""The record over real sockets: who did what, in one order over all services, and whether it is whole."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import time
from typing import Any

import pytest

from tests.door import answer
from tests.integration.conftest import NewHost
from tests.integration.embedded_host import BIN, EmbeddedHost
from tests.integration.people import create, log_circlectl_in
from tests.waiting import SECONDS


def history(host: EmbeddedHost, *flags: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(host.ok("system", "history", "--json", *flags))
    return rows


def test_who_stopped_this_and_when(host: EmbeddedHost) -> None:
    host.add_service("web")
    log_circlectl_in(host, "olga", role="operator")
    session = json.loads(host.ok("user", "whoami", "--json"))["session"]
    host.ok("service", "start", "web")
    since = time.time()
    host.ok("service", "stop", "web")
    host.ok("user", "logout")
    intent, outcome = history(host, "--object", "web", "--action", "stop", "--since", str(since))
    assert (intent["phase"], outcome["phase"], outcome["intent"]) == ("intent", "outcome", intent["seq"])
    assert (outcome["before"], outcome["after"], outcome["error"]) == ("active", "inactive", None)
    assert outcome["duration"] > 0
    assert since <= intent["time"] <= outcome["time"] <= time.time()
    actor = outcome["actor"]
    assert {key: actor[key] for key in ("uid", "gid", "user", "session", "plugin")} == {
        "uid": os.getuid(), "gid": os.getgid(), "user": "olga", "session": session, "plugin": None,
    }  # fmt: skip
    assert actor["exe"] == os.path.realpath(BIN / "python3")
    assert {"unit", "login"} <= set(actor)
    shown = host.ok("system", "history", "--object", "web", "--action", "service:stop")
    assert "olga/" in shown
    assert "active → inactive" in shown


def test_so_many_lines_are_so_many_acts(host: EmbeddedHost) -> None:
    host.add_service("busy")
    for _ in range(3):
        host.ok("service", "start", "busy")
        host.ok("service", "stop", "busy")
    shown = host.ok("system", "history", "--object", "busy", "--lines", "4").splitlines()
    assert [line.split()[4] for line in shown[1:]] == ["start", "stop", "start", "stop"]
    rows = history(host, "--object", "busy", "--lines", "4")
    assert [row["phase"] for row in rows] == ["intent", "outcome"] * 4
    assert len(history(host, "--object", "busy", "--lines", "10000")) == 12
    for wrong in ("-1", "10001"):
        done = host.ctl("system", "history", "--lines", wrong)
        assert done.returncode == 2
        assert f"{wrong} is not between 0 and 10000" in done.stderr


def test_an_action_that_no_row_can_have_is_refused(host: EmbeddedHost) -> None:
    for wrong in ("service:halt", "halt", "system:status", "user:stop", "service:", ""):
        done = host.ctl("system", "history", "--action", wrong)
        assert (done.returncode, done.stdout) == (2, ""), wrong
        first = "service:list" if wrong.startswith("service:") else "user:create"
        assert f"no action {wrong!r}; available: {first}, " in done.stderr
    for right in ("service:stop", "stop", "prune", "quarantine", "services.restart"):
        host.ok("system", "history", "--action", right)


@pytest.mark.usefixtures("other_users")
def test_history_is_filtered_over_all_services_in_one_order(host: EmbeddedHost) -> None:
    for service, request in [
        ("auth-service", {"action": "delete", "name": "x"}),
        ("service-registry", {"action": "stop", "name": "x"}),
        ("plugin-manager", {"action": "unload", "id": "x"}),
        ("auth-service", {"action": "disable", "name": "x"}),
    ]:
        assert answer(str(host.runtime), (61500, service, request))["error"] == "denied"
    rows = history(host, "--user", "61500", "--failed")
    assert [row["action"] for row in rows] == ["delete", "stop", "unload", "disable"]
    assert [row["time"] for row in rows] == sorted(row["time"] for row in rows)
    assert {row["object"] for row in rows} == {"x"}
    assert [row["action"] for row in history(host, "--user", "61500", "--action", "user:delete")] == ["delete"]
    assert [row["action"] for row in history(host, "--user", "61500", "--lines", "2")] == ["unload", "disable"]
    assert history(host, "--user", "61500", "--since", "1h") == rows
    assert history(host, "--user", "61500", "--since", str(time.time())) == []
    assert [row["action"] for row in history(host, "--user", "61500", "--object", "x*")] == [
        row["action"] for row in rows
    ]


@pytest.mark.usefixtures("other_users")
def test_a_flood_of_denied_attempts_leaves_few_rows_that_count_them_all(new_host: NewHost) -> None:
    host = new_host({})
    host.open_to_everybody()
    pid = host.pid("service-registry")
    size = host.database("registry").parent
    begun = time.monotonic()
    for number in range(400):
        name = "web" if number % 2 else f"unit{number}"
        assert answer(str(host.runtime), (61501, "service-registry", {"action": "stop", "name": name}))["error"]
    assert sum(path.stat().st_size for path in size.iterdir()) < 2_000_000
    host.stop()
    host.start()
    assert host.pid("service-registry") != pid
    rows = history(host, "--user", "61501", "--lines", "1000")
    assert len(rows) <= 70 + (time.monotonic() - begun) / 5  # two every ten seconds
    assert sum(row["count"] for row in rows) == 400, "what was only counted is written when the service ends"
    assert "×" in host.ok("system", "history", "--user", "61501")


def test_verify_finds_what_was_done_to_the_file(new_host: NewHost) -> None:
    host = new_host({})
    for number in range(4):
        host.ctl("service", "start", f"missing{number}")
    create(host, "vera")
    whole = host.ok("system", "history", "--verify")
    assert host.data("auth-service", "audit")["hash"] in whole, "the hash is there to be kept elsewhere"
    assert whole.count("intact") == 3
    with sqlite3.connect(host.database("registry")) as connection:
        connection.execute("UPDATE ledger SET body = json_set(body, '$.actor.uid', 12345) WHERE seq = 3")
    connection.close()
    found = host.ctl("system", "history", "--verify")
    assert found.returncode == 7
    assert "service-registry: row 3 has been altered" in found.stderr
    assert found.stdout.count("intact") == 2
    audited = json.loads(host.ctl("system", "history", "--verify", "--json").stdout)
    assert [bool(item["problems"]) for item in audited] == [False, True, False]
    for more in (["--user", "vera"], ["--follow"], ["--lines", "5"]):
        refused = host.ctl("system", "history", "--verify", *more)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert "--verify checks the whole record" in refused.stderr


def test_retention_is_configured_and_a_pruned_ledger_verifies(new_host: NewHost) -> None:
    host = new_host({"CIRCLEOSD_LEDGER_KEEP_ROWS": "20"})
    for number in range(30):
        host.call("service-registry", {"action": "start", "name": f"missing{number}"})
    rows = history(host, "--lines", "1000")
    assert rows[0]["seq"] > 1
    assert len(rows) <= 22
    assert any(row["action"] == "prune" for row in rows)
    assert host.ok("system", "history", "--verify").count("intact") == 3


class Follower:
    """`circlectl system history --follow --json` in a process; `rows` are what it has printed so far."""

    def __init__(self, host: EmbeddedHost, *flags: str) -> None:
        self.path = host.directory / f"followed-{time.monotonic_ns()}"
        with self.path.open("wb") as out:
            self.process = host.begin("system", "history", "--follow", "--json", *flags, stdout=out)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        assert self.process.stderr
        self.process.stderr.close()
        return self.process.wait(SECONDS)


def test_follow_goes_on_with_what_is_done_also_when_a_service_starts_anew(new_host: NewHost) -> None:
    host = new_host({})
    host.call("service-registry", {"action": "start", "name": "before"})
    follower = Follower(host, "--failed")
    try:
        host.wait_for(lambda: [row["object"] for row in follower.rows] == ["before"])
        host.call("plugin-manager", {"action": "unload", "id": "during"})
        host.wait_for(lambda: [row["object"] for row in follower.rows] == ["before", "during"])
        host.call("service-registry", {"action": "start", "name": "then"})
        host.wait_for(lambda: [row["object"] for row in follower.rows] == ["before", "during", "then"])
        os.kill(host.pid("service-registry"), signal.SIGKILL)
        host.call("service-registry", {"action": "start", "name": "after"})
        host.wait_for(lambda: "after" in [row["object"] for row in follower.rows])
        assert [row["object"] for row in follower.rows] == ["before", "during", "then", "after"]
        assert [row["service"] for row in follower.rows][1:] == ["plugin-manager", *["service-registry"] * 2]
    finally:
        assert follower.stop() == 130


def test_who_follows_without_a_line_of_before_sees_only_what_comes(new_host: NewHost) -> None:
    host = new_host({})
    create(host, "watched")
    assert history(host, "--lines", "0") == []
    follower = Follower(host, "--lines", "0")

    def seen() -> list[Any]:
        host.data("auth-service", "role", name="watched", role="viewer")  # again: it may begin late
        return [row["action"] for row in follower.rows]

    try:
        host.wait_for(seen)
        assert set(seen()) == {"role"}
    finally:
        assert follower.stop() == 130


def test_who_follows_is_told_of_a_service_that_cannot_be_asked_and_sees_what_the_others_do(new_host: NewHost) -> None:
    host = new_host({})
    host.call("service-registry", {"action": "start", "name": "before"})
    (host.runtime / "plugin-manager.sock").rename(host.runtime / "elsewhere.sock")
    follower = Follower(host)
    try:
        assert follower.process.stderr
        told = follower.process.stderr.readline()
        assert "plugin-manager is not listening" in told
        assert told.endswith(" [unavailable]; meanwhile showing the others\n")
        host.wait_for(lambda: [row["object"] for row in follower.rows] == ["before"])
        host.call("service-registry", {"action": "start", "name": "during"})
        host.wait_for(lambda: [row["object"] for row in follower.rows] == ["before", "during"])
        (host.runtime / "elsewhere.sock").rename(host.runtime / "plugin-manager.sock")
        host.call("plugin-manager", {"action": "unload", "id": "after"})
        host.wait_for(lambda: [row["object"] for row in follower.rows] == ["before", "during", "after"])
    finally:
        assert follower.stop() == 130


def test_who_follows_where_no_service_can_be_asked_is_told_so(host: EmbeddedHost) -> None:
    done = host.ctl("system", "history", "--follow", env={"CIRCLEOSD_RUNTIME_DIR": str(host.directory / "nowhere")})
    assert (done.returncode, done.stdout) == (12, "")
    assert "[unavailable]" in done.stderr


@pytest.mark.usefixtures("other_users")
def test_who_is_no_admin_follows_nothing(host: EmbeddedHost) -> None:
    for action in ("history", "follow", "audit"):
        reply = answer(str(host.runtime), (61502, "service-registry", {"action": action}))
        assert reply["error"] == "denied"


def test_secrets_are_not_in_the_record(host: EmbeddedHost) -> None:
    host.ok("user", "create", "sara", "--password-stdin", stdin="first secret one\n")
    host.ok("user", "passwd", "sara", "--password-stdin", stdin="second secret one\n")
    host.ctl("user", "login", "sara", "--password-stdin", stdin="third secret one\n")
    host.data("auth-service", "passwd", name="sara", old="second secret one", password="fourth secret one")
    rows = history(host, "--object", "sara")
    assert [row["action"] for row in rows] == ["create", "passwd", "login", "passwd"]
    assert "secret" not in json.dumps(rows)
    assert rows[0]["params"] == {"name": "sara"}
