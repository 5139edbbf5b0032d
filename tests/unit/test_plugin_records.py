"""How plugins do and whether they are set aside, as the database has it. Nothing is loaded, and no worker runs."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from circleosd.api import plugins as contracts
from circleosd.api.common import History
from circleosd.api.contract import Request
from circleosd.api.plugins import Disable, Enable, GrantCapability, RevokeCapability, Unload
from circleosd.config import PluginSettings
from circleosd.database import Database
from circleosd.errors import NotFound
from circleosd.handlers import Act
from circleosd.ledger import Ledger
from circleosd.plugins import service as plugin_service
from circleosd.plugins import store
from circleosd.plugins.artifacts import Artifacts
from circleosd.plugins.compiled import Compiled
from circleosd.plugins.manifest import Capability, Manifest
from circleosd.plugins.plugin import Plugin
from circleosd.plugins.runner import Runners
from circleosd.plugins.service import HOST_MIGRATIONS, PluginService
from circleosd.plugins.signatures import Signatures
from circleosd.plugins.store import Loaded, Record
from tests.unit.fakes import ROOT, LateNews, NoFiles, identify
from tests.waiting import SECONDS, until


@pytest.fixture
def database(tmp_path: Path) -> Iterator[LateNews]:
    database = LateNews(tmp_path / "plugins.db", store.MIGRATIONS)
    yield database
    database.close()


@pytest.fixture
def ledger(database: Database) -> Ledger:
    return Ledger(database, contracts.SERVICE, lambda event: None)


async def by_root(ledger: Ledger, contract: type[Request]) -> Act:
    """Root's request about the plugin p."""
    caller = await identify(ROOT, None)
    return Act(ledger, caller, None, contract, "p", NoFiles(), identify, lambda caller, name: None)


async def started(directory: Path, database: Database, ledger: Ledger) -> PluginService:
    """A manager that has the plugin p loaded."""
    loaded = Loaded(Manifest("p"), "0" * 64, "core", (), (), "", 0.0)
    await database.write(lambda tx: store.put(tx, loaded))
    return await opened(directory, database, ledger)


async def opened(directory: Path, database: Database, ledger: Ledger) -> PluginService:
    """A manager of what the database has."""
    artifacts, settings = Artifacts(directory / "store"), PluginSettings()
    kept = Database(directory / "kept.db", HOST_MIGRATIONS)
    service = PluginService(database, kept, artifacts, Signatures([], os.environ), ledger, settings, "")
    compiled = Compiled(directory / "compiled", settings.cache)
    runners = Runners("", directory, compiled, artifacts.open, service.host.of, service.quarantine, settings)
    await service.start(runners)
    return service


def test_a_record_that_is_written_down_during_a_disable_leaves_the_plugin_disabled(
    tmp_path: Path, database: LateNews, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin_service, "WRITE_DOWN", 0.01)

    async def disabled() -> None:
        service = await started(tmp_path, database, ledger)
        health = service._plugins["p"].health
        database.meanwhile = health.succeeded  # and so it is to be written down
        act = await by_root(ledger, Disable)
        assert (await service.disable(Disable(id="p"), act))["state"] == "disabled"
        await until(lambda: not health.changed)
        await service.close()

    asyncio.run(disabled())
    record = asyncio.run(database.read(store.records))["p"]
    assert (record.aside, record.calls) == ("disabled", 1)


def test_the_failures_of_a_plugin_that_was_enabled_count_no_more_in_the_next_manager_either(
    tmp_path: Path, database: LateNews, ledger: Ledger
) -> None:

    async def enabled() -> None:
        service = await started(tmp_path, database, ledger)
        record = Record(calls=9, failures=9, aside="quarantined", reason="9 failures", since=1.0, in_a_row=9)
        service._plugins["p"].health.record = record
        act = await by_root(ledger, Enable)
        await service.enable(Enable(id="p"), act)
        await service.close()

    asyncio.run(enabled())
    assert asyncio.run(database.read(store.records))["p"] == Record(calls=9, failures=9)


def test_a_manager_ends_also_while_a_record_is_being_written_down(
    tmp_path: Path, database: LateNews, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin_service, "WRITE_DOWN", 0.01)
    begun, commit = threading.Event(), database._commit

    def slow_commit() -> None:
        begun.set()
        time.sleep(0.2)
        commit()

    async def ended() -> None:
        service = await started(tmp_path, database, ledger)
        monkeypatch.setattr(database, "_commit", slow_commit)
        service._plugins["p"].health.succeeded()
        await asyncio.to_thread(begun.wait)
        async with asyncio.timeout(SECONDS):
            await service.close()

    asyncio.run(ended())
    assert asyncio.run(database.read(store.records))["p"].calls == 1


def test_a_record_that_could_not_be_written_down_is_later(
    tmp_path: Path, database: LateNews, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin_service, "WRITE_DOWN", 0.01)
    failed, commit = threading.Event(), database._commit

    def commit_the_second_time() -> None:
        if not failed.is_set():
            failed.set()
            raise sqlite3.OperationalError("database or disk is full")
        commit()

    async def written() -> None:
        service = await started(tmp_path, database, ledger)
        monkeypatch.setattr(database, "_commit", commit_the_second_time)
        service._plugins["p"].health.succeeded()
        async with asyncio.timeout(SECONDS):
            await asyncio.to_thread(failed.wait)
            while not await database.read(store.records):
                await asyncio.sleep(0.01)
            await service.close()

    asyncio.run(written())
    assert asyncio.run(database.read(store.records))["p"].calls == 1


def test_a_plugin_that_is_gone_when_it_is_to_be_quarantined_is_not(
    tmp_path: Path, database: LateNews, ledger: Ledger
) -> None:
    quarantines = []

    async def unloaded() -> list[str]:
        service = await started(tmp_path, database, ledger)
        plugin = service._plugins["p"]
        for _ in range(PluginSettings().quarantine_after):
            plugin.health.failed("trap", 0.0, 0.0)

        def fail_again() -> None:
            quarantines.append(asyncio.create_task(service.quarantine(plugin)))

        database.meanwhile = fail_again
        act = await by_root(ledger, Unload)
        await service.unload(Unload(id="p"), act)
        await asyncio.gather(*quarantines)
        rows = await ledger.history(History())
        await service.close()
        return [row["action"] for row in rows]

    assert asyncio.run(unloaded()) == ["unload"]
    assert quarantines


def test_a_quarantine_is_carried_out_also_if_the_call_that_led_to_it_is_given_up(
    tmp_path: Path, database: LateNews, ledger: Ledger
) -> None:
    async def given_up() -> str | None:
        service = await started(tmp_path, database, ledger)
        plugin = service._plugins["p"]
        for _ in range(PluginSettings().quarantine_after):
            plugin.health.failed("trap", 0.0, 0.0)
        call = asyncio.create_task(service.quarantine(plugin))
        await asyncio.sleep(0)  # it has begun
        call.cancel()
        await asyncio.wait([call])
        await service.close()
        return plugin.health.record.aside

    assert asyncio.run(given_up()) == "quarantined"


def test_what_a_plugin_keeps_survives_a_version_that_cannot_read_its_manifest(
    tmp_path: Path, database: LateNews, ledger: Ledger
) -> None:

    async def kept() -> int:
        service = await started(tmp_path, database, ledger)
        await service._kv.set("p", "key", "value", 1000)
        await service._kv.set("gone", "key", "value", 1000)
        await service.close()
        await database.write(lambda tx: tx.execute("""UPDATE plugins SET manifest = '{"newer": true}'"""))
        service = await opened(tmp_path, database, ledger)
        assert not service._plugins
        found = await service._kv.used("p")
        assert await service._kv.used("gone") == 0
        await service.close()
        return found

    assert asyncio.run(kept()) == len("keyvalue")


@pytest.mark.parametrize(
    "damage", ["""manifest = '{"newer": true}'""", "manifest = 'null'", "functions = '['", "imports = '1'"]
)
def test_a_plugin_that_cannot_be_read_can_be_unloaded(
    tmp_path: Path, database: LateNews, ledger: Ledger, damage: str
) -> None:

    async def unloaded() -> list[object]:
        service = await started(tmp_path, database, ledger)
        await service._kv.set("p", "key", "value", 1000)
        await service.close()
        await database.write(lambda tx: tx.execute(f"UPDATE plugins SET {damage}"))
        service = await opened(tmp_path, database, ledger)
        act = await by_root(ledger, Unload)
        told = await service.unload(Unload(id="p"), act)
        assert (told["version"], told["plugin_type"]) == ("unknown", "wasm")
        assert await service._kv.used("p") == 0
        with pytest.raises(NotFound, match="no plugin p is loaded"):
            await service.unload(Unload(id="p"), act)
        rows = await ledger.history(History())
        await service.close()
        return [(row["action"], row["before"]) for row in rows]

    assert asyncio.run(unloaded()) == [("unload", {"version": "unknown", "digest": "0" * 64})]
    assert asyncio.run(database.read(store.digests)) == {}


@pytest.mark.parametrize(
    ("before", "now", "decision", "left"),
    [
        ("kv", "kv", GrantCapability, ()),  # which is for the version that is looked at
        ("events:*", "events:a", RevokeCapability, ()),
        ("kv", "events:a", RevokeCapability, ("kv",)),
    ],
)
def test_calls_of_the_version_before_an_upgrade_lose_what_is_revoked_and_get_nothing_that_is_granted(
    tmp_path: Path,
    database: LateNews,
    ledger: Ledger,
    before: str,
    now: str,
    decision: type[GrantCapability | RevokeCapability],
    left: tuple[str, ...],
) -> None:
    revoked = decision is RevokeCapability

    async def decided() -> tuple[str, ...]:
        service = await started(tmp_path, database, ledger)
        asked = (Manifest("p", capabilities=(Capability(name),)) for name in (before, now))
        old, new = (Plugin(item, "", Record(), dict.fromkeys(item.asked, revoked), PluginSettings()) for item in asked)
        new.adopt(service._plugins["p"].loaded)
        new.before = old
        service._plugins["p"] = new
        act = await by_root(ledger, decision)
        handler = service.revoke if revoked else service.grant
        await handler(decision(id="p", capability=now), act)
        assert new.holds(now) is not revoked
        await service.close()
        return old.granted

    assert asyncio.run(decided()) == left
