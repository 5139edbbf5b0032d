"""How many calls of a plugin may wait."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from circleosd.config import PluginSettings
from circleosd.errors import Limit
from circleosd.plugins.compiled import Compiled
from circleosd.plugins.health import Health
from circleosd.plugins.manifest import Limits, Manifest
from circleosd.plugins.plugin import Plugin
from circleosd.plugins.runner import Runners
from circleosd.plugins.store import Record
from tests.unit.fakes import SlowWorker


def unused(*args: Any) -> Any:
    raise AssertionError("no worker is started")


def test_calls_in_hand_take_no_place_among_those_that_wait(tmp_path: Path) -> None:
    settings = PluginSettings(queue=1)
    health = Health("p", Record(), back_off_after=3, quarantine_after=6)
    plugin = Plugin(Manifest("p", limits=Limits(concurrency=2)), "", health, {}, settings)

    async def called() -> list[BaseException | str]:
        runners = Runners("", tmp_path, Compiled(tmp_path, 0), unused, unused, settings)
        runners._of(plugin).worker = SlowWorker("p", 0.01)
        calls = (runners.call(plugin, "f", "x") for _ in range(4))
        return await asyncio.gather(*calls, return_exceptions=True)

    *served, refused = asyncio.run(called())
    assert served == ["x"] * 3
    assert isinstance(refused, Limit)
    assert str(refused).startswith("1 calls of p are waiting already (plugins.queue)")
