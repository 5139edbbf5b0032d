"""Events that other plugins get, or that they do not take as fast as they are emitted."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from circleosd.config import PluginSettings
from circleosd.errors import PluginFailed
from circleosd.plugins.cause import Cause
from circleosd.plugins.delivery import WAITING, Deliver, Delivery
from circleosd.plugins.manifest import Capability, Manifest
from circleosd.plugins.plugin import Plugin
from circleosd.plugins.store import Record
from tests.waiting import SECONDS, until


def plugin(name: str) -> Plugin:
    """A plugin with the capability `events:*`."""
    manifest = Manifest(name, capabilities=(Capability("events:*"),))
    return Plugin(manifest, "", Record(), {"events:*": True}, PluginSettings())


def delivering(deliver: Deliver, use: Callable[[Delivery, Plugin], Awaitable[None]]) -> None:
    """Have `use` offer events of a plugin beside which there is another, to which `deliver` hands them."""

    async def run() -> None:
        emitting, other = plugin("emitting"), plugin("other")
        await use(Delivery(lambda: (emitting, other), deliver), emitting)

    asyncio.run(asyncio.wait_for(run(), SECONDS))


def test_a_plugin_gets_in_order_what_waits_for_it_and_what_is_too_much_is_lost() -> None:
    got: list[str] = []

    async def use(delivery: Delivery, emitting: Plugin) -> None:
        for number in range(WAITING + 5):
            delivery.offer(emitting, "t", str(number), Cause())
            await asyncio.sleep(0)  # the first one does not wait any more
        assert delivery.busy
        go.set()
        await until(lambda: not delivery.busy)

    async def deliver(plugin: Plugin, topic: str, payload: str, cause: Cause) -> None:
        await go.wait()
        got.append(payload)

    go = asyncio.Event()
    delivering(deliver, use)
    assert got == [str(number) for number in range(1 + WAITING)]


def test_what_is_emitted_after_the_end_is_not_delivered() -> None:
    got: list[str] = []

    async def use(delivery: Delivery, emitting: Plugin) -> None:
        delivery.close()
        delivery.offer(emitting, "t", "late", Cause())
        assert not delivery.busy
        await asyncio.sleep(0)

    async def deliver(plugin: Plugin, topic: str, payload: str, cause: Cause) -> None:
        got.append(payload)

    delivering(deliver, use)
    assert got == []


def test_a_plugin_that_fails_at_events_or_loses_them_fills_the_log_no_faster_than_with_its_own_messages(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("circleosd.plugins.voice.MOST_SAID", 3)

    async def use(delivery: Delivery, emitting: Plugin) -> None:
        for number in range(WAITING + 3):
            delivery.offer(emitting, "t", str(number), Cause())
            await asyncio.sleep(0)  # the first one does not wait any more
        go.set()
        await until(lambda: not delivery.busy)

    async def deliver(plugin: Plugin, topic: str, payload: str, cause: Cause) -> None:
        await go.wait()
        raise PluginFailed("x" * 65_536)

    go = asyncio.Event()
    delivering(deliver, use)
    lost = f"plugin other: an event of t is lost: {WAITING} are already waiting"
    failed = f"plugin other: {'cannot take an event of t: '.ljust(8192, 'x')}…"
    dropped = "plugin other: logged more than 3 messages within 30 s; the rest is dropped"
    assert caplog.messages == [lost, lost, failed, dropped]


def test_what_an_old_version_emits_in_its_last_call_is_not_for_the_new_one() -> None:
    got: list[str] = []

    async def use(delivery: Delivery, emitting: Plugin) -> None:
        old = plugin("other")
        delivery.offer(old, "t", "", Cause())
        await until(lambda: not delivery.busy)

    async def deliver(plugin: Plugin, topic: str, payload: str, cause: Cause) -> None:
        got.append(plugin.name)

    delivering(deliver, use)
    assert got == ["emitting"]
