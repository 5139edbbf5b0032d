"""Deadlines of many tasks with one timer."""

from __future__ import annotations

import asyncio

from circleosd.deadlines import Deadlines
from tests.unit.fakes import TimelessLoop


async def work(deadlines: Deadlines, seconds: float) -> str:
    task = asyncio.current_task()
    assert task is not None
    deadlines.begin(task)
    try:
        await asyncio.sleep(seconds)
        outcome = "done"
    except asyncio.CancelledError:
        late = deadlines.late(task)
        outcome = "late" if deadlines.end(task) else "cancelled"
        assert late == (outcome == "late")
    finally:
        assert not deadlines.end(task)
    assert task.cancelling() == (outcome == "cancelled")
    return outcome


def test_tasks_that_take_too_long_are_cancelled_and_no_others() -> None:
    async def main() -> list[str]:
        deadlines = Deadlines(0.1)
        first = [asyncio.create_task(work(deadlines, seconds)) for seconds in (0.0, 0.101, 0.099, 5.0)]
        await asyncio.sleep(0.06)
        later = [asyncio.create_task(work(deadlines, seconds)) for seconds in (0.099, 0.101)]
        return await asyncio.gather(*first, *later)

    with asyncio.Runner(loop_factory=TimelessLoop) as runner:
        assert runner.run(main()) == ["done", "late", "done", "late", "done", "late"]


def test_who_is_cancelled_by_somebody_else_is_not_late() -> None:
    async def main() -> str:
        deadlines = Deadlines(0.1)
        task = asyncio.create_task(work(deadlines, 5.0))
        await asyncio.sleep(0)
        task.cancel()
        return await task

    with asyncio.Runner(loop_factory=TimelessLoop) as runner:
        assert runner.run(main()) == "cancelled"


def test_each_piece_of_work_of_a_task_has_a_time_of_its_own() -> None:
    async def main() -> list[str]:
        deadlines = Deadlines(0.1)
        outcomes = []
        for seconds in (0.05, 5.0, 0.05):
            outcomes.append(await work(deadlines, seconds))
            await asyncio.sleep(1.0)  # no work, so no time that could run out
        return outcomes

    with asyncio.Runner(loop_factory=TimelessLoop) as runner:
        assert runner.run(main()) == ["done", "late", "done"]


def test_what_is_done_is_not_cancelled_for_its_time() -> None:
    async def main() -> str:
        deadlines, done = Deadlines(0.1), False
        task = asyncio.current_task()
        assert task is not None
        deadlines.begin(task, lambda: done)
        await asyncio.sleep(0.05)
        done = True
        await asyncio.sleep(5.0)
        return "late" if deadlines.end(task) else "done"

    with asyncio.Runner(loop_factory=TimelessLoop) as runner:
        assert runner.run(main()) == "done"
