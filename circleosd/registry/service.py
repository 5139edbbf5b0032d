"""The actions of service-registry."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence

from circleosd import ledger
from circleosd.api.common import Event
from circleosd.api.registry import (
    Disable,
    Enable,
    Enabled,
    Job,
    ListServices,
    LogLine,
    Logs,
    Reload,
    Restart,
    Service,
    ServiceStatus,
    Start,
    Status,
    Stop,
    Watch,
)  # fmt: skip
from circleosd.errors import CircleError, Conflict, Denied, NotFound, UnitFailed
from circleosd.handlers import Act, Handlers, Resolution, closing
from circleosd.registry import units
from circleosd.registry.catalog import PLUGIN_PREFIX, PLUGIN_UNITS, Catalog, Entry, plugin_entry
from circleosd.registry.units import Switch, UnitManager, UnitState, Verb

log = logging.getLogger(__name__)

MIGRATIONS = (ledger.SCHEMA,)
OWN_NAME = "service-registry"
LOG_LINES = 5  # of a failed unit, shown with the error
JOURNAL_LAG = 10  # looks for what was just logged
RUN = ("done", "failed", "timeout")  # results of a job that may have run the unit: not of one that systemd gave up
START_LIMIT = "start-limit-hit"  # systemd.service(5), SERVICE_RESULT


class RegistryService(Handlers):
    """Names to units. `catalog` is called for every request, so that an edited catalog counts at once."""

    def __init__(self, catalog: Callable[[], Catalog], units: UnitManager) -> None:
        self._catalog = catalog
        self._units = units
        self._reported: tuple[str, ...] = ()

    def _read(self) -> Catalog:
        catalog = self._catalog()
        if catalog.problems != self._reported:
            self._reported = catalog.problems
            for problem in catalog.problems:
                log.error("cannot use a catalog file: %s", problem)
        return catalog

    async def list(self, request: ListServices, act: Act) -> Sequence[Service]:
        """Handler of `list`."""
        catalog = self._read()
        workers = [plugin_entry(unit) for unit in await self._units.matching(PLUGIN_UNITS)]
        entries = [*catalog.entries.values(), *workers]
        states = await self._units.states([entry.unit for entry in entries])
        if catalog.problems:
            more = f" (and {len(catalog.problems) - 1} more)" if catalog.problems[1:] else ""
            act.message = f"a catalog file cannot be used{more}: {catalog.problems[0]}"
        return [_service(entry, state) for entry, state in zip(entries, states, strict=True)]

    async def status(self, request: Status, act: Act) -> ServiceStatus:
        """Handler of `status`."""
        entry = self._read().find(request.name)
        state = await self._units.detail(entry.unit)
        if state.load == "not-found" and entry.name.startswith(PLUGIN_PREFIX):
            raise NotFound(f"no service {request.name}; see: circlectl service list")
        return ServiceStatus(
            **_service(entry, state),
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

    async def start(self, request: Start, act: Act) -> Job:
        """Handler of `start`."""
        return await self._job("start", request.name, act)

    async def stop(self, request: Stop, act: Act) -> Job:
        """Handler of `stop`."""
        return await self._job("stop", request.name, act)

    async def restart(self, request: Restart, act: Act) -> Job:
        """Handler of `restart`."""
        return await self._job("restart", request.name, act)

    async def reload(self, request: Reload, act: Act) -> Job:
        """Handler of `reload`."""
        return await self._job("reload", request.name, act)

    async def enable(self, request: Enable, act: Act) -> Enabled:
        """Handler of `enable`."""
        return await self._switch("enable", request.name, act)

    async def disable(self, request: Disable, act: Act) -> Enabled:
        """Handler of `disable`."""
        return await self._switch("disable", request.name, act)

    async def logs(self, request: Logs, act: Act) -> Sequence[LogLine] | AsyncIterator[LogLine]:
        """Handler of `logs`."""
        entry = self._read().find(request.name)
        if request.follow:
            return self._lines(self._units.follow(entry.unit, request.lines, request.since))
        found = await self._units.logs(entry.unit, request.lines, request.since) if request.lines else []
        return [LogLine(time=line.time, text=line.text) for line in found]

    async def _lines(self, lines: AsyncIterator[units.LogLine]) -> AsyncIterator[LogLine]:
        async with closing(lines):
            async for line in lines:
                yield LogLine(time=line.time, text=line.text)

    async def watch(self, request: Watch, act: Act) -> AsyncIterator[Service]:
        """Handler of `watch`."""
        catalog = self._read()
        if request.name is not None:
            return self._changes([catalog.find(request.name)])
        workers = [plugin_entry(unit) for unit in await self._units.matching(PLUGIN_UNITS)]
        return self._changes([*catalog.entries.values(), *workers])

    async def _changes(self, entries: Sequence[Entry]) -> AsyncIterator[Service]:
        """The state of each entry's unit, then each change of it."""
        states = self._units.watch([*{entry.unit for entry in entries}])
        async with closing(states):
            async for state in states:
                for entry in entries:
                    if entry.unit == state.unit:
                        yield _service(entry, state)

    async def resolve(self, intent: Event) -> Resolution:
        """See `Handlers`: what was wanted of a unit is compared with its state."""
        verb, name = intent["action"], str(intent["object"])
        try:
            entry = self._read().find(name)
        except NotFound:
            return Resolution(None, NotFound.code, f"the catalog has no service {name}")
        if verb in ("enable", "disable"):
            enabled = await self._units.enabled(entry.unit)
            matches = enabled.startswith("enabled") == (verb == "enable")
            return Resolution(enabled, None if matches else UnitFailed.code, f"the unit file {entry.unit} is {enabled}")
        (state,) = await self._units.states([entry.unit])
        wanted = ("inactive", "failed") if verb == "stop" else ("active", "activating")
        error = None if state.active in wanted else UnitFailed.code
        return Resolution(state.active, error, f"the unit {entry.unit} is {state.active} ({state.sub})")

    def _allowed(self, verb: Verb | Switch, name: str) -> Entry:
        """The entry of `name`, if the catalog allows `verb` for it. Raises `NotFound`, `Denied`, `Conflict`."""
        entry = self._read().find(name)
        if entry.verbs is not None and verb not in entry.verbs:
            allowed = ", ".join(entry.verbs) or "nothing"
            raise Denied(f"the catalog does not allow {verb} for {name}; its verbs there: {allowed}")
        if entry.name == OWN_NAME and verb in ("stop", "restart"):
            raise Conflict(f"the registry cannot {verb} itself; it exits by itself when idle")
        return entry

    async def _job(self, verb: Verb, name: str, act: Act) -> Job:
        entry = self._allowed(verb, name)
        (before,) = await self._units.states([entry.unit])
        act.before = before.active
        if before.active == "failed":  # what it failed with must not be taken for the outcome of this job
            before = await self._units.detail(entry.unit)
        began = time.time()
        try:
            result = await self._units.job(verb, entry.unit)
        except NotFound as exc:
            if before.load == "not-found":
                raise _no_unit(entry) from exc
            raise Conflict(str(exc)) from exc  # it has a file, of which systemd can make nothing
        (state,) = await self._units.states([entry.unit])
        act.after = state.active
        if result != "done" or (verb != "stop" and state.active == "failed"):
            state = await self._units.detail(entry.unit)
            if verb == "reload" or result not in RUN:
                said = await self._said_since(began, entry.unit)
                raise UnitFailed(f"cannot {verb} {name} ({entry.unit}): the job's result is {result}{said}")
            raise UnitFailed(await self._why(verb, name, entry, state, result, begun=not _as_before(before, state)))
        if verb == "stop" and (stopped := await self._units.detail(entry.unit)).listening:
            act.message = f"{name} is stopped; {' '.join(stopped.triggered_by)} still listens and starts it on demand"
        return Job(name=name, unit=entry.unit, result=result, state=state.active, sub=state.sub)

    async def _switch(self, verb: Switch, name: str, act: Act) -> Enabled:
        entry = self._allowed(verb, name)
        try:
            act.before = before = await self._units.enabled(entry.unit)
        except NotFound as exc:
            raise _no_unit(entry) from exc
        # What systemd would refuse is not tried: the unit that tries it would be left behind as failed.
        if before == "alias":
            raise Conflict(f"cannot {verb} {entry.unit}: that is another name of a unit, which the catalog must have")
        if verb == "enable" and before.startswith("masked"):
            raise Conflict(f"cannot enable {entry.unit}: it is masked; see: systemctl unmask {entry.unit}")
        act.after = enabled = await self._units.switch(verb, entry.unit)
        return Enabled(name=name, unit=entry.unit, enabled=enabled)

    async def _why(self, verb: Verb, name: str, entry: Entry, state: UnitState, result: str, *, begun: bool) -> str:
        """Why a job failed: what systemd says of the job and the unit, and what the unit said last.

        `begun` is false where the job changed nothing: then all of that but the job's result is about an earlier run.
        """
        what = f"cannot {verb} {name} ({entry.unit}): "
        details = [] if state.result in (None, "success", START_LIMIT) else [f"the unit's is {state.result}"]
        if state.exit_status:
            details.append(f"exit status {state.exit_status}")
        if state.signal:
            details.append(state.signal)
        if begun and state.result != START_LIMIT:
            what += ", ".join((f"the job's result is {result}", *details))
        else:
            what += (
                f"it was started too often in a short time, and systemd did not start it again ({START_LIMIT}); "
                f"try later, or have an administrator type: systemctl reset-failed {entry.unit}"
            )
            if state.result == START_LIMIT:
                return what
            what += "; as to its last run, " + ", ".join(details)
        tail = await self._units.log_tail(entry.unit, LOG_LINES)
        return what + (f"; it said: {' | '.join(tail)}" if tail else "")

    async def _said_since(self, began: float, unit: str) -> str:
        """What the log has of a job that did not run the unit itself, as the end of a sentence."""
        for _ in range(JOURNAL_LAG):
            await asyncio.sleep(0.05)  # what was logged a moment ago is not in the journal yet
            try:
                lines = await self._units.logs(unit, LOG_LINES, began)
            except CircleError:
                break
            if lines:
                return f"; the log says: {' | '.join(line.text for line in lines)}"
        return ""


def _as_before(before: UnitState, state: UnitState) -> bool:
    """Whether a failed unit is as it was before a job: not even a process was started for that.

    systemd calls a unit that was started too often (StartLimitBurst=, systemd.unit(5)) by that name only when its last
    run went well; else its result stays what it was, and so does its time.
    """
    unchanged = (before.active, before.since, before.result) == ("failed", state.since, state.result)
    return unchanged and state.active == "failed" and state.result != "resources"


def _no_unit(entry: Entry) -> NotFound:
    return NotFound(f"the unit {entry.unit} of the service {entry.name} does not exist")


def _service(entry: Entry, state: UnitState) -> Service:
    return Service(
        name=entry.name,
        state=state.active if state.load == "loaded" else state.load,
        sub=state.sub,
        description=entry.description or state.description,
        unit=entry.unit,
    )
