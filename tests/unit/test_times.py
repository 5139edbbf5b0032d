"""Times as a person types them."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest

from circlectl import times
from circleosd.errors import BadRequest
from tests.measuring import once_it_holds

SPANS = {
    "10min": 600, "-10min": 600, "10 minutes ago": 600, "90s": 90, "1h30min": 5400, "1d 6h": 108000, "2 weeks": 1209600,
    "1hour": 3600, "now": 0, "1.5h": 5400, "500ms": 0.5, "1month": 2629800, "2M 1m": 5259660, "1y": 31557600,
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
    first = datetime.now().date()
    today = datetime.fromtimestamp(times.parse("today"))
    yesterday = datetime.fromtimestamp(times.parse("yesterday"))
    last = datetime.now().date()  # another day, if it is midnight now
    assert (today.hour, today.minute, today.second, today.microsecond) == (0, 0, 0, 0)
    assert first <= today.date() <= last
    assert first <= yesterday.date() + timedelta(days=1) <= last


def test_a_date_is_iso_8601() -> None:
    assert times.parse("2026-11-22") == datetime(2026, 11, 22).timestamp()
    assert times.parse("2026-11-22 09:30") == datetime(2026, 11, 22, 9, 30).timestamp()
    assert times.parse("2026-11-22T09:30:00Z") == 1795339800.0


DATES = [
    "2026-11-22", "2026-11-22 09:30", "2026-11-22 09:30 UTC", "2026-11-22 UTC", "Thu 2026-11-26 09:30",
    "Thu 2026-11-26 09:30:15 UTC", "09:30", "09:30:15", "09:30 UTC",
]  # fmt: skip


def analyzed(verb: str, text: str, line: str) -> str:
    """What `systemd-analyze VERB TEXT` says in its line of that name."""
    env = {**os.environ, "LC_ALL": "C.UTF-8"}
    done = subprocess.run(["systemd-analyze", verb, "--", text], env=env, capture_output=True, text=True, check=True)
    return next(said.partition(line)[2].strip() for said in done.stdout.splitlines() if line in said)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze, to compare with")
def test_times_are_what_systemd_takes_them_for() -> None:

    def both(text: str) -> tuple[str, float, float]:
        return text, times.parse(text), float(analyzed("timestamp", text, "UNIX seconds: @"))

    for text in DATES:
        once_it_holds(partial(both, text), lambda times: times[1] == times[2], tries=2)  # midnight may come in between
    for text in ("1.5h", "500ms", "1month", "2M 1m", "1y", "1h30min"):
        assert int(analyzed("timespan", text, "μs: ")) / 1e6 == SPANS.get(text, 5400), text


@pytest.fixture
def zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Moves to a time zone."""

    def move(name: str) -> None:
        monkeypatch.setenv("TZ", name)
        time.tzset()

    yield move
    monkeypatch.undo()
    time.tzset()


def test_a_time_may_have_the_local_zone_as_systemd_prints_it(zone: Callable[[str], None]) -> None:
    zone("CET-1CEST,M3.5.0,M10.5.0/3")
    assert times.parse("Sun 2026-11-22 09:30:00 CET") == times.parse("2026-11-22 09:30") == 1795336200.0
    twice = [times.parse(f"Sun 2026-10-25 02:30:00 {name}") for name in ("CEST", "CET")]
    assert twice == [1792888200.0, 1792891800.0]
    for wrong in ("2026-11-22 09:30 CEST", "2026-11-22 09:30 EST", "2026-03-29 02:30 CET", "2026-03-29 02:30 CEST"):
        with pytest.raises(BadRequest, match="is not a time"):
            times.parse(wrong)
    zone("ChST-10")
    assert times.parse("Sun 2026-11-22 09:30:00 ChST") == 1795303800.0


@pytest.mark.parametrize("local", ["CET-1", "<+03>-3"])  # in the latter, systemd prints it so
def test_a_time_may_have_its_offset_from_utc_after_a_blank_too(zone: Callable[[str], None], local: str) -> None:
    zone(local)
    for offset in ("+03", " +03", " +0300", " +03:00"):
        assert times.parse(f"Sun 2026-11-22 09:30:00{offset}") == 1795329000.0


@pytest.mark.parametrize("offset", ["<+14>-14", "<-12>12"])  # in one of them, it is always another day than in UTC
def test_a_time_in_utc_is_of_the_day_in_utc(zone: Callable[[str], None], offset: str) -> None:
    zone(offset)
    before, found, after = (datetime.now(UTC), times.parse("09:30 UTC"), datetime.now(UTC))
    assert datetime.fromtimestamp(found, UTC).date() in (before.date(), after.date())


def test_a_time_may_have_the_day_of_the_week_and_utc() -> None:
    assert times.parse("2026-11-22 09:30 UTC") == times.parse("Sun 2026-11-22 09:30 UTC") == 1795339800.0

    def half_past_nine() -> float:
        return datetime.now().replace(hour=9, minute=30, second=0, microsecond=0).timestamp()

    first, found, last = half_past_nine(), times.parse("09:30"), half_past_nine()
    assert first <= found <= last  # another day's, if it is midnight now
    for wrong in (
        "Mon 2026-11-22 09:30",
        "2026-11-22T09:30:00+02:00 UTC",
        "2026-11-22+02:00",
        "2026-11-22-0500",
        "2026-11-22 -0500",
        "20261122-0500",
        "UTC",
        " UTC",
        "Thu ",
        "09:",
        "1.h",
        "1..5h",
    ):
        with pytest.raises(BadRequest, match="is not a time"):
            times.parse(wrong)


WRONG = ["", "soon", "-5", "5 parsecs", "10min 3", "1e9", "nan", "inf", "0001-01-01", "2026-13-01", "\n", "١٠min", "--"]
LONG = ["9" * 400, "9" * 400 + "w", "9" * 5000 + "s", "x" * 100_000]


@pytest.mark.parametrize("text", [*WRONG, *LONG])
def test_what_is_no_time_is_refused_in_a_short_line(text: str) -> None:
    with pytest.raises(BadRequest, match="is not a time; use 10min, 2h") as refused:
        times.parse(text)
    assert len(str(refused.value)) < 200
