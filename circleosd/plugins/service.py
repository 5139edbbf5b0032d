"""The actions of plugin-manager."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncGenerator, Sequence

from circleosd.api import plugins as api
from circleosd.config import PluginSettings
from circleosd.database import Database, Transaction
from circleosd.delegation import require_within
from circleosd.errors import BadRequest, Conflict, Denied, NotFound, Unavailable
from circleosd.handlers import Act, Handlers
from circleosd.ledger import Entry, Ledger
from circleosd.plugins import capabilities, events, keyvalue, store
from circleosd.plugins.artifacts import Artifacts
from circleosd.plugins.cause import Cause
from circleosd.plugins.delivery import Delivery
from circleosd.plugins.events import Events
from circleosd.plugins.files import given
from circleosd.plugins.host import Host
from circleosd.plugins.keyvalue import KeyValue
from circleosd.plugins.loading import Candidate, Loading, as_loaded, require_asked, require_granted_growth, to_grant
from circleosd.plugins.manifest import Manifest
from circleosd.plugins.plugin import Plugin
from circleosd.plugins.runner import Runners, Superseded
from circleosd.plugins.signatures import Signatures
from circleosd.plugins.standing import Standing
from circleosd.plugins.store import Record
from circleosd.plugins.trust import Trusting
from circleosd.plugins.views import brief, brief_of, details, itself, shown, to_say

HOST_MIGRATIONS = (f"{keyvalue.SCHEMA};{events.SCHEMA}",)  # of the database that plugins write to through host calls
WRITE_DOWN = 5.0  # seconds between checks for changed records


class PluginService(Handlers):
    """Loads, trusts, calls and disables plugins. `kept` is the database of what plugins store and emit."""

    def __init__(
        self,
        database: Database,
        kept: Database,
        artifacts: Artifacts,
        signatures: Signatures,
        ledger: Ledger,
        settings: PluginSettings,
        registry: str,
    ) -> None:
        self._database = database
        self._kept = kept
        self._artifacts = artifacts
        self._loading = Loading(artifacts, signatures, settings)
        self._trusting = Trusting(signatures, settings.trust)
        self._ledger = ledger
        self._settings = settings
        self._kv = KeyValue(kept)
        self._delivery = Delivery(lambda: self._plugins.values(), self._deliver)
        self._events = Events(kept, self._delivery.offer)
        self.host = Host(self._kv, self._events, registry, self._refused)
        self._plugins: dict[str, Plugin] = {}
        # One load or unload at a time; and one change of the records, which waits for no compilation and no call.
        self._loads = asyncio.Lock()
        self._changing = asyncio.Lock()
        self._standing = Standing(database, ledger, self._plugins, self._changing)
        self._tasks: set[asyncio.Task[None]] = set()
        self._runners: Runners
        self._closed = False

    async def start(self, runners: Runners) -> None:
        """Read the loaded plugins, and clean up after interrupted changes."""
        self._runners = runners
        decided, records = await self._database.read(store.grants), await self._database.read(store.records)
        for loaded in await self._database.read(store.plugins):
            name = loaded.manifest.name
            record = records.get(name) or Record()
            plugin = Plugin(loaded.manifest, loaded.digest, record, decided.get(name, {}), self._settings)
            plugin.adopt(loaded)
            self._plugins[name] = plugin
        await self._sweep()
        await self._forget()
        for work in (self._clean(), runners.watch_idle(), self._write_down()):
            task = asyncio.create_task(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)  # asyncio logs its error, if it has one

    async def _clean(self) -> None:
        """Stop the workers of a manager that died; a load, possibly of the same name, waits for this."""
        async with self._loads:
            await self._runners.clean({*self._plugins})

    def busy(self) -> bool:
        """Emitted events are delivered even after the caller has gone."""
        return self._delivery.busy

    async def close(self) -> None:
        """End the workers and save the plugins' records."""
        self._closed = True
        self._delivery.close()
        for task in [*self._tasks]:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._standing.settled()
        await self._runners.close()
        await self._standing.write_down()
        self._kept.close()

    def _find(self, name: str) -> Plugin:
        plugin = self._plugins.get(name)
        if plugin is None:
            raise NotFound(f"no plugin {name} is loaded; see: circlectl plugin list")
        return plugin

    # loading

    async def load(self, request: api.Load, act: Act) -> api.Plugin:
        with given(request, act.files, act.caller) as files:
            async with self._loads, self._loading.candidate(files, request) as candidate:
                act.object = candidate.manifest.name
                return await self._load(request, candidate, act)

    async def _load(self, request: api.Load, candidate: Candidate, act: Act) -> api.Plugin:
        manifest, staged = candidate.manifest, candidate.staged
        before = self._plugins.get(manifest.name)
        if request.sha256 not in (None, staged.digest):
            raise BadRequest(f"the artifact's sha256 is {staged.digest}, not {request.sha256}")
        grants = to_grant(manifest, request.grant)
        content, signature, known = candidate.content or b"", candidate.signature, before.loaded if before else None
        trust = await self._trusting.judge(manifest, content, signature, explicit=request.trust, before=known)
        decided = _inherited(before, manifest) | grants
        plugin = Plugin(manifest, staged.digest, _fresh(before), decided, self._settings)
        if before:
            require_granted_growth(before.manifest, manifest, plugin.granted)
        _require_own(act, plugin.granted)
        fd = self._artifacts.open(staged.path.name)
        try:
            runner, ready = await self._runners.probe(plugin, fd, upgrade=before is not None)
        finally:
            os.close(fd)
        loaded = as_loaded(candidate, ready, trust)

        def work(tx: Transaction) -> None:
            store.put(tx, loaded)
            store.put_grants(tx, manifest.name, plugin.decided)
            store.put_record(tx, manifest.name, plugin.health.record)
            act.commit(tx, before=brief(before), after=brief_of(loaded, plugin.granted))

        try:
            _require_entry(manifest, ready.functions)
            await act.renew()  # everything up to here took its time
            await asyncio.to_thread(self._artifacts.keep, staged)
            async with self._changing:
                self._catch_up(plugin, before, grants)
                _require_own(act, plugin.granted)
                await self._database.write(work)
                plugin.adopt(loaded)
                plugin.before = before
                self._plugins[manifest.name] = plugin
        except BaseException:
            await self._runners.discard(runner)
            raise
        await self._runners.adopt(runner)
        plugin.before = None
        await self._sweep()
        act.message = to_say(plugin, trust)
        return shown(plugin)

    def _catch_up(self, plugin: Plugin, before: Plugin | None, grants: dict[str, bool]) -> None:
        """Apply decisions about the previous version that were made while this one was loaded."""
        decided = _inherited(before, plugin.manifest) | grants
        if decided != plugin.decided:
            plugin.decide(decided)
        if before:
            plugin.health.record = _fresh(before)

    async def verify(self, request: api.Verify, act: Act) -> api.Verified:
        with given(request, act.files, act.caller) as files:
            return await self._loading.verify(files, request, act.caller.bounded)

    async def unload(self, request: api.Unload, act: Act) -> api.Plugin:
        async with self._loads:
            await act.renew()  # as long as loads took
            async with self._changing:
                plugin = await self._recorded(request.id)

                def work(tx: Transaction) -> None:
                    store.delete(tx, request.id)
                    act.commit(tx, before=brief(plugin))

                await self._database.write(work)
                self._plugins.pop(request.id, None)
            await self._runners.remove(request.id)
            await self._forget()
            await self._sweep()
            return shown(plugin)

    async def _recorded(self, name: str) -> Plugin:
        """A recorded plugin; if this version cannot read its manifest, the available data. Raises `NotFound`."""
        if name not in self._plugins:
            loaded = await self._database.read(lambda connection: store.unreadable(connection, name))
            if loaded:
                plugin = Plugin(loaded.manifest, loaded.digest, Record(), {}, self._settings)
                plugin.adopt(loaded)
                return plugin
        return self._find(name)

    async def _sweep(self) -> None:
        digests = await self._database.read(store.digests)
        await asyncio.to_thread(self._artifacts.sweep, {*digests.values()})

    async def _forget(self) -> None:
        """Remove stored data of plugins that are not recorded. A plugin that this version cannot read is recorded."""
        await self._kv.forget(but=await self._database.read(store.digests))

    # looking

    async def list(self, request: api.ListPlugins, act: Act) -> Sequence[api.Plugin]:
        return [shown(plugin) for _, plugin in sorted(self._plugins.items())]

    async def show(self, request: api.Show, act: Act) -> api.Details:
        plugin = self._find(request.id)
        stored = await self._kv.used(plugin.name)
        running, waiting = self._runners.connected(plugin.name), self._runners.waiting(plugin.name)
        return details(plugin, stored=stored, running=running, waiting=waiting)

    async def events(
        self, request: api.Events, act: Act
    ) -> Sequence[api.PluginEvent] | AsyncGenerator[api.PluginEvent, None]:
        if request.follow:
            return self._events.follow(request.lines, request.topic)
        return await self._events.last(request.lines, request.topic, act.caller.bounded)

    # calling

    async def invoke(self, request: api.Invoke, act: Act) -> str:
        while True:
            plugin = self._find(request.id)
            plugin.health.admit(time.monotonic())
            if request.func not in plugin.functions:
                has = ", ".join(plugin.loaded.functions)
                raise NotFound(f"{request.id} has no function {request.func[:64]!r}; it has: {has}")
            try:
                cause, uid = Cause(caller=str(act.caller)), act.caller.bounded
                return await self._runners.call(plugin, request.func, request.payload, uid, cause, act.renew)
            except Superseded:
                continue

    async def _deliver(self, plugin: Plugin, topic: str, payload: str, cause: Cause) -> None:
        """Deliver an event to a plugin once it is no longer held back. Raises `NotFound` if it takes no events."""
        while self._plugins.get(plugin.name) is plugin and plugin.health.record.aside is None:
            if not plugin.holds(f"events:{topic}"):
                return
            if plugin.loaded.abi != "component" and "on_event" not in plugin.functions:
                raise NotFound(f"{plugin.name} does not take events")
            if held := plugin.health.held_for(time.monotonic()):
                await asyncio.sleep(held)
                continue
            try:
                await self._runners.event(plugin, topic, payload, cause)
            except Superseded:
                continue
            return

    # capabilities

    async def _decide(self, request: api.GrantCapability | api.RevokeCapability, act: Act) -> api.Plugin:
        """Handler of `grant` and `revoke`."""
        name, capability, granted = request.id, request.capability, isinstance(request, api.GrantCapability)
        async with self._changing:
            plugin = self._find(name)
            capabilities.check(capability)
            require_asked(plugin.manifest, capability)
            if capability == capabilities.ALWAYS:
                raise Conflict(f"every plugin has {capability}")
            if granted:
                _require_own(act, (capability,))
            wider = [item for item in plugin.granted if item != capability and capabilities.covers(item, capability)]
            if not granted and wider:
                raise Conflict(f"{name} has {capability} through {wider[0]}; revoke that instead")
            before, decided = brief(plugin), {**plugin.decided, capability: granted}
            after = capabilities.effective(plugin.manifest.asked, decided, plugin.configured)

            def work(tx: Transaction) -> None:
                store.put_grants(tx, name, decided)
                act.commit(tx, before=before, after=brief_of(plugin.loaded, after))

            await self._database.write(work)
            plugin.decide(decided)
            if plugin.before and not granted:
                plugin.before.revoke(capability)
            # The manager decides again on each call that it answers; a worker learns what it may do when it starts.
            self._runners.retire(name)
            return shown(plugin)

    grant = revoke = _decide

    async def _refused(self, plugin: Plugin, call: str, name: str, error: Denied, cause: Cause) -> None:
        """A plugin tried a privileged act without the capability."""
        caller, params = itself(plugin.name), cause.recorded()
        entry = Entry("denied", caller, call, name, params, error=error.code, message=str(error))
        await self._ledger.refuse(entry)

    # setting aside

    async def disable(self, request: api.Disable, act: Act) -> api.Plugin:
        async with self._changing:
            plugin = self._find(request.id)
            reason = request.reason or f"by {act.caller}"
            await self._standing.put_aside(plugin, "disabled", reason, act.commit)
            self._runners.retire(plugin.name)
            return shown(plugin)

    async def enable(self, request: api.Enable, act: Act) -> api.Plugin:
        async with self._changing:
            plugin = self._find(request.id)
            await self._standing.put_aside(plugin, None, None, act.commit)
            return shown(plugin)

    async def quarantine(self, plugin: Plugin) -> None:
        """A plugin failed too often in a row: quarantine it; that is on disk before anybody learns of it."""
        self._runners.retire(plugin.name)
        await self._standing.quarantine(plugin)

    # work in the background

    async def _write_down(self) -> None:
        """Save changed records from time to time; runs until the end."""
        while not self._closed:  # if cancelled during a write, only waits for it
            await asyncio.sleep(WRITE_DOWN)
            with contextlib.suppress(Unavailable):  # logged by the database; the next time may succeed
                await self._standing.write_down()


def _require_entry(manifest: Manifest, functions: Sequence[str]) -> None:
    """Raises `BadRequest` if a manifest names a function as its entry that does not exist."""
    if manifest.plugin_type == "wasm" and manifest.entry not in (None, *functions):
        raise BadRequest(
            f"the manifest's entry {manifest.entry!r} is not a function of the plugin; it has: {', '.join(functions)}"
        )


def _require_own(act: Act, held: Sequence[str]) -> None:
    """Raises `Denied` if a plugin's capabilities amount to rights that the actor lacks: anybody who grants them, or
    chooses the code that has them, could otherwise use the plugin to do what they may not do themselves.
    """
    require_within(act.caller, None, capabilities.rights(held))


def _inherited(before: Plugin | None, manifest: Manifest) -> dict[str, bool]:
    """The decisions about the previous version that still apply to this one."""
    return capabilities.inherited(manifest.asked, before.decided) if before else {}


def _fresh(before: Plugin | None) -> Record:
    """The record of a new version: empty, but a disabled plugin stays disabled."""
    if before and (old := before.health.record).aside == "disabled":
        return Record(aside=old.aside, reason=old.reason, since=old.since)
    return Record()
