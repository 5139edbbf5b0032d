"""How long failed logins make the next one wait, and against whom they count."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest

from circleosd.auth import store
from circleosd.auth.backoff import Failures, in_force, wait
from circleosd.auth.logins import Logins
from circleosd.auth.store import Account
from circleosd.config import AuthSettings
from circleosd.database import Database, Transaction
from circleosd.errors import Limit
from circleosd.policy import Caller, Peer, Role

NOW = 1_000_000.0
ALICE = Account("Alice", "hash", Role.OPERATOR, 1000, False, 0.0, None, 1001)


def caller(uid: int) -> Caller:
    return Caller(Peer(uid, uid, 1), privileged=uid == 0)


def seconds(number: int, ago: float = 0.0) -> float:
    return wait(Failures(number, NOW - ago), NOW, tries=5, lockout=900.0)


def test_the_wait_doubles_behind_the_free_tries_up_to_the_lockout() -> None:
    assert [seconds(number) for number in (0, 4, 5, 6, 7, 14, 15, 1000)] == [0, 0, 1, 2, 4, 512, 900, 900]


def test_every_wait_ends() -> None:
    assert seconds(1000, ago=899.0) == 1.0
    assert seconds(1000, ago=900.0) == 0.0


def test_failures_are_forgotten_after_twice_the_longest_wait() -> None:
    assert in_force(Failures(1000, NOW - 1800), NOW, 900.0) == 1000
    assert in_force(Failures(1000, NOW - 1801), NOW, 900.0) == 0


def test_a_clock_that_was_set_back_does_not_lengthen_the_wait() -> None:
    assert seconds(6, ago=-100.0) == 2.0
    assert seconds(1000, ago=-1e6) == 0.0


@pytest.mark.parametrize(
    ("uid", "account", "keys"),
    [
        (4242, ALICE, [("peer", "4242"), ("part", "4242 alice"), ("user", "alice")]),
        (4242, None, [("peer", "4242"), ("part", "4242 alice"), ("user", "alice")]),
        (1000, ALICE, [("peer", "1000"), ("part", "1000 alice")]),
        (1001, ALICE, [("peer", "1001"), ("part", "1001 alice")]),
        (0, ALICE, []),
    ],
)
def test_a_stranger_counts_against_the_name_and_its_owner_at_home_does_not(
    uid: int, account: Account | None, keys: list[tuple[str, str]]
) -> None:
    assert Logins(AuthSettings()).keys("Alice", caller(uid), account) == keys


@pytest.mark.parametrize(
    ("own", "left"),
    [
        (Failures(2, NOW - 5), Failures(3, NOW - 1)),
        (Failures(2, NOW - 1801), Failures(5, NOW - 1)),  # they are forgotten, and not among the five
        (Failures(5, NOW - 1), Failures()),
    ],
)
def test_a_success_takes_away_what_still_counts_of_ones_own_failures(
    tmp_path: Path, own: Failures, left: Failures
) -> None:
    database = Database(tmp_path / "auth.db", store.MIGRATIONS)
    logins = Logins(AuthSettings(login_tries=5, login_lockout=900.0))
    keys = logins.keys("Alice", caller(1000), ALICE)
    peer, part = keys

    def work(tx: Transaction) -> Failures:
        store.set_failures(tx, *peer, Failures(5, NOW - 1))
        store.set_failures(tx, *part, own)
        logins.succeeded(tx, keys, NOW)
        assert store.failures(tx, *part) == Failures()
        return store.failures(tx, *peer)

    assert asyncio.run(database.write(work)) == left
    database.close()


def test_many_attempts_at_once_are_not_more_guesses_than_one_after_another() -> None:
    logins = Logins(AuthSettings(login_tries=5))
    keys = [("peer", "4242")]
    once = [Failures(1, NOW)]
    with contextlib.ExitStack() as held:
        for _ in range(3):
            held.enter_context(logins.attempt(keys, once, NOW))
        for _ in range(2):
            with logins.attempt(keys, once, NOW):  # one that ends leaves the others in hand
                pass
        held.enter_context(logins.attempt(keys, once, NOW))
        with pytest.raises(Limit, match="at once"):
            held.enter_context(logins.attempt(keys, once, NOW))
    with logins.attempt(keys, once, NOW):
        pass
    assert not logins._in_hand, "names that were tried are forgotten"


@pytest.mark.parametrize("name", ["alice", "user{}"])
@pytest.mark.parametrize("right", [False, True])
def test_of_first_attempts_at_once_no_more_are_told_of_than_there_are_tries(
    tmp_path: Path, name: str, right: bool
) -> None:
    """Also of attempts with a name each, and whether the last one is right."""
    database = Database(tmp_path / "auth.db", store.MIGRATIONS)
    logins = Logins(AuthSettings(login_tries=5))
    attempts = [logins.keys(name.format(number), caller(4242), None) for number in range(7)]

    def work(tx: Transaction) -> int:
        told = 0
        with contextlib.ExitStack() as held:
            for keys in attempts:
                held.enter_context(logins.attempt(keys, [Failures()] * len(keys), NOW))
            for keys in attempts:
                with contextlib.suppress(Limit):
                    logins.tell(tx, keys, NOW, right=right and keys is attempts[-1])
                    told += 1
        return told

    assert asyncio.run(database.write(work)) == 5
    database.close()


def test_who_has_to_wait_has_no_password_looked_at() -> None:
    logins = Logins(AuthSettings(login_tries=5))
    keys = [("peer", "4242"), ("user", "alice")]
    with (
        pytest.raises(Limit, match="try again in 2 s"),
        logins.attempt(keys, [Failures(), Failures(6, NOW)], NOW),
    ):
        pytest.fail("it was looked at")


def test_when_the_wait_is_over_one_attempt_is_looked_at_and_only_one_at_a_time() -> None:
    logins = Logins(AuthSettings(login_tries=5))
    keys, many = [("user", "alice")], [Failures(12, NOW - 500)]
    with logins.attempt(keys, many, NOW), pytest.raises(Limit, match="at once"), logins.attempt(keys, many, NOW):
        pytest.fail("a second guess was admitted")
    with logins.attempt(keys, many, NOW):
        pass
