"""Replies in human-readable form: tables, fields, or plain text."""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Sequence
from typing import Any

from circleosd.steering import STEERING

_TIMES = {"created", "last_login", "last_used", "locked_until", "expires", "since", "loaded", "time", "last_failed"}
_SIZES = {"memory", "size", "stored"}
_SPANS = {"uptime", "duration"}
_WIDE = 64  # columns of a terminal after which a table cell is cut …
_NARROW = 10  # … and that it keeps in a narrow table


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str], room: int | None = None) -> str:
    """Rows under a header, with columns as wide as needed. The last column is never cut.

    `room`: the width of a terminal. If that makes most rows fit into it, longer cells are cut between the first column,
    which has the names, and the last, but no times.
    """
    if not rows:
        return "none"
    cells = [[column.upper().replace("_", " ") for column in columns]]
    for row in rows:
        *others, last = (value(column, row.get(column)) for column in columns)
        cells.append([*(_cut(cell, _WIDE) for cell in others), last])
    widths = [max(_width(row[index]) for row in cells) for index in range(len(columns))]
    if room:
        least = [widths[index] if name in _TIMES else max(_NARROW, len(name)) for index, name in enumerate(columns)]
        widths = _fitting(widths, least, [max(_width(row[-1]), len(columns[-1])) for row in cells[1:]], room)
        cells = [[*map(_cut, row[:-1], widths), row[-1]] for row in cells]
    return "\n".join("  ".join(_pad(*pair) for pair in zip(row, widths, strict=True)).rstrip() for row in cells)


def fields(data: dict[str, Any]) -> str:
    """One `name: value` a line, names aligned."""
    width = max(map(len, data), default=0) + 1
    return "\n".join(f"{key.replace('_', ' ') + ':':<{width}} {value(key, item)}" for key, item in data.items())


def value(name: str, item: Any) -> str:
    """A value as text; whether it is a time, a size or a duration depends on its name."""
    if item is None:
        return "-"
    if isinstance(item, bool):
        return "yes" if item else "no"
    if isinstance(item, (list, tuple)):
        return ", ".join(value("", part) for part in item) or "-"
    if isinstance(item, dict):
        return ", ".join(f"{key}={value(key, part)}" for key, part in item.items()) or "-"
    if isinstance(item, (int, float)):
        if name in _TIMES:
            return _moment(item)
        if name in _SIZES:
            return _size(item)
        if name in _SPANS:
            return _span(item)
    return printable(str(item))


def printable(text: str, keep: str = "") -> str:
    """`text` with control characters, except those in `keep`, shown as escapes."""
    return "".join(repr(char)[1:-1] if char in STEERING and char not in keep else char for char in text)


def _moment(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (OverflowError, OSError):  # no calendar has it, as in an altered record
        return str(seconds)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _span(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _width(text: str) -> int:
    """Columns on a terminal: wide East Asian characters take two (UAX #11), marks and invisible ones none."""
    if text.isascii():
        return len(text)
    return sum(map(_columns, text))


def _columns(char: str) -> int:
    of_a_syllable = "\u1160" <= char <= "\u11ff"  # what follows the first letter of one in Hangul
    if of_a_syllable or unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _pad(text: str, width: int) -> str:
    return text + " " * (width - _width(text))


def _fitting(widths: Sequence[int], least: Sequence[int], ends: Sequence[int], room: int) -> list[int]:
    """The widths of columns, with those between the first and the last reduced, but not below `least`, until all lines
    fit that can, given the widths `ends` of their last cells; unchanged if most cannot.
    """
    fitting, between, rest = [*widths], range(1, len(widths) - 1), room - 2 * (len(widths) - 1)
    narrowest = widths[0] + sum(min(widths[index], least[index]) for index in between)
    fits = [end for end in ends if narrowest + end <= rest]
    if 2 * len(fits) > len(ends):
        while sum(fitting[:-1]) + max(fits) > rest:
            wide = [index for index in between if fitting[index] > least[index]]
            fitting[max(wide, key=fitting.__getitem__)] -= 1
    return fitting


def _cut(text: str, width: int) -> str:
    if _width(text) <= width:
        return text
    text = text[: width - 1]
    while _width(text) >= width:
        text = text[:-1]
    return text + "…"
