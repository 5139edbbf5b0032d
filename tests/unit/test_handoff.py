"""Handing a value from a callback to a task, without a turn of the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from circleosd.handoff import Handoff


def scenario(steps: Callable[[asyncio.AbstractEventLoop, list[str]], Awaitable[None]]) -> list[str]:
    """What the steps noted, in order."""
    noted: list[str] = []

    async def main() -> None:
        await steps(asyncio.get_running_loop(), noted)

    asyncio.run(main())
    return noted


async def take(handoff: Handoff[str], noted: list[str]) -> None:
    try:
        noted.append(await handoff)
    except BaseException as exc:
        noted.append(repr(exc))
        raise


def outside(loop: asyncio.AbstractEventLoop, work: Callable[[], Any]) -> asyncio.Future[Any]:
    """Do something in a callback of the loop, where no task runs."""
    done: asyncio.Future[Any] = loop.create_future()
    loop.call_soon(lambda: done.set_result(work()))
    return done


def test_the_waiting_task_goes_on_before_set_result_returns() -> None:
    async def steps(loop: asyncio.AbstractEventLoop, noted: list[str]) -> None:
        handoff: Handoff[str] = Handoff(loop)
        task = loop.create_task(take(handoff, noted))
        await asyncio.sleep(0)

        def work() -> None:
            handoff.set_result("value")
            noted.append("returned")

        await outside(loop, work)
        await task

    assert scenario(steps) == ["value", "returned"]


def test_a_value_that_is_there_already_is_taken() -> None:
    async def steps(loop: asyncio.AbstractEventLoop, noted: list[str]) -> None:
        handoff: Handoff[str] = Handoff(loop)
        handoff.set_result("early")
        await take(handoff, noted)

    assert scenario(steps) == ["early"]


def test_an_error_is_raised_where_the_task_waits() -> None:
    async def steps(loop: asyncio.AbstractEventLoop, noted: list[str]) -> None:
        handoff: Handoff[str] = Handoff(loop)
        task = loop.create_task(take(handoff, noted))
        await asyncio.sleep(0)
        await outside(loop, lambda: handoff.set_exception(ValueError("x")))
        with pytest.raises(ValueError, match="x"):
            await task

    assert scenario(steps) == ["ValueError('x')"]


def test_set_by_another_task_it_waits_for_the_loop() -> None:
    async def steps(loop: asyncio.AbstractEventLoop, noted: list[str]) -> None:
        handoff: Handoff[str] = Handoff(loop)
        task = loop.create_task(take(handoff, noted))
        await asyncio.sleep(0)
        handoff.set_result("value")
        noted.append("returned")
        await task

    assert scenario(steps) == ["returned", "value"]


def test_a_cancelled_task_stops_waiting() -> None:
    async def steps(loop: asyncio.AbstractEventLoop, noted: list[str]) -> None:
        handoff: Handoff[str] = Handoff(loop)
        task = loop.create_task(take(handoff, noted))
        await asyncio.sleep(0)
        task.cancel()
        assert handoff.done()
        with pytest.raises(asyncio.CancelledError):
            await task

    assert scenario(steps) == ["CancelledError()"]
