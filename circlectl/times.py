"""Times as a person types them."""

from __future__ import annotations

import re
import time
from datetime import datetime

from circleosd.errors import BadRequest

_UNITS = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "day": 86400, "days": 86400, "w": 604800}


def parse(text: str) -> float:
    """Seconds since the epoch from such a number, a span ago (`10min`, `2h`, `1d`), or a date and time (ISO 8601).

    A date without a zone is in local time. Raises `BadRequest`.
    """
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        return float(text)
    if (span := re.fullmatch(r"([0-9]+) ?([a-z]+)( ago)?", text)) and span[2] in _UNITS:
        return time.time() - int(span[1]) * _UNITS[span[2]]
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise BadRequest(f"{text!r} is no time; give 10min, 2h, 1d, 2026-11-22 or '2026-11-22 09:30'") from None
