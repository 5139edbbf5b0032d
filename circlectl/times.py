"""Times as people type them."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime, timedelta

from circleosd.api.contract import quoted
from circleosd.errors import BadRequest

EXAMPLES = "10min, 2h, 1d, yesterday, 2026-11-22 or '2026-11-22 09:30'"

_UNITS = {  # in seconds, by the names of systemd.time(7)
    1e-6: ("us", "usec"),
    1e-3: ("ms", "msec"),
    1: ("s", "sec", "second", "seconds"),
    60: ("m", "min", "minute", "minutes"),
    3600: ("h", "hr", "hour", "hours"),
    86400: ("d", "day", "days"),
    604800: ("w", "week", "weeks"),
    2629800: ("M", "month", "months"),
    31557600: ("y", "year", "years"),
}
_LENGTHS = {name: length for length, names in _UNITS.items() for name in names}
_SPAN = r"[0-9]+(?:\.[0-9]+)? ?[a-zM]+"
_DAYS_AGO = {"today": 0, "yesterday": 1}


def parse(text: str) -> float:
    """Seconds since the epoch from such a number, a span ago (`10min`, `-2h`, `1d 6h ago`), `now`, `today` or
    `yesterday`, or a date and time (ISO 8601, or as systemd prints them: `Thu 2026-11-26 09:30:00 UTC`).

    A time without a date is today's, one without a zone local. The zone may be UTC, an offset from it (`+0100`), or the
    local one by its short name (`CET`). Raises `BadRequest`.
    """
    try:
        if re.fullmatch(r"@?[0-9]{1,15}(\.[0-9]+)?", text):
            return float(text.removeprefix("@"))
        if text == "now":
            return time.time()
        if (days := _DAYS_AGO.get(text)) is not None:
            midnight = datetime.now().replace(hour=0, minute=0, second=0, microsecond=0)
            return (midnight - timedelta(days=days)).timestamp()
        if span := re.fullmatch(rf"-?({_SPAN}(?: ?{_SPAN})*)( ago)?", text):
            parts = re.findall(r"([0-9.]+) ?([a-zM]+)", span[1])
            ago = timedelta(seconds=sum(float(number) * _LENGTHS[unit] for number, unit in parts))
            return time.time() - ago.total_seconds()
        return _timestamp(text)
    except (ValueError, KeyError, OverflowError):
        raise BadRequest(f"{quoted(text)} is not a time; use {EXAMPLES}") from None


def _timestamp(text: str) -> float:
    """Raises ValueError, also if the day of the week or the zone does not match the date."""
    text, zone = re.sub(r" ([+-][0-9:]+)$", r"\1", text), None
    if named := re.search(r" ([A-Za-z]{3,5})$", text):
        zone, text = named[1], text[: named.start()]
    if weekday := re.match(r"(Mon|Tue|Wed|Thu|Fri|Sat|Sun) ", text):
        text = text[weekday.end() :]
    if re.fullmatch(r"[0-9]{2}:[0-9:.]+", text):
        text = f"{datetime.now(UTC if zone == 'UTC' else None):%Y-%m-%d} {text}"
    if re.match(r"[0-9-]{8,10}[+-]", text):  # an offset from UTC without a time, for which it would be taken
        raise ValueError
    when = datetime.fromisoformat(text)
    if (weekday and when.strftime("%a") != weekday[1]) or (zone and when.tzinfo):
        raise ValueError
    if zone is None:
        return when.timestamp()
    if zone == "UTC":
        return when.replace(tzinfo=UTC).timestamp()
    for again in (0, 1):  # an hour occurs twice when summer time ends, and not at all when it begins
        local = when.replace(fold=again).astimezone()
        if local.tzname() == zone and local.replace(tzinfo=None) == when:
            return local.timestamp()
    raise ValueError
