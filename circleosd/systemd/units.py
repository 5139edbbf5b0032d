"""The registry's service manager on systemd: the system's or the user's, over D-Bus (org.freedesktop.systemd1(5))."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from circleosd.errors import BadRequest, CircleError, Conflict, Denied, NotFound, Timeout, Unavailable
from circleosd.registry.units import LogLine, Scope, Switch, UnitState, Verb, signal_name
from circleosd.systemd.buserrors import ErrorReply, Lost, Unheard, explained

if TYPE_CHECKING:  # dbus-fast is imported at the first call: a registry asked for its health needs none of it
    from dbus_fast import Message

    from circleosd.systemd.bus import Connection

T = TypeVar("T")

RULE_MAKER = "circleosd-polkit.service"  # brings the polkit rule up to date; the registry may start it
RULE_ARRIVAL = (0.0, 0.1, 0.2, 0.4)  # seconds from a rule's making until it is tried whether polkit has it
LOOK = 0.1  # seconds between looks at a job that nobody tells of any more
TRIES = 5  # of what is lost: systemd may be executed anew more than once in a row
METHODS: dict[Verb, str] = {
    "start": "StartUnit",
    "stop": "StopUnit",
    "restart": "RestartUnit",
    "reload": "ReloadUnit",
}
UNIT_NAME = re.compile(  # systemd.unit(5); a template without its instance is no unit
    r"[A-Za-z0-9:_.\\-]+(@[A-Za-z0-9:_.\\@-]+)?"
    r"\.(service|socket|target|device|mount|automount|swap|timer|path|slice|scope)"
)

_GONE = "systemd or the message bus went away"
_SYSTEMD = "org.freedesktop.systemd1"
_MANAGER = (_SYSTEMD, "/org/freedesktop/systemd1", f"{_SYSTEMD}.Manager")
_UNITS = "/org/freedesktop/systemd1/unit"
_UNIT = f"{_SYSTEMD}.Unit"
_PROPERTIES = "org.freedesktop.DBus.Properties"
_FROM_SYSTEMD = f"type='signal',sender='{_SYSTEMD}'"
_JOB_REMOVED = f"{_FROM_SYSTEMD},interface='{_SYSTEMD}.Manager',member='JobRemoved'"
_UNIT_NEW = f"{_FROM_SYSTEMD},interface='{_SYSTEMD}.Manager',member='UnitNew'"
_RELOADING = f"{_FROM_SYSTEMD},interface='{_SYSTEMD}.Manager',member='Reloading'"
_CHANGED = f"{_FROM_SYSTEMD},interface='{_PROPERTIES}',path_namespace='{_UNITS}'"
_UNKNOWN = 2**64 - 1  # how systemd says that it cannot tell a figure
_EXITED, _KILLED = 1, (2, 3)  # CLD_EXITED; CLD_KILLED, CLD_DUMPED: waitid(2)
_SINCE = {  # when a unit entered its state, by the state
    "active": "ActiveEnterTimestamp",
    "reloading": "ActiveEnterTimestamp",
    "inactive": "InactiveEnterTimestamp",
    "failed": "InactiveEnterTimestamp",
    "activating": "InactiveExitTimestamp",
    "deactivating": "ActiveExitTimestamp",
}


class SystemdUnits:
    """A `UnitManager` for the units of `scope`; a job may take `timeout` seconds.

    Connects to the bus at the first call, and anew when the bus or systemd went away meanwhile.
    """

    def __init__(self, scope: Scope, *, timeout: float, env: Mapping[str, str] = os.environ) -> None:
        self._scope = scope
        self._timeout = timeout
        self._env = env
        self._connecting = asyncio.Lock()
        self._connection: Connection | None = None

    async def states(self, units: Sequence[str]) -> list[UnitState]:
        """See `UnitManager`. One round trip, however many units."""
        sent = [unit for unit in units if UNIT_NAME.fullmatch(unit)]
        rows = iter(await self._ask(_MANAGER, "ListUnitsByNames", "as", sent) if sent else ())
        return [UnitState(unit, *next(rows)[1:5]) if UNIT_NAME.fullmatch(unit) else _absent(unit) for unit in units]

    async def detail(self, unit: str) -> UnitState:
        """See `UnitManager`. One round trip, another for what triggers the unit."""
        if not UNIT_NAME.fullmatch(unit):
            return _absent(unit)
        properties = await self._properties(unit)
        state = replace(state_of(unit, properties), memory=_figure(properties.get("MemoryCurrent", _UNKNOWN)))
        triggers = await self.states(state.triggered_by)
        return replace(state, listening=any(trigger.active == "active" for trigger in triggers))

    async def listening(self, unit: str) -> list[str]:
        """See `UnitManager`. For all that `detail` tells, systemd takes 2 ms when the unit has just stopped."""
        target = (_SYSTEMD, object_path(unit), _PROPERTIES)
        triggers = (await self._ask(target, "Get", "ss", _UNIT, "TriggeredBy")).value
        return [trigger.unit for trigger in await self.states(triggers) if trigger.active == "active"]

    async def matching(self, pattern: str) -> list[str]:
        """See `UnitManager`."""
        rows = await self._ask(_MANAGER, "ListUnitsByPatterns", "asas", [], [pattern])
        return sorted(row[0] for row in rows)

    async def job(self, verb: Verb, unit: str) -> str:
        """See `UnitManager`. A job that takes too long is not canceled."""
        _check(unit)
        try:
            async with asyncio.timeout(self._timeout):
                return await self._allowed_job(verb, unit)
        except ErrorReply as error:
            raise await self._explained(verb, unit, error) from error
        except TimeoutError as exc:
            raise Timeout(f"the job to {verb} {unit} is not done after {self._timeout:g} s; it goes on") from exc

    async def _allowed_job(self, verb: Verb, unit: str) -> str:
        """Do a job, of a unit that has just been cataloged as soon as polkit has the new rule. Raises `ErrorReply`.

        The rule is asked for each time: a maker that runs already may have looked at the catalog before it changed.
        """
        for again in RULE_ARRIVAL:
            try:
                return await self._whole_job(verb, unit)
            except ErrorReply as error:
                if not error.refusal or self._scope == "user" or os.geteuid() == 0:
                    raise
                with contextlib.suppress(ErrorReply, Lost, Unheard):  # there is none where the rule is made otherwise
                    await _job(await self._connected(), METHODS["start"], RULE_MAKER)
                await asyncio.sleep(again)
        return await self._whole_job(verb, unit)

    async def _whole_job(self, verb: Verb, unit: str) -> str:
        """Do a job and tell its result, also when systemd was executed anew meanwhile, or the bus was.

        Where that leaves it open whether there is a job, it is asked for again, unless there is one or it was done: to
        start, stop or reload twice is as good as once, and a restart shows in the unit's invocation.
        """
        before = (await self._properties(unit))["InvocationID"] if verb == "restart" else None
        for _ in range(TRIES):
            try:
                return await _job(await self._connected(), METHODS[verb], unit)
            except Unheard:
                return await self._unheard(verb, unit)
            except Lost:
                properties = await self._properties(unit)
                if properties["Job"][0] or (verb == "restart" and properties["InvocationID"] != before):
                    return await self._unheard(verb, unit)
        raise Unavailable(f"cannot tell whether there is a job to {verb} {unit}: {_GONE}")

    async def _unheard(self, verb: Verb, unit: str) -> str:
        """The result of a job that nobody tells of any more, by the unit's state once it has ended."""
        while (properties := await self._properties(unit))["Job"][0]:
            await asyncio.sleep(LOOK)
        wanted = ("inactive", "failed") if verb == "stop" else ("active", "reloading", "inactive")
        return "done" if properties["ActiveState"] in wanted else "failed"

    async def switch(self, verb: Switch, unit: str) -> str:
        """See `UnitManager`.

        polkit is not told which unit file a request is about (systemd 252), and the right to enable any unit file is
        as good as root. So whoever is not root starts a unit that does just this one thing for him: `switch_unit`.
        NixOS has no such unit.
        """
        _check(unit)
        if self._scope == "system" and os.geteuid() != 0:
            switch = switch_unit(verb, unit)
            try:
                result = await self.job("start", switch)
            except NotFound as exc:
                template = f"circleosd-{verb}@.service"
                raise Conflict(
                    f"cannot {verb} {unit}: this host has no {template}; its configuration says what starts at boot"
                ) from exc
            if result != "done":
                said = " | ".join(await self.log_tail(switch, 3)) or f"the result of {switch} is {result}"
                raise Conflict(f"cannot {verb} {unit}: {said}")
        else:
            try:
                await _switch(await self._connected(), verb, unit)
            except ErrorReply as error:
                raise explained(f"{verb} {unit}", error) from error
            except Lost as exc:
                raise Unavailable(f"cannot {verb} {unit}: {_GONE}") from exc
        state = await self.enabled(unit)
        if verb == "enable" and state == "static":
            raise Conflict(f"cannot enable {unit}: it has no [Install] section")
        return state

    async def enabled(self, unit: str) -> str:
        """See `UnitManager`."""
        _check(unit)
        return str(await self._ask(_MANAGER, "GetUnitFileState", "s", unit))

    async def watch(self, units: Sequence[str], pattern: str = "") -> AsyncIterator[UnitState]:
        """See `UnitManager`. Nothing is polled."""
        shown: dict[str, UnitState] = {}
        while True:
            seen = 0
            try:
                async with aclosing(_changes(await self._connected(), units, pattern)) as changes:
                    async for state in changes:
                        seen += 1
                        if _differs(state, shown.get(state.unit)):
                            shown[state.unit] = state
                            yield state
            except ErrorReply as error:
                raise explained("watch units", error) from error
            except Lost as exc:
                if seen == 0:  # not even on a new connection
                    raise Unavailable(f"cannot watch units: {_GONE}") from exc

    async def log_tail(self, unit: str, lines: int) -> list[str]:
        """See `UnitManager`."""
        from circleosd.systemd import logs

        properties = await self._properties(unit)
        began, invocation = properties["InactiveExitTimestamp"] / 1e6, bytes(properties["InvocationID"]).hex()
        if not began or not invocation:
            return []
        ended = properties["ActiveState"] in ("failed", "inactive") or properties["SubState"] == "auto-restart"
        return await asyncio.to_thread(logs.of_run, unit, began, invocation, lines, self._scope, ended=ended)

    async def logs(self, unit: str, lines: int, since: float | None = None) -> list[LogLine]:
        """See `UnitManager`."""
        from circleosd.systemd import logs

        _check(unit)
        return await asyncio.to_thread(logs.tail, unit, lines, since, self._scope)

    async def follow(self, unit: str, lines: int, since: float | None = None) -> AsyncIterator[LogLine]:
        """See `UnitManager`."""
        from circleosd.systemd import logs

        _check(unit)
        async with aclosing(logs.follow(unit, lines, since, self._scope)) as found:
            async for line in found:
                yield line

    async def close(self) -> None:
        """Leave the bus."""
        if self._connection:
            await self._connection.close()

    async def _connected(self) -> Connection:
        from circleosd.systemd import bus

        async with self._connecting:
            for _ in range(2):  # lets the event loop look at the socket, and then act on its end
                await asyncio.sleep(0)
            if self._connection is None or self._connection.lost:
                self._connection = await bus.connect(bus_address(self._scope, self._env))
            return self._connection

    async def _ask(self, target: tuple[str, str, str], member: str, signature: str, *body: Any) -> Any:
        """The answer to a question without side effects, which is asked again if the connection is lost over it."""
        for _ in range(TRIES):
            try:
                return (await (await self._connected()).call(target, member, signature, body)).body[0]
            except ErrorReply as error:
                raise explained("ask systemd", error) from error
            except Lost:
                continue
        raise Unavailable(f"cannot ask systemd: {_GONE}")

    async def _explained(self, verb: Verb, unit: str, error: ErrorReply) -> CircleError:
        meaning = explained(f"{verb} {unit}", error)
        if isinstance(meaning, Denied) and (name := (await self._properties(unit))["Id"]) != unit:
            return Denied(f"{meaning}; {unit} is another name of {name}, which the catalog must have instead")
        return meaning

    async def _properties(self, unit: str) -> dict[str, Any]:
        return _plain(await self._ask((_SYSTEMD, object_path(unit), _PROPERTIES), "GetAll", "s", ""))


async def _job(connection: Connection, method: str, unit: str) -> str:
    """Start a job and wait for its JobRemoved, which may come before the reply that names the job."""
    async with connection.signals([_JOB_REMOVED], lambda signal: signal.member == "JobRemoved", keep=True) as removed:
        job = (await connection.call(_MANAGER, method, "ss", [unit, "replace"])).body[0]
        while signal := await removed.get():
            _number, path, _unit, result = signal.body
            if path == job:
                return str(result)
    raise Unheard


async def _switch(connection: Connection, verb: Switch, unit: str) -> None:
    """Enable or disable a unit file and have systemd read it, as systemctl(1) does."""
    if verb == "enable":
        await connection.call(_MANAGER, "EnableUnitFiles", "asbb", [[unit], False, False])
    else:
        await connection.call(_MANAGER, "DisableUnitFiles", "asb", [[unit], False])
    await connection.call(_MANAGER, "Reload")


async def _changes(connection: Connection, units: Sequence[str], pattern: str) -> AsyncGenerator[UnitState, None]:
    """The states of `units` and of those that match `pattern`, and again after signals that concern them, also when a
    state stayed as it was.
    """
    names: dict[str, list[str]] = {}  # by object path; several when one is another's alias
    known: dict[str, dict[str, Any]] = {}
    serials: dict[str, int] = {}

    async def read(path: str) -> None:
        reply = await connection.call((_SYSTEMD, path, _PROPERTIES), "GetAll", "s", [""])
        known[path], serials[path] = _plain(reply.body[0]), reply.serial

    def wanted(signal: Message) -> bool:
        if signal.member == "UnitNew":
            return fnmatchcase(signal.body[0], pattern)
        return signal.path in names or signal.member == "Reloading"

    async with connection.signals([_CHANGED, _RELOADING, *([_UNIT_NEW] if pattern else [])], wanted) as signals:
        while True:
            names.clear()
            valid = [unit for unit in units if UNIT_NAME.fullmatch(unit)]
            if pattern:
                found = (await connection.call(_MANAGER, "ListUnitsByPatterns", "asas", [[], [pattern]])).body[0]
                valid += [row[0] for row in found if row[0] not in valid]
            rows = (await connection.call(_MANAGER, "ListUnitsByNames", "as", [valid])).body[0]
            for unit, row in zip(valid, rows, strict=True):
                names.setdefault(row[6], []).append(unit)
            for unit in set(units).difference(valid):
                yield _absent(unit)
            for path in names:
                await read(path)
                for unit in names[path]:
                    yield state_of(unit, known[path])
            while signal := await signals.get():
                if signal.member == "Reloading":
                    if not signal.body[0]:  # the unit files were read anew
                        break
                elif signal.member == "UnitNew":
                    unit, path = signal.body
                    if path not in names:
                        names[path] = [unit]
                        await read(path)
                        yield state_of(unit, known[path])
                elif (path := signal.path or "") in names and signal.serial > serials[path]:  # later than what we read
                    interface, changed, _invalidated = signal.body
                    known[path] |= _plain(changed)
                    if interface == _UNIT:  # comes after the one of the unit's type, and completes it
                        for unit in names[path]:
                            yield state_of(unit, known[path])
            else:
                raise Lost


def state_of(unit: str, properties: Mapping[str, Any]) -> UnitState:
    """The state that a unit's properties describe, without memory and listening."""
    active = properties["ActiveState"]
    alive = active not in ("inactive", "failed")  # while a unit starts, its PID is told before its state
    ended, how = properties.get("ExecMainCode"), properties.get("ExecMainStatus", 0)
    return UnitState(
        unit=unit,
        description=properties["Description"],
        load=properties["LoadState"],
        active=active,
        sub=properties["SubState"],
        since=properties[_SINCE.get(active, "StateChangeTimestamp")] / 1e6 or None,
        pid=properties.get("MainPID") or None if alive else None,
        restarts=properties.get("NRestarts"),
        result=properties.get("Result"),
        exit_status=how if ended == _EXITED else None,
        signal=signal_name(how) if ended in _KILLED else None,
        triggered_by=tuple(properties["TriggeredBy"]),
        requires=tuple(unit for kind in ("Requires", "Requisite", "BindsTo") for unit in properties[kind]),
    )


def bus_address(scope: Scope, env: Mapping[str, str]) -> str:
    """The address of the bus that the scope's systemd is on. Raises `Unavailable` when nothing tells it."""
    if scope == "system":
        return env.get("DBUS_SYSTEM_BUS_ADDRESS") or "unix:path=/run/dbus/system_bus_socket"
    if address := env.get("DBUS_SESSION_BUS_ADDRESS"):
        return address
    if runtime := env.get("XDG_RUNTIME_DIR"):
        return f"unix:path={quote(f'{runtime}/bus', safe='/')}"
    raise Unavailable("cannot find the user's message bus: XDG_RUNTIME_DIR is not set; log in by a session of systemd")


def object_path(unit: str) -> str:
    """Where systemd shows a unit on the bus: what is no ASCII letter or digit becomes _ and its hexadecimal code."""
    return f"{_UNITS}/" + re.sub(r"[^A-Za-z0-9]|^[0-9]", lambda found: f"_{ord(found[0]):02x}", unit)


def switch_unit(verb: Switch, unit: str) -> str:
    """The oneshot unit that does `verb` to `unit`, whose name is escaped as by systemd-escape(1)."""
    instance = re.sub(r"^\.|[^A-Za-z0-9:_.]", lambda found: f"\\x{ord(found[0]):02x}", unit)
    return f"circleosd-{verb}@{instance}.service"


def _check(unit: str) -> None:
    if not UNIT_NAME.fullmatch(unit):
        raise BadRequest(f"{unit[:64]!r} is not the name of a unit")


def _absent(unit: str) -> UnitState:
    return UnitState(unit, unit, "not-found", "inactive", "dead")


def _differs(new: UnitState, old: UnitState | None) -> bool:
    """Whether a state is news. A failed unit may have failed again; a unit dropped from memory has no `since`.

    The result is reset to success a moment before a unit leaves the state that it belonged to, which is no news; nor is
    the end of its main process while others of it stop.
    """
    if old is None or (new.since or 0.0) > (old.since or 0.0):
        return True
    if new.pid and old.pid and new.pid != old.pid:
        return True
    return (new.load, new.active, new.sub) != (old.load, old.active, old.sub)


def _plain(properties: Mapping[str, Any]) -> dict[str, Any]:
    """Properties without the signatures of their values."""
    return {name: variant.value for name, variant in properties.items()}


def _figure(value: int) -> int | None:
    return None if value == _UNKNOWN else value
