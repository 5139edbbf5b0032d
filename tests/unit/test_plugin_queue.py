"""How many calls of a plugin may wait."""

from __future__ import annotations

import asyncio
from pathlib import Path

from circleosd.config import PluginSettings
from circleosd.errors import Denied, Limit
from tests.unit.fakes import SlowWorker, with_worker
from tests.waiting import SECONDS


def test_calls_in_hand_take_no_place_among_those_that_wait(tmp_path: Path) -> None:
    async def called() -> list[BaseException | str]:
        runners, plugin = with_worker(tmp_path, SlowWorker(0.01), PluginSettings(queue=1), concurrency=2)
        calls = (runners.call(plugin, "f", "x", 1000) for _ in range(4))
        return await asyncio.gather(*calls, return_exceptions=True)

    *served, refused = asyncio.run(called())
    assert served == ["x"] * 3
    assert isinstance(refused, Limit)
    assert str(refused).startswith("at most 3 calls of p at once (plugins.queue)")


def test_the_calls_of_one_uid_leave_half_of_the_queue_to_others(tmp_path: Path) -> None:
    async def called() -> tuple[list[BaseException | str], list[BaseException | str]]:
        runners, plugin = with_worker(tmp_path, SlowWorker(0.01), PluginSettings(queue=4))

        async def times(number: int, uid: int | None) -> list[BaseException | str]:
            calls = (runners.call(plugin, "f", "x", uid) for _ in range(number))
            return await asyncio.gather(*calls, return_exceptions=True)

        found = await asyncio.gather(times(10, 1000), times(10, None))
        assert await times(1, 1000) == ["x"], "a call that has ended leaves its place"
        return found

    one, other = asyncio.run(called())
    assert one.count("x") == 3, "one call in hand, and two that wait"
    assert "for uid 1000" in str(one[-1])
    assert other.count("x") == 2, "the rest of the places"


def test_a_place_that_comes_to_a_call_just_given_up_goes_to_the_next(tmp_path: Path) -> None:
    async def third() -> str:
        runners, plugin = with_worker(tmp_path, SlowWorker(0.01))

        async def call_and_give_up_the_next() -> None:
            await runners.call(plugin, "f", "first")
            second.cancel()  # its place has come, and it has not gone on yet

        first = asyncio.create_task(call_and_give_up_the_next())
        await asyncio.sleep(0)
        second = asyncio.create_task(runners.call(plugin, "f", "second"))
        await first
        async with asyncio.timeout(SECONDS):
            return await runners.call(plugin, "f", "third")

    assert asyncio.run(third()) == "third"


def test_a_call_that_has_waited_is_not_made_for_who_may_not_call_any_more(tmp_path: Path) -> None:
    renewed: list[str] = []

    async def called() -> list[BaseException | str]:
        runners, plugin = with_worker(tmp_path, SlowWorker(0.01))

        async def call(payload: str) -> str:
            async def renew() -> None:
                renewed.append(payload)
                if payload == "revoked":
                    raise Denied("the session was revoked")

            return await runners.call(plugin, "f", payload, renew=renew)

        calls = (call(payload) for payload in ("first", "revoked", "third"))
        return await asyncio.gather(*calls, return_exceptions=True)

    first, refused, third = asyncio.run(called())
    assert (first, str(refused), third) == ("first", "the session was revoked", "third")
    assert renewed == ["revoked", "third"], "the first has not waited"


def test_who_calls_once_does_not_wait_for_all_the_calls_of_another(tmp_path: Path) -> None:
    async def served() -> list[str]:
        runners, plugin = with_worker(tmp_path, SlowWorker(0.001))
        order: list[str] = []

        async def call(payload: str, uid: int | None) -> None:
            order.append(await runners.call(plugin, "f", payload, uid))

        uids = ((1, "a"), (2, "b"), (None, "c"))
        callers = [(f"{letter}{number}", uid) for uid, letter in uids for number in range(3)]
        await asyncio.gather(*(call(*caller) for caller in callers))
        return order

    assert asyncio.run(served()) == ["a0", "a1", "b0", "c0", "a2", "b1", "c1", "b2", "c2"]


def test_calls_that_were_given_up_cost_their_uid_no_turn(tmp_path: Path) -> None:
    async def served() -> list[str]:
        runners, plugin = with_worker(tmp_path, SlowWorker(0.001))
        order: list[str] = []

        async def call(payload: str, uid: int) -> None:
            order.append(await runners.call(plugin, "f", payload, uid))

        waiting = [(f"{letter}{number}", uid) for uid, letter in ((1, "a"), (2, "b")) for number in range(3)]
        callers = [("first", 0), *waiting]
        calls = [asyncio.create_task(call(*caller)) for caller in callers]
        await asyncio.sleep(0)
        for given_up in (calls[1], calls[2]):
            given_up.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        return order

    assert asyncio.run(served()) == ["first", "a2", "b0", "b1", "b2"]
