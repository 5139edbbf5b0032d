"""Events that nobody takes as fast as they are emitted."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from circleosd.config import PluginSettings
from circleosd.database import Database
from circleosd.errors import Limit
from circleosd.plugins.events import WAITING, Deliver, Events
from circleosd.plugins.health import Health
from circleosd.plugins.manifest import Capability, Manifest
from circleosd.plugins.plugin import Plugin
from circleosd.plugins.service import HOST_MIGRATIONS
from circleosd.plugins.store import Record


def plugin(name: str) -> Plugin:
    """A plugin with the capability `events:*`."""
    health = Health(name, Record(), back_off_after=3, quarantine_after=6)
    manifest = Manifest(name, capabilities=(Capability("events:*"),))
    return Plugin(manifest, "", health, {"events:*": True}, PluginSettings())


def with_events(directory: Path, deliver: Deliver, use: Callable[[Events, Plugin], Awaitable[None]]) -> None:
    """Have `use` emit events as a plugin beside which there is another, to which `deliver` hands them."""

    async def run() -> None:
        emitting, other = plugin("emitting"), plugin("other")
        kept = Database(directory / "kept.db", HOST_MIGRATIONS)
        try:
            await use(Events(kept, lambda: (emitting, other), deliver), emitting)
        finally:
            kept.close()

    asyncio.run(asyncio.wait_for(run(), 20))


async def taken(plugin: Plugin, topic: str, payload: str, depth: int) -> None:
    """Takes an event at once."""


def test_who_follows_and_reads_too_slowly_is_told_that_events_are_lost(tmp_path: Path) -> None:
    async def use(events: Events, emitting: Plugin) -> None:
        following = events.follow(0, None)
        first = asyncio.ensure_future(anext(following))
        await asyncio.sleep(0)
        await events.emit(emitting, "t", "first", 0)
        assert (await first)["payload"] == "first"
        for number in range(WAITING + 1):
            await events.emit(emitting, "t", str(number), 0)
        with pytest.raises(Limit, match=f"more than {WAITING} events were waiting"):
            await anext(following)

    with_events(tmp_path, taken, use)


def test_a_plugin_gets_in_order_what_waits_for_it_and_what_is_too_much_is_lost(tmp_path: Path) -> None:
    got: list[str] = []

    async def use(events: Events, emitting: Plugin) -> None:
        for number in range(WAITING + 5):
            await events.emit(emitting, "t", str(number), 0)
        assert events.delivering
        go.set()
        while events.delivering:
            await asyncio.sleep(0.001)

    async def deliver(plugin: Plugin, topic: str, payload: str, depth: int) -> None:
        await go.wait()
        got.append(payload)

    go = asyncio.Event()
    with_events(tmp_path, deliver, use)
    assert got == [str(number) for number in range(1 + WAITING)]


def test_who_follows_a_topic_gets_the_events_of_that_alone_before_and_after(tmp_path: Path) -> None:
    async def use(events: Events, emitting: Plugin) -> None:
        for topic in ("wanted", "other", "wanted", "other"):
            await events.emit(emitting, topic, "before", 0)
        following = events.follow(50, "wanted")
        got = [await anext(following) for _ in range(2)]
        for topic in ("other", "wanted", "other", "wanted"):
            await events.emit(emitting, topic, "after", 0)
        got += [await anext(following) for _ in range(2)]
        assert [(event["topic"], event["payload"]) for event in got] == [("wanted", "before")] * 2 + [
            ("wanted", "after")
        ] * 2

    with_events(tmp_path, taken, use)


def test_what_an_old_version_emits_in_its_last_call_is_not_for_the_new_one(tmp_path: Path) -> None:
    got: list[str] = []

    async def use(events: Events, emitting: Plugin) -> None:
        old = plugin("other")
        await events.emit(old, "t", "", 0)
        while events.delivering:
            await asyncio.sleep(0.001)

    async def deliver(plugin: Plugin, topic: str, payload: str, depth: int) -> None:
        got.append(plugin.name)

    with_events(tmp_path, deliver, use)
    assert got == ["emitting"]
