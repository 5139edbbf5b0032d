"""Times as a person types them."""

from __future__ import annotations

import re
import time
from datetime import datetime, timedelta

from circleosd.api.contract import quoted
from circleosd.errors import BadRequest

EXAMPLES = "10min, 2h, 1d, yesterday, 2026-11-22 or '2026-11-22 09:30'"

_UNITS = {  # in seconds, by the names of systemd.time(7)
    1: ("s", "sec", "second", "seconds"),
    60: ("m", "min", "minute", "minutes"),
    3600: ("h", "hr", "hour", "hours"),
    86400: ("d", "day", "days"),
    604800: ("w", "week", "weeks"),
}
_LENGTHS = {name: length for length, names in _UNITS.items() for name in names}
_SPAN = r"[0-9]+ ?[a-z]+"
_DAYS_AGO = {"today": 0, "yesterday": 1}


def parse(text: str) -> float:
    """Seconds since the epoch from such a number, a span ago (`10min`, `-2h`, `1d 6h ago`), `now`, `today` or
    `yesterday`, or a date and time (ISO 8601).

    A date without a zone is in local time. Raises `BadRequest`.
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
            parts = re.findall(r"([0-9]+) ?([a-z]+)", span[1])
            return time.time() - sum(int(number) * _LENGTHS[unit] for number, unit in parts)
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, KeyError, OverflowError):
        raise BadRequest(f"{quoted(text)} is no time; give {EXAMPLES}") from None
