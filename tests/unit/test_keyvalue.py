"""What a plugin's store refuses."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from circleosd.database import Database, Transaction
from circleosd.errors import Limit
from circleosd.plugins.keyvalue import KeyValue
from circleosd.plugins.service import HOST_MIGRATIONS


def test_keys_of_more_than_a_mebibyte_are_asked_for_by_a_longer_prefix(tmp_path: Path) -> None:
    kept = Database(tmp_path / "kept.db", HOST_MIGRATIONS)

    def fill(tx: Transaction) -> None:
        for number in range(2049):  # each has 512 bytes
            key = f"{number % 2}{number:04}".ljust(512, "k")
            tx.execute("INSERT INTO kv (plugin, key, value) VALUES ('p', ?, '')", (key,))

    async def ask() -> None:
        await kept.write(fill)
        store = KeyValue(kept)
        with pytest.raises(Limit, match="the keys that begin so take more than 1048576 bytes"):
            await store.keys("p", "")
        assert len(await store.keys("p", "0")) == 1025

    asyncio.run(ask())
    kept.close()


def test_who_keeps_more_than_a_quota_that_was_lowered_may_keep_less_and_no_more(tmp_path: Path) -> None:
    kept = Database(tmp_path / "kept.db", HOST_MIGRATIONS)

    async def ask() -> None:
        store = KeyValue(kept)
        await store.set("p", "key", "x" * 97, 100)
        with pytest.raises(Limit, match="would take 101 bytes: its limit for storage is 10 bytes"):
            await store.set("p", "key", "x" * 98, 10)
        await store.set("p", "key", "y" * 50, 10)
        assert await store.get("p", "key") == "y" * 50
        assert await store.used("p") == 53

    asyncio.run(ask())
    kept.close()
