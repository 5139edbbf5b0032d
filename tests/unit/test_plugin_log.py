"""What is in the log about plugins."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest

from circleosd.plugins import workers
from circleosd.plugins.voice import MOST_SAID, SAID_WITHIN, Voice
from circleosd.worker.frames import Ready
from tests.unit.fakes import with_worker


def test_a_plugin_says_as_much_as_a_service_may_and_then_it_is_said_once_that_the_rest_is_dropped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    loud, other = Voice("loud"), Voice("other")
    for number in range(MOST_SAID + 100):
        loud.say(1, str(number), 5.0 + SAID_WITHIN * number / 2 / MOST_SAID)
    said = caplog.messages.copy()
    assert said[:MOST_SAID] == [f"plugin loud: {number}" for number in range(MOST_SAID)]
    assert said[MOST_SAID:] == ["plugin loud: logged more than 10000 messages within 30 s; the rest is dropped"]
    other.say(0, "not loud", 20.0)
    loud.say(3, "again", 5.0 + SAID_WITHIN)
    assert caplog.messages[len(said) :] == ["plugin other: not loud", "plugin loud: again"]


@pytest.mark.parametrize(
    ("sandbox", "told"),
    [
        (["landlock-2", "seccomp"], []),
        (["seccomp"], ["plugin p: its worker runs without landlock, which this host lacks"]),
        ([], ["plugin p: its worker runs without landlock and seccomp, which this host lacks"]),
    ],
)
def test_what_a_host_lacks_to_confine_workers_is_told_for_each_load(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    sandbox: list[str],
    told: list[str],
) -> None:
    async def load(*_: Any) -> Ready:
        return Ready("core", [], [], "", sandbox)

    async def twice() -> None:
        runners, plugin = with_worker(tmp_path, None)
        monkeypatch.setattr(runners, "_host", lambda plugin: None)
        for _ in range(2):
            await runners.probe(plugin, -1, upgrade=False)

    monkeypatch.setattr(workers.Worker, "load", load)
    asyncio.run(twice())
    assert caplog.messages == 2 * told
