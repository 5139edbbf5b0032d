"""What a plugin's store refuses."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from circleosd.database import Database, Transaction
from circleosd.errors import BadRequest, Limit
from circleosd.plugins.keyvalue import KeyValue
from circleosd.plugins.service import HOST_MIGRATIONS


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "kept.db", HOST_MIGRATIONS)
    yield database
    database.close()


@pytest.fixture
def store(kept: Database) -> KeyValue:
    return KeyValue(kept)


def test_keys_of_more_than_a_mebibyte_are_asked_for_by_a_longer_prefix(kept: Database, store: KeyValue) -> None:
    def fill(tx: Transaction) -> None:
        for number in range(2049):  # each has 512 bytes
            key = f"{number % 2}{number:04}".ljust(512, "k")
            tx.execute("INSERT INTO kv (plugin, key, value) VALUES ('p', ?, '')", (key,))

    async def ask() -> None:
        await kept.write(fill)
        with pytest.raises(Limit, match="the keys with this prefix take more than 1048576 bytes"):
            await store.keys("p", "")
        assert len(await store.keys("p", "0")) == 1025

    asyncio.run(ask())


def test_who_keeps_more_than_a_quota_that_was_lowered_may_keep_less_and_no_more(store: KeyValue) -> None:
    async def ask() -> None:
        await store.set("p", "key", "x" * 97, 100)
        with pytest.raises(Limit, match="would take 101 bytes: its limit for storage is 10 bytes"):
            await store.set("p", "key", "x" * 98, 10)
        await store.set("p", "key", "y" * 50, 10)
        assert await store.get("p", "key") == "y" * 50
        assert await store.used("p") == 53

    asyncio.run(ask())


def test_what_a_plugin_keeps_under_a_key_is_apart_from_what_others_keep_under_it(store: KeyValue) -> None:
    async def ask() -> None:
        await store.set("one", "key", "1", 4)
        await store.set("two", "key", "22", 5)
        await store.set("two", "key of two", "", 15)
        assert [await store.get(plugin, "key") for plugin in ("one", "two", "three")] == ["1", "22", None]
        assert await store.keys("one", "key") == ["key"]
        assert [await store.delete("one", "key") for _ in range(2)] == [True, False]
        assert not await store.delete("one", "key of two")
        assert [await store.used(plugin) for plugin in ("one", "two", "three")] == [0, 15, 0]
        assert await store.keys("two", "") == ["key", "key of two"]
        await store.set("one", "key", "1", 4)
        await store.forget(but=["one"])
        assert [await store.get(plugin, "key") for plugin in ("one", "two")] == ["1", None]
        assert [await store.used(plugin) for plugin in ("one", "two")] == [4, 0]

    asyncio.run(ask())


def test_a_key_has_as_many_bytes_as_the_reference_says(store: KeyValue) -> None:
    async def ask() -> None:
        for key in ("k", "é" * 256):
            await store.set("p", key, "", 1000)
        for key, size in (("", 0), ("é" * 256 + "k", 513)):
            with pytest.raises(BadRequest, match=f"a key must have 1 to 512 bytes, not {size}"):
                await store.set("p", key, "", 1000)

    asyncio.run(ask())
