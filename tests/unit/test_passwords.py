"""Passwords: which are accepted, and how they are hashed."""

from __future__ import annotations

import asyncio
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from circleosd.auth import passwords
from circleosd.auth.passwords import Passwords
from circleosd.config import AuthSettings
from circleosd.errors import BadRequest, Limit, Unavailable
from tests.measuring import once_it_holds
from tests.waiting import SECONDS

CHEAP = AuthSettings(hash_memory=8, hash_passes=1)


def test_a_hash_says_its_parameters_and_is_right_for_one_password_only() -> None:
    hasher = Passwords(CHEAP)

    async def scenario() -> None:
        stored = await hasher.hash("correct horse", None)
        assert stored.startswith("$argon2id$v=19$m=8,t=1,p=1$")
        assert await hasher.verify(stored, "correct horse", None)
        assert not await hasher.verify(stored, "correct hors", None)
        assert not await hasher.verify(None, "correct horse", None)
        assert not await hasher.verify("not a hash", "correct horse", None)
        assert not await hasher.verify(stored.replace("argon", "arg\ufffdn"), "correct horse", None), "a damaged one"
        assert stored != await hasher.hash("correct horse", None), "each hash has its own salt"

    asyncio.run(scenario())


def test_other_parameters_make_a_hash_outdated() -> None:
    old = asyncio.run(Passwords(CHEAP).hash("correct horse", None))
    assert not Passwords(CHEAP).outdated(old)
    newer = Passwords(AuthSettings(hash_memory=16, hash_passes=1))
    assert newer.outdated(old)
    assert asyncio.run(newer.verify(old, "correct horse", None))


def test_an_unknown_user_costs_what_a_known_one_costs() -> None:
    hasher = Passwords(AuthSettings(hash_memory=4096, hash_passes=4))
    stored = asyncio.run(hasher.hash("correct horse", None))

    def seconds(known: str | None) -> float:
        begun = time.process_time()
        asyncio.run(hasher.verify(known, "wrong", None))
        return time.process_time() - begun

    pairs: list[tuple[float, float]] = []

    def ratio() -> float:
        """Of the fastest of each, which took turns."""
        pairs.extend((seconds(stored), seconds(None)) for _ in range(15))
        return min(unknown for _, unknown in pairs) / min(known for known, _ in pairs)

    once_it_holds(ratio, lambda ratio: 0.7 < ratio < 1.4)


@contextmanager
def memory(more: int) -> Iterator[None]:
    """Allow this process only so many bytes more than it has mapped (setrlimit(2), RLIMIT_AS)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_a_password_for_which_memory_lacks_is_neither_right_nor_wrong() -> None:
    hasher = Passwords(AuthSettings(hash_memory=1 << 20, hash_passes=1))

    async def scenario() -> None:
        stored = (await Passwords(CHEAP).hash("correct horse", None)).replace("m=8", "m=1048576")
        with memory(256 << 20):
            with pytest.raises(Unavailable, match="Memory allocation error"):
                await hasher.verify(stored, "correct horse", None)
            with pytest.raises(Unavailable, match="Memory allocation error"):
                await hasher.hash("correct horse", None)

    asyncio.run(scenario())


def test_composed_and_decomposed_letters_are_one_password() -> None:
    hasher = Passwords(CHEAP)
    stored = asyncio.run(hasher.hash("caf\u00e9 noir", None))
    assert asyncio.run(hasher.verify(stored, "cafe\u0301 noir", None))


@pytest.mark.parametrize(
    "password",
    ["password", "Password1", "PASSWORD2027!", "qwertyuiop", "12345678", "11111111", "aaaaaaaaaa", "abababab", "Alice",
     "alice123", "circleosd1", "iloveyou", "83024715", "correcthorsebatterystaple", "pa55word"],
)  # fmt: skip
def test_what_everybody_tries_first_is_refused_without_quoting_it(password: str) -> None:
    with pytest.raises(BadRequest) as caught:
        passwords.check(password, "alice")
    assert password not in str(caught.value).replace("the password", "")


@pytest.mark.parametrize(
    ("name", "password"),
    [("deploy01", "deploy01"), ("deploy01", "Deploy2026!"), ("_backup-", "backup99"), ("eve_2", "eve_2111")],
)
def test_the_name_of_a_user_is_no_password_also_if_it_ends_in_digits(name: str, password: str) -> None:
    with pytest.raises(BadRequest, match="easy to guess: the user's name"):
        passwords.check(password, name)


def test_a_long_number_is_a_password_also_of_a_user_whose_name_has_no_letters() -> None:
    passwords.check("9034 8127 5561 0042", "_1")


@pytest.mark.parametrize(
    "password", ["correct horse", "long enough", "9034 8127 5561 0042", "zoë läuft heim", "x7#kPq!9"]
)
def test_other_passwords_are_accepted(password: str) -> None:
    passwords.check(password, "alice")


def test_the_list_of_the_commonest_holds_what_can_be_chosen_at_all() -> None:
    assert 200 < len(passwords.common()) < 1000
    assert all(len(word) >= 8 and word == word.casefold() for word in passwords.common())


def gated(settings: AuthSettings, monkeypatch: pytest.MonkeyPatch) -> tuple[Passwords, threading.Event]:
    """The first password is looked at once the event is set."""
    gate = threading.Event()
    monkeypatch.setattr(Passwords, "_matches", lambda self, stored, password: gate.wait(SECONDS))
    return Passwords(settings), gate


def test_more_than_may_wait_are_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    hasher, gate = gated(AuthSettings(hashing=1, login_queue=2), monkeypatch)

    async def scenario() -> list[bool | BaseException]:
        found = asyncio.gather(*(hasher.verify(None, "x", None) for _ in range(5)), return_exceptions=True)
        await asyncio.sleep(0)
        gate.set()
        return await found

    found = asyncio.run(scenario())
    assert [isinstance(item, Limit) for item in found] == [False, False, False, True, True]


def test_who_has_one_password_looked_at_does_not_wait_for_all_those_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    hasher, gate = gated(AuthSettings(hashing=1), monkeypatch)

    async def scenario() -> list[int]:
        order = list[int]()

        async def verify(uid: int) -> None:
            await hasher.verify(None, "x", uid)
            order.append(uid)

        found = asyncio.gather(*(verify(uid) for uid in [4242] * 20 + [4243]))
        await asyncio.sleep(0)
        gate.set()
        await found
        return order

    assert asyncio.run(scenario()).index(4243) == 2


def test_one_uid_leaves_places_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = AuthSettings(hash_memory=8, hash_passes=1, hashing=1, login_queue=128)
    hasher, gate = gated(settings, monkeypatch)

    async def scenario() -> list[object]:
        asked = [hasher.hash("x", 4242) if number % 2 else hasher.verify(None, "x", 4242) for number in range(70)]
        others = [hasher.verify(None, "x", 4243), hasher.hash("x", None)]
        found = asyncio.gather(*asked, *others, return_exceptions=True)
        await asyncio.sleep(0)
        gate.set()
        return await found

    found = asyncio.run(scenario())
    assert [isinstance(item, Limit) for item in found] == [False] * 64 + [True] * 6 + [False] * 2
    assert str(found[64]) == "at most 64 passwords at once for uid 4242; try again later"
