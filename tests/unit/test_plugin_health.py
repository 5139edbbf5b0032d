"""When a plugin is held back and when it is set aside."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from circleosd.config import PluginSettings
from circleosd.errors import CircleError, Conflict, PluginFailed
from circleosd.plugins.failures import OVERDUE, BrokeProtocol, End, Trapped, WorkerGone
from circleosd.plugins.health import Health
from circleosd.plugins.manifest import Manifest
from circleosd.plugins.plugin import Plugin
from circleosd.plugins.runner import Superseded
from circleosd.plugins.store import Loaded, Record
from circleosd.plugins.views import shown
from circleosd.plugins.workerunits import WorkerUnits
from tests.unit.fakes import SlowWorker, with_worker


class Trapping(SlowWorker):
    """A worker whose plugin traps in every call."""

    async def call(self, *args: Any) -> bytes:
        await super().call(*args)
        raise Trapped("trap")


class Dying(SlowWorker):
    """A worker that ends during every call."""

    error: CircleError = WorkerGone("the worker of p ended during the call")

    async def call(self, *args: Any) -> bytes:
        await super().call(*args)
        raise self.error


class Disconnected(Dying):
    """A worker that breaks the protocol during every call."""

    error = BrokeProtocol("the worker of p broke the protocol")


def make() -> Health:
    return Health("p", Record(), PluginSettings(back_off_after=3, quarantine_after=6))


def admitted(health: Health, now: float) -> bool:
    try:
        health.admit(now)
    except PluginFailed:
        return False
    return True


def test_single_failures_do_not_hold_a_plugin_back() -> None:
    health = make()
    for _ in range(20):
        health.failed("trap", 0.0, 0.0)
        health.failed("trap", 0.0, 0.0)
        health.admit(0.0)
        health.succeeded()
    assert health.record.calls == 60
    assert health.record.failures == 40


def test_failures_in_a_row_hold_a_plugin_back_longer_and_longer() -> None:
    health = make()
    delays = []
    for _ in range(5):
        health.failed("trap: unreachable", 0.0, 0.0)
        delays.append(next(moment / 4 for moment in range(100) if admitted(health, moment / 4)))
    assert delays == [0, 0, 0.5, 1.0, 2.0]


@pytest.mark.parametrize(("now", "left"), [(0.0, "0.5 s"), (0.36, "0.2 s"), (0.499, "0.1 s")])
def test_a_plugin_that_is_held_back_says_for_how_long_and_why(now: float, left: str) -> None:
    health = make()
    for _ in range(3):
        health.failed("trap: unreachable", 0.0, 0.0)
    with pytest.raises(PluginFailed, match=f"held back for {left}; the last failure: trap: unreachable"):
        health.admit(now)


def test_a_call_that_ends_well_beside_the_failures_ends_the_back_off() -> None:
    health = make()
    for _ in range(3):
        health.failed("trap", 0.0, 0.0)
    assert not admitted(health, 0.0)
    health.succeeded()
    assert admitted(health, 0.0)


def test_quarantine_is_due_after_so_many_failures_in_a_row() -> None:
    health = make()
    due = []
    for _ in range(6):
        health.failed("trap", 0.0, 0.0)
        due.append(health.quarantine_due)
    assert due == [False] * 5 + [True]
    health.reset()
    assert not health.quarantine_due


def test_a_plugin_that_was_set_aside_says_why_and_how_to_bring_it_back() -> None:
    health = make()
    health.record.aside, health.record.reason = "quarantined", "6 failures in a row, the last: trap"
    with pytest.raises(Conflict, match=r"quarantined: 6 failures .* circlectl plugin enable p"):
        health.admit(0.0)


def test_a_long_error_is_cut() -> None:
    health = make()
    health.failed("x" * 100_000, 0.0, 0.0)
    assert len(health.record.last_error or "") < 3000


def test_a_plugin_that_is_held_back_is_not_listed_as_ready() -> None:
    manifest = Manifest("p")
    plugin = Plugin(manifest, "", Record(), {}, PluginSettings(back_off_after=2, quarantine_after=4))
    plugin.adopt(Loaded(manifest, "0" * 64, "core", (), (), "", 0.0))
    states = [shown(plugin)["state"]]
    for _ in range(2):
        plugin.health.failed("trap", time.monotonic() + 1000, 0.0)
        states.append(shown(plugin)["state"])
    plugin.health.record.aside = "disabled"
    states.append(shown(plugin)["state"])
    assert states == ["ready", "ready", "held-back", "disabled"]


def test_calls_that_wait_are_held_back_too(tmp_path: Path) -> None:

    async def called() -> None:
        runners, plugin = with_worker(tmp_path, Trapping(0.001), PluginSettings(back_off_after=3))
        calls = (runners.call(plugin, "f", "x") for _ in range(10))
        ended = await asyncio.gather(*calls, return_exceptions=True)
        assert [*map(type, ended)] == [Trapped] * 3 + [Superseded] * 7
        assert plugin.health.record.in_a_row == 3

    asyncio.run(called())


@pytest.mark.parametrize(
    ("limit", "told"),
    [
        (0.001, "timeout: took longer than 0.001 s, and its worker was ended"),
        (60, "plugin-failed: the worker of p ended during the call, for something else in it took longer than 60 s"),
    ],
)
@pytest.mark.parametrize("concurrency", [1, 2])  # what took too long may also be the making of the call's instance
def test_who_did_not_take_too_long_is_not_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: float, told: str, concurrency: int
) -> None:

    async def ended(self: WorkerUnits, instance: str) -> End:
        return OVERDUE

    async def called() -> CircleError:
        runners, plugin = with_worker(tmp_path, Dying(0.002), time=limit, concurrency=concurrency)
        with pytest.raises(CircleError) as caught:
            await runners.call(plugin, "f", "x")
        return caught.value

    monkeypatch.setattr(WorkerUnits, "how_it_ended", ended)
    error = asyncio.run(called())
    assert f"{error.code}: {error}" == told


@pytest.mark.parametrize(
    ("worker", "kept", "step"),
    [
        (Dying, "the worker of p ended during the call with exit status 0", "; see: circlectl service logs plugin@p"),
        (Disconnected, "the worker of p broke the protocol", ""),
    ],
)
def test_how_a_worker_ended_and_where_to_read_why_is_told_unless_it_was_disconnected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker: type[Dying], kept: str, step: str
) -> None:

    async def ended(self: WorkerUnits, instance: str) -> End:
        return End(status=0)

    async def called() -> tuple[str, str | None]:
        runners, plugin = with_worker(tmp_path, worker(0.001))
        with pytest.raises(WorkerGone) as caught:
            await runners.call(plugin, "f", "x")
        return str(caught.value), plugin.health.record.last_error

    monkeypatch.setattr(WorkerUnits, "how_it_ended", ended)
    assert asyncio.run(called()) == (kept + step, kept)
