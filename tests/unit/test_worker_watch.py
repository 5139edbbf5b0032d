"""The time that a call and what follows it have."""

from __future__ import annotations

import signal
import threading
from types import SimpleNamespace

import pytest

from circleosd.worker import engine, watch
from circleosd.worker.engine import Engine
from circleosd.worker.frames import Limits
from circleosd.worker.limits import GRACE, hard_deadline
from circleosd.worker.watch import SharedWatch, Watch

SECONDS = 2.0
NOW = 1000.0


class Alarm:
    """The clock, and when the alarm is due; None: it is off."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = NOW
        self.due: float | None = None
        monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(watch, "signal", SimpleNamespace(setitimer=self._set, ITIMER_REAL=signal.ITIMER_REAL))

    def _set(self, which: int, seconds: float) -> None:
        assert which == signal.ITIMER_REAL
        self.due = self.now + seconds if seconds else None


@pytest.fixture
def alarm(monkeypatch: pytest.MonkeyPatch) -> Alarm:
    return Alarm(monkeypatch)


@pytest.mark.parametrize("kind", [Watch, SharedWatch])
@pytest.mark.parametrize("seconds", [0.001, 1.0, 5.0, 11.0, 60.0, 3600.0])
def test_a_call_and_what_follows_it_are_interrupted_before_the_worker_ends(
    alarm: Alarm, monkeypatch: pytest.MonkeyPatch, kind: type[Watch], seconds: float
) -> None:
    intervals = []

    def ticker(interval: float, *_: int) -> SimpleNamespace:
        intervals.append(interval)
        return SimpleNamespace(start=lambda: None, stop=lambda: None)

    monkeypatch.setattr(watch, "Ticker", ticker)
    call = kind(seconds, (0, 0))
    (interval,) = intervals
    assert interval <= seconds / 20
    latest = interval * (watch.ticks(seconds) + 1)
    assert latest >= seconds
    for took in (0.0, GRACE / 8, GRACE / 4, GRACE / 2, GRACE, seconds):
        call.begin()
        assert alarm.due is not None
        assert alarm.due - alarm.now > latest
        alarm.now += took
        call.extend()
        assert alarm.due - alarm.now > latest + GRACE / 5  # a tick may come late
        call.end()


def test_a_tick_that_comes_late_takes_nothing_of_the_next_calls_time(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(engine, "_set_deadline", lambda context, ticks: given.append(ticks))
    Engine("module", Limits(time=SECONDS), deterministic=False).allow(None)
    assert given == [watch.ticks(SECONDS) + 1]


@pytest.mark.parametrize("kind", [Watch, SharedWatch])
def test_what_follows_a_long_call_has_the_time_of_a_call_to_itself(alarm: Alarm, kind: type[Watch]) -> None:
    call = kind(SECONDS, None)
    call.begin()
    assert alarm.due == pytest.approx(NOW + hard_deadline(SECONDS))
    alarm.now += SECONDS
    call.extend()
    assert alarm.due == pytest.approx(NOW + SECONDS + hard_deadline(SECONDS))
    call.end()
    assert alarm.due is None


def test_of_calls_side_by_side_the_oldest_one_says_when_the_worker_ends(
    alarm: Alarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread = 1
    monkeypatch.setattr(watch, "threading", SimpleNamespace(Lock=threading.Lock, get_ident=lambda: thread))
    call = SharedWatch(SECONDS, None)
    call.begin()
    alarm.now += 1
    thread = 2
    call.begin()
    assert alarm.due == pytest.approx(NOW + hard_deadline(SECONDS))
    thread = 1
    call.end()
    assert alarm.due == pytest.approx(NOW + 1 + hard_deadline(SECONDS))
    thread = 2
    call.end()
    assert alarm.due is None
