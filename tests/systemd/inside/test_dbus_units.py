"""The registry's service manager on a booted systemd (see conftest.py)."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import subprocess
from contextlib import aclosing
from pathlib import Path
from typing import Any, get_args

import pytest

from circleosd.errors import BadRequest, Conflict, NotFound, Timeout, Unavailable
from circleosd.registry.units import UnitState, Verb
from circleosd.systemd import bus, logs
from circleosd.systemd.names import object_path, switch_unit
from circleosd.systemd.units import METHODS, SystemdUnits, bus_address
from tests.systemd.inside.conftest import UNIT_FILES, on_systemd, python_as, run, watching
from tests.waiting import SECONDS

pytestmark = pytest.mark.usefixtures("unit_files")


def job(verb: Verb, unit: str, **options: float) -> str:
    return on_systemd(lambda manager: manager.job(verb, unit), **options)


def detail(unit: str) -> UnitState:
    return on_systemd(lambda manager: manager.detail(unit))


def test_every_verb_is_a_method_of_systemd() -> None:
    assert set(METHODS) == set(get_args(Verb))


def test_start_stop_and_restart_wait_until_it_is_done() -> None:
    async def act(manager: SystemdUnits) -> None:
        assert await manager.job("start", "ct-sleep.service") == "done"
        started = await manager.detail("ct-sleep.service")
        assert (started.load, started.active, started.sub, started.result) == ("loaded", "active", "running", "success")
        assert started.pid is not None
        assert Path(f"/proc/{started.pid}/comm").read_text() == "sleep\n"
        assert (started.memory or 0) > 0
        assert started.restarts == 0
        assert started.exit_status is None
        assert abs((started.since or 0) - os.stat(f"/proc/{started.pid}").st_ctime) < 5
        assert await manager.job("restart", "ct-sleep.service") == "done"
        restarted = await manager.detail("ct-sleep.service")
        assert restarted.pid not in (None, started.pid)
        assert await manager.job("reload", "ct-sleep.service") == "done"
        assert await manager.job("stop", "ct-sleep.service") == "done"
        (stopped,) = await manager.states(["ct-sleep.service"])
        assert (stopped.active, stopped.sub) == ("inactive", "dead")
        assert not Path(f"/proc/{restarted.pid}").exists()

    on_systemd(act)


def test_more_questions_at_once_than_the_bus_allows_of_one_connection_are_all_answered() -> None:
    async def act(manager: SystemdUnits) -> list[UnitState]:
        return await asyncio.gather(*(manager.detail("dbus.service") for _ in range(500)))

    assert {state.active for state in on_systemd(act)} == {"active"}


def test_starting_what_runs_and_stopping_what_does_not_is_done_at_once() -> None:
    assert job("start", "dbus.socket") == "done"
    assert job("stop", "ct-plain.service") == "done"


def test_a_failing_unit_gives_its_result_exit_status_and_last_lines() -> None:
    async def act(manager: SystemdUnits) -> None:
        assert await manager.job("start", "ct-fail.service") == "failed"
        state = await manager.detail("ct-fail.service")
        assert (state.active, state.result, state.exit_status) == ("failed", "exit-code", 3)
        assert await manager.log_tail("ct-fail.service", 2) == ["two", "last words"]
        assert await manager.log_tail("ct-fail.service", 9) == ["one", "two", "last words"]

    for _ in range(5):  # the lines of one start only, whatever was logged before
        on_systemd(act)


def test_the_last_lines_are_of_all_that_a_unit_ran_in_turn() -> None:
    async def act(manager: SystemdUnits) -> list[str]:
        assert await manager.job("start", "ct-steps.service") == "failed"
        return await manager.log_tail("ct-steps.service", 5)

    assert on_systemd(act) == ["one", "two"]


def test_the_last_lines_of_a_unit_that_waits_for_another_start_are_those_of_its_run() -> None:
    async def act(manager: SystemdUnits) -> list[str]:
        assert await manager.job("start", "ct-again.service") == "failed"
        assert (await manager.detail("ct-again.service")).waits
        return await manager.log_tail("ct-again.service", 5)

    assert on_systemd(act) == ["first words", "last words"]
    assert job("stop", "ct-again.service") == "done"


def test_what_an_alias_stands_for_is_what_its_log_is_of() -> None:
    alias = UNIT_FILES / "ct-failing.service"
    alias.symlink_to(UNIT_FILES / "ct-fail.service")
    run("systemctl", "daemon-reload")

    async def act(manager: SystemdUnits) -> None:
        assert await manager.job("start", alias.name) == "failed"
        assert await manager.log_tail(alias.name, 2) == ["two", "last words"]
        assert (lines := await manager.logs(alias.name, 3)) == await manager.logs("ct-fail.service", 3)
        async with aclosing(manager.follow(alias.name, 3)) as followed:
            assert await anext(followed) == lines[0]

    try:
        on_systemd(act)
    finally:
        alias.unlink()
        run("systemctl", "daemon-reload")


def test_the_log_of_a_unit_with_a_namespace_has_what_is_in_there_and_what_systemd_says() -> None:
    unit = "ct-spaced.service"

    async def act(manager: SystemdUnits) -> None:
        assert await manager.job("start", unit) == "failed"
        await asyncio.to_thread(run, "journalctl", "--namespace=ct-space", "--sync")
        assert await manager.log_tail(unit, 5) == ["said apart"]
        shown = [line.text for line in await manager.logs(unit, 50)]
        assert "said apart" in shown
        assert any(unit in line for line in shown)
        async with aclosing(manager.follow(unit, 50)) as followed:
            assert [(await anext(followed)).text for _ in shown] == shown

    on_systemd(act)


def test_the_last_lines_of_a_unit_that_poses_as_systemd_in_the_journal() -> None:
    async def act(manager: SystemdUnits) -> list[str]:
        assert await manager.job("start", "ct-forge.service") == "failed"
        return await manager.log_tail("ct-forge.service", 5)

    said = on_systemd(act)
    assert (said[0], said[-1]) == ("first words", "last words")


def test_the_last_lines_are_there_even_when_journald_is_slow() -> None:
    async def act(manager: SystemdUnits) -> list[str]:
        run("systemctl", "kill", "--signal=STOP", "systemd-journald.service")
        try:
            assert await manager.job("start", "ct-fail.service") == "failed"
            tail = asyncio.create_task(manager.log_tail("ct-fail.service", 5))
            await asyncio.wait([tail], timeout=0.2)
        finally:
            run("systemctl", "kill", "--signal=CONT", "systemd-journald.service")
        return await tail

    assert on_systemd(act) == ["one", "two", "last words"]


def test_the_last_lines_are_of_the_last_start_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "EARLY", 3600)

    async def act(manager: SystemdUnits) -> list[str]:
        for _ in range(100):  # journald fails to learn the invocation of some of these
            await manager.job("start", "ct-fail.service")
        async with asyncio.timeout(SECONDS):
            while not (found := await manager.log_tail("ct-fail.service", 20)):
                pass  # journald is more than logs.SETTLE behind
        return found

    assert on_systemd(act) == ["one", "two", "last words"]


def test_a_unit_killed_by_a_signal_has_no_exit_status() -> None:
    assert job("start", "ct-crash.service") == "failed"
    state = detail("ct-crash.service")
    assert (state.result, state.exit_status, state.signal) == ("signal", None, "SIGKILL")


def test_a_program_that_does_not_exist_is_named_in_the_last_lines() -> None:
    async def act(manager: SystemdUnits) -> tuple[str, list[str]]:
        return await manager.job("start", "ct-noexec.service"), await manager.log_tail("ct-noexec.service", 5)

    result, tail = on_systemd(act)
    assert result == "failed"
    assert any("/nonexistent/program" in line for line in tail)


def test_a_unit_that_is_never_ready_fails_with_the_result_timeout() -> None:
    assert job("start", "ct-slow.service") == "failed"
    assert detail("ct-slow.service").result == "timeout"


def test_a_unit_whose_requirement_fails_gives_dependency() -> None:
    assert job("start", "ct-needs.service") == "dependency"


def test_a_job_that_takes_too_long_is_a_timeout_and_goes_on() -> None:
    with pytest.raises(Timeout, match=r"start ct-long\.service has not finished after 0\.2 s; it continues"):
        job("start", "ct-long.service", timeout=0.2)
    assert job("start", "ct-long.service") == "done"


def test_a_job_that_another_one_replaces_is_canceled() -> None:
    async def act(manager: SystemdUnits) -> str:
        async with watching(manager, "ct-long.service") as next_change:
            start = asyncio.create_task(manager.job("start", "ct-long.service"))
            while (await next_change()).active != "activating":
                pass
            assert await manager.job("stop", "ct-long.service") == "done"
        return await start

    assert on_systemd(act) == "canceled"


def test_a_unit_that_does_not_exist_is_not_found() -> None:
    for verb in METHODS:
        with pytest.raises(NotFound, match=r"cannot \w+ ct-absent\.service: systemd says: Unit ct-absent\.service not"):
            job(verb, "ct-absent.service")
    assert detail("ct-absent.service").load == "not-found"
    assert detail("ct-absent.socket").load == "not-found"


def test_a_masked_unit_is_a_conflict() -> None:
    with pytest.raises(Conflict, match=r"cannot start ct-masked\.service: systemd says: .* is masked"):
        job("start", "ct-masked.service")
    assert detail("ct-masked.service").load == "masked"


def test_a_unit_that_cannot_reload_is_a_conflict() -> None:
    job("start", "ct-plain.service")
    with pytest.raises(Conflict, match="reload is not applicable"):
        job("reload", "ct-plain.service")


@pytest.mark.parametrize(
    "name", ["nginx", "a b.service", "ct-many@.service", "../x.service", "\0.service", "é.service", "", "x.service\n"]
)
def test_what_is_no_unit_name_never_reaches_systemd(name: str) -> None:
    with pytest.raises(BadRequest):
        job("start", name)
    with pytest.raises(BadRequest):
        on_systemd(lambda manager: manager.enabled(name))
    assert detail(name).load == "not-found"


def test_twenty_jobs_at_once_each_get_their_own_result() -> None:
    async def act(manager: SystemdUnits) -> list[str]:
        names = [f"ct-many@{number}.service" for number in range(18)] + ["ct-fail.service", "ct-crash.service"]
        return await asyncio.gather(*(manager.job("start", name) for name in names))

    assert on_systemd(act) == ["done"] * 18 + ["failed"] * 2


def test_the_result_of_a_job_that_ends_at_once_is_not_missed() -> None:
    async def act(manager: SystemdUnits) -> set[str]:
        return {await manager.job("start", "ct-brief.service") for _ in range(100)}

    assert on_systemd(act) == {"done"}


def test_states_come_in_the_order_asked_for_whatever_the_names() -> None:
    asked = ["dbus.socket", "no unit", "ct-absent.service", "ct-many@.service", "ct-masked.service", "dbus.service"] * 5
    states = on_systemd(lambda manager: manager.states(asked))
    assert [state.unit for state in states] == asked
    assert [state.load for state in states[:6]] == ["loaded", "not-found", "not-found", "not-found", "masked", "loaded"]
    assert states[5].active == "active"
    assert states[5].description == "D-Bus System Message Bus"


def test_units_are_found_by_pattern() -> None:
    job("start", "ct-many@7.service")
    assert "ct-many@7.service" in on_systemd(lambda manager: manager.matching("ct-many@*.service"))
    assert on_systemd(lambda manager: manager.matching("ct-absent*")) == []


def test_a_stopped_service_whose_socket_listens_says_so() -> None:
    assert not detail("ct-awaited.service").listening
    job("start", "ct-awaited.socket")
    assert on_systemd(lambda manager: manager.listening("ct-awaited.service")) == ["ct-awaited.socket"]
    listening = detail("ct-awaited.service")
    assert (listening.active, listening.triggered_by, listening.listening) == ("inactive", ("ct-awaited.socket",), True)
    job("stop", "ct-awaited.socket")
    assert not detail("ct-awaited.service").listening
    assert on_systemd(lambda manager: manager.listening("ct-awaited.service")) == []
    assert on_systemd(lambda manager: manager.listening("ct-absent.service")) == []


def test_watch_tells_the_states_at_the_beginning_and_every_change() -> None:
    async def act(manager: SystemdUnits) -> None:
        await manager.job("stop", "ct-sleep.service")
        async with aclosing(manager.watch(["ct-sleep.service", "ct-fail.service", "no unit"])) as changes:
            begin = {state.unit: state for state in [await anext(changes) for _ in range(3)]}
            assert begin["ct-sleep.service"].active == "inactive"
            assert begin["no unit"].load == "not-found"
            # another connection than the watcher's, so that nothing is seen but by signals
            run("systemctl", "start", "ct-sleep.service")
            seen = []
            async for state in changes:
                seen.append((state.active, state.sub, state.pid is not None))
                if state.active == "active":
                    break
            assert seen[-1] == ("active", "running", True)
            assert {active for active, _, _ in seen[:-1]} <= {"activating"}
            subprocess.run(["systemctl", "start", "ct-fail.service"], check=False)
            failed = [state async for state in until("failed", changes)]
            assert (failed[-1].unit, failed[-1].result, failed[-1].exit_status) == ("ct-fail.service", "exit-code", 3)
            run("systemctl", "stop", "ct-sleep.service")
            stopped = [state async for state in until("inactive", changes)]
            assert [state.unit for state in stopped] == ["ct-sleep.service"] * len(stopped)
            assert stopped[-1].pid is None

    on_systemd(act)


async def until(active: str, changes: Any) -> Any:
    async for state in changes:
        yield state
        if state.active == active:
            return


def test_many_long_questions_at_once_do_not_cost_the_connection() -> None:
    names = [f"ct-absent-{'x' * 200}-{number}.service" for number in range(400)]  # some 90 KB

    async def act(manager: SystemdUnits) -> None:
        await manager.states(["dbus.service"])
        connection = manager._connection
        small = [manager.detail("ct-plain.service") for _ in range(200)]
        answers = await asyncio.gather(*(manager.states(names) for _ in range(30)), *small)
        assert all(len(states) == len(names) for states in answers[:30] if isinstance(states, list))
        assert manager._connection is connection

    on_systemd(act)


def test_who_asks_while_a_question_is_asked_shares_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    call = bus.Connection.call

    async def counted(connection: bus.Connection, target: Any, member: str, *rest: Any) -> Any:
        asked.append(member)
        return await call(connection, target, member, *rest)

    async def act(manager: SystemdUnits) -> None:
        await manager.matching("dbus.service")
        connection = manager._connection
        assert connection

        def ask() -> asyncio.Task[Any]:
            return asyncio.create_task(connection.list_units(names))

        early = [ask() for _ in range(20)]
        while "ListUnitsByNames" not in asked:
            await asyncio.sleep(0)
        late = [ask() for _ in range(20)]
        for _, answer in await asyncio.gather(*early, *late):
            assert [row[0] for row in answer.body[0]] == names

    names = ["ct-sleep.service", "ct-fail.service"]
    monkeypatch.setattr(bus.Connection, "call", counted)
    on_systemd(act)
    assert asked.count("ListUnitsByNames") == 2


def test_watch_tells_of_units_that_match_and_come_later() -> None:
    async def act(manager: SystemdUnits) -> None:
        await manager.job("start", "ct-many@earlier.service")
        async with aclosing(manager.watch(["ct-sleep.service"], "ct-many@*er.service")) as changes:
            seen = {(await anext(changes)).unit for _ in range(2)}
            assert seen == {"ct-sleep.service", "ct-many@earlier.service"}
            run("systemctl", "start", "ct-brief.service", "ct-many@later.service")
            came = [state async for state in until("active", changes)]
            assert {state.unit for state in came} - seen == {"ct-many@later.service"}
            run("systemctl", "stop", "ct-many@later.service")
            went = [state async for state in until("inactive", changes)]
            assert {state.unit for state in went} == {"ct-many@later.service"}
            run("systemctl", "start", "ct-many@later.service")  # which systemd had forgotten meanwhile
            again = [state async for state in until("active", changes)]
            assert {state.unit for state in again} == {"ct-many@later.service"}

    on_systemd(act)


def test_watch_tells_that_a_failed_unit_failed_again() -> None:
    async def act(manager: SystemdUnits) -> list[tuple[str, str | None]]:
        await manager.job("start", "ct-fail.service")
        async with watching(manager, "ct-fail.service") as next_change:
            await manager.job("start", "ct-fail.service")
            return [(state.active, state.result) for state in (await next_change(), await next_change())]

    assert on_systemd(act) == [("activating", "success"), ("failed", "exit-code")]


def test_watch_tells_once_that_a_unit_stops() -> None:
    file = UNIT_FILES / "ct-stops.service"
    file.write_text("[Service]\nExecStart=sleep infinity\nExecStop=sh -c 'kill $MAINPID; sleep 0.5'\n")
    run("systemctl", "daemon-reload")

    async def act(manager: SystemdUnits) -> list[str]:
        await manager.job("start", "ct-stops.service")
        async with aclosing(manager.watch(["ct-stops.service"])) as changes:
            await anext(changes)
            run("systemctl", "stop", "ct-stops.service")
            return [state.sub async for state in until("inactive", changes)]

    try:
        subs = on_systemd(act)
        assert subs == [*dict.fromkeys(subs)]
    finally:
        file.unlink()
        run("systemctl", "daemon-reload")


def test_watch_is_silent_when_others_change_or_are_looked_at() -> None:
    async def act(manager: SystemdUnits) -> None:
        await manager.job("stop", "ct-sleep.service")
        async with watching(manager, "ct-sleep.service") as next_change:
            change = asyncio.ensure_future(next_change())
            await manager.job("start", "ct-brief.service")
            for _ in range(20):  # loads the units that are not in memory, and drops them again
                await manager.states(["ct-sleep.service", "ct-absent.service"])
                await manager.detail("ct-sleep.service")
            assert not change.done()
            await manager.job("start", "ct-sleep.service")
            assert (await change).active in ("activating", "active")

    on_systemd(act)


def test_watch_notices_a_unit_that_is_installed_or_masked() -> None:
    file = UNIT_FILES / "ct-new.service"

    async def act(manager: SystemdUnits) -> list[str]:
        async with watching(manager, "ct-new.service") as next_change:
            file.write_text("[Service]\nExecStart=sleep infinity\n")
            run("systemctl", "daemon-reload")
            loads = [(await next_change()).load]
            file.unlink()
            file.symlink_to("/dev/null")
            run("systemctl", "daemon-reload")
            return [*loads, (await next_change()).load]

    try:
        assert on_systemd(act) == ["loaded", "masked"]
    finally:
        file.unlink(missing_ok=True)
        run("systemctl", "daemon-reload")


def test_an_alias_is_watched_by_the_name_asked_for() -> None:
    alias = UNIT_FILES / "ct-alias.service"
    alias.symlink_to(UNIT_FILES / "ct-plain.service")
    run("systemctl", "daemon-reload")

    async def act(manager: SystemdUnits) -> str:
        await manager.job("stop", "ct-plain.service")
        async with watching(manager, "ct-alias.service") as next_change:
            await manager.job("start", "ct-plain.service")
            return (await next_change()).unit

    try:
        assert on_systemd(act) == "ct-alias.service"
    finally:
        alias.unlink()
        run("systemctl", "daemon-reload")


def test_a_closed_watch_leaves_no_match_behind() -> None:
    async def act(manager: SystemdUnits) -> None:
        async with watching(manager, "ct-sleep.service"):
            assert any("PropertiesChanged" in rule or "/unit" in rule for rule in rules_of_this_process())
        task = asyncio.create_task(wait_forever(manager))
        await manager.states(["dbus.service"])
        task.cancel()
        await asyncio.wait([task])
        await manager.states(["dbus.service"])  # answered after the bus has taken note
        assert not any("/unit" in rule or "JobRemoved" in rule for rule in rules_of_this_process())

    async def wait_forever(manager: SystemdUnits) -> None:
        async with watching(manager, "ct-sleep.service") as next_change:
            await next_change()

    on_systemd(act)


def test_a_watch_works_after_others_were_given_up_at_any_moment() -> None:
    async def act(manager: SystemdUnits) -> list[str]:
        await manager.states(["dbus.service"])
        for turns in range(100):
            changes = manager.watch(["ct-sleep.service"])
            task = asyncio.ensure_future(anext(changes))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
        async with watching(manager, "ct-sleep.service"):
            return rules_of_this_process()

    rules = on_systemd(act)
    assert len([rule for rule in rules if "Reloading" in rule]) == 1
    assert len([rule for rule in rules if "PropertiesChanged" in rule or "/unit" in rule]) == 1


def rules_of_this_process() -> list[str]:
    """The match rules that dbus-daemon holds for connections of this process."""
    stats = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus.Debug.Stats")
    rules = run("busctl", "--system", "--json=short", "call", *stats, "GetAllMatchRules")
    names = run("busctl", "--system", "list", "--unique", "--no-legend").splitlines()
    ours = {line.split()[0] for line in names if line.split()[1] == str(os.getpid())}
    return [rule for name, held in json.loads(rules)["data"][0].items() if name in ours for rule in held]


def test_a_signal_that_another_peer_made_up_is_not_believed(stranger: pwd.struct_passwd) -> None:
    async def act(manager: SystemdUnits) -> str:
        await manager.states(["dbus.service"])
        assert manager._connection is not None
        ours = manager._connection._bus.unique_name
        async with watching(manager, "ct-long.service") as next_change:
            task = asyncio.create_task(manager.job("start", "ct-long.service"))
            while (await next_change()).active != "activating":
                pass
            path = run("busctl", "get-property", "org.freedesktop.systemd1", object_path("ct-long.service"),
                       "org.freedesktop.systemd1.Unit", "Job").split('"')[1]  # fmt: skip
            forged = ["uint32:1", f"objpath:{path}", "string:ct-long.service", "string:forged"]
            await asyncio.to_thread(
                run, "dbus-send", "--system", "--type=signal", f"--dest={ours}", "/org/freedesktop/systemd1",
                "org.freedesktop.systemd1.Manager.JobRemoved", *forged, user=stranger.pw_uid
            )  # fmt: skip
            return await task

    assert on_systemd(act) == "done"


def test_no_bus_at_all_is_unavailable(tmp_path: Path) -> None:
    async def ask(address: str) -> None:
        manager = SystemdUnits("system", timeout=5, env={"DBUS_SYSTEM_BUS_ADDRESS": address})
        with pytest.raises(Unavailable, match="cannot reach the message bus"):
            await manager.states(["dbus.service"])

    async def main() -> None:
        async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()

        await ask(f"unix:path={tmp_path}/nothing")
        await ask("nonsense")
        async with await asyncio.start_unix_server(hang_up, tmp_path / "silent"):
            await ask(f"unix:path={tmp_path}/silent")

    asyncio.run(main())


def test_a_person_without_a_rule_is_denied_but_may_look(stranger: pwd.struct_passwd) -> None:
    code = """
import asyncio
from circleosd.errors import Denied, Unavailable
from circleosd.systemd.units import SystemdUnits
async def main():
    manager = SystemdUnits("system", timeout=20)
    print((await manager.detail("dbus.service")).active)
    for act in (manager.job("start", "ct-plain.service"), manager.job("stop", "ct-plain.service"),
                manager.switch("enable", "ct-install.service")):
        try:
            print(await act)
        except Denied as error:
            print(error)
    try:
        print(await manager.logs("dbus.service", 5))
    except Unavailable as error:
        print(error)
    print(await manager.log_tail("dbus.service", 5))
    await manager.close()
asyncio.run(main())
"""
    lines = python_as(stranger, code).splitlines()
    assert lines[0] == "active"
    assert lines[1].startswith("systemd refuses to start ct-plain.service: ")
    assert "CircleOSD's polkit rule does not cover" in lines[1]
    assert lines[2].startswith("systemd refuses to stop ct-plain.service: ")
    assert lines[3].startswith(r"systemd refuses to start circleosd-enable@ct\x2dinstall.service.service: ")
    assert "systemd-journal" in lines[4]
    assert lines[5] == "[]"


def test_root_enables_and_disables() -> None:
    async def act(manager: SystemdUnits) -> tuple[str, str]:
        on = await manager.switch("enable", "ct-install.service")
        wanted = await manager.detail("multi-user.target")
        assert wanted.active == "active"
        assert "ct-install.service" in run("systemctl", "show", "-P", "Wants", "multi-user.target").split()
        return on, await manager.switch("disable", "ct-install.service")

    assert on_systemd(act) == ("enabled", "disabled")
    assert "ct-install.service" not in run("systemctl", "show", "-P", "Wants", "multi-user.target").split()


@pytest.mark.parametrize(
    ("unit", "error"),
    [("ct-sleep.service", Conflict), ("ct-absent.service", NotFound), ("ct-masked.service", Conflict)],
)
def test_what_cannot_be_enabled(unit: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"cannot enable {unit}"):
        on_systemd(lambda manager: manager.switch("enable", unit))


def test_the_user_manager_is_reached_too(stranger: pwd.struct_passwd) -> None:
    # The process outlives its line a little: journald asks /proc whose it is (systemd.journal-fields(7)).
    code = """
import asyncio, os, pathlib, subprocess
from contextlib import aclosing
from circleosd.systemd.units import SystemdUnits
directory = pathlib.Path.home() / ".config/systemd/user"
directory.mkdir(parents=True, exist_ok=True)
(directory / "mine.service").write_text("[Service]\\nType=oneshot\\nExecStart=sh -c 'echo my line; sleep 1; exit 4'\\n"
                                        "[Install]\\nWantedBy=default.target\\n")
subprocess.run(["systemctl", "--user", "daemon-reload"], check=True)
async def main():
    manager = SystemdUnits("user", timeout=20)
    print(await manager.job("start", "mine.service"))
    state = await manager.detail("mine.service")
    print(state.active, state.result, state.exit_status)
    for verb in ("enable", "disable"):
        print(await manager.switch(verb, "mine.service"))
    async with aclosing(manager.watch(["mine.service"])) as changes:
        print((await anext(changes)).active)
    print(*await manager.log_tail("mine.service", 5))
    await manager.close()
asyncio.run(main())
"""
    runtime = f"/run/user/{stranger.pw_uid}"
    if not Path(runtime, "bus").exists():
        pytest.skip("users have no message bus here (package dbus-user-session)")
    assert python_as(stranger, code, XDG_RUNTIME_DIR=runtime, HOME=stranger.pw_dir).splitlines() == [
        "failed",
        "failed exit-code 4",
        "enabled",
        "disabled",
        "failed",
        "my line",
    ]


@pytest.mark.parametrize(
    "unit", ["nginx.service", "a@b.service", "a-b.service", ".hidden.service", r"dev-x\x2dy.device"]
)
def test_names_are_escaped_as_systemd_does(unit: str) -> None:
    assert switch_unit("enable", unit) == run("systemd-escape", "--template=circleosd-enable@.service", unit).strip()
    run("busctl", "get-property", "org.freedesktop.systemd1", object_path(unit), "org.freedesktop.systemd1.Unit", "Id")


def test_a_reader_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus, "MAX_WAITING", 3)

    async def main() -> list[bool]:
        connection = await bus.connect(bus_address("system", {}))
        rule = "type='signal',sender='org.freedesktop.systemd1',member='JobRemoved'"
        async with connection.signals([rule], lambda signal: True) as queue:
            for _ in range(6):
                run("systemctl", "restart", "ct-sleep.service")
            async with asyncio.timeout(SECONDS):
                found = [await queue.get() is not None for _ in range(4)]
            assert queue.empty()
        await connection.close()
        return found

    assert asyncio.run(main()) == [True, True, True, False]


def test_a_watcher_that_does_not_read_catches_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus, "MAX_WAITING", 3)

    async def act(manager: SystemdUnits) -> None:
        await manager.job("stop", "ct-sleep.service")
        async with watching(manager, "ct-sleep.service") as next_change:
            for _ in range(5):
                await manager.job("restart", "ct-sleep.service")
            while (await next_change()).active != "active":
                pass
            await manager.job("stop", "ct-sleep.service")
            while (await next_change()).active != "inactive":
                pass

    on_systemd(act)
