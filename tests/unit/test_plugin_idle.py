"""When a worker is idle, or retired, or never ready, and given up."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from pathlib import Path

import pytest

from circleosd.config import PluginSettings
from circleosd.errors import CircleError, Unavailable
from circleosd.plugins.cause import Cause
from circleosd.plugins.manifest import Manifest
from circleosd.plugins.plugin import Plugin
from circleosd.plugins.runner import Runner, Superseded
from circleosd.plugins.store import Record
from circleosd.plugins.workerunits import WorkerUnits
from tests.unit.fakes import SlowWorker, with_worker

IDLE = 0.2  # seconds


def test_a_worker_is_idle_from_the_end_of_its_last_call(tmp_path: Path) -> None:
    async def idle_for() -> float:
        worker = SlowWorker(1.5 * IDLE)
        runners, plugin = with_worker(tmp_path, worker, PluginSettings(idle_worker=IDLE))
        watching = asyncio.get_running_loop().create_task(runners.watch_idle())
        assert await runners.call(plugin, "f", "x") == "x"
        closed = await worker.closed
        watching.cancel()
        return closed - worker.ended

    assert asyncio.run(idle_for()) >= IDLE


def test_a_retired_worker_is_left_the_time_of_a_call_that_waits_for_its_instance(tmp_path: Path) -> None:
    limit = 0.1

    async def retired() -> bool:
        worker = SlowWorker(1.8 * limit)
        runners, plugin = with_worker(tmp_path, worker, time=limit)
        calling = asyncio.get_running_loop().create_task(runners.call(plugin, "f", "x"))
        while not runners.waiting("p"):
            await asyncio.sleep(0)
        await runners._retired("p")
        assert await calling == "x"
        return await worker.closed >= worker.ended

    assert asyncio.run(retired())


def test_a_worker_starts_when_the_calls_of_the_one_before_have_ended(tmp_path: Path) -> None:
    begun: list[float] = []

    def open_artifact(digest: str) -> int:
        begun.append(time.monotonic())
        raise Unavailable("far enough")

    async def upgraded() -> float:
        worker = SlowWorker(0.1)
        runners, old = with_worker(tmp_path, worker, open_artifact=open_artifact)
        new = Plugin(Manifest("p", "2"), "", Record(), {}, PluginSettings())
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

    async def retired() -> None:
        runners, plugin = with_worker(tmp_path, None, open_artifact=lambda _: os.open(os.devnull, 0), time=0.05)
        worker, begun = SlowWorker(0.0), asyncio.Event()

        async def connect(runner: Runner, artifact: int, cause: Cause) -> None:
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


@pytest.mark.parametrize("waited_for", [True, False])
def test_a_worker_that_is_not_ready_in_time_is_stopped_with_its_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waited_for: bool
) -> None:
    """One that dies before it accepts would else be started for ever, for what its socket holds of the connection."""
    removed: list[str] = []

    async def remove(self: WorkerUnits, instance: str) -> None:
        removed.append(instance)

    async def called(listener: socket.socket) -> None:
        settings = PluginSettings(load_time=0.05 if waited_for else 60)
        runners, plugin = with_worker(tmp_path, None, settings, open_artifact=lambda _: os.open(os.devnull, 0))
        monkeypatch.setattr(runners, "_host", lambda _: None)
        calling = asyncio.get_running_loop().create_task(runners.call(plugin, "f", "x"))
        if not waited_for:
            connection, _ = await asyncio.get_running_loop().sock_accept(listener)
            calling.cancel()
            await asyncio.wait([calling])
            connection.close()
        with pytest.raises(CircleError if waited_for else asyncio.CancelledError):
            await calling
        await runners._left("p")

    monkeypatch.setattr(WorkerUnits, "remove", remove)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.setblocking(False)
        listener.bind(str(tmp_path / "p.sock"))
        listener.listen()
        asyncio.run(called(listener))
    assert removed == ["p"]
