"""Measuring a machine that does other things as well: what these add is not in every measurement."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

TRIES = 20

T = TypeVar("T")


def once_it_holds(measure: Callable[[], T], holds: Callable[[T], object], tries: int = TRIES) -> T:
    """The first measurement of which `holds` is true. Fails with all there were if that is none of so many."""
    found: list[T] = []
    while not found or not holds(found[-1]):
        assert len(found) < tries, found
        found.append(measure())
    return found[-1]
