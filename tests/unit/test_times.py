"""Times as a person types them."""

from __future__ import annotations

import time
from datetime import datetime

import pytest

from circlectl import times
from circleosd.errors import BadRequest

SPANS = {
    "10min": 600, "-10min": 600, "10 minutes ago": 600, "90s": 90, "1h30min": 5400, "1d 6h": 108000, "2 weeks": 1209600,
    "1hour": 3600, "now": 0,
}  # fmt: skip


@pytest.mark.parametrize("text", SPANS)
def test_a_span_is_so_long_ago(text: str) -> None:
    before = time.time()
    found = times.parse(text)
    assert before - 1e-3 <= found + SPANS[text] <= time.time() + 1e-3


def test_a_number_is_seconds_since_the_epoch() -> None:
    assert times.parse("1764000000") == times.parse("@1764000000") == 1764000000.0
    assert times.parse("1764000000.5") == 1764000000.5


def test_days_begin_at_local_midnight() -> None:
    now = datetime.now()
    today = datetime.fromtimestamp(times.parse("today"))
    yesterday = datetime.fromtimestamp(times.parse("yesterday"))
    assert (today.hour, today.minute, today.second, today.microsecond) == (0, 0, 0, 0)
    assert 0 <= (now - today).total_seconds() < 25 * 3600
    assert (today.date() - yesterday.date()).days == 1


def test_a_date_is_iso_8601() -> None:
    assert times.parse("2026-11-22") == datetime(2026, 11, 22).timestamp()
    assert times.parse("2026-11-22 09:30") == datetime(2026, 11, 22, 9, 30).timestamp()
    assert times.parse("2026-11-22T09:30:00Z") == 1795339800.0


WRONG = ["", "soon", "-5", "5 parsecs", "10min 3", "1e9", "nan", "inf", "0001-01-01", "2026-13-01", "\n", "١٠min", "--"]
LONG = ["9" * 400, "9" * 400 + "w", "9" * 5000 + "s", "x" * 100_000]


@pytest.mark.parametrize("text", [*WRONG, *LONG])
def test_what_is_no_time_is_refused_in_a_short_line(text: str) -> None:
    with pytest.raises(BadRequest, match="is no time; give 10min, 2h") as refused:
        times.parse(text)
    assert len(str(refused.value)) < 200
