"""The actions of service-registry."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, cast

from circleosd.api import plugins
from circleosd.api import registry as api
from circleosd.api.common import Event
from circleosd.errors import Conflict, Denied, Limit, NotFound, UnitFailed
from circleosd.fair import Fair
from circleosd.handlers import Act, Handlers, Resolution
from circleosd.places import Places
from circleosd.registry.catalog import PLUGIN_PREFIX, WORKER_UNITS, Catalog, Entry, plugin_entry
from circleosd.registry.explaining import explain, skipped
from circleosd.registry.units import LogLine, Switch, UnitManager, UnitState, Verb
from circleosd.rows import LEDGER_SCHEMA

log = logging.getLogger(__name__)

MIGRATIONS = (LEDGER_SCHEMA,)
DOWN: dict[Verb, tuple[str, ...]] = {  # states in which a job that is done has nevertheless failed
    "start": ("failed",),
    "stop": (),
    "restart": ("failed",),
    "reload": ("failed", "inactive"),
}
ON_ITS_WAY: dict[str, tuple[str, ...]] = {  # states in which an act whose end nobody saw is done, or still in progress
    "start": ("active", "activating", "reloading"),
    "stop": ("inactive", "failed", "deactivating"),
    "restart": ("active", "activating", "reloading", "deactivating"),
    "reload": ("active", "activating", "reloading"),
}
FOLLOWED = 32  # followed logs; each uses a thread and an inotify instance, of which a user may have 128 by default
FOLLOWED_BY_ONE = 16  # uid
READ, READ_BY_ONE = 128, 16  # logs to be read but not followed
READERS = 2  # logs being read at once: their threads compete with all other requests for the interpreter


@dataclass
class _Target:
    """The object of an act: the entry that `check` found in the catalog, and for a job its unit's previous state."""

    entry: Entry
    before: UnitState | None = None


class RegistryService(Handlers):
    """Names to units. `catalog` is called for every request, so that changes to the catalog take effect at once."""

    def __init__(self, catalog: Callable[[], Catalog], units: UnitManager) -> None:
        self._catalog = catalog
        self._units = units
        self._reported: tuple[str, ...] = ()
        self._followed = Places("followed logs", FOLLOWED, FOLLOWED_BY_ONE)
        self._reading = Places("logs to be read", READ, READ_BY_ONE)
        self._turns = Fair(READERS)

    def _read(self) -> Catalog:
        catalog = self._catalog()
        if catalog.problems != self._reported:
            self._reported = catalog.problems
            for problem in catalog.problems:
                log.error("cannot use a catalog file: %s", problem)
        return catalog

    async def list(self, request: api.ListServices, act: Act) -> Sequence[api.Service]:
        catalog = self._read()
        entries = [*catalog.entries.values()]
        if _sees_workers(act):
            entries += [plugin_entry(unit) for unit in await self._units.matching(f"{WORKER_UNITS}*.service")]
        states = await self._units.states([entry.unit for entry in entries])
        act.message = catalog.complaint
        return [_service(entry, state) for entry, state in zip(entries, states, strict=True)]

    async def status(self, request: api.Status, act: Act) -> api.ServiceStatus:
        entry = self._entry(request.name, act)
        state = await self._units.detail(entry.unit)
        await self._check_worker(entry, state)
        act.message = await self._stale(entry.unit)
        return api.ServiceStatus(
            **_service(entry, state),
            enabled=state.enabled,
            since=state.since,
            pid=state.pid,
            memory=state.memory,
            restarts=state.restarts,
            result=state.result,
            exit_status=state.exit_status,
            signal=state.signal,
            triggered_by=[*state.triggered_by],
            listening=state.listening,
        )

    async def logs(self, request: api.Logs, act: Act) -> Sequence[api.LogLine] | AsyncGenerator[api.LogLine, None]:
        entry = self._entry(request.name, act)
        uid = act.caller.bounded
        with self._reading.held(uid):
            async with self._turns.turn(uid):
                await act.renew()
                told = request.lines and not request.follow
                found = await self._units.logs(entry.unit, request.lines, request.since) if told else []
                if not found:
                    await self._check_logged(entry)
        if request.follow:
            return self._lines(self._units.follow(entry.unit, request.lines, request.since), uid)
        return [api.LogLine(time=line.time, text=line.text) for line in found]

    async def _check_logged(self, entry: Entry) -> None:
        """Raises `NotFound` for a unit that neither exists nor has logged anything; a removed unit's log remains."""
        try:
            if await self._units.logs(entry.unit, 1):
                return
        except Limit:  # it has entries
            return
        (state,) = await self._units.states([entry.unit])
        await self._check_worker(entry, state)
        if state.load == "not-found":
            raise _no_unit(entry)

    async def _lines(self, lines: AsyncGenerator[LogLine, None], uid: int | None) -> AsyncGenerator[api.LogLine, None]:
        with self._followed.held(uid):
            async with aclosing(lines):
                async for line in lines:
                    yield api.LogLine(time=line.time, text=line.text)

    async def watch(self, request: api.Watch, act: Act) -> AsyncGenerator[api.Service, None]:
        if request.name is not None:
            entry = self._entry(request.name, act)
            (state,) = await self._units.states([entry.unit])
            await self._check_worker(entry, state)
            return self._changes([entry])
        return self._changes([*self._read().entries.values()], f"{WORKER_UNITS}*.service")

    async def _changes(self, entries: Sequence[Entry], workers: str = "") -> AsyncGenerator[api.Service, None]:
        """The state of each entry's unit, then each change; also for those units of plugins that match `workers`."""
        named: dict[str, list[Entry]] = {}
        for entry in entries:
            named.setdefault(entry.unit, []).append(entry)
        async with aclosing(self._units.watch([*named], workers)) as states:
            async for state in states:
                for entry in named.get(state.unit) or [plugin_entry(state.unit)]:
                    yield _service(entry, state)

    def check(self, request: Any, act: Act) -> None:
        """The handlers of these actions need not repeat these checks."""
        verb, name = act.contract.action, request.name
        entry = self._entry(name, act)
        act.found = _Target(entry)
        if entry.verbs is not None and verb not in entry.verbs:
            allowed = ", ".join(entry.verbs) or "nothing"
            raise Denied(f"the catalog does not allow {verb} for {name}; it allows: {allowed}")
        if entry.name == api.SERVICE and verb in ("stop", "restart"):
            raise Conflict(f"the registry cannot {verb} itself; it exits when idle")
        if entry.name == plugins.SERVICE and act.caller.plugin is not None:
            raise Conflict(f"a plugin cannot {verb} {plugins.SERVICE}, which would wait for the call that requests it")

    async def look(self, request: Any, act: Act) -> None:
        target: _Target = act.found
        unit = target.entry.unit
        if act.contract in (api.Enable, api.Disable):
            try:
                act.before = await self._units.enabled(unit)
            except NotFound as exc:
                raise _no_unit(target.entry) from exc
            return
        (target.before,) = await self._units.states([unit])
        act.before = target.before.active
        if act.before == "failed":  # the cause of an earlier failure must not be taken for the outcome of this job
            target.before = await self._units.detail(unit)

    async def resolve(self, intent: Event) -> Resolution:
        """Compare the intended state of a unit with its current state."""
        verb, name = intent["action"], str(intent["object"])
        try:
            entry = self._read().find(name)
        except NotFound:
            return Resolution(None, NotFound.code, f"the catalog has no service {name}")
        if verb in ("enable", "disable"):
            try:
                enabled = await self._units.enabled(entry.unit)
            except (NotFound, Conflict) as exc:  # a later start would not find out either
                return Resolution(None, exc.code, f"the unit file {entry.unit} cannot be inspected: {exc}")
            matches = enabled.startswith("enabled") == (verb == "enable")
            return Resolution(enabled, None if matches else UnitFailed.code, f"the unit file {entry.unit} is {enabled}")
        if verb not in ON_ITS_WAY:  # another version's
            return await super().resolve(intent)
        (state,) = await self._units.states([entry.unit])
        error = None if state.active in ON_ITS_WAY[verb] else UnitFailed.code
        return Resolution(state.active, error, f"the unit {entry.unit} is {state.active} ({state.sub})")

    def _entry(self, name: str, act: Act) -> Entry:
        """The entry of `name`, for the caller. Raises `NotFound`.

        The sockets of workers are for the plugin manager and root: whoever stops one stops the worker too, which a rule
        about the worker may deny.
        """
        sockets = act.caller.vouches or act.caller.privileged
        return self._read().find(name, workers=_sees_workers(act), sockets=sockets)

    async def _job(self, request: api.Start | api.Stop | api.Restart | api.Reload, act: Act) -> api.Job:
        """Handler of `start`, `stop`, `restart` and `reload`."""
        verb, name = cast(Verb, request.action), request.name
        target: _Target = act.found
        entry, before = target.entry, target.before
        assert before is not None
        by_manager = act.caller.vouches and name.endswith(".socket")  # it listens before there is a plugin
        if verb in ("start", "restart") and name.startswith(PLUGIN_PREFIX) and not by_manager:
            await self._check_loaded(entry)
        began = time.time()
        try:
            result = await self._units.job(verb, entry.unit)
        except NotFound as exc:
            if before.load == "not-found":
                raise _no_unit(entry) from exc
            raise Conflict(str(exc)) from exc  # it has a file that systemd cannot parse
        # Not before the job, for which systemd would read the files again.
        (state,), stale = await asyncio.gather(self._units.states([entry.unit]), self._stale(entry.unit))
        act.after = state.active
        if why := await self._failure(verb, entry, result, before, state, began):
            raise UnitFailed("; ".join(filter(None, (why, stale))))
        act.message = "; ".join(filter(None, (await self._word(verb, entry, state, began), stale))) or None
        return api.Job(name=name, unit=entry.unit, result=result, state=state.active, sub=state.sub)

    start = stop = restart = reload = _job

    async def _failure(
        self, verb: Verb, entry: Entry, result: str, before: UnitState, state: UnitState, began: float
    ) -> str | None:
        """The message about a job that failed, or about a unit that has failed since."""
        failed = result != "done" or state.active in DOWN[verb]
        if not failed and not state.waits:
            return None
        state = await self._units.detail(entry.unit)
        if not failed and state.result == "success":
            return None
        why = await explain(self._units, verb, result, before, state, began)
        again = ", which systemd will try again" if state.waits else ""
        return f"cannot {verb} {entry.name} ({entry.unit}){again}: {why}"

    async def _word(self, verb: Verb, entry: Entry, state: UnitState, began: float) -> str | None:
        """The message about a job that is done, if there is one."""
        if verb == "stop" and (listening := await self._units.listening(entry.unit)):
            return f"{entry.name} is stopped; {' '.join(listening)} is still listening and will start it on demand"
        if verb in ("start", "restart") and state.active == "inactive":
            line = await skipped(self._units, entry.unit, began)
            return line and f"{entry.name} was not started: {line}"
        return None

    async def _stale(self, unit: str) -> str | None:
        """The message about a unit whose files on disk are not those that systemd has loaded."""
        if not await self._units.stale(unit):
            return None
        step = f"{self._units.systemctl} daemon-reload"
        return f"a file of {unit} has changed on disk, but systemd still uses the old version; see: {step}"

    async def _check_worker(self, entry: Entry, state: UnitState) -> None:
        """Raises `NotFound` for the worker of a plugin that does not exist; its unit is in `state`."""
        if not entry.name.startswith(PLUGIN_PREFIX):
            return
        if state.load == "not-found":
            raise NotFound(f"no service {entry.name}; see: circlectl service list")
        if state.active == "inactive":
            await self._check_loaded(entry)

    async def _check_loaded(self, worker: Entry) -> None:
        """Raises `NotFound` if the worker has no socket: the templates have units for every name."""
        (socket,) = await self._units.states([f"{worker.unit.rpartition('.')[0]}.socket"])
        if socket.active == "inactive":
            why = "it is not loaded, or has not been called yet; see: circlectl plugin list"
            raise NotFound(f"no {worker.description}: {why}")

    async def _switch(self, request: api.Enable | api.Disable, act: Act) -> api.Enabled:
        """Handler of `enable` and `disable`."""
        verb = cast(Switch, request.action)
        target: _Target = act.found
        entry = target.entry
        # Do not try what systemd would refuse: the unit that tries it would remain as failed.
        if act.before == "alias":
            raise Conflict(
                f"cannot {verb} {entry.unit}: it is an alias of another unit, whose name the catalog must use"
            )
        if verb == "enable" and act.before.startswith("masked"):
            step = f"{self._units.systemctl} unmask {entry.unit}"
            raise Conflict(f"cannot enable {entry.unit}: it is masked; see: {step}")
        if verb == "enable" and act.before in ("generated", "transient"):
            raise Conflict(f"cannot enable {entry.unit}: it is {act.before} and has no unit file of its own")
        act.after = enabled = await self._units.switch(verb, entry.unit)
        if enabled == "not-found":
            step = f"{self._units.systemctl} link"
            act.message = f"{entry.unit} was a link to a file elsewhere, and was removed; create it again with: {step}"
        return api.Enabled(name=request.name, unit=entry.unit, enabled=enabled)

    enable = disable = _switch


def _sees_workers(act: Act) -> bool:
    """Whether the caller sees the plugins' workers as services. Plugins do not: they could break other plugins."""
    return act.caller.plugin is None


def _no_unit(entry: Entry) -> NotFound:
    return NotFound(f"the unit {entry.unit} of the service {entry.name} does not exist")


def _service(entry: Entry, state: UnitState) -> api.Service:
    return api.Service(
        name=entry.name,
        state=state.active if state.load == "loaded" else state.load,
        sub=state.sub,
        description=entry.description or state.description,
        unit=entry.unit,
    )
