"""Measuring on a machine that does other things as well: what these add is not in every measurement."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

TRIES = 20

T = TypeVar("T")


def once_it_holds(measure: Callable[[], T], holds: Callable[[T], object], tries: int = TRIES) -> T:
    """The first measurement of which `holds` is true. Fails with all there were if that is none of so many."""
    found: list[T] = []
    while not found or not holds(found[-1]):
        assert len(found) < tries, found
        found.append(measure())
    return found[-1]


def lines_run(work: Callable[[], object]) -> int:
    """How many lines of Python `work` runs, which no other process changes. What C does is not counted."""
    count, tracing = 0, sys.gettrace()

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(tracing)
    return count
