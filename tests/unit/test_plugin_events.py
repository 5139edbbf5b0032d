"""Events that people read, and how many are kept for them."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import cast

import pytest

from circleosd.api.plugins import PluginEvent
from circleosd.config import PluginSettings
from circleosd.database import Database
from circleosd.errors import Limit
from circleosd.plugins.cause import Cause
from circleosd.plugins.events import FOLLOWED_AT_ONCE, READINGS_BY_ONE, WAITING, Events
from circleosd.plugins.keyvalue import KeyValue
from circleosd.plugins.manifest import Manifest
from circleosd.plugins.plugin import Plugin
from circleosd.plugins.service import HOST_MIGRATIONS
from circleosd.plugins.store import Record
from tests.waiting import SECONDS


def with_events(directory: Path, use: Callable[[Events, Plugin], Awaitable[None]]) -> None:
    """Have `use` emit events as a plugin."""

    async def run() -> None:
        kept = Database(directory / "kept.db", HOST_MIGRATIONS)
        try:
            emitting = Plugin(Manifest("emitting"), "", Record(), {}, PluginSettings())
            await use(Events(kept, lambda *event: None), emitting)
        finally:
            kept.close()

    asyncio.run(asyncio.wait_for(run(), SECONDS))


def test_who_follows_and_reads_too_slowly_is_told_that_events_are_lost(tmp_path: Path) -> None:
    async def use(events: Events, emitting: Plugin) -> None:
        following = events.follow(0, None)
        first = asyncio.ensure_future(anext(following))
        await asyncio.sleep(0)
        await events.emit(emitting, "t", "first", Cause())
        assert (await first)["payload"] == "first"
        for number in range(WAITING + 1):
            await events.emit(emitting, "t", str(number), Cause())
        with pytest.raises(Limit, match=f"more than {WAITING} events were waiting"):
            await anext(following)

    with_events(tmp_path, use)


def test_who_follows_a_topic_loses_nothing_to_a_flood_of_others(tmp_path: Path) -> None:
    async def use(events: Events, emitting: Plugin) -> None:
        following = events.follow(0, "calm")
        first = asyncio.ensure_future(anext(following))
        await asyncio.sleep(0)
        await events.emit(emitting, "calm", "first", Cause())
        assert (await first)["payload"] == "first"
        for _ in range(WAITING + 1):  # while the first one is being read
            await events.emit(emitting, "noise", "", Cause())
        await events.emit(emitting, "calm", "second", Cause())
        assert (await anext(following))["payload"] == "second"

    with_events(tmp_path, use)


def test_who_follows_a_topic_gets_the_events_of_that_alone_before_and_after(tmp_path: Path) -> None:
    async def use(events: Events, emitting: Plugin) -> None:
        for topic in ("wanted", "other", "wanted", "other"):
            await events.emit(emitting, topic, "before", Cause())
        following = events.follow(50, "wanted")
        got = [await anext(following) for _ in range(2)]
        for topic in ("other", "wanted", "other", "wanted"):
            await events.emit(emitting, topic, "after", Cause())
        got += [await anext(following) for _ in range(2)]
        assert [(event["topic"], event["payload"]) for event in got] == [("wanted", "before")] * 2 + [
            ("wanted", "after")
        ] * 2

    with_events(tmp_path, use)


@pytest.mark.parametrize(("topic", "step"), [(None, 1), ("odd", 2)])
def test_who_follows_gets_the_newest_and_then_what_comes(tmp_path: Path, topic: str | None, step: int) -> None:
    last = 5 * FOLLOWED_AT_ONCE

    async def use(events: Events, emitting: Plugin) -> None:
        for number in range(1, last):
            await events.emit(emitting, "odd" if number % 2 else "even", str(number), Cause())
        following = aiter(events.follow(2 * FOLLOWED_AT_ONCE, topic))
        found = [(await anext(following))["payload"]]
        await events.emit(emitting, "odd", "new", Cause())
        while found[-1] != "new":
            found.append((await anext(following))["payload"])
        first = last - 2 * FOLLOWED_AT_ONCE * step
        assert found == [*(str(number) for number in range(first, last) if step == 1 or number % 2), "new"]
        later = asyncio.ensure_future(anext(following))
        (follower,) = events._followers
        while not follower._queue.empty():  # what came meanwhile, and was read with what was there before
            await asyncio.sleep(0)
        await events.emit(emitting, "odd", "newer", Cause())
        assert [await later] == await events.last(1, None, None)
        assert (await later)["payload"] == "newer"
        await cast(AsyncGenerator[PluginEvent, None], following).aclose()
        assert not events._followers

    with_events(tmp_path, use)


def test_what_plugins_keep_can_be_had_while_many_events_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, told = threading.Event(), threading.Event()

    def slow(connection: sqlite3.Connection, count: int, topic: str | None) -> list[PluginEvent]:
        begun.set()
        assert told.wait(SECONDS)
        return []

    async def use(events: Events, emitting: Plugin) -> None:
        readings = [asyncio.ensure_future(events.last(1000, None, 1000)) for _ in range(READINGS_BY_ONE)]
        await asyncio.to_thread(begun.wait, 20)
        with pytest.raises(Limit, match="for uid 1000"):
            await events.last(1000, None, 1000)
        assert await KeyValue(events._database).get("emitting", "key") is None
        told.set()
        assert await asyncio.gather(*readings) == [[]] * READINGS_BY_ONE

    monkeypatch.setattr("circleosd.plugins.events._last", slow)
    with_events(tmp_path, use)


def test_the_newest_events_are_kept_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("circleosd.plugins.events.KEPT", 3)

    async def use(events: Events, emitting: Plugin) -> None:
        for number in range(5):
            await events.emit(emitting, "t", str(number), Cause())
        assert [event["payload"] for event in await events.last(10, None, None)] == ["2", "3", "4"]

    with_events(tmp_path, use)


def test_a_plugin_that_emits_very_many_events_displaces_only_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("circleosd.plugins.events.KEPT", 5)

    async def use(events: Events, emitting: Plugin) -> None:
        calm = Plugin(Manifest("calm"), "", Record(), {}, PluginSettings())
        await events.emit(calm, "t", "rare", Cause())
        for number in range(10):
            await events.emit(emitting, "t", str(number), Cause())
        await events.emit(calm, "t", "again", Cause())
        found = await events.last(10, None, None)
        assert [event["payload"] for event in found] == ["rare", "7", "8", "9", "again"]

    with_events(tmp_path, use)


def test_an_event_has_no_more_bytes_and_follows_from_no_more_others_than_the_reference_says(tmp_path: Path) -> None:
    async def use(events: Events, emitting: Plugin) -> None:
        await events.emit(emitting, "t", "é" * 8192, Cause(3))
        with pytest.raises(Limit, match="may have at most 16384 bytes"):
            await events.emit(emitting, "t", "é" * 8192 + "e", Cause())
        with pytest.raises(Limit, match="follows from a chain of 4 others"):
            await events.emit(emitting, "t", "", Cause(4))

    with_events(tmp_path, use)
