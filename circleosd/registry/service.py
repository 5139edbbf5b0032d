"""The actions of service-registry."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from circleosd import ledger
from circleosd.api.registry import Job, ListServices, Restart, Service, ServiceStatus, Start, Status, Stop
from circleosd.errors import Conflict, Denied, NotFound, UnitFailed
from circleosd.registry.catalog import PLUGIN_PREFIX, PLUGIN_UNITS, Catalog, Entry, plugin_entry
from circleosd.registry.units import UnitManager, UnitState, Verb
from circleosd.service import Act

log = logging.getLogger(__name__)

MIGRATIONS = (ledger.SCHEMA,)
OWN_NAME = "service-registry"
LOG_LINES = 5  # of a failed unit, shown with the error


class RegistryService:
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
            act.message = f"{len(catalog.problems)} catalog files cannot be used: {catalog.problems[0]}"
        return [_service(entry, state) for entry, state in zip(entries, states, strict=True)]

    async def status(self, request: Status, act: Act) -> ServiceStatus:
        """Handler of `status`."""
        entry = self._read().find(request.name)
        (state,) = await self._units.states([entry.unit])
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

    async def _job(self, verb: Verb, name: str, act: Act) -> Job:
        entry = self._read().find(name)
        if entry.verbs is not None and verb not in entry.verbs:
            raise Denied(f"the catalog does not allow {verb} for {name}, only: {', '.join(entry.verbs) or 'nothing'}")
        if entry.name == OWN_NAME and verb != "start":
            raise Conflict(f"the registry cannot {verb} itself; it exits by itself when idle")
        (before,) = await self._units.states([entry.unit])
        if before.load == "not-found":
            raise NotFound(f"the unit {entry.unit} of the service {name} does not exist")
        act.before = before.active
        result = await self._units.job(verb, entry.unit)
        (state,) = await self._units.states([entry.unit])
        act.after = state.active
        if result != "done":
            raise UnitFailed(await self._why(verb, name, entry, state, result))
        if verb == "stop" and state.listening:
            act.message = f"{name} is stopped; {' '.join(state.triggered_by)} still listens and starts it on demand"
        return Job(name=name, unit=entry.unit, result=result, state=state.active, sub=state.sub, pid=state.pid)

    async def _why(self, verb: Verb, name: str, entry: Entry, state: UnitState, result: str) -> str:
        """Why a job failed: what systemd says of the job and the unit, and what the unit said last."""
        details = [f"the job's result is {result}"]
        if state.result and state.result != "success":
            details.append(f"the unit's is {state.result}")
        if state.exit_status:
            details.append(f"exit status {state.exit_status}")
        tail = await self._units.log_tail(entry.unit, LOG_LINES)
        said = f"; it said: {' | '.join(tail)}" if tail else ""
        return f"cannot {verb} {name} ({entry.unit}): {', '.join(details)}{said}"


def _service(entry: Entry, state: UnitState) -> Service:
    return Service(
        name=entry.name,
        state=state.active if state.load == "loaded" else state.load,
        sub=state.sub,
        description=entry.description or state.description,
        unit=entry.unit,
    )
