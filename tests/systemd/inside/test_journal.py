"""The log of a unit on a booted systemd (see conftest.py)."""

from __future__ import annotations

import asyncio
import os
import pwd
import shlex
import sys
import threading
import time
from contextlib import aclosing
from pathlib import Path

import pytest

from circleosd.api.registry import MAX_LINES
from circleosd.registry import catalog
from circleosd.registry.units import LogLine
from circleosd.systemd import logs
from circleosd.systemd.journal import ROW
from circleosd.systemd.units import SystemdUnits
from tests.systemd.inside.conftest import on_systemd, python_as, run
from tests.waiting import SECONDS, until, wait_until

pytestmark = pytest.mark.usefixtures("machine")

NEXT = iter(range(10**6))


def say(script: str, user: str = "root", unit: str = "") -> str:
    """Run a shell script in a transient unit; return the unit's name. Its lines are in the journal then."""
    unit = unit or f"ct-say-{os.getpid()}-{next(NEXT)}.service"
    run("systemd-run", "--quiet", "--wait", f"--uid={user}", f"--unit={unit}", "sh", "-c", script)
    run("journalctl", "--sync")
    return unit


def texts(lines: list[LogLine]) -> list[str]:
    """What was said, without systemd's own words about the unit."""
    return [line.text for line in lines if "ct-say" not in line.text]


def tail(unit: str, lines: int, since: float | None = None) -> list[LogLine]:
    return on_systemd(lambda manager: manager.logs(unit, lines, since))


def test_the_last_lines_come_oldest_first_with_their_times() -> None:
    before = time.time()
    unit = say("for i in 1 2 3 4 5; do echo line $i; done")
    found = tail(unit, 100)
    assert texts(found) == ["line 1", "line 2", "line 3", "line 4", "line 5"]
    assert [line.time for line in found] == sorted(line.time for line in found)
    assert before - 1 < found[0].time <= found[-1].time < time.time() + 1
    assert any("Deactivated successfully" in line.text for line in found)  # systemd about the unit
    assert tail(unit, 2) == found[-2:]
    assert tail(unit, 0) == []


def test_a_log_is_there_without_the_bus() -> None:
    unit = say("echo still here")
    manager = SystemdUnits("system", timeout=5, env={"DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/nonexistent"})
    assert texts(asyncio.run(manager.logs(unit, 9))) == ["still here"]


def test_only_lines_since_a_moment() -> None:
    unit = say("echo early; sleep 0.3; echo late")
    late = next(line for line in tail(unit, 100) if line.text == "late")
    assert texts(tail(unit, 100, late.time - 0.1)) == ["late"]
    assert tail(unit, 100, time.time() + 60) == []


def test_only_lines_of_that_unit() -> None:
    one, other = say("echo mine"), say("echo not mine")
    assert texts(tail(one, 100)) == ["mine"]
    assert texts(tail(other, 100)) == ["not mine"]
    assert tail("ct-absent.service", 100) == []


def test_what_a_service_logs_as_a_person_is_among_its_lines(stranger: pwd.struct_passwd) -> None:
    unit = say("echo mine", stranger.pw_name)
    assert [*Path("/var/log/journal").glob(f"*/user-{stranger.pw_uid}.journal")]  # and not in the system's
    assert texts(tail(unit, 100)) == ["mine"]


def test_whatever_is_logged_becomes_plain_text() -> None:
    unit = say(r"""printf 'bad \377 utf-8\n\033[31mred\033[0m\n\tindented é\n'; printf 'nul\000byte\n'""")
    bad, red, indented, *rest = texts(tail(unit, 100))
    assert bad == "bad \N{REPLACEMENT CHARACTER} utf-8"
    assert red == "\N{REPLACEMENT CHARACTER}[31mred\N{REPLACEMENT CHARACTER}[0m"
    assert indented == "\tindented é"
    assert rest == ["nul", "byte"]  # journald ends a line there


@pytest.mark.parametrize("own", ["", *(entry.unit for entry in catalog.OWN)])
def test_rows_of_the_ledger_are_not_among_the_lines(own: str) -> None:
    script = """
import subprocess
from circleosd.systemd.journal import Mirror
actor = {"user": None, "uid": 0, "plugin": None}
row = {"actor": actor, "action": "grant", "object": "alice", "before": None, "after": None, "error": None}
mirror = Mirror()
mirror({**row, "message": None, "phase": "done", "service": "s", "seq": 1})
print("not a row", flush=True)
subprocess.run(["journalctl", "--sync"], check=True)  # while this process can still be told from others
"""
    unit = say(f"PYTHONPATH={':'.join(sys.path)} {shlex.join([sys.executable, '-c', script])}", unit=own)
    assert "grant alice: done" in run("journalctl", "--output=cat", f"--unit={unit}")
    found = tail(unit, 10)
    assert [text for text in texts(found) if unit not in text] == ["not a row"]
    assert any("Deactivated successfully" in line.text for line in found)
    if own:  # there may be very many of them
        source = logs.Source(unit, "system")
        with logs._about(source) as reader:
            assert [entry for entry in logs._backwards(reader, source, None) if ROW in entry] == []


def test_no_other_field_of_an_entry_hides_its_message() -> None:
    script = """
import subprocess
from systemd import journal
journal.sendv("MESSAGE=said", f"COREDUMP_TIMESTAMP={10**30}", "PRIORITY=high", "MESSAGE_ID=none", "MESSAGE_ID=two")
subprocess.run(["journalctl", "--sync"], check=True)  # while this process can still be told from others
"""
    assert texts(tail(say(shlex.join([sys.executable, "-c", script])), 10)) == ["said"]


def test_a_message_of_several_lines_becomes_several_lines() -> None:
    script = """
import subprocess
from systemd import journal
journal.send("first\\nlast")
subprocess.run(["journalctl", "--sync"], check=True)  # while this process can still be told from others
"""
    unit = say(shlex.join([sys.executable, "-c", script]))
    assert texts(tail(unit, 100)) == ["first", "last"]
    assert tail(unit, 2)[0].text == "last"


def test_a_long_line_and_a_great_number_are_cut() -> None:
    unit = say("head -c 20000 /dev/zero | tr '\\0' x; echo; seq 3000")
    found = tail(unit, 10**9)
    assert len(found) == MAX_LINES
    assert "3000" in texts(found)
    unit = say("head -c 20000 /dev/zero | tr '\\0' x")
    assert texts(tail(unit, 100)) == ["x" * logs.MAX_TEXT]


def test_followed_lines_come_as_they_are_logged() -> None:
    unit = f"ct-say-follow-{os.getpid()}.service"

    async def act(manager: SystemdUnits) -> list[str]:
        seen = []
        async with aclosing(manager.follow(unit, 5)) as lines:
            first = asyncio.ensure_future(anext(lines))
            await asyncio.to_thread(
                run, "systemd-run", "--quiet", f"--unit={unit}", "sh", "-c",
                "echo one; sleep 0.3; echo two; journalctl --rotate; echo three; sleep infinity",
            )  # fmt: skip
            seen.append((await first).text)
            async with asyncio.timeout(SECONDS):
                async for line in lines:
                    seen.append(line.text)
                    if line.text == "three":
                        break
        async with aclosing(manager.follow(unit, 1)) as lines:
            seen.append((await anext(lines)).text)
        return [text for text in seen if "ct-say" not in text]

    before = descriptors()
    try:
        assert on_systemd(act) == ["one", "two", "three", "three"]
    finally:
        run("systemctl", "stop", unit)
    assert descriptors() == before


def test_a_thousand_lines_at_once_are_followed_in_order(tmp_path: Path) -> None:
    unit, go = f"ct-say-burst-{os.getpid()}.service", tmp_path / "go"
    script = f"echo followed; until [ -e {go} ]; do sleep 0.05; done; seq 1000"

    async def act(manager: SystemdUnits) -> list[str]:
        seen: list[str] = []
        await asyncio.to_thread(run, "systemd-run", "--quiet", f"--unit={unit}", "sh", "-c", script)
        async with asyncio.timeout(SECONDS), aclosing(manager.follow(unit, 5)) as lines:
            for last in ("followed", "1000"):
                while last not in seen:
                    seen.append((await anext(lines)).text)
                go.touch()
        return [text for text in seen if text.isdigit()]

    assert on_systemd(act) == [str(number) for number in range(1, 1001)]


def test_a_follower_that_goes_away_while_it_waits_leaves_nothing() -> None:
    async def act(manager: SystemdUnits) -> None:
        async def forever() -> None:
            async for _ in manager.follow("ct-absent.service", 5):
                pass

        tasks = [asyncio.create_task(forever()) for _ in range(5)]
        await until(lambda: sum(thread.name.startswith("journal") for thread in threading.enumerate()) == 5)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert all(task.cancelled() for task in tasks)

    before = descriptors()
    on_systemd(act)
    assert descriptors() == before


def test_a_member_of_systemd_journal_may_read(stranger: pwd.struct_passwd) -> None:
    code = """
import asyncio
from circleosd.systemd.units import SystemdUnits
print(len(asyncio.run(SystemdUnits("system", timeout=5).logs("dbus.service", 3))))
"""
    assert python_as(stranger, code, groups=["systemd-journal"]) == "3\n"


def test_what_another_service_or_a_person_says_about_a_unit_is_not_in_its_log(stranger: pwd.struct_passwd) -> None:
    unit = say("echo true")
    code = """
import os
from systemd import journal
journal.send("forged", UNIT=os.environ["NAMED"])
"""
    for forger in (pwd.getpwnam("nobody"), stranger):
        python_as(forger, code, NAMED=unit)
    run("journalctl", "--sync")
    assert run("journalctl", "--output=cat", f"UNIT={unit}").count("forged") == 2
    assert texts(tail(unit, 100)) == ["true"]


def descriptors() -> int:
    """How many are open, once no follower of this or an earlier test is being closed any more."""
    wait_until(lambda: not any(thread.name.startswith("journal") for thread in threading.enumerate()))
    return len(os.listdir("/proc/self/fd"))
