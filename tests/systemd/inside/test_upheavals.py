"""What the registry's service manager does when the bus or systemd goes away under it (see conftest.py).

These run last: systemd-logind may not recover from the loss of its bus.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
from collections.abc import Callable

import pytest

from circleosd.registry.units import Verb
from circleosd.systemd.units import SystemdUnits
from tests.systemd.inside.conftest import COUNT, on_systemd, run, watching

pytestmark = pytest.mark.usefixtures("unit_files")


def kill_the_bus() -> None:
    pid = int(run("systemctl", "show", "-P", "MainPID", "dbus.service"))
    descriptor = os.pidfd_open(pid)
    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    assert select.select([descriptor], [], [], 5)[0]  # it is gone
    os.close(descriptor)


def restart_the_bus() -> None:
    run("systemctl", "restart", "dbus.service")


def counted() -> int:
    """How often units of `ct-counted@` were started."""
    return len(COUNT.read_text().splitlines())


def execute_systemd_anew() -> None:
    run("systemctl", "daemon-reexec")


UPHEAVALS = pytest.mark.parametrize("upheaval", [kill_the_bus, restart_the_bus, execute_systemd_anew])


@UPHEAVALS
def test_it_works_again_after(upheaval: Callable[[], None]) -> None:
    async def act(manager: SystemdUnits) -> None:
        assert (await manager.detail("dbus.service")).active == "active"
        assert await manager.job("start", "ct-sleep.service") == "done"
        upheaval()  # the event loop learns of it by the next call
        assert (await manager.detail("ct-sleep.service")).active == "active"
        assert await manager.job("stop", "ct-sleep.service") == "done"

    on_systemd(act)


@UPHEAVALS
def test_a_watch_survives(upheaval: Callable[[], None]) -> None:
    async def act(manager: SystemdUnits) -> None:
        await manager.job("stop", "ct-sleep.service")
        async with watching(manager, "ct-sleep.service") as next_change:
            await asyncio.to_thread(upheaval)
            run("systemctl", "start", "ct-sleep.service")
            states = [await next_change()]
            while states[-1].active != "active":
                states.append(await next_change())
            assert all(state.active in ("activating", "active") for state in states)

    on_systemd(act)


@UPHEAVALS
def test_a_restart_that_a_watch_did_not_hear_of_is_told(upheaval: Callable[[], None]) -> None:
    async def act(manager: SystemdUnits) -> None:
        await manager.job("start", "ct-sleep.service")
        async with watching(manager, "ct-sleep.service", "ct-plain.service") as next_change:
            upheaval()
            run("systemctl", "restart", "ct-sleep.service")
            state = await next_change()
            assert (state.unit, state.active) == ("ct-sleep.service", "active")
            await asyncio.to_thread(run, "systemctl", "start", "ct-plain.service")
            assert (await next_change()).unit == "ct-plain.service"
        await manager.job("stop", "ct-plain.service")

    on_systemd(act)


def test_a_job_is_done_though_the_bus_died_a_moment_ago(caplog: pytest.LogCaptureFixture) -> None:
    async def act(manager: SystemdUnits) -> str:
        await manager.states(["dbus.service"])
        kill_the_bus()
        return await manager.job("start", "ct-brief.service")

    assert on_systemd(act) == "done"
    assert caplog.records == []


@pytest.mark.parametrize(("verbs", "runs"), [(("start", "stop"), False), (("reload",), False), (("restart",), True)])
def test_jobs_asked_for_while_systemd_is_executed_anew_are_done_and_once(verbs: tuple[Verb, ...], runs: bool) -> None:
    async def act(manager: SystemdUnits) -> tuple[list[str], int]:
        units = [f"ct-counted@{number}.service" for number in range(16)]
        await asyncio.gather(*(manager.job("start", unit) for unit in units))
        began = counted()
        over = asyncio.Event()

        async def ask(unit: str) -> list[str]:
            found = []
            while not over.is_set():
                found += [await manager.job(verb, unit) for verb in verbs]
            return found

        asked = [asyncio.create_task(ask(unit)) for unit in units]
        for _ in range(3):
            await asyncio.to_thread(execute_systemd_anew)
        over.set()
        return [result for found in await asyncio.gather(*asked) for result in found], counted() - began

    results, began = on_systemd(act)
    assert {*results} == {"done"}
    if runs:
        assert began == len(results)


@UPHEAVALS
@pytest.mark.parametrize(("unit", "result"), [("ct-long.service", "done"), ("ct-slow.service", "failed")])
def test_how_a_job_under_way_ends_is_told(upheaval: Callable[[], None], unit: str, result: str) -> None:
    async def act(manager: SystemdUnits) -> None:
        async with watching(manager, unit) as next_change:
            task = asyncio.create_task(manager.job("start", unit))
            while (await next_change()).active != "activating":
                pass
        upheaval()
        assert await task == result

    on_systemd(act)
