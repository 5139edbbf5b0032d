"""The rows of several ledgers in one order."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any


def merged(records: Sequence[Sequence[dict[str, Any]]], now: float) -> list[dict[str, Any]]:
    """The rows of several services, each in its own order, by time."""
    ahead = [row["time"] > now for rows in records for row in rows]
    if 2 * sum(ahead) > len(ahead):  # the clock is not right now, rather than at all these times
        now = math.inf
    placed = [item for rows in records for item in _placed(rows, now)]
    return [row for _, row in sorted(placed, key=lambda item: item[0])]


def _placed(rows: Iterable[dict[str, Any]], now: float) -> Iterator[tuple[float, dict[str, Any]]]:
    """The rows of one service in order, each with its time, or with the time of an earlier row if its own is wrong."""
    at = 0.0
    for row in rows:
        if row["time"] <= now:
            at = max(at, row["time"])
        yield at, row
