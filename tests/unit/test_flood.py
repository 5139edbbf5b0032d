"""Refusals that repeat are counted, and one uid's are bounded."""

from __future__ import annotations

import random

from circleosd.flood import ALLOWANCE, MIXED_WINDOW, REFILL, TOGETHER, WINDOW, Flood, Who

UID = Who(4242)


def test_the_first_is_written_and_equal_ones_are_counted_until_the_window_ends() -> None:
    flood: Flood[str] = Flood()
    assert [flood.admit(UID, "stop", str(number), 0.0) for number in range(4)] == [True, False, False, False]
    assert flood.ended(WINDOW - 0.1) == []
    (counted,) = flood.ended(WINDOW)
    assert (counted.count, counted.last, counted.mixed) == (3, "3", False)
    assert flood.admit(UID, "stop", "again", WINDOW)
    assert flood.ended(2 * WINDOW) == [], "what was written alone has no count"
    assert flood.next_end() is None


def test_kinds_and_uids_do_not_mix() -> None:
    flood: Flood[str] = Flood()
    assert all(flood.admit(Who(uid), kind, "", 0.0) for uid in (1, 2) for kind in ("stop", "start"))


def test_a_late_look_loses_nothing() -> None:
    flood: Flood[str] = Flood()
    flood.admit(UID, "stop", "", 0.0)
    flood.admit(UID, "stop", "", 1.0)
    assert not flood.admit(UID, "stop", "", WINDOW + 5)
    assert [counted.count for counted in flood.ended(WINDOW + 5)] == [2]


def test_beyond_its_allowance_a_uid_gets_one_count_for_everything() -> None:
    flood: Flood[str] = Flood()
    written = sum(flood.admit(UID, f"kind {number}", "", 0.0) for number in range(1000))
    assert written == ALLOWANCE
    assert flood.admit(Who(4243), "other", "", 0.0), "another uid has its own allowance"
    (counted,) = flood.ended(MIXED_WINDOW)
    assert (counted.count, counted.mixed) == (1000 - ALLOWANCE, True)


def test_an_allowance_that_is_used_up_comes_back_with_time_and_never_grows_beyond_its_size() -> None:
    flood: Flood[str] = Flood()
    kinds = iter(range(10000))

    def written(now: float) -> int:
        return sum(flood.admit(UID, f"kind {next(kinds)}", "", now) for _ in range(int(ALLOWANCE) + 5))

    now = 0.0
    assert written(now) == ALLOWANCE
    assert written(now := now + 3 / REFILL) == 3
    assert written(now + 100 * ALLOWANCE / REFILL) == ALLOWANCE


def test_what_could_not_be_written_is_tried_anew_and_a_count_waits_for_the_next_window() -> None:
    flood: Flood[str] = Flood()
    assert flood.admit(UID, "stop", "first", 0.0)
    flood.not_written(UID, "stop")
    assert flood.admit(UID, "stop", "second", 0.0)
    assert not flood.admit(UID, "stop", "third", 0.0)
    flood.put_back(flood.ended(WINDOW), WINDOW)
    assert flood.ended(WINDOW) == []
    assert not flood.admit(UID, "stop", "fourth", WINDOW)
    counted = flood.ended(2 * WINDOW)
    assert flood.admit(UID, "stop", "fifth", 2 * WINDOW)
    assert not flood.admit(UID, "stop", "sixth", 2 * WINDOW)
    flood.put_back(counted, 2 * WINDOW)
    assert [(window.count, window.last) for window in flood.ended(3 * WINDOW)] == [(3, "sixth")]


def test_a_day_of_flooding_is_a_bounded_number_of_rows_that_account_for_every_attempt() -> None:
    flood, noise = Flood[int](), random.Random(1)
    written, counts, attempts, now = 0, [], 0, 0.0
    while now < 86400:
        attempts += 1
        written += flood.admit(UID, noise.randrange(10_000) if attempts % 3 else "same", attempts, now)
        now += 0.5
        counts += [counted.count for counted in flood.ended(now)]
    counts += [counted.count for counted in flood.ended(float("inf"))]
    assert written + sum(counts) == attempts
    assert written + len(counts) <= 2 * (ALLOWANCE + REFILL * 86400) + 86400 / MIXED_WINDOW + 2


def test_the_figures_are_those_of_the_page_on_accounts() -> None:
    """Ten seconds for equal ones, 60 rows at once, two more a minute, and a count a minute of what goes beyond."""
    assert (WINDOW, ALLOWANCE, 60 * REFILL, MIXED_WINDOW, TOGETHER) == (10, 60, 2, 60, 10)


def test_strangers_together_get_ten_times_as_much_and_one_count_for_everything_beyond_it() -> None:
    flood: Flood[str] = Flood()
    known, strangers = Who(999), [Who(uid, stranger=True) for uid in range(100_000, 101_000)]
    for stranger in strangers[:10]:
        assert sum(flood.admit(stranger, kind, "", 0.0) for kind in range(100)) == ALLOWANCE
    assert not any(flood.admit(stranger, kind, "", 0.0) for stranger in strangers[10:] for kind in range(2))
    assert flood.admit(known, "stop", "", 0.0), "a uid with a user is not held to what strangers used up"
    counted = flood.ended(MIXED_WINDOW)
    assert sorted(window.count for window in counted) == [40] * 10 + [2 * 990]
    assert sum(flood.admit(stranger, "again", "", 3 / REFILL / TOGETHER) for stranger in strangers[10:20]) == 3


def test_one_stranger_leaves_the_others_their_part() -> None:
    flood: Flood[str] = Flood()
    assert sum(flood.admit(Who(1, stranger=True), kind, "", 0.0) for kind in range(10_000)) == ALLOWANCE
    assert sum(flood.admit(Who(2, stranger=True), kind, "", 0.0) for kind in range(10_000)) == ALLOWANCE


def test_rows_of_the_process_before_count() -> None:
    flood: Flood[str] = Flood()
    stranger = Who(1, stranger=True)
    flood.recall([(UID, -1.0)] * 10 + [(Who(uid, stranger=True), -1.0) for uid in range(2, 592)])
    assert sum(flood.admit(UID, kind, "", -1.0) for kind in range(100)) == ALLOWANCE - 10
    assert sum(flood.admit(stranger, kind, "", -1.0) for kind in range(100)) == 10
