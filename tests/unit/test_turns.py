"""Turns on the event loop, by uid."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from circleosd.passing import Descriptors
from circleosd.policy import Peer
from circleosd.turns import LEAST, ROUND, Turns
from tests.unit.serving import Patient, connected, serving
from tests.waiting import SECONDS, until

AT_ONCE = ROUND // LEAST


def test_of_one_uid_so_much_begins_in_a_round_and_of_others_as_well() -> None:
    async def run() -> None:
        turns = Turns(asyncio.get_running_loop())
        late = [turn for _ in range(2 * AT_ONCE + 1) if (turn := turns.take(1, 10))]
        assert len(late) == AT_ONCE + 1
        assert turns.take(2, 10) is None
        for done in (AT_ONCE, AT_ONCE + 1):
            await asyncio.sleep(0)
            assert sum(turn.done() for turn in late) == done
        assert turns.take(1, 10) is None

    asyncio.run(run())


def test_a_large_request_begins_however_large_it_is() -> None:
    async def run() -> None:
        turns = Turns(asyncio.get_running_loop())
        assert turns.take(1, 100 * ROUND) is None
        small, large = turns.take(1, 1), turns.take(1, 100 * ROUND)
        assert small
        assert large
        await asyncio.sleep(0)
        assert (small.done(), large.done()) == (True, False)
        await large

    asyncio.run(run())


def test_what_would_fit_does_not_overtake_what_waits_of_the_same_uid() -> None:
    async def run() -> None:
        turns = Turns(asyncio.get_running_loop())
        assert turns.take(1, 1) is None
        large, small = turns.take(1, ROUND), turns.take(1, 1)
        assert large
        assert small
        await large
        assert not small.done()
        await small

    asyncio.run(run())


def test_a_turn_that_nobody_waits_for_any_more_is_the_next_ones() -> None:
    async def run() -> None:
        turns = Turns(asyncio.get_running_loop())
        turns.take(1, ROUND)
        given_up, next_one = turns.take(1, ROUND), turns.take(1, ROUND)
        assert given_up
        assert next_one
        given_up.cancel()
        await asyncio.sleep(0)
        assert next_one.done()

    asyncio.run(run())


def test_who_comes_last_does_not_wait_for_all_the_connections_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many, path, order = 50, str(tmp_path / "s"), list[int]()
    uids = iter([*[1] * many, 2])
    monkeypatch.setattr("circleosd.passing.peer_of", lambda sock: Peer(next(uids), 0, 0))

    class Noting(Patient):
        async def dispatch(self, line: bytes, peer: Peer, files: Descriptors) -> bytes:
            order.append(peer.uid)
            return b"reply\n"

    async def run() -> None:
        async with serving(Noting(), path):
            peers = [connected(path) for _ in range(many + 1)]
            for peer in peers:
                peer.send(b"x" * (ROUND // 2) + b"\n")
            await until(lambda: len(order) > many)
            for peer in peers:
                peer.close()
        assert order.index(2) < 10

    asyncio.run(asyncio.wait_for(run(), SECONDS))
