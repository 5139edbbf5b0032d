"""A service that can write no more, as on a full disk: it says so, goes on reading, and recovers by itself."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import NewHost
from tests.integration.embedded_host import EmbeddedHost, read_reply
from tests.integration.people import log_circlectl_in


def let_write(host: EmbeddedHost, service: str, *, anything: bool) -> None:
    """Bound the size of the files that a service may write (setrlimit(2), RLIMIT_FSIZE), or do not."""
    _, hard = resource.prlimit(host.pid(service), resource.RLIMIT_FSIZE)
    resource.prlimit(host.pid(service), resource.RLIMIT_FSIZE, (hard if anything else 1, hard))


def test_what_cannot_be_written_is_refused_with_the_reason_and_works_again(new_host: NewHost) -> None:
    host = new_host({})
    host.ok("user", "create", "alice", "--uid", "4242")
    pid = host.pid("auth-service")
    let_write(host, "auth-service", anything=False)
    refused = host.ctl("user", "role", "alice", "operator")
    assert refused.returncode == 12
    why = "disk I/O error; perhaps a quota is used up, or the disk is failing"
    assert refused.stderr == f"circlectl: cannot use auth.db: {why} [unavailable]\n"
    assert json.loads(host.ok("user", "show", "alice", "--json"))["role"] == "viewer"
    let_write(host, "auth-service", anything=True)
    host.ok("user", "role", "alice", "operator")
    rows = json.loads(host.ok("system", "history", "--json"))
    assert [(row["action"], row["phase"]) for row in rows] == [("create", "done"), ("role", "done")]
    assert host.pid("auth-service") == pid


def test_what_cannot_be_written_at_the_end_is_no_failure_of_the_service(new_host: NewHost) -> None:
    host = new_host({"CIRCLEOSD_SERVER_IDLE_EXIT": "1"})
    log_circlectl_in(host, "alice")
    host.ok("user", "whoami")  # a use of the session that is in memory only
    let_write(host, "auth-service", anything=False)
    host.wait_for(lambda: "data that was only in memory is lost" in host.log)
    status = host.data("service-registry", "status", name="auth-service")
    assert (status["state"], status["result"]) == ("inactive", "success")


def test_a_database_that_was_removed_is_not_written_to(new_host: NewHost) -> None:
    host = new_host({"CIRCLEOSD_SERVER_IDLE_EXIT": "1"})
    database = host.database("auth")
    aside = database.with_suffix(".aside")
    with host.connect("auth-service"):  # until then it is not idle, however long this takes
        host.ok("user", "create", "alice", "--uid", "4242")
        database.rename(aside)
        for command in (("user", "create", "bob", "--uid", "4243"), ("system", "history", "--verify")):
            refused = host.ctl(*command)
            assert refused.returncode == 12
            assert "auth.db: it was removed or replaced" in refused.stderr
        assert "alice" in host.ok("user", "list")
        assert not database.exists()
        aside.rename(database)
        host.ok("user", "create", "bob", "--uid", "4243")
    host.wait_for(lambda: host.data("service-registry", "status", name="auth-service")["state"] == "inactive")
    assert "bob" in host.ok("user", "list")
    assert host.ctl("system", "history", "--verify").returncode == 0


def test_history_shows_one_record_also_while_another_service_takes_no_more_clients(new_host: NewHost) -> None:
    host = new_host({"CIRCLEOSD_SERVER_MAX_CONNECTIONS_PER_UID": "3"})
    host.add_service("web")
    host.ok("service", "start", "web")
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            sock = stack.enter_context(host.connect("auth-service"))
            sock.sendall(b'{"action":"health"}\n')
            assert read_reply(sock)["ok"]
        for command in (("system", "history"), ("system", "history", "--verify")):
            found = host.ctl(*command)
            assert found.returncode == 8, found.stderr
            assert "service-registry" in found.stdout


def test_verify_tells_of_one_record_also_while_another_cannot_be_asked(new_host: NewHost) -> None:
    host = new_host({"CIRCLEOSD_SERVER_IDLE_EXIT": "0.5"})
    host.add_service("web")
    host.ok("service", "start", "web")
    host.wait_for(lambda: host.data("service-registry", "status", name="auth-service")["state"] == "inactive")
    host.database("auth").parent.mkdir(exist_ok=True)
    host.database("auth").write_bytes(b"no database" * 1000)
    lacking = host.ctl("system", "history", "--verify")
    assert lacking.returncode == 12
    assert "service-registry  2" in lacking.stdout
    with sqlite3.connect(host.database("registry")) as raw:
        raw.execute("UPDATE ledger SET body = replace(body, 'web', 'wob')")
    raw.close()
    broken = host.ctl("system", "history", "--verify")
    assert broken.returncode == 7
    assert "service-registry: row 1 has been altered" in broken.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it mounts a file system that gets full")
@pytest.mark.parametrize(
    ("size", "fill", "lacking"),
    [
        ("size=1m", "(place / 'rest').write_bytes(bytes(1 << 20))", "space is"),
        ("nr_inodes=9", "for number in range(9): (place / str(number)).touch()", "inodes are"),
    ],
)
def test_a_database_that_cannot_be_opened_for_lack_of_room_says_so(
    tmp_path: Path, size: str, fill: str, lacking: str
) -> None:
    program = f"""
import contextlib, pathlib
from circleosd import database, rows
place = pathlib.Path({str(tmp_path)!r})
database.Database(place / "l.db", (rows.LEDGER_SCHEMA,)).close()
with contextlib.suppress(OSError):
    {fill}
try:
    database.Database(place / "l.db", (rows.LEDGER_SCHEMA,))
except database.Unavailable as error:
    print(error)
"""
    mounted = 'mount -t tmpfs -o "$4" tmpfs "$1" && exec "$2" -c "$3"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mounted, "sh", tmp_path, sys.executable, program, size],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    if "mount: " in done.stderr or "unshare: " in done.stderr:
        pytest.skip(f"no mounts here: {done.stderr}")
    assert done.stdout == f"cannot open {tmp_path}/l.db: no {lacking} left on its disk\n", done.stderr
