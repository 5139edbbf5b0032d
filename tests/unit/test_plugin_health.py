"""When a plugin is held back and when it is set aside."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from circleosd.config import PluginSettings
from circleosd.errors import Conflict, PluginFailed
from circleosd.plugins.compiled import Compiled
from circleosd.plugins.health import Health
from circleosd.plugins.manifest import Manifest
from circleosd.plugins.plugin import Plugin
from circleosd.plugins.runner import Runners, Superseded
from circleosd.plugins.store import Record
from circleosd.plugins.workers import Trapped
from tests.unit.fakes import SlowWorker


class Trapping(SlowWorker):
    """A worker whose plugin traps in every call."""

    async def call(self, *args: Any) -> bytes:
        await super().call(*args)
        raise Trapped("trap")


def make() -> Health:
    return Health("p", Record(), back_off_after=3, quarantine_after=6)


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


def test_a_plugin_that_is_held_back_says_why() -> None:
    health = make()
    for _ in range(3):
        health.failed("trap: unreachable", 0.0, 0.0)
    with pytest.raises(PluginFailed, match="trap: unreachable"):
        health.admit(0.0)


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


def test_calls_that_wait_are_held_back_too(tmp_path: Path) -> None:
    settings = PluginSettings()
    plugin = Plugin(Manifest("p"), "", make(), {}, settings)

    async def called() -> list[BaseException | str]:
        runners = Runners("", tmp_path, Compiled(tmp_path, 0), _unused, _unused, settings)
        runners._of(plugin).worker = Trapping("p", 0.001)
        calls = (runners.call(plugin, "f", "x") for _ in range(10))
        return await asyncio.gather(*calls, return_exceptions=True)

    assert [type(ended) for ended in asyncio.run(called())] == [Trapped] * 3 + [Superseded] * 7
    assert plugin.health.record.in_a_row == 3


def _unused(*args: Any) -> Any:
    raise AssertionError("no worker is started")
