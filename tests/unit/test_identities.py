"""Who a caller is, according to auth-service: one question for many callers, and a bounded memory of the answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from circleosd import identities, wire
from circleosd.errors import Denied
from circleosd.identities import Identities
from circleosd.policy import Grant, Peer
from tests.waiting import SECONDS, until


def test_many_tokens_at_once_are_asked_about_in_few_connections(tmp_path: Path) -> None:
    path, most, open_now = str(tmp_path / "auth-service.sock"), 0, 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal most, open_now
        open_now += 1
        most = max(most, open_now)
        await reader.readline()
        await asyncio.sleep(0.001)  # in which all others who may would connect
        writer.write(wire.failure(Denied("no session")))
        await reader.read()
        open_now -= 1
        writer.close()

    async def run() -> list[object]:
        known = Identities(path, timeout=10)
        peer = Peer(uid=os.getuid() + 1, gid=0, pid=0)
        async with await asyncio.start_unix_server(answer, path):
            asked = (known.identify(peer, f"token {number}") for number in range(200))
            return [type(found) for found in await asyncio.gather(*asked, return_exceptions=True)]

    assert asyncio.run(run()) == [Denied] * 200
    assert 1 < most <= 3 * identities.ASKED_AT_ONCE  # the ends of some may not have been noticed here


def test_who_has_one_token_does_not_wait_for_all_those_of_another(tmp_path: Path) -> None:
    path, asked_about = str(tmp_path / "auth-service.sock"), list[int]()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked_about.append(json.loads(await reader.readline())["uid"])
        writer.write(wire.failure(Denied("no session")))
        writer.close()

    async def run() -> None:
        known = Identities(path, timeout=10)
        uids = [*[70_001] * 200, 70_002]
        async with await asyncio.start_unix_server(answer, path):
            asked = (known.identify(Peer(uid, 0, 0), f"token {number}") for number, uid in enumerate(uids))
            await asyncio.gather(*asked, return_exceptions=True)

    asyncio.run(run())
    assert asked_about.index(70_002) < 100


@contextlib.asynccontextmanager
async def auth_service(path: str) -> AsyncIterator[tuple[asyncio.Event, list[str]]]:
    """What answers, once it may `go` on, that a token is olga's, and the tokens that it was asked about."""
    go, asked = asyncio.Event(), list[str]()
    olga = {"user": "olga", "role": "operator", "uid": 1, "session": "s", "expires": None, "grants": []}

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(json.loads(await reader.readline())["presented"])
        await go.wait()
        writer.write(wire.success(olga))
        writer.close()

    async with await asyncio.start_unix_server(answer, path):
        yield go, asked


def test_who_gives_up_takes_nobody_along_that_waits_for_the_same_answer(tmp_path: Path) -> None:
    path = str(tmp_path / "auth-service.sock")

    async def run() -> None:
        known, peer = Identities(path, timeout=10), Peer(os.getuid() + 1, 0, 0)
        async with auth_service(path) as (go, asked):
            one, other = (asyncio.create_task(known.identify(peer, "token")) for _ in range(2))
            await until(lambda: asked)
            one.cancel()
            await asyncio.wait([one])
            go.set()
            assert (await other).user == "olga"
            assert asked == ["token"]

    asyncio.run(asyncio.wait_for(run(), SECONDS))


def test_many_tokens_are_not_all_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identities, "MAX_CACHED", 3)
    path = str(tmp_path / "auth-service.sock")

    async def run() -> None:
        known, peer = Identities(path, timeout=10), Peer(os.getuid() + 1, 0, 0)
        async with auth_service(path) as (go, asked):
            go.set()
            for number in range(10):
                assert (await known.identify(peer, f"token {number}")).user == "olga"
                assert len(known._known) <= 3
            assert len(asked) == 10

    asyncio.run(asyncio.wait_for(run(), SECONDS))


def test_who_sends_a_token_is_a_person_and_speaks_for_no_plugin(tmp_path: Path) -> None:
    path = str(tmp_path / "auth-service.sock")

    async def run() -> None:
        own, manager = Peer(os.getuid(), 0, 0), Peer(os.getuid() + 1, 0, 0)
        known = Identities(path, timeout=10, trusted={manager.uid: (Grant("service:restart", "*"),)})
        async with auth_service(path) as (go, _):
            go.set()
            assert (await known.identify(own, None)).vouches
            assert (await known.identify(manager, None)).vouches
            person = await known.identify(own, "token")
            assert (person.user, person.vouches) == ("olga", False)

    asyncio.run(asyncio.wait_for(run(), SECONDS))
