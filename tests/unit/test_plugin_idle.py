"""When a worker is idle, or retired, and given up."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import pytest

from circleosd.config import PluginSettings
from circleosd.errors import Unavailable
from circleosd.plugins.compiled import Compiled
from circleosd.plugins.health import Health
from circleosd.plugins.manifest import Limits, Manifest
from circleosd.plugins.plugin import Plugin
from circleosd.plugins.runner import Runner, Runners, Superseded
from circleosd.plugins.store import Record
from tests.unit.fakes import SlowWorker

IDLE = 0.2  # seconds


def unused(*args: Any) -> Any:
    raise AssertionError("no worker is started")


def test_a_worker_is_idle_from_the_end_of_its_last_call(tmp_path: Path) -> None:
    settings = PluginSettings(idle_worker=IDLE)
    health = Health("p", Record(), back_off_after=3, quarantine_after=6)
    plugin = Plugin(Manifest("p"), "", health, {}, settings)

    async def idle_for() -> float:
        runners = Runners("", tmp_path, Compiled(tmp_path, 0), unused, unused, settings)
        worker = runners._of(plugin).worker = SlowWorker("p", 1.5 * IDLE)
        watching = asyncio.get_running_loop().create_task(runners.watch_idle())
        assert await runners.call(plugin, "f", "x") == "x"
        closed = await worker.closed
        watching.cancel()
        return closed - worker.ended

    assert asyncio.run(idle_for()) >= IDLE


def test_a_retired_worker_is_left_the_time_of_a_call_that_waits_for_its_instance(tmp_path: Path) -> None:
    settings, limit = PluginSettings(), 0.1
    health = Health("p", Record(), back_off_after=3, quarantine_after=6)
    plugin = Plugin(Manifest("p", limits=Limits(time=limit)), "", health, {}, settings)

    async def retired() -> bool:
        runners = Runners("", tmp_path, Compiled(tmp_path, 0), unused, unused, settings)
        worker = runners._of(plugin).worker = SlowWorker("p", 1.8 * limit)
        calling = asyncio.get_running_loop().create_task(runners.call(plugin, "f", "x"))
        while not runners.waiting("p"):
            await asyncio.sleep(0)
        await runners._retired("p")
        assert await calling == "x"
        return await worker.closed >= worker.ended

    assert asyncio.run(retired())


def test_a_worker_starts_when_the_calls_of_the_one_before_have_ended(tmp_path: Path) -> None:
    settings = PluginSettings()
    health = Health("p", Record(), back_off_after=3, quarantine_after=6)
    begun: list[float] = []

    def open_artifact(digest: str) -> int:
        begun.append(time.monotonic())
        raise Unavailable("far enough")

    async def upgraded() -> float:
        old, new = (Plugin(Manifest("p", version), "", health, {}, settings) for version in "12")
        runners = Runners("", tmp_path, Compiled(tmp_path, 0), open_artifact, unused, settings)
        worker = runners._of(old).worker = SlowWorker("p", 0.1)
        calling = asyncio.get_running_loop().create_task(runners.call(old, "f", "x"))
        while not runners.waiting("p"):
            await asyncio.sleep(0)
        with pytest.raises(Unavailable):
            await runners.call(new, "f", "y")
        assert await calling == "x"
        return worker.ended

    assert asyncio.run(upgraded()) <= begun[0]


def test_a_worker_that_has_started_when_nobody_waits_for_its_end_any_more_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("circleosd.plugins.runner.GRACE", 0.0)
    settings = PluginSettings()
    health = Health("p", Record(), back_off_after=3, quarantine_after=6)
    plugin = Plugin(Manifest("p", limits=Limits(time=0.05)), "", health, {}, settings)

    async def retired() -> None:
        runners = Runners("", tmp_path, Compiled(tmp_path, 0), lambda _: os.open(os.devnull, 0), unused, settings)
        worker, begun = SlowWorker("p", 0.0), asyncio.Event()

        async def connect(runner: Runner, artifact: int) -> None:
            await begun.wait()
            runner.worker = worker

        monkeypatch.setattr(runners, "_connect", connect)
        calling = asyncio.get_running_loop().create_task(runners.call(plugin, "f", "x"))
        while not runners.waiting("p"):
            await asyncio.sleep(0)
        await runners._retired("p")
        begun.set()
        with pytest.raises(Superseded):
            await calling
        assert worker.closed.done()

    asyncio.run(retired())
