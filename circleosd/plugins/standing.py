"""The plugins' records: saved from time to time, and at once when a plugin is set aside or enabled."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from circleosd.database import Database, Transaction
from circleosd.errors import CircleError
from circleosd.ledger import Entry, Ledger
from circleosd.plugins import store
from circleosd.plugins.plugin import Plugin
from circleosd.plugins.views import itself, state_of

log = logging.getLogger(__name__)


class Standing:
    """The records of `plugins`, the loaded ones. `changing` is held during each change of them."""

    def __init__(
        self, database: Database, ledger: Ledger, plugins: Mapping[str, Plugin], changing: asyncio.Lock
    ) -> None:
        self._database = database
        self._ledger = ledger
        self._plugins = plugins
        self._changing = changing
        self._quarantines: set[asyncio.Task[None]] = set()

    async def put_aside(
        self, plugin: Plugin, aside: store.Aside, reason: str | None, note: Callable[..., None]
    ) -> None:
        """Set a plugin aside or enable it; `note` adds the ledger's row, with the states `before` and `after`.

        The caller must hold `changing`.
        """
        record = plugin.health.record
        in_a_row = record.in_a_row if aside else 0
        changed = replace(record, aside=aside, reason=reason, since=time.time() if aside else None, in_a_row=in_a_row)

        def work(tx: Transaction) -> None:
            store.put_record(tx, plugin.name, changed)
            note(tx, before=state_of(record), after=state_of(changed))

        await self._database.write(work)
        # Not the rest: calls may have ended meanwhile.
        record.aside, record.reason, record.since = changed.aside, changed.reason, changed.since
        if aside is None:
            plugin.health.reset()

    async def quarantine(self, plugin: Plugin) -> None:
        """Quarantine a plugin that has failed too often in a row. Cancelling only means not waiting for it."""
        task = asyncio.create_task(self._quarantine(plugin))
        self._quarantines.add(task)
        task.add_done_callback(self._quarantines.discard)
        await asyncio.shield(task)

    async def _quarantine(self, plugin: Plugin) -> None:
        def note(tx: Transaction, *, before: str, after: str) -> None:
            entry = Entry("done", itself(plugin.name), "quarantine", plugin.name, before=before, after=after)
            self._ledger.append(tx, entry)

        async with self._changing:
            health = plugin.health
            if not health.quarantine_due or self._plugins.get(plugin.name) is not plugin:
                return
            reason = f"{health.record.in_a_row} failures in a row, the last: {health.record.last_error}"
            try:
                await self.put_aside(plugin, "quarantined", reason, note)
            except CircleError as error:  # it is held back, and its next failure tries again
                log.error("cannot quarantine %s for %s: %s", plugin.name, reason, error)
            else:
                log.error("plugin %s is quarantined: %s", plugin.name, reason)

    async def write_down(self) -> None:
        """Save the records that have changed. Raises `Unavailable`."""
        # Not between another change's commit and its update in memory: that would write the old state.
        async with self._changing:
            changed = [plugin for plugin in self._plugins.values() if plugin.health.changed]
            if not changed:
                return

            def work(tx: Transaction) -> None:
                for plugin in changed:
                    store.put_record(tx, plugin.name, plugin.health.record)

            for plugin in changed:
                plugin.health.changed = False
            try:
                await self._database.write(work)
            except BaseException:
                for plugin in changed:
                    plugin.health.changed = True
                raise

    async def settled(self) -> None:
        """Wait for the quarantines in progress."""
        await asyncio.gather(*self._quarantines, return_exceptions=True)
